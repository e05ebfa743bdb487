"""Programs of models that stand in a module, traces, posteriors and states go through pickle."""

import pickle

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import ppl
from ppl.inference import MCMC, SMC, Regenerate
from ppl.models import MarkovChain
from tests.ppl.checks import assert_equal


@ppl.model
def walk(observations, scale=1.0):
    drift = ppl.sample("drift", dist.Normal(0.0, scale))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + drift, 1.0))
        ppl.observe("y", dist.Normal(x, 0.5), y)
        return x, x

    return {"drift": drift, "path": ppl.scan(step, 0.0, observations)[1]}


def ones(values):
    return 0.5 * np.sum(values["tokens"] == 1, axis=1)


def again(value):
    return pickle.loads(pickle.dumps(value))


def test_programs_algorithms_and_results_are_the_same_afterwards():
    program, algorithm = walk(jnp.array([0.3, 0.9])), SMC(4)
    held = ppl.condition(program, {"drift": 0.5})
    posterior = ppl.infer(program, algorithm, seed=1)
    assert_equal(ppl.infer(again(program), again(algorithm), seed=1).value, posterior.value)
    assert repr(again(posterior)) == repr(posterior)
    assert_equal(again(posterior).resample(2).sites["x"], posterior.resample(2).sites["x"])
    assert_equal(ppl.simulate(again(held)).sites, ppl.simulate(held).sites)
    assert_equal(again(ppl.simulate(held)).value, ppl.simulate(held).value)


def test_chains_go_on_from_a_state_that_was_stored():
    program, chains = walk(jnp.array([0.3, 0.9])), MCMC(Regenerate(), num_samples=2, num_chains=2)
    state = ppl.infer(program, chains).state
    assert_equal(ppl.infer(program, chains, state=again(state)).value, ppl.infer(program, chains, state=state).value)


def test_targets_with_host_functions_of_a_module_are_pickled():
    target = MarkovChain(jnp.zeros(3), jnp.zeros((3, 3)), 4).tilt(ppl.host(ones))
    found = ppl.infer(again(target), SMC(4), seed=3)
    assert_equal(found.log_weights, ppl.infer(target, SMC(4), seed=3).log_weights)
