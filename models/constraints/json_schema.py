r"""JSON that follows a schema, as a regular set of texts.

The schema becomes a pattern by recursion, one rule a keyword. What is written always validates, and every keyword that
is not supported is refused: none is ignored. In return a schema stands for fewer texts than it could:

- properties come in the order of the schema, and none but those it names; `additionalProperties` alone gives a map,
- whitespace stands only where `whitespace` puts it, and strings use the short escapes (\" \\ \/ \b \f \n \r \t) alone,
- integers have at most 19 digits, other numbers 17 decimals and an exponent of two digits; a number with bounds has at
  most 6 decimals and no exponent, so that its binary value keeps them.

Values nest as deep as the schema says: a recursive one is not regular. `oneOf` needs branches of different types, whose
values cannot coincide. Source of the keywords: JSON Schema, draft 2020-12. The rules are ours: outlines-core's own
translation passes over `minimum`, `uniqueItems`, `not` and others.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ppl.models.constraints.byte_automaton import ByteAutomaton, product
from ppl.models.constraints.number_ranges import decimals_between, integers_between
from ppl.models.constraints.patterns import (
    ANY,
    NOTHING,
    CodePoints,
    automaton_of,
    code_points,
    difference,
    emit,
    literal,
    parse,
    set_pattern,
    weight,
)
from ppl.models.constraints.regular import Constraint, Regex

__all__ = ["JsonSchema"]

_MOST_STATES = 50_000  # estimated; the index of such an automaton takes about ten seconds
_ANNOTATIONS = frozenset(
    "$schema $id $comment $defs definitions title description default examples deprecated readOnly writeOnly "
    "discriminator".split()
)
_OF_TYPE = {
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems", "uniqueItems")),
    "object": frozenset(("properties", "required", "additionalProperties", "minProperties", "maxProperties")),
    "boolean": frozenset(),
    "null": frozenset(),
}
_COMBINING = frozenset(("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"))
_SUPPORTED = sorted(_COMBINING.union(*_OF_TYPE.values()))

_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_MUST_ESCAPE = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C))
_YEAR = "[1-9][0-9]{3}"
_LEAP_YEAR = "(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+\-]{_CLOCK})"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}


class _Piece(NamedTuple):
    """A pattern and about how many states it takes. Where no text is possible, None stands in its place."""

    pattern: str
    states: int


@dataclasses.dataclass(frozen=True)
class JsonSchema(Constraint):
    """The JSON texts that a schema allows.

    Attributes:
        schema: a JSON schema as a mapping, as its JSON text, or a class with `model_json_schema` (pydantic's models);
            its JSON text after construction.
        whitespace: the pattern of the whitespace that may stand inside of brackets and after commas and colons.

    Raises:
        TypeError: `schema` is none of these.
        ValueError: the schema is no JSON, has a keyword that is not supported (the message names it, its path and what
            is), or allows no text at all; or `whitespace` matches something else.

    Example:
        >>> JsonSchema({"type": "array", "items": {"type": "boolean"}}).matches("[true, false]")
        True
    """

    schema: str | Mapping[str, Any] | Any
    whitespace: str = "[ ]?"

    def __post_init__(self) -> None:
        schema = self.schema
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ValueError(f"`schema` {schema!r} is no JSON: {error}.") from error
        if not isinstance(schema, (Mapping, bool)):
            raise TypeError(f"`schema` must be a mapping, JSON text or a pydantic model, got {self.schema!r}.")
        try:
            object.__setattr__(self, "schema", json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`schema` cannot be written as JSON: {error}.") from error
        blank = Regex(self.whitespace).language
        if not product(blank, Regex(r"[ \t\n\r]*").language.complement(), union=False).is_empty:
            raise ValueError(f"`whitespace` must match whitespace alone, got {self.whitespace!r}.")
        _ = self.language

    @functools.cached_property
    def language(self) -> ByteAutomaton:
        """The automaton over bytes."""
        schema = json.loads(self.schema)
        spaces, flags = parse(self.whitespace)
        piece = _Translation(schema, _Piece(emit(spaces, flags), weight(spaces))).value(schema, "#", ())
        if piece is None:
            raise ValueError(f"no JSON text satisfies `schema` {self.schema}.")
        if piece.states > _MOST_STATES:
            raise ValueError(
                f"`schema` needs an automaton of about {piece.states} states; at most {_MOST_STATES} are built. Lower "
                "its counts (maxLength, maxItems)."
            )
        return automaton_of(piece.pattern)


class _Translation:
    """One schema on its way to a pattern; every method returns a piece, or None where no text is possible."""

    def __init__(self, root: Any, space: _Piece):
        self.root = root
        self.space = space
        self.comma = _sequence(_text(","), space)

    def value(self, schema: Any, path: str, references: tuple[str, ...]) -> _Piece | None:
        if schema is False:
            return None
        if schema is True or schema == {}:
            _refuse(path, "any JSON value is allowed here, to any depth: say which `type`")
        if not isinstance(schema, dict):
            _refuse(path, f"{schema!r} is no schema")
        if "$id" in schema and schema is not self.root:
            _refuse(path, "keyword '$id' inside of the schema, which would change what references mean")
        for keyword in schema:
            if keyword not in _SUPPORTED and keyword not in _ANNOTATIONS:
                _refuse(path, f"keyword {keyword!r}")
        for keyword in ("$ref", "const", "enum", "anyOf", "oneOf", "allOf"):
            if keyword in schema:
                beside = {"type"} if keyword in ("const", "enum") else set()
                others = sorted(set(schema) - _ANNOTATIONS - {keyword} - beside)
                if others:
                    _refuse(path, f"keyword {others[0]!r} beside {keyword!r}")
                return self._combined(keyword, schema, path, references)
        types = self._types(schema, path)
        return _either([self._typed(kind, schema, path, references) for kind in types])

    def _types(self, schema: dict, path: str) -> list[str]:
        if "type" not in schema:
            _refuse(path, "a schema without `type`, which allows values of every other type")
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        for kind in types:
            if not isinstance(kind, str) or kind not in _OF_TYPE:
                _refuse(path, f"type {kind!r} (types are {', '.join(_OF_TYPE)})")
        return [kind for kind in dict.fromkeys(types) if not (kind == "integer" and "number" in types)]

    def _combined(self, keyword: str, schema: dict, path: str, references: tuple[str, ...]) -> _Piece | None:
        argument, inside = schema[keyword], f"{path}/{keyword}"
        if keyword == "$ref":
            if argument in references:
                _refuse(path, f"the recursive reference {argument!r}")
            return self.value(self._resolve(argument, path), str(argument), (*references, argument))
        if not isinstance(argument, list) and keyword != "const":
            _refuse(inside, f"{argument!r} where a list belongs")
        if keyword in ("const", "enum"):
            types = self._types(schema, path) if "type" in schema else list(_OF_TYPE)
            values = [argument] if keyword == "const" else argument
            return _either([self._constant(one) for one in values if any(_is_of(one, kind) for kind in types)])
        if keyword == "allOf" and len(argument) != 1:
            _refuse(path, "keyword 'allOf' with several schemas")
        if keyword == "oneOf" and len(argument) > 1:
            seen: set[str] = set()
            for position, branch in enumerate(argument):
                types = self._possible_types(branch, f"{inside}/{position}", references)
                if types & seen:
                    _refuse(inside, f"two branches of type {sorted(types & seen)[0]!r} (use anyOf)")
                seen |= types
        return _either([self.value(one, f"{inside}/{position}", references) for position, one in enumerate(argument)])

    def _possible_types(self, schema: Any, path: str, references: tuple[str, ...]) -> set[str]:
        """The types of a branch's values; the whole numbers among them are numbers."""
        if schema is False:
            return set()
        if not isinstance(schema, dict):
            _refuse(path, f"{schema!r} within 'oneOf'")
        if "$ref" in schema and schema["$ref"] not in references:
            reference = schema["$ref"]
            return self._possible_types(self._resolve(reference, path), path, (*references, reference))
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return {kind for one in values for kind in _OF_TYPE if kind != "integer" and _is_of(one, kind)}
        return {"number" if kind == "integer" else kind for kind in self._types(schema, path)}

    def _resolve(self, reference: Any, path: str) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            _refuse(path, f"the reference {reference!r}: only those within the schema (#/...) can be followed")
        target = self.root
        for part in reference.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or name not in target:
                _refuse(path, f"the reference {reference!r}, which leads nowhere")
            target = target[name]
        return target

    def _constant(self, value: Any) -> _Piece:
        if isinstance(value, dict):
            members = [_sequence(self._name(name), self._constant(one)) for name, one in value.items()]
            return self._bracket("{", self._list(members), "}")
        if isinstance(value, list):
            return self._bracket("[", self._list([self._constant(one) for one in value]), "]")
        return _text(_written(value))

    def _typed(self, kind: str, schema: dict, path: str, references: tuple[str, ...]) -> _Piece | None:
        if kind == "null":
            return _text("null")
        if kind == "boolean":
            return _either([_text("true"), _text("false")])
        if kind in ("integer", "number"):
            return _number(kind, schema, path)
        if kind == "string":
            return _sequence(_text('"'), _string(schema, path), _text('"'))
        return (self._array if kind == "array" else self._object)(schema, path, references)

    def _array(self, schema: dict, path: str, references: tuple[str, ...]) -> _Piece | None:
        if schema.get("uniqueItems", False):
            _refuse(path, "keyword 'uniqueItems'")
        prefix, least, most = schema.get("prefixItems", []), _count(schema, "minItems", path), None
        if prefix and "2020-12" not in schema.get("$schema", self._draft):
            _refuse(path, "keyword 'prefixItems' in a draft that does not know it")
        if not isinstance(prefix, list):
            _refuse(path, f"keyword 'prefixItems' = {prefix!r}, which is no list")
        if "maxItems" in schema:
            most = _count(schema, "maxItems", path)
            if most < least:
                return None
        fixed = [
            self.value(one, f"{path}/prefixItems/{position}", references)
            for position, one in enumerate(prefix[: len(prefix) if most is None else most])
        ]
        if None in fixed:
            fixed, most = fixed[: fixed.index(None)], fixed.index(None)
        rest = None
        if most is None or most > len(fixed):
            rest = self.value(schema.get("items", True), f"{path}/items", references)
        body: _Piece | None = _text("")
        least_more = max(least - len(fixed), 0)
        if rest is not None:
            most_more = None if most is None else most - len(fixed)
            body = _repeat(_sequence(self.comma, rest), least_more, most_more)
        elif least_more:
            return None
        if not fixed:  # the first of the rest has no comma before it
            if rest is not None:
                most_after = None if most is None else most - 1
                filled = _sequence(rest, _repeat(_sequence(self.comma, rest), max(least - 1, 0), most_after))
                body = filled if least else _either([_text(""), filled])
            return self._bracket("[", body, "]")
        for position in reversed(range(len(fixed))):
            body = _sequence(self.comma if position else _text(""), fixed[position], body)
            if position >= least:
                body = _either([_text(""), body])
        return self._bracket("[", body, "]")

    def _object(self, schema: dict, path: str, references: tuple[str, ...]) -> _Piece | None:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            _refuse(path, "`properties` that are no mapping, or `required` that is no list")
        unknown = [name for name in required if name not in properties]
        if unknown:
            _refuse(path, f"{unknown[0]!r} in 'required' without a schema in 'properties'")
        least = _count(schema, "minProperties", path)
        most = _count(schema, "maxProperties", path) if "maxProperties" in schema else None
        if not properties:
            return self._map(schema, path, references, least, most)
        if least > len(set(required)):
            _refuse(path, "keyword 'minProperties' above the number of required properties")
        if most is not None and most < len(properties):
            _refuse(path, "keyword 'maxProperties' below the number of properties")
        # What follows once something is written, and what follows while nothing is.
        after, before = _text(""), _text("")
        for name in reversed(properties):
            inner = self.value(properties[name], f"{path}/properties/{name}", references)
            if inner is None and name in required:
                return None
            if inner is None:
                continue
            member = _sequence(self._name(name), inner)
            first = _sequence(member, after)
            following = _sequence(self.comma, member)
            if name in required:
                before, after = first, _sequence(following, after)
            else:
                before, after = _either([first, before]), _sequence(_repeat(following, 0, 1), after)
        return self._bracket("{", before, "}")

    def _map(self, schema: dict, path: str, references: tuple[str, ...], least: int, most: int | None) -> _Piece | None:
        """An object with free names. A name that comes twice counts once, so no more than one can be asked for."""
        if "additionalProperties" not in schema and "properties" not in schema and most != 0:
            _refuse(path, "an object without 'properties' and 'additionalProperties', whose values may be anything")
        if least > 1:
            _refuse(path, "keyword 'minProperties' above 1 for free names")
        additional = schema.get("additionalProperties", False)
        inner = None if most == 0 else self.value(additional, f"{path}/additionalProperties", references)
        if inner is None:
            return None if least else self._bracket("{", _text(""), "}")
        member = _sequence(_text('"'), _string({}, path), _text('"'), _text(":"), self.space, inner)
        more = _repeat(_sequence(self.comma, member), 0, None if most is None else most - 1)
        filled = _sequence(member, more)
        return self._bracket("{", filled if least else _either([_text(""), filled]), "}")

    @property
    def _draft(self) -> str:
        return self.root.get("$schema", "2020-12") if isinstance(self.root, dict) else "2020-12"

    def _name(self, name: str) -> _Piece:
        return _sequence(_text(_written(name)), _text(":"), self.space)

    def _list(self, members: list[_Piece]) -> _Piece:
        return _sequence(
            *(_sequence(self.comma if position else _text(""), one) for position, one in enumerate(members))
        )

    def _bracket(self, opening: str, body: _Piece | None, closing: str) -> _Piece | None:
        return _sequence(_text(opening), self.space, body, self.space, _text(closing))


def _refuse(path: str, what: str) -> None:
    raise ValueError(f"`schema` is not supported at {path}: {what}. Supported keywords are {', '.join(_SUPPORTED)}.")


def _count(schema: dict, keyword: str, path: str) -> int:
    value = schema.get(keyword, 0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value != int(value):
        _refuse(path, f"{keyword!r} = {value!r}, which is no count")
    return int(value)


def _is_of(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return not isinstance(value, bool) and (whole or (kind == "number" and isinstance(value, float)))
    python = {"string": str, "array": list, "object": dict, "boolean": bool, "null": type(None)}
    return isinstance(value, python[kind])


def _written(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    plain = all(not 0xD800 <= ord(one) < 0xE000 and one != "\U0010ffff" for one in text)
    return text if plain else json.dumps(value)


def _number(kind: str, schema: dict, path: str) -> _Piece | None:
    bounds = {}
    for keyword in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        if keyword in schema:
            bound = schema[keyword]
            if isinstance(bound, bool) or not isinstance(bound, (int, float)):
                _refuse(path, f"{keyword!r} = {bound!r}, which is no number")
            if abs(bound) >= 10**9 if kind == "number" else abs(bound) >= 2**53:
                _refuse(path, f"{keyword!r} = {bound!r}, which is too large")
            if kind == "number" and bound != int(bound):
                _refuse(path, f"{keyword!r} = {bound!r}: bounds of a number must be whole")
            bounds[keyword] = bound
    if kind == "integer":
        low = [-(-bounds["minimum"] // 1)] if "minimum" in bounds else []
        low += [bounds["exclusiveMinimum"] // 1 + 1] if "exclusiveMinimum" in bounds else []
        high = [bounds["maximum"] // 1] if "maximum" in bounds else []
        high += [-(-bounds["exclusiveMaximum"] // 1) - 1] if "exclusiveMaximum" in bounds else []
        pattern = integers_between(int(max(low)) if low else None, int(min(high)) if high else None)
    elif bounds:
        low = [(int(bounds[key]), key != "minimum") for key in ("minimum", "exclusiveMinimum") if key in bounds]
        high = [(int(bounds[key]), key == "maximum") for key in ("maximum", "exclusiveMaximum") if key in bounds]
        lower, upper = max(low, default=None), min(high, default=None)
        pattern = decimals_between(
            None if lower is None else lower[0],
            None if upper is None else upper[0],
            open_below=lower is not None and lower[1],
            open_above=upper is not None and not upper[1],
        )
    else:
        pattern = r"-?(?:0|[1-9][0-9]{0,18})(?:\.[0-9]{1,17})?(?:[eE][+\-]?[0-9]{1,2})?"
    return None if pattern is None else _Piece(f"(?:{pattern})", 60)


def _string(schema: dict, path: str) -> _Piece | None:
    """What stands between the quotes."""
    character = _Piece(_json_character(ANY), 14)
    least = _count(schema, "minLength", path)
    most = _count(schema, "maxLength", path) if "maxLength" in schema else None
    if "format" in schema:
        if schema["format"] not in _FORMATS:
            _refuse(path, f"format {schema['format']!r} (formats are {', '.join(_FORMATS)})")
        if least or most is not None or "pattern" in schema:
            _refuse(path, "'format' together with a length or a pattern")
        return _Piece(_FORMATS[schema["format"]], 80)
    if "pattern" in schema:
        if least or most is not None:
            _refuse(path, "'pattern' together with 'minLength' or 'maxLength'")
        try:
            alternatives, flags = parse(schema["pattern"])
            written = emit(alternatives, flags, _json_character, f"(?:{character.pattern})*")
        except (TypeError, ValueError) as error:
            _refuse(path, f"pattern {schema['pattern']!r}: {error}")
        return None if written == NOTHING else _Piece(written, 4 * weight(alternatives) + 28)
    return _repeat(character, least, most)


def _json_character(points: CodePoints) -> str | None:
    """The pattern of one character of a set as JSON writes it within quotes; None if it has no such form."""
    plain = difference(points, _MUST_ESCAPE)
    escaped = [one for one in _ESCAPES if any(low <= ord(one) <= high for low, high in points)]
    written = [set_pattern(plain)] if plain else []
    if escaped:
        codes = set_pattern(code_points((ord(_ESCAPES[one]), ord(_ESCAPES[one])) for one in escaped))
        written.append(literal("\\") + codes)
    return "(?:" + "|".join(written) + ")" if written else None


def _text(text: str) -> _Piece:
    return _Piece(literal(text), len(text.encode()))


def _sequence(*pieces: _Piece | None) -> _Piece | None:
    if None in pieces:
        return None
    return _Piece("".join(piece.pattern for piece in pieces), sum(piece.states for piece in pieces))


def _either(pieces: list[_Piece | None]) -> _Piece | None:
    possible = [piece for piece in pieces if piece is not None]
    if not possible:
        return None
    pattern = "(?:" + "|".join(piece.pattern for piece in possible) + ")"
    return _Piece(pattern, sum(piece.states for piece in possible))


def _repeat(piece: _Piece | None, least: int, most: int | None) -> _Piece | None:
    if most is not None and most < least:
        return None
    if piece is None:
        return None if least else _text("")
    copies = max(least, 1) if most is None else most
    return _Piece(f"(?:{piece.pattern}){{{least},{'' if most is None else most}}}", piece.states * copies)
