"""Kernels for GPUs: interpreted on a CPU against the plain forms, and lowered for CUDA. Neither shows them at work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from ppl.kernels import pallas
from ppl.kernels.resampling import RESAMPLERS, systematic

interpreted = jax.jit(functools.partial(pallas.systematic, interpret=True), static_argnums=2)
plain = jax.jit(systematic, static_argnums=2)
INF = np.inf


def assert_same(key, log_weights, num=None):
    log_weights = jnp.asarray(log_weights, jnp.float32)
    num = log_weights.shape[0] if num is None else num
    np.testing.assert_array_equal(interpreted(key, log_weights, num), plain(key, log_weights, num))


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 30.0])
@pytest.mark.parametrize("n", [1, 7, 1023, 1024, 5000])
def test_pallas_systematic_draws_the_same_ancestors(n, spread):
    log_weights = np.random.default_rng(n).normal(size=n) * spread
    for seed in range(2):
        assert_same(jax.random.key(seed), log_weights)


def test_pallas_systematic_draws_the_same_ancestors_at_2_20():
    assert_same(jax.random.key(0), np.random.default_rng(0).normal(size=2**20) * 2)


@pytest.mark.parametrize("n, num", [(1, 50), (50, 1), (10, 3000), (3000, 10), (2500, 2499)])
def test_pallas_systematic_draws_another_number_than_there_are_particles(n, num):
    assert_same(jax.random.key(1), np.random.default_rng(n).normal(size=n), num)


@pytest.mark.parametrize("where", ["head", "tail", "last only", "first only", "all dead", "nan", "positive infinity"])
def test_pallas_systematic_treats_special_weights_alike(where):
    n = 3000
    log_weights = np.random.default_rng(2).normal(size=n)
    if where == "head":
        log_weights[:1500] = -INF
    elif where == "tail":
        log_weights[-1500:] = -INF
    elif where == "nan":
        log_weights[::2] = np.nan
    elif where == "positive infinity":
        log_weights[[5, 2900]] = INF
    else:
        keep = {"last only": [n - 1], "first only": [0], "all dead": []}[where]
        log_weights[np.setdiff1d(np.arange(n), keep)] = -INF
    for seed in range(3):
        assert_same(jax.random.key(seed), log_weights)


def test_pallas_systematic_carries_between_parts_within_and_across_blocks():
    """Weights whose fixed-point parts are near 2^32 wrap at nearly every particle."""
    n = 4096
    values = np.where(np.arange(n) % 2 == 0, 1.0, 1.0 - 2.0**-20)
    for seed in range(3):
        assert_same(jax.random.key(seed), np.log(values))


def test_pallas_systematic_refuses_more_particles_than_it_can_take():
    with pytest.raises(ValueError, match=r"`log_weights` must have at most 2\^20 elements here, got 1048577"):
        pallas.systematic(jax.random.key(0), jnp.zeros(2**20 + 1), interpret=True)


@pytest.mark.parametrize("bad", [np.float32(0), np.zeros((2, 2), np.float32), np.zeros(0, np.float32)])
def test_pallas_systematic_refuses_other_shapes(bad):
    with pytest.raises(ValueError, match="`log_weights` must have shape"):
        pallas.systematic(jax.random.key(0), bad, interpret=True)


@pytest.mark.parametrize("n", [1, 1024, 2**20])
def test_pallas_systematic_lowers_for_cuda(n):
    """Pallas translates every kernel to Triton; what Triton and a GPU make of that is not seen here."""
    key = jax.random.key(0)
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(pallas.systematic).trace(key, jax.ShapeDtypeStruct((n,), jnp.float32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton(") == 3


def test_pallas_kernels_are_not_chosen_by_default():
    assert pallas.systematic not in RESAMPLERS.values()
