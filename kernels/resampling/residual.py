"""Residual resampling: whole numbers of copies for certain, the rest drawn.

With x_i = num w_i / sum_j w_j, R = num - sum_j floor(x_j) and r_i = x_i - floor(x_i),

    (1)  o_i = floor(x_i) + m_i,   (m_1, .. m_n) ~ Multinomial(R, r / R),   E[o_i] = x_i,   o_i > x_i - 1.

Source: Liu and Chen (1998), "Sequential Monte Carlo methods for dynamic systems", section 3.1. The ancestors
come in increasing order: the copies of a particle stand together.

Deviation from the textbook: an x_i within 2^-22 x_i of a whole number is taken for that number. Else rounding
would turn an expected 3 into 2 copies and a remainder of 0.9999999, whose draw may fail. The expectation moves
by less than 2^-22 x_i. The remainders are handed out in integers (see `inverse_cdf` and `multinomial`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.prefix import prefix_sum_whole, total_of_columns
from ppl.kernels.resampling.inverse_cdf import (
    check_arguments,
    count_below,
    fill,
    relative_weights,
    scaled_prefix_sum,
    sorted_points,
    unless_all_dead,
)

__all__ = ["residual"]

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
    return _ancestors(jax.random.bits(key, (num + 1,), jnp.uint32), log_weights, num)


def _ancestors(bits: UInt32[Array, " num_plus_1"], log_weights: Float[Array, " n"], num: int) -> Int32[Array, " num"]:
    """The ancestors that the random bits of the spacings lead to."""
    weights, alive = relative_weights(log_weights)
    expected = weights * (num / jnp.maximum(total_of_columns(weights), 1))  # the sum is >= 1 while one lives
    nearest = jnp.round(expected)
    expected = jnp.where(jnp.abs(expected - nearest) <= expected * _WHOLE, nearest, expected)
    copies = jnp.floor(expected)
    remainders = expected - copies
    remainders = jnp.where(jnp.any(remainders > 0), remainders, weights)  # beyond 2^20 some may be missing

    copied = prefix_sum_whole(copies.astype(jnp.int32))
    rest = jnp.maximum(num - copied[-1, -1], 0)
    sums = scaled_prefix_sum(remainders, rest)
    below = count_below(sorted_points(bits, rest), sums, num + 1, num)
    drawn = jnp.where(sums[0] == rest, rest, below)
    end = jnp.minimum(copied + drawn, num)  # (1)
    return unless_all_dead(fill(end, num), alive, log_weights.shape[0])
