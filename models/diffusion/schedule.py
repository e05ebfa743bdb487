"""What a noise schedule is, and the arithmetic that schedules share.

    x_t = alpha(t) x_0 + sigma(t) eps,   eps ~ N(0, I),   t in [0, 1], 1 = noise                                  (1)

What a level is, up to a factor of x, is its noise-to-data ratio; `log_ratio` and its inverse `time` go by

    lambda(t) = log(sigma(t) / alpha(t)), increasing in t                                                         (2)

The methods take and return numpy arrays (or Python floats, as float64) and jax arrays, elementwise, in the precision
they are given.
"""

from __future__ import annotations

import abc
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

__all__ = ["Schedule", "arrays_of", "divide_or_inf", "require_above", "require_positive", "safe_log", "unit_level"]


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


def arrays_of(t: ArrayLike) -> tuple[Any, Any]:
    """Return the array library that t belongs to, and t as its array of floats."""
    if isinstance(t, jax.Array):
        return jnp, t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(float)
    t = np.asarray(t)
    return np, t if np.issubdtype(t.dtype, np.floating) else t.astype(float)


def unit_level(xp, log_ratio):
    """Return the alpha and sigma with alpha^2 + sigma^2 = 1."""
    decayed = xp.exp(-xp.abs(log_ratio))
    large = 1 / xp.sqrt(1 + decayed**2)
    small = decayed * large
    return xp.where(log_ratio < 0, large, small), xp.where(log_ratio < 0, small, large)


def safe_log(xp, value):
    """Return log(value), -inf at 0 without a warning and with a finite gradient beside it."""
    positive = value > 0
    return xp.where(positive, xp.log(xp.where(positive, value, 1.0)), -xp.inf)


def divide_or_inf(xp, numerator, denominator):
    """Return the quotient, +inf where the denominator is 0."""
    zero = denominator == 0
    return xp.where(zero, xp.inf, numerator / xp.where(zero, 1.0, denominator))


def require_positive(name: str, value: Any) -> None:
    """Raise unless a parameter is a positive, finite number."""
    _require_number(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}.")


def require_above(name: str, value: Any, floor_name: str, floor: float) -> None:
    """Raise unless a parameter is a finite number above another, positive one."""
    require_positive(name, value)
    if not value > floor:
        raise ValueError(f"`{name}` must be above `{floor_name}`, got {value!r} and {floor!r}.")


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r} ({type(value).__name__}).")
