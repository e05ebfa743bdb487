"""Overwriting the dead in place in one GPU kernel.

It is `ppl.kernels.moves.move`, with ancestors in the form that `survivors_stay` gives. Whoever has offspring keeps its
slot, so that no row is both read and written, and rows may be copied in any order and at once:

    (1)  the slots k with a_k != k are listed, D of them; D < n, since somebody is an ancestor;
    (2)  a program takes a tile of the list's entries and of a row's elements, about 1024 together; what lies beyond D
         or the row's end is neither read nor written, and a program that begins beyond D ends at once;
    (3)  the array that is read is the array that is written.

Hence 2 D rows pass through the memory, where a gather moves 2 n, and no second array is needed where XLA can give the
first away, as it can in a scan or with ``donate_argnums``; otherwise it copies the array before the kernel starts. An
axis of particles that is not the first splits the others in two, which takes no copy.

Not measured: this was tested in interpret mode and lowered for CUDA, never run on a GPU, and nothing chooses it by
default. JAX 0.12 announces that Pallas' way through Triton, which this takes, will be removed.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Int32

from ppl.kernels.moves import gather
from ppl.kernels.prefix import prefix_sum_whole

__all__ = ["move"]

_TILE = 1024  # elements that a program copies


def move(tree: Any, ancestors: Int32[Array, " n"], axis: int = 0, *, interpret: bool = False) -> Any:
    """Replace the arrays of the dead by their ancestors', on a GPU, and leave the survivors' where they are.

    Derivatives, in both modes, and `jax.vmap` are those of `ppl.kernels.moves.gather`. So is the move of what is
    not booleans, integers of 8 to 64 bits or real floats of 16 to 64, such as random keys.

    Args:
        tree: arrays of any shapes and types, all with n particles along `axis`.
        ancestors: shape (n,), int32, in the form that `ppl.kernels.moves.survivors_stay` gives.
        axis: which axis the particles are.
        interpret: run the kernel step by step in plain JAX, on any backend: for tests.

    Returns:
        The tree after the move, of the same shapes: that of `ppl.kernels.moves.move`.

    Raises:
        ValueError: `ancestors` is not of rank 1 or is empty, is not in the form, or a leaf has another number of
            particles. Inside jit the form cannot be checked: rows that were overwritten may then be taken for their
            parents.
        TypeError: `ancestors` are not integers.

    Example:
        >>> move({"x": jnp.array([10, 20, 30])}, jnp.array([2, 1, 2]), interpret=True)["x"].tolist()
        [30, 20, 30]
    """
    leaves, structure = jax.tree.flatten(tree)
    ancestors = _check_arguments(leaves, ancestors, axis)
    can_copy = [_can_copy(leaf) for leaf in leaves]
    copied = [x for x, can in zip(leaves, can_copy, strict=True) if can]
    copied = iter(_overwrite(axis, interpret, copied, ancestors) if copied else [])
    gathered = iter(gather([x for x, can in zip(leaves, can_copy, strict=True) if not can], ancestors, axis))
    return jax.tree.unflatten(structure, [next(copied if can else gathered) for can in can_copy])


def _check_arguments(leaves: list[jax.Array], ancestors: Any, axis: int) -> Int32[Array, " n"]:
    ancestors = jnp.asarray(ancestors)
    if ancestors.ndim != 1 or ancestors.shape[0] == 0:
        raise ValueError(
            f"`ancestors` must have shape (n,) with n >= 1, got shape {ancestors.shape}. "
            "Map over further axes with jax.vmap."
        )
    if not jnp.issubdtype(ancestors.dtype, jnp.integer):
        raise TypeError(f"`ancestors` must be int32 indices of particles, got {ancestors.dtype}.")
    n = ancestors.shape[0]
    for leaf in leaves:
        if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != n:
            raise ValueError(
                f"Every array of `tree` must have {n} particles along axis {axis}, as many as `ancestors`; "
                f"got shape {leaf.shape}."
            )
    if not isinstance(ancestors, jax.core.Tracer):
        with jax.ensure_compile_time_eval():
            stays = bool(jnp.all(ancestors[ancestors] == ancestors))
        if not stays:
            raise ValueError(
                "`ancestors` must be in the form that `survivors_stay` gives: every ancestor is its own. Apply it "
                "first, or use `ppl.kernels.moves.gather`."
            )
    return ancestors.astype(jnp.int32)


def _can_copy(leaf: jax.Array) -> bool:
    """Return whether Triton has the array's type, and Pallas' offsets reach its end.

    These are int32 up to 2^32 bytes, too short for more than 2^31 elements of one byte, and int64 beyond.
    """
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return False
    if leaf.dtype.itemsize == 1:
        return leaf.dtype.kind in "biu" and not 2**31 < leaf.size <= 2**32
    return leaf.dtype.kind in "iu" or jnp.issubdtype(leaf.dtype, jnp.floating)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _overwrite(axis: int, interpret: bool, leaves: list[jax.Array], ancestors: Array) -> list[jax.Array]:
    @jax.custom_batching.custom_vmap
    def run(leaves: list[jax.Array], ancestors: Array) -> list[jax.Array]:
        return _overwrite_in_place(axis, interpret, leaves, ancestors)

    @run.def_vmap
    def _(size: int, batched: Any, leaves: list[jax.Array], ancestors: Array) -> tuple[list[jax.Array], list[bool]]:
        in_axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))
        move_one = functools.partial(gather, axis=axis)
        return jax.vmap(move_one, in_axes, axis_size=size)(leaves, ancestors), [True] * len(leaves)

    return run(leaves, ancestors)


@_overwrite.defjvp
def _(axis: int, interpret: bool, primals: Any, tangents: Any) -> Any:
    leaves, ancestors = primals
    moved = [x if x.dtype == jax.dtypes.float0 else gather(x, ancestors, axis) for x in tangents[0]]
    return _overwrite(axis, interpret, leaves, ancestors), moved


def _overwrite_in_place(axis: int, interpret: bool, leaves: list[jax.Array], ancestors: Array) -> list[jax.Array]:
    n = ancestors.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    is_dead = ancestors != index
    rank = prefix_sum_whole(is_dead.astype(jnp.int32))
    slots = jnp.full(pl.next_power_of_2(n), n, jnp.int32)  # the list's padding is nobody's slot
    slots = slots.at[jnp.where(is_dead, rank - 1, slots.shape[0])].set(index, mode="drop")  # (1)
    return [_copy_rows(x, slots, rank[-1:], ancestors, axis, interpret) if x.size else x for x in leaves]


def _copy_rows(leaf: Array, slots: Array, num_dead: Array, ancestors: Array, axis: int, interpret: bool) -> Array:
    """Overwrite the dead of one array, (2) and (3)."""
    axis %= leaf.ndim
    n = leaf.shape[axis]
    leading, length = math.prod(leaf.shape[:axis]), math.prod(leaf.shape[axis + 1 :])
    width = min(pl.next_power_of_2(length), _TILE)
    height = min(_TILE // width, slots.shape[0])
    whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)  # noqa: E731
    rows = leaf.reshape(leading, n, length)
    return pl.pallas_call(
        functools.partial(_copy_tile, width),
        grid=(pl.cdiv(length, width), pl.cdiv(max(n - 1, 1), height), leading),
        in_specs=[pl.BlockSpec((height,), lambda _, tile, __: (tile,)), whole(num_dead), whole(ancestors), whole(rows)],
        out_specs=whole(rows),
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        input_output_aliases={3: 0},
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4),
    )(slots, num_dead, ancestors, rows).reshape(leaf.shape)


def _copy_tile(width, slots_ref, num_dead_ref, ancestors_ref, rows_ref, out_ref):
    """Some of the dead, some of their elements, (2)."""
    height = slots_ref.shape[0]
    chunk, tile, lead = (pl.program_id(i) for i in range(3))
    first = tile * height

    @pl.when(first < num_dead_ref[0])
    def _():
        slot = slots_ref[...]
        is_dead = first + jnp.arange(height, dtype=jnp.int32) < num_dead_ref[0]
        parent = triton.load(ancestors_ref.at[slot], mask=is_dead, other=0)
        column = chunk * width + jnp.arange(width, dtype=jnp.int32)
        inside = is_dead[:, None] & (column < rows_ref.shape[2])[None, :]
        values = triton.load(rows_ref.at[lead, parent[:, None], column[None, :]], mask=inside)
        triton.store(out_ref.at[lead, slot[:, None], column[None, :]], values, mask=inside)
