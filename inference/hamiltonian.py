"""Hamiltonian Monte Carlo: a particle that runs along a density for a while, with an acceptance test at the end.

For a density pi with the score s = grad log pi, a step size e and a momentum p ~ N(0, I), repeat `num_leapfrog` times

    p <- p + e/2 s(x),   x <- x + e p,   p <- p + e/2 s(x)                                                         (1)

and accept with

    log pi(x') - |p'|^2 / 2 - log pi(x) + |p|^2 / 2                                                                (2)

(1) preserves volume and comes back when p is turned round, whatever vector field stands for s, so that (2) leaves pi
exactly as it is. One leapfrog step is the Langevin step of size e^2 / 2.

At the levels of a diffusion target `HMC` runs (1) as it stands here; on the traces of a program NumPyro runs it, with a
step size and a mass matrix found in warm-up, see `ppl.inference.hamiltonian_moves`.

Source: Neal (2011), "MCMC using Hamiltonian dynamics".
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax

from ppl.inference.acceptance import Evaluate, Point, accept, adjusted_randomness, repeated, require_step_size
from ppl.inference.hamiltonian_moves import HamiltonianMoves
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.inference.unconstrained import as_selector, require_unit_interval
from ppl.inference.validation import require_count
from ppl.trace_space import Selector, TraceSpace

__all__ = ["HMC", "hamiltonian_proposal", "hamiltonian_step", "leapfrog"]


def leapfrog(evaluate: Evaluate, point: Point, momentum, step_size, num_leapfrog: int) -> tuple[Point, Any]:
    """Return the point and the momentum after `num_leapfrog` times (1).

    Args:
        evaluate: the point at a given x, with its score.
        point: x, with its score.
        momentum: p, of x's shape.
        step_size: e, a scalar.
        num_leapfrog: how many times.
    """

    def step(carry, _):
        point, momentum = carry
        momentum = momentum + 0.5 * step_size * point.score
        point = evaluate(point.x + step_size * momentum)
        return (point, momentum + 0.5 * step_size * point.score), None

    return lax.scan(step, (point, momentum), length=num_leapfrog)[0]


def hamiltonian_proposal(evaluate: Evaluate, point: Point, momentum, step_size, num_leapfrog: int) -> tuple[Point, Any]:
    """Return the point after (1) and the log-ratio (2).

    Args:
        evaluate: the point at a given x, with its log-density and score.
        point: x, with the same.
        momentum: p, of x's shape, drawn from N(0, I).
        step_size: e, a scalar.
        num_leapfrog: how many leapfrog steps.
    """
    proposed, end = leapfrog(evaluate, point, momentum, step_size, num_leapfrog)
    kinetic = 0.5 * jnp.sum((momentum - end) * (momentum + end))
    return proposed, proposed.log_density - point.log_density + kinetic


def hamiltonian_step(
    evaluate: Evaluate, point: Point, momentum, uniform, step_size, num_leapfrog: int
) -> tuple[Point, Any]:
    """Return the point after (1) and (2), and whether it moved; `uniform` is in [0, 1), see `hamiltonian_proposal`."""
    return accept(point, *hamiltonian_proposal(evaluate, point, momentum, step_size, num_leapfrog), uniform)


@dataclasses.dataclass(frozen=True)
class HMC(TraceKernel):
    """Hamiltonian Monte Carlo, (1) and (2), for densities that are known up to a constant.

    It moves continuous sites of a program's traces, and what a diffusion target has at its noise levels.

    Attributes:
        step_size: e, in units of the scale of what is moved: at a noise level its sigma, on traces that of z, the sites
            unconstrained, with the identity as mass matrix. None chooses one: on traces in warm-up, and a mass matrix
            with it; at noise levels see `ppl.inference.level_moves`.
        num_leapfrog: how many leapfrog steps between momenta.
        num_steps: how many times a momentum is drawn, each accepted or refused for each particle alone.
        sites: on traces, which sites, see `ppl.trace_space.Selector`; None for all continuous ones.
        target_accept: on traces, the mean acceptance probability that the step size is adapted to.
    """

    step_size: float | None = None
    num_leapfrog: int = 10
    num_steps: int = 1
    sites: Selector = None
    target_accept: float = 0.8
    needs_gradient: ClassVar[bool] = True
    needs_density: ClassVar[bool] = True
    guarantee: ClassVar[str] = "invariant"

    def __post_init__(self):
        super().__post_init__()
        require_step_size(self.step_size)
        require_count("num_leapfrog", self.num_leapfrog)
        require_count("num_steps", self.num_steps)
        require_unit_interval("target_accept", self.target_accept)
        object.__setattr__(self, "sites", as_selector(self.sites))

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves on traces; see `TraceKernel.bind`."""
        # The number of leapfrog steps is held, not the length of the trajectory: a step size can be adapted to it.
        return HamiltonianMoves(self, space, "HMC", self.num_steps, num_steps=self.num_leapfrog, trajectory_length=None)

    def randomness(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> dict[str, dist.Distribution]:
        """Return the distributions of what a move of an array needs to draw, by name."""
        return adjusted_randomness(shape, self.num_steps, dtype)

    def step_size_at(self, scale, default) -> Any:
        """Return e where lengths have a given scale; `default` is the Langevin step to match where none was given."""
        return jnp.sqrt(2 * default) if self.step_size is None else self.step_size * scale

    def move(self, evaluate: Evaluate, point: Point, random: dict[str, Any], step_size) -> tuple[Point, Any]:
        """Return the point after all steps, and the share of steps that were accepted.

        Args:
            evaluate: the point at a given x.
            point: where the particle is.
            random: what was drawn from `randomness`.
            step_size: e, a scalar.
        """

        def step(point, noise, uniform):
            return hamiltonian_step(evaluate, point, noise, uniform, step_size, self.num_leapfrog)

        return repeated(step, point, random)

    def evaluations(self) -> int:
        """Return how many points a move evaluates."""
        return self.num_steps * self.num_leapfrog
