"""Data whose noisy densities are known: mixtures of Gaussians, and data sets.

Data from sum_i w_i N(m_i, s_i^2 I) in d dimensions have at a level alpha, sigma the density

    q_t(x) = sum_i w_i N(x; alpha m_i, T_i I),   T_i = alpha^2 s_i^2 + sigma^2                                     (1)

and with p_i(x), the posterior probability of component i, the denoised value

    D(x, t) = sum_i p_i(x) (sigma^2 m_i + alpha s_i^2 x) / T_i                                                     (2)
    grad log q_t(x) = sum_i p_i(x) (alpha m_i - x) / T_i                                                           (3)

where (3), unlike the score that follows from (2), loses no digits as sigma goes to 0. A data set is the mixture with
s_i = 0: (2) is the mean of the data that x may have come from; where sigma is 0 it has no density, D is x / alpha and
the score 0. All are computed by matrix products, from data centred at their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl.models.diffusion import pilot
from ppl.models.diffusion.levels import Level
from ppl.models.diffusion.model import Diffusion
from ppl.models.diffusion.schedules import Schedule

__all__ = ["EmpiricalData", "GaussianMixture", "KnownDiffusion"]


class GaussianMixture:
    """A mixture of Gaussians, each the same in all directions.

    Attributes:
        means: `[K, *shape]`.
        scales: standard deviations, `[K]` or one for all.
        weights: `[K]`, positive; they are normalised. None for equal ones.
    """

    def __init__(self, means: Any, scales: Any, weights: Any = None):
        self.means = np.asarray(means)
        if self.means.ndim < 1 or not len(self.means) or not np.all(np.isfinite(self.means)):
            raise ValueError(f"`means` must be finite, `[components, ...]`, got shape {self.means.shape}.")
        count = len(self.means)
        self.scales = _per_component("scales", scales, count)
        self.weights = _per_component("weights", 1.0 if weights is None else weights, count)
        if not np.all(self.scales > 0):
            raise ValueError(f"`scales` must be positive, got {scales!r}; for points take EmpiricalData.")
        if not np.all(self.weights > 0):
            raise ValueError(f"`weights` must be positive, got {weights!r}.")
        self.weights = self.weights / self.weights.sum()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one value."""
        return self.means.shape[1:]

    def diffuse(self, schedule: Schedule) -> KnownDiffusion:
        """Return the diffusion model of this data, exact at every level."""
        return KnownDiffusion(self.means, self.scales, self.weights, schedule)

    def sample(self, key, num: int) -> Any:
        """Draw `num` values, `[num, *shape]`."""
        return _draw(key, self.means, self.scales, self.weights, num)

    def __repr__(self) -> str:
        return f"GaussianMixture({len(self.means)} components of {self.shape})"


class EmpiricalData:
    """A data set: the diffusion model that a perfectly trained network would be.

    Attributes:
        data: `[n, *shape]`.
        labels: int `[n]`, by which the model can be conditioned; None for none.
    """

    def __init__(self, data: Any, labels: Any = None):
        self.data = np.asarray(data)
        if self.data.ndim < 1 or not len(self.data) or not np.all(np.isfinite(self.data)):
            raise ValueError(f"`data` must be finite, `[n, ...]`, got shape {self.data.shape}.")
        self.labels = None if labels is None else np.asarray(labels)
        if self.labels is not None and self.labels.shape != (len(self.data),):
            raise ValueError(f"`labels` must have shape {(len(self.data),)}, got {self.labels.shape}.")

    def diffuse(self, schedule: Schedule) -> KnownDiffusion:
        """Return the diffusion model of this data; `.given(label=3)` conditions it."""
        count = len(self.data)
        return KnownDiffusion(self.data, np.zeros(count), np.full(count, 1 / count), schedule, self.labels)

    def __repr__(self) -> str:
        return f"EmpiricalData({len(self.data)} of {self.data.shape[1:]})"


class KnownDiffusion(Diffusion):
    """A diffusion model whose denoised values and densities are exact; see the module."""

    normalised = True  # its densities, at every level

    def __init__(self, means, scales, weights, schedule: Schedule, labels: Any = None):
        self.labels = labels
        self._components = means, scales, weights
        shape = means.shape[1:]
        mean = np.tensordot(weights, means, 1)
        size = max(math.prod(shape), 1)
        spread = np.sum((means - mean).reshape(len(means), -1) ** 2, axis=1) / size
        scale = math.sqrt(weights @ (scales**2 + spread)) or 1.0  # one point has none
        self._means = jnp.asarray((means - mean).reshape(len(means), size), jnp.result_type(float))
        self._squared_scales = jnp.asarray(scales**2, self._means.dtype)
        self._log_weights = jnp.asarray(np.log(weights), self._means.dtype)
        self._equal_scales = bool(np.all(scales == scales[0]))
        super().__init__(_never, shape, schedule, "x0", mean=mean, scale=scale)
        self.tail_scale = float(np.min(scales))

    def given(self, *, label: int) -> KnownDiffusion:
        """Return the model of the data with one label."""
        if self.labels is None:
            raise ValueError(f"{self!r} has no labels to be given.")
        means, scales, weights = self._components
        chosen = self.labels == label
        if not np.any(chosen):
            raise ValueError(f"`label` must be one of {sorted(set(self.labels.tolist()))}, got {label!r}.")
        kept = weights[chosen] / weights[chosen].sum()
        model = KnownDiffusion(means[chosen], scales[chosen], kept, self.schedule)
        model.conditions = {"label": label}
        return model

    def on(self, schedule: Schedule) -> KnownDiffusion:
        """Return the model of the same data on another schedule."""
        model = KnownDiffusion(*self._components, schedule, self.labels)
        model.conditions = self.conditions
        return model

    def log_density(self, x, t) -> Any:
        """Return log q_t(x), (1), a scalar."""
        return self.log_density_at(x, self.level(t))

    def log_density_at(self, x, level: Level) -> Any:
        """Return log q_t(x) at a level."""
        total = self._total(level)
        logits, common = self._logits(self._centred(x, level), level, total)
        size = self._means.shape[1]
        return jax.nn.logsumexp(logits) + common - 0.5 * size * math.log(2 * math.pi)

    def denoise_at(self, x, level: Level) -> Any:
        """Return (2)."""
        to_means, to_x = level.sigma**2, level.alpha * self._squared_scales
        centred, denoised, certain = self._averaged(x, level, to_means, to_x)
        denoised = jnp.where(certain, centred / jnp.where(certain, level.alpha, 1.0), denoised)
        return denoised.reshape(self.shape) + self.mean

    def score(self, x, t) -> Any:
        """Return (3)."""
        level = self.level(t)
        _, score, certain = self._averaged(x, level, level.alpha, -1.0)
        return jnp.where(certain, 0.0, score).reshape(self.shape)

    def check_denoiser(self) -> None:
        """Pass: there is none."""

    def measured_error(self) -> tuple[np.ndarray, np.ndarray]:
        """Return log(sigma / alpha), rising, and the denoised value's mean squared error there."""
        means, scales, weights = self._components
        centred = (means - np.tensordot(weights, means, 1)).reshape(len(means), -1)
        return pilot.mixture_error_table(centred, scales, weights, self.schedule, self.scale)

    def _centred(self, x, level: Level):
        return (x - level.alpha * self.mean).reshape(-1)

    def _total(self, level: Level):
        return level.alpha**2 * self._squared_scales + level.sigma**2

    def _averaged(self, x, level: Level, to_means, to_x):
        """Return x centred, sum_i p_i(x) (a m_i + b_i x) / T_i, and whether x is a point of the data for certain.

        For certain means that T_i is 0, in the place of which 1 stands. The sum is one product with [a m_i, b_i, T_i].
        """
        total, centred = self._total(level), self._centred(x, level)
        certain = jnp.any(total == 0)
        total = jnp.where(certain, 1.0, total)
        logits, _ = self._logits(centred, level, total)
        terms = jnp.exp(logits - jnp.max(logits))
        columns = jnp.broadcast_to(to_x, total.shape), total
        table = jnp.concatenate([to_means * self._means, *(column[:, None] for column in columns)], axis=1)
        sums = terms @ (table / total[:, None])
        return centred, (sums[:-2] + sums[-2] * centred) / sums[-1], certain

    def _logits(self, centred, level: Level, total):
        """Return log w_i N(x; alpha m_i, T_i I) without a common term, and that term without the powers of 2 pi."""
        size = self._means.shape[1]
        inner = self._means @ centred
        squares = jnp.sum(self._means**2, axis=1)
        cross = level.alpha * (inner - 0.5 * level.alpha * squares) / total
        own = jnp.sum(centred**2)
        if self._equal_scales:
            return self._log_weights + cross, -0.5 * (own / total[0] + size * jnp.log(total[0]))
        return self._log_weights + cross - 0.5 * (own / total + size * jnp.log(total)), 0.0


def _draw(key, means, scales, weights, num: int) -> Any:
    key, noise_key = jax.random.split(key)
    chosen = jax.random.choice(key, len(means), (num,), p=jnp.asarray(weights))
    means, scales = jnp.asarray(means, jnp.result_type(float)), jnp.asarray(scales, jnp.result_type(float))
    noise = jax.random.normal(noise_key, (num, *means.shape[1:]), means.dtype)
    return means[chosen] + scales[chosen].reshape(num, *(1,) * (means.ndim - 1)) * noise


def _per_component(name: str, given: Any, count: int) -> np.ndarray:
    values = np.asarray(given, np.float64)
    if values.shape not in ((), (count,)) or not np.all(np.isfinite(values)):
        raise ValueError(f"`{name}` must be a finite number or have shape {(count,)}, got shape {values.shape}.")
    return np.broadcast_to(values, (count,)).copy()


def _never(x, t) -> Callable:
    raise AssertionError("the exact denoised value takes the place of a network's")
