"""The kernels against what else one would use, in one process, sides taking turns.

    python -m benchmarks.kernels                        everything
    python -m benchmarks.kernels systematic summarize   some of it: schemes by name, summarize, annealing, tokens

Each call is timed in two ways. *In one jit*: a compiled loop calls it over fresh keys, each call's input depending on
the one before and its whole result kept by the loop, so that nothing is hoisted, merged or left out; the time of one
turn is reported. *Alone*: one compiled call from Python, dispatch included. Log-weights are 2 N(0, 1), float32,
unnormalised on every side. Reported are medians; ratios are medians of the ratios of neighbouring calls, ours over
theirs. *Floor* is the time over that of the memory traffic that no method avoids, 8 bytes a particle, at the bandwidth
measured at the start.
"""

import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from benchmarks.baselines.resamplers import jax_peers, missing, numpy_peers
from benchmarks.timing import machine
from ppl.kernels.resampling import RESAMPLERS
from ppl.kernels.weights import summarize

SIZES = [2**7, 2**10, 2**14, 2**17, 2**20]
CALLS = {2**7: 256, 2**10: 128, 2**14: 16, 2**17: 4, 2**20: 2}  # in one compiled loop
SECONDS = float(os.environ.get("BENCH_SECONDS", 4))  # spent on one comparison, about
OURS = "ppl"

Call = Callable[[jax.Array, jax.Array], object]
"""``(key, values) -> a pytree``: what is timed."""


def in_one_jit(call: Call) -> Callable[[jax.Array, jax.Array], object]:
    """Compile a loop of calls over keys, each of which needs the result of the one before."""

    def loop(keys, values):
        def turn(carry, key):
            offset, _ = carry
            result = call(key, values + offset)
            first = jax.tree.leaves(result)[0].reshape(-1)[0]
            return (jnp.where(first == -12345, 1.0, 0.0), result), None  # never so, but the compiler cannot know

        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(call, keys[0], values))
        return jax.lax.scan(turn, (jnp.zeros(()), empty), keys)[0][1]

    return jax.jit(loop)


def bandwidth() -> float:
    """Measure bytes read and written per second over arrays that fit in no cache."""
    size = 2**25
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(jnp.zeros(size, jnp.float32)))
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        x = jax.block_until_ready(add(x))
        seconds.append(time.perf_counter() - start)
    return 8 * size / statistics.median(seconds)


def timed(ways: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Time the ways in turns, as often as the time allows, 5 to 60 times.

    A call that is not timed comes before each that is: what a side leaves behind (a callback's thread, cold caches)
    made the next side's call of a few microseconds twice as slow.
    """
    for run in ways.values():
        jax.block_until_ready(run(0))
    start = time.perf_counter()
    for run in ways.values():
        jax.block_until_ready(run(0))
    repeats = int(np.clip(SECONDS / (2 * (time.perf_counter() - start)), 5, 60))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(1, repeats + 1):
        for name, run in ways.items():
            jax.block_until_ready(run(repeat))
            start = time.perf_counter()
            jax.block_until_ready(run(repeat))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def compare(
    title: str,
    calls: dict[str, Call],
    values: jax.Array,
    repeats: int,
    on_host: dict[str, Callable[[], object]] | None = None,
    floor: float | None = None,
) -> None:
    """Time calls of one key and one array, ours first, and print a row of a table for each.

    Args:
        title: the row's first column.
        calls: what is compared, ours under `OURS`.
        values: the array they are called with.
        repeats: calls in one compiled loop.
        on_host: sides that are not compiled by JAX, timed only alone.
        floor: seconds that no method can beat; None leaves the column out.
    """
    keys = [jax.random.split(jax.random.key(i), repeats) for i in range(64)]
    single = [k[0] for k in keys]
    looped = {name: in_one_jit(call) for name, call in calls.items()}
    compiled = {name: jax.jit(call) for name, call in calls.items()}
    inside = timed({name: lambda i, f=f: f(keys[i], values) for name, f in looped.items()})
    alone = timed(
        {name: lambda i, f=f: f(single[i], values) for name, f in compiled.items()}
        | {name: lambda i, f=f: f() for name, f in (on_host or {}).items()}
    )
    for name in alone:
        row = [title, name]
        if name in inside:
            turn = statistics.median(inside[name]) / repeats
            memory = compiled[name].lower(single[0], values).compile().memory_analysis()
            row += [f"{turn * 1e6:.1f}", f"{ratio(inside[OURS], inside[name]):.2f}"]
            temporary = "" if memory is None else f"{memory.temp_size_in_bytes / 2**20:.2f}"
            above = "" if floor is None else f"{turn / floor:.0f}"
        else:
            row += ["", ""]
            temporary = above = ""
        row += [f"{statistics.median(alone[name]) * 1e6:.1f}", f"{ratio(alone[OURS], alone[name]):.2f}"]
        print("| " + " | ".join([*row, temporary, above]) + " |", flush=True)


def heading(title: str, size: str = "N") -> None:
    print(f"\n## {title}\n")
    print(f"| {size} | side | in one jit, us | ours / it | alone, us | ours / it | temporary, MiB | floor |")
    print("| --- " * 8 + "|", flush=True)


def log_weights_of(n: int) -> np.ndarray:
    return (np.random.default_rng(n).normal(size=n) * 2).astype(np.float32)


def resampling(scheme: str, bytes_per_second: float) -> None:
    heading(scheme)
    for n in SIZES:
        values = log_weights_of(n)
        calls = {OURS: RESAMPLERS[scheme], **jax_peers(scheme), **accelerated(scheme)}
        double = values.astype(np.float64)
        on_host = {name: lambda f=f, v=double: f(v) for name, f in numpy_peers(scheme).items()}
        compare(f"{n}", calls, jnp.asarray(values), CALLS[n], on_host, 8 * n / bytes_per_second)


def accelerated(scheme: str) -> dict[str, Call]:
    """Return our own forms for accelerators, which are no default: they are timed where they run."""
    if jax.default_backend() != "gpu" or not (pallas := optional("ppl.kernels.pallas")):
        return {}
    return {f"{OURS}, pallas": getattr(pallas, scheme)} if hasattr(pallas, scheme) else {}


def weights(bytes_per_second: float) -> None:
    def separately(_, log_weights):
        log_sum = logsumexp(log_weights)
        ess = jnp.exp(2 * log_sum - logsumexp(2 * log_weights))
        normalised = jnp.exp(log_weights - log_sum)
        return log_sum, ess, -jnp.sum(jnp.where(normalised > 0, normalised * (log_weights - log_sum), 0))

    heading("summarize (floor: 4 bytes a particle)")
    for n in SIZES:
        calls = {OURS: lambda _, values: summarize(values), "two logsumexps, entropy": separately}
        compare(f"{n}", calls, jnp.asarray(log_weights_of(n)), CALLS[n], None, 4 * n / bytes_per_second)


def annealing(bytes_per_second: float) -> None:
    solver = optional("ppl.kernels.annealing")
    if solver is None:
        print("\nannealing: not there")
        return

    def bisection(_, log_weights):
        def step(_, bounds):
            low, high = bounds  # of the log of the temperature
            middle = (low + high) / 2
            scaled = log_weights * jnp.exp(-middle)
            log_ess = 2 * logsumexp(scaled) - logsumexp(2 * scaled)
            reached = log_ess >= jnp.log(0.5 * log_weights.shape[0])
            return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

        return jnp.exp(jax.lax.fori_loop(0, 20, step, (jnp.zeros(()), jnp.full((), 10.0)))[1])  # to 1e-5

    heading("annealing temperature, to half the ESS (floor: 4 bytes a particle, once)")
    for n in SIZES:
        calls = {OURS: lambda _, values: solver.temperature(values, ess=0.5), "20 bisections": bisection}
        compare(f"{n}", calls, jnp.asarray(log_weights_of(n)), max(CALLS[n] // 4, 1), None, 4 * n / bytes_per_second)


def tokens(bytes_per_second: float) -> None:
    sampler = optional("ppl.kernels.tokens")
    if sampler is None:
        print("\ntokens: not there")
        return

    def gumbel(key, logits):
        log_probs = jax.nn.log_softmax(logits)
        token = jnp.argmax(logits + jax.random.gumbel(key, logits.shape), axis=-1)
        return token, jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0], logsumexp(logits, axis=-1)

    heading("tokens, N rows of V logits (floor: 4 bytes a logit)", "N x V")
    for rows, vocabulary in [(1, 49_152), (32, 49_152), (32, 262_144)]:
        values = np.random.default_rng(rows).normal(size=(rows, vocabulary)).astype(np.float32) * 2
        calls = {OURS: sampler.sample_tokens, "gumbel, log_softmax": gumbel}
        floor = 4 * rows * vocabulary / bytes_per_second
        compare(f"{rows} x {vocabulary}", calls, jnp.asarray(values), 2, None, floor)


def optional(name: str):
    """Import a module of ours; None where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def main() -> None:
    groups = {scheme: lambda b, s=scheme: resampling(s, b) for scheme in RESAMPLERS}
    groups |= {"summarize": weights, "annealing": annealing, "tokens": tokens}
    asked = sys.argv[1:] or list(groups)
    if unknown := set(asked) - set(groups):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(groups)}")
    print(machine())
    for name in missing():
        print(f"{name}: not installed")
    speed = bandwidth()
    print(f"bandwidth, read and written: {speed / 1e9:.1f} GB/s")
    print("load average at the start {:.2f} {:.2f} {:.2f}".format(*os.getloadavg()))
    for name in asked:
        groups[name](speed)
    print("\nload average at the end {:.2f} {:.2f} {:.2f}".format(*os.getloadavg()))


if __name__ == "__main__":
    main()
