"""Lines of a population: whose past a particle has, and which past it could have had.

A population run keeps, for each outermost loop, what was drawn as it was drawn, x[t, n], the log-weights before
selection, and the ancestors a[t, n]. Its lines are

    traced      b_(t-1) = a[t-1, b_t]                                                                             (1)
    backward    P(b_t = n) proportional to w[t, n] gamma_(t+1)(x_(t+1) | x[t, n])    where t was resampled         (2)

from a particle drawn by the last weights, with gamma_(t+1) the density of iteration t + 1 after particle n, its
observations included. (2) draws a line anew among all that the population could have made; at iterations without
resampling a particle stays its own parent. (2) asks that one iteration tells how likely a future is: that the next
state is a function of an iteration's sites, see `ppl.dataflow.futures_are_one_step`.

Sources: Kitagawa (1996), for (1); Godsill, Doucet and West (2004), "Monte Carlo smoothing for nonlinear time series",
for (2); with resampling by need, Chopin and Papaspiliopoulos (2020), section 12.3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ppl import chance
from ppl.errors import SiteTypeError
from ppl.interpret import Result
from ppl.iterate import rows, walk_body
from ppl.lanes import take
from ppl.trace_space import TraceSpace

__all__ = ["Future", "backward_line", "require_one_step", "selected_slots", "traced_line"]


def traced_line(result: Result, index: Any) -> dict[str, Any]:
    """Return the trace of the particle that stands in a slot at the end, by (1).

    Args:
        result: of a run with `genealogy`.
        index: the slot, an int32.
    """
    line = _outside_loops(result, index)
    for loop in reversed(result.genealogy):
        index, slots = _slots(loop, index)
        line |= _rows(loop, slots)
    return line


def backward_line(space: TraceSpace, result: Result, index: Any, key: Any) -> dict[str, Any]:
    """Return a trace that ends as the particle in a slot does, its past drawn by (2).

    Args:
        space: where the run was made, of one loop for which (2) holds.
        result: of a run with `genealogy="future"`.
        index: the slot at the end, an int32.
        key: a PRNG key.
    """
    (loop,) = result.genealogy
    future = Future(loop)
    log_weights, resampled = loop["before"]["log_weights"], loop["resampled"]
    length = log_weights.shape[0]
    last = selected_slots(loop, length - 1)[index]

    def step(slot, x):
        t, key = x

        def drawn():
            return chance.categorical(key, log_weights[t] + future(t, future.sites(t + 1, slot)))

        slot = jax.lax.cond(resampled[t], drawn, lambda: slot)
        return slot, slot

    times = jnp.arange(length - 1)
    _, slots = jax.lax.scan(step, last, (times, jax.random.split(key, length - 1)), reverse=True)
    return _outside_loops(result, index) | _rows(loop, jnp.append(slots, last))


class Future:
    """How likely a future is after each particle of a run: gamma_(t+1) of (2)."""

    def __init__(self, loop: dict[str, Any]):
        self.loop, self.plan = loop, loop["plan"]
        self.walk = rows(self.plan)

    def sites(self, t: Any, slot: Any) -> dict[str, Any]:
        """Return what a particle, or several, drew at iteration t, by name."""
        return {name: take(values[t], slot) for name, values in self.loop["sites"].items()}

    def __call__(self, t: Any, sites: dict[str, Any]) -> Any:
        """Return the log-densities `[N]` of iteration t + 1 with given sites after each particle of iteration t."""
        row = jax.tree.map(lambda a: a[t + 1], self.walk)
        row |= {"given": row["given"] | sites, "retained": {}, "redrawn": {}, "keys": None}
        before = self.loop["before"]
        state = {"carry": [a[t] for a in before["carry"]], "captured": []}
        state["log_weights"] = jnp.zeros_like(before["log_weights"][t])
        state["index"] = jnp.arange(self.plan.interpreter.num_particles, dtype=jnp.int32)
        return walk_body(self.plan, state, row)[0].log_weights


def require_one_step(space: TraceSpace, what: str, sites: tuple[str, ...] | None = None) -> None:
    """Raise unless (2) holds for a program.

    Args:
        space: the program's measure.
        what: what needs it, for errors.
        sites: the names of the sites that differ between particles; None for all that are free.

    Raises:
        SiteTypeError: a future's density depends on more of the past than one iteration shows.
    """
    if not space.futures_are_one_step(sites):
        raise SiteTypeError(
            f"{what} needs a program with one ppl.scan, last of its statements, in which the next state is a function "
            "of the iteration's sites, and no random value outside of it is read by all iterations (move those with a "
            "kernel of their own, and name the loop's in `sites`). For other programs take ancestor_sampling=True."
        )


def selected_slots(loop: dict[str, Any], t: Any) -> Any:
    """Return, `[N]`, which slot before the selection at iteration t each slot after it descends from."""
    num = loop["before"]["log_weights"].shape[1] if loop["before"] is not None else loop["ancestors"].shape[1]
    stay = jnp.arange(num, dtype=jnp.int32)
    return stay if loop["ancestors"] is None else jnp.where(loop["resampled"][t], loop["ancestors"][t], stay)


def _slots(loop: dict[str, Any], index: Any) -> tuple[Any, Any]:
    """Return the slot in which a particle stood when the loop began, and its slots `[T]` before each selection."""
    length = loop["resampled"].shape[0]
    if loop["ancestors"] is None:
        return index, jnp.full(length, index)

    def step(slot, x):
        ancestors, resampled = x
        slot = jnp.where(resampled, ancestors[slot], slot)
        return slot, slot

    return jax.lax.scan(step, index, (loop["ancestors"], loop["resampled"]), reverse=True)


def _rows(loop: dict[str, Any], slots: Any) -> dict[str, Any]:
    times = jnp.arange(slots.shape[0])
    return {name: values[times, slots] for name, values in loop["sites"].items()}


def _outside_loops(result: Result, index: Any) -> dict[str, Any]:
    """Return what a particle drew outside of the outermost loops."""
    inside = {name for loop in result.genealogy for name in loop["sites"]}
    return {name: _row(lane, index) for name, lane in result.sites.items() if name not in inside}


def _row(lane, index):
    return take(lane.array, index) if lane.random else lane.array
