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
    (3)  Particle i writes i + 1, its successor's number, at position N_i, where its draws end. The largest number
         written at a position counts, and a running maximum fills the gaps. No search, no sort.

Independent points instead of one in each unit interval, both without a sort:

    (4)  m ordered uniform points of [0, m) are V_k = m (E_1 + .. + E_k) / (E_1 + .. + E_(m+1)), E_k exponential
         variables; they are prefix sums as in (1). E = -log v with v in (0, 1] on a grid of 2^-31: v is never
         zero, so that no E is infinite.
    (5)  N_i = #{V_k < P_i}: a CPU walks through the two ordered sequences. Elsewhere, and for queries that are not
         in order, the points of the unit interval that P_i lies in are found by (3), and a
         bisection among these few ends after about log2 log m steps.

What remains is the rounding of the weights: w_i has in float32 a relative error of about (2 + |l_i - max l|)
2^-24, and a particle that expects fewer than 2^-31 draws gets none.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.prefix import (
    FixedPoint,
    multiply,
    prefix_sum,
    running_max,
    to_fixed_point,
    to_fraction,
)

__all__ = [
    "check_arguments",
    "count_points",
    "fill",
    "place",
    "relative_weights",
    "scale_back",
    "scaled_prefix_sum",
    "scaled_weights",
    "search_points",
    "sorted_points",
    "spacing_bits",
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


def relative_weights(log_weights: Float[Array, " n"]) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """Compute the weights relative to the largest.

    Args:
        log_weights: shape (n,), float32, nats. NaN counts as -inf; +inf as the largest finite number.

    Returns:
        The weights, in [0, 1], shape (n,); and whether one of them is not zero, in which case the largest is 1.
    """
    bounded = jnp.where(jnp.isnan(log_weights), -jnp.inf, jnp.minimum(log_weights, _LARGEST))
    maximum = jnp.max(bounded)
    return jnp.exp(bounded - jnp.maximum(maximum, -_LARGEST)), maximum > -jnp.inf


def scaled_prefix_sum(weights: Float[Array, " n"], total: int | Int32[Array, ""]) -> FixedPoint:
    """Add weights up in fixed point, scaled so that they sum to `total` exactly.

    Args:
        weights: shape (n,), float32 >= 0.
        total: between 0 and 2^30; static or not.

    Returns:
        Whole parts, int32, and 2^-32ths, uint32, of the inclusive prefix sums, shape (n,). They never decrease; a
        weight of zero adds nothing; where the last sum is reached it is `total` exactly. If all weights are zero,
        `total` everywhere.
    """
    sums = prefix_sum(to_fixed_point(scaled_weights(weights, total)))  # (1)
    return scale_back(sums, (sums[0][-1], sums[1][-1]), total)


def scaled_weights(weights: Float[Array, " n"], total: int | Int32[Array, ""]) -> Float[Array, " n"]:
    """Scale weights so that they sum to about `total`: x_i of (1)."""
    return weights * (total / jnp.maximum(jnp.sum(weights), 1e-20))


def scale_back(sums: FixedPoint, last: FixedPoint, total: int | Int32[Array, ""]) -> FixedPoint:
    """Scale prefix sums so that the last of them is `total` exactly, (2).

    Args:
        sums: whole parts and 2^-32ths, each of shape (n,).
        last: P_n, the last of them, scalars.
        total: between 0 and 2^30, no further than a 2^-13th of it from P_n.

    Returns:
        The sums, in the same form.
    """
    (whole, part), (last_whole, last_part) = sums, last
    fraction = to_fraction(last_part)
    excess = (last_whole - total).astype(jnp.float32) + fraction
    relative = jnp.abs(excess) / jnp.maximum(last_whole.astype(jnp.float32) + fraction, 1e-6)
    factor = jnp.minimum(relative * 2.0**43, 2.0**30).astype(jnp.int32).astype(jnp.uint32)
    shift_whole, shift_part = _times(whole, part, factor)
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


def fill(end: Int32[Array, " n"], num: int) -> Int32[Array, " num"]:
    """Write the particles one after the other, each up to its own end, (3).

    Args:
        end: N_i, how many draws particles 0 .. i get together, in [0, num] and nondecreasing; shape (n,). The last
            one should be `num`.
        num: number of draws, static.

    Returns:
        Shape (num,), int32: at position k the number of ends that are at most k.
    """
    index = jnp.arange(1, end.shape[0] + 1, dtype=jnp.int32)
    heads = jnp.zeros(num + 1, jnp.int32).at[end].max(index, mode="promise_in_bounds")
    return running_max(heads[:num])


def to_unit(bits: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Turn random bits into uniform numbers in (0, 1], as finely as a float32 goes down to 2^-32."""
    return ((bits >> 1).astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-31


def spacing_bits(key: PRNGKeyArray | UInt32[Array, "2"], count: int) -> UInt32[Array, " count_plus_1"]:
    """Draw the random bits of `sorted_points`, one word more than there are points."""
    words = count + 2 - count % 2  # an odd number of them takes XLA several times as long
    return jax.random.bits(key, (words,), jnp.uint32)[: count + 1]


def sorted_points(bits: UInt32[Array, " m_plus_1"], count: int | Int32[Array, ""]) -> FixedPoint:
    """Draw ordered, independent uniform points of [0, count), (4).

    Args:
        bits: random bits, shape (m + 1,).
        count: how many points, between 0 and m; static or not.

    Returns:
        The points in increasing order, then `count` itself in what is left of m + 1 places.
    """
    spacings = jnp.where(jnp.arange(bits.shape[0]) <= count, -jnp.log(to_unit(bits)), 0.0)
    return scaled_prefix_sum(spacings, count)


def place(points: FixedPoint, sums: FixedPoint, num: int) -> Int32[Array, " m"]:
    """Find the particle in whose interval each point lies, (5).

    Args:
        points: nondecreasing, shape (m,).
        sums: P_i, nondecreasing, shape (n,).
        num: a bound of all of them, static.

    Returns:
        Shape (m,): the number of sums that are at most the point; for points not below the last sum, the first
        particle that reaches it.
    """

    def walk(points: FixedPoint, sums: FixedPoint) -> Int32[Array, " m"]:
        endless = jnp.where(_reaches_last(sums), jnp.iinfo(jnp.int32).max, sums[0]), sums[1]
        return _walk(points, endless, lambda point, sum_: ~_less(point, sum_))

    def search(points: FixedPoint, sums: FixedPoint) -> Int32[Array, " m"]:
        return fill(count_points(points, sums, points[0].shape[0], num), points[0].shape[0])

    return lax.platform_dependent(points, sums, cpu=walk, default=search)


def count_points(points: FixedPoint, sums: FixedPoint, count: int | Int32[Array, ""], num: int) -> Int32[Array, " n"]:
    """Count the points that lie in the intervals of particles 0 .. i: N_i, (5).

    Args:
        points: nondecreasing, shape (m,).
        sums: P_i, nondecreasing, shape (n,).
        count: how many of the points count, the first ones; static or not.
        num: a bound of points and sums, static.

    Returns:
        Shape (n,): the number of points below the sum; `count` where the last sum is reached.
    """

    def walk(points: FixedPoint, sums: FixedPoint) -> Int32[Array, " n"]:
        endless = tuple(jnp.append(x, end) for x, end in zip(points, (jnp.int32(num), jnp.uint32(0)), strict=True))
        return _walk(sums, endless, lambda sum_, point: _less(point, sum_))

    search = functools.partial(search_points, num=num)
    counts = lax.platform_dependent(points, sums, cpu=walk, default=search)
    return jnp.where(_reaches_last(sums), count, counts)


def _reaches_last(sums: FixedPoint) -> Bool[Array, " n"]:
    return (sums[0] == sums[0][-1]) & (sums[1] == sums[1][-1])


def _less(x: FixedPoint, y: FixedPoint) -> Bool[Array, "*shape"]:
    return x[0] < y[0] + (x[1] < y[1]).astype(jnp.int32)


def _walk(values: FixedPoint, others: FixedPoint, passes: Callable) -> Int32[Array, " v"]:
    """Count for each value how many of the others it passes: all before the first that it does not, which there is."""

    def step(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, counts = state
        value = _at(values, k)
        i = lax.while_loop(lambda i: passes(value, _at(others, i)), lambda i: i + 1, i)
        return i, lax.dynamic_update_slice(counts, i[None], (k,))

    n = values[0].shape[0]
    return lax.fori_loop(0, n, step, (jnp.int32(0), jnp.zeros(n, jnp.int32)))[1]


def _at(values: FixedPoint, index: Int32[Array, ""]) -> FixedPoint:
    whole, part = (x.at[index].get(mode="promise_in_bounds") for x in values)
    return whole, part


def search_points(points: FixedPoint, queries: FixedPoint, num: int) -> Int32[Array, "*shape"]:
    """Count for each query the points that are smaller, by the search of (5).

    Args:
        points: nondecreasing, shape (m,).
        queries: in any order and of any shape, none above `num`.
        num: a bound of the points, static.

    Returns:
        The counts, in the shape of the queries.
    """
    first = fill(points[0] + 1, num + 1)  # how many points lie below 0, 1, .. num

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) >> 1
        below = points[1].at[middle].get(mode="clip") < queries[1]
        return jnp.where(below & (low < high), middle + 1, low), jnp.where(below, high, middle)

    start = first[queries[0]], first[jnp.minimum(queries[0] + 1, num)]
    return lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, start)[0]


def unless_all_dead(ancestors: Int32[Array, " num"], alive: Bool[Array, ""], n: int) -> Int32[Array, " num"]:
    """Replace the ancestors by 0, 1, .. n - 1, 0, 1, .. if no particle is alive."""
    return jnp.where(alive, ancestors, jnp.arange(ancestors.shape[0], dtype=jnp.int32) % n)
