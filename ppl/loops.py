"""What is known of a loop before it runs, and how its state is laid out.

State of a loop, between two iterations: the carry without the leaves that the body hands on untouched, `captured`
(random values that the iterations read and that therefore move with their particle), `index` (who each particle was
when the loop began, where something random lives across it or is walked along by it), `done`, log-weights and log-mass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from ppl import dataflow
from ppl.ir import Loop
from ppl.lanes import Frame, Lane, read

if TYPE_CHECKING:
    from ppl.interpret import Interpreter

__all__ = ["LoopPlan"]


class LoopPlan:
    """What is known of a loop before it runs: which values are random, captured, moved, and kept."""

    def __init__(self, interpreter: Interpreter, node: Loop, frame: Frame, needed_later: set[int]):
        self.interpreter, self.node, self.frame = interpreter, node, frame
        self.flags = self._flags()
        self.selects = interpreter.selection is not None and node.resamples and frame.depth == 0
        self.moves = self.selects and interpreter.selection.may_resample
        self.looks_ahead = self.moves and interpreter.selection.looks_ahead
        # Values the iterations read that are not carried: the body's and until's constants, untouched carry.
        untouched = [a for a, same in zip(node.init, node.invariant, strict=True) if same]
        seen = dict.fromkeys(a for a in (*node.constants, *node.until_constants, *untouched) if isinstance(a, int))
        random = [v for v in seen if frame.env[v].random]
        self.captured = random if self.moves else []
        recorded = {v for pair in frame.records.values() for v in pair if v is not None}
        across = (needed_later | recorded) & frame.env.keys() - set(self.captured)
        self.carried_across = sorted(v for v in across if frame.env[v].random) if self.moves else []
        random_given = any(lane.random for lane in frame.given.values())
        random_xs = any(read(frame, a).random for a in node.xs)
        self.keeps_index = self.moves and bool(self.carried_across or random_given or random_xs)
        outputs = node.outputs[len(node.init) :]
        self.wanted_ys = [i for i, variable in enumerate(outputs) if variable in needed_later]
        self.box: dict[str, Any] = {}  # found while the body is traced: the layout of its histories

    def _flags(self) -> dataflow.LoopFlags:
        node, frame = self.node, self.frame
        if self.interpreter.num_particles is None:
            num_ys = len(node.outputs) - len(node.init)
            return dataflow.LoopFlags(((False,) * len(node.init), (False,) * num_ys, False))
        groups = [
            tuple(read(frame, a).random for a in group)
            for group in (node.constants, node.until_constants, node.init, node.xs)
        ]
        shared_given = frozenset(name for name, lane in frame.given.items() if not lane.random)
        return dataflow.loop_flags(node, *groups, shared_given)

    def initial_state(self, frame: Frame) -> dict[str, Any]:
        """Return the state before the first iteration."""
        interpreter, node = self.interpreter, self.node
        init = [read(frame, a) for a in node.init]
        state = self.state_of(init) | {"step": jnp.zeros((), jnp.int32), "log_weights": frame.log_weights}
        if self.selects:
            state["log_mass"] = jnp.asarray(frame.log_mass, frame.log_weights.dtype)
            state["captured"] = [frame.env[v].array for v in self.captured]
            if self.keeps_index:
                state["index"] = jnp.arange(interpreter.num_particles, dtype=jnp.int32)
        if node.until is not None:
            state["done"] = self.stopped(init, state, None)
        return state

    def state_of(self, carry: list[Lane]) -> dict[str, Any]:
        """Return the carried arrays, each with or without the particle axis as the fixpoint says."""
        changing = [
            (lane, flag)
            for lane, flag, same in zip(carry, self.flags.carry, self.node.invariant, strict=True)
            if not same
        ]
        return {"carry": [self.interpreter.full(lane) if flag else lane.array for lane, flag in changing]}

    def carry_lanes(self, state) -> list[Lane]:
        """Return the carry that an iteration is given."""
        arrays = iter(state["carry"])
        return [
            self.constant(atom, state) if same else Lane(next(arrays), flag)
            for atom, flag, same in zip(self.node.init, self.flags.carry, self.node.invariant, strict=True)
        ]

    def constant(self, atom, state) -> Lane:
        """Return a value that the iterations read, moved with its particle if it is random."""
        if isinstance(atom, int) and atom in self.captured:
            return Lane(state["captured"][self.captured.index(atom)], True)
        return read(self.frame, atom)

    def captured_lanes(self, state) -> dict[int, Lane]:
        """Return the captured values as the particles hold them now, by variable."""
        return {v: Lane(array, True) for v, array in zip(self.captured, state["captured"], strict=True)}

    def stopped(self, carry: list[Lane], state, done: Lane | None):
        """Return which particles stop before the next iteration."""
        node, interpreter = self.node, self.interpreter
        frame = Frame(None, {})
        constants = [self.constant(a, state) for a in node.until_constants]
        (stop,) = interpreter.block(node.until, [*constants, *carry], None, frame)
        if done is not None:
            stop = interpreter.map(jnp.logical_or, done, stop)
        return interpreter.full(stop) if self.flags.done else stop.array

    def collect(self, body: Frame, ys: list[Lane], active: Lane | None) -> list[Any]:
        """Return the arrays of one iteration that are kept, each once, zeros where the particle is frozen."""
        lanes: list[Lane] = []
        places: dict[int, int] = {}

        def place(lane: Lane) -> int:
            if id(lane.array) not in places:
                places[id(lane.array)] = len(lanes)
                lanes.append(lane)
            return places[id(lane.array)]

        self.box["ys"] = {i: place(ys[i]) for i in self.wanted_ys}
        records = {}
        for name, (variable, present) in body.records.items():
            mask = active if present is None else body.env[present]
            records[name] = place(body.env[variable]), None if mask is None else place(mask)
        self.box["records"] = records
        if active is not None:
            zero = lambda on, x: jnp.where(on, x, jnp.zeros_like(x))  # noqa: E731
            lanes = [self.interpreter.map(zero, active, lane) for lane in lanes]
        self.box["random"] = [lane.random for lane in lanes]
        return [lane.array for lane in lanes]

    def moving(self, state, new_state) -> dict[str, Any]:
        """Return all that belongs to a particle and must follow its ancestor."""
        changing = [flag for flag, same in zip(self.flags.carry, self.node.invariant, strict=True) if not same]
        moving = {
            "carry": [a for a, flag in zip(new_state["carry"], changing, strict=True) if flag],
            "captured": state["captured"],
        }
        if "index" in state:
            moving["index"] = state["index"]
        if self.flags.done:
            moving["done"] = new_state["done"]
        return moving

    def put_back(self, new_state, moving) -> None:
        """Write what was moved back into the next state."""
        changing = [flag for flag, same in zip(self.flags.carry, self.node.invariant, strict=True) if not same]
        moved = iter(moving["carry"])
        new_state["carry"] = [next(moved) if flag else a for a, flag in zip(new_state["carry"], changing, strict=True)]
        new_state.update({name: value for name, value in moving.items() if name != "carry"})
