"""Residual resampling: whole numbers of copies for certain, the rest drawn.

With x_i = num w_i / sum_j w_j, R = num - sum_j floor(x_j) and r_i = x_i - floor(x_i),

    (1)  o_i = floor(x_i) + m_i,   (m_1, .. m_n) ~ Multinomial(R, r / R),   E[o_i] = x_i,   o_i > x_i - 1.

Source: Liu and Chen (1998), "Sequential Monte Carlo methods for dynamic systems", section 3.1. The ancestors
come in increasing order: the copies of a particle stand together.

Deviation from the textbook: an x_i within 2^-22 x_i of a whole number is taken for that number. Else rounding
would turn an expected 3 into 2 copies and a remainder of 0.9999999, whose draw may fail. The expectation moves
by less than 2^-22 x_i. The remainders are handed out in integers (see `inverse_cdf` and `multinomial`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.prefix import prefix_sum_whole
from ppl.kernels.resampling.inverse_cdf import (
    check_arguments,
    count_points,
    fill,
    relative_weights,
    scaled_prefix_sum,
    sorted_points,
    spacing_bits,
    unless_all_dead,
)

__all__ = ["lay_out", "residual", "split_expected"]

_WHOLE = 2.0**-22  # relative distance at which a number counts as whole


def residual(
    key: PRNGKeyArray | UInt32[Array, "2"], log_weights: Float[Array, " n"], num: int | None = None
) -> Int32[Array, " num"]:
    """Draw ancestors by residual resampling.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised. -inf means weight zero, and so does NaN: whoever must
            know of a NaN asks `ppl.kernels.weights.summarize`. Particles at +inf share the whole mass
            equally.
        num: number of draws, static; n if not given.

    Returns:
        Ancestors, shape (num,), int32 in [0, n), nondecreasing. Equal weights and ``num == n`` give every
        particle itself. No particle of weight zero is an ancestor, unless all are: then the ancestors are 0,
        1, .. n - 1, 0, 1, ..

    Raises:
        ValueError: `log_weights` is not of rank 1 or is empty, or `num` is not between 1 and 2^30.

    Example:
        >>> residual(jax.random.key(0), jnp.log(jnp.array([1.0, 3.0]))).tolist()[1]
        1
        >>> residual(jax.random.key(0), jnp.zeros(2), 4).tolist()
        [0, 0, 1, 1]
    """
    log_weights, num = check_arguments(log_weights, num)
    return _ancestors(spacing_bits(key, num), log_weights, num)


def _ancestors(bits: UInt32[Array, " num_plus_1"], log_weights: Float[Array, " n"], num: int) -> Int32[Array, " num"]:
    """The ancestors that the random bits of the spacings lead to."""
    weights, alive = relative_weights(log_weights)
    _, copies, remainders = split_expected(weights, num)
    return unless_all_dead(lay_out(bits, copies, remainders, num), alive, log_weights.shape[0])


def split_expected(
    weights: Float[Array, " n"], num: int
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"]]:
    """Split the expected numbers of draws x_i into whole numbers and remainders.

    Args:
        weights: shape (n,), relative to the largest.
        num: number of draws, static.

    Returns:
        x_i, floor(x_i) and what the rest is drawn by, proportional to r_i; float32, shape (n,) each.
    """
    expected = weights * (num / jnp.maximum(jnp.sum(weights), 1))  # the sum is >= 1 while one lives
    nearest = jnp.round(expected)
    expected = jnp.where(jnp.abs(expected - nearest) <= expected * _WHOLE, nearest, expected)
    copies = jnp.floor(expected)
    remainders = expected - copies
    return expected, copies, jnp.where(jnp.any(remainders > 0), remainders, weights)  # beyond 2^20 some may be missing


def lay_out(
    bits: UInt32[Array, " num_plus_1"],
    copies: Float[Array, " n"],
    remainders: Float[Array, " n"],
    total: int | Int32[Array, ""],
) -> Int32[Array, " num"]:
    """Give every particle its copies and draw the rest, (1).

    Args:
        bits: of the spacings, shape (num + 1,).
        copies: floor(x_i), shape (n,).
        remainders: r_i, to scale, shape (n,).
        total: how many ancestors there are, at most num; static or not.

    Returns:
        The ancestors in increasing order, shape (num,), in the first `total` places.
    """
    num = bits.shape[0] - 1
    copied = prefix_sum_whole(copies.astype(jnp.int32))
    rest = jnp.maximum(total - copied[-1], 0)
    sums = scaled_prefix_sum(remainders, rest)
    drawn = count_points(sorted_points(bits, rest), sums, rest, num)
    return fill(jnp.minimum(copied + drawn, total), num)
