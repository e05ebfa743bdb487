"""Conditional residual resampling: slot 0 is one of the fixed copies or one of the draws.

With x_i = num W_i and f_i = floor(x_i), r has f_r fixed copies and expects x_r - f_r of the R drawn ones, so that

    (1)  P(slot 0 holds a fixed copy | A_0 = r) = f_r / x_r;  then all R draws are free,
    (2)  else it holds a draw, and the other R - 1 draws are free, as they are independent.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.resampling.conditional.pinning import check_retained, element, pin
from ppl.kernels.resampling.inverse_cdf import check_arguments, relative_weights, spacing_bits, unless_all_dead
from ppl.kernels.resampling.residual import lay_out, split_expected

__all__ = ["conditional_residual"]


def conditional_residual(
    key: PRNGKeyArray | UInt32[Array, "2"],
    log_weights: Float[Array, " n"],
    retained: int | Int32[Array, ""],
    num: int | None = None,
) -> Int32[Array, " num"]:
    """Draw residual ancestors in random order, given the first.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised, as for `residual`.
        retained: the ancestor in slot 0, traced or not; see `ppl.kernels.resampling.conditional`.
        num: number of draws, static; n if not given.

    Returns:
        Ancestors, shape (num,), int32 in [0, n), the first `retained`, the others exchangeable.

    Raises:
        ValueError: as for `residual`, or `retained` is not a scalar.
        TypeError: `retained` is not an integer.
    """
    log_weights, num = check_arguments(log_weights, num)
    retained = check_retained(retained, log_weights.shape[0])
    key_copy, key_draws, key_shuffle = jax.random.split(key, 3)
    weights, alive = relative_weights(log_weights)
    expected, copies, remainders = split_expected(weights, num)
    u = jax.random.uniform(key_copy, dtype=jnp.float32)
    is_copy = u * element(expected, retained) < element(copies, retained)  # (1)
    free = num - 1 + is_copy.astype(jnp.int32)  # how many ancestors are laid out: without the pinned draw, (2)
    ancestors = lay_out(spacing_bits(key_draws, num), copies, remainders, free)
    place = jnp.where(is_copy, jnp.argmax(ancestors == retained), num - 1)
    return pin(key_shuffle, unless_all_dead(ancestors, alive, log_weights.shape[0]), place, retained)
