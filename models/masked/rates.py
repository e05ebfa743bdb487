"""Continuous-time Feynman-Kac weights for masked diffusion.

Noising time tau runs from 0 (data) to 1; each token is kept with probability alpha(tau) and masked at the rate
Q = -alpha'(tau) / alpha(tau). At a state x with masked positions l the ratio of a factor's marginals at the neighbour y
that has token v at l is

    rho_{i,l}(v) = p_i(y) / p_i(x) = o mu_{i,l}(v | x),     o = alpha / (1 - alpha)                               (1)

For the densities h proportional to prod_i p_i(x)^{b_i} exp(a r(x)) at each level, with B = sum_i b_i, generation time
t = 1 - tau, a coefficient a(t), and R_l(v) = h(y) / h(x) = o^B prod_i mu_{i,l}(v)^{b_i} exp(a [r(y) - r(x)]), particles
that unmask at the rates

    lambda_l(v) = B Q R_l(v)                                                                                      (2)

and gather weight at the rate d log w / dt = g,

    g(x) = Q sum_{l masked} [ B sum_v R_l(v) - B o ] + a' r(x)                                                    (3)

follow h: the equation of weighted particles, du(x)/dt = sum_y [u(y) lambda(y -> x) - u(x) lambda(x -> y)] + g(x) u(x),
holds for u = h. Annealing is one factor to the power b, the product two to the power 1, guidance powers 1 - w and w,
where B = 1 and g = Q o sum_l (Z_l - 1).

Both ends of time are singular: o is 0 at tau = 1, where powers above 1 start with vanishing rates and those below 1
with infinite ones, and infinite at tau = 0. The finite steps of `ppl.models.masked.step` have no such ends.

Source: "Discrete Feynman-Kac correctors" (2026), arXiv 2601.10403; (2) and (3) are derived here for any
powers together with a reward.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

__all__ = ["log_weight_rate", "unmasking_rates"]


def unmasking_rates(
    log_probs: Float[Array, "I L V"],
    powers: Float[ArrayLike, " I"],
    masked: Bool[ArrayLike, " L"],
    keep: Float[ArrayLike, ""],
    mask_rate: Float[ArrayLike, ""],
    log_reward_change: Float[ArrayLike, "L V"] | float = 0.0,
) -> Float[Array, "L V"]:
    """Return the rates (2) at which each masked position gets each token.

    Args:
        log_probs: log mu_i at the present state.
        powers: b_i, which sum to more than 0.
        masked: which positions are masked.
        keep: alpha(tau), in (0, 1).
        mask_rate: Q(tau) = -alpha' / alpha.
        log_reward_change: a (r(y) - r(x)) for each neighbour y.

    Returns:
        Rates, 0 where no position is masked and where a factor forbids the token, whatever its power.
    """
    powers = jnp.asarray(powers, log_probs.dtype)[:, None, None]
    terms = jnp.where(jnp.isneginf(log_probs), -jnp.inf, powers * log_probs)
    total = jnp.sum(powers)
    log_odds = jnp.log(keep) - jnp.log1p(-jnp.asarray(keep))
    log_ratio = jnp.sum(terms, axis=0) + total * log_odds + log_reward_change
    return jnp.where(jnp.asarray(masked)[:, None], total * mask_rate * jnp.exp(log_ratio), 0.0)


def log_weight_rate(
    log_probs: Float[Array, "I L V"],
    powers: Float[ArrayLike, " I"],
    masked: Bool[ArrayLike, " L"],
    keep: Float[ArrayLike, ""],
    mask_rate: Float[ArrayLike, ""],
    log_reward_change: Float[ArrayLike, "L V"] | float = 0.0,
    log_reward_rate: Float[ArrayLike, ""] | float = 0.0,
) -> Float[Array, ""]:
    """Return the rate (3) at which a particle's log-weight grows in generation time.

    Args:
        log_probs: log mu_i at the present state, normalised.
        powers: b_i, which sum to more than 0.
        masked: which positions are masked.
        keep: alpha(tau), in (0, 1).
        mask_rate: Q(tau) = -alpha' / alpha.
        log_reward_change: a (r(y) - r(x)) for each neighbour y.
        log_reward_rate: a' r(x).
    """
    gained = jnp.sum(unmasking_rates(log_probs, powers, masked, keep, mask_rate, log_reward_change))
    # Each factor's own ratios sum to o where it allows any token.
    powers = jnp.asarray(powers, log_probs.dtype)
    sums = jnp.exp(jax.nn.logsumexp(log_probs, axis=-1))
    own = jnp.sum(jnp.where(jnp.asarray(masked), jnp.sum(powers[:, None] * sums, axis=0), 0.0))
    return gained - mask_rate * keep / (1 - keep) * own + log_reward_rate
