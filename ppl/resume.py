"""Runs of one trace that begin in the middle of a loop, where an earlier run had left off.

Let c_t be what iteration t adds to the log-weight if its draws count as drawn, log p - log q of a proposal q, 0 of the
law itself, and factors in full. For traces x, x' that agree before iteration t, of which the rest of x' was drawn,

    w(x') / w(x)  =  exp(sum_{s >= t} c'_s - c_s)  =  exp(W' - W),   W = sum of all c_s,                            (1)

since the terms before t are equal. So a run keeps W alone of its weights, and counts given entries as drawn.

A run notes how each iteration began: the loop's carry, all of it but *scratch* arrays (see
`ppl.control_flow.LoopCarry`), of which the last ones serve for every iteration: what later iterations wrote there is
read by none that began before. A language model's cache is one, so that a text is rewound for nothing. The next run
begins at iteration t from what was noted there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppl.interpret import Interpreter
from ppl.ir import Loop
from ppl.iterate import iterate
from ppl.lanes import Frame
from ppl.loops import LoopPlan

__all__ = ["Checkpoint", "ResumableInterpreter"]


class Checkpoint(NamedTuple):
    """How the iterations of a loop began.

    Attributes:
        rows: by iteration, `[T, ...]`, what it put out and, as `entering`, the state that it began with.
        scratch: the scratch arrays of the carry, as the last iteration left them.
    """

    rows: Any
    scratch: list[Any]


@dataclasses.dataclass(frozen=True)
class ResumableInterpreter(Interpreter):
    """Runs one trace, weighs it as (1), and can begin in the middle of a loop.

    Attributes:
        as_drawn: the names of the sites that count as drawn, also where they are given.
        loop: the outermost loop that may begin in the middle; None for none.
        first: the iteration to begin it at, a scalar; the trace is that of `checkpoint` before it.
        checkpoint: what an earlier run left; None begins at the start.
        left: gets the run's own checkpoint, as "checkpoint", where there is a loop.
    """

    as_drawn: frozenset[str] = frozenset()
    loop: Loop | None = None
    first: Any = None
    checkpoint: Checkpoint | None = None
    left: dict[str, Checkpoint] = dataclasses.field(default_factory=dict)

    def _score(self, node, frame: Frame) -> None:
        redrawn = frame.redrawn
        if node.name in self.as_drawn:
            frame.redrawn = {node.name: jnp.array(True)}
        super()._score(node, frame)
        frame.redrawn = redrawn

    def iterate(self, plan: LoopPlan, keys) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run a loop's iterations, the chosen one's from `first` on; its rows before that are the checkpoint's."""
        if plan.node is not self.loop:
            return super().iterate(plan, keys)
        plan.may_end_early = True

        def entering(state):
            kept = [a for a, flag in zip(state["carry"], _is_scratch(plan), strict=True) if not flag]
            return {"entering": {name: a for name, a in state.items() if name != "step"} | {"carry": kept}}

        begun = None if self.checkpoint is None else self._begun(plan)
        state, rows = iterate(plan, keys, state=begun, also=entering)
        if self.checkpoint is not None:
            before = jnp.arange(plan.node.length) < self.first

            def joined(old, new):
                return jnp.where(before.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

            rows = jax.tree.map(joined, self.checkpoint.rows, rows)
        scratch = [a for a, flag in zip(state["carry"], _is_scratch(plan), strict=True) if flag]
        self.left["checkpoint"] = Checkpoint(rows, scratch)
        return state, rows

    def _begun(self, plan: LoopPlan) -> dict[str, Any]:
        """Return the loop's state before iteration `first`."""
        entering = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, self.first, keepdims=False), self.checkpoint.rows["entering"]
        )
        kept, scratch = iter(entering["carry"]), iter(self.checkpoint.scratch)
        carry = [next(scratch) if flag else next(kept) for flag in _is_scratch(plan)]
        return entering | {"carry": carry, "step": jnp.asarray(self.first, jnp.int32)}


def _is_scratch(plan: LoopPlan) -> list[bool]:
    """Return which arrays of the carry serve for every iteration; numbers, such as a cursor, are noted."""
    node = plan.node
    entering = node.body.inputs[len(node.constants) :]
    arrays = [node.body.avals[v].ndim > 0 for v in entering[: len(node.init)]]
    return [flag and array for flag, array, same in zip(node.scratch, arrays, node.invariant, strict=True) if not same]
