"""Conditional systematic resampling: the retained particle's point places every other.

    (1)  x ~ U[P_(r-1), P_r),   u = x - floor(x),   the points are k + u, k = 0 .. num - 1:

the point of slot 0 is uniform in the stretch of r (see `pinning`) and determines all others; the one at k = floor(x)
is r's. Source: Chopin and Singh (2015), "On particle Gibbs sampling", who condition systematic resampling too.
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

__all__ = ["conditional_systematic"]


def conditional_systematic(
    key: PRNGKeyArray | UInt32[Array, "2"],
    log_weights: Float[Array, " n"],
    retained: int | Int32[Array, ""],
    num: int | None = None,
) -> Int32[Array, " num"]:
    """Draw systematic ancestors in random order, given the first.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised, as for `systematic`.
        retained: the ancestor in slot 0, traced or not; see `ppl.kernels.resampling.conditional`.
        num: number of draws, static; n if not given.

    Returns:
        Ancestors, shape (num,), int32 in [0, n), the first `retained`, the others exchangeable.

    Raises:
        ValueError: as for `systematic`, or `retained` is not a scalar.
        TypeError: `retained` is not an integer.
    """
    log_weights, num = check_arguments(log_weights, num)
    retained = check_retained(retained, log_weights.shape[0])
    key_point, key_shuffle = jax.random.split(key)
    ancestors, place = _ancestors(jax.random.bits(key_point, (2,), jnp.uint32), log_weights, retained, num)
    return pin(key_shuffle, ancestors, place, retained)


def _ancestors(
    bits: UInt32[Array, "2"], log_weights: Float[Array, " n"], retained: Int32[Array, ""], num: int
) -> tuple[Int32[Array, " num"], Int32[Array, ""]]:
    """The ancestors in increasing order, and where among them the retained one's point is."""
    weights, alive = relative_weights(log_weights)
    whole, part = sums = scaled_prefix_sum(weights, num)
    place, u = point_in_stretch(bits, sums, retained)  # (1)
    ancestors = fill(whole + (u < part).astype(jnp.int32), num)
    return unless_all_dead(ancestors, alive, log_weights.shape[0]), place
