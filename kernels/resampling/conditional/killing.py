"""Conditional killing: which slot the retained particle is found in, and how it came there.

With v_i = w_i / max_j w_j, slot m of killing holds r by survival if m = r, with probability v_r, or by a new draw,
with probability (1 - v_m) W_r. The slots are independent. In random order slot 0 is a slot m picked uniformly, and
given that it holds r

    (1)  m = r by survival with probability v_r / (n W_r) = sum_j v_j / n,
    (2)  else m by a new draw, with probability proportional to 1 - v_m,

while all other slots are filled freely.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.resampling.conditional.pinning import check_retained, pin
from ppl.kernels.resampling.inverse_cdf import check_arguments, relative_weights
from ppl.kernels.resampling.killing import killing
from ppl.kernels.resampling.systematic import systematic

__all__ = ["conditional_killing"]


def conditional_killing(
    key: PRNGKeyArray | UInt32[Array, "2"],
    log_weights: Float[Array, " n"],
    retained: int | Int32[Array, ""],
    num: int | None = None,
) -> Int32[Array, " num"]:
    """Draw killing's ancestors in random order, given the first.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised, as for `killing`.
        retained: the ancestor in slot 0, traced or not; see `ppl.kernels.resampling.conditional`.
        num: number of draws, static; n, which is also what is taken if it is not given.

    Returns:
        Ancestors, shape (n,), int32 in [0, n), the first `retained`, the others exchangeable: unlike in `killing`,
        survivors do not keep their slot.

    Raises:
        ValueError: as for `killing`, or `retained` is not a scalar.
        TypeError: `retained` is not an integer.
    """
    log_weights, num = check_arguments(log_weights, num)
    n = log_weights.shape[0]
    retained = check_retained(retained, n)
    key_way, key_slot, key_others, key_shuffle = jax.random.split(key, 4)
    ancestors = killing(key_others, log_weights, num)
    weights, _ = relative_weights(log_weights)
    survived = jax.random.uniform(key_way, dtype=jnp.float32) * n < jnp.sum(weights)  # (1)
    killed = systematic(key_slot, jnp.log1p(-weights), 1)[0]  # (2)
    return pin(key_shuffle, ancestors, jnp.where(survived, retained, killed), retained)
