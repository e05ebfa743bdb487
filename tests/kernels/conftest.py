"""Kernels broadcast ranks explicitly; numpyro does not, so the setting stays in this folder."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield
