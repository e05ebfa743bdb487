"""PMMH: invariant on finite programs, the estimate is kept, the walk stops learning, and a Gaussian's posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import MCMC, PMMH, SMC, EntropicAnnealing
from ppl.inference.parameter_walk import Learned
from ppl.inference.pmmh import prepared_unbiased
from ppl.models import MarkovChain
from ppl.testing import assert_invariant
from ppl.trace_space import TraceSpace
from tests.inference.test_state_space import YS, walk, walk_exactly
from tests.ppl.checks import assert_mean_within_5_standard_errors


@ppl.model
def switching(observations):
    """Two steps, of which the second is a function of the first: few runs, and all that a run is made of."""
    bias = ppl.sample("bias", dist.Bernoulli(0.75))

    def step(state, x):
        second, y = x
        law = jnp.where(second, jnp.where((state == 1) ^ (bias == 1), 1e4, -1e4), 0.8 * bias - 0.5)
        state = ppl.sample("x", dist.Bernoulli(logits=law))
        ppl.observe("y", dist.Bernoulli(0.2 + 0.5 * state), y)
        return state, state

    last, path = ppl.scan(step, 0, (jnp.array([False, True]), observations))
    ppl.factor("after", 0.6 * bias * last)
    return {"bias": bias, "path": path}


DATA = jnp.array([0, 1])


def flip(sites):
    return {"bias": dist.Bernoulli(logits=1e4 * (1.0 - 2.0 * sites["bias"]))}


def lopsided(sites):
    """A proposal that looks at the path too, and at how it began."""
    return {"bias": dist.Bernoulli(jnp.where(sites["x"][0] == sites["bias"], 0.3, 0.8))}


@pytest.mark.parametrize(
    "proposal, smc",
    [(flip, SMC(2, ess_threshold=1.0)), (lopsided, SMC(2, ess_threshold=0.95, resampler="multinomial"))],
    ids=["every step", "adaptive"],
)
def test_posterior_of_a_finite_program_stays_as_it_is(proposal, smc):
    assert_invariant(switching(DATA), PMMH("bias", smc, proposal), irreducible=True)


class FreelyStarted(PMMH):
    """A wrong kernel: it gives a trace's population a free run's law in place of a conditional one's."""

    def bind(self, space):
        moves = super().bind(space)
        estimate = moves.estimate
        moves.estimate = lambda key, point, rest=None: estimate(key, point)
        return moves


def test_a_population_that_does_not_follow_the_present_trace_is_seen():
    with pytest.raises(AssertionError, match="does not leave the posterior"):
        assert_invariant(switching(DATA), FreelyStarted("bias", SMC(2, ess_threshold=1.0), flip))


PROGRAM = walk(jnp.asarray(YS, jnp.float32))
KERNEL = PMMH("drift", SMC(8), scale=0.6)


def test_the_estimate_is_kept_while_the_parameters_stay_and_the_walk_learns_in_the_warm_up_only():
    moves = PMMH("drift", SMC(8)).bind(TraceSpace(PROGRAM.stage(keep_rules=False)))

    @jax.jit
    def run(key):
        start, _ = moves.space.simulate(key)
        memory = moves.init(key, start, 30)

        def one(state, key):
            sites, memory, _ = moves.step(key, *state)
            return (sites, memory), (sites, memory)

        last, met = jax.lax.scan(one, (start, memory), jax.random.split(key, 90))
        return jax.tree.map(lambda a, b: jnp.append(a[None], b, axis=0), (start, memory), met), moves.refresh(
            key, *last
        )

    (sites, memory), refreshed = run(jax.random.key(0))
    stayed = np.diff(sites["drift"]) == 0
    assert 5 < stayed.sum() < 85
    np.testing.assert_array_equal(np.diff(memory.log_evidence) == 0, stayed)
    np.testing.assert_array_equal((np.diff(sites["x"], axis=0) == 0).all(1), stayed)
    assert float(refreshed.log_evidence) != float(memory.log_evidence[-1])

    covariance = np.asarray(memory.learned.covariance)[:, 0, 0]
    assert np.all(np.diff(covariance)[:30] != 0) and np.all(np.diff(covariance)[30:] == 0)
    assert covariance[0] == pytest.approx(0.01) and covariance[-1] > 0.02


def test_posterior_of_a_linear_gaussian_walk():
    posterior = ppl.infer(PROGRAM, MCMC(KERNEL, 150, 50, num_chains=40))
    means = np.asarray(posterior.value).reshape(40, 150, -1).mean(1)
    assert_mean_within_5_standard_errors(means, walk_exactly()[1])
    assert posterior.guarantee == "invariant" and np.isnan(posterior.log_evidence)


def test_the_learned_covariance_forgets_the_way_in():
    learned = Learned(jnp.full(2, 10.0), jnp.eye(2), jnp.int32(0), jnp.int32(4000))
    states = 0.5 * jax.random.normal(jax.random.key(0), (4000, 2))

    def after(learned, z):
        return learned.after({"z": z}), None

    learned, _ = jax.jit(lambda learned, states: jax.lax.scan(after, learned, states))(learned, states)
    recent = np.average(np.asarray(states), axis=0, weights=np.arange(4000))
    np.testing.assert_allclose(learned.mean, recent, atol=1e-3)
    error = 0.25 * np.sqrt((1 + np.eye(2)) / 3000)  # states that count by 1 .. n are worth 3 n / 4
    assert np.all(np.abs(np.asarray(learned.covariance) - 0.25 * np.eye(2)) < 5 * error)


@ppl.model
def all_kinds():
    kind = ppl.sample("kind", dist.Bernoulli(0.5))
    scale = ppl.sample("scale", dist.LogNormal(0.0, 1.0))

    def step(x, _):
        x = ppl.sample("x", dist.Normal(x + kind, scale))
        return x, x

    return ppl.scan(step, 0.0, length=3, until=lambda x: x > 3.0)[0]


@pytest.mark.parametrize(
    "kernel, error, message",
    [
        (PMMH("kind", SMC(4), scale=1.0), TypeError, "moves continuous sites; 'kind' .* is discrete. Give `proposal`"),
        (PMMH("x", SMC(4), scale=1.0), ValueError, r"`parameters` \['x'\] stand in a loop that may stop"),
        (PMMH("y", SMC(4), scale=1.0), ValueError, "`parameters` names 'y', not a free sample site"),
        (PMMH("scale", SMC(4), scale=(1.0, 2.0)), ValueError, "`scale` has 2 numbers, the parameters have 1"),
        (PMMH("scale", SMC(4)), ValueError, "give `num_warmup` of at least .*, or `scale`, or `proposal`"),
        (
            PMMH("scale", SMC(4), lambda s: {"kind": dist.Bernoulli(0.5)}),
            ValueError,
            r"moves \['kind'\]; it must give a distribution for each of the parameters \['scale'\]",
        ),
    ],
)
def test_programs_that_do_not_fit_are_refused(kernel, error, message):
    with pytest.raises(error, match=message):
        ppl.infer(all_kinds(), MCMC(kernel, 2))


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"smc": 3}, TypeError, "`smc` must be an SMC"),
        ({"smc": SMC(8, annealing=EntropicAnnealing(mode="ess"))}, ValueError, "must be unbiased"),
        ({"smc": SMC(8, resampler=lambda key, w, n: jnp.arange(n))}, ValueError, "conditional form"),
        ({"proposal": 3}, TypeError, "`proposal` must be a function"),
        ({"proposal": flip, "scale": 1.0}, ValueError, "leave one out"),
        ({"scale": -1.0}, ValueError, "`scale` must be positive"),
        ({"scale": "wide"}, TypeError, "`scale` must be a number"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        PMMH(**({"parameters": "drift", "smc": SMC(8)} | settings))


def test_a_program_without_unbiased_weights_is_refused():
    chain = MarkovChain(jnp.zeros(2), jnp.zeros((2, 2)), 3)
    assert prepared_unbiased(SMC(4), chain)[1] == SMC(4)
    with pytest.raises(ValueError, match='must be "unbiased"'):
        prepared_unbiased(SMC(4, corrector="none"), chain)
