"""What moves of one particle share: a point, and whether a proposed one takes its place.

    accept x' where u < exp(log_ratio),   u ~ U[0, 1)                                                             (1)

With log_ratio = log pi(x') - log pi(x) + log q(x|x') - log q(x'|x) the move from x to x' leaves the density pi as it is
(Metropolis et al. 1953; Hastings 1970). Everything here is written for one particle, so that under `jax.vmap` each
particle is accepted or refused alone.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax

from ppl.gaussian import Gaussian

__all__ = [
    "Evaluate",
    "Point",
    "accept",
    "adjusted_randomness",
    "evaluate_density",
    "repeated",
    "require_step_size",
]


class Point(NamedTuple):
    """Where a particle is.

    Attributes:
        x: an array.
        log_density: log pi(x) up to a constant, a scalar; 0 for moves that do not need it.
        score: the gradient of log pi at x, of x's shape.
        carried: what else is known there, a pytree: the state that x belongs to.
    """

    x: Any
    log_density: Any
    score: Any
    carried: Any = None


Evaluate = Callable[[Any], Point]  # the point at x


def evaluate_density(value_and_grad: Callable[[Any], tuple[Any, Any]]) -> Evaluate:
    """Return `Evaluate` of a function that gives log pi(x) and its gradient."""
    return lambda x: Point(x, *value_and_grad(x))


def accept(point: Point, proposed: Point, log_ratio, uniform) -> tuple[Point, Any]:
    """Return the point after (1), and whether it is the proposed one. NaN is refused."""
    accepted = jnp.log(uniform) < log_ratio
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposed, point), accepted


def adjusted_randomness(shape: tuple[int, ...], num_steps: int, dtype: Any) -> dict[str, dist.Distribution]:
    """Return the distributions of what steps with an acceptance test draw: `noise` `[num_steps, *shape]`, `uniform`."""
    return {
        "noise": Gaussian(jnp.zeros((num_steps, *shape), dtype), 1.0),
        "uniform": dist.Uniform(jnp.zeros(num_steps, dtype), 1.0).to_event(1),
    }


def repeated(step: Callable[..., tuple[Point, Any]], point: Point, random: dict[str, Any]) -> tuple[Point, Any]:
    """Return the point after steps, and the share of them that were accepted.

    Args:
        step: `(point, noise, uniform) -> (point, accepted)`.
        point: where the particle is.
        random: what was drawn from `adjusted_randomness`.
    """
    point, accepted = lax.scan(lambda point, drawn: step(point, *drawn), point, (random["noise"], random["uniform"]))
    return point, jnp.mean(accepted, dtype=random["uniform"].dtype)


def require_step_size(value: Any) -> None:
    """Raise unless a step size is None or a positive number."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`step_size` must be a number or None, got {value!r} ({type(value).__name__}).")
    if not 0 < value < math.inf:
        raise ValueError(f"`step_size` must be positive and finite, got {value!r}.")
