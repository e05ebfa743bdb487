"""Which values differ between particles, found before anything runs.

A value is *random* if it depends on a draw. Values that are not stay single: the prompt's cache and the weights of a
network exist once however many particles there are, and resampling has nothing to move in them.
"""

from __future__ import annotations

from ppl.ir import Apply, Atom, Block, Draw, Given, Loop, Stretch

__all__ = ["LoopFlags", "loop_flags", "spread", "stretch_flags"]


def spread(block: Block, random_inputs: tuple[bool, ...], shared_given: frozenset[str]) -> tuple[bool, ...]:
    """Return which outputs of a block are random.

    Args:
        block: the program.
        random_inputs: which of its inputs are random.
        shared_given: the sites whose values are given and the same for all particles.
    """
    random: dict[int, bool] = dict(zip(block.inputs, random_inputs, strict=True))

    def read(atom: Atom) -> bool:
        return isinstance(atom, int) and random[atom]

    for node in block.nodes:
        if isinstance(node, Apply):
            flag = any(map(read, node.inputs))
            random.update((v, flag) for v in node.outputs)
        elif isinstance(node, Given):
            shared_given = shared_given - {node.name} if read(node.value) else shared_given | {node.name}
        elif isinstance(node, Draw):
            random[node.output] = node.name not in shared_given
        elif isinstance(node, Loop):
            flags = loop_flags(node, *(tuple(map(read, group)) for group in _groups(node)), shared_given)
            random.update(zip(node.outputs, flags.carry + flags.ys, strict=True))
    return tuple(map(read, block.outputs))


def stretch_flags(stretch: Stretch, flags: dict[int, bool]) -> list[bool]:
    """Return which outputs of a stretch are random, given that of its inputs."""
    flags = dict(flags)
    for node in stretch.nodes:
        flag = any(isinstance(a, int) and flags[a] for a in node.inputs)
        flags.update((v, flag) for v in node.outputs)
    return [flags[v] for v in stretch.outputs]


class LoopFlags(tuple):
    """(carry, ys, done): which carry values and ys of a loop are random, and whether particles stop one by one."""

    __slots__ = ()
    carry = property(lambda self: self[0])
    ys = property(lambda self: self[1])
    done = property(lambda self: self[2])


def loop_flags(
    loop: Loop,
    constants: tuple[bool, ...],
    until_constants: tuple[bool, ...],
    init: tuple[bool, ...],
    xs: tuple[bool, ...],
    shared_given: frozenset[str],
) -> LoopFlags:
    """Iterate a loop's body to the fixpoint of randomness."""
    carry, done = init, False
    while True:
        out = spread(loop.body, constants + carry + xs, shared_given)
        if loop.until is not None:
            done = done or spread(loop.until, until_constants + carry, shared_given)[0]
        new = tuple(
            before or (not same and (after or (done and not scratch)))
            for before, after, same, scratch in zip(carry, out, loop.invariant, loop.scratch, strict=False)
        )
        if new == carry:
            ys = tuple(flag or done for flag in out[len(carry) :])
            return LoopFlags((carry, ys, done))
        carry = new


def _groups(loop: Loop):
    return loop.constants, loop.until_constants, loop.init, loop.xs
