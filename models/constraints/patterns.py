r"""Regular expressions of Python, as expressions over characters.

A pattern is read by the parser of Python's own `re`, so that what it means is what `re.fullmatch` means, flags and the
classes `\w`, `\d`, `\s` included. Which repetition tries longer texts first makes no difference to what matches as a
whole; `(?>a)` and `a++`, which give nothing back, do make one, and are refused.
"""

import functools
import re
import sys
from collections.abc import Iterable
from re import _constants as codes  # the parse tree of `re`, which has no public name
from re import _parser as parser
from typing import Any

from ppl.models.constraints.code_points import (
    ANY,
    CodePoints,
    code_points,
    complement,
    difference,
    intersection,
    of,
)
from ppl.models.constraints.expressions import (
    NOTHING,
    Assertion,
    Characters,
    Concatenation,
    Expression,
    either,
    repeat,
)

__all__ = ["parse"]

_CLASSES = {
    codes.CATEGORY_DIGIT: r"\d",
    codes.CATEGORY_NOT_DIGIT: r"\D",
    codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S",
    codes.CATEGORY_WORD: r"\w",
    codes.CATEGORY_NOT_WORD: r"\W",
}
_LOOK = (
    "look-around, `(?=b)` and the like. What has to match two patterns is `Regex(a) & Regex(b)`, what must not match "
    "one `Regex(a) & ~Regex(b)`, each for the whole text"
)
_GREEDY = (
    "which gives nothing back, so that what it matches depends on the order of trying. Write `(?:...)` and `*`, `+`, "
    "`?`, `{m,n}` where that makes no difference, and `Regex(a) & ~Regex(b)` where something is to be left out"
)
_UNSUPPORTED = {
    codes.ASSERT: _LOOK,
    codes.ASSERT_NOT: _LOOK,
    codes.GROUPREF: "a back-reference: no automaton remembers a text of any length. Write its cases out, as in "
    "`'a'|\"a\"` for `(['\"])a\\1`",
    codes.GROUPREF_EXISTS: "a conditional group. Write its two cases as alternatives, `ab|c` for `(a)?(?(1)b|c)`",
    codes.ATOMIC_GROUP: f"an atomic group, {_GREEDY}",
    codes.POSSESSIVE_REPEAT: f"a possessive repetition, {_GREEDY}",
}
_NOTHING_IS_INSIDE = bool(re.fullmatch(r"\B", ""))  # a rule that Python 3.14 changed
_ASSERTIONS = {
    codes.AT_BEGINNING: "start",
    codes.AT_BEGINNING_STRING: "start",
    codes.AT_END: "end or last newline",
    codes.AT_END_STRING: "end",
    codes.AT_BOUNDARY: "boundary",
    codes.AT_NON_BOUNDARY: "inside",
}


def parse(pattern: str) -> Expression:
    """The texts that `re.fullmatch` matches.

    Args:
        pattern: a pattern of Python's `re`.

    Returns:
        The expression.

    Raises:
        ValueError: Python refuses the pattern, or it has what no automaton can do; the message says what, and what to
            write instead.
    """
    try:
        tree = parser.parse(pattern)
        return _sequence(tree, tree.state.flags)
    except (re.error, OverflowError) as error:
        raise ValueError(f"`pattern` {pattern!r} is no regular expression of Python: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"`pattern` {pattern!r} nests too deep to be read. Nest fewer groups.") from error
    except _UnsupportedError as error:
        raise ValueError(f"`pattern` {pattern!r} cannot be compiled: an automaton cannot have {error}.") from error


class _UnsupportedError(Exception):
    pass


def _sequence(items: Iterable[Any], flags: int) -> Expression:
    return Concatenation(tuple(_item(operation, argument, flags) for operation, argument in items))


def _item(operation: Any, argument: Any, flags: int) -> Expression:
    if operation in (codes.LITERAL, codes.NOT_LITERAL, codes.IN, codes.ANY):
        return Characters(_set_of(operation, argument, flags))
    if operation is codes.BRANCH:
        return either(_sequence(branch, flags) for branch in argument[1])
    if operation is codes.SUBPATTERN:
        _, added, removed, inner = argument
        return _sequence(inner, (flags | added) & ~removed)
    if operation in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        least, most, inner = argument
        return repeat(_sequence(inner, flags), int(least), None if most is codes.MAXREPEAT else int(most))
    if operation is codes.AT:
        kind = _ASSERTIONS[argument]
        if flags & re.MULTILINE and argument in (codes.AT_BEGINNING, codes.AT_END):
            kind = "line start" if argument is codes.AT_BEGINNING else "line end"
        word = _class(r"\w", flags & re.ASCII) if kind in ("boundary", "inside") else ()
        return Assertion(kind, word, _NOTHING_IS_INSIDE)
    if operation is codes.FAILURE or (operation is codes.ASSERT_NOT and not len(argument[1])):
        return NOTHING  # `(?!)`
    raise _UnsupportedError(_UNSUPPORTED.get(operation, operation))


def _set_of(operation: Any, argument: Any, flags: int) -> CodePoints:
    """The characters that one item of the parse tree matches."""
    if operation is codes.ANY:
        return ANY if flags & re.DOTALL else complement(of("\n"))
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
            source += rf"\U{low:08x}" + ("" if operation is codes.LITERAL else rf"-\U{high:08x}")
    plain = code_points(ranges)
    plain = complement(plain) if negated else plain
    if not flags & re.IGNORECASE:
        return plain
    # Python's rule for capital and small letters, asked of Python for every character that has any of them.
    matches = re.compile(f"[{'^' if negated else ''}{source}]", flags).match
    cased = _cased()
    agreeing = of(character for character in cased if matches(character))
    return code_points([*difference(plain, of(cased)), *intersection(agreeing, of(cased))])


@functools.cache
def _cased() -> tuple[str, ...]:
    characters = map(chr, range(sys.maxunicode + 1))
    return tuple(one for one in characters if one.lower() != one or one.upper() != one)


@functools.cache
def _class(name: str, flags: int) -> CodePoints:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    return code_points((match.start(), match.end() - 1) for match in re.finditer(f"{name}+", every, flags))
