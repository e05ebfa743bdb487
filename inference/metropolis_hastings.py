"""Metropolis-Hastings on chosen sites, and its simplest case: sites drawn anew from the program.

    x' ~ q(. | x),   accept with log gamma(x') - log gamma(x) + log q(x | x') - log q(x' | x)                      (1)

`MH` proposes from distributions that are a function of the present trace. `Regenerate` draws its sites R from the
program's own laws, or the proposals of its `ppl.sample` statements, given all others: with w(x) = gamma(x) / q_R(x_R |
x_-R) the ratio is w(x') / w(x), the ratio of the importance weights.

Sources: Hastings (1970), "Monte Carlo sampling methods using Markov chains and their applications"; Wingate,
Stuhlmueller and Goodman (2011), "Lightweight implementations of probabilistic programming languages".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from ppl import chance
from ppl.errors import SiteTypeError, SiteValueError
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.trace_space import Selector, TraceSpace

__all__ = ["MH", "Regenerate"]


@dataclasses.dataclass(frozen=True)
class MH(TraceKernel):
    """Metropolis-Hastings with a proposal of the user's own.

    Attributes:
        proposal: a function of a trace, sites by name, that returns a NumPyro distribution for each site that it
            moves, by name: of the site's whole shape, loops' time axes leading. Entries of stopped iterations do not
            count; for a site in a loop that may stop, or moved within SMC, the time axes must be batch axes.

    For instance `MH(lambda sites: {"drift": dist.Normal(sites["drift"], 0.3)})`.
    """

    proposal: Callable[[dict[str, Any]], Mapping[str, dist.Distribution]]
    guarantee: ClassVar[str] = "invariant"

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.proposal) or isinstance(self.proposal, dist.Distribution):
            raise TypeError(
                "`proposal` must be a function from a trace's sites to distributions by site name, got "
                f"{self.proposal!r}."
            )

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`."""
        return _Proposed(self, space)


class _Proposed(Moves):
    def __init__(self, kernel: MH, space: TraceSpace):
        self.kernel, self.space = kernel, space
        names: list[str] = []
        jax.eval_shape(lambda sites: names.extend(self.laws(sites)), space.site_types)
        self.sites = tuple(names)

    def laws(self, sites) -> dict[str, dist.Distribution]:
        """Return the proposals at a trace, checked."""
        laws = self.kernel.proposal(dict(sites))
        if not isinstance(laws, Mapping) or not laws:
            raise SiteTypeError(
                f"`proposal` must return distributions by site name, got {laws!r}: for instance "
                '{"drift": dist.Normal(sites["drift"], 0.3)}.'
            )
        self.space.select(list(laws), "proposal")
        for name, law in laws.items():
            site = self.space.sites[name]
            if not isinstance(law, dist.Distribution):
                raise SiteTypeError(f"`proposal` gives site {name!r} a {type(law).__name__}, not a distribution.")
            if law.batch_shape + law.event_shape != site.shape:
                raise SiteValueError(
                    f"`proposal` gives site {name!r} a distribution of shape {law.batch_shape + law.event_shape}; the "
                    f"site has {site.shape}."
                )
            if law.is_discrete != site.is_discrete:
                kinds = ["continuous", "discrete"]
                raise SiteTypeError(
                    f"`proposal` gives site {name!r} a {kinds[law.is_discrete]} distribution; the site is "
                    f"{kinds[site.is_discrete]}."
                )
        return dict(laws)

    def init(self, key, sites, num_warmup):
        """Return the log-density, and which entries count."""
        return self.space.evaluate(sites)[1:]

    def refresh(self, key, sites, memory):
        """Return the log-density, and which entries count."""
        return self.space.evaluate(sites)[1:]

    def log_weight(self, memory):
        """Return the log-density."""
        return memory[0]

    def step(self, key, sites, memory):
        """Propose and accept; see (1). Entries that are absent have no density, before the move or after it."""
        draw_key, accept_key = jax.random.split(key)
        laws = self.laws(sites)
        keys = jax.random.split(draw_key, len(laws))
        drawn = {n: chance.sample(k, law) for k, (n, law) in zip(keys, laws.items(), strict=True)}
        drawn = {name: jnp.asarray(value, self.space.sites[name].dtype) for name, value in drawn.items()}
        proposed, log_density, present = self.space.evaluate({**sites, **drawn})
        back, (old_log_density, old_present) = self.laws(proposed), memory
        log_ratio = log_density - old_log_density
        for name in laws:
            log_ratio += self.log_prob(name, back[name], sites[name], old_present[name])
            log_ratio -= self.log_prob(name, laws[name], drawn[name], present[name])
        accepted = chance.accept(accept_key, log_ratio)
        new = (proposed, (log_density, present)), (dict(sites), memory)
        sites, memory = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), *new)
        return sites, memory, {"acceptance": acceptance(log_ratio)}

    def log_prob(self, name: str, law: dist.Distribution, value, present) -> Any:
        """Return log q of a site's entries that count."""
        log_prob = law.log_prob(value)
        if present is None:
            return jnp.sum(log_prob)
        if log_prob.shape[: present.ndim] != present.shape:
            raise SiteValueError(
                f"`proposal` gives site {name!r}, whose loop may stop, a distribution of batch shape "
                f"{law.batch_shape}: its first axes must be the loop's, {present.shape}, so that what is absent does "
                "not count. Do not make an event of them."
            )
        log_prob = jnp.sum(log_prob.reshape(*present.shape, -1), axis=-1)
        return jnp.sum(jnp.where(present, log_prob, 0.0))


@dataclasses.dataclass(frozen=True)
class Regenerate(TraceKernel):
    """Draw sites anew from the program, given all others, and accept by their importance weights.

    Attributes:
        sites: which sites, see `ppl.trace_space.Selector`; None for all, which makes draws that are independent
            until they are accepted.
    """

    sites: Selector = None
    guarantee: ClassVar[str] = "invariant"

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`."""
        return _Regenerated(space, space.select(self.sites))


class _Regenerated(Moves):
    """Remembers the log-weight log w of the present trace."""

    def __init__(self, space: TraceSpace, sites: tuple[str, ...]):
        self.space, self.sites = space, sites
        self.redrawn = dict.fromkeys(sites, True)

    def init(self, key, sites, num_warmup):
        """Return log w."""
        return self.space.redraw_log_weight(sites, self.redrawn)

    def refresh(self, key, sites, memory):
        """Return log w."""
        return self.space.redraw_log_weight(sites, self.redrawn)

    def log_weight(self, memory):
        """Return log w."""
        return memory

    def step(self, key, sites, memory):
        """Draw anew and accept."""
        draw_key, accept_key = jax.random.split(key)
        new = self.space.redraw(draw_key, sites, self.redrawn)
        log_ratio = new[1] - memory
        accepted = chance.accept(accept_key, log_ratio)
        sites, memory = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, (dict(sites), memory))
        return sites, memory, {"acceptance": acceptance(log_ratio)}


def acceptance(log_ratio) -> Any:
    """Return the probability of accepting, min(1, exp(log_ratio)); 0 for NaN."""
    return jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0))).astype(jnp.float32)
