"""Multinomial resampling: independent draws, in increasing order.

With W_i = w_i / sum_j w_j, P_i = num (W_1 + ... + W_i) and V_1 <= .. <= V_num independent uniform points of
[0, num) in increasing order,

    (1)  o_i = N_i - N_(i-1),   N_i = #{V_k < P_i},   (o_1, .. o_n) ~ Multinomial(num, W).

Source: Gordon, Salmond and Smith (1993), "Novel approach to nonlinear/non-Gaussian Bayesian state estimation";
the ordered points by exponential spacings: Carpenter, Clifford and Fearnhead (1999), "Improved particle filter
for nonlinear problems", appendix. The ancestors come in increasing order: as a set they are independent draws,
but the ancestor at a given position is not distributed as W. Where that matters (conditional schemes) permute
them.

Deviation from the textbook: P_i and V_k are integers, multiples of 2^-32, and counting takes no search through
all of them (see `inverse_cdf`). Weights are rounded to float32.
"""

from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.resampling.inverse_cdf import (
    check_arguments,
    place,
    relative_weights,
    scaled_prefix_sum,
    sorted_points,
    spacing_bits,
    unless_all_dead,
)

__all__ = ["multinomial"]


def multinomial(
    key: PRNGKeyArray | UInt32[Array, "2"], log_weights: Float[Array, " n"], num: int | None = None
) -> Int32[Array, " num"]:
    """Draw ancestors independently, each particle with the probability that its weight gives.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised. -inf means weight zero, and so does NaN: whoever must
            know of a NaN asks `ppl.kernels.weights.summarize`. Particles at +inf share the whole mass
            equally.
        num: number of draws, static; n if not given.

    Returns:
        Ancestors, shape (num,), int32 in [0, n), in increasing order. No particle of weight zero is an
        ancestor, unless all are: then the ancestors are 0, 1, .. n - 1, 0, 1, ..

    Raises:
        ValueError: `log_weights` is not of rank 1 or is empty, or `num` is not between 1 and 2^30.

    Example:
        >>> multinomial(jax.random.key(0), jnp.array([0.0, -jnp.inf]), 3).tolist()
        [0, 0, 0]
    """
    log_weights, num = check_arguments(log_weights, num)
    return _ancestors(spacing_bits(key, num), log_weights, num)


def _ancestors(bits: UInt32[Array, " num_plus_1"], log_weights: Float[Array, " n"], num: int) -> Int32[Array, " num"]:
    """The ancestors that the random bits of the spacings lead to."""
    weights, alive = relative_weights(log_weights)
    sums = scaled_prefix_sum(weights, num)
    points = tuple(x[:num] for x in sorted_points(bits, num))
    return unless_all_dead(place(points, sums, num), alive, log_weights.shape[0])  # (1)
