"""Rollover budget forcing: steps that were lucky early leave their network calls to the steps after them.

    draw S starts, keep the one of the highest reward at the denoised value, r*                                    (1)
    each step has the quota q + what is left over from the step before, with q = floor((budget - S) / (K - 1)):
        draw a proposal of the step and denoise it, one network call, with reward r
        r > r*:  r* <- r, accept the proposal, and the rest of the quota rolls over                                (2)
        the quota is used up: take the step's best proposal; r* stays                                              (3)
    The last step that calls the network spends all that is left, and its best proposal is taken.                  (4)

The step to the finished value calls no network; it is drawn once. Proposals need steps with noise: churn above 0.

Source: Kim et al. (2025), "Inference-time scaling for flow models via stochastic generation and rollover budget
forcing", arXiv 2503.19385, section 5.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppl.inference.search.run import Found, NoiseSearch, best, found, require_budget
from ppl.inference.search.sampler import Sampler
from ppl.inference.validation import require_count

__all__ = ["RolloverSearch"]


@dataclasses.dataclass(frozen=True)
class RolloverSearch(NoiseSearch):
    """Force a budget on the steps of one generation, and roll over what a step does not need.

    Attributes:
        budget: network calls.
        num_kept: how many generations share the budget, one after the other; their values are returned best first.
        num_starts: S of (1); None for a twentieth of a generation's calls, at least 1.

    The trace holds rewards of denoised values on the way, which guess at those of finished ones.
    """

    budget: int
    num_kept: int = 1
    num_starts: int | None = None

    def __post_init__(self):
        for name in ("budget", "num_kept", *(() if self.num_starts is None else ("num_starts",))):
            require_count(name, getattr(self, name))

    def plan(self, sampler: Sampler) -> _Plan:
        """Return the quotas."""
        if not sampler.draws_steps:
            raise ValueError(f"RolloverSearch needs steps that draw noise, {sampler.processes[0]!r} has churn 0.")
        calls, steps = len(sampler.processes), sampler.num_steps - 1
        share = self.budget // self.num_kept
        num_starts = max(share // (20 * calls), 1) if self.num_starts is None else self.num_starts
        needed = self.num_kept * calls * (num_starts + steps)
        require_budget(self.budget, needed, f"{num_starts} start(s) and one proposal a step of {self.num_kept} run(s)")
        num_proposals = share // calls - num_starts if steps else 0
        seen = self.num_kept * (num_starts + num_proposals)
        return _Plan(num_starts, num_proposals, num_proposals // max(steps, 1), calls * np.arange(1, seen + 1))

    def look(self, sampler: Sampler, plan: _Plan, key) -> Found:
        """Search; called under `jit`."""
        keys = jax.random.split(key, self.num_kept)
        generations, rewards, seen = jax.lax.map(lambda key: self._generate(sampler, plan, key), keys)
        result = found(best(generations, rewards, self.num_kept), seen.reshape(-1))
        invalid = jnp.sum(jnp.isnan(rewards) | (rewards == jnp.inf))
        return result._replace(invalid=result.invalid + invalid)

    def _generate(self, sampler: Sampler, plan: _Plan, key) -> tuple[Any, Any, Any]:
        """Return a generation, its reward, and the rewards of all denoised values `[S + proposals]`."""
        start_key, proposal_key, last_key = jax.random.split(key, 3)
        starts = jax.vmap(sampler.start)(sampler.start_noise(start_key, plan.num_starts))
        rewards = jax.vmap(sampler.guess)(starts)
        walk, highest = jax.tree.map(lambda x: x[0], best(starts, rewards, 1))  # (1)
        empty = jnp.zeros(plan.num_proposals, rewards.dtype)
        run = _Run(walk, highest, jnp.int32(0), jnp.int32(plan.quota), jnp.int32(0), walk, highest, jnp.int32(0), empty)

        def propose(run: _Run) -> _Run:
            z = sampler.step_noise(jax.random.fold_in(proposal_key, run.total), 1)[0]
            proposal = sampler.step(run.walk, z, run.step)
            reward = sampler.guess(proposal)
            better = (run.used == 0) | (reward > run.candidate_reward)
            candidate = _choose(better, proposal, run.candidate)
            used, last = run.used + 1, run.step == sampler.num_steps - 2
            accept = reward > run.highest
            done = (accept | (used >= run.quota)) & ~last  # (2), (3): an accepted one is the best so far
            left = jnp.where(accept, run.quota - used, 0)
            return _Run(
                walk=_choose(done, candidate, run.walk),
                highest=jnp.where(accept, reward, run.highest),
                step=run.step + done,
                quota=jnp.where(done, plan.quota + left, run.quota),
                used=jnp.where(done, 0, used),
                candidate=candidate,
                candidate_reward=jnp.where(better, reward, run.candidate_reward),
                total=run.total + 1,
                seen=run.seen.at[run.total].set(reward),
            )

        if plan.num_proposals:
            run = jax.lax.while_loop(lambda run: run.total < plan.num_proposals, propose, run)  # (4)
        z = sampler.step_noise(last_key, 1)[0]
        generation = sampler.generation(sampler.step(run.candidate, z, jnp.int32(sampler.num_steps - 1)))
        return generation, sampler.reward(generation.value), jnp.concatenate([rewards, run.seen])


class _Plan(NamedTuple):
    num_starts: int
    num_proposals: int
    quota: int
    calls: np.ndarray


class _Run(NamedTuple):
    """One generation under way: its walk before a step, what the step has seen, and the calls it may still make."""

    walk: Any
    highest: Any
    step: Any
    quota: Any
    used: Any
    candidate: Any
    candidate_reward: Any
    total: Any
    seen: Any


def _choose(condition, yes, no):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
