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
# Linux gives a process 65,530 memory mappings by default, and XLA crashes on the one that fails. Every compiled program
# takes some; from this many on the programs are forgotten.
ENOUGH = 40_000


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Most of these tests' time is XLA's: their programs are small, run once, and need no optimising.

    Tests that compute for longer than they compile are marked `optimized`; those of real networks do.
    """
    computes = item.get_closest_marker("optimized") is not None or item.nodeid.startswith(REAL_NETWORKS)
    jax.config.update("jax_disable_most_optimizations", not computes)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    item.session.tests_done = getattr(item.session, "tests_done", 0) + 1
    if item.session.tests_done % 5 == 0 and _mappings() > ENOUGH:  # counting takes up to 40 ms
        runners.clear_cache()
        jax.clear_caches()
        gc.collect()


def _mappings() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0  # only Linux limits them
