"""A noise schedule in discrete steps, interpolated.

A table of alpha_i^2 at the steps i = 0 .. n - 1, with sigma_i^2 = 1 - alpha_i^2, is what a model in discrete time was
trained on. Step i is the time t_i = i / (n - 1), and between steps

    lambda = log(sigma / alpha) is linear in t:  alpha' = -alpha sigma^2 lambda', sigma' = alpha^2 sigma lambda'  (1)

Where the last step has no data left (alpha = 0, lambda = +inf: "zero terminal signal-to-noise ratio"), instead

    q = alpha / sigma falls linearly to 0:  alpha' = sigma^3 q', sigma' = -alpha sigma^2 q'                       (2)

on the last stretch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from ppl.models.diffusion.schedule import Schedule, arrays_of, safe_log, unit_level

__all__ = ["Tabulated"]


@dataclasses.dataclass(frozen=True)
class Tabulated(Schedule):
    """A schedule in discrete steps: the table of alpha^2 that a model was trained with.

    Its rates at a step are those of the stretch after it.

    Attributes:
        alphas_cumprod: alpha^2 at each step, falling, from below 1; positive, except that the last may be 0.
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self):
        try:
            table = tuple(float(value) for value in self.alphas_cumprod)
        except (TypeError, ValueError) as error:
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
        xp, t = arrays_of(t)
        return t * self._last

    def alpha(self, t):
        """Return the data's factor."""
        xp, t = arrays_of(t)
        return unit_level(xp, self.log_ratio(t))[0]

    def sigma(self, t):
        """Return the noise's standard deviation."""
        xp, t = arrays_of(t)
        return unit_level(xp, self.log_ratio(t))[1]

    def alpha_rate(self, t):
        """Return d alpha / dt, by (1) or (2)."""
        xp, t = arrays_of(t)
        alpha, sigma = unit_level(xp, self.log_ratio(t))
        low, rise, to_nothing = self._slopes(xp, t)
        return xp.where(to_nothing, -(sigma**3) * self._last * xp.exp(-low), -alpha * sigma**2 * rise)

    def sigma_rate(self, t):
        """Return d sigma / dt, by (1) or (2)."""
        xp, t = arrays_of(t)
        alpha, sigma = unit_level(xp, self.log_ratio(t))
        low, rise, to_nothing = self._slopes(xp, t)
        return xp.where(to_nothing, alpha * sigma**2 * self._last * xp.exp(-low), alpha**2 * sigma * rise)

    def log_ratio(self, t):
        """Return log(sigma / alpha), interpolated."""
        xp, t = arrays_of(t)
        low, high, part = self._stretch(xp, t)
        to_nothing = xp.isinf(high)
        linear = low + part * (xp.where(to_nothing, low, high) - low)
        return xp.where(to_nothing, low - safe_log(xp, (1 - t) * self._last), linear)  # (2) is the last stretch's

    def time(self, log_ratio):
        """Return the time of a log-ratio."""
        xp, log_ratio = arrays_of(log_ratio)
        table = xp.asarray(self._log_ratios, log_ratio.dtype)
        log_ratio = xp.clip(log_ratio, table[0], table[-1])
        index = xp.clip(xp.searchsorted(table, log_ratio, side="right") - 1, 0, self._last - 1)
        low, high = table[index], table[index + 1]
        to_nothing = xp.isinf(high)
        linear = (xp.where(to_nothing, low, log_ratio) - low) / (xp.where(to_nothing, low + 1, high) - low)
        part = xp.where(to_nothing, -xp.expm1(low - log_ratio), linear)
        return (index.astype(part.dtype) + part) / self._last

    @property
    def _last(self) -> int:
        return len(self.alphas_cumprod) - 1

    @functools.cached_property
    def _log_ratios(self) -> np.ndarray:
        table = np.asarray(self.alphas_cumprod)
        return 0.5 * (np.log1p(-table) - safe_log(np, table))

    def _stretch(self, xp, t):
        """Return the log-ratios at the ends of the stretch that t lies on, and the part of it that is passed."""
        table = xp.asarray(self._log_ratios, t.dtype)
        index = xp.clip(xp.floor(t * self._last), 0, self._last - 1).astype(np.int32)
        return table[index], table[index + 1], t * self._last - index.astype(t.dtype)

    def _slopes(self, xp, t):
        """Return lambda where the stretch begins, lambda' in (1), and whether it is (2) that holds there."""
        low, high, _ = self._stretch(xp, t)
        to_nothing = xp.isinf(high)
        return low, self._last * (xp.where(to_nothing, low, high) - low), to_nothing
