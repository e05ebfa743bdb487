"""The measure of a program over its traces, as kernels see it.

A trace is a dict of the values of all free sample sites, loops' time axes leading; entries that are absent, because a
loop had stopped, are zeros. For a program with joint density gamma(x) = prod p(x_s | x_<s) exp(factors):

    log_density(x)           log gamma(x)                                                                          (1)
    redraw(x, R)             x' ~ q_R(. | x_-R): the entries R drawn anew, from the program's laws or proposals,
                             with the log-weight  log gamma(x') - log q_R(x'_R | x_-R)                             (2)
    unconstrained            log gamma(T(z)) + log |det dT/dz|                                                     (3)

Everything is written for one trace; callers `jax.vmap` over chains or particles. Under rejuvenation gamma is the
measure of a prefix: later entries have no density.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppl.dataflow import futures_are_one_step
from ppl.errors import SiteValueError
from ppl.interpret import Interpreter, Result
from ppl.ir import Draw, Score
from ppl.program import Site, Staged
from ppl.selection import Selection
from ppl.trace import along_times

__all__ = ["Evaluated", "Selector", "TraceSpace"]

Selector = str | Sequence[str] | Callable[[str], bool] | None
"""Which sites: None for all, a name, a prefix that ends in "/", a sequence of these, or a function of the name."""


class Evaluated(NamedTuple):
    """A trace with zeros where entries are absent, its log-density, and which entries count: None for all of a site."""

    sites: dict[str, Any]
    log_density: Any
    present: dict[str, Any]


class TraceSpace:
    """The measure of a staged program over its free sample sites.

    Attributes:
        staged: the program.
        inputs: its inputs' values.
        given: the values of conditioned sites.
        sites: the free sample sites, by name, in the order of the program. Those whose laws are certain given the
            others, such as `dist.Delta`, are none: they follow.
        stop: how many iterations of outermost loops the prefix has; None for the whole program.
        power: to which power observations and factors count; None is 1. `powered` names those that do, None for all.
        differentiable: whether densities are to be differentiated: then loops run to their bound.
    """

    def __init__(
        self,
        staged: Staged,
        inputs: Any = None,
        given: Mapping[str, Any] | None = None,
        *,
        stop: Any = None,
        differentiable: bool = False,
        power: Any = None,
        powered: frozenset[str] | None = None,
    ):
        self.staged = staged
        self.inputs = staged.inputs if inputs is None else inputs
        self.given = dict(staged.given if given is None else given)
        draws = (node for node, _ in staged.block.statements() if isinstance(node, Draw))
        fixed = self.given.keys() | {node.name for node in draws if node.is_certain}
        self.sites: dict[str, Site] = {
            name: site for name, site in staged.sites.items() if site.kind == "sample" and name not in fixed
        }
        self.stop = stop
        self.differentiable = differentiable
        self.power, self.powered = power, powered

    def condition(self, sites: Mapping[str, Any]) -> TraceSpace:
        """Return the space in which these sites are given."""
        return self._changed(given=self.given | dict(sites))

    def prefix(self, stop: Any) -> TraceSpace:
        """Return the space of the traces of a prefix, in which outermost loops make `stop` iterations."""
        return self._changed(stop=stop)

    def tempered(self, power: Any, names: Sequence[str] | None = None) -> TraceSpace:
        """Return the space in which observations and factors count to a power; those that forbid still do.

        Args:
            power: a scalar of at least 0, in place of the present one.
            names: of those that do; None for all.

        Raises:
            SiteValueError: a name is no observation's or factor's.
        """
        scores = {n.name for n, _ in self.staged.block.statements() if isinstance(n, Score) and n.is_evidence}
        unknown = sorted(set(names or ()) - scores)
        if unknown:
            raise SiteValueError(f"{unknown} are no observations or factors of the program. They are {sorted(scores)}.")
        return self._changed(power=power, powered=None if names is None else frozenset(names))

    def _changed(self, **changes: Any) -> TraceSpace:
        options = {name: getattr(self, name) for name in ("given", "stop", "differentiable", "power", "powered")}
        return TraceSpace(self.staged, self.inputs, **(options | changes))

    def select(self, selector: Selector, role: str = "sites") -> tuple[str, ...]:
        """Return the names of the chosen sites, in the order of the program.

        Args:
            selector: see `Selector`.
            role: the argument's name, for errors.

        Raises:
            SiteValueError: nothing is chosen, or a name or prefix is no site's.
        """
        if selector is None:
            chosen = set(self.sites)
        elif callable(selector):
            chosen = {name for name in self.sites if selector(name)}
        else:
            chosen = set()
            for wanted in [selector] if isinstance(selector, str) else selector:
                found = {n for n in self.sites if n == wanted or (wanted.endswith("/") and n.startswith(wanted))}
                if not found:
                    raise SiteValueError(
                        f"`{role}` names {wanted!r}, not a free sample site of the program. They are "
                        f"{sorted(self.sites)}."
                    )
                chosen |= found
        if not chosen:
            raise SiteValueError(
                f"`{role}` {selector!r} chooses no site. The free sample sites are {sorted(self.sites)}."
            )
        return tuple(name for name in self.sites if name in chosen)

    # Densities -------------------------------------------------------------------------------------------------------

    def log_density(self, sites: Mapping[str, Any]) -> Any:
        """Return (1) in nats, a scalar."""
        return self._run(sites, weigh_draws=True).log_weights

    def evaluate(self, sites: Mapping[str, Any]) -> Evaluated:
        """Return a trace as it stands for itself: absent entries zero, with (1) and what counts."""
        result = self._run(sites, weigh_draws=True, keep=frozenset(self.sites))
        present = {name: None if mask is None else mask.array for name, mask in result.present.items()}
        return Evaluated(_arrays(result), result.log_weights, present)

    def redraw(self, key, sites: Mapping[str, Any], redrawn: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """Draw some entries anew: the new trace, and its log-weight (2).

        Args:
            key: a PRNG key.
            sites: a trace.
            redrawn: by name which entries, a bool array of the site's `time_shape`.
        """
        masks = self._masks(redrawn)
        result = self._run(sites, key, redrawn=masks, keep=frozenset(self.sites))
        return _arrays(result), result.log_weights

    def redraw_log_weight(self, sites: Mapping[str, Any], redrawn: Mapping[str, Any]) -> Any:
        """Return the log-weight (2) that a trace would have, had these entries been drawn anew."""
        masks = self._masks(redrawn)
        return self._run(sites, redrawn=masks, retained={name: sites[name] for name in masks}).log_weights

    def _masks(self, redrawn: Mapping[str, Any]) -> dict[str, Any]:
        return {name: jnp.broadcast_to(mask, self.sites[name].time_shape) for name, mask in redrawn.items()}

    def simulate(self, key) -> tuple[dict[str, Any], Any]:
        """Return a trace drawn from the program's laws, and (1) of it."""
        result = self._run({}, key, weigh_draws=True, keep=frozenset(self.sites))
        return _arrays(result), result.log_weights

    def unconstrain(self, sites: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Return z of (3) for some sites."""
        return _arrays(self._run(sites, unconstrain=frozenset(names)))

    def constrain(self, z: Mapping[str, Any], sites: Mapping[str, Any]) -> dict[str, Any]:
        """Return a trace with some sites replaced by T(z)."""
        return _arrays(self._run({**sites, **z}, constrain=frozenset(z), keep=frozenset(self.sites)))

    def unconstrained_log_density(self, z: Mapping[str, Any], sites: Mapping[str, Any]) -> Any:
        """Return (3) in nats, with the other sites as they are."""
        return self._run({**sites, **z}, constrain=frozenset(z), weigh_draws=True).log_weights

    def _run(self, sites, key=None, *, retained=None, redrawn=None, **options) -> Result:
        options |= {"power": self.power, "powered": self.powered}
        interpreter = Interpreter(early_exit=not self.differentiable, **options)
        given = {**self.given, **sites}
        return interpreter.run(self.staged.block, self.inputs, key, given, retained, redrawn=redrawn, stop=self.stop)

    # Whole traces ----------------------------------------------------------------------------------------------------

    def outcome(self, sites: Mapping[str, Any], keep: frozenset[str]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Return what a trace's run gives: the program's value, the kept sites, and which of their entries count."""
        result = self._run(sites, keep=keep, weigh_draws=True)
        present = {
            name: jnp.ones(self.staged.sites[name].time_shape, bool)
            if mask is None
            else along_times(mask.array, self.staged.sites[name].time_shape, 0)
            for name, mask in result.present.items()
        }
        value = jax.tree.unflatten(self.staged.out_tree, [lane.array for lane in result.value])
        return value, _arrays(result), present

    def population(
        self,
        key,
        num_particles: int,
        selection: Selection,
        *,
        retained: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Result:
        """Run a population through the program.

        Args:
            key: a PRNG key.
            num_particles: how many particles.
            selection: what happens at the end of an outermost iteration.
            retained: a trace that particle 0 follows; the selection must pin it.
            options: further fields of `ppl.interpret.Interpreter`.
        """
        options = {"keep": frozenset(self.sites), "power": self.power, "powered": self.powered} | options
        interpreter = Interpreter(num_particles, selection, **options)
        return interpreter.run(self.staged.block, self.inputs, key, self.given, retained, stop=self.stop)

    def futures_are_one_step(self, sites: Sequence[str] | None = None) -> bool:
        """Return whether one iteration tells how likely a future is after a particle, see `ppl.dataflow`.

        Args:
            sites: the names of those that differ between particles; None for all that are free.
        """
        given = frozenset(self.given) | (set() if sites is None else self.sites.keys() - set(sites))
        return futures_are_one_step(self.staged.block, given)

    @property
    def site_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The types of the free sample sites, by name."""
        return {name: jax.ShapeDtypeStruct(site.shape, site.dtype) for name, site in self.sites.items()}


def _arrays(result: Result) -> dict[str, Any]:
    return {name: lane.array for name, lane in result.sites.items()}
