"""Law L2 on a finite program, by running an algorithm in every way that it can go.

A population of particles x_n with normalised weights W_n and an estimate Z_hat stands for the program's measure gamma
where, for every bounded f,

    E[ Z_hat sum_n W_n f(x_n) ]  =  sum over traces x of gamma(x) f(x),     so that E[Z_hat] = Z.                 (1)

Both sides are sums over finitely many runs and traces. With f the indicator of each trace in turn, (1) holds for all f.

Source: Naesseth, Lindsten and Schön, Nested sequential Monte Carlo methods (2015), section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ppl.posterior import Outcome
from ppl.program import as_program
from ppl.testing.columns import as_columns, named_functions
from ppl.testing.exact_traces import Traces, all_traces, describe, free_sites
from ppl.testing.tape import MAX_RUNS, enumerate_runs

__all__ = ["assert_properly_weighted"]

_SHOWN = 8  # functions named in a message


def assert_properly_weighted(
    program: Any,
    algorithm: Callable,
    functions: Callable | Mapping[str, Callable] | None = None,
    atol: float = 1e-5,
    *,
    max_runs: int = MAX_RUNS,
) -> None:
    """Check (1) by enumeration: for f = 1, the indicators of each site's values and of each trace, and the value.

    Two particles, two or three iterations and two or three values a site show most errors, and give a few hundred to a
    few thousand runs, at about a thousand a second.

    Args:
        program: a program or a process with finitely many traces. Its proposals are the algorithm's.
        algorithm: an algorithm whose `guarantee` is "unbiased", or "assumed": the check tells about parts of your own.
            Resampling schemes that it names are replaced by their exact laws; a scheme of your own must take its
            choices from `ppl.chance`.
        functions: functions of the program's value, written for one particle, that return any pytree of numbers: one
            function, or several by name. By default the value itself.
        atol: the largest deviation allowed, as a share of Z times the largest absolute value of the function.
        max_runs: the number of runs after which to give up.

    Raises:
        AssertionError: (1) does not hold; says for which functions, both numbers and the number of runs.
        TypeError: a site's law is not finite, or randomness does not come from `ppl.chance`.
        ValueError: the algorithm does not promise (1), or there are more than `max_runs` runs or traces.
    """
    program = as_program(program)
    _require_unbiased(algorithm, getattr(algorithm, "guarantee", None))
    named = {"value": lambda value: value} if functions is None else named_functions(functions)
    names = free_sites(program)
    traces = all_traces(program, names, max_runs)

    def run(key):
        posterior = algorithm(program, key, keep=frozenset(names), progress=False)
        _require_unbiased(algorithm, posterior.guarantee)
        results = {name: function(posterior.value) for name, function in named.items()}
        sites = {name: posterior.sites[name] for name in names}
        return sites, posterior.log_weights, posterior.log_evidence, posterior.status.code, results

    exact_results = {name: function(traces.value) for name, function in named.items()}
    labels, columns = as_columns(exact_results, len(traces))
    exact, largest = traces.density @ columns, np.max(np.abs(columns), axis=0, initial=1.0)
    mass, estimate, stray, count = np.zeros(len(traces)), np.zeros(len(labels)), {}, 0
    key = jax.random.key(0)
    for probability, outcome in enumerate_runs(run, key)(key, max_runs=max_runs):
        count += 1
        sites, log_weights, log_evidence, code, results = outcome
        if code == Outcome.INVALID_WEIGHT:
            raise AssertionError(f"{algorithm!r}: the log-weight of a living particle became NaN or +inf in a run.")
        if log_evidence == -np.inf:
            continue
        weights = probability * np.exp(np.float64(log_evidence) + np.asarray(log_weights, np.float64))
        alive = weights > 0
        estimate += weights[alive] @ as_columns(results, len(weights))[1][alive]
        for n, place in enumerate(traces.find(sites, len(weights))):
            if place is not None:
                mass[place] += weights[n]
            elif alive[n]:
                trace = describe({name: values[n] for name, values in sites.items()})
                stray[trace] = stray.get(trace, 0.0) + weights[n]
    compared = [*_of_sites(traces, mass, sum(stray.values()))]
    compared += [_Compared(*row) for row in zip(labels, estimate, exact, largest, strict=True)]
    wrong = [c for c in compared if not abs(c.estimate - c.exact) <= atol * traces.mass * c.largest]
    if wrong or stray:
        raise AssertionError(_message(program, algorithm, traces, mass, stray, wrong, count))


class _Compared(NamedTuple):
    """A function, both sides of (1), and its largest absolute value."""

    label: str
    estimate: float
    exact: float
    largest: float = 1.0


def _of_sites(traces: Traces, mass: np.ndarray, stray: float) -> Iterator[_Compared]:
    """Compare 1, the indicators of each entry of each site, and those of whole traces."""
    yield _Compared("1", mass.sum() + stray, traces.mass)
    for name, values in traces.sites.items():
        flat = values.reshape(len(traces), -1)
        for place, index in enumerate(np.ndindex(*values.shape[1:])):
            entry = f"{name}{list(index)}" if index else name
            for value in np.unique(flat[:, place]):
                chosen = flat[:, place] == value
                yield _Compared(f"[{entry} == {value}]", mass[chosen].sum(), traces.density[chosen].sum())
    for place in range(len(traces)):
        yield _Compared(f"[the trace is {describe(traces.one(place))}]", mass[place], traces.density[place])


def _require_unbiased(algorithm, guarantee: str | None) -> None:
    if guarantee not in ("unbiased", "assumed"):  # what is assumed is what there is to check
        raise ValueError(
            f'`algorithm` must promise "unbiased" weights, got {algorithm!r} with the guarantee {guarantee!r}. Chains '
            "are checked by assert_invariant and assert_joint."
        )


def _message(program, algorithm, traces: Traces, mass, stray, wrong: list[_Compared], count: int) -> str:
    lines = [
        f"{algorithm!r} is not properly weighted for {program!r}: over all {count} runs and {len(traces)} traces,",
        *(
            f"  f = {c.label}: E[Z_hat sum W f] = {c.estimate:.8g}, but the measure gives {c.exact:.8g}"
            for c in wrong[:_SHOWN]
        ),
    ]
    if len(wrong) > _SHOWN:
        lines.append(f"  and {len(wrong) - _SHOWN} more functions.")
    if stray:
        worst = sorted(stray, key=stray.get, reverse=True)
        lines.append(f"Traces of density zero are given weight: {'; '.join(worst[:4])}.")
    never = np.flatnonzero(mass == 0)
    if never.size:
        lines.append(
            f"Traces of positive density are never reached: {traces.describe(never)}. Does a proposal have a smaller "
            "support than its site?"
        )
    return "\n".join(lines)
