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
from ppl.inference.search.run import Found, best, blame, finish, found, refuse_options, require_budget, rewarded_target
from ppl.inference.search.sampler import log_reward, step_calls, unweighted
from ppl.inference.validation import require_count
from ppl.interpret import Interpreter
from ppl.posterior import Posterior
from ppl.program import Program, Staged, as_program

__all__ = ["RandomSearch"]


@dataclasses.dataclass(frozen=True)
class RandomSearch(Promising):
    """Return the best of as many generations as a budget affords.

    Attributes:
        budget: network calls, at least those of one generation; what is left after the last one is not spent. For
            processes that do not say how often they call a network, such as text, it counts one call a step, as if no
            generation ended early.
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
        program = as_program(program)
        refuse_options(self, keep, state)
        result, calls = self._search(program, key)
        return finish(self, program, result, calls)

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Repeat a run and count the rewards that were no numbers."""
        return blame(self._search(as_program(program), key)[0])

    def _search(self, program: Program, key) -> tuple[Found, np.ndarray]:
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
        batch_size = min(num, self.batch_size or num)
        purpose = ("random search", num, batch_size, self.num_kept)
        result = runners.run(staged, purpose, _runner(num, batch_size, self.num_kept), key)
        return result, cost * np.arange(1, num + 1)


def _runner(num: int, batch_size: int, num_kept: int):
    def run(staged: Staged, inputs, given, key) -> Found:
        def batch(index, size: int):
            key_batch = jax.random.fold_in(key, index)
            result = Interpreter(size, OnlyWeigh()).run(staged.block, inputs, key_batch, given)
            arrays = [x.array if x.random else jnp.broadcast_to(x.array, (size, *x.array.shape)) for x in result.value]
            drawn = jax.tree.unflatten(staged.out_tree, arrays)
            dead = result.log_weights == -jnp.inf  # a constraint is broken: the reward is not looked at
            rewards = jnp.where(dead, -jnp.inf, drawn["reward"])
            return best(drawn["value"], rewards, num_kept), rewards

        full, rest = divmod(num, batch_size)
        kept, seen = jax.lax.map(lambda index: batch(index, batch_size), jnp.arange(full))
        kept, seen = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept), seen.reshape(-1)
        if rest:
            last, more = batch(full, rest)
            kept = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, last)
            seen = jnp.concatenate([seen, more])
        return found(best(*kept, num_kept), seen)

    return run
