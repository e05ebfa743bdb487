"""Diffusion processes whose particles carry an estimate of their log-density; see `ppl.inference.correctors.ito`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist

from ppl.inference.correctors.ito import Reference, next_log_density
from ppl.process import Process

__all__ = ["EstimatedDensity"]


class EstimatedDensity(Process):
    """A diffusion process whose state has `log_density`, in nats, as well: exact at the start, then estimated.

    Any drift may move the particles; their noise must be that of churn 1.
    """

    keeps_path = False

    def __init__(self, process: Any):
        if process.churn != 1:
            raise ValueError(f"the log-densities' estimate needs processes with churn 1, got {process!r}.")
        self.process, self.model, self.levels = process, process.model, process.levels
        self.guarantee = process.guarantee
        self.churn, self.num_steps = process.churn, process.num_steps
        self.resamples_every_step = process.resamples_every_step
        self.reference = Reference(self.model.mean, jnp.asarray(self.model.scale**2, self.model.mean.dtype))

    def origin(self) -> dist.Distribution:
        """Return the law of the noisiest x."""
        return self.process.origin()

    def start(self, drawn) -> dict[str, Any]:
        """Return the process's start with its log-density."""
        return self.process.start(drawn) | {"log_density": self.origin().log_prob(drawn)}

    def forward(self, state, step) -> dist.Distribution:
        """Return the process's own law of the next x."""
        return self.process.forward(state, step)

    def advance(self, state, drawn, step) -> dict[str, Any]:
        """Return the process's next state with its estimated log-density."""
        return self.process.advance(state, drawn, step) | {"log_density": self.log_density(state, drawn, step)}

    def log_density(self, state, drawn, step) -> Any:
        """Return the estimated log-density of what was drawn in a step."""
        before, after = self.level(step), self.level(step + 1)
        return next_log_density(
            state["log_density"], state["x"], state["denoised"], drawn, before, after, self.reference
        )

    def finish(self, state, path) -> Any:
        """Return the process's value."""
        return self.process.finish(state, path)

    def running(self, state, path, step) -> Any:
        """Return what twists see, `log_density` too."""
        return self.process.running(state, path, step)

    def unfolds_like(self) -> dict[str, Any]:
        """Return what must be equal in processes that are multiplied."""
        return self.process.unfolds_like()

    def together(self, target) -> list[Process]:
        """Return the processes of a target, which carry estimates all."""
        return self.aligned_with([process for process, _ in target.factors])

    def aligned_with(self, processes: Sequence[Any]) -> list[Process]:
        """Return processes on one grid."""
        return [EstimatedDensity(p) for p in self.process.aligned_with([other.process for other in processes])]

    def network_calls(self, corrected: bool = False) -> int | None:
        """Return how often one particle calls the network in a run."""
        return self.process.network_calls(corrected)

    def level(self, step) -> Any:
        """Return the level before step `step`."""
        return self.process.level(step)

    def placed(self, x, step) -> dict[str, Any]:
        """Refuse to place another x: its log-density is not known."""
        raise ValueError(
            "`rejuvenation` under a schedule needs log-densities that the models know, log_density='known': "
            "estimates end where x is moved."
        )

    def __repr__(self) -> str:
        return repr(self.process)
