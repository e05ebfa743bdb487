"""Conditional multinomial resampling: the other draws are free.

The draws are independent, so A_0 = r tells nothing about the others:

    (1)  A_1, .. A_(num-1) ~ W independently.

Source: Andrieu, Doucet and Holenstein (2010), "Particle Markov chain Monte Carlo methods".
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.resampling.conditional.pinning import check_retained, pin
from ppl.kernels.resampling.inverse_cdf import check_arguments
from ppl.kernels.resampling.multinomial import multinomial

__all__ = ["conditional_multinomial"]


def conditional_multinomial(
    key: PRNGKeyArray | UInt32[Array, "2"],
    log_weights: Float[Array, " n"],
    retained: int | Int32[Array, ""],
    num: int | None = None,
) -> Int32[Array, " num"]:
    """Draw multinomial ancestors in random order, given the first.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised, as for `multinomial`.
        retained: the ancestor in slot 0, traced or not; see `ppl.kernels.resampling.conditional`.
        num: number of draws, static; n if not given.

    Returns:
        Ancestors, shape (num,), int32 in [0, n), the first `retained`, the others exchangeable.

    Raises:
        ValueError: as for `multinomial`, or `retained` is not a scalar.
        TypeError: `retained` is not an integer.
    """
    log_weights, num = check_arguments(log_weights, num)
    retained = check_retained(retained, log_weights.shape[0])
    key_draw, key_shuffle = jax.random.split(key)
    if num == 1:
        return retained[None]
    others = multinomial(key_draw, log_weights, num - 1)
    return pin(key_shuffle, jnp.concatenate([retained[None], others]), 0, retained)
