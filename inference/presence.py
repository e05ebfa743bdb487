"""Which entries of a trace count, and which sites decide that.

A loop with `until` stops for a trace when its carry says so; iterations after that are absent, and so is all that
follows a prefix. A kernel that moves sites of a fixed number must know

    which entries count now                                    `presence`
    that moving its sites cannot change which ones do          `require_fixed_presence`

The second is read off the program before anything runs: a loop's stopping depends on a site if a path of values leads
from the site to the loop's `until`, through its carry or its constants. What a site's law reads is no such path: its
value is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ppl.dataflow import loop_flags
from ppl.errors import SiteTypeError
from ppl.ir import Apply, Block, Draw, Given, Loop
from ppl.trace import along_times
from ppl.trace_space import TraceSpace

__all__ = ["along", "presence", "require_fixed_presence"]


def presence(space: TraceSpace, sites: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return which entries along their loops' time axes count, bool, for those of some sites that may be absent.

    Args:
        space: the measure; its prefix counts.
        sites: a trace.
        names: the sites in question. Those whose entries are always present are left out.
    """
    may_stop = _in_loops_that_stop(space.staged.block)
    masks: dict[str, Any] = {}
    if may_stop & set(names) or space.stop is not None:
        found = space.evaluate(sites).present
        for name in names:
            if found[name] is not None:
                masks[name] = along_times(found[name], space.sites[name].time_shape, 0)
    if space.stop is not None:  # what follows a loop does not belong to a prefix that ends in it
        for name, steps in _steps_before(space.staged.block).items():
            if name in names and steps > 0:
                begun = space.stop > steps
                masks[name] = masks.get(name, jnp.ones(space.sites[name].time_shape, bool)) & begun
    return masks


def _stopping_loop(block: Block, names: frozenset[str], others: frozenset[str]) -> Loop | None:
    """Return a loop whose stopping depends on some of the named sites, or None.

    Args:
        block: a whole program.
        names: the sites that move.
        others: the sites that stay as they are.
    """
    return _search(block, dict.fromkeys(block.inputs, False), others - names)


def require_fixed_presence(title: str, space: TraceSpace, name: str) -> None:
    """Raise unless moving a site leaves the entries of a trace that count as they are.

    Args:
        title: the kernel, for errors.
        space: the program's traces.
        name: the site.

    Raises:
        SiteTypeError: when a loop stops depends on it.
    """
    loop = _stopping_loop(space.staged.block, frozenset({name}), frozenset(space.staged.sites))
    if loop is not None:
        raise SiteTypeError(
            f"{title} cannot move the site {name!r} ({space.sites[name].where}): when the loop at {loop.where} stops "
            "depends on it, and with it how many sites there are. SuffixMH, Regenerate and ParticleGibbs can."
        )


def along(counts, shape: tuple[int, ...]) -> Any:
    """Repeat a mask of leading axes along the rest of a shape."""
    return jnp.broadcast_to(counts.reshape(counts.shape + (1,) * (len(shape) - counts.ndim)), shape)


def _search(block: Block, moving: dict[int, bool], fixed: frozenset[str]) -> Loop | None:
    def read(atom) -> bool:
        return isinstance(atom, int) and moving[atom]

    for node in block.nodes:
        if isinstance(node, Apply):
            moving.update(dict.fromkeys(node.outputs, any(map(read, node.inputs))))
        elif isinstance(node, Given):
            fixed = fixed - {node.name} if read(node.value) else fixed | {node.name}
        elif isinstance(node, Draw):
            moving[node.output] = node.name not in fixed
        elif isinstance(node, Loop):
            groups = (node.constants, node.until_constants, node.init, node.xs)
            constants, until_constants, init, xs = (tuple(map(read, group)) for group in groups)
            flags = loop_flags(node, constants, until_constants, init, xs, fixed)
            if flags.done:
                return node
            inner = dict(zip(node.body.inputs, constants + flags.carry + xs, strict=True))
            found = _search(node.body, inner, fixed)
            if found is not None:
                return found
            moving.update(zip(node.outputs, flags.carry + flags.ys, strict=True))
    return None


def _in_loops_that_stop(block: Block) -> set[str]:
    statements = block.statements()
    return {node.name for node, loops in statements if any(loop.until is not None for loop in loops)}


def _steps_before(block: Block) -> dict[str, int]:
    """Return how many iterations of outermost loops a prefix has before a site begins."""
    steps, before = 0, {}
    for node in block.nodes:
        if isinstance(node, Loop):
            before.update(dict.fromkeys(node.body.names, steps))
            steps += node.length if node.resamples else 0
        elif isinstance(node, Draw):
            before[node.name] = steps
    return before
