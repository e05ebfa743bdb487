"""The checkers find what is wrong, and pass what is right."""

import jax.numpy as jnp
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC
from ppl.kernels import resampling
from ppl.testing.proper_weighting import assert_properly_weighted

TRANSITION = jnp.array([[0.7, 0.3], [0.2, 0.8]])
EMISSION = jnp.array([[0.9, 0.1], [0.4, 0.6]])


@ppl.model
def hidden_markov(observations, proposal=None):
    """Two steps of a hidden Markov chain with a latent that is drawn before the loop and used within."""
    bias = ppl.sample("bias", dist.Bernoulli(0.75))

    def step(state, y):
        probs = jnp.where(bias == 1, TRANSITION[state], TRANSITION[state][::-1])
        proposed = None if proposal is None else dist.Categorical(probs=jnp.array(proposal))
        state = ppl.sample("x", dist.Categorical(probs=probs), proposal=proposed)
        ppl.observe("y", dist.Categorical(probs=EMISSION[state]), y)
        return state, state

    _, path = ppl.scan(step, jnp.int32(0), observations)
    return {"bias": bias, "path": path}


DATA = jnp.array([0, 1])


@pytest.mark.parametrize("scheme", [*resampling.RESAMPLERS, "birth_death"])
def test_smc_is_properly_weighted_with_every_scheme(scheme):
    assert_properly_weighted(hidden_markov(DATA), SMC(2, resampler=scheme, ess_threshold=0.9))
