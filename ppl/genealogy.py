"""Whose descendants the last particles are, and how much estimates vary from one run to the next as far as that tells.

`ancestors[t, n]` is the parent of particle n after iteration t; the Eve of a particle is its ancestor before the first.
The mathematics stands in `ppl.inference.variance`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ppl.lanes import take

__all__ = ["correction", "family_sums", "log_evidence_error", "origins", "relative_variance"]


@jax.jit
def origins(ancestors) -> Any:
    """Return the index `int32[N]` that each particle's line had before the first of the iterations `[T, N]` given."""
    num = ancestors.shape[1]
    last = jnp.arange(num, dtype=jnp.int32)
    return jax.lax.scan(lambda index, parents: (take(parents, index), None), last, ancestors, reverse=True)[0]


def family_sums(values, families) -> Any:
    """Return sums `[N, ...]` over the particles of each family of values `[N, ...]`; 0 for families that died out."""
    return jax.ops.segment_sum(values, families, families.shape[0])


def correction(num_resampled, num_particles: int, independent: bool) -> tuple[Any, Any]:
    """Return (N / (N - 1))^(R + 1) and (N / (N - 1))^R - 1.

    Args:
        num_resampled: how often it was resampled.
        num_particles: N.
        independent: whether ancestors were drawn independently. If not, R is taken as 0.
    """
    if num_particles == 1:
        return jnp.nan, jnp.nan
    rate = -jnp.log1p(-1.0 / num_particles)
    count = num_resampled if independent else 0
    return jnp.exp((count + 1) * rate), jnp.expm1(count * rate)


def relative_variance(log_weights, families, num_resampled, independent: bool) -> Any:
    """Return the estimate of Var[Z_hat] / Z_hat^2; a scalar, which may be negative where ancestors are independent.

    Args:
        log_weights: normalised, `[N]`.
        families: the Eve of each particle, `int32[N]`.
        num_resampled: how often it was resampled.
        independent: whether ancestors were drawn independently.
    """
    num = log_weights.shape[0]
    factor, taken_out = correction(num_resampled, num, independent)
    shares = family_sums(jnp.exp(log_weights), families)
    return factor * jnp.sum((shares - 1.0 / num) ** 2) - taken_out


@jax.jit(static_argnames="independent")
def log_evidence_error(log_weights, ancestors, resampled, independent: bool) -> Any:
    """Return the standard error of log Z_hat; NaN where all living particles have one Eve, or the estimate is negative.

    Args:
        log_weights: normalised, `[N]`.
        ancestors: `int32[T, N]`.
        resampled: `bool[T]`.
        independent: whether ancestors were drawn independently.
    """
    families = origins(ancestors)
    variance = relative_variance(log_weights, families, jnp.sum(resampled), independent)
    num_families = jnp.sum(family_sums(jnp.exp(log_weights), families) > 0)
    return jnp.where(num_families > 1, jnp.sqrt(variance), jnp.nan)
