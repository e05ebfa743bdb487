"""Systematic resampling in three GPU kernels: sums of blocks, ends of particles, ancestors.

It is `ppl.kernels.resampling.systematic` with the same key and the same arithmetic. The weights w_i, their largest and
their float32 sum S come from XLA; then, with x_i = num w_i / S in fixed point and blocks of 1024 particles,

    (1)  T_b = sum of x_i over block b;
    (2)  P_i = T_0 + .. + T_(b-1) + (sum of x_j over the block up to i), scaled so that P_n = num; N_i = ceil(P_i - u);
    (3)  ancestor k = #{i : N_i <= k}, by bisection.

Blocks run in any order: each adds up the totals before its own, of which there are at most 1024. The three sums are
exact, hence equal to those of `ppl.kernels.prefix`, in whatever order they are taken:

    (4)  within a block, part_i = part of the sum mod 2^32; it wraps at i exactly where it is smaller than what was
         added, and the wraps are counted beside the whole parts;
    (5)  across blocks, the parts are added in halves of 16 bits, 1024 of which stay below 2^26.

The bisection takes log2 of the particles' number of steps for all k at once, whatever the weights: no loop runs over
the children of a particle, of which one can have all.

Not measured: this was tested in interpret mode and lowered for CUDA, never run on a GPU, and nothing chooses it by
default. XLA's exponentials and S may differ between a CPU and a GPU in their last bits, as they do for the plain form.
JAX 0.12 announces that Pallas' way through Triton, which this takes, will be removed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.prefix import FixedPoint, to_fixed_point
from ppl.kernels.resampling.inverse_cdf import (
    check_arguments,
    relative_weights,
    scale_back,
    scaled_weights,
    unless_all_dead,
)

__all__ = ["systematic"]

_BLOCK = 1024
_MAX_PARTICLES = 1 << 20  # every block reads the totals of all blocks


def systematic(
    key: PRNGKeyArray | UInt32[Array, "2"],
    log_weights: Float[Array, " n"],
    num: int | None = None,
    *,
    interpret: bool = False,
) -> Int32[Array, " num"]:
    """Draw ancestors by systematic resampling, on a GPU.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised; treated as by `ppl.kernels.resampling.systematic`.
        num: number of draws, static; n if not given.
        interpret: run the kernels step by step in plain JAX, on any backend: for tests.

    Returns:
        Ancestors, shape (num,), int32 in [0, n), nondecreasing: those of `ppl.kernels.resampling.systematic`.

    Raises:
        ValueError: `log_weights` is not of rank 1, is empty or longer than 2^20, or `num` is not between 1 and 2^30.

    Example:
        >>> systematic(jax.random.key(0), jnp.zeros(4), interpret=True).tolist()
        [0, 1, 2, 3]
    """
    log_weights, num = check_arguments(log_weights, num)
    n = log_weights.shape[0]
    if n > _MAX_PARTICLES:
        raise ValueError(
            f"`log_weights` must have at most 2^20 elements here, got {n}. "
            "`ppl.kernels.resampling.systematic` takes any number."
        )
    u = jax.random.bits(key, dtype=jnp.uint32)
    weights, alive = relative_weights(log_weights)
    scaled = scaled_weights(weights, num)
    return unless_all_dead(_place(_ends(scaled, u, num, interpret), num, interpret), alive, n)


def _ends(scaled: Float[Array, " n"], u: UInt32[Array, ""], num: int, interpret: bool) -> Int32[Array, " padded"]:
    """N_i of (2), and `num` for what pads the particles to a power of two blocks."""
    blocks = pl.next_power_of_2(pl.cdiv(scaled.shape[0], _BLOCK))
    scaled = jnp.pad(scaled, (0, blocks * _BLOCK - scaled.shape[0]))
    call = functools.partial(
        pl.pallas_call, grid=(blocks,), interpret=interpret, compiler_params=triton.CompilerParams(num_warps=4)
    )
    block = pl.BlockSpec((_BLOCK,), lambda b: (b,))
    one = pl.BlockSpec((1,), lambda b: (b,))
    of_blocks = pl.BlockSpec((blocks,), lambda b: (0,))
    totals = call(
        _sum_block,
        in_specs=[block],
        out_specs=(one, one),
        out_shape=(jax.ShapeDtypeStruct((blocks,), jnp.int32), jax.ShapeDtypeStruct((blocks,), jnp.uint32)),
    )(scaled)
    return call(
        functools.partial(_end_block, num),
        in_specs=[block, of_blocks, of_blocks, pl.BlockSpec((1,), lambda b: (0,))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(scaled.shape, jnp.int32),
    )(scaled, *totals, u[None])


def _place(ends: Int32[Array, " padded"], num: int, interpret: bool) -> Int32[Array, " num"]:
    """The ancestors that the particles' ends lead to, (3)."""
    blocks = pl.cdiv(num, _BLOCK)
    return pl.pallas_call(
        _search_block,
        grid=(blocks,),
        in_specs=[pl.BlockSpec(ends.shape, lambda b: (0,))],
        out_specs=pl.BlockSpec((_BLOCK,), lambda b: (b,)),
        out_shape=jax.ShapeDtypeStruct((blocks * _BLOCK,), jnp.int32),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4),
    )(ends)[:num]


def _sum_block(scaled_ref, whole_ref, part_ref):
    """One block's total, (1)."""
    whole, part = _sum(to_fixed_point(scaled_ref[...]))
    whole_ref[...] = whole[None]
    part_ref[...] = part[None]


def _end_block(num, scaled_ref, wholes_ref, parts_ref, u_ref, end_ref):
    """One block's ends, (2)."""
    wholes, parts = wholes_ref[...], parts_ref[...]
    is_before = jnp.arange(wholes.shape[0], dtype=jnp.int32) < pl.program_id(0)
    before = _sum((jnp.where(is_before, wholes, 0), jnp.where(is_before, parts, jnp.uint32(0))))
    whole, part = _add(before, _cumulate(to_fixed_point(scaled_ref[...])))
    whole, part = scale_back((whole, part), _sum((wholes, parts)), num)
    end_ref[...] = whole + (u_ref[0] < part).astype(jnp.int32)


def _search_block(ends_ref, ancestor_ref):
    """One block of ancestors: the number of ends that are at most k."""
    k = pl.program_id(0) * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
    found = jnp.zeros(_BLOCK, jnp.int32)
    step = ends_ref.shape[0] // 2
    while step:
        found = jnp.where(ends_ref[found + (step - 1)] <= k, found + step, found)
        step //= 2
    ancestor_ref[...] = found


def _add(x: FixedPoint, y: FixedPoint) -> FixedPoint:
    part = x[1] + y[1]
    return x[0] + y[0] + (part < y[1]).astype(jnp.int32), part


def _cumulate(values: FixedPoint) -> FixedPoint:
    """Inclusive sums within a block, (4)."""
    part = jnp.cumsum(values[1])
    return jnp.cumsum(values[0] + (part < values[1]).astype(jnp.int32)), part


def _sum(values: FixedPoint) -> FixedPoint:
    """The sum of at most 2^15 numbers, (5)."""
    low = jnp.sum((values[1] & 0xFFFF).astype(jnp.int32))
    high = jnp.sum((values[1] >> 16).astype(jnp.int32)) + (low >> 16)
    part = (high << 16 | low & 0xFFFF).astype(jnp.uint32)
    return jnp.sum(values[0]) + (high >> 16), part
