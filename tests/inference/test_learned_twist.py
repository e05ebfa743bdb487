"""The learned twist against the best one, which a Markov chain's sums give."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, LearnedTwist
from ppl.models import MarkovChain
from tests.inference.test_targets import log_prob
from tests.ppl.checks import repeat

pytestmark = pytest.mark.optimized

LENGTH, SIZE = 6, 2
PATHS = np.array(list(itertools.product(range(SIZE), repeat=LENGTH)), np.int32)
CHAIN = MarkovChain(jnp.array([0.0, 1.0]), jnp.array([[0.5, 0.0], [-0.5, 1.0]]), LENGTH)
TARGET = CHAIN.tilt(lambda value: -1.5 * jnp.sum(value["tokens"]))  # paid at the end, known long before
REWARD = -1.5 * PATHS.sum(axis=1)


def features(state):
    """The step and the last token, one-hot, and how many ones there are."""
    last = state["tokens"][jnp.maximum(state["length"] - 1, 0)]
    place = (state["length"] - 1) * SIZE + last
    here = jnp.where(state["length"] > 0, jnp.arange(LENGTH * SIZE) == place, False).astype(jnp.float32)
    return jnp.append(here, jnp.sum(state["tokens"]) / 2)


@pytest.fixture(scope="module")
def trained():
    twist = LearnedTwist(LENGTH * SIZE + 1, features=features, hidden_size=32)
    improvements = twist.train(TARGET, num_rounds=4, num_particles=4096, num_updates=150, learning_rate=1e-2)
    assert improvements[0] < -0.05  # what the first round learned, in nats
    return twist


def test_learned_twist_approaches_the_best_one(trained):
    """log psi_t is log E[exp r | x_1:t] up to a constant of the step."""
    log_density = log_prob(CHAIN, PATHS)
    for t in range(1, LENGTH):
        prefixes = np.unique(PATHS[:, :t], axis=0)
        best, found, log_mass = [], [], []
        for prefix in prefixes:
            here = (PATHS[:, :t] == prefix).all(axis=1)
            log_mass.append(np.logaddexp.reduce((log_density + REWARD)[here]))
            best.append(log_mass[-1] - np.logaddexp.reduce(log_density[here]))
            state = {"tokens": jnp.zeros(LENGTH, jnp.int32).at[:t].set(prefix), "length": jnp.int32(t)}
            found.append(float(trained(state)))
        share = np.exp(log_mass - np.logaddexp.reduce(log_mass))
        error = np.array(found) - best
        error -= share @ error
        assert np.sqrt(share @ error**2) < 0.15  # under the target
        assert np.sqrt(share @ (best - share @ best) ** 2) > 0.5  # there is something to learn


def test_learned_twist_lowers_the_variance_and_leaves_the_target(trained):
    exact = np.logaddexp.reduce(log_prob(CHAIN, PATHS) + REWARD)
    spreads = {}
    for name, algorithm in {"plain": SMC(16), "steered": SMC(16, twist=trained)}.items():
        estimates = repeat(TARGET.program(), algorithm, lambda posterior: posterior.log_evidence, 400)
        scaled = np.exp(np.asarray(estimates, np.float64) - exact)
        assert abs(scaled.mean() - 1) < 5 * scaled.std(ddof=1) / np.sqrt(len(scaled))
        spreads[name] = scaled.std()
    assert spreads["steered"] < 0.8 * spreads["plain"]


def test_twist_of_an_algorithm_wants_a_process():
    @ppl.model
    def program():
        ppl.factor("w", 0.0)

    with pytest.raises(TypeError, match="`twist` sees the running state of a process or a target"):
        ppl.infer(program(), SMC(4, twist=lambda state: 0.0))
