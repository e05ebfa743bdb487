r"""Regular expressions of ECMA-262, the dialect of `pattern` in JSON schemas, as expressions over characters.

Read as with the flag `u`, by code points (ECMA-262, section 22.2). What differs from Python: `\d` is [0-9] and `\w`
[A-Za-z0-9_], `\s` has the byte order mark and not U+001C to U+001F, `.` is no line feed, carriage return, U+2028 or
U+2029, `$` is the end alone, `[]` is no character and `[^]` any; `\cJ`, `\u{1F600}` and `\p{Lu}` exist. Where that flag
forbids what has one meaning without it, it has that meaning: `\-`, `\_` and other escaped signs, and `]`, `{` and `}`
by themselves. What only Python has, such as `(?i)`, `\A` and `\Z`, is refused.
"""

import functools
import re
import sys
import unicodedata
from typing import NoReturn

from ppl.models.constraints.code_points import ANY, CodePoints, code_points, complement, of
from ppl.models.constraints.expressions import (
    Assertion,
    Characters,
    Concatenation,
    Expression,
    anything,
    either,
    repeat,
    sequence,
)

__all__ = ["parse", "search"]

_DIGIT = code_points([(0x30, 0x39)])
_WORD = code_points([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_SPACE = code_points([(9, 13), *((one, one) for one in map(ord, " \xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff"))])
_SPACE = code_points([*_SPACE, (0x2000, 0x200A)])
_NO_LINE_END = complement(of("\n\r\u2028\u2029"))
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CLASSES |= {name.upper(): complement(points) for name, points in _CLASSES.items()}
_CONTROLS = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"}
_COUNT = re.compile(r"\{([0-9]+)(?:(,)([0-9]*))?\}")
_CATEGORY_NAMES = {
    "Letter": "L",
    "Cased_Letter": "LC",
    "Uppercase_Letter": "Lu",
    "Lowercase_Letter": "Ll",
    "Titlecase_Letter": "Lt",
    "Modifier_Letter": "Lm",
    "Other_Letter": "Lo",
    "Mark": "M",
    "Combining_Mark": "M",
    "Nonspacing_Mark": "Mn",
    "Spacing_Mark": "Mc",
    "Enclosing_Mark": "Me",
    "Number": "N",
    "Decimal_Number": "Nd",
    "digit": "Nd",
    "Letter_Number": "Nl",
    "Other_Number": "No",
    "Punctuation": "P",
    "punct": "P",
    "Connector_Punctuation": "Pc",
    "Dash_Punctuation": "Pd",
    "Open_Punctuation": "Ps",
    "Close_Punctuation": "Pe",
    "Initial_Punctuation": "Pi",
    "Final_Punctuation": "Pf",
    "Other_Punctuation": "Po",
    "Symbol": "S",
    "Math_Symbol": "Sm",
    "Currency_Symbol": "Sc",
    "Modifier_Symbol": "Sk",
    "Other_Symbol": "So",
    "Separator": "Z",
    "Space_Separator": "Zs",
    "Line_Separator": "Zl",
    "Paragraph_Separator": "Zp",
    "Other": "C",
    "Control": "Cc",
    "cntrl": "Cc",
    "Format": "Cf",
    "Surrogate": "Cs",
    "Private_Use": "Co",
    "Unassigned": "Cn",
}


@functools.lru_cache(maxsize=256)
def search(pattern: str) -> Expression:
    """The texts in which a pattern matches somewhere, as the keyword `pattern` asks.

    Args:
        pattern: a pattern of ECMA-262.

    Returns:
        The expression.

    Raises:
        ValueError: no such pattern, or what no automaton can do; the message says what to write instead.
    """
    return sequence(anything(), parse(pattern), anything())


def parse(pattern: str) -> Expression:
    """The texts that a pattern matches as a whole; see `search` for arguments and errors."""
    reader = _Reader(pattern)
    try:
        found = reader.alternatives()
    except RecursionError as error:
        raise ValueError(f"pattern {pattern!r} nests too deep to be read. Nest fewer groups.") from error
    if reader.at < len(pattern):
        reader.fail("a `)` without its `(`; write `\\)` for the sign")
    return found


class _Reader:
    """A pattern, and how far it has been read."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.at = 0

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"pattern {self.pattern!r} has, at position {self.at}, {what}.")

    def ahead(self, written: str) -> bool:
        return self.pattern.startswith(written, self.at)

    def take(self, written: str) -> bool:
        if self.ahead(written):
            self.at += len(written)
            return True
        return False

    def next(self) -> str:
        if self.at == len(self.pattern):
            self.fail("its end where more must follow")
        self.at += 1
        return self.pattern[self.at - 1]

    def alternatives(self) -> Expression:
        found = [self.alternative()]
        while self.take("|"):
            found.append(self.alternative())
        return either(found)

    def alternative(self) -> Expression:
        parts = []
        while self.at < len(self.pattern) and not self.ahead("|") and not self.ahead(")"):
            parts.append(self.term())
        return Concatenation(tuple(parts))

    def term(self) -> Expression:
        if self.take("^"):
            return self.bare(Assertion("start"))
        if self.take("$"):
            return self.bare(Assertion("end"))
        if self.take(r"\b"):
            return self.bare(Assertion("boundary", _WORD))
        if self.take(r"\B"):
            return self.bare(Assertion("inside", _WORD))
        if self.at_quantifier():
            self.fail("a quantifier with nothing before it")
        return self.quantified(self.atom())

    def bare(self, assertion: Assertion) -> Assertion:
        if self.at_quantifier():
            self.fail("a quantifier after an assertion, which ECMA-262 does not have")
        return assertion

    def at_quantifier(self) -> bool:
        return self.at < len(self.pattern) and (
            self.pattern[self.at] in "*+?" or _COUNT.match(self.pattern, self.at) is not None
        )

    def quantified(self, atom: Expression) -> Expression:
        if not self.at_quantifier():
            return atom
        counted = _COUNT.match(self.pattern, self.at)
        if counted:
            least, comma, highest = counted.groups()
            most = (int(highest) if highest else None) if comma else int(least)
            least = int(least)
            if most is not None and most < least:
                self.fail(f"{counted[0]!r}, whose numbers are out of order")
            self.at = counted.end()
        else:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self.next()]
        self.take("?")  # shorter texts first: the same texts
        if self.ahead("+"):
            self.fail("a possessive quantifier, which is Python's; ECMA-262 has none")
        if self.at_quantifier():
            self.fail("a quantifier after a quantifier")
        return repeat(atom, least, most)

    def atom(self) -> Expression:
        if self.take("("):
            return self.group()
        if self.take("["):
            return Characters(self.set())
        if self.take("."):
            return Characters(_NO_LINE_END)
        if self.take("\\"):
            return Characters(self.escape(inside=False))
        if re.match(r"\{,[0-9]*\}", self.pattern[self.at :]):
            self.fail("a count without its first number; write `{0,n}`")
        return Characters(of(self.next()))

    def group(self) -> Expression:
        if self.ahead("?="):
            self.fail(f"a lookahead. {_INSTEAD_OF_LOOKING}")
        if self.ahead("?!"):
            self.fail(f"a negative lookahead. {_INSTEAD_OF_LOOKING}")
        if self.ahead("?<=") or self.ahead("?<!"):
            self.fail(f"a lookbehind. {_INSTEAD_OF_LOOKING}")
        if self.take("?<"):
            if not re.match(r"[\w$]+>", self.pattern[self.at :]):
                self.fail("a group without a name; write `(?<name>...)`")
            self.at = self.pattern.index(">", self.at) + 1
        elif not self.take("?:") and self.ahead("?"):
            self.fail(
                f"{self.pattern[self.at - 1 : self.at + 3]!r}, which is not ECMA-262's: groups are `(...)`, `(?:...)` "
                "and `(?<name>...)`, and flags cannot be set: write capital and small letters out, as in `[aA]`"
            )
        inner = self.alternatives()
        if not self.take(")"):
            self.fail("its end where `)` must follow")
        return inner

    def set(self) -> CodePoints:
        negated = self.take("^")
        ranges: list[tuple[int, int]] = []
        while not self.take("]"):
            low = self.member()
            if self.ahead("-") and not self.ahead("-]"):
                begin, self.at = self.at, self.at + 1
                high = self.member()
                one, other = _single(low), _single(high)
                if one is None or other is None:
                    self.at = begin
                    self.fail("a range that begins or ends with a class; write `\\-` for the sign")
                if one > other:
                    self.at = begin
                    self.fail("a range whose ends are out of order")
                ranges.append((one, other))
            else:
                ranges.extend(low if isinstance(low, tuple) else [(low, low)])
        points = code_points(ranges)
        return complement(points) if negated else points

    def member(self) -> CodePoints | int:
        """A class, or one code point, which may be half of a pair that stands alone."""
        if self.take("\\"):
            return self.escape(inside=True, halves=True)
        return ord(self.next())

    def escape(self, *, inside: bool, halves: bool = False) -> CodePoints | int:
        begin = self.at - 1
        one = self.next()
        if one in _CLASSES:
            return _CLASSES[one]
        if one in "pP":
            return self.category(one == "P")
        code = None
        if one in _CONTROLS:
            code = ord(_CONTROLS[one])
        elif one == "b" and inside:
            code = 8
        elif one == "0" and not self.pattern[self.at : self.at + 1].isdigit():
            code = 0
        elif one == "c" and re.match("[A-Za-z]", self.pattern[self.at :]):
            code = ord(self.next()) % 32
        elif one == "x":
            code = self.hexadecimal("[0-9A-Fa-f]{2}")
        elif one == "u":
            code = self.unicode()
        elif not (one.isalnum() and one.isascii()):
            code = ord(one)
        if code is None:
            self.at = begin
            if one.isdigit() or one == "k":
                self.fail("a back-reference or an octal number. Write the cases out, or `\\xHH` for a character")
            self.fail(
                f"{self.pattern[begin : begin + 2]!r}, which ECMA-262 does not have: anchors are `^` and `$`, "
                "characters `\\xHH` and `\\uHHHH`"
            )
        return code if halves else code_points([(code, code)])

    def hexadecimal(self, digits: str) -> int:
        found = re.compile(digits).match(self.pattern, self.at)
        if not found:
            self.at -= 2
            self.fail("an escape without its hexadecimal digits")
        self.at = found.end()
        return int(found[0].strip("{}"), 16)

    def unicode(self) -> int:
        if self.ahead("{"):
            code = self.hexadecimal(r"\{[0-9A-Fa-f]+\}")
            if code > sys.maxunicode:
                self.fail(f"the code point {code:X}, which is none")
            return code
        code = self.hexadecimal("[0-9A-Fa-f]{4}")
        low = re.compile(r"\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})").match(self.pattern, self.at)
        if 0xD800 <= code < 0xDC00 and low:
            self.at = low.end()
            return 0x10000 + (code - 0xD800) * 0x400 + int(low[1], 16) - 0xDC00
        return code

    def category(self, negated: bool) -> CodePoints:
        found = re.compile(r"\{(?:(?:General_Category|gc)=)?(\w+)\}").match(self.pattern, self.at)
        points = _category(found[1]) if found else None
        if points is None:
            self.fail(
                r"a property of characters that is not supported: `\p{...}` may have a general category, such as L, "
                "Lu or Nd, ASCII, Any or Assigned"
            )
        self.at = found.end()
        return complement(points) if negated else points


_INSTEAD_OF_LOOKING = (
    "Let `pattern` say what the text is, without it; put two patterns side by side in `allOf`; or leave texts out of "
    "the whole constraint with `& ~Regex(...)`"
)


def _single(member: CodePoints | int) -> int | None:
    return member if isinstance(member, int) else None


@functools.cache
def _category(name: str) -> CodePoints | None:
    if name in ("Any", "ASCII"):
        return ANY if name == "Any" else code_points([(0, 127)])
    if name == "Assigned":
        return complement(_category("Cn"))
    wanted = _CATEGORY_NAMES.get(name, name)
    wanted = ("Lu", "Ll", "Lt") if wanted == "LC" else (wanted,)
    parts = [points for kind, points in _categories().items() if kind.startswith(wanted)]
    known = wanted[0] in {*_categories(), *(kind[0] for kind in _categories())}
    return code_points(part for points in parts for part in points) if known or wanted[0] == "Cs" else None


@functools.cache
def _categories() -> dict[str, CodePoints]:
    ranges: dict[str, list[tuple[int, int]]] = {}
    for code in range(sys.maxunicode + 1):
        ranges.setdefault(unicodedata.category(chr(code)), []).append((code, code))
    return {kind: code_points(parts) for kind, parts in ranges.items()}
