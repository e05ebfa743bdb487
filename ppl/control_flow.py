"""`ppl.scan`: the loop in which population algorithms work.

The signature and result are those of `jax.lax.scan`. The step is traced once to a program of its own and bound as one
equation, so that an interpreter can act between iterations: resample particles, stop frozen ones, store histories.

Two kinds of carry need no care from the user. A leaf that the step hands on untouched (a prompt's cache, parameters) is
a constant of the loop. A node that can say more about itself than its arrays do has the methods of `LoopCarry`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from ppl.errors import SiteTypeError, SiteValueError, user_line
from ppl.primitives import Inner, loop_p, trace
from ppl.staging import current_staging, staging_options

__all__ = ["LoopCarry", "NoRoom", "scan"]


class NoRoom(ValueError):
    """A node of a loop's carry cannot have the room that is asked for."""


@runtime_checkable
class LoopCarry(Protocol):
    """What a pytree node in the carry may tell `ppl.scan` about itself.

    A node that grows, as the cache of a language model does, has a fixed shape inside a loop: room for all iterations
    is made before it. The step is traced once to see how many entries an iteration adds to the carry. A node is a
    value: what a step adds to it and does not return has room in that step alone, which the node sees to itself.
    """

    def enter_loop(self, count: int, length: int) -> Any:
        """Return the node as each of `length` iterations sees it, with room for `count` entries in each of them.

        Raises:
            NoRoom: it cannot have so much.
        """

    def end_iteration(self, entered: Any) -> tuple[Any, int]:
        """Return the node as it enters the next iteration, and how many entries it has more than `entered`.

        `entered` is the node that entered this iteration in the same place of the carry; this one may be another's
        successor. It must have the shapes of `entered` where that has room for as many entries.
        """

    def exit_loop(self, count: int, length: int) -> Any:
        """Return the node for use after a loop of `length` iterations that added at most `count` entries each."""

    def scratch(self) -> Any:
        """Return the node with a bool for each leaf: whether it may hold anything once the particle is frozen.

        What later iterations wrote there is read by none that began before them: a run may begin anew in the middle of
        the loop with such a leaf as it stands at the end.
        """


def scan(
    step: Callable,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    until: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any]:
    """Run `step` once for each element of `xs`, carrying a state.

    Args:
        step: maps (carry, x) to (carry, y). Sites inside gain a leading time axis.
        init: the first carry, a pytree of arrays.
        xs: a pytree of arrays with one leading axis length, or None.
        length: the number of iterations, needed where `xs` is None.
        until: maps a carry to a bool, tested before each iteration, the first included. A particle for which it holds
            is frozen: its carry stays, later iterations contribute no density, its ys and sites there are zeros.

    Returns:
        The last carry, and the ys stacked on a leading axis, `[length, ...]`.

    Raises:
        SiteTypeError: `step` returns a carry of another structure, shape or type than it was given.
        SiteValueError: `xs` and `length` disagree, or neither is given.
    """
    staging = current_staging("ppl.scan")
    where = user_line()
    xs_leaves, xs_tree = jax.tree.flatten(xs)
    xs_leaves = _arrays(xs_leaves, "xs", where)
    length = _length(xs_leaves, length, where)
    x_types = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in xs_leaves]

    used, tried = 1, set()
    # A fixpoint of two questions that only a trace of the step answers: what types the carry settles on
    # (as in `jax.lax.scan`, a weakly typed leaf may be promoted) and how many entries an iteration uses (mostly one).
    carry = None
    for _ in range(8):
        try:
            carry = _enter(init, used, length) if carry is None else carry
            leaves, tree = jax.tree.flatten(carry)
            leaves = _arrays(leaves, "the carry", where)
            with staging_options(inner=True):
                body, constants, out_tree, y_tree, slots = _trace_step(step, tree, leaves, xs_tree, x_types, where)
        except NoRoom:
            if tried:
                raise
            carry, used, tried = None, 0, {used}  # there was no room for a guess
            continue
        if tree != out_tree:
            raise SiteTypeError(
                f"ppl.scan at {where}: the step was given a carry of structure {tree} and returned {out_tree}. "
                "They must agree."
            )
        if slots > used or slots < used and slots not in tried:
            tried.add(used)
            carry, used = None, slots
            continue
        promoted, changed = _promote(leaves, body.out_avals[: len(leaves)], carry, where)
        if not changed:
            break
        carry = jax.tree.unflatten(tree, promoted)
    else:
        raise SiteTypeError(f"ppl.scan at {where}: the types of the carry do not settle.")

    stop, stop_constants = None, []
    if until is not None:
        # It is asked after the last iteration too.
        def stops(*flat):
            return _as_bool(until(_exit(jax.tree.unflatten(tree, flat), used, length)), where)

        stop, stop_constants = trace(stops, *_types(leaves))
    outputs = loop_p.bind(
        *constants, *stop_constants, *leaves, *xs_leaves,
        body=body, until=stop, num_constants=len(constants), num_until_constants=len(stop_constants),
        num_carry=len(leaves), length=length, scratch=tuple(jax.tree.leaves(_scratch(carry))),
        resamples=not staging.inner, where=where, owner=staging.owner,
    )  # fmt: skip
    last = jax.tree.unflatten(tree, outputs[: len(leaves)])
    return _exit(last, used, length), jax.tree.unflatten(y_tree, outputs[len(leaves) :])


@loop_p.def_abstract_eval
def _loop_type(*_, body: Inner, num_carry: int, length: int, **__):
    carry, ys = body.out_avals[:num_carry], body.out_avals[num_carry:]
    return [*carry, *(y.update(shape=(length, *y.shape)) for y in ys)]


def _trace_step(step, tree, leaves, xs_tree, x_types, where):
    """Trace the step as a function of flat lists; returns it with the structures of what it returned."""
    structure: dict[str, Any] = {}

    def flat_step(*flat):
        carry = jax.tree.unflatten(tree, flat[: len(leaves)])
        result = step(carry, jax.tree.unflatten(xs_tree, flat[len(leaves) :]))
        if not (isinstance(result, tuple) and len(result) == 2):
            raise SiteTypeError(
                f"ppl.scan at {user_line()}: the step must return (carry, y), got {type(result).__name__}."
            )
        structure["slots"], new_carry = _end_iteration(result[0], carry)
        carry_leaves, structure["carry"] = jax.tree.flatten(new_carry)
        y_leaves, structure["y"] = jax.tree.flatten(result[1])
        return [*_arrays(carry_leaves, "the carry that the step returns", where), *_arrays(y_leaves, "y", where)]

    body, constants = trace(flat_step, *_types(leaves), *x_types)
    return body, constants, structure["carry"], structure["y"], structure["slots"]


def _arrays(leaves, what: str, where: str):
    try:
        return [jnp.asarray(leaf) for leaf in leaves]
    except (TypeError, ValueError) as error:
        kinds = sorted({type(leaf).__name__ for leaf in leaves})
        raise SiteTypeError(f"ppl.scan at {where}: {what} must hold numbers and arrays, got {kinds}.") from error


def _types(leaves):
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=jax.typeof(x).weak_type) for x in leaves]


def _length(leaves, length: int | None, where: str) -> int:
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if None in lengths:
        raise SiteValueError(
            f"ppl.scan at {where}: xs holds a scalar; every array of xs needs a leading axis to walk along."
        )
    lengths |= set() if length is None else {int(length)}
    if len(lengths) != 1:
        given = "neither xs nor length is given" if not lengths else f"xs and length say {sorted(lengths)}"
        raise SiteValueError(f"ppl.scan at {where}: {given}; one number of iterations is needed.")
    if min(lengths) < 0:
        raise SiteValueError(f"ppl.scan at {where}: `length` must be at least 0, got {length}.")
    return lengths.pop()


def _promote(leaves, out_types, carry, where):
    """Return the carry with weak types settled as `jax.lax.scan` settles them, and whether anything changed."""
    paths = [jax.tree_util.keystr(path) or "the carry" for path, _ in jax.tree_util.tree_flatten_with_path(carry)[0]]
    promoted, changed = [], False
    for leaf, out, path in zip(leaves, out_types, paths, strict=True):
        given = jax.typeof(leaf)
        if given.shape == out.shape and given.dtype == out.dtype and (out.weak_type <= given.weak_type):
            if given.weak_type and not out.weak_type:
                leaf, changed = jax.lax.convert_element_type(leaf, out.dtype), True
        elif given.shape == out.shape and given.weak_type and jnp.result_type(leaf, out.dtype) == out.dtype:
            leaf, changed = jax.lax.convert_element_type(leaf, out.dtype), True
        elif not (given.shape == out.shape and given.dtype == out.dtype):
            raise SiteTypeError(
                f"ppl.scan at {where}: {path} enters the step as {given.str_short()} and leaves it as "
                f"{out.str_short()}. "
                "They must agree."
            )
        promoted.append(leaf)
    return promoted, changed


def _as_bool(stop, where: str):
    stop = jnp.asarray(stop)
    if stop.shape != () or stop.dtype != jnp.bool_:
        raise SiteTypeError(f"ppl.scan at {where}: until must return one bool, got {jax.typeof(stop).str_short()}.")
    return stop


def _is_loop_carry(node) -> bool:
    return isinstance(node, LoopCarry)


def _enter(init, count: int, length: int):
    return jax.tree.map(
        lambda n: n.enter_loop(count, length) if _is_loop_carry(n) else n, init, is_leaf=_is_loop_carry
    )  # fmt: skip


def _end_iteration(carry, entered) -> tuple[int, Any]:
    nodes, tree = jax.tree.flatten(carry, is_leaf=_is_loop_carry)
    before, tree_before = jax.tree.flatten(entered, is_leaf=_is_loop_carry)
    if tree != tree_before:
        return 0, carry  # an error that `scan` words
    added = []
    for place, (node, old) in enumerate(zip(nodes, before, strict=True)):
        if type(node) is type(old) and _is_loop_carry(node):
            nodes[place], count = node.end_iteration(old)
            added.append(count)
    return max(added, default=0), jax.tree.unflatten(tree, nodes)


def _exit(last, count: int, length: int):
    return jax.tree.map(
        lambda n: n.exit_loop(count, length) if _is_loop_carry(n) else n, last, is_leaf=_is_loop_carry
    )  # fmt: skip


def _scratch(carry):
    return jax.tree.map(
        lambda n: n.scratch() if _is_loop_carry(n) else False, carry, is_leaf=_is_loop_carry
    )  # fmt: skip
