"""The checkers pass what is right, and find what is wrong: each is shown algorithms and kernels with one error."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ppl
from ppl import chance
from ppl.inference import SMC, EntropicAnnealing, ImportanceSampling
from ppl.inference.metropolis_hastings import MH, Regenerate
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.kernels import resampling
from ppl.models import MarkovChain
from ppl.testing import (
    assert_invariant,
    assert_joint,
    assert_properly_weighted,
    enumerate_runs,
    enumerating,
    transition_matrix,
)
from ppl.testing.resampling_laws import LAWS, conditional_law
from tests.finite_programs import EMISSION, TRANSITION

KEY = jax.random.key(0)
DATA = jnp.array([0, 1])


@ppl.model
def hidden_markov(observations, proposed=None):
    """A hidden Markov chain with a latent that is drawn before the loop and used within and after it."""
    bias = ppl.sample("bias", dist.Bernoulli(0.75))

    def step(state, y):
        probs = jnp.where(bias == 1, TRANSITION[state], TRANSITION[state][::-1])
        proposal = None if proposed is None else dist.Categorical(probs=proposed)
        state = ppl.sample("x", dist.Categorical(probs=probs), proposal=proposal)
        ppl.observe("y", dist.Categorical(probs=EMISSION[state]), y)
        return state, state

    last, path = ppl.scan(step, jnp.int32(0), observations)
    ppl.factor("after", jnp.where(bias == last, 0.5, -0.25))
    return {"bias": bias, "path": path}


@ppl.model
def stopping():
    """A loop that is left when a 1 is drawn."""

    def step(count, _):
        x = ppl.sample("x", dist.Bernoulli(0.4))
        ppl.factor("w", jnp.where(x == 1, 0.7, -0.3) * (1 + count))
        return jnp.where(x == 1, 9, count + 1), x

    return ppl.scan(step, 0, length=2, until=lambda count: count == 9)[0]


@ppl.model
def two_steps():
    """Two weighed draws, in a plate of one."""

    def step(state, weight):
        with numpyro.plate("one", 1):
            x = ppl.sample("x", dist.Categorical(logits=jnp.array([0.3, -0.2, -jnp.inf])))[0]
        ppl.factor("w", weight * x + 0.2 * state)
        return x, x

    return ppl.scan(step, jnp.int32(0), jnp.array([0.5, -1.0]))[1]


# Runs ----------------------------------------------------------------------------------------------------------------


def expectations(function):
    """Return the law of a function's integer results, and the number of runs."""
    law, count = {}, 0
    for probability, result in enumerate_runs(function, KEY)(KEY):
        law[tuple(np.ravel(result).tolist())] = law.get(tuple(np.ravel(result).tolist()), 0.0) + probability
        count += 1
    return law, count


def test_choices_have_their_probabilities_and_impossible_ones_are_no_options():
    def function(key):
        a, b, c = jax.random.split(key, 3)
        first = chance.categorical(a, jnp.log(jnp.array([0.25, 0.0, 0.75])))
        return jnp.stack([first, chance.index(b, 1 + first), chance.accept(c, jnp.log(0.25)).astype(jnp.int32)])

    law, count = expectations(function)
    expected = {(0, 0): 0.25, (2, 0): 0.25, (2, 1): 0.25, (2, 2): 0.25}
    assert count == 8
    assert law == pytest.approx({(*k, a): p * q for k, p in expected.items() for a, q in ((0, 0.75), (1, 0.25))})


@pytest.mark.parametrize(
    "law, support",
    [
        (dist.Bernoulli(0.3), {(0,): 0.7, (1,): 0.3}),
        (dist.Bernoulli(0.5).expand([2]).to_event(1), dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 0.25)),
        (dist.DiscreteUniform(2, 4), {(2,): 1 / 3, (3,): 1 / 3, (4,): 1 / 3}),
        (dist.Binomial(2, 0.5), {(0,): 0.25, (1,): 0.5, (2,): 0.25}),
        (dist.Categorical(probs=jnp.array([[0.5, 0.5], [1.0, 0.0]])), {(0, 0): 0.5, (1, 0): 0.5}),
        (dist.Bernoulli(0.3).mask(False), {(0,): 0.7, (1,): 0.3}),
        (dist.Delta(3.0), {(3,): 1.0}),
    ],
    ids=["bernoulli", "event", "uniform", "binomial", "batch", "masked", "delta"],
)
def test_finite_laws_are_enumerated_and_batches_are_independent(law, support):
    assert expectations(lambda key: chance.sample(key, law))[0] == pytest.approx(support, abs=1e-6)


def test_continuous_sites_are_refused_by_name():
    @ppl.model
    def program():
        ppl.sample("slope", dist.Normal())

    with pytest.raises(TypeError, match=r"'slope' at test_testing.py:\d+: Normal cannot be enumerated.*finite sites"):
        assert_properly_weighted(program(), SMC(2))


def test_random_numbers_beside_the_choices_are_refused():
    with pytest.raises(TypeError, match="from jax.random, which cannot be enumerated"):
        enumerate_runs(lambda key: jax.random.uniform(key) < 0.5, KEY)


def test_too_many_runs_are_refused_with_what_they_cover():
    runs = enumerate_runs(lambda key: chance.index(key, 100), KEY)
    with pytest.raises(ValueError, match="`max_runs` = 10 runs: these cover 0.1 of the probability"):
        list(runs(KEY, max_runs=10))


def test_one_key_for_two_choices_is_an_error():
    runs = enumerate_runs(lambda key: chance.index(key, 2) + chance.accept(key, -1.0), KEY)
    with pytest.raises(AssertionError, match="one PRNG key makes two different choices .*'accept' and 'index'"):
        list(runs(KEY))


def test_compiled_runs_and_helpers_are_never_taken_for_enumerated_ones():
    helper = jax.jit(lambda key: chance.index(key, 2))
    before = [int(helper(jax.random.key(seed))) for seed in range(20)]
    assert len(expectations(helper)[0]) == 2
    assert [int(helper(jax.random.key(seed))) for seed in range(20)] == before
    trace = ppl.simulate(stopping(), seed=3)
    with enumerating(), pytest.raises(Exception, match="outside of `enumerate_runs`"):
        ppl.simulate(stopping(), seed=3)
    assert ppl.simulate(stopping(), seed=3).log_density == trace.log_density


# Laws of resampling --------------------------------------------------------------------------------------------------

WEIGHTS = [np.array([0.15, 0.5, 0.35]), np.array([0.4, 0.0, 0.6]), np.full(3, 1 / 3)]


@pytest.mark.parametrize("scheme", LAWS)
def test_written_laws_are_those_of_the_schemes(scheme):
    draws = jax.jit(jax.vmap(lambda key, weights: resampling.resolve(scheme)(key, jnp.log(weights), 3), (0, None)))
    for weights in WEIGHTS:
        ancestors, probabilities = LAWS[scheme](weights, 3)
        assert probabilities.sum() == pytest.approx(1.0)
        offspring = np.array([probabilities @ (ancestors == i).sum(axis=1) for i in range(3)])
        np.testing.assert_allclose(offspring, 3 * weights, atol=1e-8)
        drawn = draws(jax.random.split(jax.random.key(1), 4000), jnp.asarray(weights))
        check_frequencies(np.asarray(drawn), ancestors, probabilities)


@pytest.mark.parametrize("scheme", resampling.CONDITIONAL)
def test_retaining_a_drawn_particle_gives_the_unconditional_law_in_random_order(scheme):
    for weights in WEIGHTS:
        expected: dict = {}
        for row, probability in zip(*LAWS[scheme](weights, 3), strict=True):
            for order in itertools.permutations(row.tolist()):
                expected[order] = expected.get(order, 0.0) + probability / 6
        mixed: dict = {}
        for retained in np.flatnonzero(weights):
            for row, probability in zip(*conditional_law(LAWS[scheme], weights, retained, 3), strict=True):
                assert row[0] == retained
                mixed[tuple(row.tolist())] = mixed.get(tuple(row.tolist()), 0.0) + weights[retained] * probability
        assert mixed == pytest.approx({row: p for row, p in expected.items() if p > 0}, abs=1e-8)


def test_conditional_schemes_are_drawn_from_their_law():
    draws = jax.jit(jax.vmap(lambda key: resampling.resolve_conditional("systematic")(key, jnp.log(WEIGHTS[0]), 2, 3)))
    law = conditional_law(LAWS["systematic"], WEIGHTS[0], 2, 3)
    check_frequencies(np.asarray(draws(jax.random.split(jax.random.key(2), 4000))), *law)


def check_frequencies(drawn, ancestors, probabilities):
    """Compare how often each vector of ancestors was drawn with its probability, to 5 standard errors."""
    known = {tuple(a): p for a, p in zip(ancestors.tolist(), probabilities, strict=True) if p > 1e-9}
    counts = dict.fromkeys(known, 0)
    for row in drawn.tolist():
        assert tuple(row) in known
        counts[tuple(row)] += 1
    for row, probability in known.items():
        spread = np.sqrt(len(drawn) * probability * (1 - probability))
        assert abs(counts[row] - len(drawn) * probability) <= 5 * spread + 1e-3


# Proper weighting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, algorithm",
    [
        (hidden_markov(DATA, jnp.array([0.4, 0.6])), SMC(2, ess_threshold=0.9)),
        (stopping(), SMC(2, "residual", ess_threshold=0.9)),
        (MarkovChain([0.0, 1.0], [[0.5, -1.0], [0.0, -jnp.inf]], 2) ** 2.0, SMC(2, "ssp", ess_threshold=1.0)),
    ],
    ids=["proposal", "until", "target"],
)
def test_what_is_properly_weighted_passes(program, algorithm):
    assert_properly_weighted(program, algorithm)


def biased(key, log_weights, num):
    """A resampler of the user's own that gives the first living particle more than its share."""
    keys = jax.random.split(key, num)
    return jax.vmap(lambda k: chance.categorical(k, log_weights.at[0].add(0.1)))(keys)


def fair(key, log_weights, num):
    """Independent draws."""
    return jax.vmap(lambda k: chance.categorical(k, log_weights))(jax.random.split(key, num))


def test_a_biased_resampler_of_the_users_own_is_caught_and_a_fair_one_passes():
    assert_properly_weighted(two_steps(), SMC(2, resampler=fair, ess_threshold=1.0))
    with pytest.raises(AssertionError, match=r"not properly weighted.*over all 256 runs and 4 traces") as error:
        assert_properly_weighted(two_steps(), SMC(2, resampler=biased, ess_threshold=1.0))
    assert "E[Z_hat sum W f] = " in str(error.value) and "the measure gives" in str(error.value)


def test_a_resampler_with_randomness_of_its_own_is_refused():
    with pytest.raises(TypeError, match="name the resampling scheme"):
        assert_properly_weighted(two_steps(), SMC(2, resampler=resampling.systematic, ess_threshold=1.0))


def test_a_proposal_with_smaller_support_is_caught_and_what_it_misses_is_named():
    with pytest.raises(AssertionError, match="never reached: {bias: 0, x: .*1.*smaller support than its site"):
        assert_properly_weighted(hidden_markov(DATA, jnp.array([1.0, 0.0])), ImportanceSampling(1))


@dataclasses.dataclass(frozen=True)
class Swapped:
    """Importance sampling whose values are another particle's."""

    guarantee = "unbiased"

    def __call__(self, program, key, **options):
        posterior = ImportanceSampling(2)(program, key, **options)
        return dataclasses.replace(posterior, value=jax.tree.map(lambda a: a[::-1], posterior.value))


def test_values_that_belong_to_other_particles_are_caught_by_functions_of_the_value():
    with pytest.raises(AssertionError, match=r"f = odd: E\[Z_hat sum W f\]"):
        assert_properly_weighted(two_steps(), Swapped(), {"odd": lambda value: value.sum() % 2})


def test_what_promises_less_is_refused():
    with pytest.raises(ValueError, match="must promise \"unbiased\" weights.*'heuristic'"):
        assert_properly_weighted(two_steps(), SMC(2, annealing=EntropicAnnealing(mode="ess")))


# Invariance ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Walk(TraceKernel):
    """A step to a neighbour on 0..3, with proposals that differ by place; `error` leaves something out."""

    error: str = ""

    def bind(self, space):
        return WalkMoves(space, self.error)


class WalkMoves(Moves):
    sites = ("x",)

    def __init__(self, space, error):
        self.space, self.error = space, error

    def init(self, key, sites, num_warmup):
        return self.space.log_density(sites)

    def step(self, key, sites, memory):
        up_key, accept_key = jax.random.split(key)
        x = sites["x"]
        rise = lambda x: jnp.where(x == 0, 1.0, jnp.where(x == 3, 0.0, 0.7))  # noqa: E731
        up = chance.categorical(up_key, jnp.log(jnp.stack([1 - rise(x), rise(x)])))
        proposed = x + 2 * up - 1
        new = sites | {"x": proposed}
        new_log_density = self.space.log_density(new)
        ratio = new_log_density - memory
        forward, back = jnp.where(up == 1, rise(x), 1 - rise(x)), jnp.where(up == 1, 1 - rise(proposed), rise(proposed))
        if self.error != "no proposal ratio":
            ratio += jnp.log(back) - jnp.log(forward)
        if self.error == "one key":
            accept_key = up_key
        accepted = chance.accept(accept_key, ratio)
        sites = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, sites)
        if self.error != "stale memory":
            memory = jnp.where(accepted, new_log_density, memory)
        if self.error == "other site":
            sites["y"] = 1 - sites["y"]
        if self.error == "out of range":
            sites["x"] = sites["x"] + 1
        return sites, memory, {"acceptance": jnp.exp(jnp.minimum(ratio, 0.0))}


@ppl.model
def ladder():
    x = ppl.sample("x", dist.DiscreteUniform(0, 3))
    y = ppl.sample("y", dist.Bernoulli(0.2 + 0.1 * x))
    ppl.factor("w", 0.4 * x * y - 0.1 * x)


def test_the_transition_matrix_is_the_kernels():
    traces, pi, matrix = transition_matrix(ladder(), Walk())
    assert len(traces) == 8 and matrix.shape == (8, 8)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-9)
    np.testing.assert_allclose(pi.sum(), 1.0)
    place = {(int(x), int(y)): i for i, (x, y) in enumerate(zip(traces.sites["x"], traces.sites["y"], strict=True))}
    ratio = pi[place[2, 1]] / pi[place[1, 1]] * 0.3 / 0.7
    assert matrix[place[1, 1], place[2, 1]] == pytest.approx(0.7 * min(1.0, ratio), abs=1e-6)
    assert matrix[place[1, 1], place[1, 0]] == 0


def test_invariant_kernels_pass():
    assert_invariant(ladder(), Walk(), num_steps=2)
    assert_invariant(stopping(), Regenerate("x"), irreducible=True)


@pytest.mark.parametrize(
    "error, message",
    [
        ("no proposal ratio", "does not leave the posterior.* as it is"),
        ("one key", "one PRNG key makes two different choices"),
        ("other site", r"changes \['y'\]; the sites that it says it moves are \['x'\]"),
        ("out of range", "to {x: 4, y: .}, which has density zero"),
    ],
)
def test_a_kernel_with_one_error_is_caught(error, message):
    with pytest.raises(AssertionError, match=message):
        assert_invariant(ladder(), Walk(error))


def test_a_memory_that_is_not_kept_up_is_seen_from_the_second_step_on():
    assert_invariant(ladder(), Walk("stale memory"))
    with pytest.raises(AssertionError, match="does not leave the posterior"):
        assert_invariant(ladder(), Walk("stale memory"), num_steps=2)


def test_a_kernel_that_misses_traces_is_not_irreducible_and_they_are_named():
    narrow = MH(lambda sites: {"x": dist.Categorical(probs=jnp.array([0.5, 0.5, 0.0, 0.0])), "y": dist.Bernoulli(0.5)})
    with pytest.raises(
        AssertionError, match="from {x: 0, y: 0} .* never reached: {x: 2.*smaller support than its site"
    ):
        assert_invariant(ladder(), narrow, irreducible=True)


# The joint distribution ----------------------------------------------------------------------------------------------


@ppl.model
def regression():
    slope = ppl.sample("slope", dist.Normal())
    ppl.sample("y", dist.Normal(slope * jnp.array([1.0, 2.0]), 0.5).to_event(1))


@dataclasses.dataclass(frozen=True)
class Drift(TraceKernel):
    """Metropolis-Hastings on the slope with a proposal that is not symmetric; `error` leaves something out."""

    error: str = ""

    def bind(self, space):
        return DriftMoves(space, self.error)


class DriftMoves(Moves):
    sites = ("slope",)

    def __init__(self, space, error):
        self.space, self.error = space, error

    def step(self, key, sites, memory):
        draw_key, accept_key = jax.random.split(key)
        law = lambda x: dist.Normal(0.8 * x, 0.4)  # noqa: E731
        x = sites["slope"]
        proposed = law(x).sample(draw_key)
        ratio = self.space.log_density({"slope": proposed}) - self.space.log_density(sites)
        if self.error == "ignores the data":
            ratio = dist.Normal().log_prob(proposed) - dist.Normal().log_prob(x)
        if self.error != "no proposal ratio":
            ratio += law(proposed).log_prob(x) - law(x).log_prob(proposed)
        accepted = chance.accept(draw_key if self.error == "one key" else accept_key, ratio)
        return {"slope": jnp.where(accepted, proposed, x)}, memory, {"acceptance": jnp.exp(jnp.minimum(ratio, 0.0))}


joint = functools.partial(assert_joint, observed=["y"], num_draws=20_000)


def test_a_right_kernel_passes_the_joint_test():
    joint(regression(), Drift())


@pytest.mark.parametrize(
    "error, functions, message",
    [
        ("no proposal ratio", None, r"tanh\^2 slope: mean"),
        ("ignores the data", None, r"what a step adds to tanh slope tanh y\[1\]: mean 0, with the kernel"),
        ("one key", {"slope": lambda sites: sites["slope"]}, "2 of 2 test functions .*\n.*adds to slope: mean"),
    ],
)
def test_the_joint_test_catches_a_kernel_with_one_error(error, functions, message):
    with pytest.raises(AssertionError, match=rf"does not leave the joint distribution[\s\S]*{message} .*z = "):
        joint(regression(), Drift(error), functions)


def test_the_joint_test_refuses_what_it_cannot_simulate():
    with pytest.raises(ValueError, match=r"cannot be simulated: \['w'\] are observations, factors"):
        assert_joint(ladder(), Walk())


def test_the_documented_examples_run():
    lines = ppl.testing.__doc__.splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    ") or not line)
    exec(code, dict(globals()))
