r"""The strings of JSON: which values a schema allows, and how they are written between quotes.

Values are characters, written as themselves or by the short escapes \" \\ \/ \b \f \n \r \t. Lengths, patterns and
formats are all languages over the characters of the value, whose intersection is written at the end.
"""

import functools
import json

from ppl.models.constraints.character_automaton import CharacterAutomaton
from ppl.models.constraints.code_points import ANY, code_points, contains, difference, of
from ppl.models.constraints.ecma_patterns import search
from ppl.models.constraints.expressions import (
    Characters,
    Expression,
    Graph,
    automaton_of,
    embed,
    repeat,
    sequence,
    text,
)
from ppl.models.constraints.patterns import parse

__all__ = ["FORMATS", "matching", "string_values", "written", "written_values"]

_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_MUST_ESCAPE = code_points([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)])
_WRITABLE = code_points([*difference(ANY, _MUST_ESCAPE), *of(_ESCAPES)])

_YEAR = "[1-9][0-9]{3}"
_LEAP_YEAR = "(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+\-]{_CLOCK})"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
}


@functools.lru_cache(maxsize=256)
def matching(pattern: str) -> CharacterAutomaton:
    """The values in which a pattern of ECMA-262 matches somewhere."""
    return automaton_of(search(pattern))


@functools.lru_cache(maxsize=256)
def string_values(
    least: int, most: int | None, patterns: tuple[str, ...], formats: tuple[str, ...]
) -> CharacterAutomaton:
    """The values between two lengths, in code points, that match all patterns and have all formats.

    Raises:
        TooLarge: the automaton would have too many states.
    """
    found = automaton_of(repeat(Characters(ANY), least, most))
    for pattern in patterns:
        found = found & matching(pattern)
    for name in formats:
        found = found & _format(name)
    return found


@functools.cache
def _format(name: str) -> CharacterAutomaton:
    return automaton_of(parse(FORMATS[name]))


@functools.cache
def _writable() -> CharacterAutomaton:
    return automaton_of(repeat(Characters(_WRITABLE), 0, None))


def written_values(values: CharacterAutomaton) -> Expression | None:
    """Strings with their quotes; None where no value can be written: those with other control characters cannot."""
    values = values & _writable()
    if values.is_empty:
        return None
    inner = embed(values)
    edges: list[list[tuple[Expression, int]]] = []
    for row in inner.edges:
        edges.append([])
        for characters, target in row:
            points = characters.points
            plain = difference(points, _MUST_ESCAPE)
            if plain:
                edges[-1].append((Characters(plain), target))
            short = of(_ESCAPES[one] for one in _ESCAPES if contains(points, one))
            if short:
                edges[-1].append((sequence(text("\\"), Characters(short)), target))
    return sequence(text('"'), Graph(edges, inner.accepting), text('"'))


def written(value: str) -> str:
    """One string as JSON text."""
    plain = not any(0xD800 <= ord(one) < 0xE000 for one in value)
    return json.dumps(value, ensure_ascii=not plain)
