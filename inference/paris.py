"""Smoothing of additive functionals: PaRIS, and the Parisian particle Gibbs sampler.

An additive functional of a program whose next state is a function of an iteration's sites, t = 0..T-1, is

    H(x) = sum_t h(x_(t-1), x_t, t),     h(x_0, x_0, 0) at t = 0                                                   (1)

Each particle carries a statistic tau, made from M draws of whom it could have come from: with w the log-weights before
the selection and gamma_(t+1) the density of an iteration,

    P(J = l) proportional to w[t, l] gamma_(t+1)(x[t+1, n] | x[t, l]),    J_1..J_M independent                      (2)
    tau[t+1, n] = (1/M) sum_m ( tau[t, J_m] + h(x[t, J_m], x[t+1, n], t+1) )                                      (3)
    E[H] is estimated by sum_n W[T-1, n] tau[T-1, n].                                                              (4)

With M = 1 the variance grows quadratically in T as that of the traced lines does; with M >= 2 linearly. (2) is drawn
exactly, from all N densities for each of N particles. Where iteration t was not followed by resampling a particle has
one parent, itself.

`PaRIS` runs this along an SMC run. `ParisianGibbs` (PPG) runs it along conditional SMC, again and again: the next trace
is a particle's, drawn by the last weights, along its first draws (2), which is particle Gibbs with backward sampling;
(4) of every sweep is an estimate, whose bias falls geometrically with the sweeps before it.

Sources: Olsson and Westerborn (2017), "Efficient particle-based online smoothing in general hidden Markov models: the
PaRIS algorithm"; Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), "State and parameter learning with
PaRIS particle Gibbs", Algorithm 2 (rolling out (4) over sweeps).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ppl import chance
from ppl.display import brief
from ppl.guarantees import Promising
from ppl.inference.genealogy import Future, require_one_step
from ppl.inference.particle_gibbs import ConditionalMoves, ConditionalSMC, require_conditional
from ppl.inference.population import blame_sites, run_population
from ppl.inference.smc import SMC
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.inference.validation import refuse_state, require_count
from ppl.interpret import Result
from ppl.kernels.weights import summarize
from ppl.posterior import Posterior
from ppl.trace_space import Selector, TraceSpace

__all__ = ["PaRIS", "ParisianGibbs"]

Functional = Callable[[dict[str, Any], dict[str, Any], Any], Any]
"""h of (1): `(sites of the iteration before, sites of this one, t) -> pytree of arrays`, written for one trace."""


@dataclasses.dataclass(frozen=True)
class PaRIS(Promising):
    """SMC with a smoothed additive functional, in `posterior.diagnostics["additive"]`.

    Attributes:
        smc: the run that it goes along.
        functional: h of (1).
        num_draws: M, at least 2 for a variance that grows linearly in time.
    """

    smc: SMC
    functional: Functional
    num_draws: int = 2
    promise: ClassVar[str] = "unbiased"

    def __post_init__(self):
        if not isinstance(self.smc, SMC):
            raise TypeError(f"`smc` must be an SMC(..), got {self.smc!r}.")
        _require_functional(self.functional, self.num_draws)

    def __repr__(self) -> str:
        return brief(self)

    @property
    def guarantee(self) -> str:
        """What the run's weights stand for; the functional's estimate is consistent."""
        return self.smc.guarantee

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments."""
        refuse_state(self, state)
        program, smc = self.smc.prepared(program)
        require_one_step(TraceSpace(program.stage(keep_rules=False)), "PaRIS")
        return run_population(program, smc, key, keep=keep, progress=progress, watch=self)

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Repeat a run and count what each site did to the particles."""
        return blame_sites(*self.smc.prepared(program), key, watched=True)

    def watch(self, space: TraceSpace, result: Result, key: Any) -> dict[str, Any]:
        """Return (4)."""
        return {"additive": smoothed(result, self.functional, self.num_draws, key).estimate}


@dataclasses.dataclass(frozen=True)
class ParisianGibbs(TraceKernel):
    """The Parisian particle Gibbs sampler: a kernel, with (4) of every sweep in `posterior.diagnostics["additive"]`.

    Attributes:
        smc: the algorithm whose conditional form is run, with at least 2 particles.
        functional: h of (1).
        num_draws: M of (2).
        sites: which sites move, see `ppl.trace_space.Selector`; None for all.
    """

    smc: SMC
    functional: Functional
    num_draws: int = 2
    sites: Selector = None
    guarantee: ClassVar[str] = "invariant"

    def __post_init__(self):
        super().__post_init__()
        require_conditional(self.smc)
        _require_functional(self.functional, self.num_draws)

    def prepare(self, program: Any) -> Any:
        """Return the program with the twist of `smc` in it."""
        return self.smc.prepared(program)[0]

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`."""
        return _Parisian(self, space)


class _Parisian(ConditionalMoves):
    def __init__(self, kernel: ParisianGibbs, space: TraceSpace):
        super().__init__(space, kernel.sites, ConditionalSMC(kernel.smc, keeps_future=True))
        self.kernel = kernel
        require_one_step(space, "ParisianGibbs", self.sites)

    def choose(self, key, space, result):
        """Smooth, and choose a line."""
        draw_key, choice_key = jax.random.split(key)
        statistics = smoothed(result, self.kernel.functional, self.kernel.num_draws, draw_key)
        # The last log-weights are those after the last selection: slots of its children.
        index = chance.categorical(choice_key, result.log_weights)
        return statistics.line(index), {"additive": statistics.estimate}


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """The statistics of a run.

    Attributes:
        loop: its genealogy.
        last: `[N]`, which slot before the last selection each last particle descends from.
        parents: `[T - 1, N]`, the first draw (2) of each particle of iterations 1..T-1.
        estimate: (4).
    """

    loop: dict[str, Any]
    last: Any
    parents: Any
    estimate: Any

    def line(self, index: Any) -> dict[str, Any]:
        """Return the trace along first draws that ends as the particle in a slot does."""
        last = self.last[index]

        def step(slot, parents):
            return parents[slot], parents[slot]

        _, slots = jax.lax.scan(step, last, self.parents, reverse=True)
        slots = jnp.append(slots, last)
        return {name: values[jnp.arange(slots.shape[0]), slots] for name, values in self.loop["sites"].items()}


def smoothed(result: Result, functional: Functional, num_draws: int, key: Any) -> Smoothed:
    """Return the statistics (3) of a run with `genealogy="future"`, and (4).

    Args:
        result: the run.
        functional: h of (1).
        num_draws: M of (2).
        key: a PRNG key.
    """
    (loop,) = result.genealogy
    future = Future(loop)
    before, resampled = loop["before"]["log_weights"], loop["resampled"]
    length, num = before.shape
    own = jnp.arange(num, dtype=jnp.int32)

    def added(before, now, t):
        return jax.tree.map(
            lambda a: jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32)), functional(before, now, t)
        )

    first = jax.vmap(lambda x: added(x, x, jnp.int32(0)))(future.sites(0, own))

    def parents_of(t, key):
        """Return `[N, M]` draws (2) for the particles of iteration t + 1."""

        def draw(slot, key):
            logits = before[t] + future(t, future.sites(t + 1, slot))
            return jax.vmap(lambda key: chance.categorical(key, logits))(jax.random.split(key, num_draws))

        keys = jax.random.split(key, num)
        return jax.lax.cond(
            resampled[t],
            lambda: jax.vmap(draw)(own, keys),
            lambda: jnp.broadcast_to(own[:, None], (num, num_draws)),
        )

    def step(tau, x):
        t, key = x
        parents = parents_of(t, key)

        def statistic(slot, parents):
            now = future.sites(t + 1, slot)
            steps = jax.vmap(lambda parent: added(future.sites(t, parent), now, t + 1))(parents)
            return jax.tree.map(lambda old, new: jnp.mean(old[parents] + new, axis=0), tau, steps)

        return jax.vmap(statistic)(own, parents), parents[:, 0]

    times = jnp.arange(length - 1)
    tau, parents = jax.lax.scan(step, first, (times, jax.random.split(key, length - 1)))
    last = before[length - 1]
    weights = jnp.exp(last - summarize(last)[0])
    estimate = jax.tree.map(lambda a: jnp.tensordot(weights, a, axes=1), tau)
    descends = own if loop["ancestors"] is None else jnp.where(resampled[-1], loop["ancestors"][-1], own)
    return Smoothed(loop, descends, parents, estimate)


def _require_functional(functional: Any, num_draws: Any) -> None:
    if not callable(functional):
        raise TypeError(f"`functional` must be a function (sites before, sites now, t) -> arrays, got {functional!r}.")
    require_count("num_draws", num_draws)
