"""Running a staged program: for one trace, or for a population of particles.

The interpreter walks a `Block` with every live value at hand. A value is a `Lane`: an array that is either shared by
all particles or has a leading particle axis. Deterministic stretches run under `jax.vmap` over the lanes that differ;
statements go to the methods `_draw`, `_score` and `_loop`.

For particles n = 1..N the interpreter keeps log-weights w_n and log Z, with the invariant (law L2)

    E[ Z * (1/N) sum_n exp(w_n) f(x_n) ] = integral of f under the program's measure so far.       (1)

    sample, drawn from the program      x_n ~ p               w_n unchanged
    sample, drawn from a proposal q     x_n ~ q               w_n += log p(x_n) - log q(x_n)
    sample with a given value           x_n = value           w_n += log p(value)
    observe, factor                                           w_n += log-density, log-weight
    selection (end of an outermost iteration)                 see `Selection`

Selection replaces particle n by its ancestor. A particle moves whole (law L3): the loop's carry, what its body closes
over, and, by the composed ancestor index once the loop has ended, whatever lives across it. Histories are stored
as they were drawn, with the ancestors, and traced back once.

A particle at -inf stays there, and NaN that it meets later is ignored (law L5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from ppl import dataflow, draws
from ppl.ir import Block, Draw, Given, Literal, Loop, Record, Score, Stretch

__all__ = ["Interpreter", "Lane", "Result", "Selection", "Weighing"]


class Lane(NamedTuple):
    """A value: shared by all particles, or one for each along a leading axis."""

    array: Any
    random: bool = False


class Weighing(NamedTuple):
    """What selection knows of the weights: their log-sum and their effective sample size, both scalars."""

    log_sum: Any
    ess: Any


class Selection(Protocol):
    """What a population algorithm does at the end of an iteration of an outermost loop.

    `may_resample` is False for algorithms that only watch the weights.
    """

    may_resample: bool

    def weigh(self, log_weights) -> Weighing:
        """Summarise log-weights `[N]`."""

    def due(self, weighing: Weighing):
        """Return whether to resample now: a Python bool where that is fixed beforehand, else a traced one."""

    def select(self, key, log_weights, weighing: Weighing):
        """Return (ancestors `int32[N]`, their new log-weights `[N]`, the log-mass taken out of the weights).

        Invariant (1) must hold: E[sum over offspring of exp(new w) * exp(mass)] = exp(w) for each particle.
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


@dataclasses.dataclass
class _Frame:
    """The state of a walk through one block."""

    log_weights: Any
    given: Mapping[str, Lane]
    active: Lane | None = None
    depth: int = 0
    log_mass: Any = 0.0
    env: dict[int, Lane] = dataclasses.field(default_factory=dict)
    records: dict[str, tuple[int, int | None]] = dataclasses.field(default_factory=dict)
    blame: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    diagnostics: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def new_variable(self, lane: Lane) -> int:
        """Put a value beside the block's own variables."""
        variable = -len(self.env) - 1
        self.env[variable] = lane
        return variable


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """How to run a program.

    Attributes:
        num_particles: how many particles; None runs one trace, without a particle axis.
        selection: what happens at the end of outermost iterations, if anything.
        weigh_draws: add the log-density of drawn values too: the result is the trace's joint log-density.
        keep: the names of the sites to store; None stores all but internal ones.
        early_exit: leave a loop once every particle is frozen. False runs all iterations, as differentiation needs.
        blame: count, for each site, the particles that it killed or gave an invalid weight.
        progress: called with (iteration, length, ess) inside outermost loops.
    """

    num_particles: int | None = None
    selection: Selection | None = None
    weigh_draws: bool = False
    keep: frozenset[str] | None = None
    early_exit: bool = True
    blame: bool = False
    progress: Callable | None = None

    def run(self, block: Block, inputs, key=None, given: Mapping[str, Any] | None = None) -> Result:
        """Run a program.

        Args:
            block: the staged program.
            inputs: its inputs' values, the same for all particles.
            key: the source of all draws; None where every site is given.
            given: values for sites, loops' time axes leading; such a site is not drawn but weighed.
        """
        shape = () if self.num_particles is None else (self.num_particles,)
        frame = _Frame(jnp.zeros(shape), {name: Lane(value) for name, value in (given or {}).items()})
        keys = None if key is None else jax.random.split(key, max(block.num_keys, 1))
        value = self._block(block, [Lane(jnp.asarray(x)) for x in inputs], keys, frame)
        sites = {name: frame.env[v] for name, (v, _) in frame.records.items()}
        present = {name: None if p is None else frame.env[p] for name, (_, p) in frame.records.items()}
        return Result(value, sites, present, frame.log_weights, frame.log_mass, frame.diagnostics, frame.blame)

    # One block -------------------------------------------------------------------------------------------------------

    def _block(self, block: Block, args: list[Lane], keys, frame: _Frame) -> list[Lane]:
        frame.env.update(zip(block.inputs, args, strict=True))
        outputs = {a for a in block.outputs if isinstance(a, int)}
        needed_later = _needed_later(block, outputs)
        for segment, later in zip(block.segments, needed_later, strict=True):
            if isinstance(segment, Stretch):
                lanes = self._apply(segment, [frame.env[v] for v in segment.inputs], segment)
                frame.env.update(zip(segment.outputs, lanes, strict=True))
            elif isinstance(segment, Draw):
                self._draw(segment, keys, frame)
            elif isinstance(segment, Score):
                self._score(segment, frame)
            elif isinstance(segment, Record):
                if self._keeps(segment.name, segment.internal):
                    frame.records[segment.name] = frame.new_variable(_read(frame, segment.value)), None
            elif isinstance(segment, Given):
                frame.given = {**frame.given, segment.name: _read(frame, segment.value)}
            else:
                self._loop(segment, keys, frame, later)
        return [_read(frame, a) for a in block.outputs]

    def _apply(self, function: Callable, lanes: list[Lane], stretch: Stretch | None = None) -> list[Lane]:
        """Apply a function of one particle's values, returning a list, to lanes."""
        arrays, random = [lane.array for lane in lanes], [lane.random for lane in lanes]
        if not any(random):
            return [Lane(array) for array in function(*arrays)]
        if stretch is None:
            out_random, out_axes = None, 0
        else:
            out_random = draws._spread(stretch, dict(zip(stretch.inputs, random, strict=True)))
            out_axes = [0 if flag else None for flag in out_random]
        in_axes = tuple(0 if flag else None for flag in random)
        results = jax.vmap(function, in_axes, out_axes, axis_size=self.num_particles)(*arrays)
        return [
            Lane(array, True if out_random is None else flag)
            for array, flag in zip(results, out_random or results, strict=True)
        ]

    def _map(self, function: Callable, *lanes: Lane) -> Lane:
        """Apply an elementwise function of one particle's values to lanes."""
        return self._apply(lambda *arrays: [function(*arrays)], list(lanes))[0]

    def _full(self, lane: Lane) -> Any:
        """Return a lane's array with the particle axis, if this run has one."""
        if lane.random or self.num_particles is None:
            return lane.array
        return jnp.broadcast_to(lane.array, (self.num_particles, *jnp.shape(lane.array)))

    def _keeps(self, name: str, internal: bool) -> bool:
        return not internal if self.keep is None else name in self.keep

    # Statements ------------------------------------------------------------------------------------------------------

    def _draw(self, node: Draw, keys, frame: _Frame) -> None:
        if node.name in frame.given:
            lane = frame.given[node.name]
            lane = Lane(jnp.asarray(lane.array, node.aval.dtype), lane.random)
        else:
            proposed = node.proposal is not None and not self.weigh_draws
            sampler, parameters = (
                (node.proposal, node.proposal_parameters) if proposed else (node.sampler, node.parameters)
            )
            lanes = [_read(frame, a) for a in parameters]
            arrays, key = [lane.array for lane in lanes], keys[node.key_index]
            if self.num_particles is None:
                lane = Lane(draws.draw(sampler, arrays, key))
            else:
                random = tuple(lane.random for lane in lanes)
                lane = Lane(draws.draw_population(sampler, arrays, random, key, self.num_particles), True)
        frame.env[node.output] = lane
        if self._keeps(node.name, node.internal):
            frame.records[node.name] = node.output, None

    def _score(self, node: Score, frame: _Frame) -> None:
        increment = _read(frame, node.log_density)
        if node.kind == "sample" and node.name not in frame.given and not self.weigh_draws:
            if node.log_proposal is None:
                return
            increment = self._map(jnp.subtract, increment, _read(frame, node.log_proposal))
        if frame.active is not None:
            increment = self._map(lambda active, x: jnp.where(active, x, 0.0), frame.active, increment)
        before = frame.log_weights
        dead = before == -jnp.inf
        frame.log_weights = jnp.where(dead, before, before + increment.array.astype(before.dtype))
        if self.blame:
            frame.blame[node.name] = {
                "invalid": jnp.sum(~dead & (jnp.isnan(frame.log_weights) | (frame.log_weights == jnp.inf))),
                "killed": jnp.sum(~dead & (frame.log_weights == -jnp.inf)),
            }

    # Loops -----------------------------------------------------------------------------------------------------------

    def _loop(self, node: Loop, keys, frame: _Frame, needed_later: set[int]) -> None:
        plan = _LoopPlan(self, node, frame, needed_later)
        iteration_keys = None
        if keys is not None:
            iteration_keys = jax.random.split(keys[node.key_index], (node.length, node.body.num_keys + 1))
        state, out = self._iterate(plan, iteration_keys, frame)
        steps = state["step"]
        frame.log_weights = state["log_weights"]

        # What the particles hold now.
        carry = iter(state["carry"])
        for i, variable in enumerate(node.outputs[: len(node.init)]):
            if node.invariant[i]:
                frame.env[variable] = plan.constant(node.init[i], state)
            else:
                frame.env[variable] = Lane(next(carry), plan.flags.carry[i])
        if plan.selects:
            frame.log_mass = state["log_mass"]
            for variable, lane in plan.captured_lanes(state).items():
                frame.env[variable] = lane
            for variable in plan.carried_across:
                frame.env[variable] = Lane(_take(frame.env[variable].array, state["index"]), True)
            diagnostics = _finish_diagnostics(out["diagnostics"], steps)
            frame.diagnostics.append(diagnostics | ({"ancestors": out["ancestors"]} if plan.moves else {}))

        # What they went through.
        histories = out["history"]
        if plan.selects and plan.moves:
            moving = [i for i, flag in enumerate(plan.box["random"]) if flag]
            traced = _trace_back(out["ancestors"], out["diagnostics"]["resampled"], [histories[i] for i in moving])
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
            frame.blame[name] = {kind: count if frame.depth == 0 else count.sum() for kind, count in counts.items()}

    def _iterate(self, plan: _LoopPlan, keys, frame: _Frame):
        """Run the iterations; returns the last state and what each iteration put out, stacked."""
        node = plan.node
        state = plan.initial_state(frame)
        xs = {
            "t": jnp.arange(node.length),
            "xs": [_time_first(_read(frame, a)) for a in node.xs],
            "given": {n: _time_first(frame.given[n]) for n in node.body.names if n in frame.given},
            "keys": keys,
        }

        def iteration(state, x):
            return self._iteration(plan, frame, state, x)

        if node.length == 0:
            first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
            shapes = jax.eval_shape(iteration, state, first)[1]
            return state, jax.tree.map(lambda s: jnp.zeros((0, *s.shape), s.dtype), shapes)
        if node.until is None or not self.early_exit:
            return jax.lax.scan(iteration, state, xs)

        # Frozen particles change nothing, so the loop may end once all are: a while loop that fills the stacks itself.
        first = jax.tree.map(lambda a: a[0], xs)
        program, shapes = jax.make_jaxpr(iteration, return_shape=True)(state, first)
        run, tree = jex.jaxpr_as_fun(program), jax.tree.structure(shapes)
        stacks = jax.tree.map(lambda s: jnp.zeros((node.length, *s.shape), s.dtype), shapes[1])
        if "ancestors" in stacks:
            stacks["ancestors"] = stacks["ancestors"] + jnp.arange(self.num_particles, dtype=jnp.int32)

        def running(loop_state):
            state, _ = loop_state
            return (state["step"] < node.length) & ~jnp.all(state["done"])

        def step(loop_state):
            state, stacks = loop_state
            x = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, state["step"], keepdims=False), xs)
            new_state, out = jax.tree.unflatten(tree, run(*jax.tree.leaves((state, x))))
            write = lambda stack, o: jax.lax.dynamic_update_index_in_dim(stack, o, state["step"], 0)  # noqa: E731
            return new_state, jax.tree.map(write, stacks, out)

        return jax.lax.while_loop(running, step, (state, stacks))

    def _iteration(self, plan: _LoopPlan, frame: _Frame, state, x):
        node, flags = plan.node, plan.flags
        carry = plan.carry_lanes(state)
        constants = [plan.constant(a, state) for a in node.constants]
        active = frame.active
        done = None
        if node.until is not None:
            done = Lane(state["done"], flags.done)
            running = self._map(jnp.logical_not, done)
            active = running if active is None else self._map(jnp.logical_and, active, running)

        random_xs = [_read(frame, a).random for a in node.xs]
        body = _Frame(
            state["log_weights"],
            {name: Lane(value, frame.given[name].random) for name, value in x["given"].items()},
            active,
            frame.depth + 1,
        )
        args = [*constants, *carry, *(Lane(a, flag) for a, flag in zip(x["xs"], random_xs, strict=True))]
        out = self._block(node.body, args, x["keys"], body)
        new_carry, ys = out[: len(carry)], out[len(carry) :]
        if done is not None:
            new_carry = [
                new if same or scratch else self._map(jnp.where, done, old, new)
                for old, new, same, scratch in zip(carry, new_carry, node.invariant, node.scratch, strict=True)
            ]
        new_state = plan.state_of(new_carry) | {"step": state["step"] + 1, "log_weights": body.log_weights}
        output = {
            "history": plan.collect(body, ys, active if done is not None else None),
            "blame": body.blame,
        }
        if done is not None:
            new_state["done"] = plan.stopped(new_carry, state, done)
        if plan.selects:
            self._select(plan, state, new_state, output, x)
        return new_state, output

    def _select(self, plan: _LoopPlan, state, new_state, output, x) -> None:
        """Resample if it is due: changes `new_state`, and adds what happened to `output`."""
        selection, num, log_weights = self.selection, self.num_particles, new_state["log_weights"]
        weighing = selection.weigh(log_weights)
        due = selection.due(weighing) if selection.may_resample else False
        moving = plan.moving(state, new_state)

        def move(moving, log_weights):
            ancestors, new_weights, mass = selection.select(x["keys"][-1], log_weights, weighing)
            mass = jnp.asarray(mass, log_weights.dtype)
            return _move(moving, ancestors), new_weights, mass, ancestors

        def stay(moving, log_weights):
            return moving, log_weights, jnp.zeros((), log_weights.dtype), jnp.arange(num, dtype=jnp.int32)

        if due is True:
            moving, log_weights, mass, ancestors = move(moving, log_weights)
        elif due is False:
            mass, ancestors = jnp.zeros((), log_weights.dtype), None
        else:
            moving, log_weights, mass, ancestors = jax.lax.cond(due, move, stay, moving, log_weights)
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
        if self.progress is not None:
            self.progress(x["t"], plan.node.length, weighing.ess)


class _LoopPlan:
    """What is known of a loop before it runs: which values are random, captured, moved, and kept."""

    def __init__(self, interpreter: Interpreter, node: Loop, frame: _Frame, needed_later: set[int]):
        self.interpreter, self.node, self.frame = interpreter, node, frame
        self.flags = self._flags()
        self.selects = interpreter.selection is not None and node.resamples and frame.depth == 0
        self.moves = self.selects and interpreter.selection.may_resample
        # Values the iterations read that are not carried: the body's and until's constants, untouched carry.
        untouched = [a for a, same in zip(node.init, node.invariant, strict=True) if same]
        read = dict.fromkeys(a for a in (*node.constants, *node.until_constants, *untouched) if isinstance(a, int))
        random = [v for v in read if frame.env[v].random]
        self.captured = random if self.moves else []
        recorded = {v for pair in frame.records.values() for v in pair if v is not None}
        across = (needed_later | recorded) & frame.env.keys() - set(self.captured)
        self.carried_across = sorted(v for v in across if frame.env[v].random) if self.moves else []
        outputs = node.outputs[len(node.init) :]
        self.wanted_ys = [i for i, variable in enumerate(outputs) if variable in needed_later]
        self.box: dict[str, Any] = {}  # found while the body is traced: the layout of its histories

    def _flags(self) -> dataflow.LoopFlags:
        node, frame = self.node, self.frame
        if self.interpreter.num_particles is None:
            num_ys = len(node.outputs) - len(node.init)
            return dataflow.LoopFlags(((False,) * len(node.init), (False,) * num_ys, False))
        groups = [
            tuple(_read(frame, a).random for a in group)
            for group in (node.constants, node.until_constants, node.init, node.xs)
        ]
        shared_given = frozenset(name for name, lane in frame.given.items() if not lane.random)
        return dataflow.loop_flags(node, *groups, shared_given)

    def initial_state(self, frame: _Frame) -> dict[str, Any]:
        interpreter, node = self.interpreter, self.node
        init = [_read(frame, a) for a in node.init]
        state = self.state_of(init) | {"step": jnp.zeros((), jnp.int32), "log_weights": frame.log_weights}
        if self.selects:
            state["log_mass"] = jnp.asarray(frame.log_mass, frame.log_weights.dtype)
            state["captured"] = [frame.env[v].array for v in self.captured]
            if self.carried_across:
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
        return {"carry": [self.interpreter._full(lane) if flag else lane.array for lane, flag in changing]}

    def carry_lanes(self, state) -> list[Lane]:
        arrays = iter(state["carry"])
        return [
            self.constant(atom, state) if same else Lane(next(arrays), flag)
            for atom, flag, same in zip(self.node.init, self.flags.carry, self.node.invariant, strict=True)
        ]

    def constant(self, atom, state) -> Lane:
        """Return a value that the iterations read, moved with its particle if it is random."""
        if isinstance(atom, int) and atom in self.captured:
            return Lane(state["captured"][self.captured.index(atom)], True)
        return _read(self.frame, atom)

    def captured_lanes(self, state) -> dict[int, Lane]:
        return {v: Lane(array, True) for v, array in zip(self.captured, state["captured"], strict=True)}

    def stopped(self, carry: list[Lane], state, done: Lane | None):
        """Return which particles stop before the next iteration."""
        node, interpreter = self.node, self.interpreter
        frame = _Frame(None, {})
        constants = [self.constant(a, state) for a in node.until_constants]
        (stop,) = interpreter._block(node.until, [*constants, *carry], None, frame)
        if done is not None:
            stop = interpreter._map(jnp.logical_or, done, stop)
        return interpreter._full(stop) if self.flags.done else stop.array

    def collect(self, body: _Frame, ys: list[Lane], active: Lane | None) -> list[Any]:
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
            lanes = [self.interpreter._map(zero, active, lane) for lane in lanes]
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
        changing = [flag for flag, same in zip(self.flags.carry, self.node.invariant, strict=True) if not same]
        moved = iter(moving["carry"])
        new_state["carry"] = [next(moved) if flag else a for a, flag in zip(new_state["carry"], changing, strict=True)]
        new_state.update({name: value for name, value in moving.items() if name != "carry"})


def _needed_later(block: Block, outputs: set[int]) -> list[set[int]]:
    """Return, for each segment, the variables that are read after it."""
    needed, sets = set(outputs), []
    for segment in reversed(block.segments):
        sets.append(set(needed))
        needed.update(a for a in segment.inputs if isinstance(a, int))
    return sets[::-1]


def _read(frame: _Frame, atom) -> Lane:
    return Lane(jnp.asarray(atom.value)) if isinstance(atom, Literal) else frame.env[atom]


def _take(array, index):
    return array.at[index].get(mode="promise_in_bounds")


def _time_first(lane: Lane):
    return jnp.moveaxis(lane.array, 1, 0) if lane.random else lane.array


def _move(tree: Any, ancestors) -> Any:
    """Replace every particle's arrays by its ancestor's.

    Numbers of one type are moved side by side in one gather: looking an ancestor up costs more than copying it.
    """
    leaves, structure = jax.tree.flatten(tree)
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype if leaf.ndim == 1 else i, []).append(i)
    for members in groups.values():
        if len(members) == 1:
            leaves[members[0]] = _take(leaves[members[0]], ancestors)
        else:
            rows = _take(jnp.stack([leaves[i] for i in members], axis=-1), ancestors)
            for column, i in enumerate(members):
                leaves[i] = rows[:, column]
    return jax.tree.unflatten(structure, leaves)


def _trace_back(ancestors, resampled, histories: list[Any]) -> list[Any]:
    """Return histories `[T, N, ...]` along the ancestral lines of the last particles."""
    if not histories:
        return []

    def step(index, x):
        parents, moved, rows = x
        index = jax.lax.cond(moved, lambda: _take(parents, index), lambda: index)
        return index, [_take(row, index) for row in rows]

    last = jnp.arange(ancestors.shape[1], dtype=jnp.int32)
    return jax.lax.scan(step, last, (ancestors, resampled, histories), reverse=True)[1]


def _finish_diagnostics(diagnostics: dict[str, Any], steps) -> dict[str, Any]:
    """Repeat the last figures over iterations that a loop left out because every particle was frozen."""
    length = diagnostics["ess"].shape[0]
    if length == 0:
        return diagnostics
    ran = jnp.arange(length) < steps
    last = jnp.maximum(steps - 1, 0)
    for name in ("ess", "log_evidence"):
        diagnostics[name] = jnp.where(ran, diagnostics[name], diagnostics[name][last])
    return diagnostics
