"""A model trained on one noise schedule, run on another.

Two schedules reach the same ratio of noise to data at different times and scales. With (alpha, sigma) the schedule that
a model was trained on and (abar, sbar) the one that it is run on, time r of the latter is the same level as

    t:  sigma(t) / alpha(t) = sbar(r) / abar(r),      c = abar(r) / alpha(t) = sbar(r) / sigma(t)                  (1)

and x on the new path is c times a value on the old one, so that the denoised value is that of x / c:

    Dbar(x, r) = D(x / c, t)                                                                                      (2)

This is all that is needed, since every other prediction follows from D. For the velocity it says, with dots for d/dr,

    ubar(x, r) = (c' / c) x + c t' u(x / c, t)                                                                    (3)

Of the two forms of c the one is taken that divides by what is not small: alphas where there is more data than noise,
sigmas elsewhere, so that both ends are right. Levels that the old schedule does not have (a rectified flow ends at pure
noise, the linear variance-preserving schedule just short of it) are given to the model as its nearest level.

Source: Lipman et al. 2024 (arXiv 2412.06264), section 4.6.1; Kim et al. 2025 (arXiv 2503.19385), for (3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from ppl.models.diffusion.schedules import Schedule

__all__ = ["converted", "corresponding"]


def corresponding(of: Schedule, to: Schedule, time: ArrayLike) -> tuple[Any, Any]:
    """Return where a time of one schedule lies on another, (1).

    Args:
        of: the schedule that the model was trained on.
        to: the schedule that it is run on.
        time: r, in [0, 1], on `to`.

    Returns:
        t on `of`, of the same noise-to-data ratio, and the factor 1 / c that takes x on `to` to x on `of`.
    """
    log_ratio = to.log_ratio(time)
    there = of.time(log_ratio)
    xp = jnp if isinstance(log_ratio, jax.Array) else np
    by_data = log_ratio < 0
    numerator = xp.where(by_data, of.alpha(there), of.sigma(there))
    return there, numerator / xp.where(by_data, to.alpha(time), to.sigma(time))


def converted(denoise: Callable[..., Any], of: Schedule, to: Schedule) -> Callable[..., Any]:
    """Return a denoiser on one schedule, made of a denoiser on another, (2).

    Args:
        denoise: `(x, t, **conditions) -> D`, the denoised value, for x on the schedule `of`; t is a scalar or
            broadcasts against x.
        of: the schedule that it was trained on.
        to: the schedule that it is run on.

    Returns:
        `(x, t, **conditions) -> D` for x on the schedule `to`.

    Raises:
        TypeError: `of` or `to` is no schedule.
    """
    for name, schedule in (("of", of), ("to", to)):
        if not isinstance(schedule, Schedule):
            raise TypeError(f"`{name}` must be a Schedule, got {schedule!r} ({type(schedule).__name__}).")
    return _Converted(denoise, of, to)


@dataclasses.dataclass(frozen=True, eq=False)
class _Converted:
    """The denoiser (2)."""

    denoise: Callable[..., Any]
    of: Schedule
    to: Schedule

    def __call__(self, x, t, **conditions):
        there, scale = corresponding(self.of, self.to, t)
        return self.denoise(x * scale, there, **conditions)
