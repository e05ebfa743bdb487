"""Particle Gibbs: the whole of a trace drawn anew by sequential Monte Carlo around it.

A step runs conditional SMC, in which particle 0 follows the present trace and survives every selection, and draws the
next trace among the N particles by their last weights. With gamma the program's measure this leaves it as it is for
every N >= 2 and every conditional scheme (`ppl.kernels.resampling.conditional`), and mixes the better the larger N is.

Where particles share their early past, a step hardly changes it. Two cures, both exact:

    ancestor sampling    before each selection the present trace's past is drawn anew: particle n with probability
                         proportional to w_n gamma(future of the present trace | past n)                          (1)
    backward sampling    the new trace's past is drawn backwards, after the run (`ppl.inference.genealogy`)       (2)

(1) is a Gibbs step on the index of the present trace's past, given its future and all particles so far, made before
the other ancestors are drawn by the conditional scheme: so it holds for all schemes. The density of the future is
that of one iteration where the program's dataflow shows that it suffices, else of the whole future, replayed: O(T) an
iteration.

Sources: Andrieu, Doucet and Holenstein (2010), "Particle Markov chain Monte Carlo methods", section 4.5; Lindsten,
Jordan and Schoen (2014), "Particle Gibbs with ancestor sampling"; Whiteley (2010), discussion of the first.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ppl import chance
from ppl.guarantees import require_unbiased
from ppl.inference.genealogy import backward_line, require_one_step, traced_line
from ppl.inference.smc import SMC
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.interpret import Result
from ppl.trace_space import Selector, TraceSpace

__all__ = ["ConditionalMoves", "ConditionalSMC", "ParticleGibbs", "require_conditional"]


@dataclasses.dataclass(frozen=True)
class ParticleGibbs(TraceKernel):
    """Draw chosen sites anew by conditional SMC.

    Attributes:
        smc: the algorithm, with at least 2 particles and a resampler that has a conditional form.
        sites: which sites, see `ppl.trace_space.Selector`; None for all. The others stay as they are: give sites
            before the loop a kernel of their own, `Sequence(ParticleGibbs(smc, sites="x"), NUTS("drift"))`.
        ancestor_sampling: draw the past of the present trace anew at each selection, (1).
        backward_sampling: draw the past of the next trace backwards, (2).
    """

    smc: SMC
    sites: Selector = None
    ancestor_sampling: bool = False
    backward_sampling: bool = False
    guarantee: ClassVar[str] = "invariant"

    def __post_init__(self):
        super().__post_init__()
        require_conditional(self.smc)
        if self.ancestor_sampling and self.backward_sampling:
            raise ValueError("`ancestor_sampling` and `backward_sampling` do the same by two ways: choose one.")

    def prepare(self, program: Any) -> Any:
        """Return the program with the twist of `smc` in it."""
        return self.smc.prepared(program)[0]

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`."""
        return _Conditional(self, space)


class ConditionalMoves(Moves):
    """Steps that run conditional SMC on chosen sites, the others being given, and choose a line of the run."""

    sequential = True

    def __init__(self, space: TraceSpace, sites: Selector, run: ConditionalSMC):
        self.space, self.run, self.sites = space, run, space.select(sites)

    @abc.abstractmethod
    def choose(self, key, space: TraceSpace, result: Result) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a line of the run, sites by name, and further figures of the step."""

    def step(self, key, sites, memory):
        """Run and choose."""
        run_key, choice_key = jax.random.split(key)
        space = self.space.condition({name: sites[name] for name in sites if name not in self.sites})
        present = {name: sites[name] for name in self.sites}
        line, info = self.choose(choice_key, space, self.run(space, run_key, present))
        return {**sites, **line}, memory, {"acceptance": _changed(present, line)} | info


class _Conditional(ConditionalMoves):
    def __init__(self, kernel: ParticleGibbs, space: TraceSpace):
        backward = kernel.backward_sampling
        super().__init__(space, kernel.sites, ConditionalSMC(kernel.smc, kernel.ancestor_sampling, backward))
        if backward:
            require_one_step(space, "`backward_sampling`", self.sites)

    def choose(self, key, space, result):
        """Choose a particle by its last weight, and its past."""
        choice_key, line_key = jax.random.split(key)
        index = chance.categorical(choice_key, result.log_weights)
        if self.run.keeps_future:
            return backward_line(space, result, index, line_key), {}
        return traced_line(result, index), {}


@dataclasses.dataclass(frozen=True)
class ConditionalSMC:
    """A population in which particle 0 follows a trace."""

    smc: SMC
    ancestor_sampling: bool = False
    keeps_future: bool = False

    def __call__(self, space: TraceSpace, key: Any, retained: dict[str, Any]) -> Result:
        """Run it, with its genealogy; `retained` is the whole trace of the space."""
        mode = None
        if self.ancestor_sampling:
            mode = "step" if space.futures_are_one_step() else "replay"
        return space.population(
            key,
            self.smc.num_particles,
            self.smc.conditional_selection(),
            retained=retained,
            genealogy="future" if self.keeps_future else "sites",
            ancestor_sampling=mode,
            site_types=space.site_types,
        )


def require_conditional(smc: Any) -> None:
    """Raise unless an algorithm has a conditional form that leaves the program's measure as it is."""
    if not isinstance(smc, SMC):
        raise TypeError(f"`smc` must be an SMC(..), got {smc!r}.")
    if smc.num_particles < 2:
        raise ValueError(f"`smc` must have at least 2 particles: one follows the present trace. Got {smc!r}.")
    for name in ("rejuvenation", "lookahead"):
        if getattr(smc, name) is not None:
            raise ValueError(f"`smc` with `{name}` has no conditional form here, got {smc!r}.")
    smc.conditional_selection()
    require_unbiased("`smc` must be unbiased", smc)


def _changed(old: dict[str, Any], new: dict[str, Any]) -> Any:
    """Return the share of entries of a trace that are not what they were."""
    different = jnp.concatenate([(old[name] != new[name]).reshape(-1) for name in old])
    return jnp.mean(different, dtype=jnp.float32)
