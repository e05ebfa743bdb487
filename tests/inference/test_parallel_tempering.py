"""Parallel tempering: swaps leave the product of the tempered measures as it is; modes far apart are both found."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import MCMC, MH, ParallelTempering, Regenerate, Sequence, TemperedSMC
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.testing import assert_invariant, enumerate_runs
from ppl.trace_space import TraceSpace
from tests.ppl.checks import assert_equal, assert_mean_within_5_standard_errors

WEIGHTS = np.array([0.7, -0.4, -1.1])
PRIOR = np.array([0.2, 0.5, 0.3])


@ppl.model
def three():
    x = ppl.sample("x", dist.Categorical(probs=jnp.asarray(PRIOR, jnp.float32)))
    ppl.factor("w", jnp.asarray(WEIGHTS, jnp.float32)[x])
    return x


@dataclasses.dataclass(frozen=True)
class Still(TraceKernel):
    """A kernel that moves nothing. It remembers at which power it was bound, and counts what happens to it."""

    def bind(self, space):
        return _Still(space)


class _Still(Moves):
    sites = ("x",)

    def __init__(self, space):
        self.space = space

    def init(self, key, sites, num_warmup):
        return {"power": jnp.asarray(self.space.power), "steps": jnp.int32(0), "refreshed": jnp.int32(0)}

    def step(self, key, sites, memory):
        return dict(sites), memory | {"steps": memory["steps"] + 1}, {"acceptance": jnp.float32(0.0)}

    def refresh(self, key, sites, memory):
        return memory | {"refreshed": memory["refreshed"] + 1}


@pytest.mark.parametrize("iteration", [0, 1])
@pytest.mark.parametrize(
    "kernel, temperatures", [(Still(), (1.0, 1.5, 4.0)), (Regenerate(), (1.0, 2.5))], ids=["swaps alone", "moves"]
)
def test_a_step_leaves_the_product_measure_as_it_is(kernel, temperatures, iteration):
    tempering = ParallelTempering(kernel, temperatures)

    def step(key, replicas):
        moves = tempering.bind(TraceSpace(three().stage()))
        init_key, step_key = jax.random.split(key)
        memory = moves.init(init_key, {"x": replicas[0]}, 0)
        known = moves.over(lambda beta, x: moves.at(beta).init(init_key, {"x": x}, 0), moves.betas, replicas)
        memory = memory._replace(hot={"x": replicas[1:]}, memory=known, iteration=jnp.int32(iteration))
        sites, memory, _ = moves.step(step_key, {"x": replicas[0]}, memory)
        return jnp.append(sites["x"], memory.hot["x"])

    states = np.array(list(itertools.product(range(3), repeat=len(temperatures))), np.int32)
    key = jax.random.key(0)
    runs = enumerate_runs(step, key, states[0])
    matrix = np.zeros((len(states), len(states)))
    for i, state in enumerate(states):
        for probability, after in runs(key, state):
            matrix[i, np.flatnonzero((states == after).all(1))[0]] += probability
    log_measure = sum(
        np.log(PRIOR)[states[:, r]] + WEIGHTS[states[:, r]] / temperature for r, temperature in enumerate(temperatures)
    )
    pi = np.exp(log_measure) / np.exp(log_measure).sum()
    np.testing.assert_allclose(pi @ matrix, pi, atol=1e-6)
    moved = 1 - np.diag(matrix)
    assert moved.max() > 0.1


def test_pairs_take_turns_and_what_is_learned_stays_at_its_temperature():
    temperatures = (1.0, 2.0, 4.0, 8.0)
    moves = ParallelTempering(Still(), temperatures).bind(TraceSpace(three().stage()))
    hot = jnp.array([0, 2, 0], jnp.int32)
    cold = {"x": jnp.int32(2)}  # the first and the last pair swap for certain: the hotter trace is the likelier one
    memory = moves.init(jax.random.key(0), cold, 0)._replace(hot={"x": hot})
    sites, memory, info = moves.step(jax.random.key(1), cold, memory)
    assert int(sites["x"]) == 0 and memory.hot["x"].tolist() == [2, 0, 2]
    assert memory.memory["refreshed"].tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(memory.memory["power"], 1 / np.array(temperatures))
    betas, before = 1 / np.array(temperatures), WEIGHTS[[2, 0, 2, 0]]
    expected = np.exp(np.minimum((betas[:-1] - betas[1:]) * np.diff(before), 0))
    np.testing.assert_allclose(info["swap_acceptance"], expected, rtol=1e-5)

    sites, memory, _ = moves.step(jax.random.key(2), sites, memory)  # only the middle pair may, and is the likelier
    assert int(sites["x"]) == 0 and memory.hot["x"].tolist() == [0, 2, 2]
    assert memory.memory["refreshed"].tolist() == [1, 2, 2, 1]
    assert memory.memory["steps"].tolist() == [2, 2, 2, 2]

    refreshed = moves.refresh(jax.random.key(3), sites, memory)
    assert refreshed.memory["refreshed"].tolist() == [2, 2, 2, 1]
    assert_equal(refreshed.hot, memory.hot)


@ppl.model
def two_modes():
    x = ppl.sample("x", dist.Normal(0.0, 5.0))
    lower, upper = dist.Normal(-4.0, 0.3).log_prob(x), dist.Normal(4.0, 0.3).log_prob(x)
    ppl.factor("data", jnp.logaddexp(lower, upper + 1.0))
    return x


WALK = MH(lambda sites: {"x": dist.Normal(sites["x"], 0.7)})


def test_both_modes_are_visited_as_often_as_they_are_likely():
    algorithm = MCMC(ParallelTempering(WALK, (1.0, 4.0, 16.0, 64.0)), 1000, 200, num_chains=24)
    posterior = ppl.infer(two_modes(), algorithm)
    above = np.asarray(posterior.value).reshape(24, 1000) > 0
    assert_mean_within_5_standard_errors(above.mean(1), np.e / (1 + np.e))
    assert np.all(above.mean(1) < 1) and np.all(above.mean(1) > 0)
    rates = np.asarray(posterior.diagnostics["swap_acceptance"])
    assert rates.shape == (24, 1000, 3) and np.all(rates.mean((0, 1)) > 0.2)
    assert posterior.guarantee == "invariant"


@pytest.mark.parametrize("temperatures", [(2.0, 4.0), (1.0,), (1.0, 3.0, 2.0), (1.0, 1.0)])
def test_temperatures_must_start_with_1_and_increase(temperatures):
    with pytest.raises(ValueError, match="`temperatures` must start with 1.0 and increase"):
        ParallelTempering(WALK, temperatures)


def test_refusals_name_what_is_wrong():
    with pytest.raises(TypeError, match="`kernel` must be a kernel on traces"):
        ParallelTempering(MCMC, (1.0, 2.0))
    with pytest.raises(TypeError, match="`temperatures` must be a sequence of finite numbers"):
        ParallelTempering(WALK, (1.0, "hot"))
    with pytest.raises(ppl.errors.SiteValueError, match="'nothing', no observation or factor"):
        ppl.infer(two_modes(), MCMC(ParallelTempering(WALK, (1.0, 2.0), sites="nothing"), 1))
    with pytest.raises(ValueError, match="carries replicas along"):
        TemperedSMC(8, ParallelTempering(WALK, (1.0, 2.0)))
        TemperedSMC(8, Sequence(WALK, ParallelTempering(WALK, (1.0, 2.0))))


def test_replicas_that_start_as_copies_leave_the_measure_as_it_is_only_in_the_long_run():
    with pytest.raises(AssertionError, match="does not leave the posterior"):
        assert_invariant(three(), ParallelTempering(Regenerate(), (1.0, 2.5)))
