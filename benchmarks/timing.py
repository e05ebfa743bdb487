"""Timing two or more ways of doing one thing, side by side in one process."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import jax

__all__ = ["machine", "report", "side_by_side"]


def side_by_side(ways: dict[str, Callable[[int], object]], repeats: int) -> dict[str, list[float]]:
    """Time each way `repeats` times, taking turns, after one call each that is not timed.

    Args:
        ways: functions of the repeat's number; what they return is waited for.
        repeats: how often each is timed.

    Returns:
        Seconds of every call, by name.
    """
    for run in ways.values():
        jax.block_until_ready(run(0))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(1, repeats + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(run(repeat))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], per: tuple[float, str] | None = None) -> None:
    """Print medians, and the ratio of every way to the first: the median of the ratios of neighbouring calls."""
    print(f"{title}")
    first = next(iter(seconds.values()))
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(times, first, strict=True))
        rate = "" if per is None else f"   {per[0] / median:9.1f} {per[1]}"
        print(f"  {name:38s} median {median * 1e3:10.1f} ms{rate}   time ratio {ratio:6.3f}")


def machine() -> str:
    """Return what the figures were measured on."""
    device = jax.devices()[0]
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
        processor = names[0] if names else processor
    versions = f"JAX {jax.__version__} on {device.platform}; Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {processor}; {versions}"
