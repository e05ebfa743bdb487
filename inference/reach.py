"""Which sites a chain can change: all that are free, else what it draws is not the posterior.

A kernel that leaves pi as it is may leave some sites of a trace as they are, which is what compositions are made of. A
chain of it keeps those at the values of its start for ever: its draws are of the posterior *given* them. So a chain is
refused unless each free sample site is among the `sites` of its kernel's moves. Sites without entries need no moves.
"""

from __future__ import annotations

import math
from typing import Any

from ppl.display import brief
from ppl.errors import SiteValueError
from ppl.inference.trace_kernel import Moves
from ppl.trace_space import TraceSpace

__all__ = ["require_reach"]

_SHOWN = 4  # sites that a message describes


def require_reach(algorithm: Any, kernel: Any, moves: Moves, space: TraceSpace) -> None:
    """Raise unless a chain's moves can change every free site.

    Args:
        algorithm: the chain's, for errors.
        kernel: its kernel.
        moves: the kernel's moves.
        space: the program's traces.

    Raises:
        TypeError: the moves do not say which sites they change.
        SiteValueError: a free site is left out; names it, and kernels that move it.
    """
    reached = getattr(moves, "sites", None)
    if reached is None:
        raise TypeError(f"{type(moves).__name__} of {kernel!r} must say in `sites` which sites it may change.")
    left = [site for name, site in space.sites.items() if name not in reached and math.prod(site.shape) > 0]
    if not left:
        return
    described = "; ".join(f"{site.name!r} ({site.where}), which {_movers(site)} move" for site in left[:_SHOWN])
    more = f"; and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    first = left[0]
    other = f"{_movers(first).split(',')[0]}({first.name!r})"
    raise SiteValueError(
        f"`kernel` of {type(algorithm).__name__}, {brief(kernel)}, cannot change every free site: a chain would keep "
        f"{'this one' if len(left) == 1 else 'these'} as it began: {described}{more}. Compose kernels, such as "
        f"Sequence({brief(kernel)}, {other}). To hold a site at a value, give it: "
        f"ppl.condition(program, {{{first.name!r}: value}})."
    )


def _movers(site: Any) -> str:
    """Return the kernels that move a site, as a phrase that begins with the plainest."""
    finite = site.is_discrete and site.support is not None and site.support.values is not None
    gradient = not site.is_discrete and site.support is not None
    names = [*(("NUTS", "HMC", "MALA") if gradient else ()), *(("Gibbs",) if finite else ()), "Regenerate", "MH"]
    names += ["ParticleGibbs", "SuffixMH"] if site.time_shape else ["ParticleGibbs"]
    return f"{', '.join(names[:-1])} and {names[-1]}"
