"""Moving particles to where their ancestors are, by as few copies as there are dead.

Resampling gives ancestors a_1 .. a_n: slot k goes to an offspring of particle a_k. Only the dead need to be
overwritten, if the others stay where they are:

    (1)  b = a o s for a permutation s of the slots, with b_i = i for every i that is an ancestor at all.

Why the law stays: the offspring are a set of pairs (ancestor, weight), and s only numbers them anew, weights
along with ancestors. The empirical measure sum_k w_k f(x_(a_k)) is the same number before and after, in every
run, and s is a function of the ancestors, so that no draw is spent. What changes is the name of a line: whoever
stores genealogies stores b, and whatever has one row for each offspring is reordered by s. Source: Murray, Lee
and Jacob (2016), "Parallel resampling in the particle filter", who permute ancestors to the form (1) so that
particles can be copied in place without a race; (2) and (3) are ours.

How s is found, without sorting or searching:

    (2)  The heir of particle i is its offspring in slot i if a_i = i, else the one in its first slot. Heirs
         go to their ancestor's slot.
    (3)  The other offspring are as many as the slots of the dead. Numbered along the slots by one pass of
         prefix sums each, the r-th of them goes to the r-th dead slot.

By (2) a vector that is in the form (1) is left as it is. A parent in the form is alive, so its row is never
overwritten, and rows may be copied in place and in any order.

Where it pays, measured on a CPU: a row is copied by two calls of some 0.1 us; gathering it costs more as soon as
it is longer than about 4 KiB, and writes everything anew, dead or not. XLA's CPU backend widens a whole array of
bfloat16 before it writes into it, so such arrays are gathered, and so is everything on other backends, where a
gather runs at the speed of the memory.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from ppl.kernels.prefix import prefix_sum, prefix_sum_whole

__all__ = ["gather", "has_long_rows", "move", "offspring_order", "survivors_stay"]

_LONG = 4096  # bytes of one row in one piece, from which on copying it alone is faster than a gather


def offspring_order(ancestors: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """Find the order of the offspring in which every survivor keeps its own slot.

    Args:
        ancestors: shape (n,), int32 in [0, n), in any order; of offspring k the ancestor.

    Returns:
        A permutation s, shape (n,), int32: slot j goes to offspring s[j]. ``ancestors[s]`` is
        `survivors_stay(ancestors)`, and ``x[s]`` is what belongs to the offspring, such as their log-weights.

    Raises:
        ValueError: `ancestors` is not of rank 1 or is empty.
        TypeError: `ancestors` are not integers.

    Example:
        >>> offspring_order(jnp.array([1, 1, 1, 2])).tolist()
        [1, 0, 3, 2]
    """
    ancestors = _checked(ancestors)
    n = ancestors.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    claim = jnp.where(ancestors == index, -1, index)
    first = jnp.full(n, n, jnp.int32).at[ancestors].min(claim, mode="promise_in_bounds")
    is_heir = first.at[ancestors].get(mode="promise_in_bounds") == claim  # (2)
    dead = first == n
    # One pass for both counts: the 2^-32ths of the fixed-point numbers do not carry below 2^32 of them.
    counted = prefix_sum((dead.astype(jnp.int32), (~is_heir).astype(jnp.uint32)))
    dead_rank, other_rank = (x.astype(jnp.int32) - 1 for x in counted)
    slots = _compact(dead, dead_rank, index)
    slot = jnp.where(is_heir, ancestors, slots.at[jnp.maximum(other_rank, 0)].get(mode="promise_in_bounds"))  # (3)
    return jnp.zeros(n, jnp.int32).at[slot].set(index, mode="promise_in_bounds", unique_indices=True)


def survivors_stay(ancestors: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """Rearrange ancestors so that every particle with offspring keeps its own slot.

    Args:
        ancestors: shape (n,), int32 in [0, n), in any order.

    Returns:
        The same ancestors, each as often as before, shape (n,), int32, in the form (1): entry i is i if i is an
        ancestor; the other entries take the remaining offspring in their given order. Applied twice it changes
        nothing more.

    Raises:
        ValueError: `ancestors` is not of rank 1 or is empty.
        TypeError: `ancestors` are not integers.

    Example:
        >>> survivors_stay(jnp.array([1, 1, 1, 2])).tolist()
        [1, 1, 2, 1]
    """
    ancestors = _checked(ancestors)
    return ancestors.at[offspring_order(ancestors)].get(mode="promise_in_bounds")


def gather(tree: Any, ancestors: Int32[Array, " num"], axis: int = 0) -> Any:
    """Replace every particle's arrays by its ancestor's, writing all of them anew.

    Numbers of one type are moved side by side in one gather: looking an ancestor up costs more than copying it.

    Args:
        tree: arrays of any shapes and types, particles along `axis`.
        ancestors: int32 in range, in any order and number.
        axis: which axis the particles are.

    Returns:
        The tree with ``num`` particles.
    """
    leaves, structure = jax.tree.flatten(tree)
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype if leaf.ndim == 1 else i, []).append(i)
    for members in groups.values():
        if len(members) == 1:
            leaves[members[0]] = _rows(leaves[members[0]], ancestors, axis)
        else:
            rows = _rows(jnp.stack([leaves[i] for i in members], axis=-1), ancestors, 0)
            for column, i in enumerate(members):
                leaves[i] = rows[:, column]
    return jax.tree.unflatten(structure, leaves)


def has_long_rows(leaf: Any, axis: int = 0) -> bool:
    """Return whether `move` copies this array's rows one by one on a CPU: a matter of its shape and type."""
    if leaf.ndim == 0 or jnp.issubdtype(leaf.dtype, jax.dtypes.extended) or leaf.dtype.kind not in "biufc":
        return False
    return math.prod(leaf.shape[axis % leaf.ndim + 1 :]) * leaf.dtype.itemsize >= _LONG


def move(tree: Any, ancestors: Int32[Array, " n"], axis: int = 0) -> Any:
    """Replace the arrays of the dead by their ancestors', and leave the survivors' where they are.

    In a compiled function, a scan or a loop the long rows are overwritten in place: no second array is
    allocated, and ancestors 0, 1, .. n - 1 cost nothing. Give the buffers away with ``donate_argnums`` if the
    function ends with them. Derivatives, in both modes, and `jax.vmap` are those of `gather`.

    Args:
        tree: arrays of any shapes and types, all with n particles along `axis`.
        ancestors: shape (n,), int32, in the form (1), which `survivors_stay` gives: an ancestor is its own
            ancestor. For others use `gather`.
        axis: which axis the particles are.

    Returns:
        The tree after the move, of the same shapes.

    Raises:
        ValueError: `ancestors` is not of rank 1 or is empty, is not in the form (1), or a leaf has another
            number of particles. Inside jit the form cannot be checked: rows that were overwritten may then be
            taken for their parents.
        TypeError: `ancestors` are not integers.

    Example:
        >>> move({"x": jnp.array([10, 20, 30])}, jnp.array([2, 1, 2]))["x"].tolist()
        [30, 20, 30]
    """
    ancestors = _checked(ancestors)
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != ancestors.shape[0]:
            raise ValueError(
                f"Every array of `tree` must have {ancestors.shape[0]} particles along axis {axis}, as many as "
                f"`ancestors`; got shape {leaf.shape}."
            )
    with jax.ensure_compile_time_eval():  # known ancestors are checked even where the arrays are traced
        known = not isinstance(ancestors, jax.core.Tracer)
        broken = known and bool(jnp.any(ancestors[ancestors] != ancestors))
    if broken:
        raise ValueError(
            "`ancestors` must be in the form that `survivors_stay` gives: every ancestor is its own. Apply it "
            "first, or use `gather`."
        )
    long = [has_long_rows(leaf, axis) for leaf in leaves]
    short_leaves = iter(gather([x for x, is_long in zip(leaves, long, strict=True) if not is_long], ancestors, axis))
    long_leaves = [x for x, is_long in zip(leaves, long, strict=True) if is_long]
    long_leaves = iter(_overwrite(axis, long_leaves, ancestors) if long_leaves else [])
    return jax.tree.unflatten(structure, [next(long_leaves if is_long else short_leaves) for is_long in long])


def _checked(ancestors: Any) -> jax.Array:
    ancestors = jnp.asarray(ancestors)
    if ancestors.ndim != 1 or ancestors.shape[0] == 0:
        raise ValueError(
            f"`ancestors` must have shape (n,) with n >= 1, got shape {ancestors.shape}. "
            "Map over further axes with jax.vmap."
        )
    if not jnp.issubdtype(ancestors.dtype, jnp.integer):
        raise TypeError(f"`ancestors` must be int32 indices of particles, got {ancestors.dtype}.")
    return ancestors.astype(jnp.int32)


def _rows(array: jax.Array, ancestors: jax.Array, axis: int) -> jax.Array:
    index = (slice(None),) * (axis % array.ndim)
    return array.at[(*index, ancestors)].get(mode="promise_in_bounds")


def _compact(mask: jax.Array, rank: jax.Array, index: jax.Array) -> jax.Array:
    """List the places where a mask holds, given their ranks; what follows the last of them is 0."""
    n = mask.shape[0]
    target = jnp.where(mask, rank, n)
    return jnp.zeros(n + 1, jnp.int32).at[target].set(jnp.where(mask, index, 0), mode="promise_in_bounds")[:n]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _overwrite(axis: int, leaves: list[jax.Array], ancestors: jax.Array) -> list[jax.Array]:
    @jax.custom_batching.custom_vmap
    def run(leaves: list[jax.Array], ancestors: jax.Array) -> list[jax.Array]:
        return lax.platform_dependent(
            leaves,
            ancestors,
            cpu=functools.partial(_overwrite_in_place, axis),
            default=functools.partial(_gather_if_moved, axis),
        )

    @run.def_vmap
    def _(size: int, batched: Any, leaves: list[jax.Array], ancestors: jax.Array) -> tuple[list[jax.Array], list[bool]]:
        # A loop over a batch would run as long as its longest, and select whole arrays in every round.
        in_axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))
        one = lambda leaves, ancestors: [_rows(x, ancestors, axis) for x in leaves]  # noqa: E731
        return jax.vmap(one, in_axes, axis_size=size)(leaves, ancestors), [True] * len(leaves)

    return run(leaves, ancestors)


@_overwrite.defjvp
def _(axis: int, primals: Any, tangents: Any) -> Any:
    leaves, ancestors = primals
    moved = [x if x.dtype == jax.dtypes.float0 else _rows(x, ancestors, axis) for x in tangents[0]]
    return _overwrite(axis, leaves, ancestors), moved


def _overwrite_in_place(axis: int, leaves: list[jax.Array], ancestors: jax.Array) -> list[jax.Array]:
    n = ancestors.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    dead = ancestors != index
    rank = prefix_sum_whole(dead.astype(jnp.int32))
    slots = _compact(dead, rank - 1, index)

    def copy_row(k: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
        slot = slots[k]
        parent = ancestors[slot]
        rows = [lax.dynamic_slice_in_dim(x, parent, 1, axis) for x in leaves]
        return [lax.dynamic_update_slice_in_dim(x, row, slot, axis) for x, row in zip(leaves, rows, strict=True)]

    return lax.fori_loop(0, rank[-1], copy_row, leaves)


def _gather_if_moved(axis: int, leaves: list[jax.Array], ancestors: jax.Array) -> list[jax.Array]:
    moved = jnp.any(ancestors != jnp.arange(ancestors.shape[0], dtype=jnp.int32))
    return lax.cond(moved, lambda: [_rows(x, ancestors, axis) for x in leaves], lambda: leaves)
