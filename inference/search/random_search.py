"""Random search: the best of n independent generations.

    x_1 .. x_n ~ the target without its reward,    value = argmax_i r(x_i)                                         (1)

It works for every process, of text too, and is what other searches are to be compared with at the same budget. Batch b
of the draws is that of `ImportanceSampling` at the key `jax.random.fold_in(key, b)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ppl import runners
from ppl.guarantees import Promising
from ppl.inference.population import OnlyWeigh
from ppl.inference.search.run import Found, best, blame, finish, found, require_budget, rewarded_target
from ppl.inference.search.sampler import Generation, log_reward, step_calls, unweighted
from ppl.inference.validation import refuse_state, require_count
from ppl.interpret import Interpreter
from ppl.lanes import Lane
from ppl.posterior import Posterior
from ppl.process import Process
from ppl.program import Program, Staged, as_program, kept_sites
from ppl.targets import Combination
from ppl.trace import along_times

__all__ = ["RandomSearch"]


@dataclasses.dataclass(frozen=True)
class RandomSearch(Promising):
    """Return the best of as many generations as a budget affords.

    Attributes:
        budget: network calls, at least those of one generation; what is left after the last one is not spent. For
            processes that do not say how often they call a network, such as text, it counts one call a step, and
            affords as many generations as if none ended early. The calls that are reported are those that were made:
            a batch goes on until all of its generations have ended.
        num_kept: how many of the generations are returned.
        batch_size: how many are made side by side; None for all of them.
    """

    budget: int
    num_kept: int = 1
    batch_size: int | None = None
    guarantee: ClassVar[str] = "heuristic"

    def __post_init__(self):
        for name in ("budget", "num_kept", *(() if self.batch_size is None else ("batch_size",))):
            require_count(name, getattr(self, name))

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments. No progress is shown."""
        del progress
        refuse_state(self, state)
        program = as_program(program)
        result, present, calls = self._search(program, key, keep)
        return finish(self, program, result, calls, present)

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Repeat a run and count the rewards that were no numbers."""
        return blame(self._search(as_program(program), key, None)[0])

    def _search(self, program: Program, key, keep: frozenset[str] | None) -> tuple[Found, dict[str, Any], Any]:
        """Return what is found, where its kept sites are present, and the network calls by each generation."""
        target = rewarded_target(self, program)
        cost = int(step_calls(target).sum())
        require_budget(self.budget, cost, "one generation")
        num = self.budget // cost
        if self.num_kept > num:
            raise ValueError(f"`num_kept` must be at most the {num} generations that are made, got {self.num_kept}.")
        plain, reward = unweighted(target).program(), log_reward(target)

        def generate():
            value = plain.run_inside()
            return {"value": value, "reward": reward(value)}

        staged = Program(generate).stage(keep_rules=False)
        keep = kept_sites(staged, keep)
        counted = _calls_of_an_iteration(target)
        batch_size = min(num, self.batch_size or num)
        purpose = ("random search", num, batch_size, self.num_kept, keep, counted)
        run = _runner(num, batch_size, self.num_kept, keep, counted)
        result, present, iterations = runners.run(staged, purpose, run, key)
        each = cost if counted is None else counted * iterations
        return result, present, np.cumsum(np.broadcast_to(each, num)) if counted is None else jnp.cumsum(each)


def _calls_of_an_iteration(target: Combination) -> int | None:
    """Return how often one particle calls networks in an iteration, where a generation may end early; else None."""
    process = target.process
    ends = type(process).ended is not Process.ended
    return len(target.factors) if ends and target.network_calls() is None else None


def _runner(num: int, batch_size: int, num_kept: int, keep: frozenset[str], counted: int | None):
    def run(staged: Staged, inputs, given, key) -> tuple[Found, dict[str, Any], Any]:
        times = {name: staged.sites[name].time_shape for name in keep}
        looked_at = keep if counted is None else keep | {"path"}

        def batch(index, size: int):
            key_batch = jax.random.fold_in(key, index)
            result = Interpreter(size, OnlyWeigh(), keep=looked_at).run(staged.block, inputs, key_batch, given)

            def spread(lane: Lane):
                return lane.array if lane.random else jnp.broadcast_to(lane.array, (size, *lane.array.shape))

            drawn = jax.tree.unflatten(staged.out_tree, [spread(lane) for lane in result.value])
            sites = {name: spread(result.sites[name]) for name in keep}
            masks = {name: None if mask is None else spread(mask) for name, mask in result.present.items()}
            present = {
                name: jnp.ones((size, *times[name]), bool)
                if masks[name] is None
                else along_times(masks[name], times[name], 1)
                for name in keep
            }
            iterations = jnp.int32(0)
            if counted is not None:  # a loop goes on while any particle does, and computes all of them
                iterations = jnp.sum(jnp.any(masks["path"], axis=0), dtype=jnp.int32)
            dead = result.log_weights == -jnp.inf  # a constraint is broken: the reward is not looked at
            rewards = jnp.where(dead, -jnp.inf, drawn["reward"])
            kept = best((Generation(drawn["value"], sites), present), rewards, num_kept)
            return kept, rewards, jnp.broadcast_to(iterations, size)

        full, rest = divmod(num, batch_size)
        rows = jax.lax.map(lambda index: batch(index, batch_size), jnp.arange(full))
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        if rest:
            rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, batch(full, rest))
        kept, seen, iterations = rows
        (generations, present), rewards = best(*kept, num_kept)
        return found((generations, rewards), seen), present, iterations

    return run
