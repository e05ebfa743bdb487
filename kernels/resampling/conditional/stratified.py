"""Conditional stratified resampling: one stratum holds the retained particle's point, the others are free.

    (1)  x ~ U[P_(r-1), P_r),   k = floor(x),   u_k = x - k,   u_j ~ U[0, 1) for j != k:

the point of slot 0 is uniform in the stretch of r (see `pinning`); the strata are independent, so that it tells
nothing about the points of the others.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.resampling.conditional.pinning import check_retained, pin, point_in_stretch
from ppl.kernels.resampling.inverse_cdf import (
    check_arguments,
    fill,
    relative_weights,
    scaled_prefix_sum,
    unless_all_dead,
)

__all__ = ["conditional_stratified"]


def conditional_stratified(
    key: PRNGKeyArray | UInt32[Array, "2"],
    log_weights: Float[Array, " n"],
    retained: int | Int32[Array, ""],
    num: int | None = None,
) -> Int32[Array, " num"]:
    """Draw stratified ancestors in random order, given the first.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised, as for `stratified`.
        retained: the ancestor in slot 0, traced or not; see `ppl.kernels.resampling.conditional`.
        num: number of draws, static; n if not given.

    Returns:
        Ancestors, shape (num,), int32 in [0, n), the first `retained`, the others exchangeable.

    Raises:
        ValueError: as for `stratified`, or `retained` is not a scalar.
        TypeError: `retained` is not an integer.
    """
    log_weights, num = check_arguments(log_weights, num)
    retained = check_retained(retained, log_weights.shape[0])
    key_points, key_shuffle = jax.random.split(key)
    weights, alive = relative_weights(log_weights)
    whole, part = sums = scaled_prefix_sum(weights, num)
    bits = jax.random.bits(key_points, (num + 2,), jnp.uint32)
    stratum, u_retained = point_in_stretch(bits[num:], sums, retained)
    u = bits[:num].at[stratum].set(u_retained, mode="drop")  # (1)
    below = u.at[whole].get(mode="clip") < part
    ancestors = fill(whole + below.astype(jnp.int32), num)
    return pin(key_shuffle, unless_all_dead(ancestors, alive, log_weights.shape[0]), stratum, retained)
