"""Settings of every test: the CPU, no network, quick compilation, and memory that is given back."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402  (after the settings that it reads when imported)
import pytest  # noqa: E402

from ppl import runners  # noqa: E402

REAL_NETWORKS = ("tests/models/language/", "tests/models/test_", "tests/models/masked/test_checkpoints")
# Bytes in memory above which a module's compiled programs are forgotten once its tests are done.
ENOUGH = 5e9


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Most of these tests' time is XLA's: their programs are small, run once, and need no optimising.

    Tests that compute for longer than they compile are marked `optimized`; those of real networks do.
    """
    computes = item.get_closest_marker("optimized") is not None or item.nodeid.startswith(REAL_NETWORKS)
    jax.config.update("jax_disable_most_optimizations", not computes)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    yield
    if _resident_bytes() > ENOUGH:
        runners.clear_cache()
        jax.clear_caches()
        gc.collect()


def _resident_bytes() -> float:
    statm = Path("/proc/self/statm")
    if not statm.exists():  # not Linux: always forget
        return float("inf")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
