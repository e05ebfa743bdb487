"""Noise schedules: how much of the data is left at each time.

    x_t = alpha(t) x_0 + sigma(t) eps,   eps ~ N(0, I),   t in [0, 1], 1 = noise                                  (1)

What a level is, up to a factor of x, is its noise-to-data ratio; `log_ratio` and its inverse `time` go by

    lambda(t) = log(sigma(t) / alpha(t)), increasing in t                                                         (2)

| schedule | alpha | sigma |
|---|---|---|
| `VariancePreserving("linear")` | exp(-L), L = (b_max - b_min) t^2 / 4 + b_min t / 2 | sqrt(1 - alpha^2) |
| `VariancePreserving("cosine")` | sin(u (1 - t)) / sin(u), u = pi / 2 / (1 + s), s = 0.008 | sqrt(1 - alpha^2) |
| `VarianceExploding` | 1 | s_min (s_max / s_min)^t |
| `EDM` | 1 | (s_min^(1/rho) + t (s_max^(1/rho) - s_min^(1/rho)))^rho |
| `RectifiedFlow` | 1 - s | s = shift t / (1 + (shift - 1) t) |
| `Tabulated` | sqrt of a table, interpolated in (2) | sqrt(1 - alpha^2) |

Each formula is written so that nothing cancels: with sigma^2 = 1 - alpha^2 = -expm1(-2 L) for the linear schedule, and

    sigma^2 = sin(u t) sin(u (2 - t)) / sin(u)^2                                                                  (3)

for the cosine, float32 has its full relative accuracy in alpha and sigma at both ends. The ends themselves are right:
alpha(1) is exactly 0 and lambda(1) = +inf for the cosine and the rectified flow (a denoiser that predicts epsilon says
nothing about the data there), sigma(0) is exactly 0 and lambda(0) = -inf wherever the noise starts from none. Where
sigma grows like the square root of t, its rate at 0 is +inf.

The methods take and return numpy arrays (or Python floats, as float64) and jax arrays, elementwise, in the precision
they are given.

Source: Song et al. 2021 (arXiv 2011.13456), appendix C, for the linear and the exploding schedule; Nichol and Dhariwal
2021 (arXiv 2102.09672), eq. 17, in continuous time and without their clipping of the last betas; Karras et al. 2022
(arXiv 2206.00364), eq. 5, with t running from data to noise; Esser et al. 2024 (arXiv 2403.03206), eq. 23, for the
shift.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

__all__ = [
    "EDM",
    "RectifiedFlow",
    "Schedule",
    "Tabulated",
    "VarianceExploding",
    "VariancePreserving",
]

_COSINE_OFFSET = 0.008


class Schedule(abc.ABC):
    """A schedule: what `alpha`, `sigma` and their rates are at a time."""

    @abc.abstractmethod
    def alpha(self, t: ArrayLike) -> Any:
        """Return the data's factor in (1)."""

    @abc.abstractmethod
    def sigma(self, t: ArrayLike) -> Any:
        """Return the noise's factor in (1), a standard deviation."""

    @abc.abstractmethod
    def alpha_rate(self, t: ArrayLike) -> Any:
        """Return d alpha / dt."""

    @abc.abstractmethod
    def sigma_rate(self, t: ArrayLike) -> Any:
        """Return d sigma / dt; +inf at a time where sigma starts like a square root."""

    @abc.abstractmethod
    def log_ratio(self, t: ArrayLike) -> Any:
        """Return log(sigma / alpha), (2), in nats; -inf where there is no noise and +inf where there is no data."""

    @abc.abstractmethod
    def time(self, log_ratio: ArrayLike) -> Any:
        """Return the time in [0, 1] at which log(sigma / alpha) is this; beyond an end, that end."""


@dataclasses.dataclass(frozen=True)
class VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1: data of unit variance keep it.

    Attributes:
        kind: "linear" (the noise's rate beta grows linearly) or "cosine".
        beta_min: rate of noise at t = 0, per unit time; of the linear kind.
        beta_max: rate of noise at t = 1.
    """

    kind: str = "linear"
    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if self.kind not in ("linear", "cosine"):
            raise ValueError(f"`kind` must be 'linear' or 'cosine', got {self.kind!r}.")
        _require_positive("beta_min", self.beta_min)
        _require_positive("beta_max", self.beta_max)
        if self.beta_max < self.beta_min:
            raise ValueError(f"`beta_max` must be at least `beta_min`, got {self.beta_max!r} and {self.beta_min!r}.")

    def alpha(self, t):
        """Return the data's factor."""
        xp, t = _arrays(t)
        if self.kind == "linear":
            return xp.exp(-self._decay(t))
        return xp.sin(_ANGLE * (1 - t)) / math.sin(_ANGLE)

    def sigma(self, t):
        """Return the noise's standard deviation."""
        xp, t = _arrays(t)
        if self.kind == "linear":
            return xp.sqrt(-xp.expm1(-2 * self._decay(t)))
        return xp.sqrt(xp.sin(_ANGLE * t) * xp.sin(_ANGLE * (2 - t))) / math.sin(_ANGLE)  # (3)

    def alpha_rate(self, t):
        """Return d alpha / dt."""
        xp, t = _arrays(t)
        if self.kind == "linear":
            return -self._decay_rate(t) * self.alpha(t)
        return -_ANGLE * xp.cos(_ANGLE * (1 - t)) / math.sin(_ANGLE)

    def sigma_rate(self, t):
        """Return d sigma / dt = -alpha alpha' / sigma; +inf at t = 0."""
        xp, t = _arrays(t)
        return _divide(xp, -self.alpha(t) * self.alpha_rate(t), self.sigma(t))

    def log_ratio(self, t):
        """Return log(sigma / alpha); -inf at t = 0, and +inf at t = 1 of the cosine."""
        xp, t = _arrays(t)
        if self.kind == "linear":
            decay = self._decay(t)
            return decay + 0.5 * _log(xp, -xp.expm1(-2 * decay))
        noise = _log(xp, xp.sin(_ANGLE * t)) + xp.log(xp.sin(_ANGLE * (2 - t)))
        return 0.5 * noise - _log(xp, xp.sin(_ANGLE * (1 - t)))

    def time(self, log_ratio):
        """Return the time of a log-ratio.

        Linear: 2 L = log(1 + exp(2 lambda)) and the positive root of L's parabola. Cosine: with w = u (1 - t),
        sin(u t) = sin(u)^2 sigma^2 / (sin u cos w + cos u sin w), so that nothing cancels at t = 0.
        """
        xp, log_ratio = _arrays(log_ratio)
        log_ratio = xp.clip(log_ratio, self.log_ratio(0.0).item(), self.log_ratio(1.0).item())
        if self.kind == "linear":
            decay = 0.5 * xp.logaddexp(xp.zeros_like(log_ratio), 2 * log_ratio)
            slope, curvature = self.beta_min / 2, (self.beta_max - self.beta_min) / 4
            return xp.clip(2 * decay / (slope + xp.sqrt(slope**2 + 4 * curvature * decay)), 0.0, 1.0)
        sin, cos = math.sin(_ANGLE), math.sin(math.pi / 2 - _ANGLE)
        alpha, sigma = _unit(xp, log_ratio)
        sin_rest, cos_rest = sin * alpha, xp.sqrt(cos**2 + (sin * sigma) ** 2)
        sin_done = (sin * sigma) ** 2 / (sin * cos_rest + cos * sin_rest)
        return xp.clip(xp.arctan2(sin_done, cos * cos_rest + sin * sin_rest) / _ANGLE, 0.0, 1.0)

    def _decay(self, t):
        return t * ((self.beta_max - self.beta_min) / 4 * t + self.beta_min / 2)

    def _decay_rate(self, t):
        return (self.beta_max - self.beta_min) / 2 * t + self.beta_min / 2


@dataclasses.dataclass(frozen=True)
class VarianceExploding(Schedule):
    """alpha = 1 and geometric noise: sigma(t) = sigma_min (sigma_max / sigma_min)^t.

    Attributes:
        sigma_min: standard deviation of the noise at t = 0, in units of the data, positive.
        sigma_max: that at t = 1.
        from_zero: take the variance sigma_min^2 ((sigma_max / sigma_min)^(2 t) - 1) instead, which is 0 at t = 0: the
            marginal of the diffusion whose rate is geometric, as in Feynman-Kac correctors (arXiv 2503.02819).
    """

    sigma_min: float
    sigma_max: float
    from_zero: bool = False

    def __post_init__(self):
        _require_positive("sigma_min", self.sigma_min)
        _require_above("sigma_max", self.sigma_max, "sigma_min", self.sigma_min)
        if not isinstance(self.from_zero, bool):
            raise TypeError(f"`from_zero` must be a bool, got {self.from_zero!r}.")

    def alpha(self, t):
        """Return 1."""
        xp, t = _arrays(t)
        return xp.ones_like(t)

    def sigma(self, t):
        """Return the noise's standard deviation."""
        xp, t = _arrays(t)
        if self.from_zero:
            return self.sigma_min * xp.sqrt(xp.expm1(2 * self._log_range * t))
        return self.sigma_min * xp.exp(self._log_range * t)

    def alpha_rate(self, t):
        """Return 0."""
        xp, t = _arrays(t)
        return xp.zeros_like(t)

    def sigma_rate(self, t):
        """Return d sigma / dt."""
        xp, t = _arrays(t)
        if self.from_zero:
            growth = self.sigma_min**2 * self._log_range * xp.exp(2 * self._log_range * t)
            return _divide(xp, growth, self.sigma(t))
        return self._log_range * self.sigma(t)

    def log_ratio(self, t):
        """Return log sigma."""
        xp, t = _arrays(t)
        if self.from_zero:
            growth = 2 * self._log_range * t
            return math.log(self.sigma_min) + 0.5 * (growth + _log(xp, -xp.expm1(-growth)))
        return math.log(self.sigma_min) + self._log_range * t

    def time(self, log_ratio):
        """Return the time at which log sigma is this."""
        xp, log_ratio = _arrays(log_ratio)
        growth = log_ratio - math.log(self.sigma_min)
        if self.from_zero:
            growth = 0.5 * xp.logaddexp(xp.zeros_like(growth), 2 * growth)
        return xp.clip(growth / self._log_range, 0.0, 1.0)

    @property
    def _log_range(self) -> float:
        return math.log(self.sigma_max) - math.log(self.sigma_min)


@dataclasses.dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1, and sigma's rho-th root grows linearly.

    Attributes:
        sigma_min: standard deviation of the noise at t = 0, in units of the data, positive.
        sigma_max: that at t = 1.
        rho: how much longer the small levels are stayed at than in equal steps; positive.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        _require_positive("sigma_min", self.sigma_min)
        _require_above("sigma_max", self.sigma_max, "sigma_min", self.sigma_min)
        _require_positive("rho", self.rho)

    def alpha(self, t):
        """Return 1."""
        xp, t = _arrays(t)
        return xp.ones_like(t)

    def sigma(self, t):
        """Return the noise's standard deviation."""
        xp, t = _arrays(t)
        return self._root(t) ** self.rho

    def alpha_rate(self, t):
        """Return 0."""
        xp, t = _arrays(t)
        return xp.zeros_like(t)

    def sigma_rate(self, t):
        """Return d sigma / dt."""
        xp, t = _arrays(t)
        low, high = self._ends
        return self.rho * (high - low) * self._root(t) ** (self.rho - 1)

    def log_ratio(self, t):
        """Return log sigma."""
        xp, t = _arrays(t)
        return self.rho * xp.log(self._root(t))

    def time(self, log_ratio):
        """Return the time at which log sigma is this."""
        xp, log_ratio = _arrays(log_ratio)
        low, high = self._ends
        log_ratio = xp.clip(log_ratio, math.log(self.sigma_min), math.log(self.sigma_max))
        return xp.clip((xp.exp(log_ratio / self.rho) - low) / (high - low), 0.0, 1.0)

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def _root(self, t):
        low, high = self._ends
        return low + t * (high - low)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """A straight line from data to noise: alpha = 1 - s, sigma = s.

    Attributes:
        shift: s = shift t / (1 + (shift - 1) t); above 1 more of the time is spent near the noise. 1: s = t.
    """

    shift: float = 1.0

    def __post_init__(self):
        _require_positive("shift", self.shift)

    def alpha(self, t):
        """Return the data's factor, (1 - t) / (1 + (shift - 1) t)."""
        xp, t = _arrays(t)
        return (1 - t) / self._stretch(t)

    def sigma(self, t):
        """Return the noise's standard deviation, s."""
        xp, t = _arrays(t)
        return self.shift * t / self._stretch(t)

    def alpha_rate(self, t):
        """Return d alpha / dt."""
        return -self.sigma_rate(t)

    def sigma_rate(self, t):
        """Return d sigma / dt."""
        xp, t = _arrays(t)
        return self.shift / self._stretch(t) ** 2

    def log_ratio(self, t):
        """Return log(shift t / (1 - t)); -inf at t = 0 and +inf at t = 1."""
        xp, t = _arrays(t)
        return math.log(self.shift) + _log(xp, t) - _log(xp, 1 - t)

    def time(self, log_ratio):
        """Return the time of a log-ratio."""
        xp, log_ratio = _arrays(log_ratio)
        odds = log_ratio - math.log(self.shift)
        return xp.exp(-xp.logaddexp(xp.zeros_like(odds), -odds))

    def _stretch(self, t):
        return 1 + (self.shift - 1) * t


@dataclasses.dataclass(frozen=True)
class Tabulated(Schedule):
    """A schedule in discrete steps: the table of alpha^2 that a model was trained with.

    Step i of n is the time i / (n - 1); between steps log(sigma / alpha) is linear. Where the last step has no data
    left (alpha = 0), alpha / sigma falls linearly to 0 on the last stretch.

    Attributes:
        alphas_cumprod: alpha^2 at each step, falling, from below 1; positive, except that the last may be 0.
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self):
        try:
            table = tuple(float(value) for value in self.alphas_cumprod)
        except TypeError as error:
            raise TypeError(f"`alphas_cumprod` must be a sequence of numbers, got {self.alphas_cumprod!r}.") from error
        object.__setattr__(self, "alphas_cumprod", table)
        if len(table) < 2:
            raise ValueError(f"`alphas_cumprod` must have at least 2 steps, got {len(table)}.")
        falling = all(later < earlier for earlier, later in zip(table, table[1:], strict=False))
        if not (falling and table[0] < 1.0 and table[-2] > 0.0 and table[-1] >= 0.0):
            raise ValueError(
                "`alphas_cumprod` must fall from below 1 and stay positive (the last may be 0), got "
                f"{table[0]!r} .. {table[-1]!r}{'' if falling else ', not falling'}."
            )

    def __repr__(self) -> str:
        return f"Tabulated({len(self.alphas_cumprod)} steps, {self.alphas_cumprod[0]!r} .. {self.alphas_cumprod[-1]!r})"

    def step(self, t: ArrayLike) -> Any:
        """Return the (fractional) step that the time t stands for: what a network counted in steps is given."""
        xp, t = _arrays(t)
        return t * (len(self.alphas_cumprod) - 1)

    def alpha(self, t):
        """Return the data's factor."""
        xp, t = _arrays(t)
        return _unit(xp, self.log_ratio(t))[0]

    def sigma(self, t):
        """Return the noise's standard deviation."""
        xp, t = _arrays(t)
        return _unit(xp, self.log_ratio(t))[1]

    def alpha_rate(self, t):
        """Return d alpha / dt = -alpha sigma^2 d lambda / dt; at a step that of the stretch after it."""
        xp, t = _arrays(t)
        alpha, sigma = _unit(xp, self.log_ratio(t))
        fall, rate = self._rates(xp, t)
        return xp.where(fall > 0, -(sigma**3) * fall, -alpha * sigma**2 * rate)

    def sigma_rate(self, t):
        """Return d sigma / dt = alpha^2 sigma d lambda / dt; at a step that of the stretch after it."""
        xp, t = _arrays(t)
        alpha, sigma = _unit(xp, self.log_ratio(t))
        fall, rate = self._rates(xp, t)
        return xp.where(fall > 0, alpha * sigma**2 * fall, alpha**2 * sigma * rate)

    def log_ratio(self, t):
        """Return log(sigma / alpha), interpolated."""
        xp, t = _arrays(t)
        low, high, part = self._stretch(xp, t)
        whole = xp.isinf(high)
        linear = low + part * (xp.where(whole, low, high) - low)
        return xp.where(whole, low - _log(xp, 1 - part), linear)

    def time(self, log_ratio):
        """Return the time of a log-ratio."""
        xp, log_ratio = _arrays(log_ratio)
        table = xp.asarray(self._log_ratios, log_ratio.dtype)
        log_ratio = xp.clip(log_ratio, table[0], table[-1])
        index = xp.clip(xp.searchsorted(table, log_ratio, side="right") - 1, 0, len(table) - 2)
        low, high = table[index], table[index + 1]
        whole = xp.isinf(high)
        linear = (xp.where(whole, low, log_ratio) - low) / xp.where(whole, 1.0, xp.where(whole, 0.0, high) - low)
        part = xp.where(whole, -xp.expm1(low - log_ratio), linear)
        return (index + part) / (len(table) - 1)

    @functools.cached_property
    def _log_ratios(self) -> np.ndarray:
        table = np.asarray(self.alphas_cumprod)
        return 0.5 * (np.log1p(-table) - _log(np, table))

    def _stretch(self, xp, t):
        """Return the log-ratios at the ends of the stretch that t lies on, and the part of it that is passed."""
        last = len(self.alphas_cumprod) - 1
        table = xp.asarray(self._log_ratios, t.dtype)
        place = t * last
        index = xp.clip(xp.floor(place), 0, last - 1).astype(np.int32)
        return table[index], table[index + 1], place - index

    def _rates(self, xp, t):
        """Return how fast alpha / sigma falls on a stretch that ends without data (0 elsewhere), and d lambda / dt."""
        low, high, _ = self._stretch(xp, t)
        last, whole = len(self.alphas_cumprod) - 1, xp.isinf(high)
        return xp.where(whole, last * xp.exp(-low), 0.0), last * (xp.where(whole, low, high) - low)


_ANGLE = math.pi / 2 / (1 + _COSINE_OFFSET)


def _arrays(t: ArrayLike) -> tuple[Any, Any]:
    """Return the array library that t belongs to, and t as its array of floats."""
    if isinstance(t, jax.Array):
        return jnp, t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(float)
    t = np.asarray(t)
    return np, t if np.issubdtype(t.dtype, np.floating) else t.astype(float)


def _unit(xp, log_ratio):
    """Return the alpha and sigma with alpha^2 + sigma^2 = 1."""
    decayed, ratio = xp.exp(-xp.abs(log_ratio)), 1.0
    large = ratio / xp.sqrt(1 + decayed**2)
    small = decayed * large
    return xp.where(log_ratio < 0, large, small), xp.where(log_ratio < 0, small, large)


def _log(xp, value):
    """Return log(value), -inf at 0 without a warning and with a finite gradient beside it."""
    positive = value > 0
    return xp.where(positive, xp.log(xp.where(positive, value, 1.0)), -xp.inf)


def _divide(xp, numerator, denominator):
    """Return the quotient, +inf where the denominator is 0."""
    zero = denominator == 0
    return xp.where(zero, xp.inf, numerator / xp.where(zero, 1.0, denominator))


def _require_positive(name: str, value: Any) -> None:
    _require_number(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}.")


def _require_above(name: str, value: Any, floor_name: str, floor: float) -> None:
    _require_positive(name, value)
    if not value > floor:
        raise ValueError(f"`{name}` must be above `{floor_name}`, got {value!r} and {floor!r}.")


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r} ({type(value).__name__}).")
