"""Smoothing by backward sampling: whole traces drawn anew among all that an SMC run could have made.

The lines of the last particles share their early past; lines drawn backwards do not, see `ppl.inference.genealogy`:
each starts at a particle drawn by the last weights and goes back by the densities of one iteration. All cost N T each.

Source: Godsill, Doucet and West (2004), "Monte Carlo smoothing for nonlinear time series".
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ppl import chance
from ppl.display import brief
from ppl.guarantees import Promising, promised
from ppl.inference.genealogy import backward_line, require_one_step
from ppl.inference.population import blame_sites, run_population
from ppl.inference.smc import SMC
from ppl.inference.validation import refuse_state, require_count
from ppl.interpret import Result
from ppl.posterior import Posterior
from ppl.program import kept_sites
from ppl.trace_space import TraceSpace

__all__ = ["BackwardSmoothing"]


@dataclasses.dataclass(frozen=True)
class BackwardSmoothing(Promising):
    """SMC, and then whole traces drawn backwards: the posterior's particles, equally weighted.

    Attributes:
        smc: the run.
        num_traces: how many traces are drawn. None is as many as there are particles.
    """

    smc: SMC
    num_traces: int | None = None

    def __post_init__(self):
        if not isinstance(self.smc, SMC):
            raise TypeError(f"`smc` must be an SMC(..), got {self.smc!r}.")
        if self.num_traces is not None:
            require_count("num_traces", self.num_traces)

    @property
    def guarantee(self) -> str:
        """What the traces stand for: "consistent" at best, for they are drawn by estimated weights."""
        return promised("consistent", self.smc)

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments. The log-evidence and the diagnostics are the SMC run's."""
        refuse_state(self, state)
        program, smc = self.smc.prepared(program)
        staged = program.stage(keep_rules=False)
        require_one_step(TraceSpace(staged), "BackwardSmoothing")
        watch = _Lines(self, kept_sites(staged, keep))
        posterior = run_population(program, smc, key, keep=keep, progress=progress, watch=watch)
        diagnostics = dict(posterior.diagnostics)
        value, sites, present = diagnostics.pop("lines")
        num = self.num_traces or smc.num_particles
        return dataclasses.replace(
            posterior,
            value=value,
            sites=sites,
            present=present,
            log_weights=jnp.full(num, -jnp.log(float(num))),
            ess=jnp.float32(num),
            diagnostics=diagnostics,
        )

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Repeat a run and count what each site did to the particles."""
        return blame_sites(*self.smc.prepared(program), key, watched=True)


@dataclasses.dataclass(frozen=True)
class _Lines:
    algorithm: BackwardSmoothing
    keep: frozenset[str]
    promise: ClassVar[str] = "consistent"

    def __repr__(self) -> str:
        return brief(self.algorithm)

    def watch(self, space: TraceSpace, result: Result, key: Any) -> dict[str, Any]:
        num = self.algorithm.num_traces or self.algorithm.smc.num_particles

        def line(key):
            choice_key, line_key = jax.random.split(key)
            trace = backward_line(space, result, chance.categorical(choice_key, result.log_weights), line_key)
            return space.outcome(trace, self.keep)

        return {"lines": jax.lax.map(line, jax.random.split(key, num), batch_size=64)}
