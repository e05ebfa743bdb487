"""Stratified resampling: one uniform number in each of ``num`` strata.

With W_i = w_i / sum_j w_j, P_i = num (W_1 + ... + W_i) and u_k ~ U[0, 1) independent, ancestor i gets as many
of the ``num`` draws as there are points k + u_k, k = 0 .. num - 1, in [P_(i-1), P_i):

    (1)  o_i = N_i - N_(i-1),   N_i = floor(P_i) + [u_k < P_i - floor(P_i)],  k = floor(P_i),
         E[o_i] = num W_i,   |o_i - num W_i| < 2:

all strata below floor(P_i) lie below P_i with their point, and only the point of the stratum of P_i must be
looked at. Source: Kitagawa (1996), "Monte Carlo filter and smoother for non-Gaussian nonlinear state space
models", appendix; Douc, Cappe and Moulines (2005), "Comparison of resampling schemes for particle filtering",
section 2.3. The ancestors come in increasing order.

Deviation from the textbook: P_i and u_k are integers, multiples of 2^-32 (see `inverse_cdf`). A float32
(k + u_k) / num has 17 different values in the last stratum of 2^20. What remains is the rounding of the
weights: with e_i = (2 + |l_i - max l|) 2^-24, |o_i - num W_i| < 2 + e_i num W_i + 1e-6.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.resampling.inverse_cdf import (
    check_arguments,
    fill,
    relative_weights,
    scaled_prefix_sum,
    unless_all_dead,
)

__all__ = ["stratified"]


def stratified(
    key: PRNGKeyArray | UInt32[Array, "2"], log_weights: Float[Array, " n"], num: int | None = None
) -> Int32[Array, " num"]:
    """Draw ancestors by stratified resampling.

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
        >>> stratified(jax.random.key(0), jnp.zeros(4)).tolist()
        [0, 1, 2, 3]
    """
    log_weights, num = check_arguments(log_weights, num)
    return _ancestors(jax.random.bits(key, (num,), jnp.uint32), log_weights, num)


def _ancestors(u: UInt32[Array, " num"], log_weights: Float[Array, " n"], num: int) -> Int32[Array, " num"]:
    """The ancestors that the numbers u_k 2^-32 lead to."""
    weights, alive = relative_weights(log_weights)
    whole, part = scaled_prefix_sum(weights, num)
    below = u.at[whole].get(mode="clip") < part
    return unless_all_dead(fill(whole + below.astype(jnp.int32), num), alive, log_weights.shape[0])  # (1)
