"""Zero-order search: from noise to better noise, by trying its neighbours.

From a pivot z ~ N(0, I) draw neighbours

    z' = sqrt(1 - radius^2) z + radius xi,    xi ~ N(0, I),                                                        (1)

run the sampler from each, and move the pivot to the best of them where that beats it. (1) leaves N(0, I) as it is, so
that neighbours are as likely as the pivot; they lie at about `radius` standard deviations from it in every dimension,
and at radius 1 the search is `RandomSearch` in rounds.

Source: Ma et al. (2025), "Inference-time scaling for diffusion models beyond scaling denoising steps",
arXiv 2501.09732, section 3, which adds noise without the factor in (1).
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppl.inference.search.run import Found, NoiseSearch, best, found, merge, require_budget
from ppl.inference.search.sampler import Sampler
from ppl.inference.validation import require_count

__all__ = ["ZeroOrderSearch", "require_over"]


@dataclasses.dataclass(frozen=True)
class ZeroOrderSearch(NoiseSearch):
    """Move a pivot noise to the best of its neighbours, round by round.

    Attributes:
        budget: network calls, at least those of one sample. The first sample is the pivot's; what is left after the
            last whole round is not spent.
        num_kept: how many of the values seen are returned.
        num_neighbours: neighbours a round, run side by side.
        radius: how far they are, in (0, 1], in standard deviations of the noise.
        over: "start", the noise that the run starts from, with that of its steps drawn once and held fixed; or "all",
            the steps' noise too. The same at churn 0, where steps draw nothing.
    """

    budget: int
    num_kept: int = 1
    num_neighbours: int = 4
    radius: float = 0.3
    over: str = "start"

    def __post_init__(self):
        for name in ("budget", "num_kept", "num_neighbours"):
            require_count(name, getattr(self, name))
        if not isinstance(self.radius, numbers.Real) or not 0 < self.radius <= 1:
            raise ValueError(f"`radius` must be a number in (0, 1], got {self.radius!r}.")
        require_over(self.over)

    def plan(self, sampler: Sampler) -> _Plan:
        """Return how many rounds the budget affords."""
        cost = int(sampler.calls.sum())
        require_budget(self.budget, cost, "one sample")
        num_rounds = (self.budget // cost - 1) // self.num_neighbours
        num_samples = 1 + num_rounds * self.num_neighbours
        if self.num_kept > num_samples:
            raise ValueError(f"`num_kept` must be at most the {num_samples} samples made, got {self.num_kept}.")
        return _Plan(num_rounds, cost * np.arange(1, num_samples + 1))

    def look(self, sampler: Sampler, plan: _Plan, key) -> Found:
        """Search; called under `jit`."""
        start_key, step_key, round_key = jax.random.split(key, 3)
        pivot = sampler.start_noise(start_key, 1)[0], sampler.step_noise(step_key, sampler.num_steps)
        generation = sampler.run(*pivot)
        reward = sampler.reward(generation.value)
        empty = jax.tree.map(lambda x: jnp.zeros((self.num_kept, *x.shape), x.dtype), generation)
        nothing = empty, jnp.full(self.num_kept, -jnp.inf, reward.dtype)
        kept = merge(nothing, *jax.tree.map(lambda x: x[None], (generation, reward)))

        def one_round(carry, index):
            pivot, reward, kept = carry
            noises = self._neighbours(sampler, pivot, jax.random.fold_in(round_key, index))
            generations = jax.vmap(sampler.run, (0, None if self.over == "start" else 0))(*noises)
            rewards = jax.vmap(sampler.reward)(generations.value)
            nearest, highest = best(noises if self.over == "all" else noises[0], rewards, 1)
            nearest = jax.tree.map(lambda x: x[0], nearest)
            moved = nearest if self.over == "all" else (nearest, pivot[1])
            better = highest[0] > reward
            pivot = jax.tree.map(lambda a, b: jnp.where(better, a, b), moved, pivot)
            return (pivot, jnp.where(better, highest[0], reward), merge(kept, generations, rewards)), rewards

        (_, _, kept), rewards = jax.lax.scan(one_round, (pivot, reward, kept), jnp.arange(plan.num_rounds))
        return found(kept, jnp.concatenate([reward[None], rewards.reshape(-1)]))

    def _neighbours(self, sampler: Sampler, pivot: tuple[Any, Any], key) -> tuple[Any, Any]:
        """Return (1), `[num_neighbours, ...]`; the steps' noise as it is where only the start's is searched."""
        radius = jnp.asarray(self.radius, sampler.dtype)
        start_key, step_key = jax.random.split(key)

        def near(z, key):
            fresh = jax.random.normal(key, (self.num_neighbours, *z.shape), z.dtype)
            return jnp.sqrt(1 - radius**2) * z + radius * fresh

        return near(pivot[0], start_key), pivot[1] if self.over == "start" else near(pivot[1], step_key)


class _Plan(NamedTuple):
    num_rounds: int
    calls: np.ndarray


def require_over(over: Any) -> None:
    """Raise unless it names the noise that is searched."""
    if over not in ("start", "all"):
        raise ValueError(f"`over` must be 'start' or 'all', got {over!r}.")
