"""Conditional Srinivasan resampling: the retained particle's rounding is biased by size, the walk is free elsewhere.

In the notation of `ppl.kernels.resampling.ssp`, let b = 1 if the retained particle r is rounded up, c_i = 1 if step
i crosses and s_i = 1 if i stays pending. Given A_0 = r the counts have the law P(o) o_r / x_r, so that

    (1)  P(b = 1 | A_0 = r) = q_r (f_r + 1) / x_r,

and given b the bits have their law under the condition that r is rounded that way. If s_r = 0 then b = c_r. If
s_r = 1 then b = c_J, J being the first j > r with s_j = 1. The probability that whoever is pending after step i is
rounded up is p_i; write m_i(1) = p_i and m_i(0) = 1 - p_i. Hence

    (2)  P(s_r = 1 | b) : P(s_r = 0 | b) = P(s_r = 1) m_r(b) : P(s_r = 0) [c_r = b],
    (3)  P(J = j | J >= j, b) = P(s_j = 1) [c_j = b] / m_(j-1)(b),      if s_r = 1;

the bits before r and after J (after r if s_r = 0) are free. All are drawn at once: a hit of (3) is looked for
everywhere behind r, and the first counts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.resampling.conditional.pinning import check_retained, element, pin
from ppl.kernels.resampling.inverse_cdf import (
    check_arguments,
    fill,
    relative_weights,
    scaled_prefix_sum,
    unless_all_dead,
)
from ppl.kernels.resampling.ssp import ends, step_odds, steps

__all__ = ["conditional_ssp"]

_ALL_BITS = (1 << 31) - 1

_Whole = Int32[Array, " n"]
_Odds = tuple[Float[Array, "*shape"], Float[Array, "*shape"]]  # a and b of a probability a / b


def conditional_ssp(
    key: PRNGKeyArray | UInt32[Array, "2"],
    log_weights: Float[Array, " n"],
    retained: int | Int32[Array, ""],
    num: int | None = None,
) -> Int32[Array, " num"]:
    """Draw ancestors of Srinivasan resampling in random order, given the first.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised, as for `ssp`.
        retained: the ancestor in slot 0, traced or not; see `ppl.kernels.resampling.conditional`.
        num: number of draws, static; n if not given.

    Returns:
        Ancestors, shape (num,), int32 in [0, n), the first `retained`, the others exchangeable.

    Raises:
        ValueError: as for `ssp`, or `retained` is not a scalar.
        TypeError: `retained` is not an integer.
    """
    log_weights, num = check_arguments(log_weights, num)
    retained = check_retained(retained, log_weights.shape[0])
    key_up, key_walk, key_shuffle = jax.random.split(key, 3)
    weights, alive = relative_weights(log_weights)
    walk = steps(scaled_prefix_sum(weights, num))
    up = _hits(jax.random.uniform(key_up, dtype=jnp.float32), _up_odds(*walk, retained))
    u = jax.random.uniform(key_walk, weights.shape, jnp.float32)
    free = _hits(u, step_odds(*walk[1:]))
    bound = _hits(u, _bound_odds(*walk[1:], retained, up))
    ancestors = fill(ends(_join(free, bound, retained), *walk), num)
    ancestors = unless_all_dead(ancestors, alive, log_weights.shape[0])
    return pin(key_shuffle, ancestors, jnp.argmax(ancestors == retained), retained)


def _hits(u: Float[Array, "*shape"], odds: _Odds) -> Bool[Array, "*shape"]:
    """True with probability a / b for u ~ U[0, 1): for certain if they are equal and positive, never if a is 0."""
    return u * odds[1] < odds[0]


def _up_odds(whole: _Whole, fraction: _Whole, before: _Whole, retained: Int32[Array, ""]) -> _Odds:
    """The probability (1) that the retained particle is rounded up."""
    fraction, before = element(fraction, retained), element(before, retained)
    copies = element(whole, retained) - element(whole, retained - 1) - (fraction < before)
    rest = ((fraction - before) & _ALL_BITS).astype(jnp.float32) * 2.0**-31
    return rest * (copies + 1), copies + rest


def _bound_odds(fraction: _Whole, before: _Whole, retained: Int32[Array, ""], up: Bool[Array, ""]) -> _Odds:
    """The probabilities (2), at the retained particle, and (3), elsewhere."""
    crosses = fraction < before
    stays, possible = step_odds(fraction, before)
    leaves = jnp.where(crosses == up, possible - stays, 0.0)
    stays_and_up = stays * _mass(fraction, up)
    at_retained = stays_and_up, stays_and_up + leaves
    behind = jnp.where(crosses == up, stays, 0.0), possible * _mass(before, up)
    here = jnp.arange(fraction.shape[0]) == retained
    return tuple(jnp.where(here, x, y) for x, y in zip(at_retained, behind, strict=True))


def _mass(fraction: _Whole, up: Bool[Array, ""]) -> Float[Array, " n"]:
    """m_i(b): the probability that the pending particle is rounded the way b."""
    return (jnp.where(up, fraction, _ALL_BITS - fraction).astype(jnp.float32) + ~up) * 2.0**-31


def _join(free: Bool[Array, " n"], bound: Bool[Array, " n"], retained: Int32[Array, ""]) -> Bool[Array, " n"]:
    """Take the bits that the condition speaks of from `bound`, the others from `free`."""
    index = jnp.arange(free.shape[0])
    stays = element(bound, retained)
    first = jnp.min(jnp.where(bound & (index > retained), index, free.size))  # J
    last = jnp.where(stays, first, retained)
    return jnp.where((index >= retained) & (index <= last), bound, free)
