"""The interval of times in which particles may be resampled.

Near the noise and near the data resampling gains little and costs diversity. Weights are carried across the rest of the
run and not set to zero there, as they are in the correctors' first description (arXiv 2503.02819, section 4): what the
run estimates stays the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["active_shares", "check_active"]


def check_active(active: Any) -> None:
    """Raise a `ValueError` if `active` is no pair of times."""
    if active is None:
        return
    if not (isinstance(active, tuple) and len(active) == 2 and 0 <= active[0] < active[1] <= 1):
        raise ValueError(f"`active` must be a pair of times (low, high) within [0, 1], got {active!r}.")


def active_shares(active: tuple[float, float], process: Any) -> tuple[float, float]:
    """Return the shares of the steps, done at the first and at the last of these times.

    Raises:
        TypeError: the process has no levels, and so no times.
        ValueError: no step ends within the interval.
    """
    if not hasattr(process, "levels"):
        raise TypeError(f"`active` is for diffusion processes, got {process!r}.")
    times = process.levels.times[1:]
    (inside,) = np.nonzero((active[0] <= times) & (times <= active[1]))
    if not inside.size:
        raise ValueError(f"`active` {active} holds none of the levels of {process!r}.")
    half = 0.5 / len(times)  # shares are compared in float32
    return float((inside[0] + 1) / len(times) - half), float((inside[-1] + 1) / len(times) + half)
