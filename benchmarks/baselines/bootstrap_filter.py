"""A bootstrap particle filter written by hand in JAX: what the general library's speed is compared with.

The program, with an unknown drift that is drawn once and used at every step:

    (1)  drift ~ N(0, scale^2),   x_0 = 0,   x_t ~ N(x_(t-1) + drift, 1),   y_t ~ N(x_t, 0.5^2),   t = 1 .. T.

The filter (Gordon, Salmond and Smith 1993; resampled when the effective sample size falls below N / 2, Liu
and Chen 1998) moves N particles (drift, x), weights them by the likelihood, and estimates

    (2)  log Z = sum of log( sum_n W_n exp(l_n) )   with W the normalised weights before a step, l its
         log-likelihoods,

accumulated here as the log of the mean weight at every resampling and once at the end. Weights that were not
resampled away are carried on. A resampled particle takes its drift along. The exact value, for the check, is
the density of a joint Gaussian: see `kalman_log_evidence`.

Everything is one `jax.jit`: the particles are drawn in one batch a step from keys split beforehand,
resampling is a real branch of `jax.lax.cond`, and the paths are traced back once, after the loop, along the
stored ancestors.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from ppl.kernels.resampling import systematic

__all__ = ["FilterResult", "bootstrap_filter", "kalman_log_evidence", "simulate_observations"]

NOISE = 0.5  # standard deviation of an observation


class FilterResult(NamedTuple):
    """What a run of the filter keeps.

    Attributes:
        log_evidence: shape (), nats; the estimate (2).
        log_weights: shape (n,), nats; unnormalised, of the last step's particles.
        drift: shape (n,); of the last step's particles.
        paths: shape (n, t); of the last step's particles, traced back to the first step.
        ancestors: shape (t, n); row t names the particles of step t from which those after it descend.
        ess: shape (t,), particles; before the decision to resample.
        resampled: shape (t,); whether a step resampled.
    """

    log_evidence: Float[Array, ""]
    log_weights: Float[Array, " n"]
    drift: Float[Array, " n"]
    paths: Float[Array, "n t"]
    ancestors: Int32[Array, "t n"]
    ess: Float[Array, " t"]
    resampled: Bool[Array, " t"]


@functools.partial(jax.jit, static_argnames=("num_particles", "ess_threshold"))
def bootstrap_filter(
    key: PRNGKeyArray,
    observations: Float[Array, " t"],
    scale: float = 1.0,
    *,
    num_particles: int,
    ess_threshold: float = 0.5,
) -> FilterResult:
    """Run the filter.

    Args:
        key: random key, consumed once.
        observations: shape (t,), the y of (1).
        scale: standard deviation of the drift.
        num_particles: N, static.
        ess_threshold: resample when the effective sample size is below this fraction of N, static.

    Returns:
        A `FilterResult`.
    """
    n, num_steps = num_particles, observations.shape[0]
    key_drift, key_steps = jax.random.split(key)
    keys = jax.random.split(key_steps, (num_steps, 2))
    identity = jnp.arange(n, dtype=jnp.int32)

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        drift, x, log_weights, log_evidence = carry
        y, (key_x, key_resample) = inputs
        x = x + drift + jax.random.normal(key_x, (n,))
        log_weights = log_weights - 0.5 * ((y - x) / NOISE) ** 2
        log_mean, weight_ess = _log_mean_and_ess(log_weights)
        resample = weight_ess < ess_threshold * n

        def do_resample() -> tuple:
            ancestors = systematic(key_resample, log_weights)
            moved = jnp.stack([drift, x], axis=-1).at[ancestors].get(mode="promise_in_bounds")
            return moved[:, 0], moved[:, 1], jnp.zeros(n), log_evidence + log_mean, ancestors

        def keep() -> tuple:
            return drift, x, log_weights, log_evidence, identity

        *carry, ancestors = lax.cond(resample, do_resample, keep)
        return tuple(carry), (x, ancestors, weight_ess, resample)

    start = scale * jax.random.normal(key_drift, (n,)), jnp.zeros(n), jnp.zeros(n), jnp.zeros(())
    (drift, _, log_weights, log_evidence), history = lax.scan(step, start, (observations, keys))
    xs, ancestors, ess, resampled = history
    constant = -num_steps * (0.5 * np.log(2 * np.pi) + np.log(NOISE))
    log_evidence = log_evidence + _log_mean_and_ess(log_weights)[0] + constant
    paths = _trace_back(xs, ancestors, resampled)
    return FilterResult(log_evidence, log_weights, drift, paths, ancestors, ess, resampled)


def simulate_observations(seed: int, num_steps: int, drift: float = 0.1) -> np.ndarray:
    """Draw observations from (1) with a given drift.

    Args:
        seed: of numpy's generator.
        num_steps: T.
        drift: the drift that the filter does not know.

    Returns:
        Shape (t,), float32.
    """
    generator = np.random.default_rng(seed)
    x = np.cumsum(drift + generator.normal(size=num_steps))
    return (x + NOISE * generator.normal(size=num_steps)).astype(np.float32)


def kalman_log_evidence(observations: Float[np.ndarray, " t"], scale: float = 1.0) -> float:
    """Compute log p(y) of (1) in closed form, in float64.

    y is jointly Gaussian with mean zero and

        (3)  Cov(y_s, y_t) = scale^2 s t + min(s, t) + 0.5^2 [s = t],   s, t = 1 .. T.

    Args:
        observations: shape (t,).
        scale: standard deviation of the drift.

    Returns:
        Nats.
    """
    y = np.asarray(observations, np.float64)
    times = np.arange(1, len(y) + 1, dtype=np.float64)
    covariance = scale**2 * np.outer(times, times) + np.minimum.outer(times, times)
    root = np.linalg.cholesky(covariance + NOISE**2 * np.eye(len(y)))
    whitened = np.linalg.solve(root, y)
    return float(-0.5 * whitened @ whitened - np.log(np.diag(root)).sum() - 0.5 * len(y) * np.log(2 * np.pi))


def _log_mean_and_ess(log_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    maximum = jnp.max(log_weights)
    weights = lax.optimization_barrier(jnp.exp(log_weights - maximum))
    total = jnp.sum(weights)
    return maximum + jnp.log(total / log_weights.shape[0]), total * total / jnp.sum(weights * weights)


def _trace_back(xs: jax.Array, ancestors: jax.Array, resampled: jax.Array) -> jax.Array:
    """Follow the ancestors of the last step's particles to the first step; paths of shape (n, t)."""

    def step(index: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        x, ancestor, was_resampled = inputs
        index = lax.cond(was_resampled, lambda: ancestor.at[index].get(mode="promise_in_bounds"), lambda: index)
        return index, x.at[index].get(mode="promise_in_bounds")

    last = jnp.arange(xs.shape[1], dtype=jnp.int32)
    return lax.scan(step, last, (xs, ancestors, resampled), reverse=True)[1].T
