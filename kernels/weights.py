"""Log-weights of a population: normaliser, effective sample size and entropy together.

With ``m = max_i l_i``, ``w_i = exp(l_i - m)``, ``S1 = sum_i w_i`` and ``S2 = sum_i w_i^2``:

    (1)  log_sum = log sum_i exp(l_i)          = m + log S1
    (2)  ess     = (sum_i w_i)^2 / sum_i w_i^2 = S1 * (S1 / S2)
    (3)  entropy = -sum_i W_i log W_i          = log S1 - sum_i w_i (l_i - m) / S1,   W_i = w_i / S1

(2) is Kong, Liu and Wong (1994), "Sequential imputations and Bayesian missing data problems", section 4.1;
(3) is the entropy of the normalised weights written so that they are never formed.

The log-weights are read twice: once for the maximum, once for the weights, which are kept for the three
sums. Keeping them costs less than the alternatives: one variadic reduction is not vectorised by XLA on a CPU
(4 times slower at N = 16384), and without the barrier below every sum takes its exponentials anew (twice
slower).

Uniform weights give ``ess == N`` without rounding: the sums are then whole numbers, exact in float32 up to
2^24. In general ``ess <= N`` holds up to the rounding of the sums, a few units of 1e-7.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

__all__ = ["WeightSummary", "summarize"]


class WeightSummary(NamedTuple):
    """What a population's log-weights say.

    Attributes:
        log_sum: shape (), nats; the log of the summed weights, not divided by their number.
        ess: shape (), particles; the effective sample size, between 1 and N while one particle lives.
        entropy: shape (), nats; the entropy of the normalised weights, between 0 and log N.
    """

    log_sum: Float[Array, ""]
    ess: Float[Array, ""]
    entropy: Float[Array, ""]


def summarize(log_weights: Float[Array, " n"]) -> WeightSummary:
    """Compute the log-sum, the effective sample size and the entropy of log-weights.

    Args:
        log_weights: shape (n,), nats, unnormalised; -inf is a particle of weight zero.

    Returns:
        A `WeightSummary` of scalars. If all log-weights are -inf: ``(-inf, 0, 0)``. If one of them is NaN or
        +inf: NaN in all three, so that a broken weight cannot pass for a small one. The derivative of a weight of
        zero is zero, also where all are.

    Raises:
        ValueError: `log_weights` is not of rank 1, or is empty.

    Example:
        >>> [round(float(x), 4) for x in summarize(jnp.log(jnp.array([0.5, 0.25, 0.25])))]
        [0.0, 2.6667, 1.0397]
    """
    log_weights = jnp.asarray(log_weights)
    if log_weights.ndim != 1 or log_weights.shape[0] == 0:
        raise ValueError(
            f"`log_weights` must have shape (n,) with n >= 1, got shape {log_weights.shape}. "
            "Map over further axes with jax.vmap."
        )
    log_weights = log_weights.astype(jnp.promote_types(log_weights.dtype, jnp.float32))
    maximum = jnp.max(log_weights)
    shift = jnp.where(jnp.isfinite(maximum), maximum, 0)
    centred = log_weights - shift
    weights = lax.optimization_barrier(jnp.exp(centred))
    sum_1 = _sum(weights)
    sum_2 = _sum(weights * weights)
    sum_log = _sum(jnp.where(weights > 0, weights * centred, 0))

    alive = sum_1 > 0
    divisor = jnp.where(alive, sum_1, 1)
    log_sum_1 = jnp.where(alive, jnp.log(divisor), -jnp.inf)  # the derivative of log 0 would be NaN
    log_sum = shift + log_sum_1  # (1)
    ess = jnp.where(alive, sum_1 * (sum_1 / jnp.where(alive, sum_2, 1)), 0)  # (2)
    entropy = jnp.where(alive, jnp.maximum(log_sum_1 - sum_log / divisor, 0), 0)  # (3)

    broken = ~jnp.isfinite(sum_1)  # not the maximum: XLA's may pass over a NaN
    nan = jnp.asarray(jnp.nan, log_sum.dtype)
    return WeightSummary(*(jnp.where(broken, nan, x) for x in (log_sum, ess, entropy)))


def _sum(values: jax.Array) -> jax.Array:
    """Sum in two levels, so that the rounding error stays that of about sqrt(n) additions."""
    n = values.shape[0]
    rows = 1 << (n.bit_length() // 2)
    if n < 1 << 12 or n % rows:
        return jnp.sum(values)
    return jnp.sum(jnp.sum(values.reshape(rows, n // rows), axis=0))
