"""What is known of a loop before it runs, and how its state is laid out.

State of a loop, between two iterations: the carry without the leaves that the body hands on untouched, `captured`
(random values that the iterations read and that therefore move with their particle), `index` (who each particle was
when the loop began, where something random lives across it or is walked along by it), `done`, log-weights and log-mass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from ppl import dataflow
from ppl.ir import Draw, Loop
from ppl.lanes import Frame, Lane, read

if TYPE_CHECKING:
    from ppl.interpret import Interpreter

__all__ = ["LoopPlan"]


class LoopPlan:
    """What is known of a loop before it runs: which values are random, captured, moved, and kept."""

    def __init__(self, interpreter: Interpreter, node: Loop, frame: Frame, needed_later: set[int]):
        self.interpreter, self.node, self.frame = interpreter, node, frame
        self.flags = self._flags()
        self.outermost = node.resamples and frame.depth == 0
        self.start = frame.steps  # iterations of outermost loops before this one
        self.stop = None if frame.stop is None or not self.outermost else frame.stop - self.start
        self.selects = interpreter.selection is not None and self.outermost
        self.rejuvenates = self.selects and interpreter.rejuvenation is not None
        self.holds_sites = self.rejuvenates or (self.selects and interpreter.ancestor_sampling == "replay")
        self.may_end_early = interpreter.early_exit and not self.rejuvenates
        self.may_end_early &= node.until is not None or self.stop is not None
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
        self.random_xs = [i for i, a in enumerate(node.xs) if read(frame, a).random]
        self.keeps_index = self.moves and bool(self.carried_across or random_given or self.random_xs)
        if self.holds_sites and random_given:
            raise TypeError(
                f"the loop at {node.where} has sites that are conditioned on random values: they cannot be replayed, "
                "as rejuvenation and ancestor sampling need. Observe them with ppl.observe."
            )
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

    def initial_state(self) -> dict[str, Any]:
        """Return the state before the first iteration."""
        interpreter, node, frame = self.interpreter, self.node, self.frame
        init = [read(frame, a) for a in node.init]
        state = self.state_of(init) | {"step": jnp.zeros((), jnp.int32), "log_weights": frame.log_weights}
        if self.selects:
            state["log_mass"] = jnp.asarray(frame.log_mass, frame.log_weights.dtype)
            state["captured"] = [frame.env[v].array for v in self.captured]
            if self.keeps_index:
                state["index"] = jnp.arange(interpreter.num_particles, dtype=jnp.int32)
        if self.holds_sites:
            state["walked"] = self.walked()
            state["sites"] = self.sites_so_far()
        if node.until is not None:
            state["done"] = self.stopped(init, state)
        return state

    def walked(self) -> dict[int, Any]:
        """Return the values that the loop walks along and that differ between particles, `[N, T, ...]`, by place."""
        return {i: read(self.frame, self.node.xs[i]).array for i in self.random_xs}

    def sites_so_far(self) -> dict[str, Any]:
        """Return the values of all free sites, `[N, ...]`: zeros where they have none yet."""
        num, types = self.interpreter.num_particles, self.interpreter.site_types
        drawn = {name: self.interpreter.full(self.frame.env[v]) for name, (v, _) in self.frame.records.items()}
        return {
            name: drawn[name] if name in drawn else jnp.zeros((num, *t.shape), t.dtype) for name, t in types.items()
        }

    def written(self, sites: dict[str, Any], body: Frame, mask: Lane | None, t) -> dict[str, Any]:
        """Return sites with what an iteration drew, zeros for the frozen."""
        sites = dict(sites)
        for name, (variable, present) in body.records.items():
            if name not in sites:
                continue
            value = body.env[variable]
            for counts in (mask, None if present is None else body.env[present]):
                if counts is not None:
                    value = self.interpreter.map(_or_zero, counts, value)
            sites[name] = sites[name].at[:, t].set(self.interpreter.full(value))
        return sites

    def continued(self, sites: dict[str, Any], future: Mapping[str, Any], t) -> dict[str, Any]:
        """Return sites as they are up to iteration t, and as given for the future after it."""
        start, out = 0, {}
        for node in self.frame.block.nodes:
            if isinstance(node, Loop) and node.resamples:
                for name in node.body.names & sites.keys():
                    past = start + jnp.arange(node.length) <= self.start + t
                    past = past.reshape(-1, *(1,) * (sites[name].ndim - 2))
                    out[name] = jnp.where(past, sites[name], future[name])
                start += node.length
            elif isinstance(node, Draw | Loop):
                names = {node.name} if isinstance(node, Draw) else node.body.names
                for name in names & sites.keys():
                    out[name] = (
                        sites[name] if start <= self.start else jnp.broadcast_to(future[name], sites[name].shape)
                    )
        return out

    def same_future(self, replay: Frame, t) -> Any:
        """Return, `[N]`, which particles stop in the future of iteration t when particle 0 does, and no sooner.

        A future in which a loop goes on is none of a particle that has stopped, nor the other way round.
        """
        num, same = self.interpreter.num_particles, jnp.ones(self.interpreter.num_particles, bool)
        starts, start = {}, 0
        for node in self.frame.block.nodes:
            if isinstance(node, Loop) and node.resamples:
                starts.update(dict.fromkeys(node.body.names, start))
                start += node.length
        for name, (_, present) in replay.records.items():
            if present is None or starts.get(name, -1) < self.start:
                continue
            counts = self.interpreter.full(replay.env[present])
            future = starts[name] + jnp.arange(counts.shape[1]) > self.start + t
            differs = (counts != counts[:1]) & future.reshape(-1, *(1,) * (counts.ndim - 2))
            same &= ~jnp.any(differs.reshape(num, -1), axis=1)
        return same

    def computed(self, state) -> dict[str, Any]:
        """Return what a particle holds that was computed from its sites."""
        changing = [flag for flag, same in zip(self.flags.carry, self.node.invariant, strict=True) if not same]
        held = {name: state[name] for name in ("captured", "walked")}
        held["carry"] = [a for a, flag in zip(state["carry"], changing, strict=True) if flag]
        return held | ({"done": state["done"]} if self.flags.done else {})

    def replayed(self, there: LoopPlan, state) -> dict[str, Any]:
        """Return the state of this loop after a replay through it, which a plan of its own made."""
        assert there.flags == self.flags  # a site that is given to each particle is as random as one that is drawn
        new = {"carry": state["carry"], "captured": [there.frame.env[v].array for v in self.captured]}
        new["walked"] = there.walked()
        return new | ({"done": state["done"]} if "done" in state else {})

    def genealogy(self, out, histories) -> dict[str, Any]:
        """Return how the population went, as it was: histories by site, ancestors, and what came before selections."""
        places = {name: place for name, (place, _) in self.box["records"].items()}
        kept = {name: histories[place] for name, place in places.items()}
        random = {name: self.box["random"][place] for name, place in places.items()}
        num = self.interpreter.num_particles
        kept = {
            n: a if random[n] else jnp.broadcast_to(a[:, None], (a.shape[0], num, *a.shape[1:]))
            for n, a in kept.items()
        }
        return {
            "sites": kept,
            "ancestors": out.get("ancestors"),
            "resampled": out["diagnostics"]["resampled"],
            "before": out.get("before"),
            "plan": self,
        }

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

    def stopped(self, carry: list[Lane], state):
        """Return which particles stop before the next iteration; a stopped one never starts again."""
        node, interpreter = self.node, self.interpreter
        frame = Frame(None, {})
        constants = [self.constant(a, state) for a in node.until_constants]
        (stop,) = interpreter.block(node.until, [*constants, *carry], None, frame)
        if "done" in state:
            stop = interpreter.map(jnp.logical_or, Lane(state["done"], self.flags.done), stop)
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
            lanes = [self.interpreter.map(_or_zero, active, lane) for lane in lanes]
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
        if self.holds_sites:
            moving["sites"], moving["walked"] = new_state["sites"], state["walked"]
        return moving

    def put_back(self, new_state, moving) -> None:
        """Write what was moved back into the next state."""
        changing = [flag for flag, same in zip(self.flags.carry, self.node.invariant, strict=True) if not same]
        moved = iter(moving["carry"])
        new_state["carry"] = [next(moved) if flag else a for a, flag in zip(new_state["carry"], changing, strict=True)]
        new_state.update({name: value for name, value in moving.items() if name != "carry"})


def _or_zero(counts, x):
    return jnp.where(counts, x, jnp.zeros_like(x))
