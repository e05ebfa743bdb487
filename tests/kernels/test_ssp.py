"""Srinivasan resampling: its joint law against the sequential algorithm, its float32 behaviour for many."""

import collections
import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl.kernels.resampling.inverse_cdf import relative_weights, scaled_prefix_sum
from ppl.kernels.resampling.ssp import ends, ssp, step_odds, steps

draw = jax.jit(ssp, static_argnums=2)
INF = np.inf
SMALL = [weights for n in (1, 2, 3, 4) for weights in itertools.product([0, 2, 5, 7], repeat=n) if sum(weights)]


def normalised(log_weights):
    values = np.asarray(log_weights, np.float64)
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def sequential_law(weights, num):
    """The law of the offspring counts under algorithm 1 of Gerber, Chopin and Whiteley, in exact fractions."""
    expected = [num * Fraction(w) / sum(weights) for w in weights]
    law = collections.defaultdict(Fraction)

    def walk(values, n, m, probability):
        if not probability:
            return
        if m == len(values):
            law[tuple(round(x) for x in values)] += probability
            return
        down_n, down_m = values[n] % 1, values[m] % 1
        up_n, up_m = -values[n] % 1, -values[m] % 1
        if not down_n or not down_m:  # nothing left to round in one of them
            return walk(values, m if not down_n else n, m + 1, probability)
        raised, lowered = min(up_n, down_m), min(down_n, up_m)
        for change, chance in ((raised, lowered), (-lowered, raised)):
            moved = list(values)
            moved[n] += change
            moved[m] -= change
            pending = n if moved[n] % 1 else m
            walk(moved, pending, m + 1, probability * chance / (raised + lowered))

    walk(expected, 0, 1, Fraction(1))
    return law


@functools.partial(jax.jit, static_argnums=1)
def walk_of(log_weights, num):
    whole, fraction, before = steps(scaled_prefix_sum(relative_weights(log_weights)[0], num))
    favourable, possible = step_odds(fraction, before)
    bits = jnp.array(list(itertools.product([False, True], repeat=log_weights.shape[0])))
    cumulative = jax.vmap(lambda s: ends(s, whole, fraction, before))(bits)
    return bits, cumulative, favourable, possible


def parallel_law(weights, num):
    """The law of the offspring counts from all patterns of bits, weighted by their probabilities."""
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.array(weights, np.float32))
    bits, cumulative, favourable, possible = (np.asarray(x, np.float64) for x in walk_of(log_weights, num))
    assert (0 <= favourable).all() and (favourable <= possible).all()
    chance = favourable / np.maximum(possible, 1)
    law = collections.defaultdict(float)
    for pattern, row in zip(bits, cumulative, strict=True):
        probability = np.prod(np.where(pattern, chance, 1 - chance))
        if probability > 0:
            law[tuple(np.diff(row, prepend=0).astype(int).tolist())] += probability
    return law


@pytest.mark.parametrize("num", [1, 2, 3, 4, 7])
def test_ssp_joint_law_is_that_of_the_sequential_algorithm(num):
    for weights in SMALL:
        expected, law = sequential_law(weights, num), parallel_law(weights, num)
        for counts in set(expected) | set(law):
            # a fraction of 0 can come out as one of 2^-31 in float32: unlikely counts, not impossible ones
            assert law.get(counts, 0) == pytest.approx(float(expected.get(counts, 0)), abs=1e-6), (weights, counts)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 7])
def test_ssp_offspring_are_rounded_expectations_with_negative_covariance(num):
    for weights in SMALL:
        expected = num * np.array(weights) / sum(weights)
        law = parallel_law(weights, num)
        counts, chance = np.array(list(law)), np.array(list(law.values()))
        assert chance.sum() == pytest.approx(1, abs=1e-12)
        assert (counts.sum(1) == num).all()
        assert (np.abs(counts - expected) < 1 + 1e-6).all()
        np.testing.assert_allclose(chance @ counts, expected, atol=1e-6)
        covariance = (counts - expected).T @ ((counts - expected) * chance[:, None])
        assert (covariance[~np.eye(len(weights), dtype=bool)] <= 1e-6).all()


@pytest.mark.parametrize("weights, num", [((2, 5, 7, 3), 4), ((7, 0, 1), 2), ((1, 1, 1, 1), 3)])
def test_ssp_draws_follow_the_law(weights, num):
    keys = jax.random.split(jax.random.key(num), 100_000)
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.array(weights, np.float32))
    ancestors = np.asarray(jax.jit(jax.vmap(lambda key: ssp(key, log_weights, num)))(keys))
    seen = collections.Counter(map(tuple, (ancestors[..., None] == np.arange(len(weights))).sum(1).tolist()))
    law = sequential_law(weights, num)
    assert set(seen) <= set(law)
    for counts, chance in law.items():
        error = np.sqrt(float(chance * (1 - chance)) / len(keys))
        assert abs(seen[counts] / len(keys) - float(chance)) <= 5 * error, counts


def assert_contract(ancestors, log_weights, num):
    """In range, nondecreasing, alive, and each within one draw of its expectation."""
    ancestors, log_weights = np.asarray(ancestors), np.asarray(log_weights)
    assert ancestors.shape == (num,) and ancestors.dtype == np.int32
    assert ancestors.min() >= 0 and ancestors.max() < len(log_weights)
    assert (np.diff(ancestors) >= 0).all()
    assert (log_weights[ancestors] > -INF).all()
    expected = num * normalised(log_weights)
    below_top = np.where(log_weights > -INF, log_weights.max() - log_weights, 0)
    rounding = ((2 + below_top) * 2.0**-24 + 2.0**-22) * expected
    deviation = np.abs(np.bincount(ancestors, minlength=len(log_weights)) - expected)
    assert (deviation < 1 + rounding + 1e-6).all(), deviation.max()


@pytest.mark.parametrize("n, keys", [(100, 2000), (2**14, 200), (2**17, 30), (2**20, 4)])
@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_ssp_expected_offspring_at_large_n(n, keys, spread):
    log_weights = (np.random.default_rng(n).normal(size=n) * spread).astype(np.float32)
    expected = n * normalised(log_weights)
    blocks = np.minimum(np.arange(n) * 50 // n, 49)  # stretches see a drift of the sums
    heavy = np.argsort(expected)[-50:]
    counts = np.zeros((keys, 100))
    for row, key in zip(counts, jax.random.split(jax.random.key(n), keys), strict=True):
        ancestors = draw(key, log_weights, n)
        assert_contract(ancestors, log_weights, n)
        count = np.bincount(np.asarray(ancestors), minlength=n)
        row[:50] = np.bincount(blocks, weights=count, minlength=50)
        row[50:] = count[heavy]
    target = np.concatenate([np.bincount(blocks, weights=expected, minlength=50), expected[heavy]])
    # N_i is floor or ceil of P_i: a stretch is off by less than two, a particle is one of two whole numbers
    fraction = target - np.floor(target)
    variance = np.where(np.arange(100) < 50, 0.5, np.maximum(fraction * (1 - fraction), 1e-3))
    slack = 2.0**-20 * target + 1e-4  # the weights are float32
    assert (np.abs(counts.mean(0) - target) < 5 * np.sqrt(variance / keys) + slack).all()


@pytest.mark.parametrize("n", [2**10, 2**17, 2**20])
@pytest.mark.parametrize("where", ["head", "tail", "both", "all but one", "last only", "first only"])
def test_ssp_never_draws_zero_weights(n, where):
    log_weights = np.random.default_rng(0).normal(size=n).astype(np.float32)
    cut = n // 100
    if where in ("head", "both"):
        log_weights[:cut] = -INF
    if where in ("tail", "both"):
        log_weights[-cut:] = -INF
    single = {"all but one": n // 3, "last only": n - 1, "first only": 0}.get(where)
    if single is not None:
        log_weights[:] = -INF
        log_weights[single] = -3.0
    for seed, num in itertools.product(range(2), [n, 1, 7]):
        assert_contract(draw(jax.random.key(seed), log_weights, num), log_weights, num)


@pytest.mark.parametrize("level", [0.0, -1e4, 1e4, -95.0])
@pytest.mark.parametrize("n", [1, 2, 31, 1000, 16384, 2**20 - 1])
def test_ssp_equal_weights_give_one_child_each(n, level):
    for seed in range(3):
        ancestors = draw(jax.random.key(seed), np.full(n, level, np.float32), n)
        np.testing.assert_array_equal(ancestors, np.arange(n))


def test_ssp_extreme_and_subnormal_weights():
    log_weights = np.array([-1e4, -100.0, -95.0, 0.0, -103.0, -1e4, -88.0], np.float32)
    for seed in range(50):
        assert (np.asarray(draw(jax.random.key(seed), log_weights, 1000)) == 3).all()
    log_weights = np.array([-3e38, 3e38, -INF], np.float32)
    assert (np.asarray(draw(jax.random.key(0), log_weights, 9)) == 1).all()


@pytest.mark.parametrize("n, num", [(1, 1), (1, 50), (50, 1), (10, 1000), (1000, 10), (777, 776), (2**17, 100)])
def test_ssp_draws_another_number_than_there_are_particles(n, num):
    log_weights = np.random.default_rng(n).normal(size=n).astype(np.float32)
    for seed in range(20):
        assert_contract(draw(jax.random.key(seed), log_weights, num), log_weights, num)


@pytest.mark.parametrize("dead", [-INF, np.nan])
@pytest.mark.parametrize("n, num", [(1, 1), (4, 4), (4, 11), (100, 7)])
def test_ssp_all_dead_keeps_everyone(n, num, dead):
    ancestors = draw(jax.random.key(0), np.full(n, dead, np.float32), num)
    np.testing.assert_array_equal(ancestors, np.arange(num) % n)


def test_ssp_nan_is_never_drawn_and_positive_infinity_takes_all():
    key = jax.random.key(0)
    with_nan = np.array([np.nan, 0.0, np.nan, 0.0, np.nan], np.float32)
    np.testing.assert_array_equal(draw(key, with_nan, 4), [1, 1, 3, 3])
    with_inf = np.array([0.0, INF, 5.0, INF], np.float32)
    np.testing.assert_array_equal(draw(key, with_inf, 4), [1, 1, 3, 3])


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_ssp_repeats_itself_under_jit_vmap_cond_and_scan(make_key):
    log_weights = np.random.default_rng(5).normal(size=500).astype(np.float32)
    key = make_key(1)
    expected = np.asarray(ssp(key, log_weights))
    np.testing.assert_array_equal(draw(key, log_weights, 500), expected)
    np.testing.assert_array_equal(jax.vmap(ssp, (None, 0))(key, log_weights[None])[0], expected)
    branch = functools.partial(jax.lax.cond, True, ssp, lambda k, w: jnp.arange(500))
    np.testing.assert_array_equal(jax.jit(branch)(key, log_weights), expected)
    scanned = jax.lax.scan(lambda c, k: (c, ssp(k, log_weights)), 0, jnp.stack([key]))[1]
    np.testing.assert_array_equal(scanned[0], expected)


@pytest.mark.parametrize("bad", [np.float32(0), np.zeros((2, 2), np.float32), np.zeros(0, np.float32)])
def test_ssp_refuses_other_shapes(bad):
    with pytest.raises(ValueError, match="`log_weights` must have shape"):
        ssp(jax.random.key(0), bad)


@pytest.mark.parametrize("num", [0, -1, 2**31])
def test_ssp_refuses_impossible_numbers_of_draws(num):
    with pytest.raises(ValueError, match="`num` must be between"):
        ssp(jax.random.key(0), jnp.zeros(3), num)


weights_or_dead = st.floats(-1e4, 1e4, width=32) | st.floats(-3, 3, width=32) | st.just(-INF)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(weights_or_dead, min_size=13, max_size=13).filter(lambda x: max(x) > -INF),
    st.integers(0, 1000),
    st.sampled_from([1, 13, 40]),
)
def test_ssp_holds_its_contract_for_any_weights(log_weights, seed, num):
    values = np.array(log_weights, np.float32)
    assert_contract(draw(jax.random.key(seed), values, num), values, num)
