"""The temperature that reaches an evenness, against a float64 bisection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ppl.kernels.annealing import temperature

solve = {
    "ess": jax.jit(lambda values, fraction: temperature(values, ess=fraction)),
    "entropy": jax.jit(lambda values, fraction: temperature(values, entropy=fraction)),
}


def evenness(values, at, kind):
    living = np.asarray(values, np.float64)[np.asarray(values) > -np.inf]
    weights = np.exp((living - living.max()) / at)
    weights /= weights.sum()
    if kind == "ess":
        return 1 / np.sum(weights**2) / len(living)
    weights = weights[weights > 0]
    return -np.sum(weights * np.log(weights)) / np.log(len(living))


def reference(values, fraction, kind):
    if evenness(values, 1.0, kind) >= fraction:
        return 1.0
    low, high = 0.0, 90.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if evenness(values, np.exp(middle), kind) >= fraction else (middle, high)
    return np.exp(high)


@pytest.mark.parametrize("kind", ["ess", "entropy"])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1e4, 1e8])
@pytest.mark.parametrize("n", [2, 3, 33, 1000])
def test_temperature_agrees_with_float64(n, spread, fraction, kind):
    values = (np.random.default_rng(n).normal(size=n) * spread).astype(np.float32)
    if n > 3:
        values[: n // 4] = -np.inf
    fraction = float(np.float32(fraction))
    assert solve[kind](values, fraction) == pytest.approx(reference(values, fraction, kind), rel=1e-4)


@pytest.mark.parametrize("kind", ["ess", "entropy"])
def test_temperature_of_a_million_weights(kind):
    values = (3 * np.random.default_rng(0).normal(size=2**20)).astype(np.float32)
    assert solve[kind](values, 0.8) == pytest.approx(reference(values, 0.8, kind), rel=1e-4)


@pytest.mark.parametrize("kind", ["ess", "entropy"])
@pytest.mark.parametrize(
    "values, fraction, expected",
    [
        ([2.0, 2.0, 2.0], 1.0, 1.0),  # even as they are
        ([-np.inf, 2.0, 2.0], 1.0, 1.0),  # the dead do not count
        ([0.0, -1.0], 1.0, np.inf),  # only the limit is even
        ([0.0, -1e-3], 0.9, 1.0),  # reached already
        ([5.0], 1.0, 1.0),
        ([-np.inf, 5.0], 0.7, 1.0),
        ([-np.inf, -np.inf], 0.5, 1.0),
        ([np.nan, 0.0], 0.5, np.nan),
        ([np.inf, 0.0], 0.5, np.nan),
        ([0.0, -1.0], 1.5, np.nan),  # a traced fraction out of range
    ],
)
def test_temperature_at_the_edges(values, fraction, expected, kind):
    np.testing.assert_array_equal(solve[kind](np.array(values, np.float32), fraction), np.float32(expected))


def test_temperature_of_rows_is_that_of_each_row():
    rows = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32) * np.array(
        [[0.1], [1], [5], [50], [9]], np.float32
    )
    together = temperature(rows, ess=0.6)
    assert together.shape == (5,)
    for row, found in zip(rows, together, strict=True):
        assert found == pytest.approx(reference(row, 0.6, "ess"), rel=1e-4)
    mapped = jax.vmap(lambda row: temperature(row, entropy=0.9))(rows)
    np.testing.assert_allclose(mapped, temperature(rows, entropy=0.9), rtol=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32) | st.floats(-2, 2, width=32) | st.just(-np.inf), min_size=9, max_size=9),
    st.floats(0.0625, 0.984375, width=32),
    st.sampled_from(["ess", "entropy"]),
)
@example([0.0, 0.0, 0.0, 0.0, 0.0, 0.5, -24.0, -2753.0, -1.75], 0.84375, "entropy")  # a long exponent beside short ones
@example([0.0, 0.0, 0.0, 0.0, 0.0, 0.5, -9.0, -2749.0, -2.5], 0.84375, "entropy")
def test_temperature_reaches_the_fraction_and_no_more(values, fraction, kind):
    values = np.array(values, np.float32)
    found = float(solve[kind](values, np.float32(fraction)))
    assert found >= 1
    if (values > -np.inf).sum() > 1 and np.ptp(values[values > -np.inf]) > 1e-3:
        assert evenness(values, found * (1 + 1e-4), kind) >= fraction - 1e-6
        if found > 1:
            assert evenness(values, max(found * (1 - 1e-4), 1.0), kind) <= fraction + 1e-6


@pytest.mark.parametrize("bad", [np.float32(0), np.zeros((2, 0), np.float32), np.zeros(0, np.float32)])
def test_temperature_refuses_what_has_no_particles(bad):
    with pytest.raises(ValueError, match="`log_weights` must have shape"):
        temperature(bad, ess=0.5)


@pytest.mark.parametrize("fractions", [{}, {"ess": 0.5, "entropy": 0.5}])
def test_temperature_wants_one_fraction(fractions):
    with pytest.raises(ValueError, match="Give one of `ess` and `entropy`"):
        temperature(jnp.zeros(3), **fractions)


@pytest.mark.parametrize("name", ["ess", "entropy"])
@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, np.nan])
def test_temperature_refuses_fractions_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is a fraction"):
        temperature(jnp.zeros(3), **{name: value})
