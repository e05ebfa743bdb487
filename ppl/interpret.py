"""Running a staged program: for one trace, or for a population of particles.

The interpreter walks a `Block` with every live value at hand. A value is a `Lane`: an array that is either shared by
all particles or has a leading particle axis. Deterministic stretches run under `jax.vmap` over the lanes that differ;
statements go to the methods `_draw`, `_score` and `_loop`.

For particles n = 1..N the interpreter keeps log-weights w_n and log Z, with the invariant (law L2)

    E[ Z * (1/N) sum_n exp(w_n) f(x_n) ] = integral of f under the program's measure so far.       (1)

    sample, drawn from the program      x_n ~ p               w_n unchanged
    sample, drawn from a proposal q     x_n ~ q               w_n += log p(x_n) - log q(x_n)
    sample with a given value           x_n = value           w_n += log p(value)
    sample that is redrawn              as drawn, where a mask says so, else as given
    observe, factor                                           w_n += log-density, log-weight
    selection (end of an outermost iteration)                 see `ppl.selection`

Selection replaces particle n by its ancestor. A particle moves whole (law L3): the loop's carry, what its body closes
over, and, by the composed ancestor index once the loop has ended, whatever lives across it. Histories are stored
as they were drawn, with the ancestors, and traced back once.

A particle at -inf stays there, and NaN that it meets later is ignored (law L5).

A *prefix* of a program is what lies before an iteration of its outermost loops, counted through: later statements have
no density, and loops stop there. Between iterations of an outermost loop particles may be moved by a kernel that
leaves the measure of the prefix as it is (*rejuvenation*): the sites then travel with their particles, and what was
computed from them is computed anew by replaying the prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ppl import draws, replay
from ppl.dataflow import stretch_flags
from ppl.derivatives import refuse, remembered
from ppl.errors import SiteTypeError
from ppl.ir import Block, Draw, Given, Loop, Record, Score, Stretch
from ppl.iterate import iterate
from ppl.lanes import Frame, Lane, read, take, trace_back
from ppl.loops import LoopPlan
from ppl.replay import Rejuvenation
from ppl.selection import Selection

__all__ = ["Interpreter", "Result"]


@dataclasses.dataclass
class Result:
    """What a run gives. Arrays of lanes that differ between particles have a leading particle axis."""

    value: list[Lane]
    sites: dict[str, Lane]
    present: dict[str, Lane | None]
    log_weights: Any
    log_mass: Any
    diagnostics: list[dict[str, Any]]
    blame: dict[str, dict[str, Any]]
    genealogy: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """How to run a program.

    Attributes:
        num_particles: how many particles; None runs one trace, without a particle axis.
        selection: what happens at the end of outermost iterations, if anything.
        weigh_draws: add the log-density of drawn values too: the result is the trace's joint log-density.
        keep: the names of the sites to store.
        early_exit: leave a loop once every particle is frozen. False runs all iterations, as differentiation needs.
        blame: count, for each site, the particles that it killed or gave an invalid weight.
        progress: called with (iteration, length, ess) inside outermost loops.
        constrain: the names of given sites whose values are unconstrained: z of `ppl.supports`, whose density counts.
        unconstrain: the names of sites to record unconstrained, in place of their values.
        rejuvenation: moves between the iterations of outermost loops.
        genealogy: what to keep of outermost loops beside the lines of the last particles: None; "sites", histories as
            they were drawn; or "future", with what tells how likely a future is after each particle.
        ancestor_sampling: how the retained particle's past is drawn anew where particles are resampled: None, "step",
            where one iteration's density tells, or "replay", by the density of the whole future.
        power: to which power observations and factors count, a scalar; None is 1. What forbids does so at any power.
        powered: the names of those that do; None for all.
        path: where the run is differentiated, the names of the draws that move with a parameter, see `ppl.derivatives`;
            None where it is not.
        site_types: the types of all free sample sites, by name, without the particle axis; for runs that move particles
            or replay futures, and `keep` must name them all.
    """

    num_particles: int | None = None
    selection: Selection | None = None
    weigh_draws: bool = False
    keep: frozenset[str] = frozenset()
    early_exit: bool = True
    blame: bool = False
    progress: Callable | None = None
    constrain: frozenset[str] = frozenset()
    unconstrain: frozenset[str] = frozenset()
    rejuvenation: Rejuvenation | None = None
    genealogy: str | None = None
    ancestor_sampling: str | None = None
    power: Any = None
    powered: frozenset[str] | None = None
    path: frozenset[str] | None = None
    site_types: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)

    def run(
        self,
        block: Block,
        inputs,
        key=None,
        given: Mapping[str, Any] | None = None,
        retained: Mapping[str, Any] | None = None,
        *,
        given_each: Mapping[str, Any] | None = None,
        redrawn: Mapping[str, Any] | None = None,
        stop: Any = None,
    ) -> Result:
        """Run a program.

        Args:
            block: the staged program.
            inputs: its inputs' values, the same for all particles.
            key: the source of all draws; None where every site is given.
            given: values for sites, loops' time axes leading; such a site is not drawn but weighed.
            retained: values that particle 0, or the one trace, draws for certain, in the same form; the selection must
                pin it.
            given_each: values for sites, one for each particle, `[N, ...]`.
            redrawn: for given sites, which entries along the loops' time axes are drawn all the same, bool.
            stop: how many iterations of outermost loops the prefix has that is run, a scalar; None runs all.
        """
        keys = None if key is None else jax.random.split(key, max(block.num_keys, 1))
        lanes = {name: Lane(value) for name, value in (given or {}).items()}
        lanes |= {name: Lane(value, True) for name, value in (given_each or {}).items()}
        frame = self.frame(lanes, block, [Lane(jnp.asarray(x)) for x in inputs])
        frame.retained, frame.redrawn, frame.stop = retained or {}, redrawn or {}, stop
        value = self.block(block, frame.inputs, keys, frame)
        self._refuse_nan("the returned value", [lane for lane in value if lane.random], frame)
        sites = {name: frame.env[v] for name, (v, _) in frame.records.items()}
        present = {name: None if p is None else frame.env[p] for name, (_, p) in frame.records.items()}
        return Result(
            value, sites, present, frame.log_weights, frame.log_mass, frame.diagnostics, frame.blame, frame.genealogy
        )

    def frame(self, given: Mapping[str, Lane], block: Block, inputs: list[Lane]) -> Frame:
        """Return the frame in which a whole program is walked."""
        shape = () if self.num_particles is None else (self.num_particles,)
        return Frame(jnp.zeros(shape), given, block=block, inputs=inputs)

    # One block -------------------------------------------------------------------------------------------------------

    def block(self, block: Block, args: list[Lane], keys, frame: Frame) -> list[Lane]:
        """Walk a block: given its inputs, return its outputs. The frame keeps what happened."""
        self.walk(block, args, keys, frame)
        return [read(frame, a) for a in block.outputs]

    def walk(
        self,
        block: Block,
        args: list[Lane],
        keys,
        frame: Frame,
        *,
        before: Loop | None = None,
        through: Loop | None = None,
    ) -> set[int]:
        """Walk a block to its end, or before or through a loop in it; returns what is needed after that."""
        frame.env.update(zip(block.inputs, args, strict=True))
        outputs = {a for a in block.outputs if isinstance(a, int)}
        needed_later = _needed_later(block, outputs)
        for segment, later in zip(block.segments, needed_later, strict=True):
            if segment is before:
                return later
            if isinstance(segment, Stretch):
                lanes = self._apply(segment, [frame.env[v] for v in segment.inputs], segment)
                frame.env.update(zip(segment.outputs, lanes, strict=True))
            elif isinstance(segment, Draw):
                self._draw(segment, keys, frame)
            elif isinstance(segment, Score):
                self._score(segment, frame)
            elif isinstance(segment, Record):
                if segment.name in self.keep:
                    frame.records[segment.name] = frame.new_variable(read(frame, segment.value)), None
                    self._refuse_nan(segment.name, [read(frame, segment.value)], frame)
            elif isinstance(segment, Given):
                frame.given = {**frame.given, segment.name: read(frame, segment.value)}
            else:
                self._loop(segment, keys, frame, later)
                if segment is through:
                    return later
        return outputs

    def walk_through(self, loop: Loop, frame: Frame) -> tuple[LoopPlan, dict[str, Any]]:
        """Walk a program of given sites up to a loop and through it: the loop's plan and its last state."""
        needed_later = self.walk(frame.block, frame.inputs, None, frame, before=loop)
        plan = LoopPlan(self, loop, frame, needed_later)
        return plan, self.iterate(plan, None)[0]

    def _apply(self, function: Callable, lanes: list[Lane], stretch: Stretch | None = None) -> list[Lane]:
        """Apply a function of one particle's values, returning a list, to lanes."""
        arrays, random = [lane.array for lane in lanes], [lane.random for lane in lanes]
        if not any(random):
            return [Lane(array) for array in function(*arrays)]
        if stretch is None:
            out_random, out_axes = None, 0
        else:
            out_random = stretch_flags(stretch, dict(zip(stretch.inputs, random, strict=True)))
            out_axes = [0 if flag else None for flag in out_random]
        in_axes = tuple(0 if flag else None for flag in random)
        results = jax.vmap(function, in_axes, out_axes, axis_size=self.num_particles)(*arrays)
        return [
            Lane(array, True if out_random is None else flag)
            for array, flag in zip(results, out_random or results, strict=True)
        ]

    def map(self, function: Callable, *lanes: Lane) -> Lane:
        """Apply an elementwise function of one particle's values to lanes."""
        return self._apply(lambda *arrays: [function(*arrays)], list(lanes))[0]

    def full(self, lane: Lane) -> Any:
        """Return a lane's array with the particle axis, if this run has one."""
        if lane.random or self.num_particles is None:
            return lane.array
        return jnp.broadcast_to(lane.array, (self.num_particles, *jnp.shape(lane.array)))

    # Statements ------------------------------------------------------------------------------------------------------

    def _draw(self, node: Draw, keys, frame: Frame) -> None:
        given, mask = frame.given.get(node.name), frame.redrawn.get(node.name)
        if given is None:
            lane = self._drawn(node, keys, frame)
        elif mask is None:
            lane = self._given(node, given, frame)
        else:
            lane = self.map(jnp.where, Lane(mask), self._drawn(node, keys, frame), self._given(node, given, frame))
        frame.env[node.output] = lane
        if node.name in self.unconstrain:
            bounds = [read(frame, a) for a in node.bounds]
            (lane,) = self._apply(lambda x, *bounds: [node.support.unconstrain(x, bounds)], [lane, *bounds])
            frame.records[node.name] = frame.new_variable(lane), None
        elif node.name in self.keep:
            frame.records[node.name] = node.output, None
            if given is None:
                self._refuse_nan(node.name, [lane], frame)

    def _drawn(self, node: Draw, keys, frame: Frame) -> Lane:
        """Draw a value for each particle; the retained one has its own."""
        retained = frame.retained.get(node.name)
        if retained is not None:
            retained = jnp.asarray(retained, node.aval.dtype)
            if self.num_particles is None:
                return Lane(retained)
            if self.num_particles == 1:
                return Lane(retained[None], True)
        proposed = node.proposal is not None and not self.weigh_draws
        sampler, parameters = (node.proposal, node.proposal_parameters) if proposed else (node.sampler, node.parameters)
        if sampler is None:
            raise SiteTypeError(
                f"the site {node.name!r} ({node.where}) must be drawn, and its distribution has no sampler. Give it a "
                "proposal, ppl.sample(..., proposal=...), or observe it; ppl.simulate draws no proposals."
            )
        lanes = [read(frame, a) for a in parameters]
        arrays = [lane.array for lane in lanes]
        key = jax.random.key(0) if keys is None and node.is_certain else keys[node.key_index]
        if self._stays(node):
            arrays = jax.lax.stop_gradient(arrays)
            message = (
                f"the site {node.name!r} ({node.where}) has no derivative: its draws do not move smoothly with its "
                "parameters, and the support of its distribution does. Draw it from a distribution of fixed support "
                "and transform the value."
            )
            refuse([read(frame, a).array for a in node.bounds], message)
        if self.num_particles is None:
            return Lane(draws.draw(sampler, arrays, key))
        random = tuple(lane.random for lane in lanes)
        if retained is None:
            return Lane(draws.draw_population(sampler, arrays, random, key, self.num_particles), True)
        others = [array[1:] if flag else array for array, flag in zip(arrays, random, strict=True)]
        drawn = draws.draw_population(sampler, others, random, key, self.num_particles - 1)
        return Lane(jnp.concatenate([retained[None], drawn]), True)

    def _stays(self, node: Draw) -> bool:
        """Whether the values of a draw stay where they are while a derivative is taken."""
        return self.path is not None and node.name not in self.path

    def _given(self, node: Draw, lane: Lane, frame: Frame) -> Lane:
        """Return the value that a site was given; an unconstrained one is mapped to the support."""
        if node.name in self.constrain:
            bounds = [read(frame, a) for a in node.bounds]
            lane, log_determinant = self._apply(
                lambda z, *bounds: list(node.support.constrain(z, bounds)), [lane, *bounds]
            )
            self._add(log_determinant, frame)
        lane = Lane(jnp.asarray(lane.array, node.aval.dtype), lane.random)
        if frame.active is not None and jnp.issubdtype(node.aval.dtype, jnp.floating):
            lane = self._possible_where_frozen(node, lane, frame)
        return lane

    def _possible_where_frozen(self, node: Draw, lane: Lane, frame: Frame) -> Lane:
        """Put a possible value in the place of one that does not count, so that gradients through it are finite."""
        sampler, parameters = node.sampler, node.parameters
        if sampler is None:
            sampler, parameters = node.proposal, node.proposal_parameters
        if sampler is None:
            return lane

        def possible(*parameters):
            return [draws.draw(sampler, jax.lax.stop_gradient(list(parameters)), jax.random.key(0))]

        (other,) = self._apply(possible, [read(frame, a) for a in parameters])
        return self.map(jnp.where, frame.active, lane, other)

    def _score(self, node: Score, frame: Frame) -> None:
        increment = read(frame, node.log_density)
        if node.kind == "sample" and not self.weigh_draws:
            given, mask = node.name in frame.given, frame.redrawn.get(node.name)
            if not given or mask is not None:
                drawn = self._weight_of_drawn(node, increment, frame)
                if drawn is None and not given:
                    return
                if drawn is None:
                    drawn = Lane(jnp.zeros_like(increment.array), increment.random)
                increment = drawn if not given else self.map(jnp.where, Lane(mask), drawn, increment)
        elif node.is_evidence and self.power is not None and (self.powered is None or node.name in self.powered):
            increment = self.map(lambda x: jnp.where(x == -jnp.inf, x, self.power * x), increment)
        self._weigh(node.name, increment, frame)

    def _weigh(self, name: str, increment: Lane, frame: Frame) -> None:
        """Add to the log-weights, and note whom a site killed or gave an invalid weight."""
        before = frame.log_weights
        self._add(increment, frame)
        if self.blame:
            was_valid = (before > -jnp.inf) & (before < jnp.inf)
            counts = {
                "invalid": jnp.sum(was_valid & (jnp.isnan(frame.log_weights) | (frame.log_weights == jnp.inf))),
                "killed": jnp.sum(was_valid & (frame.log_weights == -jnp.inf)),
            }
            so_far = frame.blame.get(name)
            frame.blame[name] = counts if so_far is None else jax.tree.map(jnp.add, so_far, counts)

    def _refuse_nan(self, name: str, lanes: list[Lane], frame: Frame) -> None:
        """Give particles that hold NaN in a value that is kept an invalid weight: nothing else would show it."""
        if self.num_particles is None or self.weigh_draws:
            return
        for lane in lanes:
            if jnp.issubdtype(lane.array.dtype, jnp.inexact):
                self._weigh(name, self.map(_nan_where_nan, lane), frame)

    def _weight_of_drawn(self, node: Score, log_density: Lane, frame: Frame) -> Lane | None:
        """Return the log-weight of a value that was drawn; None where it is 0 and no derivative is remembered."""
        log_proposal = None if node.log_proposal is None else read(frame, node.log_proposal)
        if self.path is None or node.name in self.path:
            return None if log_proposal is None else self.map(jnp.subtract, log_density, log_proposal)
        if log_proposal is None:
            weight = Lane(remembered(log_density.array), log_density.random)
            drawn_alone = Lane(jnp.zeros_like(weight.array), weight.random)
        else:
            drawn_alone = self.map(jnp.subtract, log_density, log_proposal)
            message = (
                f"the proposal of {node.name!r} ({node.where}) depends on what the run is differentiated with respect "
                "to, and its draws do not move smoothly with it. Z does not depend on a proposal: for the derivative "
                "of exp(log_evidence) wrap the proposal's parameters in jax.lax.stop_gradient. The derivative of "
                "E[log_evidence], an ELBO, needs a proposal whose values move smoothly, such as dist.Normal."
            )
            held = self.map(lambda x: jax.lax.stop_gradient(refuse(x, message)), log_proposal)
            weight = self.map(jnp.subtract, log_density, held)
        if node.name not in frame.retained:
            return weight
        # The retained value was not drawn: its weight is p / q with q's derivative too, and 1 where nothing proposes.
        full, alone = self.full(weight), self.full(drawn_alone)
        return Lane(full.at[0].set(alone[0]), True)

    def _add(self, increment: Lane, frame: Frame) -> None:
        """Add to the log-weights where it counts: not for the frozen, nor for the dead."""
        if frame.active is not None:
            increment = self.map(lambda active, x: jnp.where(active, x, 0.0), frame.active, increment)
        before = frame.log_weights
        dead = before == -jnp.inf
        frame.log_weights = jnp.where(dead, before, before + increment.array.astype(before.dtype))

    # Loops -----------------------------------------------------------------------------------------------------------

    def _loop(self, node: Loop, keys, frame: Frame, needed_later: set[int]) -> None:
        plan = LoopPlan(self, node, frame, needed_later)
        iteration_keys = None
        if keys is not None:
            iteration_keys = jax.random.split(keys[node.key_index], (node.length, node.body.num_keys + 1))
        state, out = self.iterate(plan, iteration_keys)
        frame.log_weights = state["log_weights"]
        if plan.selects:
            self._note(plan, state, out, frame)
        if plan.rejuvenates:  # what was computed from the sites is computed anew, now that they will not move again
            replayer, known = replay.replaying(plan, state["sites"], keep=self.keep)
            replayer.walk(known.block, known.inputs, None, known, through=node)
            frame.env, frame.records = known.env, known.records
        else:
            self._finish(plan, state, out, frame)
        for name, counts in out["blame"].items():
            summed = {kind: count if frame.depth == 0 else count.sum() for kind, count in counts.items()}
            frame.blame[name] = summed | {"start": frame.steps}
        self._pass(plan, frame)

    def iterate(self, plan: LoopPlan, keys) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run a loop's iterations; returns its last state and what each iteration put out, stacked."""
        return iterate(plan, keys)

    def _pass(self, plan: LoopPlan, frame: Frame) -> None:
        """Leave a loop behind: what follows an outermost one does not belong to a prefix that ends in it."""
        if not plan.outermost:
            return
        frame.steps += plan.node.length
        if frame.stop is not None:
            after = Lane(frame.stop > frame.steps)
            frame.active = after if frame.active is None else self.map(jnp.logical_and, frame.active, after)

    def _note(self, plan: LoopPlan, state, out, frame: Frame) -> None:
        """Keep how an outermost loop's population went."""
        frame.log_mass = state["log_mass"]
        weighing = self.selection.weigh(frame.log_weights)
        idle = {
            "ess": weighing.ess,
            "log_evidence": frame.log_mass + weighing.log_sum - jnp.log(float(self.num_particles)),
        }
        diagnostics = _finish_diagnostics(out["diagnostics"], state["step"], idle)
        frame.diagnostics.append(diagnostics | ({"ancestors": out["ancestors"]} if plan.moves else {}))

    def _finish(self, plan: LoopPlan, state, out, frame: Frame) -> None:
        """Put what a loop leaves behind into the frame."""
        node = plan.node
        # What the particles hold now.
        carry = iter(state["carry"])
        for i, variable in enumerate(node.outputs[: len(node.init)]):
            if node.invariant[i]:
                frame.env[variable] = plan.constant(node.init[i], state)
            else:
                frame.env[variable] = Lane(next(carry), plan.flags.carry[i])
        if plan.selects:
            for variable, lane in plan.captured_lanes(state).items():
                frame.env[variable] = lane
            for variable in plan.carried_across:
                frame.env[variable] = Lane(take(frame.env[variable].array, state["index"]), True)
            if plan.keeps_index:
                frame.given = {
                    name: Lane(take(lane.array, state["index"]), True) if lane.random else lane
                    for name, lane in frame.given.items()
                }

        # What they went through.
        histories = out["history"]
        if plan.selects and self.genealogy is not None:
            frame.genealogy.append(plan.genealogy(out, histories))
        if plan.selects and plan.moves:
            moving = [i for i, flag in enumerate(plan.box["random"]) if flag]
            traced = trace_back(out["ancestors"], out["diagnostics"]["resampled"], [histories[i] for i in moving])
            for i, history in zip(moving, traced, strict=True):
                histories[i] = history
        variables = [
            frame.new_variable(Lane(jnp.moveaxis(h, 1, 0) if flag else h, flag))
            for h, flag in zip(histories, plan.box["random"], strict=True)
        ]
        for y, place in plan.box["ys"].items():
            frame.env[node.outputs[len(node.init) + y]] = frame.env[variables[place]]
        for name, (place, present) in plan.box["records"].items():
            frame.records[name] = variables[place], None if present is None else variables[present]


def _nan_where_nan(x):
    return jnp.where(jnp.any(jnp.isnan(jax.lax.stop_gradient(x))), jnp.nan, 0.0)


def _needed_later(block: Block, outputs: set[int]) -> list[set[int]]:
    """Return, for each segment, the variables that are read after it."""
    needed, sets = set(outputs), []
    for segment in reversed(block.segments):
        sets.append(set(needed))
        needed.update(a for a in segment.inputs if isinstance(a, int))
    return sets[::-1]


def _finish_diagnostics(diagnostics: dict[str, Any], steps, idle: dict[str, Any]) -> dict[str, Any]:
    """Repeat the last figures over iterations that a loop left out because every particle was frozen."""
    length = diagnostics["ess"].shape[0]
    if length == 0:
        return diagnostics
    ran = jnp.arange(length) < steps
    last = jnp.maximum(steps - 1, 0)
    for name in ("ess", "log_evidence"):
        final = jnp.where(steps > 0, diagnostics[name][last], idle[name])
        diagnostics[name] = jnp.where(ran, diagnostics[name], final)
    return diagnostics
