"""Replay: walking a program again along sites that are known, one trace for each particle.

What was computed from the sites is computed anew after they were moved between two iterations (*rejuvenation*), and
the density of a retained particle's future is known after each particle's past (*ancestor sampling*).

Where a run is differentiated, moved values x stay where they are, and the weights of a population that was moved under
the measure gamma_t of a prefix have the derivative of log gamma_t(x), whatever they had before: sum_n w_n f(x_n) then
has that of the integral of f under gamma_t, for a kernel that leaves gamma_t as it is (see `ppl.derivatives`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from ppl.derivatives import remembered
from ppl.lanes import Frame, Lane
from ppl.loops import LoopPlan

if TYPE_CHECKING:
    from ppl.interpret import Interpreter

__all__ = ["Rejuvenation", "log_density_of_future", "rejuvenate", "replaying"]


class Rejuvenation(NamedTuple):
    """Moves between the iterations of outermost loops.

    Attributes:
        move: `(key, sites, stop) -> (sites, acceptance)`, with sites by name, `[N, ...]`, of the prefix that has `stop`
            iterations; it leaves the measure of that prefix as it is. The acceptance is a scalar.
        every: a move is due after every so many iterations.
    """

    move: Callable[[Any, dict[str, Any], Any], tuple[dict[str, Any], Any]]
    every: int


def rejuvenate(plan: LoopPlan, new_state, output, x) -> None:
    """Move the particles if that is due: changes `new_state`, and adds what happened to `output`."""
    rejuvenation, num = plan.interpreter.rejuvenation, plan.interpreter.num_particles
    stop = plan.start + x["t"] + 1
    held = plan.computed(new_state)
    differentiated = plan.interpreter.path is not None

    def moved(sites, held, log_weights):
        key = jax.random.fold_in(x["keys"][-1], 2)
        if differentiated:
            sites = jax.lax.stop_gradient(sites)
        new_sites, acceptance = rejuvenation.move(key, sites, stop)
        replayer, frame = replaying(plan, new_sites, stop=stop)
        there, state = replayer.walk_through(plan.node, frame)
        new_held = plan.computed(plan.replayed(there, state))
        if differentiated:  # moved values stay where they are, and the weights remember the density of the whole past
            log_weights = jax.lax.stop_gradient(log_weights) + remembered(state["log_weights"])
            return new_sites, new_held, log_weights, jnp.asarray(acceptance, jnp.float32)
        # Those that did not move keep what they had, to the bit.
        same = [jnp.all((sites[name] == new_sites[name]).reshape(num, -1), axis=1) for name in sites]
        stay = functools.reduce(jnp.logical_and, same, jnp.ones(num, bool))

        def kept(old, new):
            return jnp.where(stay.reshape(-1, *(1,) * (old.ndim - 1)), old, new)

        return new_sites, jax.tree.map(kept, held, new_held), log_weights, jnp.asarray(acceptance, jnp.float32)

    def stayed(sites, held, log_weights):
        return sites, held, log_weights, jnp.float32(0.0)

    due = stop % rejuvenation.every == 0
    state = new_state["sites"], held, new_state["log_weights"]
    sites, held, new_state["log_weights"], acceptance = jax.lax.cond(due, moved, stayed, *state)
    plan.put_back(new_state, held)
    new_state["sites"] = sites
    output["diagnostics"] |= {"moved": jnp.asarray(due), "acceptance": acceptance}


def log_density_of_future(plan: LoopPlan, sites: dict[str, Any], t: Any) -> Any:
    """Return, `[N]`, the log-density of the retained particle's whole future after each particle's past.

    Args:
        plan: the loop's plan.
        sites: what the particles drew so far, `[N, ...]` by name.
        t: the iteration after which the future begins, an int32.
    """
    sites = plan.continued(sites, plan.frame.retained, t)
    replayer, whole = replaying(plan, sites, keep=plan.interpreter.keep)
    replayer.walk(whole.block, whole.inputs, None, whole)
    _, prefix = replaying(plan, sites, stop=plan.start + t + 1)
    replayer.walk(prefix.block, prefix.inputs, None, prefix)
    possible = (prefix.log_weights > -jnp.inf) & plan.same_future(whole, t)
    return jnp.where(possible, whole.log_weights - jnp.where(possible, prefix.log_weights, 0.0), -jnp.inf)


def replaying(
    plan: LoopPlan, sites: dict[str, Any], *, stop: Any = None, keep: frozenset[str] = frozenset()
) -> tuple[Interpreter, Frame]:
    """Return an interpreter and the frame in which it walks a program along given sites, `[N, ...]` by name.

    Args:
        plan: of a loop of the program.
        sites: the values of all free sites.
        stop: how many iterations of outermost loops the prefix has that is walked, a scalar; None walks all.
        keep: the names of the sites to record.
    """
    run = plan.interpreter
    options = {"power": run.power, "powered": run.powered, "path": run.path}
    replayer = type(run)(run.num_particles, weigh_draws=True, keep=keep, **options)
    given = plan.frame.given | {name: Lane(value, True) for name, value in sites.items()}
    frame = replayer.frame(given, plan.frame.block, plan.frame.inputs)
    frame.stop = stop
    return replayer, frame
