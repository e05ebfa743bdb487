"""Noise schedules in closed form: how much of the data is left at each time.

`Schedule` says what a schedule is; with u = pi / 2 / (1 + 0.008) and w = pi / 2 - u these are

| schedule | alpha | sigma |
|---|---|---|
| `VariancePreserving("linear")` | exp(-L), L = (b_max - b_min) t^2 / 4 + b_min t / 2 | sqrt(1 - alpha^2) |
| `VariancePreserving("cosine")` | sin(u (1 - t)) / sin(u) | sqrt(1 - alpha^2) |
| `VarianceExploding` | 1 | s_min (s_max / s_min)^t |
| `EDM` | 1 | (s_min^(1/rho) + t (s_max^(1/rho) - s_min^(1/rho)))^rho |
| `RectifiedFlow` | 1 - s | s = shift t / (1 + (shift - 1) t) |

Each formula is written so that nothing cancels: 1 - alpha^2 = -expm1(-2 L) for the linear kind, and

    1 - alpha^2 = sin(u t) sin(u t + 2 w) / sin(u)^2                                                              (1)

for the cosine, so that float32 has its full relative accuracy in alpha and sigma at both ends. The ends themselves are
right: alpha(1) is exactly 0 and log(sigma / alpha) +inf for the cosine and the rectified flow; sigma(0) is exactly 0
and log(sigma / alpha) -inf wherever noise starts from none. Where sigma starts like a square root, its rate is +inf.

Source: Song et al. 2021 (arXiv 2011.13456), appendix C, for the linear and the exploding schedule; Nichol and Dhariwal
2021 (arXiv 2102.09672), eq. 17, in continuous time and without their clipping of the last betas; Karras et al. 2022
(arXiv 2206.00364), eq. 5, with t running from data to noise; Esser et al. 2024 (arXiv 2403.03206), eq. 23, for the
shift.
"""

from __future__ import annotations

import dataclasses
import math

from ppl.models.diffusion.schedule import (
    Schedule,
    arrays_of,
    divide_or_inf,
    require_above,
    require_positive,
    safe_log,
    unit_level,
)

__all__ = ["EDM", "RectifiedFlow", "Schedule", "VarianceExploding", "VariancePreserving"]

_ANGLE, _REST = math.pi / 2 / 1.008, math.pi / 2 * 0.008 / 1.008
_SIN, _COS = math.sin(_ANGLE), math.sin(_REST)


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
        require_positive("beta_min", self.beta_min)
        require_positive("beta_max", self.beta_max)
        if self.beta_max < self.beta_min:
            raise ValueError(f"`beta_max` must be at least `beta_min`, got {self.beta_max!r} and {self.beta_min!r}.")

    def alpha(self, t):
        """Return the data's factor."""
        xp, t = arrays_of(t)
        if self.kind == "linear":
            return xp.exp(-self._decay(t))
        return xp.sin(_ANGLE * (1 - t)) / _SIN

    def sigma(self, t):
        """Return the noise's standard deviation."""
        xp, t = arrays_of(t)
        if self.kind == "linear":
            return xp.sqrt(-xp.expm1(-2 * self._decay(t)))
        return xp.sqrt(xp.sin(_ANGLE * t) * xp.sin(_ANGLE * t + 2 * _REST)) / _SIN  # (1)

    def alpha_rate(self, t):
        """Return d alpha / dt."""
        xp, t = arrays_of(t)
        if self.kind == "linear":
            return -self._decay_rate(t) * self.alpha(t)
        return -_ANGLE * xp.sin(_ANGLE * t + _REST) / _SIN

    def sigma_rate(self, t):
        """Return d sigma / dt = -alpha alpha' / sigma; +inf at t = 0."""
        xp, t = arrays_of(t)
        return divide_or_inf(xp, -self.alpha(t) * self.alpha_rate(t), self.sigma(t))

    def log_ratio(self, t):
        """Return log(sigma / alpha); -inf at t = 0, and +inf at t = 1 of the cosine."""
        xp, t = arrays_of(t)
        if self.kind == "linear":
            decay = self._decay(t)
            return decay + 0.5 * safe_log(xp, -xp.expm1(-2 * decay))
        noise = safe_log(xp, xp.sin(_ANGLE * t)) + xp.log(xp.sin(_ANGLE * t + 2 * _REST))
        return 0.5 * noise - safe_log(xp, xp.sin(_ANGLE * (1 - t)))

    def time(self, log_ratio):
        """Return the time of a log-ratio.

        Linear: 2 L = log(1 + exp(2 lambda)) and the positive root of L's parabola. Cosine: with s = u (1 - t),
        sin(u t) = sin(u)^2 sigma^2 / (sin u cos s + cos u sin s), so that nothing cancels at t = 0.
        """
        xp, log_ratio = arrays_of(log_ratio)
        log_ratio = xp.clip(log_ratio, self.log_ratio(0.0).item(), self.log_ratio(1.0).item())
        if self.kind == "linear":
            decay = 0.5 * xp.logaddexp(xp.zeros_like(log_ratio), 2 * log_ratio)
            slope, curvature = self.beta_min / 2, (self.beta_max - self.beta_min) / 4
            return xp.clip(2 * decay / (slope + xp.sqrt(slope**2 + 4 * curvature * decay)), 0.0, 1.0)
        alpha, sigma = unit_level(xp, log_ratio)
        sin_rest, cos_rest = _SIN * alpha, xp.sqrt(_COS**2 + (_SIN * sigma) ** 2)
        sin_done = (_SIN * sigma) ** 2 / (_SIN * cos_rest + _COS * sin_rest)
        return xp.clip(xp.arctan2(sin_done, _COS * cos_rest + _SIN * sin_rest) / _ANGLE, 0.0, 1.0)

    def _decay(self, t):
        return t * ((self.beta_max - self.beta_min) / 4 * t + self.beta_min / 2)

    def _decay_rate(self, t):
        return (self.beta_max - self.beta_min) / 2 * t + self.beta_min / 2


class _Exploding(Schedule):
    """The data stay as they are: alpha = 1."""

    def alpha(self, t):
        """Return 1."""
        xp, t = arrays_of(t)
        return xp.ones_like(t)

    def alpha_rate(self, t):
        """Return 0."""
        xp, t = arrays_of(t)
        return xp.zeros_like(t)


@dataclasses.dataclass(frozen=True)
class VarianceExploding(_Exploding):
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
        require_positive("sigma_min", self.sigma_min)
        require_above("sigma_max", self.sigma_max, "sigma_min", self.sigma_min)
        if not isinstance(self.from_zero, bool):
            raise TypeError(f"`from_zero` must be a bool, got {self.from_zero!r}.")

    def sigma(self, t):
        """Return the noise's standard deviation."""
        xp, t = arrays_of(t)
        if self.from_zero:
            return self.sigma_min * xp.sqrt(xp.expm1(2 * self._log_range * t))
        return self.sigma_min * xp.exp(self._log_range * t)

    def sigma_rate(self, t):
        """Return d sigma / dt."""
        xp, t = arrays_of(t)
        if self.from_zero:
            growth = self.sigma_min**2 * self._log_range * xp.exp(2 * self._log_range * t)
            return divide_or_inf(xp, growth, self.sigma(t))
        return self._log_range * self.sigma(t)

    def log_ratio(self, t):
        """Return log sigma."""
        xp, t = arrays_of(t)
        if self.from_zero:
            growth = 2 * self._log_range * t
            return math.log(self.sigma_min) + 0.5 * (growth + safe_log(xp, -xp.expm1(-growth)))
        return math.log(self.sigma_min) + self._log_range * t

    def time(self, log_ratio):
        """Return the time at which log sigma is this."""
        xp, log_ratio = arrays_of(log_ratio)
        growth = log_ratio - math.log(self.sigma_min)
        if self.from_zero:
            growth = 0.5 * xp.logaddexp(xp.zeros_like(growth), 2 * growth)
        return xp.clip(growth / self._log_range, 0.0, 1.0)

    @property
    def _log_range(self) -> float:
        return math.log(self.sigma_max) - math.log(self.sigma_min)


@dataclasses.dataclass(frozen=True)
class EDM(_Exploding):
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
        require_positive("sigma_min", self.sigma_min)
        require_above("sigma_max", self.sigma_max, "sigma_min", self.sigma_min)
        require_positive("rho", self.rho)

    def sigma(self, t):
        """Return the noise's standard deviation."""
        xp, t = arrays_of(t)
        return self._root(t) ** self.rho

    def sigma_rate(self, t):
        """Return d sigma / dt."""
        xp, t = arrays_of(t)
        low, high = self._ends
        return self.rho * (high - low) * self._root(t) ** (self.rho - 1)

    def log_ratio(self, t):
        """Return log sigma."""
        xp, t = arrays_of(t)
        return self.rho * xp.log(self._root(t))

    def time(self, log_ratio):
        """Return the time at which log sigma is this."""
        xp, log_ratio = arrays_of(log_ratio)
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
        require_positive("shift", self.shift)

    def alpha(self, t):
        """Return the data's factor, (1 - t) / (1 + (shift - 1) t)."""
        xp, t = arrays_of(t)
        return (1 - t) / self._stretch(t)

    def sigma(self, t):
        """Return the noise's standard deviation, s."""
        xp, t = arrays_of(t)
        return self.shift * t / self._stretch(t)

    def alpha_rate(self, t):
        """Return d alpha / dt."""
        return -self.sigma_rate(t)

    def sigma_rate(self, t):
        """Return d sigma / dt."""
        xp, t = arrays_of(t)
        return self.shift / self._stretch(t) ** 2

    def log_ratio(self, t):
        """Return log(shift t / (1 - t)); -inf at t = 0 and +inf at t = 1."""
        xp, t = arrays_of(t)
        return math.log(self.shift) + safe_log(xp, t) - safe_log(xp, 1 - t)

    def time(self, log_ratio):
        """Return the time of a log-ratio."""
        xp, log_ratio = arrays_of(log_ratio)
        odds = log_ratio - math.log(self.shift)
        return xp.exp(-xp.logaddexp(xp.zeros_like(odds), -odds))

    def _stretch(self, t):
        return 1 + (self.shift - 1) * t
