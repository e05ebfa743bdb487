"""How parameters are proposed: by the user's distributions, or by a random walk that learns its covariance.

The walk steps through the unconstrained space of the chosen sites, z in R^d,

    z' = z + L e,   e ~ N(0, I),   L L^T = (2.38^2 / d) S,                                                        (1)

which is near the best for a posterior of covariance S (Roberts, Gelman and Gilks 1997). S is the running covariance of
the chain's own states in its warm-up, step n counted with a weight that grows like n, so that the way in is forgotten:

    S <- S + g_n ((z - m)(z - m)^T - S),   m <- m + g_n (z - m),   g_n = 2 / (n + d + 10),                        (2)

and stays as it is afterwards. Both ways of proposing move *points*: values of the parameters as they are proposed,
unconstrained for the walk.

Source of (2): Haario, Saksman and Tamminen (2001), "An adaptive Metropolis algorithm".
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ppl import chance
from ppl.errors import SiteTypeError, SiteValueError
from ppl.inference.metropolis_hastings import MH
from ppl.trace_space import TraceSpace

__all__ = ["GivenProposal", "Learned", "Proposing", "Walk", "check_scale", "frozen_selector", "proposing"]

_START = 0.1  # the walk's first S has this standard deviation
_JITTER = 1e-5


class Proposing(Protocol):
    """How points are proposed.

    Attributes:
        constrained: the names of sites whose points are unconstrained.
    """

    constrained: frozenset[str]

    def point(self, sites: dict[str, Any]) -> dict[str, Any]:
        """Return the point of a trace."""

    def propose(self, key, sites: dict[str, Any], point: dict[str, Any], covariance: Any) -> dict[str, Any]:
        """Return another point."""

    def log_ratio(self, sites: dict[str, Any], proposed: dict[str, Any]) -> Any:
        """Return log q(old | proposed) - log q(proposed | old), of points."""


class GivenProposal:
    """Points are values, drawn from a function of the trace as in `MH`."""

    constrained: frozenset[str] = frozenset()

    def __init__(self, proposal: Any, space: TraceSpace, names: tuple[str, ...]):
        self.names, self.moves = names, MH(proposal).bind(space)
        if set(self.moves.sites) != set(names):
            raise SiteValueError(
                f"`proposal` moves {sorted(self.moves.sites)}; it must give a distribution for each of the "
                f"parameters {sorted(names)}."
            )

    def point(self, sites):
        """See `Proposing`."""
        return {name: sites[name] for name in self.names}

    def propose(self, key, sites, point, covariance):
        """See `Proposing`."""
        del point, covariance
        laws = self.moves.laws(sites)
        keys = jax.random.split(key, len(laws))
        drawn = {name: chance.sample(k, law) for k, (name, law) in zip(keys, laws.items(), strict=True)}
        return {name: jnp.asarray(value, self.moves.space.sites[name].dtype) for name, value in drawn.items()}

    def log_ratio(self, sites, proposed):
        """See `Proposing`."""
        forth, back = self.moves.laws(sites), self.moves.laws(proposed)
        ratio = jnp.zeros(())
        for name in self.names:
            ratio += self.moves.log_prob(name, back[name], sites[name], None)
            ratio -= self.moves.log_prob(name, forth[name], proposed[name], None)
        return ratio


class Walk:
    """Points are unconstrained values, moved by (1)."""

    def __init__(self, space: TraceSpace, names: tuple[str, ...]):
        self.names, self.space, self.constrained = names, space, frozenset(names)
        for name in names:
            site = space.sites[name]
            if site.is_discrete or site.support is None:
                what = "discrete" if site.is_discrete else "of a law whose support is not known"
                raise SiteTypeError(
                    f"the random walk moves continuous sites; {name!r} ({site.where}) is {what}. Give `proposal`, a "
                    "function of the trace's sites that returns distributions by name."
                )
        points = jax.eval_shape(self.point, space.site_types)
        self.size = sum(p.size for p in points.values())

    def point(self, sites):
        """See `Proposing`."""
        return self.space.unconstrain(sites, self.names)

    def propose(self, key, sites, point, covariance):
        """See `Proposing`; `covariance` is S."""
        del sites
        flat, unravel = ravel_pytree(point)
        jitter = _JITTER * jnp.trace(covariance) / self.size + jnp.finfo(jnp.float32).tiny
        factor = jnp.linalg.cholesky((2.38**2 / self.size) * (covariance + jitter * jnp.eye(self.size)))
        return unravel(flat + (factor @ jax.random.normal(key, flat.shape)).astype(flat.dtype))

    def log_ratio(self, sites, proposed):
        """See `Proposing`: the walk is symmetric."""
        del sites, proposed
        return jnp.zeros(())

    def first_covariance(self, scale: float | tuple[float, ...] | None) -> Any:
        """Return S `[d, d]` with which steps have the standard deviations `scale`.

        Raises:
            SiteValueError: there are not as many as the parameters have entries.
        """
        if scale is None:
            return _START**2 * jnp.eye(self.size)
        if isinstance(scale, tuple) and len(scale) != self.size:
            raise SiteValueError(f"`scale` has {len(scale)} numbers, the parameters have {self.size} entries.")
        return jnp.diag(jnp.broadcast_to(jnp.asarray(scale, float), self.size) ** 2) * (self.size / 2.38**2)


class Learned(NamedTuple):
    """What a walk has learned: m and S of (2), the number of steps, and how many of them teach."""

    mean: Any
    covariance: Any
    count: Any
    num_warmup: Any

    def after(self, point: dict[str, Any]) -> Learned:
        """Return what is known after a step that led to a point, by (2)."""
        z = ravel_pytree(point)[0]
        gain = jnp.where(self.count < self.num_warmup, 2.0 / (self.count + z.size + 11), 0.0)
        away = z - self.mean
        covariance = self.covariance + gain * (jnp.outer(away, away) - self.covariance)
        mean = (self.mean + gain * away).astype(self.mean.dtype)
        return Learned(mean, covariance.astype(self.covariance.dtype), self.count + 1, self.num_warmup)


def proposing(kernel: Any, space: TraceSpace, names: tuple[str, ...]) -> GivenProposal | Walk:
    """Return how a kernel with the attributes `proposal` and `scale` proposes parameters.

    Raises:
        SiteValueError: a name is no free site, stands in a loop that may stop, or `proposal` does not fit.
        SiteTypeError: the random walk cannot move a site.
    """
    stopping = {
        node.name
        for node, loops in space.staged.block.statements()
        if any(loop.until is not None or (space.stop is not None and loop.resamples) for loop in loops)
    }
    if stopping & set(names):
        raise SiteValueError(
            f"`parameters` {sorted(stopping & set(names))} stand in a loop that may stop, where their entries come and "
            "go: choose sites before it."
        )
    if kernel.proposal is not None:
        return GivenProposal(kernel.proposal, space, names)
    walk = Walk(space, names)
    walk.first_covariance(kernel.scale)
    return walk


def check_scale(kernel: Any) -> None:
    """Check the settings `proposal` and `scale` of a frozen kernel.

    Raises:
        TypeError: one is of another kind.
        ValueError: a number is not positive, or both are given.
    """
    proposal, scale = kernel.proposal, kernel.scale
    if proposal is not None and not callable(proposal):
        raise TypeError(
            f"`proposal` must be a function from a trace's sites to distributions by site name, got {proposal!r}."
        )
    if scale is None:
        return
    if proposal is not None:
        raise ValueError("`scale` is of the random walk, which is not made where `proposal` is given: leave one out.")
    numbers_given = tuple(scale) if isinstance(scale, tuple | list) else (scale,)
    if not all(isinstance(s, numbers.Real) and not isinstance(s, bool) for s in numbers_given) or not numbers_given:
        raise TypeError(f"`scale` must be a number, or one for each entry of the parameters, got {scale!r}.")
    if not all(0 < s < float("inf") for s in numbers_given):
        raise ValueError(f"`scale` must be positive and finite, got {scale!r}.")
    if isinstance(scale, list):
        object.__setattr__(kernel, "scale", tuple(scale))


def frozen_selector(kernel: Any, name: str) -> None:
    """Make a selector that is a list a tuple, so that the kernel can be a key."""
    if isinstance(getattr(kernel, name), list):
        object.__setattr__(kernel, name, tuple(getattr(kernel, name)))
