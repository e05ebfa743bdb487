"""Measuring a denoiser's error: what the "matched" variance of a reverse kernel needs.

    e(lambda) = E |x_0 - D(alpha x_0 + sigma eps, t)|^2 / d    at lambda = log(sigma / alpha)                       (1)

as the mean over a batch of data and noise at fixed levels. Where no data are at hand, a pilot run of the model itself
draws them. For a mixture of Gaussians the mean over x_0 given x_t is known, and only x_t is drawn:

    E[|x_0 - D|^2 | x] = sum_i p_i (d sigma^2 s_i^2 / T_i + |a_i m_i + b_i x|^2) - |D|^2                            (2)
    a_i = sigma^2 / T_i,   b_i = alpha s_i^2 / T_i,   T_i = alpha^2 s_i^2 + sigma^2
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl.models.diffusion.levels import FIRST, LAST, make_levels

if TYPE_CHECKING:
    from ppl.models.diffusion.model import Diffusion
    from ppl.models.diffusion.schedules import Schedule

__all__ = ["error_table", "mixture_error_table", "run"]

NUM_LEVELS = 48
NUM_RUN = 256  # values that a pilot run draws, in half as many steps as there are levels
VALUES = 1 << 13  # numbers (not arrays) that the mean (1) is taken over, at least 256 arrays


def error_table(model: Diffusion, samples: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return log(sigma / alpha), rising `[L]`, and (1) there.

    Args:
        model: whose denoiser is measured.
        samples: data, `[n, *shape]`.
    """
    ratios = _log_ratios(model.schedule, model.scale)
    times = jnp.asarray(model.schedule.time(ratios), model.mean.dtype)
    count = max(256, VALUES // max(math.prod(model.shape), 1))

    @jax.jit
    def measure(times, samples):
        def one(carry, inputs):
            t, key = inputs
            level = model.level(t)
            chosen_key, noise_key = jax.random.split(key)
            chosen = samples[jax.random.randint(chosen_key, (count,), 0, samples.shape[0])]
            noisy = level.alpha * chosen + level.sigma * jax.random.normal(noise_key, chosen.shape, chosen.dtype)
            denoised = jax.vmap(lambda x: model.denoise_at(x, level))(noisy)
            return carry, jnp.mean((chosen - denoised) ** 2)

        return jax.lax.scan(one, None, (times, jax.random.split(jax.random.key(0), NUM_LEVELS)))[1]

    return ratios, np.asarray(measure(times, jnp.asarray(samples, model.mean.dtype)), np.float64)


def mixture_error_table(
    means: np.ndarray, scales: np.ndarray, weights: np.ndarray, schedule: Schedule, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return log(sigma / alpha), rising `[L]`, and (1) there by (2), in float64.

    Args:
        means: `[K, d]`, centred.
        scales: `[K]`.
        weights: `[K]`, normalised.
        schedule: which levels there are.
        scale: of the data.
    """
    size, random = means.shape[1], np.random.default_rng(0)
    count = max(64, min(VALUES // max(size, 1), VALUES // 4))
    chosen = random.choice(len(means), count, p=weights)
    data = means[chosen] + scales[chosen, None] * random.normal(size=(count, size))
    noise = random.normal(size=(count, size))
    squares, ratios, errors = np.sum(means**2, axis=1), _log_ratios(schedule, scale), []
    for ratio in np.exp(ratios):  # at alpha = 1, sigma = ratio: the error is that of every level of this ratio
        total = scales**2 + ratio**2
        x = data + ratio * noise
        own, cross = np.sum(x**2, axis=1), x @ means.T
        logits = np.log(weights) - 0.5 * size * np.log(total) - 0.5 * (own[:, None] - 2 * cross + squares) / total
        chance = np.exp(logits - logits.max(axis=1, keepdims=True))
        chance /= chance.sum(axis=1, keepdims=True)
        a, b = ratio**2 / total, scales**2 / total
        within = size * ratio**2 * b + a**2 * squares + 2 * a * b * cross + b**2 * own[:, None]
        denoised = (chance * a) @ means + (chance @ b)[:, None] * x
        between = np.sum(chance * within, axis=1) - np.sum(denoised**2, axis=1)
        errors.append(max(np.mean(between), 0.0) / size)
    return ratios, np.array(errors)


def _log_ratios(schedule: Schedule, scale: float) -> np.ndarray:
    ends = [float(schedule.log_ratio(np.float64(t))) for t in (0.0, 1.0)]
    low = max(ends[0], math.log(LAST * scale) - 1.0)
    high = min(ends[1], math.log(FIRST * scale) + 1.0)
    return np.linspace(low, high, NUM_LEVELS)


def run(model: Diffusion) -> Any:
    """Draw data from the model itself, by Heun's method, which keeps the marginals' spread, `[NUM_RUN, *shape]`."""
    from ppl.models.diffusion.reverse import Reverse

    process = Reverse(model, make_levels(model.schedule, NUM_LEVELS // 2, None, model.scale), "posterior", 0.0)

    def one(key):
        def step(state, inputs):
            t, key = inputs
            return process.advance(state, process.forward(state, t).sample(key), t), None

        keys = jax.random.split(key, process.num_steps + 1)
        state = process.start(process.origin().sample(keys[-1]))
        state, _ = jax.lax.scan(step, state, (jnp.arange(process.num_steps), keys[:-1]))
        return process.finish(state, None)

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), NUM_RUN))
