"""Killing: the fit stay where they are, the others are replaced.

With W_i = w_i / sum_j w_j and w* = max_j w_j, particle i survives with probability w_i / w* and otherwise its
slot gets an ancestor drawn from W, independently of everything else:

    (1)  a_i = i  with probability w_i / w*,   else a_i ~ W,
    (2)  E[o_i] = w_i / w* + W_i sum_j (1 - w_j / w*) = w_i / w* + W_i (n - sum_j w_j / w*) = n W_i.

Source: Del Moral (2004), "Feynman-Kac Formulae", section 2.5.2, with the largest survival probabilities, as in
Chopin, Singh, Soto and Vihola (2022), "On resampling schemes for particle filters with weakly informative
observations", section 3. (2) needs as many draws as particles. At equal weights everyone survives. The
ancestors are not ordered.

Deviation from the textbook: the draws from W are in integers (see `inverse_cdf`). Weights and survival
probabilities are rounded to float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.prefix import multiply
from ppl.kernels.resampling.inverse_cdf import (
    check_arguments,
    relative_weights,
    scaled_prefix_sum,
    search_points,
    to_unit,
    unless_all_dead,
)

__all__ = ["killing", "uniform_points"]


def killing(
    key: PRNGKeyArray | UInt32[Array, "2"], log_weights: Float[Array, " n"], num: int | None = None
) -> Int32[Array, " num"]:
    """Draw ancestors by killing: survivors keep their slot.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised. -inf means weight zero, and so does NaN: whoever must
            know of a NaN asks `ppl.kernels.weights.summarize`. Particles at +inf share the whole mass
            equally.
        num: number of draws, static; n, which is also what is taken if it is not given.

    Returns:
        Ancestors, shape (n,), int32 in [0, n), not ordered. Equal weights give every particle itself. No
        particle of weight zero is an ancestor, unless all are: then every particle is its own.

    Raises:
        ValueError: `log_weights` is not of rank 1 or is empty, or `num` is not n.

    Example:
        >>> killing(jax.random.key(0), jnp.array([0.0, -jnp.inf, 0.0])).tolist()[::2]
        [0, 2]
    """
    log_weights, num = check_arguments(log_weights, num)
    n = log_weights.shape[0]
    if num != n:
        raise ValueError(
            f"`num` must be the number of particles, {n}, for killing, got {num}. The other schemes draw any number."
        )
    return _ancestors(jax.random.bits(key, (3, n), jnp.uint32), log_weights)


def _ancestors(bits: UInt32[Array, "3 n"], log_weights: Float[Array, " n"]) -> Int32[Array, " n"]:
    """The ancestors that the random bits lead to: the first row kills, the others draw."""
    n = log_weights.shape[0]
    weights, alive = relative_weights(log_weights)
    survives = to_unit(bits[0]) <= weights
    drawn = search_points(scaled_prefix_sum(weights, n), uniform_points(bits[1], bits[2], n), n)
    index = jnp.arange(n, dtype=jnp.int32)
    return unless_all_dead(jnp.where(survives, index, drawn), alive, n)  # (1)


def uniform_points(high: UInt32[Array, " n"], low: UInt32[Array, " n"], n: int) -> tuple[jax.Array, jax.Array]:
    """Uniform points of (0, n] in fixed point, n (high 2^-32 + low 2^-64) rounded up."""
    factor = jnp.full_like(high, n)
    whole, part = multiply(high, factor)
    more = multiply(low, factor)[0]
    carry = part + more < part
    part = part + more + 1
    return (whole + carry + (part == 0)).astype(jnp.int32), part
