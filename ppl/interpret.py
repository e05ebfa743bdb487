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
    selection (end of an outermost iteration)                 see `Selection`

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
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from ppl import chance, draws
from ppl.dataflow import stretch_flags
from ppl.ir import Block, Draw, Given, Loop, Record, Score, Stretch
from ppl.lanes import Frame, Lane, has_long_rows, move, read, take, time_first, trace_back
from ppl.loops import LoopPlan

__all__ = ["Interpreter", "Rejuvenation", "Result", "Selected", "Selection", "Weighing"]


class Weighing(NamedTuple):
    """What selection knows of the weights: their log-sum, their effective sample size, their entropy, all scalars."""

    log_sum: Any
    ess: Any
    entropy: Any


class Rejuvenation(NamedTuple):
    """Moves between the iterations of outermost loops.

    Attributes:
        move: `(key, sites, stop) -> (sites, acceptance)`, with sites by name, `[N, ...]`, of the prefix that has `stop`
            iterations; it leaves the measure of that prefix as it is. The acceptance is a scalar.
        every: a move is due after every so many iterations.
    """

    move: Callable[[Any, dict[str, Any], Any], tuple[dict[str, Any], Any]]
    every: int


class Choice(NamedTuple):
    """What else counts while ancestors are chosen.

    Attributes:
        ahead: log-weights `[N]` that count while choosing and are taken out of the children's.
        future: gives, `[N]`, the log-density of the retained particle's future after each particle: its past is drawn
            anew.
    """

    ahead: Any = None
    future: Callable[[], Any] | None = None


class Selected(NamedTuple):
    """The outcome of a selection.

    Attributes:
        ancestors: `int32[N]`.
        children_log_weights: a function of ancestors `int32[N]`, which may have been put in another order: the
            log-weights `[N]` that their children start with.
        log_mass: the log-mass taken out of the weights, a scalar.
        temperature: the temperature at which the ancestors were drawn, a scalar.
    """

    ancestors: Any
    children_log_weights: Callable[[Any], Any]
    log_mass: Any
    temperature: Any = 1.0


class Selection(Protocol):
    """What a population algorithm does at the end of an iteration of an outermost loop.

    `may_resample` is False for algorithms that only watch the weights; `anneals` is True for those that resample at a
    temperature; `looks_ahead` for those that want to know the weights of an iteration before choosing who makes it.
    """

    may_resample: bool
    anneals: bool
    looks_ahead: bool

    def weigh(self, log_weights) -> Weighing:
        """Summarise log-weights `[N]`."""

    def foresee(self, increments):
        """Return what is added to log-weights `[N]` while choosing, given what a trial of the next iteration added."""

    def due(self, weighing: Weighing, progress):
        """Return whether to resample now: a Python bool where that is fixed beforehand, else a traced one.

        `progress` is the share, in (0, 1], of the loop's iterations that are done.
        """

    def select(self, key, log_weights, weighing: Weighing, progress, retained=None) -> Selected:
        """Choose ancestors after the share `progress`, in (0, 1], of the loop's iterations.

        `retained`, an index, is the ancestor of particle 0, for selections that pin it.

        Invariant (1) must hold: E[sum over children of exp(new w) * exp(mass)] = exp(w) for each particle.
        """


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
        frame = self._frame(lanes, block, [Lane(jnp.asarray(x)) for x in inputs])
        frame.retained, frame.redrawn, frame.stop = retained or {}, redrawn or {}, stop
        value = self.block(block, frame.inputs, keys, frame)
        sites = {name: frame.env[v] for name, (v, _) in frame.records.items()}
        present = {name: None if p is None else frame.env[p] for name, (_, p) in frame.records.items()}
        return Result(
            value, sites, present, frame.log_weights, frame.log_mass, frame.diagnostics, frame.blame, frame.genealogy
        )

    def _frame(self, given: Mapping[str, Lane], block: Block, inputs: list[Lane]) -> Frame:
        """Return the frame in which a whole program is walked."""
        shape = () if self.num_particles is None else (self.num_particles,)
        return Frame(jnp.zeros(shape), given, block=block, inputs=inputs)

    # One block -------------------------------------------------------------------------------------------------------

    def block(self, block: Block, args: list[Lane], keys, frame: Frame) -> list[Lane]:
        """Walk a block: given its inputs, return its outputs. The frame keeps what happened."""
        self._walk(block, args, keys, frame)
        return [read(frame, a) for a in block.outputs]

    def _walk(
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
            elif isinstance(segment, Given):
                frame.given = {**frame.given, segment.name: read(frame, segment.value)}
            else:
                self._loop(segment, keys, frame, later)
                if segment is through:
                    return later
        return outputs

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
        lanes = [read(frame, a) for a in parameters]
        arrays, key = [lane.array for lane in lanes], keys[node.key_index]
        if self.num_particles is None:
            return Lane(draws.draw(sampler, arrays, key))
        random = tuple(lane.random for lane in lanes)
        if retained is None:
            return Lane(draws.draw_population(sampler, arrays, random, key, self.num_particles), True)
        others = [array[1:] if flag else array for array, flag in zip(arrays, random, strict=True)]
        drawn = draws.draw_population(sampler, others, random, key, self.num_particles - 1)
        return Lane(jnp.concatenate([retained[None], drawn]), True)

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

        def possible(*parameters):
            return [draws.draw(node.sampler, jax.lax.stop_gradient(list(parameters)), jax.random.key(0))]

        (other,) = self._apply(possible, [read(frame, a) for a in node.parameters])
        return self.map(jnp.where, frame.active, lane, other)

    def _score(self, node: Score, frame: Frame) -> None:
        increment = read(frame, node.log_density)
        if node.kind == "sample" and not self.weigh_draws:
            given, mask = node.name in frame.given, frame.redrawn.get(node.name)
            if not given or mask is not None:
                if not given and node.log_proposal is None:
                    return
                if node.log_proposal is None:
                    drawn = Lane(jnp.zeros_like(increment.array), increment.random)
                else:
                    drawn = self.map(jnp.subtract, increment, read(frame, node.log_proposal))
                increment = drawn if not given else self.map(jnp.where, Lane(mask), drawn, increment)
        elif node.kind != "sample" and self.power is not None and (self.powered is None or node.name in self.powered):
            increment = self.map(lambda x: jnp.where(x == -jnp.inf, x, self.power * x), increment)
        before = frame.log_weights
        self._add(increment, frame)
        if self.blame:
            dead = before == -jnp.inf
            frame.blame[node.name] = {
                "invalid": jnp.sum(~dead & (jnp.isnan(frame.log_weights) | (frame.log_weights == jnp.inf))),
                "killed": jnp.sum(~dead & (frame.log_weights == -jnp.inf)),
            }

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
        state, out = self._iterate(plan, iteration_keys, frame)
        frame.log_weights = state["log_weights"]
        if plan.selects:
            self._note(plan, state, out, frame)
        if plan.rejuvenates:  # what was computed from the sites is computed anew, now that they will not move again
            replayer, replay = self._replay(plan, frame, state["sites"], keep=self.keep)
            replayer._walk(frame.block, frame.inputs, None, replay, through=node)
            frame.env, frame.records = replay.env, replay.records
        else:
            self._finish(plan, state, out, frame)
        self._pass(plan, frame)

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
        for name, counts in out["blame"].items():
            summed = {kind: count if frame.depth == 0 else count.sum() for kind, count in counts.items()}
            frame.blame[name] = summed | {"start": frame.steps}

    def _iterate(self, plan: LoopPlan, keys, frame: Frame):
        """Run the iterations; returns the last state and what each iteration put out, stacked."""
        node = plan.node
        state = plan.initial_state(frame)
        xs = self.rows(plan) | {"keys": keys}
        if plan.looks_ahead or self.ancestor_sampling == "step":
            following = {name: xs[name] for name in ("t", "xs", "given", "retained")}
            xs["next"] = jax.tree.map(lambda a: jnp.roll(a, -1, 0), following) | {"redrawn": {}}

        def iteration(state, x):
            return self._iteration(plan, frame, state, x)

        if node.length == 0:
            first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
            shapes = jax.eval_shape(iteration, state, first)[1]
            return state, jax.tree.map(lambda s: jnp.zeros((0, *s.shape), s.dtype), shapes)
        if not plan.may_end_early:
            return jax.lax.scan(iteration, state, xs)

        # Frozen particles change nothing, so the loop may end once all are: a while loop that fills the stacks itself.
        last = node.length if plan.stop is None else jnp.minimum(plan.stop, node.length)
        first = jax.tree.map(lambda a: a[0], xs)
        program, shapes = jax.make_jaxpr(iteration, return_shape=True)(state, first)
        run, tree = jex.jaxpr_as_fun(program), jax.tree.structure(shapes)
        stacks = jax.tree.map(lambda s: jnp.zeros((node.length, *s.shape), s.dtype), shapes[1])
        if "ancestors" in stacks:
            stacks["ancestors"] = stacks["ancestors"] + jnp.arange(self.num_particles, dtype=jnp.int32)

        def running(loop_state):
            state, _ = loop_state
            going_on = state["step"] < last
            if node.until is None:
                return going_on
            # Where nothing is resampled, iterations of the frozen change nothing: runs side by side end together.
            return going_on & ~(jnp.all if plan.moves else _all_of_all)(state["done"])

        def step(loop_state):
            state, stacks = loop_state
            x = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, state["step"], keepdims=False), xs)
            new_state, out = jax.tree.unflatten(tree, run(*jax.tree.leaves((state, x))))
            write = lambda stack, o: jax.lax.dynamic_update_index_in_dim(stack, o, state["step"], 0)  # noqa: E731
            return new_state, jax.tree.map(write, stacks, out)

        return jax.lax.while_loop(running, step, (state, stacks))

    def rows(self, plan: LoopPlan) -> dict[str, Any]:
        """Return what the iterations are given one after another, time axes leading."""
        node, frame = plan.node, plan.frame
        return {
            "t": jnp.arange(node.length),
            "xs": [time_first(read(frame, a)) for a in node.xs],
            "given": {n: time_first(frame.given[n]) for n in node.body.names if n in frame.given},
            "retained": {n: frame.retained[n] for n in node.body.names if n in frame.retained},
            "redrawn": {n: frame.redrawn[n] for n in node.body.names if n in frame.redrawn},
        }

    def _iteration(self, plan: LoopPlan, frame: Frame, state, x):
        body, new_carry, ys, mask = self._body(plan, frame, state, x)
        new_state = plan.state_of(new_carry) | {"step": state["step"] + 1, "log_weights": body.log_weights}
        output = {"history": plan.collect(body, ys, mask), "blame": body.blame}
        if plan.node.until is not None:
            new_state["done"] = plan.stopped(new_carry, state)
        if plan.holds_sites:
            new_state["sites"] = plan.written(state["sites"], body, mask, x["t"])
        if plan.selects:
            if self.genealogy == "future":
                output["before"] = {"carry": new_state["carry"], "log_weights": body.log_weights}
            choice = Choice()
            if plan.looks_ahead:
                choice = Choice(ahead=self._foresee(plan, frame, state | new_state, x))
            elif self.ancestor_sampling is not None:
                choice = Choice(future=self._future(plan, frame, state | new_state, x))
            self._select(plan, state, new_state, output, x, choice)
        if plan.rejuvenates:
            self._rejuvenate(plan, frame, new_state, output, x)
        return new_state, output

    def _foresee(self, plan: LoopPlan, frame: Frame, state, x):
        """Try the next iteration with a key of its own; returns what `Selection.foresee` makes of its weights."""
        key = jax.random.fold_in(x["keys"][-1], 1)
        keys = jax.random.split(key, plan.node.body.num_keys + 1)
        increments = self._increments(plan, frame, state, x["next"] | {"keys": keys, "retained": {}})
        return jax.lax.stop_gradient(self.selection.foresee(jnp.where(x["t"] + 1 < plan.node.length, increments, 0.0)))

    def _future(self, plan: LoopPlan, frame: Frame, state, x) -> Callable[[], Any]:
        """Return what gives, `[N]`, the log-density of the retained particle's future after each particle."""
        if self.ancestor_sampling == "step":
            following = x["next"] | {"given": x["next"]["given"] | x["next"]["retained"], "retained": {}, "keys": None}
            increments = lambda: self._increments(plan, frame, state, following)  # noqa: E731
            return lambda: jnp.where(x["t"] + 1 < plan.node.length, increments(), 0.0)

        def whole():
            sites = plan.continued(state["sites"], frame.retained, x["t"])
            replayer, replay = self._replay(plan, frame, sites, keep=self.keep)
            replayer._walk(frame.block, frame.inputs, None, replay)
            _, prefix = self._replay(plan, frame, sites, stop=plan.start + x["t"] + 1)
            replayer._walk(frame.block, frame.inputs, None, prefix)
            possible = (prefix.log_weights > -jnp.inf) & plan.same_future(replay, x["t"])
            return jnp.where(possible, replay.log_weights - jnp.where(possible, prefix.log_weights, 0.0), -jnp.inf)

        return whole

    def _increments(self, plan: LoopPlan, frame: Frame, state, x):
        """Return what an iteration adds to the log-weights, `[N]`; 0 for the dead, and where that is not a number."""
        before = state["log_weights"]
        after = self._body(plan, frame, state, x)[0].log_weights
        comparable = (before > -jnp.inf) & ~jnp.isnan(after)
        return jnp.where(comparable, after - jnp.where(comparable, before, 0.0), 0.0)

    def _body(self, plan: LoopPlan, frame: Frame, state, x):
        """Walk the body once: its frame, the carry and outputs, and which particles it counts for; None for all."""
        node, flags = plan.node, plan.flags
        carry = plan.carry_lanes(state)
        constants = [plan.constant(a, state) for a in node.constants]
        active, running = frame.active, None
        if node.until is not None:
            running = self.map(jnp.logical_not, Lane(state["done"], flags.done))
        if plan.stop is not None:
            before = Lane(x["t"] < plan.stop)
            running = before if running is None else self.map(jnp.logical_and, running, before)
        if running is not None:
            active = running if active is None else self.map(jnp.logical_and, active, running)

        def walked(array, lane: Lane) -> Lane:
            # What a loop walks along was stored as the particles stood when it began.
            moved = lane.random and plan.keeps_index
            return Lane(take(array, state["index"]) if moved else array, lane.random)

        given = {name: walked(value, frame.given.get(name, Lane(None))) for name, value in x["given"].items()}
        body = Frame(state["log_weights"], given, active, frame.depth + 1, retained=x["retained"], redrawn=x["redrawn"])
        if plan.holds_sites:
            xs = [
                Lane(jax.lax.dynamic_index_in_dim(state["walked"][i], x["t"], 1, keepdims=False), True)
                if i in state["walked"]
                else Lane(array)
                for i, array in enumerate(x["xs"])
            ]
        else:
            xs = [walked(array, read(frame, atom)) for array, atom in zip(x["xs"], node.xs, strict=True)]
        args = [*constants, *carry, *xs]
        out = self.block(node.body, args, x["keys"], body)
        new_carry, ys = out[: len(carry)], out[len(carry) :]
        if running is not None:
            new_carry = [
                new if same or scratch else self.map(jnp.where, running, new, old)
                for old, new, same, scratch in zip(carry, new_carry, node.invariant, node.scratch, strict=True)
            ]
        return body, new_carry, ys, None if running is None else active

    def _select(self, plan: LoopPlan, state, new_state, output, x, choice: Choice) -> None:
        """Resample if it is due: changes `new_state`, and adds what happened to `output`."""
        ahead = choice.ahead
        selection, num, log_weights = self.selection, self.num_particles, new_state["log_weights"]
        weighing = choosing = selection.weigh(log_weights)
        if ahead is not None:
            choosing = selection.weigh(log_weights + ahead)
        progress = (x["t"] + 1).astype(jnp.float32) / plan.node.length
        due = selection.due(choosing, progress) if selection.may_resample else False
        moving = plan.moving(state, new_state)

        def resample(moving, log_weights):
            first = log_weights if ahead is None else log_weights + ahead
            key, retained = x["keys"][-1], {}
            if choice.future is not None:
                retained["retained"] = chance.categorical(jax.random.fold_in(key, 3), log_weights + choice.future())
            ancestors, children, mass, temperature = selection.select(key, first, choosing, progress, **retained)
            mass, temperature = (jnp.asarray(a, log_weights.dtype) for a in (mass, temperature))
            moving, ancestors = move(moving, ancestors, any_order=choice.future is None)
            start = children(ancestors)
            start = start if ahead is None else start - take(ahead, ancestors)
            return moving, start, mass, ancestors, temperature

        def stay(moving, log_weights):
            none = jnp.zeros((), log_weights.dtype)
            return moving, log_weights, none, jnp.arange(num, dtype=jnp.int32), none + 1

        if due is False:
            mass, ancestors, temperature = jnp.zeros((), log_weights.dtype), None, None
        elif due is True and not has_long_rows(moving):
            moving, log_weights, mass, ancestors, temperature = resample(moving, log_weights)
        else:  # in a branch, even one that is always taken, XLA overwrites long rows in place; outside it copies them
            predicate = x["t"] >= 0 if due is True else due
            moving, log_weights, mass, ancestors, temperature = jax.lax.cond(
                predicate, resample, stay, moving, log_weights
            )
        plan.put_back(new_state, moving)
        new_state["log_weights"] = log_weights
        new_state["log_mass"] = state["log_mass"] + mass
        output["diagnostics"] = {
            "ess": weighing.ess,
            "resampled": jnp.asarray(due),
            "log_evidence": state["log_mass"] + weighing.log_sum - jnp.log(float(num)),
        }
        if ancestors is not None:
            output["ancestors"] = ancestors
            if selection.anneals:
                output["diagnostics"]["temperature"] = temperature
        if self.progress is not None:
            self.progress(x["t"], plan.node.length, weighing.ess)

    # Moves between iterations, see `Rejuvenation` ---------------------------------------------------------------------

    def _rejuvenate(self, plan: LoopPlan, frame: Frame, new_state, output, x) -> None:
        """Move the particles if that is due: changes `new_state`, and adds what happened to `output`."""
        stop = plan.start + x["t"] + 1
        held = plan.computed(new_state)

        def moved(sites, held):
            key = jax.random.fold_in(x["keys"][-1], 2)
            new_sites, acceptance = self.rejuvenation.move(key, sites, stop)
            replayer, replay = self._replay(plan, frame, new_sites, stop=stop)
            later = replayer._walk(frame.block, frame.inputs, None, replay, before=plan.node)
            there = LoopPlan(replayer, plan.node, replay, later)
            state, _ = replayer._iterate(there, None, replay)
            new_held = plan.computed(plan.replayed(there, state, replay))
            # Those that did not move keep what they had, to the bit.
            same = [jnp.all((sites[name] == new_sites[name]).reshape(self.num_particles, -1), axis=1) for name in sites]
            stay = functools.reduce(jnp.logical_and, same, jnp.ones(self.num_particles, bool))

            def kept(old, new):
                return jnp.where(stay.reshape(-1, *(1,) * (old.ndim - 1)), old, new)

            return new_sites, jax.tree.map(kept, held, new_held), jnp.asarray(acceptance, jnp.float32)

        def stayed(sites, held):
            return sites, held, jnp.float32(jnp.nan)

        due = stop % self.rejuvenation.every == 0
        sites, held, acceptance = jax.lax.cond(due, moved, stayed, new_state["sites"], held)
        plan.put_computed(new_state, held)
        new_state["sites"] = sites
        output["diagnostics"]["acceptance"] = acceptance

    def _replay(self, plan: LoopPlan, frame: Frame, sites, *, stop=None, keep=frozenset()):
        """Return an interpreter and the frame in which it walks a program along given sites, `[N, ...]` by name."""
        replayer = Interpreter(self.num_particles, weigh_draws=True, keep=keep)
        given = frame.given | {name: Lane(value, True) for name, value in sites.items()}
        replay = replayer._frame(given, frame.block, frame.inputs)
        replay.stop = stop
        return replayer, replay


@jax.custom_batching.custom_vmap
def _all_of_all(flags):
    """Return whether all flags are set; under `jax.vmap` those of all lanes, so that a loop has one predicate."""
    return jnp.all(flags)


@_all_of_all.def_vmap
def _all_of_all_lanes(axis_size, in_batched, flags):
    del axis_size, in_batched
    return _all_of_all(flags), False


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
