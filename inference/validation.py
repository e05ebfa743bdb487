"""Checks of settings, made when an algorithm is built."""

from __future__ import annotations

import numbers
from typing import Any

__all__ = ["refuse_state", "require_count", "require_fraction"]


def require_count(name: str, value: Any) -> None:
    """Raise unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be a whole number, got {value!r} ({type(value).__name__}).")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def require_fraction(name: str, value: Any) -> None:
    """Raise unless `value` is a real number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r} ({type(value).__name__}).")
    if not value >= 0.0:
        raise ValueError(
            f"`{name}` must be at least 0 (a fraction of the particles; 1 or more always resamples), got {value}."
        )


def refuse_state(algorithm: Any, state: Any) -> None:
    """Raise if a population algorithm is asked to continue a run."""
    if state is not None:
        raise ValueError(f"`state` continues chains; {type(algorithm).__name__} has nothing to continue.")
