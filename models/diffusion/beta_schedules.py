"""Discrete noise schedules: what is added at each of T steps, and what it leaves of the data.

Step i = 0 .. T - 1 multiplies the data's variance by 1 - beta_i:

    alpha_i^2           = prod_(j <= i) (1 - beta_j)                                                              (1)
    linear              beta_i = beta_start + i / (T - 1) (beta_end - beta_start)                                 (2)
    scaled_linear       beta_i the square of (2) between the square roots
    squaredcos_cap_v2   beta_i = min(1 - f((i + 1) / T) / f(i / T), 0.999), f(s) = cos(pi/2 (s + 0.008) / 1.008)^2 (3)

The betas of a model that was to see pure noise in its last step are rescaled, to "zero terminal signal-to-noise":

    alpha_i  <-  (alpha_i - alpha_(T-1)) alpha_0 / (alpha_0 - alpha_(T-1))                                        (4)

Source: Ho et al. 2020 (arXiv 2006.11239), section 4, for (2); Rombach et al. 2022 (arXiv 2112.10752), their released
configurations, for scaled_linear; Nichol and Dhariwal 2021 (arXiv 2102.09672), eq. 17, for (3); Lin et al. 2023 (arXiv
2305.08891), algorithm 1, for (4). The names are those of diffusers.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

__all__ = ["BETA_SCHEDULES", "alphas_cumprod", "betas"]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def betas(kind: str, num_steps: int, start: float = 0.0001, end: float = 0.02) -> Float[np.ndarray, " T"]:
    """Return the betas of a schedule, float64.

    Args:
        kind: one of `BETA_SCHEDULES`.
        num_steps: T.
        start: the first beta; "squaredcos_cap_v2" does not use it.
        end: the last one, likewise.

    Raises:
        ValueError: `kind` is unknown, or `start` or `end` is not positive.
    """
    if kind not in BETA_SCHEDULES:
        raise ValueError(f"`beta_schedule` must be one of {', '.join(map(repr, BETA_SCHEDULES))}, got {kind!r}.")
    if not (start > 0 and end > 0):
        raise ValueError(f"`beta_start` and `beta_end` must be positive, got {start} and {end}.")
    if kind == "squaredcos_cap_v2":
        left = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - left[1:] / left[:-1], 0.999)  # (3)
    if kind == "linear":
        return np.linspace(start, end, num_steps)  # (2)
    return np.linspace(math.sqrt(start), math.sqrt(end), num_steps) ** 2


def alphas_cumprod(betas: Float[np.ndarray, " T"], zero_terminal_snr: bool = False) -> Float[np.ndarray, " T"]:
    """Return alpha^2 at each step, (1), and rescaled by (4) if it is to end in nothing.

    Raises:
        ValueError: there are fewer than 2 betas, or one is not between 0 and 1.
    """
    if betas.ndim != 1 or betas.size < 2 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError(f"The betas must be at least 2 numbers between 0 and 1, got {betas}.")
    table = np.exp(np.cumsum(np.log1p(-betas)))
    if not zero_terminal_snr:
        return table
    alpha = np.sqrt(table)
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
