"""Most of these tests' time is XLA's: their programs are small, run once, and need no optimising."""

import jax
import pytest

from ppl import runners


@pytest.fixture(autouse=True)
def _compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    yield
    runners.clear_cache()
    jax.clear_caches()
