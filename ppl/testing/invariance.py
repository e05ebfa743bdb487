"""A kernel's exact transition matrix on a finite program.

With the traces x_1 .. x_M of positive density gamma and pi = gamma / Z,

    K_ij = sum over all ways that a step from x_i can go and that end in x_j, of their probability,               (1)
    sum_j K_ij = 1,      pi K = pi.                                                                               (2)

The kernel starts at x_i with the memory that it draws there (`init`), whose randomness counts: kernels that carry an
estimate along (pseudo-marginal ones) draw it from its law given x_i, so that (2) holds. What a kernel remembers from
one step to the next, such as the density of the present trace, is used from the second step on: K is then that of so
many steps, and (2) holds for it too. Chains that can get from each trace to each other one are irreducible: the graph
of K_ij > 0 is strongly connected.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl.program import Program, as_program
from ppl.testing.exact_traces import Traces, all_traces, describe, free_sites
from ppl.testing.tape import MAX_RUNS, enumerate_runs
from ppl.trace_space import TraceSpace

__all__ = ["assert_invariant", "make_steps", "trace_space", "transition_matrix"]

_SHOWN = 4  # traces named in a message


def assert_invariant(
    program: Any,
    kernel: Any,
    irreducible: bool = False,
    atol: float = 1e-6,
    *,
    num_steps: int = 1,
    max_runs: int = MAX_RUNS,
) -> None:
    """Check by enumeration that a kernel leaves a finite program's posterior as it is: (2).

    Args:
        program: a program or a process with finitely many traces; a dozen traces are enough to show most errors.
        kernel: a kernel on traces. It takes its choices from `ppl.chance`.
        irreducible: check too that every trace can be reached from every other one.
        atol: the largest deviation of a probability allowed.
        num_steps: how many steps K makes; 2 for a kernel with a memory of its own.
        max_runs: the number of runs from one trace after which to give up; about a thousand take a second.

    Raises:
        AssertionError: (2) does not hold, or the kernel changes other sites than its own, reports an acceptance rate
            outside of [0, 1], or is not irreducible; names the traces.
        TypeError: a site's law is not finite, or randomness does not come from `ppl.chance`.
        ValueError: there are more than `max_runs` runs or traces.
    """
    traces, pi, matrix = transition_matrix(program, kernel, num_steps=num_steps, max_runs=max_runs)
    after = pi @ matrix
    wrong = np.flatnonzero(~(np.abs(after - pi) <= atol))
    if wrong.size:
        wrong = wrong[np.argsort(-np.abs(after - pi)[wrong])]
        lines = [f"{kernel!r} does not leave the posterior of {program!r} as it is. Probabilities before and after:"]
        lines += [f"  {describe(traces.one(i))}: {pi[i]:.8g} becomes {after[i]:.8g}" for i in wrong[:_SHOWN]]
        if len(wrong) > _SHOWN:
            lines.append(f"  and {len(wrong) - _SHOWN} more of {len(pi)} traces.")
        raise AssertionError("\n".join(lines))
    if irreducible:
        _require_irreducible(kernel, traces, matrix)


def transition_matrix(
    program: Any, kernel: Any, *, num_steps: int = 1, max_runs: int = MAX_RUNS
) -> tuple[Traces, np.ndarray, np.ndarray]:
    """Return the traces of positive density, their probabilities pi `[M]`, and the matrix K `[M, M]` of (1).

    Args and errors are those of `assert_invariant`; (2) is checked as far as the rows' sums go.
    """
    program = as_program(program)
    names = free_sites(program)
    traces = all_traces(program, names, max_runs)
    movable: tuple[str, ...] = ()

    def run(key, sites):
        nonlocal movable
        moves = kernel.bind(trace_space(kernel.prepare(program), kernel))
        movable = tuple(moves.sites)
        after, acceptance = make_steps(moves, key, sites, num_steps)
        return {name: after[name] for name in names}, acceptance

    key = jax.random.key(0)
    runs = enumerate_runs(run, key, traces.one(0))
    matrix = np.zeros((len(traces), len(traces)))
    for i in range(len(traces)):
        before = traces.one(i)
        for probability, (after, acceptance) in runs(key, before, max_runs=max_runs):
            (j,) = traces.find({name: values[None] for name, values in after.items()}, 1)
            changed = [n for n in names if n not in movable and not np.array_equal(before[n], after[n])]
            if changed:
                raise AssertionError(
                    f"{kernel!r} changes {changed}; the sites that it says it moves are {list(movable)}."
                )
            if not (0 <= acceptance.min() and acceptance.max() <= 1.000001):
                raise AssertionError(f"{kernel!r} reports the acceptance rate {acceptance} at {describe(before)}.")
            if j is None:
                raise AssertionError(
                    f"{kernel!r} goes from {describe(before)} with probability {probability:.3g} to {describe(after)}, "
                    "which has density zero. Entries of iterations after a loop has stopped are zeros."
                )
            matrix[i, j] += probability
    return traces, traces.density / traces.mass, matrix


def make_steps(moves: Any, key, sites: dict[str, Any], num_steps: int) -> tuple[dict[str, Any], Any]:
    """Make steps from a trace; returns where they end and their acceptance rates, `[num_steps]`."""
    init_key, *keys = jax.random.split(key, num_steps + 1)
    memory, rates = moves.init(init_key, sites, 0), []
    for key in keys:
        sites, memory, info = moves.step(key, sites, memory)
        rates.append(info["acceptance"])
    return sites, jnp.stack(rates)


def trace_space(program: Program, kernel: Any) -> TraceSpace:
    """Return the space of a program's traces, for a kernel to be bound to."""
    gradient = kernel.needs_gradient
    return TraceSpace(program.stage(keep_rules=gradient), differentiable=gradient)


def _require_irreducible(kernel: Any, traces: Traces, matrix: np.ndarray) -> None:
    reached = (matrix > 0) | np.eye(len(matrix), dtype=bool)
    for _ in range(len(matrix).bit_length()):
        reached = (reached.astype(np.float32) @ reached.astype(np.float32)) > 0
    stuck = np.flatnonzero(~reached.all(axis=1))
    if stuck.size:
        start = stuck[0]
        missing = np.flatnonzero(~reached[start])
        raise AssertionError(
            f"{kernel!r} is not irreducible: from {describe(traces.one(start))} these traces of positive density are "
            f"never reached: {traces.describe(missing)}. Does a proposal have a smaller support than its site, or does "
            "the kernel move some sites only?"
        )
