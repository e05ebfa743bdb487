r"""Regular expressions of Python as automata over bytes.

A pattern is read by the parser of Python's own `re`, so that what it means is what `re.fullmatch` means, flags and the
classes `\w`, `\d`, `\s` included, and is written out again in the few forms on which all dialects agree: characters as
explicit sets of code points, groups, alternatives and counted repetitions. outlines-core builds the automaton.

Three habits of its index are avoided. It stops at the first alternative that matches (`a|ab` would miss "ab", `a*?`
everything but ""); after a match it loses tokens that end within a character; and it also prepares for matches that
begin anywhere, which takes 2^20 states for `a[ab]{20}`. Here every pattern stands between two separators, the
noncharacter U+10FFFF, so that no match begins or ends elsewhere: the state after the first separator is the start, and
those from which the second leads to the end accept. In return no text that contains U+10FFFF matches any constraint.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from re import _constants as codes  # the parse tree of `re`, which has no public name
from re import _parser as parser
from typing import Any

import numpy as np
from outlines_core import Index, Vocabulary

from ppl.models.constraints.byte_automaton import ByteAutomaton, from_strings

__all__ = [
    "ANY",
    "NOTHING",
    "CodePoints",
    "automaton_of",
    "code_points",
    "difference",
    "emit",
    "literal",
    "parse",
    "set_pattern",
    "weight",
]

CodePoints = tuple[tuple[int, int], ...]  # disjoint inclusive ranges, increasing

ANY: CodePoints = ((0, 0xD7FF), (0xE000, 0x10FFFE))  # surrogates are no characters; U+10FFFF is the separator
_SEPARATOR = 0x10FFFF
NOTHING = r"[a&&b]"  # the pattern that no text matches
_CLASSES = {
    codes.CATEGORY_DIGIT: r"\d",
    codes.CATEGORY_NOT_DIGIT: r"\D",
    codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S",
    codes.CATEGORY_WORD: r"\w",
    codes.CATEGORY_NOT_WORD: r"\W",
}
_UNSUPPORTED = {
    codes.AT: "an anchor or word boundary that is not at the edge of the pattern",
    codes.ASSERT: "look-around",
    codes.ASSERT_NOT: "look-around",
    codes.GROUPREF: "a back-reference",
    codes.GROUPREF_EXISTS: "a conditional group",
    codes.ATOMIC_GROUP: "an atomic group",
    codes.POSSESSIVE_REPEAT: "a possessive repetition",
}
_STARTS = (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING)
_ENDS = (codes.AT_END, codes.AT_END_STRING)

Alternative = tuple[bool, list[Any], bool]  # anchored at the start, items of the parse tree, anchored at the end


def automaton_of(pattern: str) -> ByteAutomaton:
    """The smallest automaton of a pattern in the common form, which `emit`, `literal` and `set_pattern` write.

    Args:
        pattern: the pattern.

    Returns:
        The automaton of the UTF-8 texts that match as a whole.

    Raises:
        ValueError: outlines-core refuses the pattern.
    """
    if pattern == NOTHING:
        return from_strings([])
    # The second alternative keeps the index from being empty, which it refuses; no state accepts because of it.
    index = Index(rf"\x{{10FFFF}}(?:(?:{pattern})\x{{10FFFF}}|\x{{10FFFF}}\x{{0}})", _all_bytes())
    transitions = index.get_transitions()
    states = sorted({index.get_initial_state(), *transitions, *index.get_final_states()})
    number = {state: position for position, state in enumerate(states)}
    dead = len(states)
    table = np.full((dead + 1, 257), dead, np.int32)
    for state, row in transitions.items():
        table[number[state], list(row)] = [number.get(following, dead) for following in row.values()]
    table = table[:, :256]
    final = np.zeros(dead + 1, bool)
    final[[number[state] for state in index.get_final_states()]] = True
    ended, start = np.arange(dead + 1), number[index.get_initial_state()]
    for byte in chr(_SEPARATOR).encode():
        ended, start = table[ended, byte], table[start, byte]
    return ByteAutomaton(table, final[ended], int(start)).minimal()


@functools.cache
def _all_bytes() -> Vocabulary:
    return Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})


def parse(pattern: str) -> tuple[list[Alternative], int]:
    """Read a pattern of Python's `re`.

    Args:
        pattern: the pattern.

    Returns:
        Its alternatives, each with whether it is anchored at the start and at the end, and the flags set in it.

    Raises:
        ValueError: Python refuses the pattern.
    """
    try:
        tree = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"`pattern` {pattern!r} is no regular expression of Python: {error}.") from error
    return _alternatives(list(tree), False, False), tree.state.flags


def _alternatives(items: list[Any], at_start: bool, at_end: bool) -> list[Alternative]:
    while items and items[0][0] is codes.AT and items[0][1] in _STARTS:
        items, at_start = items[1:], True
    while items and items[-1][0] is codes.AT and items[-1][1] in _ENDS:
        items, at_end = items[:-1], True
    if len(items) == 1:
        operation, argument = items[0]
        if operation is codes.BRANCH:
            return [part for branch in argument[1] for part in _alternatives(list(branch), at_start, at_end)]
        if operation is codes.SUBPATTERN and not argument[1] and not argument[2]:
            return _alternatives(list(argument[3]), at_start, at_end)
    return [(at_start, items, at_end)]


def emit(
    alternatives: Sequence[Alternative],
    flags: int,
    write_set: Callable[[CodePoints], str | None] | None = None,
    around: str = "",
) -> str:
    """Write a parsed pattern in the common form.

    Args:
        alternatives: as `parse` gives them.
        flags: of `re`, as `parse` gives them.
        write_set: the pattern of one character of a set, None if it has none; `set_pattern` if not given.
        around: what may stand before and after an alternative where it is not anchored.

    Returns:
        The pattern; `NOTHING` where no text matches.

    Raises:
        ValueError: something that no automaton can do, or an anchor inside of the pattern.
    """
    write_set = write_set or set_pattern
    written = []
    for at_start, items, at_end in alternatives:
        inner = _sequence(items, flags, write_set)
        if inner is not None:
            written.append(("" if at_start else around) + inner + ("" if at_end else around))
    return "(?:" + "|".join(written) + ")" if written else NOTHING


# The functions below give None for what matches no text, such as `[^\s\S]`: the index cannot have it in a pattern.


def _sequence(items: Iterable[Any], flags: int, write_set: Callable[[CodePoints], str | None]) -> str | None:
    written = [_item(operation, argument, flags, write_set) for operation, argument in items]
    return None if None in written else "".join(written)


def _item(operation: Any, argument: Any, flags: int, write_set: Callable[[CodePoints], str | None]) -> str | None:
    if operation in (codes.LITERAL, codes.NOT_LITERAL, codes.IN, codes.ANY):
        points = _set_of(operation, argument, flags)
        return write_set(points) if points else None
    if operation is codes.BRANCH:
        branches = [_sequence(branch, flags, write_set) for branch in argument[1]]
        possible = [branch for branch in branches if branch is not None]
        return "(?:" + "|".join(possible) + ")" if possible else None
    if operation is codes.SUBPATTERN:
        _, added, removed, inner = argument
        inner = _sequence(inner, (flags | added) & ~removed, write_set)
        return None if inner is None else f"(?:{inner})"
    if operation in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        least, most, inner = argument
        inner = _sequence(inner, flags, write_set)
        if inner is None:
            return None if least else ""
        return f"(?:{inner}){{{least},{'' if most is codes.MAXREPEAT else most}}}"
    raise ValueError(f"a constraint cannot have {_UNSUPPORTED.get(operation, operation)}.")


def _set_of(operation: Any, argument: Any, flags: int) -> CodePoints:
    """The characters that one item of the parse tree matches."""
    if operation is codes.ANY:
        return ANY if flags & re.DOTALL else _complement(((10, 10),))
    if operation is codes.IN:
        members = tuple(argument)
    else:
        members = ((codes.LITERAL, argument),)
        if operation is codes.NOT_LITERAL:
            members = ((codes.NEGATE, None), *members)
    return _members(members, flags & (re.IGNORECASE | re.ASCII))


@functools.lru_cache(maxsize=4096)
def _members(members: tuple[tuple[Any, Any], ...], flags: int) -> CodePoints:
    ranges, source = [], ""
    negated = bool(members) and members[0][0] is codes.NEGATE
    for operation, argument in members[negated:]:
        if operation is codes.CATEGORY:
            ranges.extend(_class(_CLASSES[argument], flags & re.ASCII))
            source += _CLASSES[argument]
        else:
            low, high = argument if operation is codes.RANGE else (argument, argument)
            ranges.append((low, high))
            source += rf"\U{low:08x}-\U{high:08x}"
    plain = code_points(ranges)
    plain = _complement(plain) if negated else plain
    if not flags & re.IGNORECASE:
        return plain
    # Python's rule for capital and small letters, asked of Python for every character that has any of them.
    matches = re.compile(f"[{'^' if negated else ''}{source}]", flags).match
    cased = _cased()
    agreeing = [(ord(character), ord(character)) for character in cased if matches(character)]
    others = _complement(code_points((ord(character), ord(character)) for character in cased))
    return code_points([*_intersection(plain, others), *agreeing])


@functools.cache
def _cased() -> tuple[str, ...]:
    characters = map(chr, range(sys.maxunicode + 1))
    return tuple(one for one in characters if one.lower() != one or one.upper() != one)


@functools.cache
def _class(name: str, flags: int) -> CodePoints:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    return code_points((match.start(), match.end() - 1) for match in re.finditer(f"{name}+", every, flags))


def code_points(ranges: Iterable[tuple[int, int]]) -> CodePoints:
    """Ranges in any order as a set: merged, without surrogates and the separator."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return _intersection(tuple(merged), ANY)


def difference(first: CodePoints, second: CodePoints) -> CodePoints:
    """The characters of one set that are not in another."""
    return _intersection(first, _complement(second))


def _intersection(first: CodePoints, second: CodePoints) -> CodePoints:
    pairs = ((max(a, c), min(b, d)) for a, b in first for c, d in second)
    return tuple((low, high) for low, high in pairs if low <= high)


def _complement(points: CodePoints) -> CodePoints:
    gaps, low = [], 0
    for first, last in points:
        gaps.append((low, first - 1))
        low = last + 1
    gaps.append((low, sys.maxunicode))
    return code_points((low, high) for low, high in gaps if low <= high)


def set_pattern(points: CodePoints) -> str:
    """The pattern of one character of a set that is not empty."""
    return "[" + "".join(rf"\x{{{low:X}}}-\x{{{high:X}}}" for low, high in points) + "]"


def literal(text: str) -> str:
    """The pattern of one text."""
    return "".join(set_pattern(code_points([(ord(character), ord(character))])) for character in text)


def weight(alternatives: Sequence[Alternative]) -> int:
    """About how many states the automaton of a parsed pattern takes, where it does not grow exponentially."""
    return sum(_weight(items) for _, items, _ in alternatives)


def _weight(items: Iterable[Any]) -> int:
    total = 0
    for operation, argument in items:
        if operation is codes.BRANCH:
            total += sum(_weight(branch) for branch in argument[1])
        elif operation is codes.SUBPATTERN:
            total += _weight(argument[3])
        elif operation in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, inner = argument
            total += max(least if most is codes.MAXREPEAT else most, 1) * _weight(inner)
        elif operation is codes.IN and any(kind is codes.CATEGORY for kind, _ in argument):
            total += 100
        else:
            total += 1 if operation is codes.LITERAL else 10
    return total
