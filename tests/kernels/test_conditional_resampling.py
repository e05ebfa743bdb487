"""Conditional resampling: its joint law is that of the shuffled unconditional scheme, given the first ancestor."""

import collections
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl.kernels.resampling import CONDITIONAL, RESAMPLERS, resolve_conditional
from ppl.kernels.resampling.conditional.pinning import pin, point_in_stretch
from ppl.kernels.resampling.conditional.ssp import _bound_odds, _join, _up_odds
from ppl.kernels.resampling.inverse_cdf import relative_weights, scaled_prefix_sum
from ppl.kernels.resampling.ssp import ends, step_odds, steps

INF = np.inf
SCHEMES = sorted(CONDITIONAL)
jitted = {name: jax.jit(scheme, static_argnums=3) for name, scheme in CONDITIONAL.items()}


def logarithm(weights):
    with np.errstate(divide="ignore"):
        return np.log(np.array(weights, np.float32))


# Exact laws of the offspring counts, in float64, written from the schemes' definitions.


def counts_of(ancestors, n):
    return tuple(np.bincount(ancestors, minlength=n).tolist())


def independent_law(rows):
    """Counts when slot k draws independently with probabilities rows[k]."""
    n, law = len(rows[0]), collections.defaultdict(float)
    for ancestors in itertools.product(range(n), repeat=len(rows)):
        law[counts_of(ancestors, n)] += math.prod(row[a] for row, a in zip(rows, ancestors, strict=True))
    return law


def multinomial_law(share, num):
    return independent_law([share] * num)


def stratified_law(share, num):
    cuts = num * np.concatenate([[0], np.cumsum(share)])
    return independent_law([np.diff(np.clip(cuts, k, k + 1)) for k in range(num)])


def systematic_law(share, num):
    cuts = num * np.cumsum(share)
    breaks = np.unique(np.concatenate([[0.0, 1.0], np.mod(cuts, 1.0)]))
    law = collections.defaultdict(float)
    for low, high in itertools.pairwise(breaks):
        points = np.arange(num) + (low + high) / 2
        ancestors = np.minimum(np.searchsorted(cuts, points, side="right"), len(share) - 1)
        law[counts_of(ancestors, len(share))] += high - low
    return law


def residual_law(share, num):
    expected = num * share
    copies = np.floor(expected + 1e-9)
    remainders, rest = np.maximum(expected - copies, 0), round(num - copies.sum())
    if not rest:
        return {tuple(copies.astype(int).tolist()): 1.0}
    law = multinomial_law(remainders / remainders.sum(), rest)
    return {tuple((copies + counts).astype(int).tolist()): chance for counts, chance in law.items()}


def killing_law(share, num):
    survival = share / share.max()
    return independent_law([np.eye(len(share))[m] * s + (1 - s) * share for m, s in enumerate(survival)])


def ssp_law(share, num):
    """Algorithm of Gerber, Chopin and Whiteley (2019): two fractions at a time, one is rounded away."""
    law = collections.defaultdict(float)

    def walk(fractions, pending, i, probability):
        if i == len(share):
            law[tuple((copies + np.round(fractions)).astype(int).tolist())] += probability
            return
        p, q = fractions[pending], fractions[i]
        if min(p, 1 - p) < 1e-9:
            return walk(fractions, i, i + 1, probability)
        if min(q, 1 - q) < 1e-9:
            return walk(fractions, pending, i + 1, probability)
        up, down = min(1 - p, q), min(p, 1 - q)
        for change, chance in ((up, down / (up + down)), (-down, up / (up + down))):
            moved = fractions.copy()
            moved[pending] += change
            moved[i] -= change
            settled = min(moved[pending], 1 - moved[pending]) < 1e-9
            walk(moved, i if settled else pending, i + 1, probability * chance)

    copies = np.floor(num * share + 1e-9)
    walk(num * share - copies, 0, 1, 1.0)
    return law


OFFSPRING_LAWS = {
    "multinomial": multinomial_law,
    "stratified": stratified_law,
    "systematic": systematic_law,
    "residual": residual_law,
    "killing": killing_law,
    "ssp": ssp_law,
}


def shuffled_law(name, weights, num):
    """P(a) for every sequence of ancestors in uniformly random order."""
    share = np.array(weights, np.float64) / sum(weights)
    law, n = OFFSPRING_LAWS[name](share, num), len(weights)
    sequences = np.array(list(itertools.product(range(n), repeat=num)))
    orders = [math.factorial(num) / math.prod(map(math.factorial, counts_of(a, n))) for a in sequences]
    chances = [law.get(counts_of(a, n), 0.0) / order for a, order in zip(sequences, orders, strict=True)]
    return sequences, np.array(chances), share


CASES = [((5, 1, 2), 3), ((2, 0, 3), 3), ((1, 1, 1), 3), ((7, 2, 4), 3), ((1, 4, 2), 2), ((3, 1), 3)]


@functools.cache
def many(name, num):
    return jax.jit(jax.vmap(lambda key, log_weights, r: CONDITIONAL[name](key, log_weights, r, num), (0, None, 0)))


@pytest.mark.parametrize("weights, num", CASES)
@pytest.mark.parametrize("name", SCHEMES)
def test_conditional_joint_law_is_the_shuffled_law_given_the_first(name, weights, num):
    if name == "killing":
        num = len(weights)
    sequences, chances, share = shuffled_law(name, weights, num)
    size, n = 60_000, len(weights)
    living = [r if weights[r] else 0 for r in range(n)]  # always n: one compilation
    keys = jax.random.split(jax.random.key(sum(weights)), (n * size,))
    ancestors = np.asarray(many(name, num)(keys, logarithm(weights), jnp.repeat(jnp.array(living, jnp.int32), size)))
    place = n ** np.arange(num)[::-1]
    for r, drawn in zip(living, np.split(ancestors, len(living)), strict=True):
        expected = np.where(sequences[:, 0] == r, chances, 0) / share[r]
        assert expected.sum() == pytest.approx(1, abs=1e-9)
        seen = np.bincount(drawn @ place, minlength=n**num) / size
        assert (seen[expected < 1e-9] == 0).all()
        error = np.sqrt(expected * np.maximum(1 - expected, 0) / size)
        np.testing.assert_array_less(np.abs(seen - expected), 5 * error + 1e-6)


@pytest.mark.parametrize("weights, num", [*CASES, ((2, 5, 7, 3), 4), ((7, 0, 3, 1), 3), ((1, 6, 6, 2), 7)])
def test_conditional_ssp_counts_are_exactly_size_biased(weights, num):
    """All bits, weighted by the probabilities the kernel draws them with: P(o | A_0 = r) = P(o) o_r / (num W_r)."""
    n = len(weights)
    relative, _ = relative_weights(logarithm(weights))
    walk = steps(scaled_prefix_sum(relative, num))
    law = ssp_law(np.array(weights) / sum(weights), num)
    patterns = list(itertools.product([False, True], repeat=n))
    bits = jnp.array(patterns)

    def probability(odds):
        a, b = (np.asarray(x, np.float64) for x in odds)
        return a / np.where(b > 0, b, 1)

    @jax.jit
    def joined_ends(bound, retained):
        joined = jax.vmap(lambda free: _join(free, bound, retained))(bits)
        return jax.vmap(lambda s: ends(s, *walk))(joined)

    for r in (r for r in range(n) if weights[r]):
        retained = jnp.int32(r)
        seen = collections.defaultdict(float)
        chance_up = probability(_up_odds(*walk, retained))
        for up, chance in ((True, chance_up), (False, 1 - chance_up)):
            if chance == 0:
                continue
            free_chance = probability(step_odds(*walk[1:]))
            bound_chance = probability(_bound_odds(*walk[1:], retained, jnp.bool_(up)))
            for bound, bound_bits in zip(patterns, bits, strict=True):
                stays = bound[r]
                first = next((j for j in range(r + 1, n) if bound[j]), n - 1) if stays else r
                if any(bound[j] for j in range(n) if j < r or j > first):
                    continue  # bits that are not used: one pattern stands for all
                used = range(r, first + 1)
                weight = chance * math.prod(bound_chance[j] if bound[j] else 1 - bound_chance[j] for j in used)
                if weight <= 0:
                    continue
                for free, cumulative in zip(patterns, np.asarray(joined_ends(bound_bits, retained)), strict=True):
                    if any(free[j] for j in used):
                        continue
                    rest = [j for j in range(n) if j not in used]
                    other = math.prod(free_chance[j] if free[j] else 1 - free_chance[j] for j in rest)
                    if weight * other > 0:
                        seen[tuple(np.diff(cumulative, prepend=0).tolist())] += weight * other
        expected_draws = num * weights[r] / sum(weights)
        for counts in set(seen) | set(law):
            truth = law.get(counts, 0) * counts[r] / expected_draws
            assert seen.get(counts, 0) == pytest.approx(truth, abs=2e-6), (r, counts)


@pytest.mark.parametrize("n, num", [(5, 5), (100, 37), (2**14, 2**14), (2**20, 2**20), (2**20, 3)])
def test_point_in_stretch_is_in_it_at_both_ends(n, num):
    log_weights = np.random.default_rng(n).normal(size=n).astype(np.float32) * 3
    sums = scaled_prefix_sum(relative_weights(log_weights)[0], num)
    whole, part = (np.asarray(x).astype(np.uint64) for x in sums)
    position = np.concatenate([[0], (whole << np.uint64(32)) + part]).astype(np.uint64)
    for bits in ([0, 0], [2**32 - 1, 2**32 - 1], [2**31, 0]):
        for r in [0, 1, n // 2, n - 1]:
            place, u = point_in_stretch(jnp.array(bits, jnp.uint32), sums, jnp.int32(r))
            point = (int(place) << 32) + int(u)
            low, high = int(position[r]), int(position[r + 1])
            length = high - low
            assert low <= point < high or length == 0
            exact = low + (length * ((bits[0] << 32) + bits[1]) >> 64)
            assert exact - 3 <= point <= exact  # in 2^-32ths


def test_pin_drops_one_place_and_shuffles_the_others_evenly():
    ancestors = jnp.array([4, 5, 6, 7], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 60_000)
    pinned = np.asarray(jax.jit(jax.vmap(lambda key: pin(key, ancestors, 1, jnp.int32(5))))(keys))
    assert (pinned[:, 0] == 5).all()
    seen = collections.Counter(map(tuple, pinned[:, 1:].tolist()))
    assert set(seen) == set(itertools.permutations([4, 6, 7]))
    assert all(abs(count / 60_000 - 1 / 6) < 5 * math.sqrt(5 / 36 / 60_000) for count in seen.values())


def assert_contract(ancestors, log_weights, retained, num):
    ancestors = np.asarray(ancestors)
    assert ancestors.shape == (num,) and ancestors.dtype == np.int32
    assert ancestors[0] == retained
    assert ancestors.min() >= 0 and ancestors.max() < len(log_weights)
    assert (np.asarray(log_weights)[ancestors[1:]] > -INF).all()


@pytest.mark.parametrize("n", [2**14, 2**17])
@pytest.mark.parametrize("name", SCHEMES)
def test_conditional_contract_at_large_n_with_traced_retained(name, n):
    log_weights = (2 * np.random.default_rng(n).normal(size=n)).astype(np.float32)
    log_weights[: n // 50] = log_weights[-n // 50 :] = -INF
    expected = np.exp(log_weights.astype(np.float64) - log_weights.max())
    expected *= n / expected.sum()
    living = np.flatnonzero(log_weights > -INF)
    lightest, heaviest = living[np.argmin(log_weights[living])], np.argmax(log_weights)
    for retained in (living[0], living[-1], lightest, heaviest):
        ancestors = jitted[name](jax.random.key(retained), log_weights, jnp.int32(retained), n)
        assert_contract(ancestors, log_weights, retained, n)
        counts = np.bincount(np.asarray(ancestors), minlength=n)
        bound = {"systematic": 1, "ssp": 1, "stratified": 2}.get(name)
        if bound:  # what is dropped for the retained one is its own draw
            assert (np.abs(counts - expected) < bound + 1e-6 * expected + 1e-6).all()
        half = ancestors[1 : n // 2].mean(), ancestors[n // 2 :].mean()  # random order: both halves alike
        spread = np.std(np.asarray(ancestors)) * np.sqrt(4 / n)
        assert abs(half[0] - half[1]) < 5 * spread


@pytest.mark.parametrize("name", sorted(set(SCHEMES) - {"multinomial"}))
def test_conditional_equal_weights_keep_everyone(name):
    ancestors = jitted[name](jax.random.key(0), np.zeros(1000, np.float32), 137, 1000)
    assert ancestors[0] == 137
    np.testing.assert_array_equal(np.sort(ancestors), np.arange(1000))


@pytest.mark.parametrize("name", SCHEMES)
def test_conditional_pins_retained_particles_without_a_law(name):
    log_weights = np.array([0.0, -INF, 1.0, -INF, 0.5], np.float32)
    for retained in (1, 3):
        assert_contract(jitted[name](jax.random.key(retained), log_weights, retained, 5), log_weights, retained, 5)
    for retained, nearest in ((-1, 0), (-7, 0), (5, 4), (2**31 - 1, 4)):
        assert_contract(jitted[name](jax.random.key(0), log_weights, retained, 5), log_weights, nearest, 5)
    ancestors = np.asarray(jitted[name](jax.random.key(0), np.full(5, -INF, np.float32), 3, 5))
    assert ancestors[0] == 3 and ancestors.min() >= 0 and ancestors.max() < 5


@pytest.mark.parametrize("name", SCHEMES)
def test_conditional_of_a_single_particle_or_draw(name):
    assert CONDITIONAL[name](jax.random.key(0), jnp.zeros(1), 0).tolist() == [0]
    if name != "killing":
        assert jitted[name](jax.random.key(0), np.zeros(3, np.float32), 2, 1).tolist() == [2]
        assert jitted[name](jax.random.key(0), np.zeros(1, np.float32), 0, 4).tolist() == [0] * 4


@pytest.mark.parametrize("name", SCHEMES)
def test_conditional_repeats_itself_under_vmap_cond_and_scan(name):
    log_weights, scheme = np.random.default_rng(5).normal(size=50).astype(np.float32), CONDITIONAL[name]
    key = jax.random.PRNGKey(1)
    expected = np.asarray(jitted[name](key, log_weights, 7, 50))
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(scheme, (None, None, 0)))(key, log_weights, jnp.array([7]))[0], expected
    )
    branch = functools.partial(jax.lax.cond, True, scheme, lambda *_: jnp.arange(50))
    np.testing.assert_array_equal(jax.jit(branch)(key, log_weights, jnp.int32(7)), expected)
    scanned = jax.lax.scan(lambda c, r: (c, scheme(key, log_weights, r)), 0, jnp.array([7]))[1]
    np.testing.assert_array_equal(scanned[0], expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_conditional_refuses_bad_input(name):
    scheme, key = CONDITIONAL[name], jax.random.key(0)
    with pytest.raises(ValueError, match="`log_weights` must have shape"):
        scheme(key, jnp.zeros((2, 2)), 0)
    with pytest.raises(ValueError, match="`num` must be between"):
        scheme(key, jnp.zeros(3), 0, 0)
    with pytest.raises(ValueError, match="`retained` must be one index, of shape"):
        scheme(key, jnp.zeros(3), jnp.array([0, 1]))
    with pytest.raises(TypeError, match="`retained` must be the index of a particle.*float32"):
        scheme(key, jnp.zeros(3), 1.0)


def test_conditional_killing_refuses_another_number_of_draws():
    with pytest.raises(ValueError, match="`num` must be the number of particles"):
        CONDITIONAL["killing"](jax.random.key(0), jnp.zeros(3), 0, 2)


def test_resolve_conditional_finds_names_and_passes_functions_through():
    assert set(CONDITIONAL) == set(RESAMPLERS)
    assert resolve_conditional("ssp") is CONDITIONAL["ssp"]
    assert resolve_conditional(len) is len
    with pytest.raises(ValueError, match="'sps' has no conditional form.*'ssp'"):
        resolve_conditional("sps")
    with pytest.raises(TypeError, match="name or a function"):
        resolve_conditional(3)


weights_or_dead = st.floats(-1e4, 1e4, width=32) | st.floats(-3, 3, width=32) | st.just(-INF)


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(weights_or_dead, min_size=13, max_size=13).filter(lambda x: max(x) > -INF),
    st.integers(0, 12),
    st.integers(0, 1000),
    st.sampled_from([1, 13, 40]),
)
def test_conditional_holds_its_contract_for_any_weights(name, log_weights, retained, seed, num):
    values, num = np.array(log_weights, np.float32), 13 if name == "killing" else num
    assert_contract(jitted[name](jax.random.key(seed), values, retained, num), values, retained, num)
