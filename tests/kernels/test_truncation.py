"""Truncation sets against a sort in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl.kernels.truncation import min_p, top_k, top_p

INF = np.inf
jitted_top_k, jitted_top_p, jitted_min_p = jax.jit(top_k, static_argnums=1), jax.jit(top_p), jax.jit(min_p)


def make_logits(shape, scale=3.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def sorted_top_k(row, k):
    return (row >= np.sort(row)[::-1][min(k, row.size) - 1]) & (row > -INF)


def masses(row):
    """The thresholds from the largest down, and the probability at or above each."""
    weights = np.exp(row.astype(np.float64) - row.max())
    thresholds = np.unique(row)[::-1]
    order = np.argsort(-row, kind="stable")
    cumulative = np.cumsum(weights[order]) / weights.sum()
    last = np.searchsorted(-row[order], -thresholds, side="right") - 1
    return thresholds, cumulative[last]


@pytest.mark.parametrize("size", [1, 5, 1009, 49152, 262144])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0, 1e3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sets_agree_with_a_sort(size, scale, dtype):
    logits = jnp.asarray(make_logits((2, size), scale)).astype(dtype)
    rows = np.asarray(logits.astype(jnp.float32))
    for k in (1, 50, size):
        np.testing.assert_array_equal(jitted_top_k(logits, k), [sorted_top_k(row, k) for row in rows])
    for p in (0.1, 0.9):
        for row, inside in zip(rows, np.asarray(jitted_top_p(logits, p)), strict=True):
            thresholds, reached = masses(row)
            chosen = np.flatnonzero(thresholds == row[inside].min())[0]
            np.testing.assert_array_equal(inside, row >= thresholds[chosen])
            assert reached[chosen] >= p - 1e-6
            assert chosen == 0 or reached[chosen - 1] < p + 1e-6
        probable = rows >= rows.max(-1, keepdims=True) + np.log(np.float32(p))
        np.testing.assert_array_equal(jitted_min_p(logits, p), probable)


def test_sets_of_a_small_law_are_known():
    logits = jnp.log(jnp.array([0.05, 0.4, 0.15, 0.15, 0.0, 0.25]))
    for k, expected in [
        (1, [1]),
        (2, [1, 5]),
        (3, [1, 2, 3, 5]),
        (4, [1, 2, 3, 5]),
        (5, [0, 1, 2, 3, 5]),
        (6, [0, 1, 2, 3, 5]),
    ]:
        assert np.flatnonzero(top_k(logits, k)).tolist() == expected
    for p, expected in [
        (0.3, [1]),
        (0.45, [1, 5]),
        (0.7, [1, 2, 3, 5]),
        (0.97, [0, 1, 2, 3, 5]),
        (1.0, [0, 1, 2, 3, 5]),
    ]:
        assert np.flatnonzero(top_p(logits, p)).tolist() == expected
    for p, expected in [(1.0, [1]), (0.5, [1, 5]), (0.3, [1, 2, 3, 5]), (0.01, [0, 1, 2, 3, 5])]:
        assert np.flatnonzero(min_p(logits, p)).tolist() == expected


def test_top_p_of_one_keeps_every_possible_token_however_rare():
    logits = np.array([0.0, -80.0, -200.0, -INF], np.float32)
    assert top_p(logits, 1.0).tolist() == jax.jit(top_p)(logits, jnp.float32(1)).tolist() == [True, True, True, False]


@pytest.mark.parametrize("level", [1e4, -1e4, 3e38, -3e38])
def test_sets_take_extreme_logits(level):
    logits = np.array([level, -INF, level, np.nextafter(np.float32(level), np.float32(-INF)), -INF], np.float32)
    assert top_k(logits, 1).tolist() == min_p(logits, 1.0).tolist() == [True, False, True, False, False]
    assert top_k(logits, 3).tolist() == top_p(logits, 1.0).tolist() == [True, False, True, True, False]


def test_zeros_of_both_signs_tie():
    logits = np.array([-0.0, 0.0, -1.0, -0.0], np.float32)
    for inside in (top_k(logits, 1), top_p(logits, 0.1), min_p(logits, 1.0)):
        assert inside.tolist() == [True, True, False, True]


@pytest.mark.parametrize("find", [lambda x: top_k(x, 2), lambda x: top_p(x, 0.5), lambda x: min_p(x, 0.5)])
def test_rows_without_tokens_are_empty_and_broken_rows_keep_everything(find):
    rows = np.full((4, 6), -INF, np.float32)
    rows[1, 2], rows[2, 3], rows[3] = np.nan, INF, [0, -9, -9, -9, -9, 0]
    inside = np.asarray(jax.jit(find)(rows))
    assert inside.sum(-1).tolist() == [0, 6, 6, 2]


def test_sets_have_a_parameter_for_each_row_and_map():
    logits = make_logits((3, 400))
    for find, values in [
        (top_k, jnp.array([1, 7, 300])),
        (top_p, jnp.array([0.1, 0.5, 0.99])),
        (min_p, jnp.array([1.0, 0.1, 1e-3])),
    ]:
        together = find(logits, values)
        np.testing.assert_array_equal(together, jax.vmap(find)(logits, values))
        for row, value, inside in zip(logits, values, together, strict=True):
            np.testing.assert_array_equal(find(row, value), inside)


def test_sets_refuse_what_they_cannot_mean():
    logits = jnp.zeros((2, 5))
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        top_k(logits, 0)
    with pytest.raises(TypeError, match="`k` must be an integer, got 2.5"):
        top_k(logits, 2.5)
    for find in (top_p, min_p):
        for p in (0.0, -1.0, 1.5, np.nan):
            with pytest.raises(ValueError, match=r"`p` must be in \(0, 1\]"):
                find(logits, p)
        with pytest.raises(ValueError, match=r"`p` must be a scalar or have shape \(2,\)"):
            find(logits, jnp.full(3, 0.5))
        with pytest.raises(ValueError, match="`logits` must be floats of shape"):
            find(jnp.zeros((2, 0)), 0.5)


values = (
    st.floats(-(2.0**100), 2.0**100, width=32)
    | st.floats(-3, 3, width=32)
    | st.integers(-2, 2).map(float)
    | st.just(-INF)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(values, min_size=9, max_size=9).filter(lambda x: max(x) > -INF), st.integers(1, 9))
def test_top_k_is_a_sort_for_any_logits(logits, k):
    row = np.array(logits, np.float32)
    row[np.abs(row) < np.finfo(np.float32).tiny] = 0  # processors may take subnormal numbers for zero
    np.testing.assert_array_equal(top_k_of_nine(row, k), sorted_top_k(row, k))


top_k_of_nine = jax.jit(lambda logits, k: top_k(logits, k))
