"""A mixture of 40 modes to the power 3 by its reversed diffusion, against loops in torch; and log Z on small mixtures.

    python -m benchmarks.diffusion modes      quality, log Z and seconds of 40 modes in the plane
    python -m benchmarks.diffusion evidence   errors of log Z by schedule, steps, variance and corrector

`modes` is the setting of Feynman-Kac correctors (arXiv 2503.02819): means uniform in [-40, 40]^2, standard deviation
softplus(2), everything divided by 50, noise from 10 down to 0.01 (torch's loops end at 0, as published) in 1000 steps,
10,000 particles. Every call is timed, the methods taking turns within one process; the calls' own samples and log Z,
from seeds 1, 2, ..., are what the quality is measured on, against exact samples (`benchmarks.mixture_metrics`). Errors
of log Z are those of the ratio to the noise end, `log int q^3 - log int q_1^3`, at each method's own last level;
distances are in the units before division and include those of two exact samples, the table's last row.
`BENCH_REPEATS` (5), `BENCH_PARTICLES` (10000), `BENCH_STEPS` (1000), `BENCH_METHODS` (parts of their names, all) and
`BENCH_THREADS` (2, torch's) shorten a run; for those of `evidence` see `benchmarks.mixture_evidence`.
"""

import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import ppl
from benchmarks import mixture_evidence
from benchmarks.mixture_metrics import PowerOfMixture, distances
from benchmarks.timing import machine
from ppl.inference import SMC, FeynmanKac, KernelRatio
from ppl.models import GaussianMixture, VarianceExploding

UNIT = 50.0
MEANS = np.array(json.loads((Path(__file__).parent / "gmm40_means.json").read_text()))  # torch's, of seed 0
SCALE = math.log1p(math.exp(2.0))
POWER = 3
SIGMA_MIN, SIGMA_MAX = 0.01, 10.0
EXACT = 15.395  # log int q^3 - log int q_1^3 where the last level is the data's

REPEATS = int(os.environ.get("BENCH_REPEATS", 5))
PARTICLES = int(os.environ.get("BENCH_PARTICLES", 10_000))
STEPS = int(os.environ.get("BENCH_STEPS", 1000))
CHOSEN = os.environ.get("BENCH_METHODS", "").split(",")
THREADS = int(os.environ.get("BENCH_THREADS", 2))

FIRST, DEFAULT = "ppl, FeynmanKac", "ppl, KernelRatio"
PUBLISHED, TUNED = "torch, autograd", "torch, matrix products"


class Run(NamedTuple):
    """What one call gave: equally weighted samples `[n, 2]` in units before division, and log Z's error."""

    samples: np.ndarray
    log_error: float


Method = Callable[[int], Run]
"""``seed -> Run``."""


def log_integral(noise_variance: float) -> float:
    """Return log int q^3 of the divided mixture at a level."""
    return PowerOfMixture(MEANS / UNIT, (SCALE / UNIT) ** 2 + noise_variance, POWER).log_integral


def ours() -> dict[str, Method]:
    """Return the library's ways: the same loop as torch's first, then what it does by default, then what it offers."""
    mixture = GaussianMixture(MEANS / UNIT, SCALE / UNIT)
    exact = mixture.diffuse(VarianceExploding(SIGMA_MIN, SIGMA_MAX))
    euler, matched = exact.reverse(STEPS, variance="noising"), exact.reverse(STEPS)
    tempered = exact.reverse(STEPS, variance="noising", churn=1 / POWER)
    ways = {
        FIRST: (euler, {"corrector": FeynmanKac()}),
        DEFAULT: (matched, {"corrector": KernelRatio()}),
        f"{FIRST}, ESS < N/2": (euler, {"corrector": FeynmanKac(), "ess_threshold": 0.5}),
        f"{DEFAULT}, ESS < N/2": (matched, {"corrector": KernelRatio(), "ess_threshold": 0.5}),
        f"{FIRST}, birth-death": (euler, {"corrector": FeynmanKac(), "resampler": "birth_death"}),
        f"{DEFAULT}, birth-death": (matched, {"corrector": KernelRatio(), "resampler": "birth_death"}),
        "ppl, uncorrected": (euler, {"corrector": "none"}),
        f"{FIRST}, tempered noise": (tempered, {"corrector": FeynmanKac()}),
        "ppl, uncorrected, tempered noise": (tempered, {"corrector": "none"}),
    }
    return {name: one_of_ours(process, SMC(PARTICLES, **given)) for name, (process, given) in ways.items()}


def one_of_ours(process, algorithm: SMC) -> Method:
    target = process**POWER
    exact = log_integral(float(process.levels.sigma[-1]) ** 2)

    def run(seed: int) -> Run:
        posterior = ppl.infer(target, algorithm, seed=seed)
        samples = np.asarray(posterior.resample(seed).value)  # systematic: as they are, where weights are equal
        return Run(samples * UNIT, float(posterior.log_evidence) - exact)

    return run


def theirs() -> dict[str, Method]:
    """Return the loops in torch; nothing where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        print("torch: not installed")
        return {}
    import torch

    from benchmarks.baselines.torch_mixture import Annealing, by_autograd, by_matrix_products

    torch.set_num_threads(THREADS)
    setting = ((SCALE / UNIT) ** 2, float(POWER), SIGMA_MIN, SIGMA_MAX, STEPS, PARTICLES)
    ways = {
        PUBLISHED: Annealing(by_autograd(MEANS / UNIT), *setting),
        TUNED: Annealing(by_matrix_products(MEANS / UNIT), *setting),
        f"{TUNED}, uncorrected": Annealing(by_matrix_products(MEANS / UNIT), *setting, corrected=False),
    }
    exact = log_integral(0.0) - log_integral(SIGMA_MIN**2 * math.expm1(2 * math.log(SIGMA_MAX / SIGMA_MIN)))

    def one(annealing: Annealing) -> Method:
        def run(seed: int) -> Run:
            samples, log_ratio = annealing(seed)
            return Run(samples * UNIT, log_ratio - exact)

        return run

    return {name: one(annealing) for name, annealing in ways.items()}


def measure(methods: dict[str, Method]) -> tuple[dict[str, list[float]], dict[str, list[Run]]]:
    """Time calls in turns; the first call of each, which compiles, comes before and is element 0 of its times."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    for seed in range(REPEATS + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            run = method(seed)
            seconds[name].append(time.perf_counter() - start)
            if seed > 0:
                runs[name].append(run)
    return seconds, runs


def quality(runs: list[Run], generator: np.random.Generator) -> list[str]:
    """Return the table's cells: mean and standard deviation over runs of the distances and of log Z's error."""
    power = PowerOfMixture(MEANS, SCALE**2, POWER)
    found: dict[str, list[float]] = {}
    for run in runs:
        exact = power.sample(generator, len(run.samples))
        for name, distance in distances(run.samples, exact, MEANS, generator).items():
            found.setdefault(name, []).append(distance)
        found.setdefault("log Z", []).append(run.log_error)
    return [cell(values, digits) for values, digits in zip(found.values(), (1, 1, 3, 3, 2), strict=True)]


def cell(values: list[float], digits: int) -> str:
    if any(math.isnan(value) for value in values):
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def ratio(times: list[float], others: list[float]) -> float:
    """Return the median of the ratios of neighbouring calls, the first ones left out."""
    return statistics.median(a / b for a, b in zip(times[1:], others[1:], strict=True))


def modes() -> None:
    relative = log_integral(0.0) - log_integral(SIGMA_MIN**2 * math.expm1(2 * math.log(SIGMA_MAX / SIGMA_MIN)))
    assert abs(relative - EXACT) < 5e-4, relative
    print(
        f"{PARTICLES} particles, {STEPS} steps, {REPEATS} runs; exact log Z over that of the noise end {relative:.3f}"
    )
    everything = ours() | theirs()
    methods = {name: run for name, run in everything.items() if any(part in name for part in CHOSEN)}
    seconds, runs = measure(methods)
    generator = np.random.default_rng(0)
    power = PowerOfMixture(MEANS, SCALE**2, POWER)
    runs["exact against exact"] = [Run(power.sample(generator, PARTICLES), 0.0) for _ in range(REPEATS)]
    first = next(iter(methods))
    print(f"\n| method | W1 | W2 | TV | mode TV | error of log Z | seconds | over {first} | first call, s |")
    print("| --- " * 9 + "|")
    for name, found in runs.items():
        row = [name, *quality(found, generator)]
        if times := seconds.get(name):
            row += [f"{statistics.median(times[1:]):.2f}", f"{ratio(times, seconds[first]):.2f}", f"{times[0]:.1f}"]
        else:
            row += ["", "", ""]
        print("| " + " | ".join(row) + " |", flush=True)
    print()
    for mine in (FIRST, DEFAULT):
        for other in (PUBLISHED, TUNED):
            if mine in seconds and other in seconds:
                print(f"{other} takes {ratio(seconds[other], seconds[mine]):.2f} times as long as {mine}")


def main(names: list[str]) -> None:
    groups = {"modes": modes, "evidence": mixture_evidence.main}
    if unknown := set(names) - set(groups):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(groups)}")
    print(machine())
    print("load average at the start {:.2f} {:.2f} {:.2f}".format(*os.getloadavg()))
    for name in names:
        print(f"\n## {name}\n", flush=True)
        groups[name]()
    print("\nload average at the end {:.2f} {:.2f} {:.2f}".format(*os.getloadavg()))


if __name__ == "__main__":
    main(sys.argv[1:] or ["modes", "evidence"])
