"""Small programs of finitely many traces, for exact checks."""

import jax.numpy as jnp
import numpyro.distributions as dist

import ppl

TRANSITION = jnp.array([[0.7, 0.3], [0.2, 0.8]])
EMISSION = jnp.array([[0.9, 0.1], [0.4, 0.6]])


@ppl.model
def hidden_markov(observations):
    """One iteration tells how likely a future is."""

    def step(state, y):
        state = ppl.sample("x", dist.Categorical(probs=TRANSITION[state]))
        ppl.factor("y", jnp.log(EMISSION[state, y]))
        return state, state

    return ppl.scan(step, jnp.int32(0), observations)[1]


@ppl.model
def stopping():
    """A loop that a trace leaves when it draws a 1."""

    def step(stop, _):
        x = ppl.sample("x", dist.Bernoulli(0.4))
        ppl.factor("w", jnp.where(x == 1, 0.7, -0.3))
        return x == 1, x

    return ppl.scan(step, jnp.array(False), length=2, until=lambda stop: stop)[1]
