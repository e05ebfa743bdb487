"""Gibbs sampling of finite sites: each entry in turn from its law given all else.

For an entry i of a chosen site with the possible values v_1 .. v_K, and all other entries x_-i as they are,

    x_i ~ pi(. | x_-i),   pi(v_k | x_-i) proportional to gamma(v_k, x_-i)                                         (1)

where gamma is the joint density of the whole program, evaluated at every value at once: K runs of the program for each
entry. Entries that are absent stay as they are; which ones are must not depend on the chosen sites, for (1) compares
traces of the same entries.

Source: Geman and Geman (1984), "Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images".
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ppl import chance
from ppl.errors import SiteTypeError
from ppl.inference.presence import along, presence, require_fixed_presence
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.inference.unconstrained import as_selector
from ppl.trace_space import Selector, TraceSpace

__all__ = ["Gibbs"]


@dataclasses.dataclass(frozen=True)
class Gibbs(TraceKernel):
    """Draw finite sites entry by entry from their full conditionals (1).

    Attributes:
        sites: which sites, see `ppl.trace_space.Selector`; None for all that are discrete.
    """

    sites: Selector = None
    guarantee: ClassVar[str] = "invariant"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "sites", as_selector(self.sites))

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`."""
        return _GibbsMoves(space, self.sites)


class _GibbsMoves(Moves):
    def __init__(self, space: TraceSpace, selector: Selector):
        self.space = space
        self.values = _finite_sites(space, selector)
        self.sites = tuple(self.values)

    def step(self, key, sites, memory):
        """Draw all entries of all chosen sites, one after another."""
        sites, present = dict(sites), presence(self.space, sites, self.sites)
        for name, site_key in zip(self.sites, jax.random.split(key, len(self.sites)), strict=True):
            sites[name] = self.swept(site_key, name, sites, present.get(name))
        return sites, memory, {"acceptance": jnp.float32(1.0)}

    def swept(self, key, name: str, sites: dict[str, Any], present) -> Any:
        """Return a site's value after each of its entries was drawn from (1)."""
        values = jnp.asarray(self.values[name], sites[name].dtype)
        shape = sites[name].shape
        counts = None if present is None else along(present, shape).ravel()

        def log_density(flat, i, value):
            return self.space.log_density({**sites, name: flat.at[i].set(value).reshape(shape)})

        def entry(flat, drawn_from):
            i, key = drawn_from
            logits = jax.vmap(lambda value: log_density(flat, i, value))(values)
            logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
            if counts is not None:  # an absent entry has one choice
                logits = jnp.where(counts[i], logits, jnp.where(values == flat[i], 0.0, -jnp.inf))
            return flat.at[i].set(values[chance.categorical(key, logits)]), None

        flat = sites[name].ravel()
        return jax.lax.scan(entry, flat, (jnp.arange(flat.size), jax.random.split(key, flat.size)))[0].reshape(shape)


def _finite_sites(space: TraceSpace, selector: Selector) -> dict[str, np.ndarray]:
    """Return the chosen sites with their possible values `[K]`."""
    if selector is None:
        names = tuple(name for name, site in space.sites.items() if site.is_discrete)
        if not names:
            raise SiteTypeError(
                "Gibbs moves finite sites, of which the program has none: its free sample sites are "
                f"{sorted(space.sites)}. NUTS, HMC, MALA and MH move continuous ones."
            )
    else:
        names = space.select(selector)
    finite = {}
    for name in names:
        site = space.sites[name]
        if not site.is_discrete:
            raise SiteTypeError(
                f"Gibbs cannot move the site {name!r} ({site.where}): it is continuous. NUTS, HMC, MALA, MH and "
                "Regenerate can."
            )
        values = None if site.support is None else site.support.values
        if values is None:
            raise SiteTypeError(
                f"Gibbs cannot move the site {name!r} ({site.where}): its values are not finitely many numbers that "
                "are known before it runs. MH, Regenerate and ParticleGibbs can."
            )
        require_fixed_presence("Gibbs", space, name)
        finite[name] = values
    return finite
