"""Moves at a noise level: Langevin, MALA and HMC between the steps of a diffusion target.

A target prod_i p_i^{b_i} has at level k, with alpha and sigma there, the density and the score

    pi_k(x) proportional to prod_i q_{i,k}(x)^{b_i},     S(x) = sum_i b_i (alpha D_i(x) - x) / sigma^2             (1)

of which S is known for every model, pi_k for those with a log-density. A move before step k replaces x by a draw from a
kernel that leaves pi_k as it is, exactly (MALA, HMC) or for small steps (Langevin); every state is then placed anew,
and weights stay as they are but for a twist, which follows the state. So run without weights, p ** 1, it is a
predictor-corrector sampler (Song et al. 2021, arXiv 2011.13456).

pi_k is the marginal of the target's measure on paths only as far as the steps invert the noising: with moves a run is
"discretised", whatever the move. They are due before the steps `every`, 2 `every`, .. however the weights look.

Step sizes h of Langevin and MALA are in units of sigma^2, and where none is given

    h sigma^2 = min(v / (2 r^2), 0.1 sigma^2 / sum_i |b_i|)                                                        (2)

with r and v of the noising from this level to the one before: noise no larger than that of the step that has led here,
and a drift that takes no more than a tenth of the way to the mode of the narrowest density that S can belong to. HMC's
are in units of sigma, and without one have e^2 / 2 equal to (2).

Sites of the program, stored when named: `moves/noise`, `moves/uniform`, and `moves/accepted`, the share of accepted
steps of each particle's move, 1 where none was due.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax

from ppl.inference.acceptance import Point
from ppl.inference.hamiltonian import HMC
from ppl.inference.langevin import MALA, Langevin
from ppl.process import draw
from ppl.staging import scope, staging_options
from ppl.statements import deterministic

__all__ = ["LevelMoves", "Levelled", "add_level_moves", "knows_density", "level_score"]

SHARE = 0.1  # of the way to a mode of curvature sum_i |b_i| / sigma^2


@runtime_checkable
class Levelled(Protocol):
    """A process over noise levels, as a diffusion model's."""

    levels: Any
    model: Any

    def level(self, step) -> Any:
        """Return the level before a step: `t`, `alpha`, `sigma`."""

    def placed(self, x, step) -> dict[str, Any]:
        """Return the state, `x` and `denoised`, of an x at the level before a step."""


def add_level_moves(kernel: Langevin | MALA | HMC, target: Any, every: int) -> Any:
    """Return a diffusion target with moves before some of its steps.

    Args:
        kernel: the moves.
        target: a `ppl.targets.Combination` of processes over noise levels.
        every: moves are due before steps `every`, 2 `every`, ..

    Raises:
        TypeError: a process has no levels, or its log-density is needed and not known.
        ValueError: the target is cut into stretches.
    """
    for process, _ in target.factors:
        if not isinstance(process, Levelled):
            raise TypeError(
                f"`rejuvenation` {kernel!r} moves diffusion models' levels, which {process!r} does not have."
            )
        if kernel.needs_density and not knows_density(process):
            raise TypeError(
                f"`rejuvenation` {kernel!r} needs the log-density of every level, which {process!r} does not know: "
                "give Diffusion(..., log_density=...), or take Langevin(), which needs the score only."
            )
    if target.steps is not None:
        raise ValueError("`rejuvenation` moves a diffusion between its steps; a target by_steps has no place for it.")
    if every >= target.process.num_steps:
        return target
    return dataclasses.replace(target, moves=LevelMoves(kernel, every))


@dataclasses.dataclass(frozen=True)
class LevelMoves:
    """A kernel at the levels of a diffusion target; see `ppl.targets.Moves`.

    Attributes:
        kernel: Langevin, MALA or HMC.
        every: before which steps it is due.
    """

    kernel: Langevin | MALA | HMC
    every: int = 1

    def __call__(self, processes: list[Any], states: list[Any], powers: Any, step: Any) -> list[Any]:
        """Return moved states, where a move is due."""
        x = states[0]["x"]
        with scope("moves"):
            laws = self.kernel.randomness(x.shape, x.dtype)
            random = {name: draw(name, law) for name, law in laws.items()}
            due = (step > 0) & (step % self.every == 0)
            moved, rate = lax.cond(
                due,
                lambda: self.move(processes, states, powers, step, random),
                lambda: (states, jnp.ones((), x.dtype)),
            )
            with staging_options(internal=True):
                deterministic("accepted", rate)
        return moved

    def move(self, processes: list[Any], states: list[Any], powers: Any, step: Any, random: dict[str, Any]):
        """Return one particle's moved states and the share of steps that were accepted.

        Args:
            processes: the target's factors.
            states: their states at the level before `step`.
            powers: b_i, `[factors]`.
            step: the number of the step, at least 1.
            random: what was drawn from `kernel.randomness`.
        """
        process = processes[0]

        def point(states) -> Point:
            x = states[0]["x"]
            log_density = jnp.zeros((), x.dtype)
            if self.kernel.needs_density:
                log_density = level_log_density(processes, x, powers, step).astype(x.dtype)
            return Point(x, log_density, level_score(processes, states, powers, step).astype(x.dtype), states)

        size = step_sizes(self.kernel, process, powers)[step]
        evaluate = lambda x: point([p.placed(x, step) for p in processes])  # noqa: E731
        end, rate = self.kernel.move(evaluate, point(states), random, size)
        return end.carried, rate.astype(end.x.dtype)

    def network_calls(self, processes: list[Any]) -> int:
        """Return how often one particle calls networks for moves in a run.

        A denoised value counts as one call and so does a log-density.
        """
        moves = (processes[0].num_steps - 1) // self.every
        each = self.kernel.evaluations()
        if self.kernel.needs_density:
            each = 2 * each + 1  # the point that it starts from has its denoised value already
        return moves * each * len(processes)


def step_sizes(kernel: Langevin | MALA | HMC, process: Levelled, powers: Any) -> Any:
    """Return the step size of a kernel at every level, `[K + 1]`, in the units of x; see (2). At level 0 it is 0.

    Args:
        kernel: Langevin, MALA or HMC.
        process: its levels.
        powers: b_i, `[factors]`.
    """
    levels, dtype = process.levels, process.model.mean.dtype
    with np.errstate(divide="ignore"):
        reach = 0.5 * levels.variance / levels.rate**2  # infinite where there was no data
    reach = jnp.asarray(np.concatenate([[0.0], reach]), dtype)
    sigma = jnp.asarray(levels.sigma, dtype)
    default = jnp.minimum(reach, SHARE * sigma**2 / jnp.sum(jnp.abs(powers)).astype(dtype))
    return kernel.step_size_at(sigma, default)


def level_score(processes: list[Levelled], states: list[Any], powers: Any, step: Any) -> Any:
    """Return S of (1) from the states' denoised values."""
    level = processes[0].level(step)
    x = states[0]["x"]
    pull = sum(power * (level.alpha * state["denoised"] - x) for power, state in zip(powers, states, strict=True))
    return pull / level.sigma**2


def level_log_density(processes: list[Levelled], x, powers: Any, step: Any) -> Any:
    """Return log pi_k(x) of (1), up to a constant of the level."""
    terms = [p.model.log_density_at(x, p.level(step)) for p in processes]
    return sum(power * term for power, term in zip(powers, terms, strict=True))


def knows_density(process: Any) -> bool:
    """Return whether a process's model knows the log-density of its levels."""
    return bool(getattr(process.model, "knows_density", False))
