"""Srinivasan resampling (SSP): every expected number of draws is rounded up or down, with negative association.

With x_i = num W_i, f_i = floor(x_i) and q_i = x_i - f_i, walk through the particles and keep one of them
pending, the only one that is not rounded yet. Let P_i = x_1 + .. + x_i and p_i = P_i - floor(P_i). Mass is
preserved, so the fraction of the pending particle after step i is p_i, whatever was drawn before. At step i the
particles `pending` and i share the mass p_(i-1) + q_i:

    (1)  no crossing, p_(i-1) + q_i < 1:   one of them is rounded down and the other is left with the sum. It is
         i that stays pending with probability q_i / (p_(i-1) + q_i) = (p_i - p_(i-1)) / p_i.
    (2)  crossing, p_(i-1) + q_i >= 1:     one of them is rounded up and the other is left with the sum less 1. It
         is i that stays pending with probability (1 - q_i) / (2 - p_(i-1) - q_i) = (p_(i-1) - p_i) / (1 - p_i).

Source: Gerber, Chopin and Whiteley (2019), "Negative association, ordering and convergence of resampling
methods", after Srinivasan (2001), "Distributions on level-sets with applications to approximation
algorithms". There a loop carries the pending fraction as a random state; here it is p_i, hence known, and the
walk needs no loop: the bits s_i, "i stays pending", are independent, with the probabilities of (1) and (2), and

    (3)  N_i = o_1 + .. + o_i = floor(P_i) + [the first j > i with s_j = 1 exists and crosses],

because particles up to i have been rounded to floor(P_i) but for the pending one, whose fate is decided by the
next j with s_j = 1: up if j crosses, down if not. One running maximum from the end finds that j for every i.

    (4)  E[o_i] = x_i,   |o_i - x_i| < 1,   sum_i o_i = num,   and the o_i are negatively associated,

so that the scheme is consistent for every order of the particles, which systematic resampling is not.

The sums P_i are exact, in fixed point (`ppl.kernels.prefix`), with P_n = num; crossings are decided on them, and a
particle of weight zero has q_i = 0 exactly, is never pending and never rounded up. The probabilities (1) and (2) are
float32 quotients of exact differences, compared with uniform numbers of 23 bits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.prefix import FixedPoint, running_max
from ppl.kernels.resampling.inverse_cdf import (
    check_arguments,
    fill,
    relative_weights,
    scaled_prefix_sum,
    unless_all_dead,
)

__all__ = ["ends", "ssp", "step_odds", "steps"]

_ALL_BITS = (1 << 31) - 1  # the largest fraction: they are counted in 2^-31ths, which fit an int32


def ssp(
    key: PRNGKeyArray | UInt32[Array, "2"], log_weights: Float[Array, " n"], num: int | None = None
) -> Int32[Array, " num"]:
    """Draw ancestors by Srinivasan resampling.

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
        >>> ssp(jax.random.key(0), jnp.zeros(4)).tolist()
        [0, 1, 2, 3]
    """
    log_weights, num = check_arguments(log_weights, num)
    weights, alive = relative_weights(log_weights)
    whole, fraction, before = steps(scaled_prefix_sum(weights, num))
    favourable, possible = step_odds(fraction, before)
    stays = jax.random.uniform(key, weights.shape, jnp.float32) * possible < favourable
    ancestors = fill(ends(stays, whole, fraction, before), num)
    return unless_all_dead(ancestors, alive, log_weights.shape[0])


def steps(
    sums: FixedPoint,
) -> tuple[Int32[Array, " n"], Int32[Array, " n"], Int32[Array, " n"]]:
    """Take the prefix sums apart as the walk needs them.

    Args:
        sums: P_i as `ppl.kernels.resampling.inverse_cdf.scaled_prefix_sum` returns them.

    Returns:
        floor(P_i), p_i and p_(i-1), the fractions in 2^-31ths; shape (n,) each. Step i crosses where
        p_i < p_(i-1).
    """
    whole, part = sums
    fraction = (part >> 1).astype(jnp.int32)
    return whole, fraction, _previous(fraction)


def step_odds(
    fraction: Int32[Array, " n"], before: Int32[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Compute numerator and denominator of the probability of s_i = 1, (1) and (2).

    Args:
        fraction: p_i in 2^-31ths.
        before: p_(i-1) in 2^-31ths.

    Returns:
        Two float32 numbers a, b with 0 <= a <= b: u b < a has probability a / b for u ~ U[0, 1). They are equal
        where i stays pending for certain, and a is 0 where it never does.
    """
    crosses = fraction < before
    possible = jnp.where(crosses, _ALL_BITS - fraction, fraction).astype(jnp.float32) + crosses
    return jnp.abs(fraction - before).astype(jnp.float32), possible


def ends(
    stays: Bool[Array, " n"],
    whole: Int32[Array, " n"],
    fraction: Int32[Array, " n"],
    before: Int32[Array, " n"],
) -> Int32[Array, " n"]:
    """Compute the cumulative numbers of draws N_i that the bits s_i lead to, (3).

    Args:
        stays: s_i.
        whole: floor(P_i).
        fraction: p_i in 2^-31ths.
        before: p_(i-1) in 2^-31ths.

    Returns:
        N_i, shape (n,), nondecreasing.
    """
    n = stays.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    crosses = (fraction < before).astype(jnp.int32)
    # the next j wins a maximum from the end; its lowest bit tells what it does
    labelled = jnp.where(stays, 2 * (n - index) + crosses, 0)
    following = _previous(running_max(labelled[::-1]))[::-1]
    return whole + (following & 1)


def _previous(values: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """Shift values by one; a zero comes first."""
    return jnp.concatenate([jnp.zeros(1, values.dtype), values[:-1]])
