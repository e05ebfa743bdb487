"""Continuous sites on R^d: what kernels that follow gradients move.

With z = T^-1(x) for the chosen sites x of a trace, laid out as one vector, and all other sites y as they are,

    log p(z) = log gamma(T(z), y) + log |det dT/dz|                                                               (1)

T is NumPyro's `biject_to` of each site's support, whose bounds may be other sites. Entries that are absent, because a
loop has stopped, have no density: they stand at z = 0 and kernels leave them there. Which ones are absent must not
depend on the chosen sites, else (1) would be cut into pieces of several dimensions.

A value on the boundary of its support, where rounding has put it, counts as |z| = 16: as near to the boundary as
float32 comes to 1.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ppl.errors import SiteTypeError
from ppl.inference.presence import along, presence, require_fixed_presence
from ppl.trace_space import Selector, TraceSpace

__all__ = ["UnconstrainedSites", "as_selector", "require_tuning", "require_unit_interval"]

_BOUNDARY = 16.0
_OTHERS = "MH, Regenerate, Gibbs (finitely many values), ParticleGibbs or SuffixMH"


class UnconstrainedSites:
    """Some continuous sites of a program as a vector z of R^d.

    Attributes:
        names: the sites, in the order of the program.
        size: d.
    """

    def __init__(self, kernel: Any, space: TraceSpace, selector: Selector):
        """Choose the sites.

        Args:
            kernel: what moves them, for errors.
            space: the program's traces.
            selector: which sites; None for all continuous ones.

        Raises:
            SiteTypeError: a site is not continuous, or a loop's stopping depends on it; names kernels that fit.
        """
        self.space, self.names = space, _continuous_sites(kernel, space, selector)
        types = jax.eval_shape(lambda sites: space.unconstrain(sites, self.names), space.site_types)
        zeros, self._unravel = ravel_pytree({name: jnp.zeros(t.shape, t.dtype) for name, t in types.items()})
        self.shapes = {name: t.shape for name, t in types.items()}
        self.size = zeros.size

    def present(self, sites: Mapping[str, Any]) -> dict[str, Any]:
        """Return which entries count, for the sites that may have absent ones; see `presence`."""
        return presence(self.space, sites, self.names)

    def mask(self, present: Mapping[str, Any]) -> Any:
        """Return which entries of z are present, bool `[d]`; None where all are."""
        if not present:
            return None
        whole = jnp.ones((), bool)
        masks = {name: along(present.get(name, whole), shape) for name, shape in self.shapes.items()}
        return ravel_pytree(masks)[0]

    def vector(self, sites: Mapping[str, Any], mask: Any) -> Any:
        """Return z `[d]` of a trace; `mask` is that of `mask`."""
        z = ravel_pytree(self.space.unconstrain(sites, self.names))[0]
        z = jnp.where(jnp.isfinite(z), z, jnp.nan_to_num(z, nan=0.0, posinf=_BOUNDARY, neginf=-_BOUNDARY))
        return z if mask is None else jnp.where(mask, z, 0.0)

    def potential(self, sites: Mapping[str, Any]):
        """Return the function from z to -log p of (1), the other sites being those of a trace."""
        others = {name: value for name, value in sites.items() if name not in self.names}
        return lambda z: -self.space.unconstrained_log_density(self._unravel(z), others)

    def replaced(self, z, sites: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
        """Return a trace with the chosen sites at T(z); absent entries and all other sites stay as they are."""
        new, out = self.space.constrain(self._unravel(z), sites), dict(sites)
        for name in self.names:
            counts = present.get(name)
            out[name] = new[name] if counts is None else jnp.where(along(counts, new[name].shape), new[name], out[name])
        return out


def _continuous_sites(kernel: Any, space: TraceSpace, selector: Selector) -> tuple[str, ...]:
    title = type(kernel).__name__
    if selector is None:
        names = tuple(name for name, site in space.sites.items() if not site.is_discrete)
        if not names:
            raise SiteTypeError(
                f"{title} moves continuous sites, of which the program has none: its free sample sites are "
                f"{sorted(space.sites)}. Kernels that move discrete ones: {_OTHERS}."
            )
    else:
        names = space.select(selector)
    for name in names:
        site = space.sites[name]
        if site.is_discrete:
            raise SiteTypeError(
                f"{title} cannot move the site {name!r} ({site.where}): it is discrete, of type {site.dtype}. Kernels "
                f"that can: {_OTHERS}."
            )
        if site.support is None:
            raise SiteTypeError(
                f"{title} cannot move the site {name!r} ({site.where}): its distribution does not state its support. "
                "Kernels that can: MH, Regenerate."
            )
        require_fixed_presence(title, space, name)
        try:
            jax.eval_shape(lambda sites, n=name: space.unconstrain(sites, (n,)), space.site_types)
        except NotImplementedError as error:
            raise SiteTypeError(
                f"{title} cannot move the site {name!r} ({site.where}): NumPyro has no map from R^d onto its support. "
                "Kernels that can: MH, Regenerate."
            ) from error
    return names


def as_selector(selector: Selector) -> Selector:
    """Return a selector that is hashable: sequences of names as tuples."""
    return selector if selector is None or isinstance(selector, str) or callable(selector) else tuple(selector)


def require_tuning(kernel: Any, num_warmup: int) -> None:
    """Raise if a kernel has no step size and no steps in which to find one."""
    if kernel.step_size is None and num_warmup == 0:
        raise ValueError(
            f"{type(kernel).__name__} has nothing to adapt its step size with: give `step_size`, or `num_warmup` "
            "steps of MCMC(...)."
        )


def require_unit_interval(name: str, value: Any) -> None:
    """Raise unless a number lies between 0 and 1, both left out."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r} ({type(value).__name__}).")
    if not 0 < value < 1 or math.isnan(value):
        raise ValueError(f"`{name}` must lie between 0 and 1, got {value!r}.")
