"""How far a trained denoiser is from what was noised, at each level, on data that it was not trained on.

    e(lambda) = E |x_0 - D(alpha x_0 + sigma eps, t)|^2 / d    at lambda = log(sigma / alpha)                       (1)

It is what the "matched" variance of a reverse kernel carries through (`levels`, equation 3). Of the exact denoiser it
is the posterior's mean variance; a trained one adds its own error. Each value is denoised with its own label.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ppl.models.diffusion.levels import FIRST, LAST
from ppl.models.diffusion.model import Diffusion

__all__ = ["held_out_error"]

NUM_LEVELS = 32
NUM_DRAWS = 512  # noisy values at each level, at least


def held_out_error(
    model: Diffusion, data: Float[np.ndarray, "N ..."], labels: Int[np.ndarray, " N"] | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measure (1), with the same noise at each level.

    Args:
        model: whose denoiser is measured.
        data: clean values that it was not trained on.
        labels: their labels, or None for a denoiser that takes none.
        seed: of the noise.

    Returns:
        lambda, rising, and e there, both `[NUM_LEVELS]` in float64.
    """
    ends = [float(model.schedule.log_ratio(np.float64(t))) for t in (0.0, 1.0)]
    low, high = max(ends[0], math.log(LAST * model.scale)), min(ends[1], math.log(FIRST * model.scale))
    ratios = np.linspace(low, high, NUM_LEVELS)
    repeats = -(-NUM_DRAWS // len(data))

    @jax.jit
    def measure(times, data, labels):
        def squared(level, clean, label, key):
            noisy = level.alpha * clean + level.sigma * jax.random.normal(key, clean.shape)
            seen = model if label is None else model.given(label=label)
            return jnp.mean(jnp.square(clean - seen.denoise_at(noisy, level)))

        def one(index):
            level = model.level(times[index // repeats])
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index % repeats), len(data))
            return jnp.mean(jax.vmap(lambda *each: squared(level, *each))(data, labels, keys))

        return jnp.mean(jax.lax.map(one, jnp.arange(len(times) * repeats)).reshape(-1, repeats), axis=1)

    times: Any = jnp.asarray(model.schedule.time(ratios), jnp.float32)
    return ratios, np.asarray(measure(times, jnp.asarray(data), labels), np.float64)
