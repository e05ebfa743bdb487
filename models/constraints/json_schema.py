r"""JSON that follows a schema, as a regular set of texts.

What is written always validates, and every keyword that is not supported is refused; none is ignored but those that
only describe. In return a schema stands for fewer texts than it could:

- properties come in the order of the schema, and none but those that it names (in `properties` or `required`);
  `additionalProperties` or `patternProperties` without names give a map,
- whitespace stands only where `whitespace` puts it, and strings use the short escapes (\" \\ \/ \b \f \n \r \t) alone,
- integers have at most 19 digits, other numbers 17 decimals and an exponent of two digits; a number with bounds has no
  exponent, at most 15 digits and 6 decimals, or one more than a bound has, so that its binary value keeps the bounds,
- a number in `enum` or `const` is written as in the schema, or without decimals where it has none: 1.0, 1,
- years have four digits and do not begin with 0, seconds at most six decimals, UUIDs small letters.

Values nest as deep as the schema says: a recursive one is not regular, and a `Grammar` says it. `pattern` is a regular
expression of ECMA-262 and matches anywhere in the string. The branches of `oneOf` must be seen to exclude each other.
`uniqueItems` needs at most six possible values. Formats are those of `json_strings.FORMATS`, and of numbers int32 and
int64 (bounds), float and double. Source of the keywords: JSON Schema, draft 2020-12. What a schema asks for is found
in `json_shapes`; here it is written.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ppl.models.constraints.byte_automaton import ByteAutomaton, product
from ppl.models.constraints.character_automaton import CharacterAutomaton
from ppl.models.constraints.code_points import of
from ppl.models.constraints.expressions import (
    EMPTY,
    Characters,
    Expression,
    Graph,
    anything,
    automaton_of,
    either,
    embed,
    optional,
    repeat,
    sequence,
    text,
)
from ppl.models.constraints.json_shapes import Located, Shape, Shapes, refuse, refuse_format, same
from ppl.models.constraints.json_strings import matching, written, written_values
from ppl.models.constraints.number_ranges import MOST_SIGNIFICANT, decimals_between, decimals_of, integers_between
from ppl.models.constraints.patterns import parse
from ppl.models.constraints.regular import Constraint, Regex
from ppl.models.constraints.tables import TooLarge

__all__ = ["JsonSchema"]

_LARGEST = 10**40  # integer that is written
_MOST_DECIMALS = 20  # of a bound
_MOST_VALUES = 6  # of the items of a list without repetition
_MOST_NAME_PATTERNS = 4  # of one object
_ANY_NUMBER = r"-?(?:0|[1-9][0-9]{0,18})(?:\.[0-9]{1,17})?(?:[eE][+\-]?[0-9]{1,2})?"


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
            to use instead), takes too many states, or allows no text at all; or `whitespace` matches something else.

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
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"`schema` cannot be written as JSON: {error}.") from error
        blank = Regex(self.whitespace).language
        if not product(blank, Regex(r"[ \t\n\r]*").language.complement(), union=False).is_empty:
            raise ValueError(f"`whitespace` must match whitespace alone, got {self.whitespace!r}.")
        _ = self.language

    @functools.cached_property
    def language(self) -> ByteAutomaton:
        """The automaton over bytes."""
        return _language_of(self.schema, self.whitespace)


@functools.lru_cache(maxsize=64)
def _language_of(schema: str, whitespace: str) -> ByteAutomaton:
    root = json.loads(schema)
    shapes = Shapes(root)
    try:
        writer = _Writer(shapes, embed(automaton_of(parse(whitespace))))
        found = writer.value([Located(root, "#")], "#")
        if found is None:
            reasons = "; ".join(dict.fromkeys(shapes.contradictions[:3]))
            shown = schema if len(schema) <= 200 else schema[:200] + "..."
            raise ValueError(f"no JSON text satisfies `schema` {shown}: {reasons}.")
        return automaton_of(found).to_bytes()
    except TooLarge as error:
        raise ValueError(f"`schema` is too large: {error}. Lower its counts (maxLength, maxItems).") from error
    except RecursionError as error:
        raise ValueError("`schema` nests too deep to be read.") from error


class _Writer:
    """Writes what shapes allow; every method gives None where no text is possible."""

    def __init__(self, shapes: Shapes, space: Expression):
        self.shapes = shapes
        self.space = space
        self.comma = sequence(text(","), space)
        self.colon = sequence(text(":"), space)

    def value(self, schemas: Sequence[Located], path: str) -> Expression | None:
        """The values that satisfy all of some schemas; `path` is where they are asked for."""
        found = self.shapes.of(schemas)
        path = schemas[0].path if schemas else path
        possible = frozenset().union(*(shape.possible_types for shape in found))
        for shape in found:
            for names, atoms in ((shape.formats, {"string"}), (shape.number_formats, {"integer", "fraction"})):
                if names and not atoms & possible:
                    refuse_format(path, names[0], ", ".join(sorted(possible)))
        written_shapes = [self._shape(shape, path) for shape in found]
        possible_shapes = [one for one in written_shapes if one is not None]
        return either(possible_shapes) if possible_shapes else None

    def _impossible(self, path: str, why: str) -> None:
        self.shapes.contradictions.append(f"{path} {why}")

    def _shape(self, shape: Shape, path: str) -> Expression | None:
        if shape.values is not None:
            whole = shape.whole or (shape.types is not None and "fraction" not in shape.types)
            return either(self._constant(value, whole=whole) for value in shape.values)
        if shape.types is None:
            if shape == Shape():
                refuse(path, "any JSON value is allowed here, to any depth", "say which `type`, or list an `enum`")
            refuse(path, "a schema without `type`, which allows values of every other type", "say which `type`")
        kinds = shape.possible_types
        parts = []
        if "null" in kinds:
            parts.append(text("null"))
        if "boolean" in kinds:
            parts.append(either([text("true"), text("false")]))
        if "integer" in kinds:
            parts.append(self._number(shape, path))
        if "string" in kinds:
            parts.append(self._string(shape, path))
        if "array" in kinds:
            parts.append(self._array(shape, path))
        if "object" in kinds:
            parts.append(self._object(shape, path))
        possible = [part for part in parts if part is not None]
        return either(possible) if possible else None

    def _constant(self, value: Any, *, whole: bool = False) -> Expression:
        if isinstance(value, dict):
            members = [sequence(self._name(name), self._constant(one)) for name, one in value.items()]
            return self._bracket("{", self._list(members), "}")
        if isinstance(value, list):
            return self._bracket("[", self._list([self._constant(one) for one in value]), "]")
        if isinstance(value, str):
            return text(written(value))
        if isinstance(value, float) and value.is_integer() and abs(value) < 10**MOST_SIGNIFICANT:
            return text(str(int(value))) if whole else either([text(str(int(value))), text(json.dumps(value))])
        return text(json.dumps(value))

    def _list(self, members: list[Expression]) -> Expression:
        return sequence(
            *(sequence(self.comma, one) if position else one for position, one in enumerate(members)), EMPTY
        )

    def _name(self, name: str) -> Expression:
        return sequence(text(written(name)), self.colon)

    def _bracket(self, opening: str, body: Expression, closing: str) -> Expression:
        return sequence(text(opening), self.space, body, self.space, text(closing))

    def _number(self, shape: Shape, path: str) -> Expression | None:
        whole = "fraction" not in shape.possible_types
        low, high = shape.low, shape.high
        if not whole and low is None and high is None:
            return embed(_numerals(_ANY_NUMBER))
        if whole:
            first = last = None
            if low is not None:
                first = math.floor(low.value) + 1 if low.is_open else math.ceil(low.value)
            if high is not None:
                last = math.ceil(high.value) - 1 if high.is_open else math.floor(high.value)
            if (first is not None and first > _LARGEST) or (last is not None and last < -_LARGEST):
                refuse(path, "integers of more than 40 digits", "use smaller bounds")
            pattern = integers_between(
                None if first is None else max(first, -_LARGEST), None if last is None else min(last, _LARGEST)
            )
        else:
            if any(bound is not None and decimals_of(bound.value) > _MOST_DECIMALS for bound in (low, high)):
                refuse(path, f"a bound of more than {_MOST_DECIMALS} decimals", "use bounds of fewer digits")
            pattern = decimals_between(
                None if low is None else low.value,
                None if high is None else high.value,
                open_below=low is not None and low.is_open,
                open_above=high is not None and high.is_open,
            )
        numerals = None if pattern is None else _numerals(pattern)
        if numerals is not None and shape.multiple > 1:
            numerals = numerals & _multiples(shape.multiple)
        if numerals is None or numerals.is_empty:
            if not whole and (low is None or high is None or low.value < high.value):
                refuse(
                    path,
                    f"bounds between which no number of {MOST_SIGNIFICANT} digits lies",
                    "use type integer, or bounds of fewer digits",
                )
            self._impossible(path, "has bounds between which no number lies")
            return None
        return embed(numerals)

    def _string(self, shape: Shape, path: str) -> Expression | None:
        try:
            values = shape.strings()
        except TooLarge as error:
            refuse(path, f"its strings: {error}", "lower `minLength` and `maxLength`, or the counts of `pattern`")
        if values.is_empty and not shape.strings(with_formats=False).is_empty:
            refuse(
                path,
                f"format {shape.formats[0]!r} with a length, a pattern or another format that none of the strings that "
                "are written in it has",
                "leave one of them out",
            )
        if values.is_empty:
            self._impossible(path, "has a length and patterns that no string satisfies together")
            return None
        found = written_values(values)
        if found is None:
            refuse(path, "strings that need control characters without a short escape", "list them in an `enum`")
        return found

    def _array(self, shape: Shape, path: str) -> Expression | None:
        least, most = shape.fewest_items, shape.most_items
        if most is not None and most < least:
            self._impossible(path, "has 'minItems' above 'maxItems'")
            return None
        if shape.unique and (most is None or most > 1):
            return self._unlike(shape, path)
        length = max((len(one.first) for one in shape.elements), default=0)
        first: list[Expression] = []
        for place in range(length if most is None else min(length, most)):
            inner = self.value(shape.element(place), f"{path}/prefixItems/{place}")
            if inner is None:
                most = place
                break
            first.append(inner)
        rest = None
        if most is None or most > len(first):
            rest = self.value(shape.element(length), f"{path}/items")
            most = len(first) if rest is None else most
        if most is not None and most < least:
            self._impossible(path, "needs more items than can be written")
            return None
        # Nodes 0, .., k: so many of the first items are written. The last node writes what follows.
        edges: list[list[tuple[Expression, int]]] = [
            [(sequence(self.comma, one) if place else one, place + 1)] for place, one in enumerate(first)
        ]
        edges.append([])
        accepting = {place for place in range(len(first)) if place >= least}
        if rest is None:
            accepting.add(len(first))
        else:
            fewer = 0 if first else 1  # the first item of all has no comma before it
            more = repeat(
                sequence(self.comma, rest),
                max(least - len(first) - fewer, 0),
                None if most is None else most - len(first) - fewer,
            )
            more = more if first else sequence(rest, more)
            edges[-1].append((more if first or least else optional(more), len(edges)))
            edges.append([])
            accepting.add(len(edges) - 1)
        return self._bracket("[", Graph(edges, frozenset(accepting)), "]")

    def _unlike(self, shape: Shape, path: str) -> Expression | None:
        """Lists of which no two items are equal: a node for every set of values that are written."""
        values = None if any(one.first for one in shape.elements) else self._finite(shape.element(0))
        if values is None or len(values) > _MOST_VALUES:
            refuse(
                path,
                "'uniqueItems' of items that may have other values",
                f"give `items` an `enum` of at most {_MOST_VALUES} values, or leave it out",
            )
        least, most = shape.fewest_items, min(len(values), math.inf if shape.most_items is None else shape.most_items)
        if least > most:
            self._impossible(path, "needs more items than there are values")
            return None
        edges: list[list[tuple[Expression, int]]] = []
        for chosen in range(1 << len(values)):
            comma = self.comma if chosen else EMPTY
            edges.append(
                [
                    (sequence(comma, self._constant(value)), chosen | 1 << place)
                    for place, value in enumerate(values)
                    if not chosen >> place & 1 and chosen.bit_count() < most
                ]
            )
        accepting = (chosen for chosen in range(1 << len(values)) if least <= chosen.bit_count() <= most)
        return self._bracket("[", Graph(edges, frozenset(accepting)), "]")

    def _finite(self, schemas: Sequence[Located]) -> list[Any] | None:
        """All values that satisfy some schemas, None where there may be any number."""
        values: list[Any] = []
        for shape in self.shapes.of(schemas):
            if shape.values is None and not shape.possible_types <= {"boolean", "null"}:
                return None
            own = shape.values
            if own is None:
                own = [
                    one
                    for one, kind in ((True, "boolean"), (False, "boolean"), (None, "null"))
                    if kind in shape.possible_types
                ]
            for one in own:
                if not any(same(one, other) for other in values):
                    values.append(one)
        return values

    def _object(self, shape: Shape, path: str) -> Expression | None:
        names = shape.names
        if not names and not any(one.is_named for one in shape.properties):
            return self._map(shape, path)
        members: dict[str, Expression] = {}
        for name in names:
            if not shape.property_(name):
                where = "'required'" if name in shape.required else "'properties'"
                refuse(
                    f"{path}/properties/{name}",
                    f"{name!r} in {where} without a schema, which may be anything",
                    "give it a schema in `properties`",
                )
            inner = self.value(shape.property_(name), f"{path}/properties/{name}")
            if inner is not None:
                members[name] = sequence(self._name(name), inner)
        missing = [name for name in shape.required if name not in members]
        least = max(shape.fewest_properties, len(shape.required))
        most = len(members) if shape.most_properties is None else min(shape.most_properties, len(members))
        if not missing and len(members) < least and not shape.is_closed:
            self._refuse_few(path)
        if missing or least > most:
            self._impossible(path, f"needs {missing[0]!r}" if missing else "needs more properties than it may have")
            return None
        # Nodes (i, c, ready): the first i properties are decided and c are written, counted as far as that is asked
        # for; one of the others must follow where it is ready, after a comma. Node 0 is the start, node 1 the end.
        unlimited = most == len(members)
        counted = (least if least > len(shape.required) else 0) if unlimited else most
        last = max((place for place, name in enumerate(members) if name in shape.required), default=-1)
        number: dict[tuple[int, int, bool], int] = {}
        edges: list[list[tuple[Expression, int]]] = [[], []]

        def node(place: int, count: int, ready: bool) -> int:
            key = (place, min(count, counted), ready)
            if key not in number:
                number[key] = len(edges)
                edges.append([])
            return number[key]

        if not least:
            edges[0].append((EMPTY, 1))
        if most:
            edges[0].append((EMPTY, node(0, 0, True)))
        for place, (name, member) in enumerate(members.items()):
            for count in range(counted + 1):
                here = node(place, count, True)
                edges[here].append((member, node(place + 1, count + 1, False)))
                if name not in shape.required:
                    edges[here].append((EMPTY, node(place + 1, count, True)))
        for (place, count, ready), here in list(number.items()):
            if not ready:
                if place > last and count >= min(least, counted):
                    edges[here].append((EMPTY, 1))
                if place < len(members) and (unlimited or count < most):
                    edges[here].append((self.comma, node(place, count, True)))
        return self._bracket("{", Graph(edges, frozenset({1})), "}")

    def _refuse_few(self, path: str) -> None:
        refuse(
            path,
            "'minProperties' above the number of properties that are named, where only those are written",
            "name the properties in `properties`",
        )

    def _map(self, shape: Shape, path: str) -> Expression | None:
        """An object with free names. A name that comes twice counts once, so no more than one can be asked for."""
        least, most = shape.fewest_properties, shape.most_properties
        if most == 0:
            return None if least else self._bracket("{", EMPTY, "}")
        if not shape.properties:
            refuse(
                path,
                "an object without 'properties' and 'additionalProperties', whose values may be anything",
                "say which `properties` there are",
            )
        if least > 1:
            refuse(
                path,
                "keyword 'minProperties' above 1 for free names, which could come twice",
                "name the properties in `properties` and `required`",
            )
        if most is not None and most < least:
            self._impossible(path, "has 'minProperties' above 'maxProperties'")
            return None
        patterns = list(dict.fromkeys(pattern for one in shape.properties for pattern in one.by_pattern))
        if len(patterns) > _MOST_NAME_PATTERNS:
            refuse(path, f"more than {_MOST_NAME_PATTERNS} 'patternProperties'", "name the properties in `properties`")
        members = []
        for chosen in itertools.product((False, True), repeat=len(patterns)):
            schemas: list[Located] = []
            for one in shape.properties:
                own = [
                    one.by_pattern[p]
                    for p, is_in in zip(patterns, chosen, strict=True)
                    if is_in and p in one.by_pattern
                ]
                schemas += own or ([one.others] if one.others is not None else [])
            if not schemas and patterns:
                continue  # names that no pattern matches, and of which nothing is said
            names = automaton_of(anything())
            for pattern, is_in in zip(patterns, chosen, strict=True):
                names = names & (matching(pattern) if is_in else matching(pattern).complement())
            written_names = None if names.is_empty else written_values(names)
            if written_names is None:
                continue
            inner = self.value(schemas, f"{path}/additionalProperties")
            if inner is not None:
                members.append(sequence(written_names, self.colon, inner))
        if not members:
            if least:
                if not shape.is_closed:
                    self._refuse_few(path)
                self._impossible(path, "needs a property, and none may be written")
                return None
            return self._bracket("{", EMPTY, "}")
        member = either(members)
        filled = sequence(member, repeat(sequence(self.comma, member), 0, None if most is None else most - 1))
        return self._bracket("{", filled if least else optional(filled), "}")


@functools.lru_cache(maxsize=256)
def _numerals(pattern: str) -> CharacterAutomaton:
    return automaton_of(parse(pattern))


@functools.lru_cache(maxsize=64)
def _multiples(divisor: int) -> CharacterAutomaton:
    """The numerals of the multiples of a whole number: a node for every remainder, after a sign or none."""
    digits = [Characters(of(str(digit))) for digit in range(10)]
    edges: list[list[tuple[Expression, int]]] = [
        [(Characters(of("-")), 1), *((one, 2 + digit % divisor) for digit, one in enumerate(digits))],
        [(one, 2 + digit % divisor) for digit, one in enumerate(digits)],
    ]
    for rest in range(divisor):
        edges.append([(one, 2 + (10 * rest + digit) % divisor) for digit, one in enumerate(digits)])
    return automaton_of(Graph(edges, frozenset({2})))
