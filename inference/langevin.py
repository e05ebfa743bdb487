"""Langevin moves: a step along the score with noise, alone or with an acceptance test.

For a density pi with the score s = grad log pi, a step size h and z ~ N(0, I):

    x' = x + h s(x) + sqrt(2 h) z                                                                                  (1)
    log q(x'|x) = -|x' - x - h s(x)|^2 / (4 h) + constant                                                          (2)
    accept with log pi(x') - log pi(x) + log q(x|x') - log q(x'|x)                                                 (3)

(1) alone leaves pi as it is only as h goes to 0. With (3) it does so exactly, whatever vector field stands for s, for
the same field is in both densities (2). The way back from x' has the noise -(z + a), a = sqrt(h / 2) (s(x) + s(x')), so
that log q(x|x') - log q(x'|x) = -(2 <z, a> + |a|^2) / 2: no large squares are subtracted.

At the levels of a diffusion target x is a state's array; on the traces of a program it is the vector of
`ppl.inference.unconstrained`, and where no h is given, warm-up moves log h by dual averaging until the mean of min(1,
exp of (3)) is `target_accept`, for (1) alone too: there it bounds the bias.

Source: Roberts and Tweedie (1996), "Exponential convergence of Langevin distributions and their discrete
approximations".
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from numpyro.infer.hmc_util import dual_averaging

from ppl.gaussian import Gaussian
from ppl.inference.acceptance import Evaluate, Point, accept, adjusted_randomness, repeated, require_step_size
from ppl.inference.metropolis_hastings import acceptance
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.inference.unconstrained import UnconstrainedSites, as_selector, require_tuning, require_unit_interval
from ppl.inference.validation import require_count
from ppl.trace_space import Selector, TraceSpace

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
class Langevin(TraceKernel):
    """Unadjusted Langevin steps (1), for any score.

    They move continuous sites of a program's traces, and what a diffusion target has at its noise levels. On traces
    `acceptance` says how often (3) would have accepted: how far the steps are from leaving the posterior as it is.

    Attributes:
        step_size: h, in units of the squared scale of what is moved: at a noise level its sigma^2, on traces z^2, the
            sites unconstrained. None chooses one: on traces in warm-up, at noise levels see
            `ppl.inference.level_moves`.
        num_steps: how many steps a move has.
        sites: on traces, which sites, see `ppl.trace_space.Selector`; None for all continuous ones.
        target_accept: on traces, what the mean of the acceptance probability of (3) is brought to.
    """

    step_size: float | None = None
    num_steps: int = 1
    sites: Selector = None
    target_accept: float = 0.95
    needs_gradient: ClassVar[bool] = True
    needs_density: ClassVar[bool] = False
    guarantee: ClassVar[str] = "discretised"

    def __post_init__(self):
        super().__post_init__()
        require_step_size(self.step_size)
        require_count("num_steps", self.num_steps)
        require_unit_interval("target_accept", self.target_accept)
        object.__setattr__(self, "sites", as_selector(self.sites))

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves on traces; see `TraceKernel.bind`."""
        return _LangevinMoves(self, space, adjusted=False)

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
class MALA(TraceKernel):
    """The Metropolis-adjusted Langevin algorithm, (1) to (3), for densities that are known up to a constant.

    It moves continuous sites of a program's traces, and what a diffusion target has at its noise levels.

    Attributes:
        step_size: h, in units of the squared scale of what is moved: at a noise level its sigma^2, on traces z^2, the
            sites unconstrained. None chooses one: on traces in warm-up, at noise levels see
            `ppl.inference.level_moves`.
        num_steps: how many steps a move has, each accepted or refused for each particle alone.
        sites: on traces, which sites, see `ppl.trace_space.Selector`; None for all continuous ones.
        target_accept: on traces, the mean acceptance probability that the step size is adapted to.
    """

    step_size: float | None = None
    num_steps: int = 1
    sites: Selector = None
    target_accept: float = 0.574
    needs_gradient: ClassVar[bool] = True
    needs_density: ClassVar[bool] = True
    guarantee: ClassVar[str] = "invariant"

    def __post_init__(self):
        super().__post_init__()
        require_step_size(self.step_size)
        require_count("num_steps", self.num_steps)
        require_unit_interval("target_accept", self.target_accept)
        object.__setattr__(self, "sites", as_selector(self.sites))

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves on traces; see `TraceKernel.bind`."""
        return _LangevinMoves(self, space, adjusted=True)

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


# On traces -----------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Memory:
    """What is known at a trace: the point, which entries count, and how the step size is being found."""

    iteration: Any
    point: Point
    present: dict[str, Any]
    log_step_size: Any
    averaging: Any
    num_warmup: int = dataclasses.field(metadata={"static": True})


class _LangevinMoves(Moves):
    def __init__(self, kernel: Langevin | MALA, space: TraceSpace, adjusted: bool):
        self.kernel, self.adjusted = kernel, adjusted
        self.target = UnconstrainedSites(kernel, space, kernel.sites)
        self.sites = self.target.names

    def init(self, key, sites, num_warmup):
        """Return the memory, untuned."""
        require_tuning(self.kernel, num_warmup)
        size = self.kernel.step_size
        start = 0.5 * self.target.size ** (-1 / 3) if size is None else size
        present, point = self.place(sites)
        averaging = dual_averaging()[0](jnp.log(10.0 * start))
        log_start = jnp.log(jnp.asarray(start, jnp.result_type(float)))
        memory = _Memory(jnp.int32(0), point, present, log_start, averaging, num_warmup)
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(a)), memory)

    def refresh(self, key, sites, memory):
        """Return the memory with the point at the trace."""
        present, point = self.place(sites)
        return dataclasses.replace(memory, point=point, present=present)

    def place(self, sites) -> tuple[dict[str, Any], Point]:
        """Return which entries count, and the point."""
        present = self.target.present(sites)
        return present, self.evaluate(sites)(self.target.vector(sites, self.target.mask(present)))

    def log_weight(self, memory):
        """Return log p(z); NaN where it or its score is not finite, for no step leaves such a place."""
        point = memory.point
        finite = jnp.isfinite(point.log_density) & jnp.all(jnp.isfinite(point.score))
        return jnp.where(finite, point.log_density, jnp.nan)

    def evaluate(self, sites) -> Evaluate:
        """Return what gives the point at a z, the other sites being those of a trace."""
        potential = jax.value_and_grad(self.target.potential(sites))

        def evaluate(z) -> Point:
            energy, gradient = potential(z)
            return Point(z, -energy, -gradient)

        return evaluate

    def step(self, key, sites, memory):
        """Make the steps of one move, and tune."""
        evaluate, mask = self.evaluate(sites), self.target.mask(memory.present)
        step_size = jnp.exp(memory.log_step_size)

        def step(point, key):
            noise_key, accept_key = jax.random.split(key)
            noise = jax.random.normal(noise_key, point.x.shape, point.x.dtype)
            noise = noise if mask is None else jnp.where(mask, noise, 0.0)
            proposed, log_ratio = adjusted_proposal(evaluate, point, noise, step_size)
            if self.adjusted:
                point, _ = accept(point, proposed, log_ratio, jax.random.uniform(accept_key))
            else:  # no step leaves the support, nor goes where there is no score to come back by
                possible = (proposed.log_density > -jnp.inf) & jnp.all(jnp.isfinite(proposed.score))
                point = jax.tree.map(lambda a, b: jnp.where(possible, a, b), proposed, point)
            return point, acceptance(log_ratio)

        point, rates = lax.scan(step, memory.point, jax.random.split(key, self.kernel.num_steps))
        memory = self.tuned(dataclasses.replace(memory, point=point), jnp.mean(rates))
        return self.target.replaced(point.x, sites, memory.present), memory, {"acceptance": jnp.mean(rates)}

    def tuned(self, memory: _Memory, rate) -> _Memory:
        """Return the memory after a step that accepted at a mean rate; the last of warm-up takes the average."""
        if self.kernel.step_size is not None or memory.num_warmup == 0:
            return memory
        averaging = dual_averaging()[1](self.kernel.target_accept - rate, memory.averaging)
        last = memory.iteration == memory.num_warmup - 1
        log_step_size = jnp.where(last, averaging[1], averaging[0])
        tuning = memory.iteration < memory.num_warmup
        new, old = (log_step_size, averaging), (memory.log_step_size, memory.averaging)
        log_step_size, averaging = jax.tree.map(lambda a, b: jnp.where(tuning, a, b), new, old)
        return dataclasses.replace(
            memory, iteration=memory.iteration + 1, log_step_size=log_step_size, averaging=averaging
        )
