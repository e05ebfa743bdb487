"""The noise levels of a run, and the kernels between them.

Levels t_0 > t_1 > ... > t_K; step k leads from x at level k to the less noisy x' at level k + 1. With alpha, sigma at
x's level and alpha', sigma' at that of x',

    r = alpha / alpha',   v = sigma^2 - r^2 sigma'^2,     k(x|x') = N(x; r x', v I)             noising             (1)
    E[x' | x, x_0] = (r sigma'^2 x + alpha' v x_0) / sigma^2,   Var = v sigma'^2 / sigma^2      exact reversal      (2)

The reverse kernel puts the denoised value D in the place of x_0 and has one of three variances:

    posterior   v sigma'^2 / sigma^2                                    that of (2), as if D were x_0
    matched     v sigma'^2 / sigma^2 + (alpha' v / sigma^2)^2 e         with D's mean squared error e a dimension   (3)
    noising     v / r^2                                                 that of the Euler-Maruyama step             (4)

Only (3) has, on average over x, the variance of x' given x; the path's law is then closest to that of the noising, and
so is the law of the finished value under powers and products (`ppl.targets`, equation 1). Means are never computed by
a division by alpha, which may be 0 where the noise is all.

The default grid is uniform in log(sigma / alpha) and ends at 0.01 of the data's scale.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from ppl.models.diffusion.schedules import Schedule

__all__ = ["VARIANCES", "Level", "Levels", "make_levels"]

VARIANCES = ("matched", "posterior", "noising")
LAST = 0.01  # of the data's scale: the noise-to-data ratio of the last level
FIRST = 80.0  # of the data's scale: the ratio of the first level but one, where at the first there is no data


class Level(NamedTuple):
    """One level: its time, the data's factor, the noise's standard deviation, and their rates in time."""

    t: Any
    alpha: Any
    sigma: Any
    alpha_rate: Any
    sigma_rate: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """Levels 0 .. K of a run, float64 arrays `[K + 1]`, and the steps between them, `[K]`.

    Attributes:
        times: t, falling.
        alpha: the data's factors.
        sigma: the noise's standard deviations.
        alpha_rate: their rates in time.
        sigma_rate: rates of sigma; 0 stands where they are infinite, without noise.
        rate: r of (1).
        variance: v of (1).
    """

    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    alpha_rate: np.ndarray
    sigma_rate: np.ndarray
    rate: np.ndarray
    variance: np.ndarray

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.times) - 1

    @property
    def log_ratio(self) -> np.ndarray:
        """log(sigma / alpha), `[K + 1]`; infinite where there is no data, or no noise."""
        with np.errstate(divide="ignore"):
            return np.log(self.sigma) - np.log(self.alpha)

    def equal(self, other: Levels) -> bool:
        """Return whether the levels are the same."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return all(np.array_equal(mine, yours) for mine, yours in pairs)

    def reverse_variance(self, kind: str) -> np.ndarray:
        """Return the "posterior" or the "noising" variance of the reverse kernels, `[K]`.

        Raises:
            ValueError: it is infinite at some step.
        """
        if kind == "posterior":
            return self.variance * (self.sigma[1:] / self.sigma[:-1]) ** 2
        with np.errstate(divide="ignore"):
            result = self.variance / self.rate**2
        if not np.all(np.isfinite(result)):
            raise ValueError(
                "`variance` 'noising' is infinite at a level without data: start the grid later, or take 'matched'."
            )
        return result

    def __repr__(self) -> str:
        first, last = np.exp(self.log_ratio[[0, -1]])
        return f"{self.num_steps} steps, sigma/alpha {first:.4g} to {last:.4g}"


def make_levels(schedule: Schedule, num_steps: int, grid: Any, scale: float) -> Levels:
    """Return the levels of a run.

    Args:
        schedule: what alpha and sigma are at a time.
        num_steps: K.
        grid: None for the default, "time" for equal steps in t from 1 to 0, or the times themselves, `[K + 1]`,
            falling.
        scale: the data's scale, a standard deviation.

    Raises:
        ValueError: the grid has another length, does not fall, or leaves [0, 1].
    """
    if grid is None:
        times = _log_uniform(schedule, num_steps, scale)
    elif isinstance(grid, str):
        if grid != "time":
            raise ValueError(f"`grid` must be None, 'time' or an array of {num_steps + 1} times, got {grid!r}.")
        times = np.linspace(1.0, 0.0, num_steps + 1)
    else:
        times = np.asarray(grid, np.float64)
        if times.shape != (num_steps + 1,):
            raise ValueError(f"`grid` must have {num_steps + 1} times for {num_steps} steps, got shape {times.shape}.")
    if not (np.all(np.diff(times) < 0) and times[0] <= 1 and times[-1] >= 0):
        raise ValueError(f"`grid` must fall within [0, 1], got times from {times[0]} to {times[-1]}.")
    alpha, sigma = np.asarray(schedule.alpha(times)), np.asarray(schedule.sigma(times))
    if np.any(alpha[1:] <= 0) or np.any(sigma[:-1] <= 0):
        raise ValueError(f"{schedule!r} has a level inside the grid without data or without noise.")
    alpha, sigma = np.maximum(alpha, 0.0), np.maximum(sigma, 0.0)
    rate = alpha[:-1] / alpha[1:]
    variance = sigma[:-1] ** 2 - (rate * sigma[1:]) ** 2
    if np.any(variance <= 0):
        raise ValueError(f"{schedule!r} does not lose noise at every step of the grid.")
    alpha_rate, sigma_rate = np.asarray(schedule.alpha_rate(times)), np.asarray(schedule.sigma_rate(times))
    sigma_rate = np.where(np.isfinite(sigma_rate), sigma_rate, 0.0)
    return Levels(times, alpha, sigma, alpha_rate, sigma_rate, rate, variance)


def _log_uniform(schedule: Schedule, num_steps: int, scale: float) -> np.ndarray:
    high, low = (float(schedule.log_ratio(np.float64(t))) for t in (1.0, 0.0))
    low = max(low, math.log(LAST * scale))
    endless = math.isinf(high)
    if endless:
        high = math.log(FIRST * scale)
    if not high > low:
        raise ValueError(
            f"{schedule!r} ends at a noise-to-data ratio of {math.exp(high):.3g}, not above {math.exp(low):.3g}, where "
            f"the default grid for data of scale {scale:.3g} ends."
        )
    inside = np.linspace(high, low, num_steps if endless else num_steps + 1)
    if endless and num_steps == 1:
        inside = np.array([low])
    times = np.asarray(schedule.time(inside), np.float64)
    return np.concatenate([[1.0], times]) if endless else np.concatenate([[1.0], times[1:]])
