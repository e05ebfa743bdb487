"""Errors of log Z on small mixtures in the plane, by schedule, number of steps, variance and corrector.

Mixtures of six modes, means uniform in [-3, 3]^2, standard deviation 0.45; targets are powers, a product with a second
mixture, and guidance by a class (three of the modes) of weight 2.5. The truth is the integral

    Z = int prod_i q_i(x)^(b_i) dx                                                                                  (1)

of the densities at the run's last level, by the trapezoidal rule in float64 at a quarter of the narrowest standard
deviation: halving the spacing changes log Z by less than 1e-9. Cells are the mean error over the algorithm's seeds, and
their standard deviation.

`BENCH_TARGETS` (parts of their names, all), `BENCH_SCHEDULES` (likewise), `BENCH_LADDER` (50,200,800: steps),
`BENCH_SEEDS` (4), `BENCH_MIXTURES` (0: seeds of the mixtures) and `BENCH_EVIDENCE_PARTICLES` (4000) shorten a run.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

import ppl
from ppl.inference import SMC, FeynmanKac, KernelRatio
from ppl.models import GaussianMixture, RectifiedFlow, VarianceExploding, VariancePreserving

__all__ = ["Planar", "log_integral", "main"]

SCALE = 0.45
TARGETS = os.environ.get("BENCH_TARGETS", "").split(",")
SCHEDULES = os.environ.get("BENCH_SCHEDULES", "").split(",")
LADDER = [int(steps) for steps in os.environ.get("BENCH_LADDER", "50,200,800").split(",")]
SEEDS = int(os.environ.get("BENCH_SEEDS", 4))
MIXTURES = [int(seed) for seed in os.environ.get("BENCH_MIXTURES", "0").split(",")]
PARTICLES = int(os.environ.get("BENCH_EVIDENCE_PARTICLES", 4000))


class Planar(NamedTuple):
    """A mixture of equal isotropic modes.

    Attributes:
        means: `[K, 2]`.
        scale: standard deviation of each mode.
    """

    means: np.ndarray
    scale: float = SCALE

    def log_density(self, points: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        """Return the log-density at a level, float64."""
        variance = (alpha * self.scale) ** 2 + sigma**2
        squared = np.sum((points[..., None, :] - alpha * self.means) ** 2, axis=-1)
        return logsumexp(-squared / (2 * variance), axis=-1) - np.log(len(self.means) * 2 * np.pi * variance)

    def program(self) -> GaussianMixture:
        """Return it as the library has it."""
        return GaussianMixture(self.means, self.scale)


class Problem(NamedTuple):
    """A target: its factors with their powers, and how the library writes it."""

    factors: Sequence[tuple[Planar, float]]
    write: Callable[..., Any]


def log_integral(factors: Sequence[tuple[Planar, float]], alpha: float = 1.0, sigma: float = 0.0) -> float:
    """Return the log of (1) at a level."""
    variances = [(alpha * mixture.scale) ** 2 + sigma**2 for mixture, _ in factors]
    means = np.concatenate([alpha * mixture.means for mixture, _ in factors])
    total = sum(power for _, power in factors)
    largest = max(power for _, power in factors)
    width = np.sqrt(max(variances) / min(total, 1.0))
    spacing = np.sqrt(min(variances) / max(largest, 1.0)) / 4
    low, high = means.min() - 9 * width, means.max() + 9 * width
    line = np.arange(low, high, spacing)
    logs = []
    for first in line:
        points = np.stack([np.full(len(line), first), line], axis=-1)
        logs.append(logsumexp(sum(power * mixture.log_density(points, alpha, sigma) for mixture, power in factors)))
    return float(logsumexp(logs) + 2 * np.log(spacing))


def problems(seed: int) -> dict[str, Problem]:
    first, second = (Planar(np.random.default_rng(s).uniform(-3, 3, (6, 2))) for s in (seed, seed + 1000))
    label = Planar(first.means[:3])
    powers = {f"power {b:g}": Problem([(first, b)], lambda p, b=b: p**b) for b in (0.6, 2.0, 3.0)}
    return powers | {
        "product": Problem([(first, 1.0), (second, 1.0)], lambda p, q: p * q),
        "guide 2.5, a class": Problem([(first, -1.5), (label, 2.5)], lambda p, q: ppl.guide(p, q, weight=2.5)),
    }


def log_uniform(schedule, high: float, low: float) -> Callable[[int], np.ndarray]:
    """Return times by number of steps, uniform in log(sigma / alpha) between two values of sigma / alpha."""
    return lambda steps: schedule.time(np.linspace(np.log(high), np.log(low), steps + 1))


def settings() -> dict[str, tuple[Any, Any]]:
    """Return schedules with their grids: None, "time" or a function of the number of steps."""
    exploding, preserving, flow = VarianceExploding(0.01, 8.0), VariancePreserving(), RectifiedFlow()
    return {
        "VE": (exploding, "time"),
        "VP, uniform in log": (preserving, log_uniform(preserving, np.exp(preserving.log_ratio(1.0)), 0.01)),
        "VP, uniform in time": (preserving, lambda steps: np.linspace(1.0, 1e-3, steps + 1)),
        "RF, from sigma/alpha 999": (flow, log_uniform(flow, 999.0, 0.01)),
        "RF, from alpha 0": (flow, None),
    }


def ways() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the variances with the algorithm's options."""
    return {
        "FeynmanKac": ("noising", {"corrector": FeynmanKac()}),
        "KernelRatio, noising": ("noising", {"corrector": KernelRatio()}),
        "KernelRatio, posterior": ("posterior", {"corrector": KernelRatio()}),
        "KernelRatio, matched": ("matched", {"corrector": KernelRatio()}),
    }


def error_cell(problem: Problem, schedule: Any, grid: Any, steps: int, variance: str, options: dict[str, Any]) -> str:
    """Return the mean error of log Z over seeds with its standard deviation, or why there is none."""
    given = {"grid": grid(steps) if callable(grid) else grid, "variance": variance}
    try:
        processes = [mixture.program().diffuse(schedule).reverse(steps, **given) for mixture, _ in problem.factors]
        levels = processes[0].levels
        truth = log_integral(problem.factors, float(levels.alpha[-1]), float(levels.sigma[-1]))
        target, algorithm = problem.write(*processes), SMC(PARTICLES, **options)
        errors = [float(ppl.infer(target, algorithm, seed=seed).log_evidence) - truth for seed in range(SEEDS)]
    except (ValueError, ArithmeticError) as error:  # refused: a variance of 0 or infinity, a step too coarse
        return type(error).__name__
    return f"{statistics.mean(errors):+.2f} ({statistics.stdev(errors) if SEEDS > 1 else 0.0:.2f})"


def main() -> None:
    """Print a table for each mixture and schedule."""
    for seed in MIXTURES:
        for name, (schedule, grid) in settings().items():
            if not any(part in name for part in SCHEDULES):
                continue
            start = time.perf_counter()
            columns = list(ways())
            print(f"\nMixture {seed}, {name}: error of log Z, {PARTICLES} particles, {SEEDS} seeds\n")
            print(f"| target | steps | {' | '.join(columns)} |")
            print("| --- " * (len(columns) + 2) + "|", flush=True)
            for title, problem in problems(seed).items():
                if not any(part in title for part in TARGETS):
                    continue
                for steps in LADDER:
                    cells = [error_cell(problem, schedule, grid, steps, *way) for way in ways().values()]
                    print(f"| {title} | {steps} | {' | '.join(cells)} |", flush=True)
            print(f"\n{time.perf_counter() - start:.0f} s", flush=True)
