"""Measuring a denoiser's error: what the "matched" variance of a reverse kernel needs.

    e(lambda) = E |x_0 - D(alpha x_0 + sigma eps, t)|^2 / d    at lambda = log(sigma / alpha)                       (1)

as the mean over a batch of data and noise at fixed levels. Where no data are at hand, a pilot run of the model itself
draws them.
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

__all__ = ["error_table", "run"]

NUM_LEVELS = 48
NUM_RUN = 128  # values that a pilot run draws, in as many steps as there are levels
VALUES = 1 << 13  # numbers (not arrays) that the mean (1) is taken over, at least 256 arrays


def error_table(model: Diffusion, samples: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return log(sigma / alpha), rising `[L]`, and (1) there.

    Args:
        model: whose denoiser is measured.
        samples: data, `[n, *shape]`.
    """
    ends = [float(model.schedule.log_ratio(np.float64(t))) for t in (0.0, 1.0)]
    low = max(ends[0], math.log(LAST * model.scale) - 1.0)
    high = min(ends[1], math.log(FIRST * model.scale) + 1.0)
    ratios = np.linspace(low, high, NUM_LEVELS)
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


def run(model: Diffusion) -> Any:
    """Draw data from the model itself, with the posterior variance, `[NUM_RUN, *shape]`."""
    from ppl.models.diffusion.reverse import Reverse

    process = Reverse(model, make_levels(model.schedule, NUM_LEVELS, None, model.scale), "posterior", 1.0)

    def one(key):
        def step(state, inputs):
            t, key = inputs
            return process.advance(state, process.forward(state, t).sample(key), t), None

        keys = jax.random.split(key, process.num_steps + 1)
        state = process.start(process.origin().sample(keys[-1]))
        state, _ = jax.lax.scan(step, state, (jnp.arange(process.num_steps), keys[:-1]))
        return process.finish(state, None)

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), NUM_RUN))
