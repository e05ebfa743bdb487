"""Superposition of diffusion models, AND: particles that all models find equally likely.

In y = x / alpha, with noise of the variance T = sigma^2 / alpha^2, scores s_i of M models, their mean m and
c_i = s_i - m, a step in which T falls by dT is

    dy = dT sum_i k_i s_i + sqrt(dT) z,   sum_i k_i = 1,   z ~ N(0, I),                                            (1)

with k such that all estimated log-densities (`ppl.inference.correctors.ito`) change by the same amount. That takes
away the noise along the c_i and puts a drift in its place: with the singular values C = [c_i] = U S V' of the rows c_i,

    dy = dT m + sqrt(dT) (z - V V' z) + V n,     S_j n_j = sum_i U_ij [dT/2 (|c_i|^2 + H_i) + l_i]                 (2)

H_i = sum_j v_j' (Hess log q_i) v_j belongs to the noise that is missing. Without it, as published, the estimates stay
equal but the log-densities do not, however small the steps. l_i is the part of the present differences, less the
lifts, that falls to this step when they are to be gone by the end. Two models have V = (s_1 - s_2) / |s_1 - s_2|. Where
the scores agree there is no V and nothing is asked; |n_j| is at most 4 sqrt(dT), which leaves the rest to later steps.

The result follows a dynamics, not a density: no weights, no evidence. A product of densities is `SMC` on p * q; the
mixture, SuperDiff's OR, is `ppl.mixture`.

Source: SuperDiff (arXiv 2412.17762), Proposition 6 and Algorithm 1, AND. k of (1), which that solves for, contains
z / dT; (2) is the same step without the division. H_i and closing present differences are added here.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from ppl.gaussian import Gaussian
from ppl.guarantees import Promising
from ppl.inference.correctors.ito import Reference, curvature, next_log_density
from ppl.inference.population import OnlyWeigh, blame_sites, run_population
from ppl.inference.validation import refuse_state, require_count
from ppl.posterior import Posterior
from ppl.process import Process
from ppl.products import product_law
from ppl.program import Program, as_program
from ppl.statements import deterministic
from ppl.targets import Combination

__all__ = ["SuperposedAnd", "Superposition"]

LARGEST = 4.0  # standard deviations of a step's noise that the drift along V may reach


@dataclasses.dataclass(frozen=True)
class SuperposedAnd(Promising):
    """Generate what all factors of a product of diffusion processes find equally likely: SuperDiff's AND.

    The value is x; the site `log_density`, `[N, M]`, holds the estimated log-density of each factor at the last level,
    in nats. On the way `watch` sees it as `state["log_density"]`.

    Attributes:
        num_particles: how many particles, at least 1.
        lift: how far above the others' mean each factor's log-density shall end, in nats; only differences count.
            None for 0.
        exact: whether H_i counts, which takes M - 1 forward derivatives of each network at each step. False: as
            published.
    """

    num_particles: int
    lift: tuple[float, ...] | None = None
    exact: bool = True
    guarantee: ClassVar[str] = "heuristic"

    def __post_init__(self):
        require_count("num_particles", self.num_particles)
        if self.lift is None:
            return
        if not isinstance(self.lift, Sequence) or not all(
            isinstance(nats, numbers.Real) and math.isfinite(nats) for nats in self.lift
        ):
            raise TypeError(f"`lift` must be finite numbers, one for each factor, or None, got {self.lift!r}.")
        object.__setattr__(self, "lift", tuple(float(nats) for nats in self.lift))

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments.

        Raises:
            TypeError: the program is no product of diffusion processes.
            ValueError: it has powers, rewards or constraints, fewer than two factors, or another churn than 1.
        """
        refuse_state(self, state)
        return run_population(self._prepared(program), self, key, keep=keep, progress=progress)

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Repeat a run and count what each site did to the particles."""
        return blame_sites(self._prepared(program), self, key)

    def selection(self) -> OnlyWeigh:
        """Return what happens at the end of an outermost iteration: nothing is resampled."""
        return OnlyWeigh()

    def _prepared(self, program) -> Program:
        program = as_program(program)
        if program.target is None:
            raise TypeError(f"SuperposedAnd is for products of diffusion processes, p * q; {program!r} is none.")
        target = program.target.combination()
        processes = [process for process, _ in target.factors]
        for process in processes:
            if not (hasattr(process, "churn") and hasattr(process, "model")):
                raise TypeError(f"SuperposedAnd is for products of diffusion processes, got {process!r}.")
        if len(processes) < 2 or any(power != 1 for _, power in target.factors):
            raise ValueError(f"SuperposedAnd takes a product of two or more different processes, got {target!r}.")
        extra = (target.tilts, target.potentials, target.constraint, target.proposal, target.steps)
        if any(extra):
            raise ValueError(f"SuperposedAnd weighs nothing: no rewards, constraints or proposals; got {target!r}.")
        if self.lift is not None and len(self.lift) != len(processes):
            raise ValueError(f"`lift` must have one number for each of {len(processes)} factors, got {self.lift}.")
        lift = (0.0,) * len(processes) if self.lift is None else self.lift
        whole = Combination(((Superposition(processes, lift, self.exact), 1.0),), watched=target.watched)
        return dataclasses.replace(whole.program(), conditions=program.conditions)


class Superposition(Process):
    """Diffusion processes that move one x together by (2). What it draws is noise; its value is x at the last level."""

    keeps_path = False

    def __init__(self, processes: Sequence[Any], lift: Sequence[float], exact: bool):
        processes = processes[0].aligned_with(processes)
        first = processes[0]
        if first.churn != 1:
            raise ValueError(f"the log-densities' estimate needs processes with churn 1, got {first!r}.")
        if not np.all(np.isfinite(first.levels.log_ratio[:-1])):
            raise ValueError("SuperposedAnd needs data at every level: start the grid later, at t < 1.")
        self.processes, self.exact, self.num_steps = list(processes), exact, first.num_steps
        models = [process.model for process in processes]
        self.shape, dtype = first.model.shape, first.model.mean.dtype
        self.lift = jnp.asarray(lift, dtype) - sum(lift) / len(lift)
        mean = sum(model.mean for model in models) / len(models)
        self.reference = Reference(mean, jnp.asarray(np.mean([model.scale**2 for model in models]), dtype))

    def origin(self) -> Gaussian:
        """Return the geometric mean of the starts."""
        share = 1 / len(self.processes)
        powers = [share] * len(self.processes)
        return product_law([process.origin() for process in self.processes], powers, powers)[0]

    def start(self, drawn) -> dict[str, Any]:
        """Return the noise with each process's denoised value and log-density."""
        denoised = [process.start(drawn)["denoised"] for process in self.processes]
        log_density = jnp.stack([process.origin().log_prob(drawn) for process in self.processes])
        return {"x": drawn, "denoised": jnp.stack(denoised), "log_density": log_density}

    def forward(self, state, step) -> Gaussian:
        """Return the law of z."""
        del step
        return Gaussian(jnp.zeros_like(state["x"]), 1.0)

    def advance(self, state, drawn, step) -> dict[str, Any]:
        """Return the state after (2)."""
        x, denoised = state["x"], state["denoised"]
        before, after = self.processes[0].level(step), self.processes[0].level(step + 1)
        squared = (before.sigma / before.alpha) ** 2
        fall = squared - (after.sigma / after.alpha) ** 2
        pull = jnp.mean(denoised, axis=0)
        rows = jnp.sqrt(fall) / squared * (denoised - pull).reshape(len(self.processes), -1)
        left, sizes, right = _singular(rows)
        directions = right.reshape(-1, *self.shape)
        curvatures = self._curvatures(x, directions, step)
        behind = self.lift - (state["log_density"] - jnp.mean(state["log_density"]))
        wanted = 0.5 * (jnp.sum(rows**2, axis=1) + fall * curvatures) + behind / (self.num_steps - step)
        drift = jnp.where(sizes > 0, left.T @ (wanted - jnp.mean(wanted)) / jnp.where(sizes > 0, sizes, 1.0), 0.0)
        along = jnp.clip(drift, -LARGEST, LARGEST) - right @ drawn.reshape(-1)
        y = x / before.alpha
        change = fall * (pull - y) / squared + jnp.sqrt(fall) * (drawn + (along @ right).reshape(self.shape))
        x_next = after.alpha * (y + change)
        without = jnp.sum(sizes > 0) if self.exact else 0
        log_densities = [
            next_log_density(log, x, value, x_next, before, after, self.reference, bend, without)
            for log, value, bend in zip(state["log_density"], denoised, curvatures, strict=True)
        ]
        values = [process.advance({}, x_next, step)["denoised"] for process in self.processes]
        return {"x": x_next, "denoised": jnp.stack(values), "log_density": jnp.stack(log_densities)}

    def finish(self, state, path) -> Any:
        """Return x, and record the log-densities."""
        del path
        deterministic("log_density", state["log_density"])
        return state["x"]

    def running(self, state, path, step) -> dict[str, Any]:
        """Return what functions of the state see: `denoised`, `[M, ...]`, and `log_density`, `[M]`, too."""
        del path
        return {**state, "t": self.processes[0].level(step).t, "step": jnp.asarray(step, jnp.int32)}

    def network_calls(self, corrected: bool = False) -> int:
        """Return how often one particle calls networks in a run; a forward derivative counts as a call."""
        del corrected
        each = len(self.processes) if self.exact else 1
        return self.num_steps * len(self.processes) * each

    def _curvatures(self, x, directions, step):
        if not self.exact:
            return jnp.zeros(len(self.processes), x.dtype)
        level = self.processes[0].level(step)
        return jnp.stack(
            [
                curvature(lambda x, process=process: process.denoise(x, step), x, level, directions)
                for process in self.processes
            ]
        )

    def __repr__(self) -> str:
        return f"<Superposition of {self.processes!r}>"


def _singular(rows):
    """Return U `[M, M - 1]`, S `[M - 1]` and V' `[M - 1, n]` of centred rows `[M, n]`, 0 beyond the rank."""
    if len(rows) == 2:
        half = math.sqrt(0.5)
        left, found = jnp.array([[half], [-half]], rows.dtype), jnp.sum(rows[:1] ** 2, axis=1) * 2
        tolerance = 0.0
    else:
        found, left = jnp.linalg.eigh(rows @ rows.T)
        found, left = found[1:], left[:, 1:]  # the first belongs to (1, ..., 1)
        tolerance = 8 * len(rows) * jnp.finfo(rows.dtype).eps * found[-1]
    there = found > tolerance
    sizes = jnp.where(there, jnp.sqrt(jnp.where(there, found, 1.0)), 0.0)
    return left, sizes, jnp.where(there[:, None], left.T @ rows / jnp.where(there, sizes, 1.0)[:, None], 0.0)
