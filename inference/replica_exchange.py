"""Runs of replica exchange over the noise levels of a diffusion target.

One sweep of `ppl.inference.level_exchange` after another, all levels at once, and the value of the last level's replica
after each. All chains run side by side in one compiled loop.

Against sequential Monte Carlo: every sweep gives one more draw of a chain, after a time in which replicas travel from
the first level to the last (at least K sweeps of warm-up), and no estimate of log Z.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import effective_sample_size

from ppl.control_flow import scan
from ppl.guarantees import Promising, promised
from ppl.inference.importance import ImportanceSampling
from ppl.inference.level_exchange import Ladder, LevelExchange
from ppl.inference.population import blame_sites, run_population
from ppl.inference.validation import refuse_state, require_count
from ppl.posterior import Outcome, Posterior, Status
from ppl.process import draw
from ppl.program import Program, as_program
from ppl.runners import is_traced
from ppl.staging import scope

__all__ = ["ReplicaExchange"]


@dataclasses.dataclass(frozen=True)
class ReplicaExchange(Promising):
    """Replica exchange over the noise levels of a diffusion target.

    Attributes:
        num_samples: how many draws of each chain are kept, one a sweep.
        num_warmup: how many sweeps come before. None is twice the number of levels.
        num_chains: how many chains.
        kernel: how replicas are exchanged.
    """

    num_samples: int
    num_warmup: int | None = None
    num_chains: int = 1
    kernel: LevelExchange = LevelExchange()
    blamed: ClassVar[str] = "fresh draws of the target's program"

    def __post_init__(self):
        require_count("num_samples", self.num_samples)
        if self.num_warmup is not None and self.num_warmup != 0:
            require_count("num_warmup", self.num_warmup)
        require_count("num_chains", self.num_chains)
        if not isinstance(self.kernel, LevelExchange):
            raise TypeError(f"`kernel` must be a LevelExchange, got {self.kernel!r}.")

    @property
    def guarantee(self) -> str:
        """What draws stand for: "invariant"; the posterior says where a target allows "discretised" only."""
        return promised(self.kernel, self.kernel.exploration, chain=True)

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments."""
        refuse_state(self, state)
        if keep:
            raise ValueError(f"`keep` names sites; replicas have values only, got {sorted(keep)}.")
        program = as_program(program)
        if program.target is None:
            raise TypeError(f"ReplicaExchange moves on the levels of diffusion targets; {program!r} is none.")
        ladder = Ladder(program.target.combination())
        self.kernel.check(ladder)
        warmup = 2 * ladder.num_steps if self.num_warmup is None else self.num_warmup
        chain = Program(_Chain(self.kernel, ladder, warmup, self.num_samples))
        run = run_population(chain, ImportanceSampling(self.num_chains), key, keep=None, progress=progress)
        return self._posterior(run.value, ladder, warmup)

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Draw from the target's program and count what each site did to the draws."""
        return blame_sites(as_program(program), ImportanceSampling(self.num_chains), key)

    def _posterior(self, result: dict[str, Any], ladder: Ladder, warmup: int) -> Posterior:
        """Return the draws, chain by chain."""
        total = self.num_chains * self.num_samples
        draws = result["values"]
        nan = jnp.full((), jnp.nan, draws.dtype)
        invalid = jnp.any(jnp.isnan(result["acceptance"])) | jnp.any(jnp.isnan(draws))
        outcome = jnp.where(invalid, Outcome.INVALID_WEIGHT, Outcome.OK).astype(jnp.int32)
        sweeps = warmup + self.num_samples
        return Posterior(
            value=draws.reshape(total, *draws.shape[2:]),
            sites={},
            present={},
            log_weights=jnp.full(total, -jnp.log(float(total))),
            log_evidence=nan,
            ess=nan if is_traced(draws) else jnp.asarray(_smallest_ess(np.asarray(draws)), draws.dtype),
            diagnostics={
                "ess": jnp.zeros(0),
                "resampled": jnp.zeros(0, bool),
                "acceptance": result["acceptance"],
                "network_calls": self.num_chains * self.kernel.network_calls(ladder, sweeps),
            },
            status=Status(outcome, jnp.int32(-1)),
            guarantee=promised(self, self.kernel.guarantee_on(ladder), chain=True),
            algorithm=repr(self),
        )


class _Chain:
    """The program of one chain: it returns its draws and the mean acceptance of each pair of levels."""

    def __init__(self, kernel: LevelExchange, ladder: Ladder, num_warmup: int, num_samples: int):
        self.kernel, self.ladder = kernel, ladder
        self.num_warmup, self.num_samples = num_warmup, num_samples
        self.__name__ = f"chain of {kernel!r}"

    def __call__(self) -> dict[str, Any]:
        kernel, ladder = self.kernel, self.ladder

        def sweep(replicas, _):
            replicas, taken = kernel.step(ladder, replicas, _drawn(kernel.randomness(ladder)))
            return replicas, (kernel.value(ladder, replicas), taken)

        with scope("first"):
            replicas = kernel.start(ladder, _drawn(kernel.start_randomness(ladder)))
        # One loop: a second one for the warm-up would be compiled as well.
        _, kept = scan(sweep, replicas, length=self.num_warmup + self.num_samples)
        values, taken = jax.tree.map(lambda a: a[self.num_warmup :], kept)
        return {"values": values, "acceptance": jnp.mean(taken, axis=0)}


def _drawn(laws: dict[str, Any]) -> dict[str, Any]:
    return {name: draw(name, law) for name, law in laws.items()}


def _smallest_ess(draws: np.ndarray) -> float:
    """Return the smallest effective sample size of any coordinate of `[chains, samples, ...]`; NaN for short chains."""
    if draws.shape[1] < 4:
        return float("nan")
    return float(np.min(effective_sample_size(draws)))
