"""What searches share: a tilted target, one compiled function, and a posterior of the best values that were found.

The value of a search's posterior holds the `num_kept` values of the highest reward, best first, with equal weights:
they are no sample of any stated distribution, and there is no log-evidence. Twists are not used. `keep` can name the
sites `origin` and `path` that led to the values. Its diagnostics:

    network_calls   how often networks were called; backward passes are not counted
    rewards, calls  the best reward seen so far, and the network calls made by then
    kept_rewards    the rewards of the kept values, best first
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ppl import runners
from ppl.errors import SiteValueError
from ppl.guarantees import Promising
from ppl.inference.search.sampler import SITES, Generation, Sampler
from ppl.inference.validation import refuse_state
from ppl.interpret import Interpreter
from ppl.posterior import Posterior, population_posterior
from ppl.program import Program, Staged, as_program
from ppl.runners import is_traced
from ppl.targets import Combination

__all__ = [
    "Found",
    "NoiseSearch",
    "best",
    "blame",
    "finish",
    "found",
    "merge",
    "require_budget",
    "rewarded_target",
]


class Found(NamedTuple):
    """What a search has found.

    Attributes:
        kept: what was kept, a `Generation` of arrays `[num_kept, ...]`, best first.
        rewards: theirs, `[num_kept]`.
        trace: the best reward seen so far, `[M]`.
        invalid: how many rewards were NaN or +inf.
        killed: how many were -inf.
    """

    kept: Generation
    rewards: Any
    trace: Any
    invalid: Any
    killed: Any


class NoiseSearch(Promising, abc.ABC):
    """A search over the noise of a diffusion target. Algorithms say what it costs, and look."""

    budget: int
    num_kept: int
    guarantee: ClassVar[str] = "heuristic"

    @abc.abstractmethod
    def plan(self, sampler: Sampler) -> Any:
        """Return what is done within the budget, fixed beforehand; its `calls` are those of the trace, int `[M]`.

        Raises:
            ValueError: the budget or the process's steps are too few.
        """

    @abc.abstractmethod
    def look(self, sampler: Sampler, plan: Any, key) -> Found:
        """Search; called under `jit`."""

    def check(self, target: Combination) -> None:
        """Raise if the target's reward is not for this search."""
        del target

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments. No progress is shown."""
        del progress
        program = as_program(program)
        refuse_state(self, state)
        unknown = sorted((keep or frozenset()) - set(SITES))
        if unknown:
            raise SiteValueError(f"`keep` names {unknown}; {type(self).__name__} can store {list(SITES)}.")
        staged, plan = self._staged(program, key, keep or frozenset())
        return finish(self, program, runners.run(staged, "search", _evaluate), plan.calls)

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Repeat a run and count the rewards that were no numbers."""
        return blame(runners.run(self._staged(as_program(program), key)[0], "search", _evaluate))

    def lower(self, program):
        """Return the run that `ppl.infer` would compile, lowered: to read its memory, its constants, its code."""
        staged, _ = self._staged(as_program(program), jax.random.key(0))
        return runners.lower(staged, "search", _evaluate)

    def _staged(self, program: Program, key, keep: frozenset[str] = frozenset()) -> tuple[Staged, Any]:
        target = rewarded_target(self, program)
        for what in ("constraint", "proposal", "steps"):
            if getattr(target, what) is not None:
                raise ValueError(f"{type(self).__name__} cannot search {target!r}: it has a {what} of its own.")
        self.check(target)
        sampler = Sampler(target, keep)
        plan = self.plan(sampler)
        return Program(lambda key: self.look(sampler, plan, key), (key,)).stage(keep_rules=False), plan


def rewarded_target(search: Any, program: Program) -> Combination:
    """Return the target of a program.

    Raises:
        TypeError: it is a model of the user's own, not a process or a target.
        ValueError: it has no reward, or something that a search does not look at.
    """
    name = type(search).__name__
    if program.target is None:
        raise TypeError(f"{name} searches the generations of a process or a target; {program!r} is neither.")
    target = program.target.combination()
    if not target.tilts:
        raise ValueError(f"{name} needs a reward to search for, and {target!r} has none: sampler.tilt(log_reward).")
    if target.potentials:
        raise ValueError(f"{name} ranks finished values by their reward, weigh_steps has no place in it: take tilt.")
    if program.conditions:
        raise ValueError(f"{name} draws every site, {sorted(program.conditions)} of {program!r} are conditioned.")
    return target


def require_budget(budget: int, needed: int, what: str) -> None:
    """Raise unless a budget is at least the network calls that are needed."""
    if budget < needed:
        raise ValueError(f"`budget` must be at least {needed} network calls for {what}, got {budget}.")


def best(values: Any, rewards: Any, num: int) -> tuple[Any, Any]:
    """Return the `num` values of the highest rewards, best first, and the rewards; the first of equals, NaN last."""
    order = jnp.argsort(-_numbers(rewards), stable=True)[:num]
    return jax.tree.map(lambda x: x[order], values), rewards[order]


def merge(kept: tuple[Any, Any], values: Any, rewards: Any) -> tuple[Any, Any]:
    """Return the best of kept values and new ones, as many as were kept."""
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, (values, rewards))
    return best(*joined, kept[1].shape[0])


def found(kept: tuple[Any, Any], *seen: Any) -> Found:
    """Return what was found.

    Args:
        kept: the kept values and their rewards.
        seen: all rewards in the order they were seen, arrays `[m]`, or `[m, n]` of n that were seen at once.
    """
    seen = [rewards[:, None] if rewards.ndim == 1 else rewards for rewards in seen]
    trace = jax.lax.cummax(jnp.concatenate([jnp.max(_numbers(rewards), axis=1) for rewards in seen]))
    invalid = sum(jnp.sum(jnp.isnan(rewards) | (rewards == jnp.inf)) for rewards in seen)
    return Found(*kept, trace, invalid, sum(jnp.sum(rewards == -jnp.inf) for rewards in seen))


def finish(search: Any, program: Program, found: Found, calls: Any, present: dict[str, Any] | None = None) -> Posterior:
    """Return the posterior of what was found.

    Args:
        search: the algorithm.
        program: the target's program.
        found: what it has found.
        calls: network calls made by each entry of the trace.
        present: for each kept site a bool along its time axes, `[num_kept, ...]`; None where all entries are.
    """
    log_weights = jnp.where(found.rewards == -jnp.inf, -jnp.inf, 0.0)
    posterior = population_posterior(
        jnp.where(found.invalid > 0, jnp.nan, log_weights),
        jnp.float32(0.0),
        [],
        value=found.kept.value,
        sites=found.kept.sites,
        present=_all_present(found.kept.sites) if present is None else present,
        guarantee=search.guarantee,
        algorithm=repr(search),
    )
    diagnostics = posterior.diagnostics | {
        "network_calls": calls[-1] if is_traced(calls) else int(calls[-1]),
        "rewards": found.trace,
        "calls": jnp.asarray(calls, jnp.int32),
        "kept_rewards": found.rewards,
    }
    return dataclasses.replace(posterior, diagnostics=diagnostics, decode=program.decode)


def _all_present(sites: dict[str, Any]) -> dict[str, Any]:
    times = {"origin": 1, "path": 2}
    return {name: jnp.ones(values.shape[: times[name]], bool) for name, values in sites.items()}


def blame(found: Found) -> dict[str, dict[str, Any]]:
    """Return the counts of rewards that were no numbers, under the name of the target's factor."""
    return {"reward": {"invalid": found.invalid, "killed": found.killed}}


def _evaluate(staged: Staged, inputs, given, key) -> Found:
    """Run a program without random sites."""
    del key
    result = Interpreter().run(staged.block, inputs, None, given)
    return jax.tree.unflatten(staged.out_tree, [lane.array for lane in result.value])


def _numbers(rewards):
    return jnp.where(jnp.isnan(rewards), -jnp.inf, rewards)
