"""Langevin moves: a step along the score with noise, alone or with an acceptance test.

For a density pi with the score s = grad log pi, a step size h and z ~ N(0, I):

    x' = x + h s(x) + sqrt(2 h) z                                                                                  (1)
    log q(x'|x) = -|x' - x - h s(x)|^2 / (4 h) + constant                                                          (2)
    accept with log pi(x') - log pi(x) + log q(x|x') - log q(x'|x)                                                 (3)

(1) alone leaves pi as it is only as h goes to 0. With (3) it does so exactly, whatever vector field stands for s, for
the same field is in both densities (2). The way back from x' has the noise -(z + a), a = sqrt(h / 2) (s(x) + s(x')), so
that log q(x|x') - log q(x'|x) = -(2 <z, a> + |a|^2) / 2: no large squares are subtracted.

Source: Roberts and Tweedie (1996), "Exponential convergence of Langevin distributions and their discrete
approximations".
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax

from ppl.gaussian import Gaussian
from ppl.inference.acceptance import Evaluate, Point, accept, adjusted_randomness, repeated, require_step_size
from ppl.inference.validation import require_count

__all__ = ["MALA", "Langevin", "adjusted_proposal", "adjusted_step", "unadjusted_step"]


def unadjusted_step(evaluate: Evaluate, point: Point, noise, step_size) -> Point:
    """Return the point (1).

    Args:
        evaluate: the point at a given x; only its score is used.
        point: x, with its score.
        noise: z, of x's shape.
        step_size: h, a scalar.
    """
    return evaluate(point.x + step_size * point.score + jnp.sqrt(2 * step_size) * noise)


def adjusted_proposal(evaluate: Evaluate, point: Point, noise, step_size) -> tuple[Point, Any]:
    """Return the point (1) and the log-ratio (3).

    Args:
        evaluate: the point at a given x, with its log-density and score.
        point: x, with the same.
        noise: z, of x's shape.
        step_size: h, a scalar.
    """
    proposed = unadjusted_step(evaluate, point, noise, step_size)
    back = jnp.sqrt(step_size / 2) * (point.score + proposed.score)
    return proposed, proposed.log_density - point.log_density - 0.5 * jnp.sum(back * (2 * noise + back))


def adjusted_step(evaluate: Evaluate, point: Point, noise, uniform, step_size) -> tuple[Point, Any]:
    """Return the point after (1) to (3), and whether it moved; `uniform` is in [0, 1), see `adjusted_proposal`."""
    return accept(point, *adjusted_proposal(evaluate, point, noise, step_size), uniform)


@dataclasses.dataclass(frozen=True)
class Langevin:
    """Unadjusted Langevin steps (1), for any score.

    Attributes:
        step_size: h, in units of the squared scale of what is moved; at a noise level that is its sigma^2. None chooses
            one, see `ppl.inference.level_moves`.
        num_steps: how many steps a move has.
    """

    step_size: float | None = None
    num_steps: int = 1
    needs_density: ClassVar[bool] = False
    guarantee: ClassVar[str] = "discretised"

    def __post_init__(self):
        require_step_size(self.step_size)
        require_count("num_steps", self.num_steps)

    def randomness(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> dict[str, dist.Distribution]:
        """Return the distributions of what a move of an array needs to draw, by name."""
        return {"noise": Gaussian(jnp.zeros((self.num_steps, *shape), dtype), 1.0)}

    def step_size_at(self, scale, default) -> Any:
        """Return h where lengths have a given scale; `default` is the one to take where none was given."""
        return default if self.step_size is None else self.step_size * scale**2

    def move(self, evaluate: Evaluate, point: Point, random: dict[str, Any], step_size) -> tuple[Point, Any]:
        """Return the point after all steps, and the share of steps that were accepted: 1.

        Args:
            evaluate: the point at a given x.
            point: where the particle is.
            random: what was drawn from `randomness`.
            step_size: h, a scalar.
        """
        step = lambda point, noise: (unadjusted_step(evaluate, point, noise, step_size), None)  # noqa: E731
        return lax.scan(step, point, random["noise"])[0], jnp.ones(())

    def evaluations(self) -> int:
        """Return how many points a move evaluates."""
        return self.num_steps


@dataclasses.dataclass(frozen=True)
class MALA:
    """The Metropolis-adjusted Langevin algorithm, (1) to (3), for densities that are known up to a constant.

    Attributes:
        step_size: h, in units of the squared scale of what is moved; at a noise level that is its sigma^2. None chooses
            one, see `ppl.inference.level_moves`.
        num_steps: how many steps a move has, each accepted or refused for each particle alone.
    """

    step_size: float | None = None
    num_steps: int = 1
    needs_density: ClassVar[bool] = True
    guarantee: ClassVar[str] = "invariant"

    def __post_init__(self):
        require_step_size(self.step_size)
        require_count("num_steps", self.num_steps)

    def randomness(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> dict[str, dist.Distribution]:
        """Return the distributions of what a move of an array needs to draw, by name."""
        return adjusted_randomness(shape, self.num_steps, dtype)

    def step_size_at(self, scale, default) -> Any:
        """Return h where lengths have a given scale; `default` is the one to take where none was given."""
        return default if self.step_size is None else self.step_size * scale**2

    def move(self, evaluate: Evaluate, point: Point, random: dict[str, Any], step_size) -> tuple[Point, Any]:
        """Return the point after all steps, and the share of steps that were accepted; see `Langevin.move`."""

        def step(point, noise, uniform):
            return adjusted_step(evaluate, point, noise, uniform, step_size)

        return repeated(step, point, random)

    def evaluations(self) -> int:
        """Return how many points a move evaluates."""
        return self.num_steps
