"""Settings of every test: the CPU, no network, quick compilation, and memory that is given back."""

import gc
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _understands(flags: str) -> bool:
    """Return whether this version of XLA knows some flags; a process that is given others ends at once."""
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(start, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode


# Without optimisation XLA's older emitters compile in half the time of its newer ones; later versions lack them. There
# are as many test processes as cores: a program that is not cut in parts for several threads takes an eighth less.
ONE_PART = "--xla_cpu_parallel_codegen_split_count=1"
OLDER_EMITTERS = f"{ONE_PART} --xla_cpu_use_fusion_emitters=false"
if "XLA_FLAGS" not in os.environ:  # else the user's own, or an outer process's
    os.environ["XLA_FLAGS"] = next((flags for flags in (OLDER_EMITTERS, ONE_PART) if _understands(flags)), "")

import jax  # noqa: E402  (after the settings that it reads when imported)
import pytest  # noqa: E402

from ppl import runners  # noqa: E402

# Linux gives a process 65,530 memory mappings by default, and XLA crashes on the one that fails. Every compiled program
# takes some; from this many on the programs are forgotten.
ENOUGH = 40_000


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Most of these tests' time is XLA's: their programs are small, run once, and need no optimising.

    Tests that compute for longer than they compile are marked `optimized`.
    """
    jax.config.update("jax_disable_most_optimizations", item.get_closest_marker("optimized") is None)


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
