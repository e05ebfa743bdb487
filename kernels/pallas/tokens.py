"""Drawing the next token in one GPU kernel that reads the logits once, and what XLA makes of the sums.

It is `ppl.kernels.tokens.sample_tokens` with the same key and the same blocks: the kernel does equation (1) there, the
largest logit and the sum of every block, and the functions there do the rest, (2) to (5), which read one block a row.
Where a mask or a temperature makes the proposal another law than the target, both are summed in the same read.

Blocks are as wide as `block_width` says, rarely a power of two, which Triton's arrays must be. With W the next one,

    (1)  a program takes 2048 / W blocks of one row, as the rows of an array of width W; what lies beyond a block's end
         or the vocabulary's is -inf and not read.

Logits are read in their own type and widened to at least float32 in registers.

Sums within a block are taken in another order than the plain form's and a GPU's exponentials differ from XLA's in
their last bits, so that log-probabilities agree to rounding, and so do tokens but where a uniform falls into the
rounding of an edge between two. Derivatives are those of the plain form, whose sweep they repeat.

Not measured: this was tested in interpret mode and lowered for CUDA, never run on a GPU, and nothing chooses it by
default. JAX 0.12 announces that Pallas' way through Triton, which this takes, will be removed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, UInt32

from ppl.kernels.tokens import (
    TokenDraw,
    block_width,
    check_arguments,
    draw_from,
    draw_uniforms,
    join_blocks,
    map_rows,
    sum_blocks,
    sum_table,
)

__all__ = ["sample_tokens"]

_TILE = 2048  # logits that a program reads


def sample_tokens(
    key: PRNGKeyArray | UInt32[Array, "2"],
    logits: Float[Array, "*batch V"],
    *,
    mask: Bool[ArrayLike, "*#batch V"] | None = None,
    temperature: Float[ArrayLike, "*#batch"] | float = 1.0,
    interpret: bool = False,
) -> TokenDraw:
    """Draw one token for every row and say how probable it was, on a GPU.

    Args:
        key: random key, consumed once.
        logits: shape (*batch, V), unnormalised log-probabilities; treated as by `ppl.kernels.tokens.sample_tokens`.
        mask: shape (V,) or (*batch, V); True where a token may be drawn.
        temperature: scalar or shape (*batch,), positive and finite; above 1 flattens the proposal.
        interpret: run the kernel step by step in plain JAX, on any backend: for tests.

    Returns:
        A `TokenDraw`, that of `ppl.kernels.tokens.sample_tokens` up to rounding.

    Raises:
        ValueError: `logits` has no vocabulary, a shape does not fit it, `temperature` is a number that is not positive
            and finite, or `mask` has more than 2^31 elements, which Pallas' offsets need not reach.
        TypeError: `mask` is not boolean.

    Example:
        >>> logits, mask = jnp.array([[0.0, 0.0]]), jnp.array([False, True])
        >>> draw = sample_tokens(jax.random.key(0), logits, mask=mask, interpret=True)
        >>> draw.token.tolist(), [round(float(x[0]), 4) for x in draw[1:]]
        ([1], [-0.6931, 0.0, 0.6931])
    """
    logits, mask, temperature = check_arguments(logits, mask, temperature)
    if mask is not None and mask.size > 2**31:
        raise ValueError(
            f"`mask` must have at most 2^31 elements here, got {mask.size}. Share one row, or split the rows."
        )
    *batch, size = logits.shape
    rows = logits.reshape(-1, size)
    mask_rows = None if mask is None else mask.reshape(-1, size)
    temperatures = None if temperature is None else temperature.reshape(-1)
    pairs = _sum_rows(interpret, rows, mask_rows, temperatures)
    pairs = jax.tree.map(lambda x: x.reshape(*batch, x.shape[-1]), pairs)
    uniforms = draw_uniforms(key, tuple(batch))
    return map_rows(_draw, (1, 1, 1, 0, 1, 1, 1, 1), (uniforms, logits, mask, temperature, *pairs))


def _draw(
    uniforms: Array,
    logits: Array,
    mask: Array | None,
    temperature: Array | None,
    target_maximum: Array,
    target_sums: Array,
    maximum: Array | None,
    sums: Array | None,
) -> TokenDraw:
    """Draw the token of one row, given its blocks' sums under the target and under the proposal, if that is another."""
    target = proposal = join_blocks(target_maximum, target_sums)
    if maximum is not None:
        proposal = join_blocks(maximum, sums, temperature)
    return draw_from(target, proposal, uniforms, logits, mask, temperature, logits)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_rows(interpret: bool, logits: Array, mask: Array | None, temperature: Array | None) -> tuple[Any, ...]:
    """Find the target's and the proposal's largest logits and sums by blocks, shape (rows, B) each."""
    rows, size = logits.shape
    width = block_width(size)
    blocks = pl.cdiv(size, width)
    has_proposal = mask is not None or temperature is not None
    outputs = 4 if has_proposal else 2
    padded = pl.next_power_of_2(width)
    in_tile = min(_TILE // padded, pl.next_power_of_2(blocks))
    tiles = pl.cdiv(blocks, in_tile)
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    given = [x for x in (logits, mask, temperature) if x is not None]
    if rows:
        sums = pl.pallas_call(
            functools.partial(_sum_tile, width, (in_tile, padded), mask is not None, temperature is not None),
            grid=(tiles, rows),
            in_specs=[_of_row(x) for x in given],
            out_specs=(pl.BlockSpec((None, in_tile), lambda tile, row: (row, tile)),) * outputs,
            out_shape=(jax.ShapeDtypeStruct((rows, tiles * in_tile), dtype),) * outputs,
            interpret=interpret,
            compiler_params=triton.CompilerParams(num_warps=4),
        )(*given)
    else:
        sums = (jnp.zeros((0, blocks), dtype),) * outputs
    return tuple(x[:, :blocks] for x in sums) + (None,) * (4 - outputs)


@_sum_rows.defjvp
def _(interpret: bool, primals: Any, tangents: Any) -> Any:
    return _sum_rows(interpret, *primals), jax.jvp(_sum_rows_plainly, primals, tangents)[1]


def _sum_rows_plainly(logits: Array, mask: Array | None, temperature: Array | None) -> tuple[Any, ...]:
    """The same in plain JAX, for derivatives."""
    target = jax.vmap(sum_blocks)(logits)
    if mask is None and temperature is None:
        return *target, None, None
    allowed = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
    if temperature is None:
        return *target, *jax.vmap(sum_blocks)(allowed)
    return *target, *jax.vmap(sum_blocks)(allowed, jnp.broadcast_to(temperature, logits.shape[:1]))


def _of_row(values: Array) -> pl.BlockSpec:
    """One row of an argument; the only one if all rows share it."""
    is_shared = values.shape[0] == 1
    shape = (None, *values.shape[1:]) if values.ndim == 2 else (1,)
    return pl.BlockSpec(shape, lambda tile, row: (0 if is_shared else row, 0)[: values.ndim])


def _sum_tile(width, shape, has_mask, has_temperature, *refs):
    """Some blocks of one row, (1)."""
    refs = list(refs)
    logits_ref = refs.pop(0)
    mask_ref = refs.pop(0) if has_mask else None
    temperature_ref = refs.pop(0) if has_temperature else None
    block = pl.program_id(0) * shape[0] + jnp.arange(shape[0], dtype=jnp.int32)
    lane = jnp.arange(shape[1], dtype=jnp.int32)
    token = block[:, None] * width + lane[None, :]
    inside = (lane < width)[None, :] & (token < logits_ref.shape[0])
    table = triton.load(logits_ref.at[token], mask=inside, other=-jnp.inf)
    table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    sums = sum_table(table, None)
    if has_mask or has_temperature:
        allowed = table
        if has_mask:
            allowed = jnp.where(triton.load(mask_ref.at[token], mask=inside, other=False), table, -jnp.inf)
        sums += sum_table(allowed, temperature_ref[0] if has_temperature else None)
    for ref, value in zip(refs, sums, strict=True):
        ref[...] = value
