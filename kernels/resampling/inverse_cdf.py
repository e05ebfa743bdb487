"""What the schemes share: weights as exact prefix sums, offspring as ancestors.

With w_i = exp(l_i - max l), S their float32 sum and `total` draws to hand out, particle i owns the interval
[P_(i-1), P_i) of [0, total), P_i = total (w_1 + ... + w_i) / S. A scheme places its points in [0, total) and
counts N_i of them below P_i; particle i gets N_i - N_(i-1) draws. A float32 cannot hold P_i (at 2^20 it leaves
4 bits after the point), so that

    (1)  x_i = total w_i / S is written in fixed point: 31 bits before the point and 31 after it. Its prefix
         sums P_i are exact, never decrease, and P_i = P_(i-1) for a weight of zero.
    (2)  P_n differs from `total` by the rounding of S, and is scaled back in integers:
         P_i - floor(P_i d),   d = (P_n - total) / P_n,   the floor being one of 2^-32ths.
         As |d| < 1 the sums still do not decrease. What the rounding of d leaves of the difference goes to the
         last living particle: there, and for all after it, P_i = total. It is at most total 2^-43 plus a 2^-22th
         of the difference.
         For equal weights and total = n, x_i = 1 and d = 0 exactly.
    (3)  Ancestor i is written at position N_(i-1) if N_i > N_(i-1); a running maximum fills the gaps. No
         search, no sort.

Independent points instead of one in each unit interval, both without a sort:

    (4)  m ordered uniform points of [0, m) are V_k = m (E_1 + .. + E_k) / (E_1 + .. + E_(m+1)), E_k exponential
         variables; they are prefix sums as in (1). E = -log v with v in (0, 1] on a grid of 2^-31: v is never
         zero, so that no E is infinite.
    (5)  N_i = #{V_k < P_i}: the points of the unit interval that P_i lies in are found by (3), and a bisection
         among these few ends after about log2 log m steps.

What remains is the rounding of the weights: w_i has in float32 a relative error of about (2 + |l_i - max l|)
2^-24, and a particle that expects fewer than 2^-31 draws gets none.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from ppl.kernels.prefix import (
    FixedPoint,
    from_columns,
    multiply,
    num_columns,
    prefix_sum,
    running_max,
    to_columns,
    to_fixed_point,
    to_fraction,
    total_of_columns,
)

__all__ = [
    "check_arguments",
    "count_below",
    "fill",
    "relative_weights",
    "scaled_prefix_sum",
    "sorted_points",
    "to_unit",
    "unless_all_dead",
]

_MAX_DRAWS = 1 << 30  # prefix sums and indices are int32
_LARGEST = 3.4028235e38  # of the finite float32


def check_arguments(log_weights: jax.Array, num: int | None) -> tuple[Float[Array, " n"], int]:
    """Check what every scheme is given.

    Args:
        log_weights: what should be a vector of n >= 1 log-weights.
        num: number of draws, or None for n.

    Returns:
        The log-weights in float32 and the number of draws.

    Raises:
        ValueError: `log_weights` is not of rank 1 or is empty, or `num` is not between 1 and 2^30.
    """
    log_weights = jnp.asarray(log_weights)
    if log_weights.ndim != 1 or log_weights.shape[0] == 0:
        raise ValueError(
            f"`log_weights` must have shape (n,) with n >= 1, got shape {log_weights.shape}. "
            "Map over further axes with jax.vmap."
        )
    num = log_weights.shape[0] if num is None else num
    if not 1 <= num <= _MAX_DRAWS:
        raise ValueError(f"`num` must be between 1 and 2^30, got {num}. It is the number of ancestors to draw.")
    return log_weights.astype(jnp.float32), num


def relative_weights(log_weights: Float[Array, " n"]) -> tuple[Float[Array, "columns rows"], Bool[Array, ""]]:
    """Compute the weights relative to the largest, laid out in columns.

    Args:
        log_weights: shape (n,), float32, nats. NaN counts as -inf; +inf as the largest finite number.

    Returns:
        The weights, in [0, 1], shape (columns, rows) in the layout of `ppl.kernels.prefix.to_columns`, zeros
        after the last; and whether one of them is not zero, in which case the largest is 1.
    """
    bounded = jnp.where(jnp.isnan(log_weights), -jnp.inf, jnp.minimum(log_weights, _LARGEST))
    bounded = to_columns(bounded, -jnp.inf)
    maximum = jnp.max(bounded)
    return jnp.exp(bounded - jnp.maximum(maximum, -_LARGEST)), maximum > -jnp.inf


def scaled_prefix_sum(weights: Float[Array, "columns rows"], total: int | Int32[Array, ""]) -> FixedPoint:
    """Add weights up in fixed point, scaled so that they sum to `total` exactly.

    Args:
        weights: shape (columns, rows), float32 >= 0, in the layout of `ppl.kernels.prefix.to_columns`.
        total: between 0 and 2^30; static or not.

    Returns:
        Whole parts, int32, and 2^-32ths, uint32, of the inclusive prefix sums, in the same layout. They never
        decrease; a weight of zero adds nothing; where the last sum is reached it is `total` exactly. If all
        weights are zero, `total` everywhere.
    """
    scale = total / jnp.maximum(total_of_columns(weights), 1e-20)
    whole, part = prefix_sum(to_fixed_point(weights * scale))  # (1)
    last_whole, last_part = whole[-1, -1], part[-1, -1]
    fraction = to_fraction(last_part)
    excess = (last_whole - total).astype(jnp.float32) + fraction
    relative = jnp.abs(excess) / jnp.maximum(last_whole.astype(jnp.float32) + fraction, 1e-6)
    factor = jnp.minimum(relative * 2.0**43, 2.0**30).astype(jnp.int32).astype(jnp.uint32)
    shift_whole, shift_part = _times(whole, part, factor)  # (2)
    lower_part, upper_part = part - shift_part, part + shift_part
    lower = whole - shift_whole - (part < shift_part).astype(jnp.int32)
    upper = whole + shift_whole + (upper_part < part).astype(jnp.int32)
    is_last = (whole == last_whole) & (part == last_part)
    part = jnp.where(excess > 0, lower_part, upper_part)
    whole = jnp.where(excess > 0, lower, upper)
    is_last = is_last | (whole >= total)
    return jnp.where(is_last, total, whole), jnp.where(is_last, jnp.uint32(0), part)


def _times(whole: jax.Array, part: jax.Array, factor: jax.Array) -> FixedPoint:
    """(whole + part 2^-32) factor 2^-43, rounded down to 2^-32ths."""
    factor = jnp.broadcast_to(factor, part.shape)
    high, low = multiply(whole.astype(jnp.uint32), factor)
    from_part = multiply(part, factor)[0]
    low = low + from_part
    high = high + (low < from_part).astype(jnp.uint32)
    return (high >> 11).astype(jnp.int32), (high << 21) | (low >> 11)


def fill(end: Int32[Array, "columns rows"], num: int) -> Int32[Array, " num"]:
    """Write the particles one after the other, each up to its own end, (3).

    Args:
        end: N_i, how many draws particles 0 .. i get together, in [0, num] and nondecreasing; shape (columns,
            rows) in the layout of `ppl.kernels.prefix.to_columns`. The last one should be `num`.
        num: number of draws, static.

    Returns:
        Shape (num,), int32: at position k the number of ends that are at most k.
    """
    columns, rows = end.shape
    end = lax.optimization_barrier(end)  # else XLA computes it anew for each of its uses
    row_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), end[-1, :-1]])
    start = jnp.concatenate([row_starts[None], end[:-1]])
    index = jnp.arange(rows * columns, dtype=jnp.int32).reshape(rows, columns).T
    out_columns = num_columns(num)
    out_rows = -(-num // out_columns)
    size = out_columns * out_rows
    slot = jnp.where(start == num, size, start % out_columns * out_rows + start // out_columns)
    heads = jnp.zeros(size + 1, jnp.int32).at[slot].max(jnp.where(end > start, index, 0), mode="promise_in_bounds")
    return from_columns(running_max(heads[:-1].reshape(out_columns, out_rows)), num)


def to_unit(bits: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Turn random bits into uniform numbers in (0, 1], as finely as a float32 goes down to 2^-32."""
    return ((bits >> 1).astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-31


def sorted_points(bits: UInt32[Array, " m_plus_1"], count: int | Int32[Array, ""]) -> FixedPoint:
    """Draw ordered, independent uniform points of [0, count), (4).

    Args:
        bits: random bits, shape (m + 1,).
        count: how many points, between 0 and m; static or not.

    Returns:
        The points in increasing order, then `count` itself in what is left of m + 1 places; in columns.
    """
    spacings = jnp.where(jnp.arange(bits.shape[0]) <= count, -jnp.log(to_unit(bits)), 0.0)
    return scaled_prefix_sum(to_columns(spacings, 0.0), count)


def count_below(points: FixedPoint, queries: FixedPoint, size: int, num: int) -> Int32[Array, "*shape"]:
    """Count for each query the points that are smaller, (5).

    Args:
        points: nondecreasing, shape (columns, rows) in the layout of `ppl.kernels.prefix.to_columns`.
        queries: any shape, none above the last point.
        size: number of points, static.
        num: a bound of the last point, static.

    Returns:
        The counts, in the shape of the queries.
    """
    first = fill(points[0] + 1, num + 1)  # how many points lie below 0, 1, .. num
    part = from_columns(points[1], size)

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) >> 1
        below = part.at[middle].get(mode="clip") < queries[1]
        return jnp.where(below & (low < high), middle + 1, low), jnp.where(below, high, middle)

    start = first[queries[0]], first[jnp.minimum(queries[0] + 1, num)]
    return lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, start)[0]


def unless_all_dead(ancestors: Int32[Array, " num"], alive: Bool[Array, ""], n: int) -> Int32[Array, " num"]:
    """Replace the ancestors by 0, 1, .. n - 1, 0, 1, .. if no particle is alive."""
    return jnp.where(alive, ancestors, jnp.arange(ancestors.shape[0], dtype=jnp.int32) % n)
