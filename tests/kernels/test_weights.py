"""Log-sum, effective sample size and entropy of log-weights against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl.kernels.weights import summarize

jitted = jax.jit(summarize)


def reference(log_weights):
    values = np.asarray(log_weights, np.float64)
    maximum = values.max()
    weights = np.exp(values - maximum)
    normalised = weights / weights.sum()
    positive = normalised[normalised > 0]
    log_sum = maximum + np.log(weights.sum())
    return log_sum, 1 / np.sum(normalised**2), -np.sum(positive * np.log(positive))


@pytest.mark.parametrize("n", [1, 2, 3, 31, 1000, 4096, 5000, 16384, 2**20])
@pytest.mark.parametrize("spread", [0.1, 2.0, 30.0])
def test_summarize_agrees_with_float64(n, spread):
    log_weights = (np.random.default_rng(n).normal(size=n) * spread).astype(np.float32)
    summary = jitted(log_weights)
    log_sum, ess, entropy = reference(log_weights)
    assert summary.log_sum == pytest.approx(log_sum, rel=1e-6, abs=1e-5)
    assert summary.ess == pytest.approx(ess, rel=2e-5)
    assert summary.entropy == pytest.approx(entropy, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("n", [1, 3, 1000, 16384, 300_001, 2**20])
@pytest.mark.parametrize("level", [0.0, -1e4, 1e4, 0.1])
def test_summarize_ess_is_exactly_n_for_equal_weights(n, level):
    summary = jitted(np.full(n, level, np.float32))
    assert summary.ess == n
    assert summary.entropy == pytest.approx(np.log(n), rel=1e-6)
    assert summary.log_sum == pytest.approx(level + np.log(n), rel=1e-6)


def test_summarize_shift_moves_only_the_log_sum():
    log_weights = np.random.default_rng(0).integers(-20, 20, 1000).astype(np.float32)
    base, moved = jitted(log_weights), jitted(log_weights + 8192)
    assert moved.log_sum == pytest.approx(float(base.log_sum) + 8192, rel=1e-7)
    assert (moved.ess, moved.entropy) == (base.ess, base.entropy)


def test_summarize_ignores_dead_particles():
    log_weights = np.array([-np.inf, 0.0, -np.inf, np.log(3.0)], np.float32)
    np.testing.assert_allclose(jitted(log_weights), reference(log_weights), rtol=1e-6)


def test_summarize_all_dead_is_nothing():
    assert tuple(map(float, jitted(np.full(7, -np.inf, np.float32)))) == (-np.inf, 0.0, 0.0)


@pytest.mark.parametrize("alive", [[True, False, True], [False, False, False]])
def test_dead_particles_have_no_derivative(alive):
    gradient = jax.grad(lambda x: summarize(jnp.where(jnp.array(alive), x, -jnp.inf)).log_sum)(jnp.zeros(3))
    np.testing.assert_allclose(gradient, np.array(alive) / max(sum(alive), 1))



@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("rest", [0.0, -np.inf])
@pytest.mark.parametrize("n", [1, 5, 16384])
def test_summarize_nan_and_positive_infinity_are_reported(broken, rest, n):
    log_weights = np.full(n, rest, np.float32)
    log_weights[n // 2] = broken
    assert np.isnan(np.array(jitted(log_weights))).all()


@pytest.mark.parametrize("bad", [np.float32(0), np.zeros((2, 2), np.float32), np.zeros(0, np.float32)])
def test_summarize_refuses_other_shapes(bad):
    with pytest.raises(ValueError, match="`log_weights` must have shape"):
        summarize(bad)


def test_summarize_maps_over_batches():
    batch = np.random.default_rng(1).normal(size=(3, 50)).astype(np.float32)
    for row, summary in zip(batch, zip(*jax.vmap(summarize)(batch), strict=True), strict=True):
        np.testing.assert_allclose(summary, jitted(row), rtol=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32) | st.just(-np.inf), min_size=12, max_size=12))
def test_summarize_stays_within_its_bounds(log_weights):
    values = jnp.array(log_weights, jnp.float32)
    summary = jitted(values)
    living = int((values > -jnp.inf).sum())
    if living:
        assert 1 - 1e-6 <= summary.ess <= living * (1 + 1e-6)
        assert 0 <= summary.entropy <= np.log(living) + 1e-6
        assert summary.log_sum >= values.max()
    else:
        assert tuple(map(float, summary)) == (-np.inf, 0.0, 0.0)
