"""Systematic resampling: its exact law for few particles, its float32 behaviour for many."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl.kernels.resampling import RESAMPLERS, resolve, systematic
from ppl.kernels.resampling.systematic import _ancestors

draw = jax.jit(systematic, static_argnums=2)
place = jax.jit(_ancestors, static_argnums=2)
INF = np.inf


def bits(u):
    """A number in [0, 1) in 2^-32ths."""
    return np.uint32(int(float(u) * 2**32))


def normalised(log_weights):
    values = np.asarray(log_weights, np.float64)
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def offspring(ancestors, n):
    return np.bincount(np.asarray(ancestors), minlength=n)


def assert_contract(ancestors, log_weights, num):
    """In range, nondecreasing, alive, and each within one draw of its expectation."""
    ancestors, log_weights = np.asarray(ancestors), np.asarray(log_weights)
    assert ancestors.shape == (num,) and ancestors.dtype == np.int32
    assert ancestors.min() >= 0 and ancestors.max() < len(log_weights)
    assert (np.diff(ancestors) >= 0).all()
    assert (log_weights[ancestors] > -INF).all()
    expected = num * normalised(log_weights)
    below_top = np.where(log_weights > -INF, log_weights.max() - log_weights, 0)
    rounding = (2 + below_top) * 2.0**-24 * expected
    rounding_of_sum = 2.0**-22 * expected  # a common factor, from the largest of the other weights
    deviation = np.abs(offspring(ancestors, len(log_weights)) - expected)
    assert (deviation < 1 + rounding + rounding_of_sum + 1e-6).all(), deviation.max()


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_systematic_law_is_exact_for_few_particles(n, num):
    """Between two breakpoints of the uniform the ancestors do not change: the law is a finite sum."""
    for weights in itertools.product([0.0, 1.0, 2.5, 7.0], repeat=n):
        if sum(weights) == 0:
            continue
        share = np.array(weights) / sum(weights)
        cuts = np.unique(np.concatenate([[0.0, 1.0], np.mod(num * np.cumsum(share), 1.0)]))
        cuts = cuts[np.concatenate([[True], np.diff(cuts) > 1e-9])]
        lengths, middles = np.diff(cuts), (cuts[1:] + cuts[:-1]) / 2
        with np.errstate(divide="ignore"):
            log_weights = np.log(np.array(weights, np.float32))
        mean, total = np.zeros(n), 0.0
        for length, middle in zip(lengths, middles, strict=True):
            points = (np.arange(num) + middle) / num
            ancestors = np.asarray(place(bits(middle), log_weights, num))
            np.testing.assert_array_equal(ancestors, np.searchsorted(np.cumsum(share), points, side="right"))
            mean += length * offspring(ancestors, n)
            total += length
        np.testing.assert_allclose(mean / total, num * share, atol=1e-6)


@pytest.mark.parametrize("n, keys", [(100, 2000), (2**14, 400), (2**17, 60), (2**20, 12)])
@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_systematic_expected_offspring_at_large_n(n, keys, spread):
    log_weights = (np.random.default_rng(n).normal(size=n) * spread).astype(np.float32)
    expected = n * normalised(log_weights)
    blocks = np.minimum(np.arange(n) * 50 // n, 49)  # stretches see a drift of the sums
    heavy = np.argsort(expected)[-50:]
    counts = np.zeros((keys, 100))
    for row, key in zip(counts, jax.random.split(jax.random.key(n), keys), strict=True):
        ancestors = draw(key, log_weights, n)
        assert_contract(ancestors, log_weights, n)
        count = offspring(ancestors, n)
        row[:50] = np.bincount(blocks, weights=count, minlength=50)
        row[50:] = count[heavy]
    target = np.concatenate([np.bincount(blocks, weights=expected, minlength=50), expected[heavy]])
    # the count of a stretch or of a particle is one of the two whole numbers next to its expectation
    fraction = target - np.floor(target)
    error = np.sqrt(np.maximum(fraction * (1 - fraction), 1e-3) / keys)
    slack = 2.0**-20 * target + 1e-4  # the weights are float32
    assert (np.abs(counts.mean(0) - target) < 5 * error + slack).all()


@pytest.mark.parametrize("n", [2**10, 2**14, 2**17, 2**20])
@pytest.mark.parametrize("where", ["head", "tail", "both", "all but one", "last only", "first only"])
def test_systematic_never_draws_zero_weights(n, where):
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
    uniforms = [0.0, 2.0**-23, 0.5, 1 - 2.0**-23, 1 - 2.0**-24]
    for u, num in itertools.product(uniforms, [n, 1, 7]):
        assert_contract(place(bits(u), log_weights, num), log_weights, num)


@pytest.mark.parametrize("level", [0.0, -1e4, 1e4, -95.0])
@pytest.mark.parametrize("n", [1, 2, 31, 1000, 16384, 2**20 - 1, 2**20])
def test_systematic_equal_weights_give_one_child_each(n, level):
    log_weights = np.full(n, level, np.float32)
    for u in [0.0, 2.0**-23, 0.3, 1 - 2.0**-24]:
        np.testing.assert_array_equal(place(bits(u), log_weights, n), np.arange(n))


def test_systematic_equal_weights_give_one_child_each_for_ten_thousand_keys():
    keys = jax.random.split(jax.random.key(3), 10_000)
    ancestors = jax.jit(jax.vmap(lambda key: systematic(key, jnp.zeros(100))))(keys)
    assert (np.asarray(ancestors) == np.arange(100)[None]).all()


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_systematic_is_unmoved_by_a_common_offset(level):
    log_weights = np.random.default_rng(1).integers(-8, 8, 1000).astype(np.float32)
    key = jax.random.key(0)
    expected = draw(key, log_weights, 1000)
    np.testing.assert_array_equal(draw(key, log_weights + np.float32(level), 1000), expected)


def test_systematic_extreme_and_subnormal_weights():
    log_weights = np.array([-1e4, -100.0, -95.0, 0.0, -103.0, -1e4, -88.0], np.float32)
    for seed in range(50):
        assert (np.asarray(draw(jax.random.key(seed), log_weights, 1000)) == 3).all()
    log_weights = np.array([-3e38, 3e38, -INF], np.float32)
    assert (np.asarray(draw(jax.random.key(0), log_weights, 9)) == 1).all()


@pytest.mark.parametrize("n, num", [(1, 1), (1, 50), (50, 1), (10, 1000), (1000, 10), (777, 776), (2**17, 100)])
def test_systematic_draws_another_number_than_there_are_particles(n, num):
    log_weights = np.random.default_rng(n).normal(size=n).astype(np.float32)
    for seed in range(20):
        assert_contract(draw(jax.random.key(seed), log_weights, num), log_weights, num)


@pytest.mark.parametrize("dead", [-INF, np.nan])
@pytest.mark.parametrize("n, num", [(1, 1), (4, 4), (4, 11), (100, 7)])
def test_systematic_all_dead_keeps_everyone(n, num, dead):
    ancestors = draw(jax.random.key(0), np.full(n, dead, np.float32), num)
    np.testing.assert_array_equal(ancestors, np.arange(num) % n)


def test_systematic_nan_is_never_drawn_and_positive_infinity_takes_all():
    key = jax.random.key(0)
    with_nan = np.array([np.nan, 0.0, np.nan, 0.0, np.nan], np.float32)
    np.testing.assert_array_equal(draw(key, with_nan, 4), [1, 1, 3, 3])
    with_inf = np.array([0.0, INF, 5.0, INF], np.float32)
    np.testing.assert_array_equal(draw(key, with_inf, 4), [1, 1, 3, 3])


def test_systematic_repeats_itself_under_jit_vmap_cond_and_scan():
    log_weights = np.random.default_rng(5).normal(size=500).astype(np.float32)
    key = jax.random.key(1)
    expected = np.asarray(systematic(key, log_weights))
    np.testing.assert_array_equal(draw(key, log_weights, 500), expected)
    np.testing.assert_array_equal(jax.vmap(systematic, (None, 0))(key, log_weights[None])[0], expected)
    branch = functools.partial(jax.lax.cond, True, systematic, lambda k, w: jnp.arange(500))
    np.testing.assert_array_equal(jax.jit(branch)(key, log_weights), expected)
    scanned = jax.lax.scan(lambda c, k: (c, systematic(k, log_weights)), 0, jnp.stack([key]))[1]
    np.testing.assert_array_equal(scanned[0], expected)


@pytest.mark.parametrize("bad", [np.float32(0), np.zeros((2, 2), np.float32), np.zeros(0, np.float32)])
def test_systematic_refuses_other_shapes(bad):
    with pytest.raises(ValueError, match="`log_weights` must have shape"):
        systematic(jax.random.key(0), bad)


@pytest.mark.parametrize("num", [0, -1, 2**31])
def test_systematic_refuses_impossible_numbers_of_draws(num):
    with pytest.raises(ValueError, match="`num` must be between"):
        systematic(jax.random.key(0), jnp.zeros(3), num)


def test_resolve_finds_names_and_passes_functions_through():
    assert resolve("systematic") is RESAMPLERS["systematic"] is systematic
    assert resolve(len) is len
    with pytest.raises(ValueError, match="'sistematic' is not known.*'systematic'"):
        resolve("sistematic")
    with pytest.raises(TypeError, match="name or a function"):
        resolve(3)


weights_or_dead = st.floats(-1e4, 1e4, width=32) | st.floats(-3, 3, width=32) | st.just(-INF)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(weights_or_dead, min_size=13, max_size=13).filter(lambda x: max(x) > -INF),
    st.floats(0, 1, exclude_max=True, width=32),
    st.sampled_from([1, 13, 40]),
)
def test_systematic_holds_its_contract_for_any_weights(log_weights, u, num):
    values = np.array(log_weights, np.float32)
    assert_contract(place(bits(u), values, num), values, num)
