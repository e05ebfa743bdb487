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
def remembering(observations, power=1.0):
    """A latent before the loop, a count that the state carries on, a statement after the loop, a proposal."""
    bias = ppl.sample("bias", dist.Bernoulli(0.3))

    def step(state, y):
        probs = jnp.where(bias == 1, TRANSITION[state["x"]], TRANSITION[state["x"]][::-1])
        proposal = dist.Categorical(probs=jnp.array([0.4, 0.6]))
        x = ppl.sample("x", dist.Categorical(probs=probs), proposal=proposal)
        ppl.factor("y", power * jnp.log(EMISSION[x, y]) * (1 + state["count"]))
        return {"x": x, "count": state["count"] + x}, x

    last, path = ppl.scan(step, {"x": jnp.int32(0), "count": jnp.int32(0)}, observations)
    ppl.factor("after", power * jnp.where(bias == last["x"], 0.5, -0.25))
    return path


@ppl.model
def stopping():
    """A loop that a trace leaves when it draws a 1."""

    def step(stop, _):
        x = ppl.sample("x", dist.Bernoulli(0.4))
        ppl.factor("w", jnp.where(x == 1, 0.7, -0.3))
        return x == 1, x

    return ppl.scan(step, jnp.array(False), length=2, until=lambda stop: stop)[1]
