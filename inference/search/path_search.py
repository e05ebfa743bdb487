"""Search over paths: back and forth between noise levels, keeping the best paths.

With K steps, N paths and M branches:

    draw N starts and make s steps                                                                                 (1)
    until the last level: take each path M times back to a noisier level, f steps up, with fresh noise;
        make b > f steps down; keep the best N of the N M by the reward of the denoised value                      (2)
    make the steps that are left, and rank by the reward of the finished values                                    (3)

Source: Ma et al. (2025), "Inference-time scaling for diffusion models beyond scaling denoising steps",
arXiv 2501.09732, section 3.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppl.inference.search.run import Found, NoiseSearch, best, found, require_budget
from ppl.inference.search.sampler import Sampler
from ppl.inference.validation import require_count

__all__ = ["PathSearch"]


@dataclasses.dataclass(frozen=True)
class PathSearch(NoiseSearch):
    """Renoise and denoise paths, and keep the best ones.

    Attributes:
        budget: network calls, at least those of one path with its branches.
        num_kept: how many finished values are returned, at most the number of paths.
        num_branches: M, how often a path is renoised.
        start: s, where the search begins, as a share of the steps in (0, 1].
        forward: f, how far a path is taken back towards noise, as a share of the steps, at most `start`.
        backward: b, how far it then comes down again, more than `forward`.
        num_paths: N; None for as many as the budget affords.

    The trace holds rewards of denoised values on the way, which guess at those of finished ones.
    """

    budget: int
    num_kept: int = 1
    num_branches: int = 4
    start: float = 0.5
    forward: float = 0.25
    backward: float = 0.5
    num_paths: int | None = None

    def __post_init__(self):
        for name in ("budget", "num_kept", "num_branches", *(() if self.num_paths is None else ("num_paths",))):
            require_count(name, getattr(self, name))
        for name in ("start", "forward", "backward"):
            share = getattr(self, name)
            if not isinstance(share, numbers.Real) or isinstance(share, bool) or not 0 < share <= 1:
                raise ValueError(f"`{name}` must be a share of the steps in (0, 1], got {share!r}.")
        if self.forward > self.start:
            raise ValueError(f"`forward` must be at most `start`, {self.start:g}, got {self.forward:g}.")
        if self.backward <= self.forward:
            raise ValueError(f"`backward` must be more than `forward`, {self.forward:g}, got {self.backward:g}.")

    def plan(self, sampler: Sampler) -> _Plan:
        """Return the steps of each phase, and how many paths the budget affords."""
        first, back, down = (round(share * sampler.num_steps) for share in (self.start, self.forward, self.backward))
        if not 1 <= back < down or first < back:
            raise ValueError(
                f"of {sampler.num_steps} steps, `start`, `forward` and `backward` are {first}, {back} and {down}: "
                "forward must be at least 1 and at most those of the start, backward more. Take more steps, or larger "
                "shares."
            )
        num_rounds = (sampler.num_steps - first) // (down - back)
        positions = first + (down - back) * np.arange(num_rounds + 1)
        costs = np.concatenate([[0], np.cumsum(sampler.calls[1:])])  # of the first k steps
        renoise = len(sampler.processes)
        rounds = [renoise + costs[p - back + down] - costs[p - back] for p in positions[:-1]]
        phases = np.array([
            sampler.calls[0] + costs[first], *(self.num_branches * cost for cost in rounds),
            costs[-1] - costs[positions[-1]],
        ])  # fmt: skip
        needed = int(phases.sum())
        num_paths = self.budget // needed if self.num_paths is None else self.num_paths
        require_budget(self.budget, needed * max(num_paths, 1), f"{max(num_paths, 1)} path(s) with their branches")
        if self.num_kept > num_paths:
            raise ValueError(f"`num_kept` must be at most the {num_paths} paths, got {self.num_kept}.")
        return _Plan(num_paths, first, back, down, positions, num_paths * np.cumsum(phases))

    def look(self, sampler: Sampler, plan: _Plan, key) -> Found:
        """Search; called under `jit`."""
        noise_key, first_key, round_key, last_key = jax.random.split(key, 4)
        walks = jax.vmap(sampler.start)(sampler.start_noise(noise_key, plan.num_paths))
        walks = sampler.advance(walks, 0, plan.first, first_key)  # (1)
        guesses = jax.vmap(sampler.guess)(walks)

        def one_round(walks, inputs):  # (2)
            position, key = inputs
            noise_key, step_key = jax.random.split(key)
            branches = jax.tree.map(lambda x: jnp.repeat(x, self.num_branches, axis=0), walks)
            z = sampler.start_noise(noise_key, plan.num_paths * self.num_branches)
            noisier = position - plan.back
            branches = jax.vmap(sampler.renoise, (0, 0, None, None))(branches, z, position, noisier)
            branches = sampler.advance(branches, noisier, plan.down, step_key)
            guesses = jax.vmap(sampler.guess)(branches)
            return best(branches, guesses, plan.num_paths)[0], guesses

        positions = jnp.asarray(plan.positions[:-1], jnp.int32)
        walks, later = jax.lax.scan(one_round, walks, (positions, jax.random.split(round_key, len(positions))))
        last = int(plan.positions[-1])
        walks = sampler.advance(walks, last, sampler.num_steps - last, last_key)  # (3)
        generations = jax.vmap(sampler.generation)(walks)
        rewards = jax.vmap(sampler.reward)(generations.value)
        return found(best(generations, rewards, self.num_kept), guesses[None], later, rewards[None])


class _Plan(NamedTuple):
    num_paths: int
    first: int
    back: int
    down: int
    positions: np.ndarray
    calls: np.ndarray
