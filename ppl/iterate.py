"""The iterations of a loop: one after another, in a scan or in a while loop that ends once all particles are frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from ppl import replay
from ppl.lanes import Frame, Lane, read, take, time_first
from ppl.loops import LoopPlan
from ppl.selection import Choice, select

__all__ = ["iterate", "rows", "walk_body"]


def iterate(
    plan: LoopPlan, keys: Any, *, state: dict[str, Any] | None = None, also: Callable | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the iterations; returns the last state and what each iteration put out, stacked.

    Args:
        plan: the loop's plan.
        keys: the source of all draws, `[T, num_keys + 1]`, the last of each iteration for its end; None without draws.
        state: where to begin, at its `step`, in loops that may end early; None is before the first iteration.
        also: gives, from the state before an iteration, what it puts out besides: a dict.
    """
    node = plan.node
    state = plan.initial_state() if state is None else state
    xs = rows(plan) | {"keys": keys}
    if plan.looks_ahead or plan.interpreter.ancestor_sampling == "step":
        following = {name: xs[name] for name in ("t", "xs", "given", "retained")}
        xs["next"] = jax.tree.map(lambda a: jnp.roll(a, -1, 0), following) | {"redrawn": {}}

    def iteration(state, x):
        new_state, output = _iteration(plan, state, x)
        return new_state, output if also is None else output | also(state)

    if node.length == 0:
        first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
        shapes = jax.eval_shape(iteration, state, first)[1]
        return state, jax.tree.map(lambda s: jnp.zeros((0, *s.shape), s.dtype), shapes)
    if not plan.may_end_early:
        return jax.lax.scan(iteration, state, xs)
    return _until_all_are_frozen(plan, iteration, state, xs)


def _until_all_are_frozen(plan: LoopPlan, iteration: Callable, state, xs):
    """Run iterations while they change something: a while loop that fills the stacks itself."""
    node, num = plan.node, plan.interpreter.num_particles
    last = node.length if plan.stop is None else jnp.minimum(plan.stop, node.length)
    first = jax.tree.map(lambda a: a[0], xs)

    def running(state):
        going_on = state["step"] < last
        if node.until is None:
            return going_on
        # Where nothing is resampled, iterations of the frozen change nothing: runs side by side end together.
        return going_on & ~(jnp.all if plan.moves else _all_of_all)(state["done"])

    def idle(shapes):
        out = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return out | ({"ancestors": jnp.arange(num, dtype=jnp.int32)} if "ancestors" in out else {})

    if plan.interpreter.path is not None:
        return _scan_while(running, iteration, idle, state, xs)
    program, shapes = jax.make_jaxpr(iteration, return_shape=True)(state, first)
    run, tree = jex.jaxpr_as_fun(program), jax.tree.structure(shapes)
    stacks = jax.tree.map(lambda row: jnp.broadcast_to(row, (node.length, *row.shape)), idle(shapes[1]))

    def step(loop_state):
        state, stacks = loop_state
        x = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, state["step"], keepdims=False), xs)
        new_state, out = jax.tree.unflatten(tree, run(*jax.tree.leaves((state, x))))
        write = lambda stack, o: jax.lax.dynamic_update_index_in_dim(stack, o, state["step"], 0)  # noqa: E731
        return new_state, jax.tree.map(write, stacks, out)

    return jax.lax.while_loop(lambda loop_state: running(loop_state[0]), step, (state, stacks))


def _scan_while(running: Callable, iteration: Callable, idle: Callable, state, xs):
    """Run the same iterations in a scan, which has a derivative in reverse; a branch passes those that do not run."""

    def step(state, x):
        shapes = jax.eval_shape(iteration, state, x)[1]
        return jax.lax.cond(running(state), iteration, lambda state, x: (state, idle(shapes)), state, x)

    return jax.lax.scan(step, state, xs)


def rows(plan: LoopPlan) -> dict[str, Any]:
    """Return what the iterations are given one after another, time axes leading."""
    node, frame = plan.node, plan.frame
    return {
        "t": jnp.arange(node.length),
        "xs": [time_first(read(frame, a)) for a in node.xs],
        "given": {n: time_first(frame.given[n]) for n in node.body.names if n in frame.given},
        "retained": {n: frame.retained[n] for n in node.body.names if n in frame.retained},
        "redrawn": {n: frame.redrawn[n] for n in node.body.names if n in frame.redrawn},
    }


def _iteration(plan: LoopPlan, state, x):
    body, new_carry, ys, mask = walk_body(plan, state, x)
    new_state = plan.state_of(new_carry) | {"step": state["step"] + 1, "log_weights": body.log_weights}
    output = {"history": plan.collect(body, ys, mask), "blame": body.blame}
    if plan.node.until is not None:
        new_state["done"] = plan.stopped(new_carry, state)
    if plan.holds_sites:
        new_state["sites"] = plan.written(state["sites"], body, mask, x["t"])
    if plan.selects:
        if plan.interpreter.genealogy == "future":
            output["before"] = {"carry": new_state["carry"], "log_weights": body.log_weights}
        choice = Choice()
        if plan.looks_ahead:
            choice = Choice(ahead=_foresee(plan, state | new_state, x))
        elif plan.interpreter.ancestor_sampling is not None:
            choice = Choice(future=_future(plan, state | new_state, x))
        select(plan, state, new_state, output, x, choice)
    if plan.rejuvenates:
        replay.rejuvenate(plan, new_state, output, x)
    return new_state, output


def _foresee(plan: LoopPlan, state, x):
    """Try the next iteration with a key of its own; returns what `Selection.foresee` makes of its weights."""
    key = jax.random.fold_in(x["keys"][-1], 1)
    keys = jax.random.split(key, plan.node.body.num_keys + 1)
    increments = _increments(plan, state, x["next"] | {"keys": keys, "retained": {}})
    return jax.lax.stop_gradient(
        plan.interpreter.selection.foresee(jnp.where(x["t"] + 1 < plan.node.length, increments, 0.0))
    )


def _future(plan: LoopPlan, state, x) -> Callable[[], Any]:
    """Return what gives, `[N]`, the log-density of the retained particle's future after each particle."""
    if plan.interpreter.ancestor_sampling == "replay":
        return lambda: replay.log_density_of_future(plan, state["sites"], x["t"])
    following = x["next"] | {"given": x["next"]["given"] | x["next"]["retained"], "retained": {}, "keys": None}
    return lambda: jnp.where(x["t"] + 1 < plan.node.length, _increments(plan, state, following), 0.0)


def _increments(plan: LoopPlan, state, x):
    """Return what an iteration adds to the log-weights, `[N]`; 0 for the dead, and where that is not a number."""
    before = state["log_weights"]
    after = walk_body(plan, state, x)[0].log_weights
    comparable = (before > -jnp.inf) & ~jnp.isnan(after)
    return jnp.where(comparable, after - jnp.where(comparable, before, 0.0), 0.0)


def walk_body(plan: LoopPlan, state, x):
    """Walk the body once: its frame, the carry and outputs, and which particles it counts for; None for all."""
    node, frame, flags, interpreter = plan.node, plan.frame, plan.flags, plan.interpreter
    carry = plan.carry_lanes(state)
    constants = [plan.constant(a, state) for a in node.constants]
    active, running = frame.active, None
    if node.until is not None:
        running = interpreter.map(jnp.logical_not, Lane(state["done"], flags.done))
    if plan.stop is not None:
        before = Lane(x["t"] < plan.stop)
        running = before if running is None else interpreter.map(jnp.logical_and, running, before)
    if running is not None:
        active = running if active is None else interpreter.map(jnp.logical_and, active, running)

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
    out = interpreter.block(node.body, args, x["keys"], body)
    new_carry, ys = out[: len(carry)], out[len(carry) :]
    if running is not None:
        new_carry = [
            new if same or scratch else interpreter.map(jnp.where, running, new, old)
            for old, new, same, scratch in zip(carry, new_carry, node.invariant, node.scratch, strict=True)
        ]
    return body, new_carry, ys, None if running is None else active


@jax.custom_batching.custom_vmap
def _all_of_all(flags):
    """Return whether all flags are set; under `jax.vmap` those of all lanes, so that a loop has one predicate."""
    return jnp.all(flags)


@_all_of_all.def_vmap
def _all_of_all_lanes(axis_size, in_batched, flags):
    del axis_size, in_batched
    return _all_of_all(flags), False
