"""What importance sampling and SMC share: a population run through a program, compiled, as a posterior."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from ppl import progress as progress_bar
from ppl import runners
from ppl.derivatives import path_draws
from ppl.guarantees import promised
from ppl.interpret import Interpreter, Result
from ppl.ir import evaluate_fixed
from ppl.kernels.weights import summarize
from ppl.lanes import Lane
from ppl.posterior import Posterior, population_posterior
from ppl.program import Program, Staged, as_program, check_sites, kept_sites
from ppl.selection import Selection, Weighing
from ppl.trace import along_times
from ppl.trace_space import TraceSpace

__all__ = ["OnlyWeigh", "PopulationAlgorithm", "Watch", "blame_sites", "lower", "run_population"]


class PopulationAlgorithm(Protocol):
    """A frozen, hashable description of a population algorithm: with the program it decides what is compiled."""

    num_particles: int
    guarantee: str  # of the object: it may depend on its settings

    def selection(self) -> Selection:
        """Return what happens at the end of an outermost iteration."""


class Watch(Protocol):
    """A frozen, hashable description of what else is computed from a run, with its genealogy."""

    promise: ClassVar[str]  # what the posterior can promise at best

    def watch(self, space: TraceSpace, result: Result, key: Any) -> dict[str, Any]:
        """Return figures for the diagnostics, by name."""


class OnlyWeigh:
    """The selection of algorithms that never resample: it watches the weights."""

    may_resample = False
    anneals = False
    looks_ahead = False

    def weigh(self, log_weights) -> Weighing:
        """Summarise log-weights `[N]`."""
        return Weighing(*summarize(log_weights))


def run_population(
    program: Program,
    algorithm: PopulationAlgorithm,
    key,
    *,
    keep: frozenset[str] | None,
    progress: bool | None,
    retained: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Posterior:
    """Run a population through a program.

    Args:
        program: a program or a process.
        algorithm: how many particles, and what selects them.
        key: a PRNG key.
        keep: names of the sites to store, None for all but internal ones.
        progress: see `ppl.infer`.
        retained: values of all sample sites, which particle 0 has: a run of conditional SMC.
        watch: what else to compute from the run.
    """
    program = as_program(program)
    staged, moving = _staged(program, getattr(algorithm, "needs_gradient", False))
    keep = kept_sites(staged, keep)
    if getattr(algorithm, "rejuvenation", None) is not None:
        algorithm.rejuvenation_on(TraceSpace(staged))
    path = () if retained is None else (check_sites(staged, retained, complete=True),)
    limits = [None if watch is None else watch.promise, "consistent" if path else None]  # a path is no draw of the run
    guarantee = promised(staged, algorithm, *limits)
    show = progress_bar.wanted(progress) and not runners.is_traced((staged.inputs, staged.given, key))
    with progress_bar.showing(show):
        purpose = (algorithm, "conditional run" if path else "run", keep, show, guarantee, watch)
        run = _runner(algorithm, keep, show, guarantee, watch, moving)
        posterior = runners.run(staged, purpose, run, key, *path, differentiable=True)
        if show:
            jax.block_until_ready(posterior.log_weights)
    return _complete(posterior, staged, program)


def _staged(program: Program, needs_gradient: bool) -> tuple[Staged, frozenset[str] | None]:
    """Return a staged program and, where a derivative may be taken of it, the draws that go by their path."""
    staged = program.stage(keep_rules=needs_gradient)
    if not runners.is_traced((staged.inputs, staged.given)):
        return staged, None
    staged = staged if needs_gradient else program.stage(keep_rules=True)
    return staged, path_draws(staged.block, frozenset(staged.given))


def lower(program: Program, algorithm: PopulationAlgorithm):
    """Return the run that `ppl.infer` would compile, lowered: to read its memory, its constants, its code."""
    staged = as_program(program).stage(keep_rules=False)
    keep = kept_sites(staged, None)
    purpose = (algorithm, "run", keep, False, algorithm.guarantee)
    return runners.lower(staged, purpose, _runner(algorithm, keep, False, algorithm.guarantee), jax.random.key(0))


def blame_sites(
    program: Program, algorithm: PopulationAlgorithm, key, *, watched: bool = False
) -> dict[str, dict[str, Any]]:
    """Repeat a run with the same key, counting the particles that each site killed or gave an invalid weight.

    Args:
        program: the program of the run.
        algorithm: the algorithm of the run.
        key: its PRNG key.
        watched: whether it was a run with a `watch`.

    Returns:
        For each site the counts `killed` and `invalid`, by iteration (`[T]`) where it stands in a loop.
    """
    staged = as_program(program).stage(keep_rules=getattr(algorithm, "needs_gradient", False))

    def run(staged: Staged, inputs, given, key):
        interpreter = Interpreter(
            algorithm.num_particles, algorithm.selection(), keep=kept_sites(staged, None), blame=True
        )
        interpreter, staged, inputs = _with_moves(algorithm, interpreter, staged, inputs, given)
        if watched:
            _, interpreter, key, _ = _with_genealogy(interpreter, staged, inputs, given, key)
        return interpreter.run(staged.block, inputs, key, given).blame

    return runners.run(staged, (algorithm, "blame", watched), run, key)


def _with_moves(algorithm: PopulationAlgorithm, interpreter: Interpreter, staged: Staged, inputs, given, fixed=None):
    """Return the interpreter with an algorithm's moves, and the program with its inputs as they are then walked."""
    if getattr(algorithm, "rejuvenation", None) is None:
        return interpreter, staged, inputs
    block, inputs = evaluate_fixed(staged.block, inputs)  # once, not in every replay
    staged = dataclasses.replace(staged, block=block)
    values = (inputs, given) if fixed is None else fixed((inputs, given))
    space = TraceSpace(staged, *values, differentiable=algorithm.needs_gradient)
    moves = algorithm.rejuvenation_on(space)
    if moves is not None:
        keep = interpreter.keep | frozenset(space.sites)
        interpreter = dataclasses.replace(interpreter, keep=keep, rejuvenation=moves, site_types=space.site_types)
    return interpreter, staged, inputs


def _with_genealogy(interpreter: Interpreter, staged: Staged, inputs, given, key):
    """Return the space of a watched run, its interpreter, its key, and the key of the watch."""
    space = TraceSpace(staged, inputs, given)
    key, watch_key = jax.random.split(key)
    keep = interpreter.keep | frozenset(space.sites)
    return space, dataclasses.replace(interpreter, keep=keep, genealogy="future"), key, watch_key


def _runner(
    algorithm: PopulationAlgorithm,
    keep: frozenset[str],
    show: bool,
    guarantee: str,
    watch: Watch | None = None,
    moving: frozenset[str] | None = None,
) -> Callable[..., Posterior]:
    num = algorithm.num_particles

    def run(staged: Staged, inputs, given, key, retained=None) -> Posterior:
        progress = progress_bar.report if show else None
        selection = algorithm.selection() if retained is None else algorithm.conditional_selection()
        interpreter = Interpreter(num, selection, keep=keep, progress=progress, path=moving)
        fixed = None if moving is None else jax.lax.stop_gradient
        interpreter, staged, inputs = _with_moves(algorithm, interpreter, staged, inputs, given, fixed)
        more = {}
        if watch is not None:
            space, interpreter, key, watch_key = _with_genealogy(interpreter, staged, inputs, given, key)
        result = interpreter.run(staged.block, inputs, key, given, retained)
        if watch is not None:
            more = watch.watch(space, result, watch_key)
        posterior = population_posterior(
            result.log_weights,
            result.log_mass,
            result.diagnostics,
            value=jax.tree.unflatten(staged.out_tree, [_spread(lane, num) for lane in result.value]),
            sites={name: _spread(lane, num) for name, lane in result.sites.items() if name in keep},
            present={
                name: _spread(mask, num) for name, mask in result.present.items() if mask is not None and name in keep
            },
            guarantee=guarantee,
            algorithm=repr(algorithm if watch is None else watch),
        )
        return dataclasses.replace(posterior, diagnostics=posterior.diagnostics | more)

    return run


def _spread(lane: Lane, num: int):
    """Return a lane's array with the particle axis."""
    return lane.array if lane.random else jnp.broadcast_to(lane.array, (num, *jnp.shape(lane.array)))


def _complete(posterior: Posterior, staged: Staged, program: Program) -> Posterior:
    """Add what needs no compiled run: sites that are always present, and how to read the value as text."""
    num = posterior.num_particles
    present = {
        name: along_times(posterior.present[name], staged.sites[name].time_shape, 1)
        if name in posterior.present
        else jnp.ones((num, *staged.sites[name].time_shape), bool)
        for name in posterior.sites
    }
    diagnostics = dict(posterior.diagnostics)
    if "ancestors" not in diagnostics:  # nothing was ever resampled: everybody is their own
        steps = diagnostics["ess"].shape[0]
        diagnostics["ancestors"] = jnp.broadcast_to(jnp.arange(num, dtype=jnp.int32), (steps, num))
    if program.target is not None and (calls := program.target.combination().network_calls()) is not None:
        diagnostics["network_calls"] = calls * num
    return dataclasses.replace(posterior, present=present, diagnostics=diagnostics, decode=program.decode)
