"""Birth and death: the unfit die, and the fittest give birth in their slots.

With u_i = w_i / mean(w), particle i survives with probability min(1, u_i), and the slot of one that died is given to a
child of a particle drawn in proportion to its excess:

    (1)  a_i = i  with probability min(1, u_i),   else a_i ~ (u - 1)^+ / D,   D = sum_j (u_j - 1)^+,
    (2)  E[o_i] = u_i = n W_i:  an unfit one has no children but itself; D deaths are expected, for sum_i u_i = n, and
         one with u_i > 1 has itself and (u_i - 1) of them.

For weights of one short step of time, w = 1 + g dt, it is the jump process that corrects a diffusion in continuous
time: deaths at the rate (g - mean g)^-, births in proportion to (g - mean g)^+. There exponential clocks run in the
slots; they have no memory, so that drawing anew in each step is the same.

Source: Feynman-Kac correctors (arXiv 2503.02819), Prop. 4.1, for the jump process; (2) makes its steps unbiased at any
length. It needs as many draws as particles. The ancestors are not ordered.

Deviation: weights, their mean and survival probabilities are rounded to float32, and a weight that falls short of the
mean by less than `SLACK` of it survives, so that equal weights do.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.resampling.inverse_cdf import (
    check_arguments,
    relative_weights,
    scaled_prefix_sum,
    search_points,
    to_unit,
    unless_all_dead,
)
from ppl.kernels.resampling.killing import uniform_points

__all__ = ["birth_death"]

SLACK = 1e-6


def birth_death(
    key: PRNGKeyArray | UInt32[Array, "2"], log_weights: Float[Array, " n"], num: int | None = None
) -> Int32[Array, " num"]:
    """Draw ancestors by birth and death: survivors keep their slot.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised. -inf means weight zero, and so does NaN.
        num: number of draws, static; n, which is also what is taken if it is not given.

    Returns:
        Ancestors, shape (n,), int32 in [0, n), not ordered. Equal weights give every particle itself. No
        particle of weight zero is an ancestor, unless all are: then every particle is its own.

    Raises:
        ValueError: `log_weights` is not of rank 1 or is empty, or `num` is not n.

    Example:
        >>> birth_death(jax.random.key(0), jnp.array([0.0, -jnp.inf, 0.0])).tolist()[::2]
        [0, 2]
    """
    log_weights, num = check_arguments(log_weights, num)
    n = log_weights.shape[0]
    if num != n:
        raise ValueError(
            f"`num` must be the number of particles, {n}, for birth and death, got {num}. Other schemes draw any."
        )
    bits = jax.random.bits(key, (3, n), jnp.uint32)
    weights, alive = relative_weights(log_weights)
    fitness = weights / jnp.mean(weights)
    survives = (to_unit(bits[0]) <= fitness) | (fitness >= 1 - SLACK)
    excess = jnp.maximum(fitness - 1, 0.0)
    largest = jnp.max(excess)
    shares = jnp.where(largest > 0, excess / jnp.where(largest > 0, largest, 1.0), weights)
    drawn = search_points(scaled_prefix_sum(shares, n), uniform_points(bits[1], bits[2], n), n)
    index = jnp.arange(n, dtype=jnp.int32)
    return unless_all_dead(jnp.where(survives, index, drawn), alive, n)  # (1)
