"""A twist that is learned: a small network that guesses the log-reward of what has been written so far.

With base process p, target sigma proportional to p exp(r), and pi_t(x_1:t) proportional to p(x_1:t) psi_t(x_1:t), the
contrastive objective is sum_t KL(sigma(x_1:t) || pi_t), whose gradient is

    (1)  - sum_t ( E_sigma[grad log psi_t] - E_pi_t[grad log psi_t] ).

Up to a constant it is sum_t ( log E_p[psi_t] - E_sigma[log psi_t] ). Its minimum is psi_t proportional to
E_p[exp r | x_1:t], the twist under which no step has any variance. Expectations under sigma come from the particles of
SMC on the target, steered by the twist as it is, those under p from runs of p. Both are consistent in the number of
particles; the twist may be as bad as it likes, since what it adds on the way is taken out at the end.

Source: Zhao, Brekelmans, Makhzani and Grosse (2024), "Probabilistic inference in language models via twisted sequential
Monte Carlo", section 4.1 (contrastive twist learning), arXiv 2404.17546.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from ppl.infer import infer
from ppl.inference.smc import SMC
from ppl.posterior import Posterior
from ppl.targets import Target

__all__ = ["LearnedTwist"]

_SITE = "features of the twist"


class LearnedTwist:
    """A twist for `SMC(twist=...)` or `tilt(..., twist=...)`: features of the running state, one hidden layer.

    It starts as 0, a twist that does nothing.
    """

    def __init__(
        self, width: int, *, features: Callable[[Any], Array] | None = None, hidden_size: int = 64, seed: int = 0
    ):
        """Build the network.

        Args:
            width: how many features there are; for a language model its `config.hidden_size`.
            features: maps one particle's running state to an array of shape (width,). By default a language model's
                last hidden state, `state["hidden"]`.
            hidden_size: units of the hidden layer.
            seed: of the first layer's weights.
        """
        self.features = _last_hidden if features is None else features
        rngs = nnx.Rngs(seed)
        zeros = nnx.initializers.zeros
        network = nnx.Sequential(
            nnx.Linear(width, hidden_size, rngs=rngs),
            _activation,
            nnx.Linear(hidden_size, 1, kernel_init=zeros, rngs=rngs),
        )
        self._graph, self.weights = nnx.split(network)

    def __call__(self, state: Any) -> Float[Array, ""]:
        """Return log psi of one particle's running state, nats."""
        return self.value(self.weights, jnp.asarray(self.features(state), jnp.float32))

    def value(self, weights: Any, features: Float[Array, "*batch width"]) -> Float[Array, "*batch"]:
        """Return log psi for given weights and features."""
        return nnx.merge(self._graph, weights)(features)[..., 0]

    def train(
        self,
        target: Target,
        *,
        num_rounds: int = 4,
        num_particles: int = 128,
        num_updates: int = 100,
        learning_rate: float = 3e-3,
        seed: int = 0,
    ) -> list[float]:
        """Learn from runs on a target; the weights change in place.

        Args:
            target: a process tilted or constrained. Its first process, alone, is the base p of (1).
            num_rounds: how often both sides are run anew, the target's steered by what was learned.
            num_particles: particles of each run.
            num_updates: steps of Adam on the particles of a round.
            learning_rate: of Adam.
            seed: of the runs.

        Returns:
            For each round by how much the objective fell on its particles, nats a step, negative where it did.
        """
        base = target.combination().process
        optimiser = optax.adam(learning_rate)
        update = _updater(self, optimiser, num_updates)
        improvements = []
        for key in jax.random.split(jax.random.key(seed), num_rounds):
            target_key, base_key = jax.random.split(key)
            algorithm = SMC(num_particles, twist=self)
            wanted = infer(target.watch(_SITE, self.features), algorithm, key=target_key)
            free = infer(base.watch(_SITE, self.features), SMC(num_particles, ess_threshold=0.0), key=base_key)
            state = optimiser.init(self.weights)
            self.weights, losses = update(self.weights, state, _prefixes(wanted), _prefixes(free))
            improvements.append(float(losses[-1] - losses[0]))
        return improvements


def _prefixes(posterior: Posterior) -> tuple[Array, Array, Array]:
    """Return features `[N, T, width]`, which of them are of a step that was made, and the particles' weights."""
    features = jnp.asarray(posterior.sites[_SITE], jnp.float32)
    return features, jnp.asarray(np.asarray(posterior.present[_SITE])), posterior.weights


def _updater(twist: LearnedTwist, optimiser: optax.GradientTransformation, num_updates: int) -> Callable:
    """Return the compiled updates of one round."""

    def loss(weights, wanted, free):
        log_psi, shares, seen = _by_step(twist, weights, *wanted)
        rewarded = jnp.sum(jnp.where(shares > 0, shares * log_psi, 0.0), axis=0)  # E_sigma[log psi_t]
        log_psi, shares, met = _by_step(twist, weights, *free)
        log_mean = jax.nn.logsumexp(log_psi, axis=0, b=jnp.where(met, shares, 1.0))  # log E_p[psi_t]
        return jnp.mean(jnp.where(seen & met, log_mean - rewarded, 0.0))

    @jax.jit
    def run(weights, state, wanted, free):
        def step(carry, _):
            weights, state = carry
            value, gradient = jax.value_and_grad(loss)(weights, wanted, free)
            change, state = optimiser.update(gradient, state, weights)
            return (optax.apply_updates(weights, change), state), value

        (weights, _), losses = jax.lax.scan(step, (weights, state), length=num_updates)
        return weights, losses

    return run


def _by_step(twist: LearnedTwist, weights: Any, features: Array, present: Array, particles: Array):
    """Return log psi `[N, T]`, the particles' shares of each step `[N, T]`, and whether anyone makes it `[T]`.

    Who has ended says nothing about the steps after.
    """
    shares = jnp.where(present, particles[:, None], 0.0)
    total = jnp.sum(shares, axis=0)
    return twist.value(weights, features), shares / jnp.where(total > 0, total, 1.0), total > 0


def _last_hidden(state: Any) -> Array:
    return state["hidden"]


def _activation(x: Array) -> Array:
    return jax.nn.silu(x)  # under a name of its own: `jax.nn.silu` itself does not pickle
