"""Tempered measures: what the data say, to a power.

A program's density is what its sample sites say times what its observations and factors say. With L the product of the
tempered ones, all by default,

    gamma_beta(x)  =  gamma_0(x) L(x)^beta,      log gamma_beta(x)  =  log gamma_0(x) + beta log L(x),            (1)

beta the inverse temperature: gamma_1 is the program's measure, gamma_0 that of the program without these statements. A
value that they forbid, L(x) = 0, is forbidden at beta = 0 too: every power has the same support. What is not tempered
(sample sites, conditioned ones too, and statements that are not named) counts in full at every power.

(1) is linear in beta, so that its value at 0 and its derivative are all there is to know, and one pass gives both.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppl.errors import SiteValueError
from ppl.ir import Score
from ppl.trace_space import Selector, TraceSpace

__all__ = ["Split", "each_number", "scored", "split_log_density", "tempered"]


class Split(NamedTuple):
    """The two terms of (1) at a trace, scalars in nats.

    Attributes:
        base: log gamma_0(x).
        log_likelihood: log L(x); finite where `base` is.
    """

    base: Any
    log_likelihood: Any


def scored(space: TraceSpace, selector: Selector) -> tuple[str, ...] | None:
    """Return the names of the chosen observations and factors; None for all.

    Args:
        space: the measure.
        selector: which, see `ppl.trace_space.Selector`.

    Raises:
        SiteValueError: nothing is chosen, or a name or prefix is no observation's or factor's.
    """
    names = [n.name for n, _ in space.staged.block.statements() if isinstance(n, Score) and n.is_evidence]
    if not names:
        raise SiteValueError("the program has no observations or factors: there is nothing to temper.")
    if selector is None:
        return None
    if callable(selector):
        chosen = {name for name in names if selector(name)}
    else:
        chosen = set()
        for wanted in [selector] if isinstance(selector, str) else selector:
            found = {name for name in names if name == wanted or (wanted.endswith("/") and name.startswith(wanted))}
            if not found:
                raise SiteValueError(
                    f"`sites` names {wanted!r}, no observation or factor of the program. They are {sorted(names)}."
                )
            chosen |= found
    if not chosen:
        raise SiteValueError(f"`sites` {selector!r} chooses none of the observations and factors {sorted(names)}.")
    return tuple(name for name in names if name in chosen)


def tempered(space: TraceSpace, beta: Any, names: tuple[str, ...] | None) -> TraceSpace:
    """Return the space of (1); of a space that is tempered already, powers multiply.

    Args:
        space: the measure.
        beta: the inverse temperature, a scalar, traced or not.
        names: what `scored` returned.

    Raises:
        ValueError: the space is tempered already, in other statements.
    """
    if space.power is None:
        return space.tempered(beta, names)
    if space.powered != (None if names is None else frozenset(names)):
        raise ValueError(
            f"`sites` tempers {_listed(names)}, but the measure is tempered already in {_listed(space.powered)}: name "
            "the same statements."
        )
    return space.tempered(space.power * beta, names)


def split_log_density(space: TraceSpace, sites: dict[str, Any], names: tuple[str, ...] | None) -> Split:
    """Return both terms of (1) at a trace."""

    def log_density(beta):
        return tempered(space, beta, names).log_density(sites)

    return Split(*jax.jvp(log_density, (jnp.zeros(()),), (jnp.ones(()),)))


def each_number(name: str, values: Any) -> tuple[float, ...]:
    """Return a setting that is a sequence of finite numbers as a tuple of floats.

    Raises:
        TypeError: it is none.
    """
    try:
        values = tuple(values)
    except TypeError:
        values = (None,)
    if not values or any(isinstance(v, bool) or not isinstance(v, numbers.Real) or not abs(v) < 1e38 for v in values):
        raise TypeError(f"`{name}` must be a sequence of finite numbers, such as (1.0, 2.0, 4.0), got {values!r}.")
    return tuple(float(v) for v in values)


def _listed(names: Any) -> str:
    return "all observations and factors" if names is None else str(sorted(names))
