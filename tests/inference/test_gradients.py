"""Derivatives of SMC's evidence: unbiased through resampling, on a linear-Gaussian model with Kalman's answer."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, EntropicAnnealing
from ppl.kernels.resampling.gradient import children_log_weights

OBSERVATIONS = jnp.array([0.4, 1.1, 0.9, 1.7])


@ppl.model
def walk(decay, scale, observations):
    def step(x, y):
        x = ppl.sample("x", dist.Normal(decay * x, 1.0))
        ppl.observe("y", dist.Normal(x, scale), y)
        return x, None

    ppl.scan(step, 0.5, observations)


def evidence(decay, scale):
    """Return Z by Kalman's recursion."""
    mean, variance, total = 0.5, 0.0, 0.0
    for y in OBSERVATIONS:
        mean, variance = decay * mean, decay**2 * variance + 1.0
        spread = variance + scale**2
        total += -0.5 * (jnp.log(2 * jnp.pi * spread) + (y - mean) ** 2 / spread)
        gain = variance / spread
        mean, variance = mean + gain * (y - mean), variance * (1 - gain)
    return jnp.exp(total)


@pytest.mark.parametrize(
    "settings",
    [
        {"ess_threshold": 1.0},
        {"ess_threshold": 0.7},
        {"ess_threshold": 1.0, "annealing": EntropicAnnealing(ess=0.8)},
    ],
    ids=["every step", "adaptive", "annealed"],
)
def test_gradient_of_the_evidence_is_unbiased_through_resampling(settings):
    def estimate(parameters, key):
        posterior = ppl.infer(walk(*parameters, OBSERVATIONS), SMC(8, **settings), key=key)
        return jnp.exp(posterior.log_evidence)

    parameters = (jnp.float32(0.8), jnp.float32(0.6))
    keys = jax.random.split(jax.random.key(0), 40_000)
    gradients = jax.jit(jax.vmap(jax.grad(estimate), (None, 0)))(parameters, keys)
    exact = jax.grad(lambda p: evidence(*p))(parameters)
    for found, expected in zip(gradients, exact, strict=True):
        found = np.asarray(found, np.float64)
        assert abs(found.mean() - float(expected)) < 5 * found.std() / np.sqrt(len(found))


def test_children_weigh_nothing_and_remember_their_ancestor():
    log_weights, ancestors = jnp.array([0.3, -2.0, -jnp.inf]), jnp.array([1, 0, 1], jnp.int32)
    value, tangent = jax.jvp(lambda w: children_log_weights(w, ancestors), (log_weights,), (jnp.arange(3.0),))
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(tangent, [1.0, 0.0, 1.0])
