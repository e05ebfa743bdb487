"""Which values differ between particles, found before anything runs.

A value is *random* if it depends on a draw. Values that are not stay single: the prompt's cache and the weights of a
network exist once however many particles there are, and resampling has nothing to move in them.
"""

from __future__ import annotations

from ppl.ir import Apply, Atom, Block, Draw, Given, Loop, Score, Stretch

__all__ = ["LoopFlags", "futures_are_one_step", "loop_flags", "spread", "stretch_flags"]


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


def futures_are_one_step(block: Block, given: frozenset[str]) -> bool:
    """Whether the densities of one future after two particles differ by that of its first iteration only.

    So it is where the next state is a function of an iteration's sites alone, nothing that differs between particles is
    read by all iterations, and no statement follows the loop.

    Args:
        block: a whole program.
        given: the sites whose values are the same for all particles.
    """
    loops = [node for node in block.nodes if isinstance(node, Loop) and node.resamples]
    if len(loops) != 1:
        return False
    (loop,) = loops
    after = block.nodes[block.nodes.index(loop) + 1 :]
    if loop.until is not None or any(isinstance(node, Score | Draw | Loop) for node in after):
        return False
    random = _random_variables(block, given)
    if any(isinstance(a, int) and random[a] for a in (*loop.constants, *loop.xs)):
        return False
    first = len(loop.constants)
    carried = {v: not same for v, same in zip(loop.body.inputs[first:], loop.invariant, strict=False)}
    if any(same and isinstance(a, int) and random[a] for a, same in zip(loop.init, loop.invariant, strict=True)):
        return False
    reads_state = {v: carried.get(v, False) for v in loop.body.inputs}
    for node in loop.body.nodes:
        flag = any(isinstance(a, int) and reads_state[a] for a in node.inputs)
        reads_state.update((v, flag and not isinstance(node, Draw)) for v in node.outputs)
    leaving = zip(loop.body.outputs, loop.invariant, strict=False)
    return not any(isinstance(a, int) and reads_state[a] for a, same in leaving if not same)


def _random_variables(block: Block, given: frozenset[str]) -> dict[int, bool]:
    """Return, for each variable of a whole program, whether it is random."""
    random = dict.fromkeys(block.inputs, False)
    for node in block.nodes:
        if isinstance(node, Draw):
            random[node.output] = node.name not in given
        else:
            drawn = isinstance(node, Loop) and not node.body.names <= given
            flag = drawn or any(isinstance(a, int) and random[a] for a in node.inputs)
            random.update((v, flag) for v in node.outputs)
    return random
