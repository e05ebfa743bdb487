"""Selection: what a population algorithm does with the weights at the end of an outermost iteration.

Ancestors are chosen in proportion to the weights, or to the weights and what else counts (`Choice`); a particle moves
whole, and what the choice took out of the weights goes into the log-mass, so that invariant (1) of `ppl.interpret`
holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ppl import chance
from ppl.lanes import has_long_rows, move, take
from ppl.loops import LoopPlan

__all__ = ["Choice", "Selected", "Selection", "Weighing", "select"]


class Weighing(NamedTuple):
    """What selection knows of the weights: their log-sum, their effective sample size, their entropy, all scalars."""

    log_sum: Any
    ess: Any
    entropy: Any


class Choice(NamedTuple):
    """What else counts while ancestors are chosen.

    Attributes:
        ahead: log-weights `[N]` that count while choosing and are taken out of the children's.
        future: gives, `[N]`, the log-density of the retained particle's future after each particle: its past is drawn
            anew.
    """

    ahead: Any = None
    future: Callable[[], Any] | None = None


class Selected(NamedTuple):
    """The outcome of a selection.

    Attributes:
        ancestors: `int32[N]`.
        children_log_weights: a function of ancestors `int32[N]`, which may have been put in another order: the
            log-weights `[N]` that their children start with.
        log_mass: the log-mass taken out of the weights, a scalar.
        temperature: the temperature at which the ancestors were drawn, a scalar.
    """

    ancestors: Any
    children_log_weights: Callable[[Any], Any]
    log_mass: Any
    temperature: Any = 1.0


class Selection(Protocol):
    """What a population algorithm does at the end of an iteration of an outermost loop.

    `may_resample` is False for algorithms that only watch the weights; `anneals` is True for those that resample at a
    temperature; `looks_ahead` for those that want to know the weights of an iteration before choosing who makes it.
    """

    may_resample: bool
    anneals: bool
    looks_ahead: bool

    def weigh(self, log_weights) -> Weighing:
        """Summarise log-weights `[N]`."""

    def foresee(self, increments):
        """Return what is added to log-weights `[N]` while choosing, given what a trial of the next iteration added."""

    def due(self, weighing: Weighing, progress):
        """Return whether to resample now: a Python bool where that is fixed beforehand, else a traced one.

        `progress` is the share, in (0, 1], of the loop's iterations that are done.
        """

    def select(self, key, log_weights, weighing: Weighing, progress, retained=None) -> Selected:
        """Choose ancestors after the share `progress`, in (0, 1], of the loop's iterations.

        `retained`, an index, is the ancestor of particle 0, for selections that pin it.

        Invariant (1) must hold: E[sum over children of exp(new w) * exp(mass)] = exp(w) for each particle.
        """


def select(plan: LoopPlan, state, new_state, output, x, choice: Choice) -> None:
    """Resample if it is due: changes `new_state`, and adds what happened to `output`."""
    interpreter, ahead, log_weights = plan.interpreter, choice.ahead, new_state["log_weights"]
    selection, num = interpreter.selection, interpreter.num_particles
    weighing = choosing = selection.weigh(log_weights)
    if ahead is not None:
        choosing = selection.weigh(log_weights + ahead)
    progress = (x["t"] + 1).astype(jnp.float32) / plan.node.length
    due = selection.due(choosing, progress) if selection.may_resample else False
    moving = plan.moving(state, new_state)

    def resample(moving, log_weights):
        first = log_weights if ahead is None else log_weights + ahead
        key, retained = x["keys"][-1], {}
        if choice.future is not None:
            retained["retained"] = chance.categorical(jax.random.fold_in(key, 3), log_weights + choice.future())
        ancestors, children, mass, temperature = selection.select(key, first, choosing, progress, **retained)
        mass, temperature = (jnp.asarray(a, log_weights.dtype) for a in (mass, temperature))
        moving, ancestors = move(moving, ancestors, any_order=choice.future is None)
        start = children(ancestors)
        start = start if ahead is None else start - take(ahead, ancestors)
        return moving, start, mass, ancestors, temperature

    def stay(moving, log_weights):
        none = jnp.zeros((), log_weights.dtype)
        return moving, log_weights, none, jnp.arange(num, dtype=jnp.int32), none + 1

    if due is False:
        mass, ancestors, temperature = jnp.zeros((), log_weights.dtype), None, None
    elif due is True and not has_long_rows(moving):
        moving, log_weights, mass, ancestors, temperature = resample(moving, log_weights)
    else:  # in a branch, even one that is always taken, XLA overwrites long rows in place; outside it copies them
        predicate = x["t"] >= 0 if due is True else due
        moving, log_weights, mass, ancestors, temperature = jax.lax.cond(predicate, resample, stay, moving, log_weights)
    plan.put_back(new_state, moving)
    new_state["log_weights"] = log_weights
    new_state["log_mass"] = state["log_mass"] + mass
    output["diagnostics"] = {
        "ess": weighing.ess,
        "resampled": jnp.asarray(due),
        "log_evidence": state["log_mass"] + weighing.log_sum - jnp.log(float(num)),
    }
    if ancestors is not None:
        output["ancestors"] = ancestors
        if selection.anneals:
            output["diagnostics"]["temperature"] = temperature
    if interpreter.progress is not None:
        interpreter.progress(x["t"], plan.node.length, weighing.ess)
