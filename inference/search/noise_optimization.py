"""Noise optimisation: gradient ascent on the noise that a run starts from.

    maximise over z    r(value(z)) + w [(d - 1) log |z| - |z|^2 / 2]                                               (1)

through the whole sampler, at churn 0 or with the noise of its steps drawn once and held fixed. The second term, with
weight w, is the log-density of the length of z ~ N(0, I) in d dimensions: it keeps |z| at what starts have, about
sqrt(d), whatever the direction.

The gradient keeps the states of the run's steps and makes each step again on the way back (`jax.checkpoint`), so that
the memory is that of K states and one step, not of K steps; each network call of a step is then made twice.

Source: Eyring et al. (2024), "ReNO: enhancing one-step text-to-image models through reward-based noise optimization",
arXiv 2406.04312, section 3; Novack et al. (2024), DITTO, arXiv 2401.12179, for the rematerialised steps.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppl.host import Host
from ppl.inference.search.run import Found, NoiseSearch, best, found, require_budget
from ppl.inference.search.sampler import Sampler
from ppl.inference.search.zero_order import require_over
from ppl.inference.validation import require_count
from ppl.targets import Combination

__all__ = ["NoiseOptimization"]

LEARNING_RATE = 0.1


@dataclasses.dataclass(frozen=True)
class NoiseOptimization(NoiseSearch):
    """Improve noise along the gradient of the reward.

    Attributes:
        budget: network calls, shared by all starts. The last value of each is not differentiated; what is left after
            the last whole update is not spent.
        num_kept: how many values are returned, of different starts, each the best that its start has led to. The noise
            that was found is their site `origin`, for `keep=["origin"]`.
        num_starts: noises that are improved side by side, at least `num_kept`.
        optimiser: an optax transformation; None is Adam with learning rate 0.1.
        regulariser: w of (1), 0 or more.
        over: "start", the noise that the run starts from; or "all", the steps' noise too, d in (1) then counts both.
            The same at churn 0, where steps draw nothing.
        rematerialise: False keeps all that the steps compute for the gradient: more memory, fewer network calls.
    """

    budget: int
    num_kept: int = 1
    num_starts: int = 1
    optimiser: optax.GradientTransformation | None = None
    regulariser: float = 0.0
    over: str = "start"
    rematerialise: bool = True

    def __post_init__(self):
        for name in ("budget", "num_kept", "num_starts"):
            require_count(name, getattr(self, name))
        if self.num_kept > self.num_starts:
            raise ValueError(f"`num_kept` must be at most `num_starts`, {self.num_starts}, got {self.num_kept}.")
        if self.optimiser is not None and not isinstance(self.optimiser, optax.GradientTransformation):
            raise TypeError(f"`optimiser` must be an optax transformation or None, got {self.optimiser!r}.")
        if not isinstance(self.regulariser, numbers.Real) or not 0 <= self.regulariser < float("inf"):
            raise ValueError(f"`regulariser` must be a finite number of at least 0, got {self.regulariser!r}.")
        require_over(self.over)
        if not isinstance(self.rematerialise, bool):
            raise TypeError(f"`rematerialise` must be True or False, got {self.rematerialise!r}.")

    def check(self, target: Combination) -> None:
        """Refuse rewards without a gradient."""
        for tilt in target.tilts:
            if isinstance(tilt.log_reward, Host):
                raise TypeError(
                    "NoiseOptimization needs the reward's gradient, and ppl.host functions have none: give a JAX "
                    "function, or take RandomSearch, ZeroOrderSearch, PathSearch or RolloverSearch."
                )

    def plan(self, sampler: Sampler) -> _Plan:
        """Return how many updates the budget affords."""
        forward = int(sampler.calls.sum())
        gradient = forward + int(sampler.calls[1:].sum()) * self.rematerialise
        require_budget(self.budget, self.num_starts * forward, f"one sample of {self.num_starts} start(s)")
        num_updates = (self.budget // self.num_starts - forward) // gradient
        calls = gradient * np.arange(1, num_updates + 1)
        self._check_gradient(sampler)
        return _Plan(num_updates, self.num_starts * np.append(calls, gradient * num_updates + forward))

    def look(self, sampler: Sampler, plan: _Plan, key) -> Found:
        """Search; called under `jit`."""
        start_key, step_key = jax.random.split(key)
        noise = sampler.start_noise(start_key, self.num_starts)
        steps = jax.vmap(lambda key: sampler.step_noise(key, sampler.num_steps))(
            jax.random.split(step_key, self.num_starts)
        )
        optimiser = optax.adam(LEARNING_RATE) if self.optimiser is None else self.optimiser
        searched = (noise, steps) if self.over == "all" else (noise,)
        fixed = () if self.over == "all" else (steps,)

        def update(carry, _):
            searched, state, kept = carry
            objective = jax.value_and_grad(lambda s, f: self.objective(sampler, (*s, *f)), has_aux=True)
            (_, (generations, rewards)), gradients = jax.vmap(objective)(searched, fixed)
            ascent = jax.tree.map(jnp.negative, gradients)
            change, state = jax.vmap(optimiser.update)(ascent, state, searched)
            return (optax.apply_updates(searched, change), state, _better(kept, generations, rewards)), rewards

        outcome = jax.eval_shape(jax.vmap(lambda z, s: self.objective(sampler, (z, s))[1]), noise, steps)
        generations, rewards = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outcome)
        kept = generations, jnp.full_like(rewards, -jnp.inf)
        carry = searched, jax.vmap(optimiser.init)(searched), kept
        (searched, _, kept), seen = jax.lax.scan(update, carry, length=plan.num_updates)
        generations = jax.vmap(sampler.run)(*searched, *fixed)
        rewards = jax.vmap(sampler.reward)(generations.value)
        kept = _better(kept, generations, rewards)
        return found(best(*kept, self.num_kept), seen, rewards[None])

    def objective(self, sampler: Sampler, noise: tuple[Any, Any]) -> tuple[Any, tuple[Any, Any]]:
        """Return (1) for one particle's noise, and with it what it generates and the reward."""
        generation = sampler.run(*noise, rematerialise=self.rematerialise)
        reward = sampler.reward(generation.value)
        if not self.regulariser:
            return reward, (generation, reward)
        both = self.over == "all" and sampler.draws_steps
        squared = jnp.sum(noise[0] ** 2) + (jnp.sum(noise[1] ** 2) if both else 0.0)
        size = noise[0].size + (noise[1].size if both else 0)
        length = 0.5 * ((size - 1) * jnp.log(squared) - squared)
        return reward + jnp.asarray(self.regulariser, reward.dtype) * length, (generation, reward)

    def _check_gradient(self, sampler: Sampler) -> None:
        """Refuse rewards of whole numbers: their gradient is 0."""
        value = jax.eval_shape(
            sampler.run, jnp.zeros(sampler.shape, sampler.dtype),
            jnp.zeros((sampler.num_steps, *sampler.step_shape), sampler.dtype),
        ).value  # fmt: skip
        for tilt in sampler.target.tilts:
            result = jax.eval_shape(lambda x, reward=tilt.log_reward: jnp.asarray(reward(x)), value)
            if not jnp.issubdtype(result.dtype, jnp.floating):
                raise TypeError(
                    f"NoiseOptimization needs the reward's gradient; a reward of type {result.dtype} has none."
                )


class _Plan(NamedTuple):
    num_updates: int
    calls: np.ndarray


def _better(kept: tuple[Any, Any], generations: Any, rewards: Any) -> tuple[Any, Any]:
    """Return for each start the better one of what was kept and what was found."""
    improves = rewards > kept[1]

    def choose(new, old):
        return jnp.where(improves.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, (generations, rewards), kept)
