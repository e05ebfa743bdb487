"""Resampling schemes: their exact laws for few particles, their float32 behaviour for many."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl.kernels.resampling import RESAMPLERS, killing, resolve, systematic
from ppl.kernels.resampling.killing import _ancestors as place_killing
from ppl.kernels.resampling.multinomial import _ancestors as place_multinomial
from ppl.kernels.resampling.residual import _ancestors as place_residual
from ppl.kernels.resampling.stratified import _ancestors as place_stratified
from ppl.kernels.resampling.systematic import _ancestors as place_systematic

INF = np.inf
NAMES = sorted(RESAMPLERS)
DRAW = {name: jax.jit(scheme, static_argnums=2) for name, scheme in RESAMPLERS.items()}
BATCH = {
    name: jax.jit(lambda keys, weights, num, f=scheme: jax.vmap(lambda k: f(k, weights, num))(keys), static_argnums=2)
    for name, scheme in RESAMPLERS.items()
}

PLACE = {
    "systematic": jax.jit(place_systematic, static_argnums=2),
    "stratified": jax.jit(place_stratified, static_argnums=2),
    "multinomial": jax.jit(place_multinomial, static_argnums=2),
    "residual": jax.jit(place_residual, static_argnums=2),
    "killing": jax.jit(place_killing),
}
MAPPED_KILLING = jax.jit(jax.vmap(place_killing, (0, None)))
FEW = [(1, 2), (2, 1), (2, 4), (3, 2), (3, 5), (4, 4)]

# the largest difference of a particle's draws and their expectation, below and above
DEVIATION = {"systematic": (1, 1), "stratified": (2, 2), "residual": (1, INF), "ssp": (1, 1)}
# a bound of the variance of the number of draws of a stretch of particles; the others': its expectation
VARIANCE = {"systematic": 0.25, "stratified": 0.5}
UNORDERED = {"killing", "ssp"}
each_scheme = pytest.mark.parametrize("name", NAMES)


def bits(u):
    """Numbers in [0, 1) in 2^-32ths."""
    return (np.asarray(u, np.float64) * 2.0**32).astype(np.uint32)


def log(weights):
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(weights, np.float64)).astype(np.float32)


def normalised(log_weights):
    values = np.asarray(log_weights, np.float64)
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def offspring(ancestors, n):
    return np.bincount(np.asarray(ancestors), minlength=n)


def assert_contract(name, ancestors, log_weights, num):
    """In range, alive, ordered where promised, and as near to the expectation as the scheme promises."""
    ancestors, log_weights = np.asarray(ancestors), np.asarray(log_weights)
    assert ancestors.shape == (num,) and ancestors.dtype == np.int32
    assert ancestors.min() >= 0 and ancestors.max() < len(log_weights)
    assert (log_weights[ancestors] > -INF).all()
    if name not in UNORDERED:
        assert (np.diff(ancestors) >= 0).all()
    expected = num * normalised(log_weights)
    below_top = np.where(log_weights > -INF, log_weights.max() - log_weights, 0)
    rounding = ((2 + below_top) * 2.0**-24 + 2.0**-22) * expected + 1e-6  # of the weights and of their sum
    difference = offspring(ancestors, len(log_weights)) - expected
    low, high = DEVIATION.get(name, (INF, INF))
    assert (-difference < low + rounding).all() and (difference < high + rounding).all()


def few_weights(n):
    for weights in itertools.product([0.0, 1.0, 2.5, 7.0], repeat=n):
        if sum(weights) > 0:
            yield np.array(weights) / sum(weights)


def cells(cuts):
    """Middles and lengths of the intervals into which the cuts divide [0, 1]."""
    cuts = np.unique(np.concatenate([[0.0, 1.0], cuts]))
    cuts = cuts[np.concatenate([[True], np.diff(cuts) > 1e-9])]
    cuts[-1] = 1.0
    return (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts)


@pytest.mark.parametrize("n, num", FEW)
def test_systematic_and_stratified_laws_are_exact_for_few_particles(n, num):
    """Between the breakpoints of the uniforms the ancestors do not change: the law is a finite sum."""
    for scheme in (place_systematic, place_stratified):
        points, lengths, shares, owners = [], [], [], []
        for owner, share in enumerate(few_weights(n)):
            sums = num * np.cumsum(share)
            if scheme is place_systematic:
                grid = [(np.full(num, middle), length) for middle, length in zip(*cells(sums % 1), strict=True)]
            else:
                strata = [list(zip(*cells(sums[np.floor(sums) == k] - k), strict=True)) for k in range(num)]
                grid = [
                    (np.array([u for u, _ in chosen]), math.prod(length for _, length in chosen))
                    for chosen in itertools.product(*strata)
                ]
            for u, length in grid:
                owners.append(owner)
                points.append(u)
                lengths.append(length)
                shares.append(share)
        points, lengths, shares, owners = map(np.array, (points, lengths, shares, owners))
        u = bits(points[:, 0]) if scheme is place_systematic else bits(points)
        ancestors = np.asarray(jax.jit(jax.vmap(partial(scheme, num=num)))(u, log(shares)))
        placed = (np.arange(num) + points)[:, :, None] >= num * np.cumsum(shares, axis=1)[:, None, :-1]
        np.testing.assert_array_equal(ancestors, placed.sum(-1))
        counts = (ancestors[:, :, None] == np.arange(n)).sum(1)
        for owner in range(owners[-1] + 1):
            mine = owners == owner
            assert lengths[mine].sum() == pytest.approx(1)
            np.testing.assert_allclose(lengths[mine] @ counts[mine], num * shares[mine][0], atol=1e-6)


@pytest.mark.parametrize("n, num", FEW)
def test_multinomial_and_residual_place_the_points_of_exponential_spacings(n, num):
    """Against float64: ordered uniforms are prefix sums of exponentials over their total."""
    random = np.random.default_rng(10 * n + num)
    shares = np.array(list(few_weights(n)) * 3)
    raw = random.integers(0, 2**32, (len(shares), num + 1), dtype=np.uint32)
    spacings = -np.log(((raw >> 1) + 0.5) * 2.0**-31)
    got = jax.jit(jax.vmap(partial(place_multinomial, num=num)))(raw, log(shares))
    also = jax.jit(jax.vmap(partial(place_residual, num=num)))(raw, log(shares))
    for share, gaps, ancestors, rest_ancestors in zip(shares, spacings, got, also, strict=True):
        sums = np.cumsum(gaps)
        points = sums[:-1] / sums[-1]
        np.testing.assert_array_equal(ancestors, np.searchsorted(np.cumsum(share)[:-1], points, "right"))
        copies = np.floor(num * share + 1e-9)
        rest = int(num - copies.sum())
        drawn = np.zeros(n)
        if rest:
            limits = np.cumsum(num * share - copies)[:-1] / rest
            drawn = offspring(np.searchsorted(limits, sums[:rest] / sums[rest], "right"), n)
        np.testing.assert_array_equal(offspring(rest_ancestors, n), copies + drawn)


@pytest.mark.parametrize("weights", [[1, 2, 3], [0, 5, 1], [1, 1, 1], [0.1, 9, 3]])
def test_multinomial_and_residual_offspring_have_their_laws(weights):
    num, keys = 4, 20_000
    share = np.array(weights) / sum(weights)
    floors = {"multinomial": np.zeros(3), "residual": np.floor(num * share + 1e-9)}
    for name, copies in floors.items():
        rest = int(num - copies.sum())
        odds = (num * share - copies) / rest if rest else share
        ancestors = np.asarray(BATCH[name](jax.random.split(jax.random.key(7), keys), log(weights), num))
        counts = (ancestors[:, :, None] == np.arange(3)).sum(1) - copies
        total = 0.0
        for outcome in itertools.product(range(rest + 1), repeat=3):
            if sum(outcome) != rest:
                continue
            ways = math.factorial(rest) / math.prod(map(math.factorial, outcome))
            probability = ways * np.prod(odds**outcome)
            total += probability
            seen = (counts == outcome).all(1).mean()
            assert abs(seen - probability) <= 5 * math.sqrt(probability * max(1 - probability, 0) / keys) + 1e-6
        assert total == pytest.approx(1)


@pytest.mark.parametrize("weights", [[1, 2, 4, 1], [4, 0, 4, 0], [2, 4, 0, 2], [0, 0, 8, 0], [2, 2, 2, 2]])
def test_killing_law_of_each_slot_is_exact(weights):
    """All numbers are multiples of 1/8: the middles of 8 cells are an exact quadrature, one slot at a time."""
    weights = np.array(weights, np.float64)
    n, share, survival = len(weights), weights / weights.sum(), weights / weights.max()
    middles = bits((np.arange(8) + 0.5) / 8)
    kills, draws = (x.ravel() for x in np.meshgrid(middles, middles))
    raw = np.stack([kills, draws, np.zeros_like(kills)], axis=1)[:, :, None].repeat(n, axis=2)
    ancestors = np.asarray(MAPPED_KILLING(raw, log(weights)))
    law = (ancestors[:, :, None] == np.arange(n)).mean(0)
    exact = np.diag(survival) + np.outer(1 - survival, share)
    np.testing.assert_allclose(law, exact, atol=1e-12)
    np.testing.assert_allclose(law.sum(0), n * share, atol=1e-12)
    mixed = raw.copy()
    mixed[:, :, 1:] = raw[::-1, :, 1:]  # a slot hears nothing of the others' random numbers
    assert (np.asarray(MAPPED_KILLING(mixed, log(weights)))[:, 0] == ancestors[:, 0]).all()


@each_scheme
@pytest.mark.parametrize("n, keys", [(2**14, 60), (2**17, 12), (2**20, 3)])
def test_expected_offspring_at_large_n(name, n, keys):
    for spread in (0.1, 2.0, 8.0) if n < 2**20 else (2.0,):
        log_weights = (np.random.default_rng(n).normal(size=n) * spread).astype(np.float32)
        log_weights[: n // 100] = log_weights[-n // 100 :] = -INF
        expected = n * normalised(log_weights)
        blocks = np.minimum(np.arange(n) * 50 // n, 49)  # stretches see a drift of the sums
        heavy = np.argsort(expected)[-50:]
        counts = np.zeros((keys, 100))
        for row, key in zip(counts, jax.random.split(jax.random.key(n), keys), strict=True):
            ancestors = DRAW[name](key, log_weights, n)
            assert_contract(name, ancestors, log_weights, n)
            count = offspring(ancestors, n)
            row[:50] = np.bincount(blocks, weights=count, minlength=50)
            row[50:] = count[heavy]
        target = np.concatenate([np.bincount(blocks, weights=expected, minlength=50), expected[heavy]])
        error = np.sqrt(VARIANCE.get(name, target) / keys)
        slack = 2.0**-20 * target + 1e-4  # the weights are float32
        assert (np.abs(counts.mean(0) - target) <= 5 * error + slack).all()


@pytest.mark.parametrize(
    "name, n, num",
    [(name, n, n) for name in NAMES for n in (2**10, 2**17)]
    + [(name, 2**10, 7) for name in NAMES if name != "killing"],
)
def test_zero_weights_are_never_drawn(name, n, num):
    cut = n // 100
    base = np.random.default_rng(0).normal(size=n).astype(np.float32)
    patterns = {"head": base.copy(), "tail": base.copy(), "both": base.copy()}
    patterns["head"][:cut] = patterns["both"][:cut] = -INF
    patterns["tail"][-cut:] = patterns["both"][-cut:] = -INF
    for single in (0, n // 3, n - 1):
        patterns[single] = np.full(n, -INF, np.float32)
        patterns[single][single] = -3.0
    for log_weights in patterns.values():
        for seed in range(3):
            assert_contract(name, DRAW[name](jax.random.key(seed), log_weights, num), log_weights, num)


@pytest.mark.parametrize("u", [0.0, 2.0**-23, 0.5, 1 - 2.0**-23, 1 - 2.0**-32])
def test_extreme_uniforms_stay_with_the_living(u):
    n = 2**14
    log_weights = np.random.default_rng(1).normal(size=n).astype(np.float32)
    log_weights[:9] = log_weights[-9:] = -INF
    u = np.uint32(u * 2**32)
    ancestors = PLACE["systematic"](u, log_weights, n)
    assert_contract("systematic", ancestors, log_weights, n)
    np.testing.assert_array_equal(PLACE["stratified"](np.full(n, u), log_weights, n), ancestors)
    one_enormous = np.full(n + 1, 2**32 - 1, np.uint32)
    one_enormous[0] = 0
    for name, raw in itertools.product(("multinomial", "residual"), (np.full(n + 1, u), one_enormous)):
        assert_contract("", PLACE[name](raw, log_weights, n), log_weights, n)
    placed = np.asarray(PLACE["killing"](np.full((3, n), u), log_weights))
    assert (log_weights[placed] > -INF).all()


def test_stratified_tells_numbers_apart_in_the_last_stratum():
    """In float32 the threshold (k + u) / n has 17 values there: (n - 1 + u) / n moves in steps of 2^-4 draws."""
    n = 2**20
    weights = np.ones(n)
    weights[-1], weights[-2] = 0.5, 1.5
    u = np.full(n, 2**31, np.uint32)
    for offset, expected in [(-(2**22), n - 2), (2**22, n - 1)]:  # 2^-10 to either side
        u[-1] = 2**31 + offset
        assert int(PLACE["stratified"](u, log(weights), n)[-1]) == expected


@each_scheme
def test_equal_weights_never_collapse_for_ten_thousand_keys(name):
    ancestors = np.asarray(BATCH[name](jax.random.split(jax.random.key(3), 10_000), np.zeros(100, np.float32), 100))
    if name == "multinomial":
        counts = np.apply_along_axis(np.bincount, 1, ancestors, minlength=100)
        assert counts.max() <= 12  # P(one of 10^6 counts, Poisson(1), exceeds 12) is 6e-5
        assert ((counts > 0).sum(1) > 40).all()
    else:
        assert (ancestors == np.arange(100)).all()


@each_scheme
@pytest.mark.parametrize("n", [1, 1000, 2**20 - 1])
def test_equal_weights_give_one_child_each(name, n):
    for level in (0.0, -1e4, 1e4, -95.0):
        ancestors = DRAW[name](jax.random.key(n), np.full(n, level, np.float32), n)
        if name == "multinomial":
            assert_contract(name, ancestors, np.zeros(n), n)
            assert offspring(ancestors, n).max() <= 14
        else:
            np.testing.assert_array_equal(ancestors, np.arange(n))


@each_scheme
def test_common_offset_changes_nothing(name):
    log_weights = np.random.default_rng(1).integers(-8, 8, 1000).astype(np.float32)
    expected = DRAW[name](jax.random.key(0), log_weights, 1000)
    for level in (-1e4, 1e4):
        ancestors = DRAW[name](jax.random.key(0), log_weights + np.float32(level), 1000)
        np.testing.assert_array_equal(ancestors, expected)


@each_scheme
def test_extreme_and_subnormal_weights(name):
    small = np.array([-1e4, -100.0, -95.0, 0.0, -103.0, -1e4, -88.0, *[-INF] * 6], np.float32)
    large = np.array([-3e38, 3e38, -INF, *[0.0] * 10], np.float32)
    for key in jax.random.split(jax.random.key(0), 50):
        assert (np.asarray(DRAW[name](key, small, 13)) == 3).all()
        assert (np.asarray(DRAW[name](key, large, 13)) == 1).all()


@each_scheme
@pytest.mark.parametrize("n, num", [(1, 13), (13, 1), (777, 776)])
def test_another_number_of_draws_than_particles(name, n, num):
    log_weights = np.random.default_rng(n).normal(size=n).astype(np.float32)
    if name == "killing":
        with pytest.raises(ValueError, match=f"`num` must be the number of particles, {n}, .* got {num}"):
            killing(jax.random.key(0), log_weights, num)
        return
    for key in jax.random.split(jax.random.key(0), 20):
        assert_contract(name, DRAW[name](key, log_weights, num), log_weights, num)


@each_scheme
def test_all_dead_keep_everyone(name):
    for dead, num in itertools.product([-INF, np.nan], [13] if name == "killing" else [1, 13, 40]):
        ancestors = DRAW[name](jax.random.key(0), np.full(13, dead, np.float32), num)
        np.testing.assert_array_equal(ancestors, np.arange(num) % 13)


@each_scheme
def test_nan_is_never_drawn_and_positive_infinity_takes_all(name):
    with_nan, with_infinity = np.full(13, np.nan, np.float32), np.arange(13, dtype=np.float32)
    with_nan[[1, 7]], with_infinity[[1, 7]] = 0.0, INF
    for log_weights in (with_nan, with_infinity):
        drawn = [np.asarray(DRAW[name](key, log_weights, 13)) for key in jax.random.split(jax.random.key(0), 20)]
        assert set(np.unique(drawn)) == {1, 7}


@each_scheme
def test_repeats_itself_under_vmap_cond_and_scan_with_both_kinds_of_keys(name):
    scheme, key = RESAMPLERS[name], jax.random.key(1)
    log_weights = np.random.default_rng(5).normal(size=13).astype(np.float32)
    expected = np.asarray(DRAW[name](key, log_weights, 13))

    @jax.jit
    def nested(raw_keys, rows):
        def step(carry, raw_key):
            return carry, jax.lax.cond(
                carry, jax.vmap(scheme, (None, 0)), lambda k, w: w.astype(jnp.int32), raw_key, rows
            )

        return jax.lax.scan(step, rows[0, 0] > -INF, raw_keys)[1]

    got = nested(jax.random.key_data(key)[None], np.stack([log_weights, log_weights[::-1]]))
    np.testing.assert_array_equal(got[0, 0], expected)


def test_repeats_itself_outside_of_jit():
    log_weights = np.random.default_rng(5).normal(size=13).astype(np.float32)
    expected = DRAW["systematic"](jax.random.key(1), log_weights, 13)
    np.testing.assert_array_equal(systematic(jax.random.key(1), log_weights), expected)


@each_scheme
def test_bad_arguments_are_refused(name):
    scheme, key = RESAMPLERS[name], jax.random.key(0)
    for bad in (np.float32(0), np.zeros((2, 2), np.float32), np.zeros(0, np.float32)):
        with pytest.raises(ValueError, match=r"`log_weights` must have shape \(n,\)"):
            scheme(key, bad)
    for num in (0, -1, 2**31):
        with pytest.raises(ValueError, match=f"`num` must be between 1 and 2.30, got {num}"):
            scheme(key, jnp.zeros(3), num)


def test_resolve_finds_names_and_passes_functions_through():
    for name, scheme in RESAMPLERS.items():
        assert resolve(name) is scheme and scheme.__name__ == name
    assert resolve("systematic") is systematic
    assert resolve(len) is len
    with pytest.raises(ValueError, match="'sistematic' is not known.*'killing'.*'multinomial'.*'systematic'"):
        resolve("sistematic")
    with pytest.raises(TypeError, match="name or a function"):
        resolve(3)


weights_or_dead = st.floats(-1e4, 1e4, width=32) | st.floats(-3, 3, width=32) | st.just(-INF)


@each_scheme
@settings(max_examples=100, deadline=None)
@given(
    log_weights=st.lists(weights_or_dead, min_size=13, max_size=13).filter(lambda x: max(x) > -INF),
    seed=st.integers(0, 2**31 - 1),
    num=st.sampled_from([1, 13, 40]),
)
def test_contract_holds_for_any_weights(name, log_weights, seed, num):
    num = 13 if name == "killing" else num
    values = np.array(log_weights, np.float32)
    assert_contract(name, DRAW[name](jax.random.key(seed), values, num), values, num)
