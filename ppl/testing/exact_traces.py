"""All traces of a finite program, and how they are told apart.

The program is run under every choice of its own laws (`ppl.testing.tape`), its factors and observations weighed: each
trace is met once, with the entries of iterations after a loop had stopped as zeros, and its joint density is

    gamma(x)  =  prod over sites of p(site | what lies before)  *  exp(sum of factors).                           (1)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from ppl.program import Program
from ppl.testing.tape import enumerate_runs
from ppl.trace import simulate

__all__ = ["Traces", "all_traces", "free_sites"]

_SHOWN = 4  # traces named in a message


@dataclasses.dataclass(frozen=True)
class Traces:
    """All traces of a finite program that have positive density.

    Attributes:
        sites: values of all free sample sites, `[M, ...]`.
        value: what the program returns, `[M, ...]`.
        density: gamma of (1), `float64[M]`.
    """

    sites: dict[str, np.ndarray]
    value: Any
    density: np.ndarray

    def __post_init__(self):
        object.__setattr__(self, "_places", {name: i for i, name in enumerate(identities(self.sites, len(self)))})

    def __len__(self) -> int:
        return len(self.density)

    @property
    def mass(self) -> float:
        """The total mass Z."""
        return float(self.density.sum())

    def find(self, sites: dict[str, np.ndarray], count: int) -> list[int | None]:
        """Return the place of each of `count` traces, `[count, ...]`; None for one of density zero."""
        return [self._places.get(name) for name in identities(sites, count)]

    def one(self, place: int) -> dict[str, np.ndarray]:
        """Return the sites of one trace."""
        return {name: values[place] for name, values in self.sites.items()}

    def describe(self, places) -> str:
        """Name traces in a message."""
        shown = "; ".join(describe(self.one(place)) for place in list(places)[:_SHOWN])
        return f"{shown}; and {len(places) - _SHOWN} more" if len(places) > _SHOWN else shown


def free_sites(program: Program) -> tuple[str, ...]:
    """Return the names of the sample sites that are not observed."""
    staged = program.stage(keep_rules=False)
    return tuple(n for n, site in staged.sites.items() if site.kind == "sample" and n not in staged.given)


def all_traces(program: Program, names: tuple[str, ...], max_runs: int) -> Traces:
    """Enumerate the traces of a finite program that have positive density.

    Raises:
        TypeError: a site's law is not finite; names the site.
        ValueError: no trace has positive density, or there are too many.
    """

    def run(key):
        trace = simulate(program, key)
        return {name: trace.sites[name] for name in names}, trace.value, trace.log_density

    key, met = jax.random.key(0), {}
    for _, (sites, value, log_density) in enumerate_runs(run, key)(key, max_runs=max_runs):
        if np.isnan(log_density) or log_density == np.inf:
            raise ValueError(f"the log-density of the trace {describe(sites)} is {log_density}.")
        if log_density > -np.inf:
            (identity,) = identities(jax.tree.map(lambda a: a[None], sites), 1)
            met.setdefault(identity, (sites, value, log_density))
    if not met:
        raise ValueError(f"no trace of {program!r} has positive density: there is nothing to check.")
    sites, value, log_densities = jax.tree.map(lambda *leaves: np.stack(leaves), *met.values())
    return Traces(sites, value, np.exp(np.asarray(log_densities, np.float64)))


def identities(sites: dict[str, np.ndarray], count: int) -> list[bytes]:
    """Return what tells traces apart, for `count` traces `[count, ...]`."""
    rows = [np.asarray(sites[name], np.float64).reshape(count, -1) + 0.0 for name in sorted(sites)]
    return [row.tobytes() for row in np.concatenate([np.zeros((count, 0)), *rows], axis=1)]


def describe(sites: dict[str, np.ndarray]) -> str:
    """Write a trace as it is shown in messages."""
    return "{" + ", ".join(f"{name}: {np.asarray(values).tolist()}" for name, values in sites.items()) + "}"
