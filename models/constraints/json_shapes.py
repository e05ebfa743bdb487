"""What a JSON schema asks for, in a normal form: alternatives, each of which holds all that is asked at one place.

The keywords of a schema narrow a `Shape`. References and `allOf` narrow it further; `anyOf` and `oneOf` make several
of it; parts of arrays and objects stay lists of schemas, all of which hold, until they are asked for. Source of the
keywords: JSON Schema, draft 2020-12.

The branches of `oneOf` must exclude each other, which is shown by types, by values, by bounds, by the strings that both
allow, or by a property or an element that both need and that does so: where it cannot be shown, it is refused.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NoReturn
from urllib.parse import unquote

from ppl.models.constraints.character_automaton import CharacterAutomaton
from ppl.models.constraints.json_strings import FORMATS, matching, string_values
from ppl.models.constraints.tables import TooLarge

__all__ = ["TYPES", "Located", "Shape", "Shapes", "exact", "refuse", "refuse_format", "same"]

TYPES = {
    "null": frozenset({"null"}),
    "boolean": frozenset({"boolean"}),
    "string": frozenset({"string"}),
    "array": frozenset({"array"}),
    "object": frozenset({"object"}),
    "integer": frozenset({"integer"}),
    "number": frozenset({"integer", "fraction"}),
}
_EVERY_TYPE = frozenset().union(*TYPES.values())
_ANNOTATIONS = frozenset(
    "$schema $id $anchor $comment $defs definitions title description default examples deprecated readOnly writeOnly "
    "discriminator".split()
)
_SUPPORTED = (
    "$ref additionalProperties allOf anyOf const enum exclusiveMaximum exclusiveMinimum format items maxItems "
    "maxLength maxProperties maximum minItems minLength minProperties minimum multipleOf oneOf pattern "
    "patternProperties prefixItems properties required type uniqueItems"
).split()
_GRAMMAR = "a `Grammar` (pip install 'genppl[grammar]') can nest to any depth"
_INSTEAD = {
    "not": "say what is allowed (`enum`, bounds, a `pattern`), or leave texts out with `JsonSchema(...) & ~Regex(...)`",
    "if": "write the cases as `anyOf`",
    "then": "write the cases as `anyOf`",
    "else": "write the cases as `anyOf`",
    "dependencies": "write the cases as `anyOf`",
    "dependentRequired": "write the cases as `anyOf`",
    "dependentSchemas": "write the cases as `anyOf`",
    "propertyNames": "use `patternProperties` with `additionalProperties` false",
    "contains": "use `prefixItems`, or `anyOf` of lists",
    "minContains": "use `prefixItems`, or `anyOf` of lists",
    "maxContains": "use `prefixItems`, or `anyOf` of lists",
    "unevaluatedProperties": "use `additionalProperties`; properties that are not named are never written",
    "unevaluatedItems": "use `items`",
    "additionalItems": "use `prefixItems` and `items`, of draft 2020-12",
    "$dynamicRef": "use `$ref` with a pointer, #/$defs/...",
    "$recursiveRef": f"use `$ref` with a pointer, #/$defs/...; {_GRAMMAR}",
    "contentEncoding": "use a `pattern`",
    "contentMediaType": "use a `pattern`",
    "contentSchema": "use a `pattern`",
    "nullable": 'use `type`: ["...", "null"]',
}
_INTEGER_FORMATS = {"int32": 2**31, "int64": 2**63}
_NUMBER_FORMATS = ("float", "double")  # all numbers that are written are doubles
_LARGEST_FLOAT = 3.4028234663852886e38
_MOST_SHAPES = 200
_MOST_DEPTH = 8  # elements of arrays by which branches are told apart


@dataclasses.dataclass(frozen=True)
class Located:
    """A schema, where it stands, and the references that led there."""

    schema: Any
    path: str
    references: tuple[str, ...] = ()

    def at(self, *steps: Any) -> "Located":
        """A schema inside of this one."""
        inner = self.schema
        for step in steps:
            inner = inner[step]
        return Located(inner, "/".join([self.path, *map(_escaped, steps)]), self.references)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A bound of numbers, and whether it is left out itself."""

    value: Fraction
    is_open: bool


@dataclasses.dataclass(frozen=True)
class Elements:
    """What one schema says of the elements of arrays: of the first ones, and of the rest."""

    first: tuple[Located, ...]
    rest: Located | None


@dataclasses.dataclass(frozen=True)
class Properties:
    """What one schema says of the properties of objects: by name, by pattern, of the others."""

    named: dict[str, Located]
    by_pattern: dict[str, Located]
    others: Located | None
    is_named: bool  # whether `properties` was there, be it empty


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that is asked at one place. Every attribute narrows; the defaults ask nothing."""

    types: frozenset[str] | None = None
    whole: bool = False
    values: tuple[Any, ...] | None = None
    low: Bound | None = None
    high: Bound | None = None
    multiple: int = 1
    shortest: int = 0
    longest: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    number_formats: tuple[str, ...] = ()
    elements: tuple[Elements, ...] = ()
    fewest_items: int = 0
    most_items: int | None = None
    unique: bool = False
    properties: tuple[Properties, ...] = ()
    required: tuple[str, ...] = ()
    fewest_properties: int = 0
    most_properties: int | None = None

    @property
    def possible_types(self) -> frozenset[str]:
        """The types of its values."""
        types = _EVERY_TYPE if self.types is None else self.types
        return types - {"fraction"} if self.whole else types

    def element(self, place: int) -> tuple[Located, ...]:
        """The schemas of one element."""
        parts = (one.first[place] if place < len(one.first) else one.rest for one in self.elements)
        return tuple(part for part in parts if part is not None)

    def property_(self, name: str) -> tuple[Located, ...]:
        """The schemas of one property."""
        found = []
        for one in self.properties:
            own = [one.named[name]] if name in one.named else []
            own += [schema for pattern, schema in one.by_pattern.items() if matching(pattern).accepts(name)]
            found += own or ([one.others] if one.others is not None else [])
        return tuple(found)

    @property
    def names(self) -> tuple[str, ...]:
        """The properties that are named, in order."""
        named = (name for one in self.properties for name in one.named)
        return tuple(dict.fromkeys((*named, *self.required)))

    @property
    def is_closed(self) -> bool:
        """Whether no other properties than those named, by themselves or by pattern, satisfy it."""
        return any(one.others is not None and one.others.schema is False for one in self.properties)

    def strings(self, *, with_formats: bool = True) -> CharacterAutomaton:
        """The values of type string."""
        return string_values(self.shortest, self.longest, self.patterns, self.formats if with_formats else ())


def refuse(path: str, what: str, instead: str) -> NoReturn:
    """Say what is not supported where, and what to use instead.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"`schema` is not supported at {path}: {what}. Instead, {instead}.")


def refuse_format(path: str, name: str, types: str) -> NoReturn:
    """Say that a format means nothing for some types.

    Raises:
        ValueError: always.
    """
    meant = "string" if name in FORMATS else "integer or number" if name in _INTEGER_FORMATS else "number"
    refuse(path, f"format {name!r} on type {types}, where it means nothing", f"leave it out, or use it on type {meant}")


def exact(value: float | int) -> Fraction:
    """The number that a numeral of JSON writes."""
    return Fraction(value) if isinstance(value, int) else Fraction(repr(value))


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in JSON: 1 is 1.0 and not true, the order of properties does not count."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return exact(one) == exact(other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    return type(one) is type(other) and one == other


class Shapes:
    """The schemas within one document, and what they ask for.

    Attributes:
        contradictions: where something cannot be satisfied, as far as that was seen.
    """

    def __init__(self, root: Any):
        self.root = root
        self.contradictions: list[str] = []
        schema = root.get("$schema", "") if isinstance(root, dict) else ""
        self.draft = str(schema).removeprefix("http://").removeprefix("https://").removeprefix("json-schema.org/")
        self.is_latest = not self.draft or "2020-12" in self.draft

    def of(self, schemas: Sequence[Located]) -> list[Shape]:
        """The alternatives of what satisfies all of some schemas; none where nothing does."""
        current = [Shape()]
        for one in schemas:
            current = self._narrowed(current, one)
        return current

    def _narrowed(self, current: list[Shape], located: Located) -> list[Shape]:
        schema, path = located.schema, located.path
        if schema is True:
            return current
        if schema is False:
            self.contradictions.append(f"{path} is false")
            return []
        if not isinstance(schema, dict):
            refuse(path, f"{schema!r} is no schema", "give a mapping, true or false")
        self._check_keywords(located)
        narrowed = self._own(located)
        current = [shape for one in current for shape in [self._meet(one, narrowed, path)] if shape is not None]
        if "$ref" in schema:
            current = self._narrowed(current, self._target(located))
        for position in range(len(self._branches(located, "allOf"))):
            current = self._narrowed(current, located.at("allOf", position))
        for keyword in ("anyOf", "oneOf"):
            if keyword not in schema:
                continue
            parts = [located.at(keyword, place) for place in range(len(self._branches(located, keyword)))]
            branches = [self._narrowed(current, part) for part in parts]
            if keyword == "oneOf":
                branches = self._exclusive(branches, f"{path}/oneOf")
            current = [shape for branch in branches for shape in branch]
            if len(current) > _MOST_SHAPES:
                refuse(path, f"more than {_MOST_SHAPES} combinations of alternatives", "use fewer `anyOf` and `oneOf`")
        return current

    def _branches(self, located: Located, keyword: str) -> list[Any]:
        branches = located.schema.get(keyword, [])
        if not isinstance(branches, list) or (keyword in located.schema and not branches):
            refuse(
                f"{located.path}/{keyword}", f"{branches!r} where schemas belong", "give a list of one or more schemas"
            )
        return branches

    def _check_keywords(self, located: Located) -> None:
        schema, path = located.schema, located.path
        is_root = schema is self.root
        for keyword in schema:
            if keyword in ("$id", "id") and isinstance(schema[keyword], str) and not is_root:
                refuse(
                    path,
                    f"keyword {keyword!r} inside of the schema, which changes what references mean",
                    "leave it out and use references from the root, #/$defs/...",
                )
            if keyword in _SUPPORTED or keyword in _ANNOTATIONS or (keyword == "id" and is_root):
                continue
            instead = _INSTEAD.get(keyword, "leave it out if it only describes")
            refuse(path, f"keyword {keyword!r}", f"{instead}. Supported keywords are {', '.join(_SUPPORTED)}")
        others = sorted(set(schema) & set(_SUPPORTED) - {"$ref"})
        older = self.draft and not any(draft in self.draft for draft in ("2019-09", "2020-12"))
        if "$ref" in schema and others and older:
            refuse(
                path,
                f"keyword {others[0]!r} beside '$ref', which its draft ignores",
                "put both into `allOf`, or name a newer `$schema`",
            )

    def _target(self, located: Located) -> Located:
        reference, path = located.schema["$ref"], located.path
        inside = "use a reference within the schema, such as #/$defs/..."
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            refuse(path, f"the reference {reference!r}, which is no pointer from the root", inside)
        pointer = unquote(reference)
        if pointer in located.references:
            refuse(
                path,
                f"the recursive reference {reference!r}: values of any depth are not regular",
                f"write it out as deep as it is needed; {_GRAMMAR}",
            )
        target = self.root
        for part in pointer.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and name.isdecimal() and str(int(name)) == name and int(name) < len(target):
                target = target[int(name)]
            elif isinstance(target, dict) and name in target:
                target = target[name]
            else:
                refuse(path, f"the reference {reference!r}, which leads nowhere", inside)
            if isinstance(target, dict) and isinstance(target.get("$id"), str):
                refuse(path, f"the reference {reference!r} into a part with an '$id' of its own", inside)
        return Located(target, pointer, (*located.references, pointer))

    def _own(self, located: Located) -> Shape:
        """What the keywords of one schema ask for, without references and combinations."""
        schema, path = located.schema, located.path
        asked: dict[str, Any] = {}
        if "type" in schema:
            asked["types"] = self._types(schema["type"], path)
        if "const" in schema:
            asked["values"] = (schema["const"],)
        if "enum" in schema:
            if not isinstance(schema["enum"], list):
                refuse(f"{path}/enum", f"{schema['enum']!r} where a list belongs", "give a list of values")
            values = [one for one in schema["enum"] if "values" not in asked or same(one, asked["values"][0])]
            asked["values"] = tuple(values)
        asked |= self._numbers(located)
        asked |= self._strings(located)
        asked |= self._arrays(located)
        asked |= self._objects(located)
        shape = Shape(**asked)
        if "format" in schema:
            shape = self._formatted(shape, schema["format"], path)
        return shape

    def _types(self, given: Any, path: str) -> frozenset[str]:
        types = given if isinstance(given, list) else [given]
        if not types:
            refuse(path, "'type' = [], which allows nothing", f"use one of the types {', '.join(TYPES)}")
        for kind in types:
            if not isinstance(kind, str) or kind not in TYPES:
                refuse(path, f"type {kind!r}", f"use one of the types {', '.join(TYPES)}")
        return frozenset().union(*(TYPES[kind] for kind in types))

    def _numbers(self, located: Located) -> dict[str, Any]:
        schema, path = located.schema, located.path
        bounds: dict[str, list[Bound]] = {"low": [], "high": []}
        for keyword in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
            if keyword not in schema:
                continue
            value = schema[keyword]
            if isinstance(value, bool):
                refuse(path, f"{keyword!r} = {value!r}, as in draft 4", f"give the bound itself, {keyword!r}: 3")
            if not isinstance(value, int | float):
                refuse(path, f"{keyword!r} = {value!r}, which is no number", "give a number")
            number, side = exact(value), "low" if keyword.endswith("inimum") else "high"
            if isinstance(value, float) and abs(value) >= 2**53:  # the double may differ from the numeral
                number = (max if side == "low" else min)(number, Fraction(value))
            bounds[side].append(Bound(number, keyword.startswith("exclusive")))
        asked: dict[str, Any] = {
            "low": max(bounds["low"], key=_low, default=None),
            "high": min(bounds["high"], key=_high, default=None),
        }
        if "multipleOf" in schema:
            value = schema["multipleOf"]
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                refuse(path, f"'multipleOf' = {value!r}, which is no positive number", "give a positive integer")
            if value != int(value) or value > _MOST_MULTIPLE:
                refuse(
                    path,
                    f"'multipleOf' = {value!r}",
                    f"use a whole number up to {_MOST_MULTIPLE}, counting in smaller units, or an `enum`",
                )
            asked |= {"multiple": int(value), "whole": True}
        return asked

    def _strings(self, located: Located) -> dict[str, Any]:
        schema, path = located.schema, located.path
        asked: dict[str, Any] = {"shortest": _count(schema, "minLength", path, 0)}
        asked["longest"] = _count(schema, "maxLength", path, None)
        if "pattern" in schema:
            self._check_pattern(schema["pattern"], f"{path}/pattern")
            asked["patterns"] = (schema["pattern"],)
        return asked

    def _check_pattern(self, pattern: Any, path: str) -> None:
        if not isinstance(pattern, str):
            refuse(path, f"{pattern!r}, which is no pattern", "give a regular expression of ECMA-262 as a string")
        try:
            matching(pattern)
        except TooLarge as error:
            refuse(path, f"pattern {pattern!r}: {error}", "lower its counts")
        except ValueError as error:
            refuse(path, str(error).rstrip("."), "write the pattern without it")

    def _formatted(self, shape: Shape, name: Any, path: str) -> Shape:
        if not isinstance(name, str):
            refuse(path, f"format {name!r}, which is no name", "give the name of a format as a string")
        kinds = "number" if name in (*_INTEGER_FORMATS, *_NUMBER_FORMATS) else "string" if name in FORMATS else None
        if kinds is None:
            known = ", ".join((*FORMATS, *_INTEGER_FORMATS, *_NUMBER_FORMATS))
            refuse(path, f"format {name!r}", f"use a `pattern`, or leave it out. Formats are {known}")
        atom = "string" if kinds == "string" else "integer" if name in _INTEGER_FORMATS else "fraction"
        if shape.types is not None and atom not in shape.types:
            given = ", ".join(sorted(kind for kind, atoms in TYPES.items() if atoms <= shape.types))
            refuse_format(path, name, given)
        if kinds == "string":
            return dataclasses.replace(shape, formats=(name,))
        bounds = Shape(number_formats=(name,))
        if name in _INTEGER_FORMATS:
            size = Fraction(_INTEGER_FORMATS[name])
            bounds = dataclasses.replace(bounds, whole=True, low=Bound(-size, False), high=Bound(size - 1, False))
        elif name == "float":
            size = Fraction(_LARGEST_FLOAT)
            bounds = dataclasses.replace(bounds, low=Bound(-size, False), high=Bound(size, False))
        return _both(shape, bounds)

    def _arrays(self, located: Located) -> dict[str, Any]:
        schema, path = located.schema, located.path
        first = schema.get("prefixItems", [])
        latest = "say `$schema`: https://json-schema.org/draft/2020-12/schema"
        if first and not self.is_latest:
            refuse(path, f"keyword 'prefixItems' in the draft {self.draft!r}, which does not know it", latest)
        if not isinstance(first, list):
            refuse(path, f"'prefixItems' = {first!r}, which is no list", "give a list of schemas")
        if isinstance(schema.get("items"), list):
            refuse(path, "'items' with a list of schemas, as in older drafts", f"use `prefixItems`, and {latest}")
        asked: dict[str, Any] = {
            "fewest_items": _count(schema, "minItems", path, 0),
            "most_items": _count(schema, "maxItems", path, None),
            "unique": schema.get("uniqueItems", False),
        }
        if not isinstance(asked["unique"], bool):
            refuse(path, f"'uniqueItems' = {asked['unique']!r}", "give true or false")
        if first or "items" in schema:
            rest = located.at("items") if "items" in schema else None
            elements = Elements(tuple(located.at("prefixItems", place) for place in range(len(first))), rest)
            asked["elements"] = (elements,)
        return asked

    def _objects(self, located: Located) -> dict[str, Any]:
        schema, path = located.schema, located.path
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            refuse(
                path,
                f"'required' = {required!r}, which is no list of names",
                "give the names of required properties as a list beside `properties`",
            )
        parts = {}
        for keyword in ("properties", "patternProperties"):
            inner = schema.get(keyword, {})
            if not isinstance(inner, dict):
                refuse(path, f"{keyword!r} = {inner!r}, which is no mapping", "give a mapping of schemas")
            parts[keyword] = {name: located.at(keyword, name) for name in inner}
        for pattern in parts["patternProperties"]:
            self._check_pattern(pattern, f"{path}/patternProperties")
        asked: dict[str, Any] = {
            "required": tuple(dict.fromkeys(required)),
            "fewest_properties": _count(schema, "minProperties", path, 0),
            "most_properties": _count(schema, "maxProperties", path, None),
        }
        if any(keyword in schema for keyword in ("properties", "patternProperties", "additionalProperties")):
            others = located.at("additionalProperties") if "additionalProperties" in schema else None
            properties = Properties(parts["properties"], parts["patternProperties"], others, "properties" in schema)
            asked["properties"] = (properties,)
        return asked

    def _meet(self, one: Shape, other: Shape, path: str) -> Shape | None:
        """What both ask for, None where that is nothing at all."""
        shape = _both(one, other)
        if shape.types is not None and not shape.possible_types:
            self.contradictions.append(f"{path} leaves no type")
            return None
        if shape.values is None:
            return shape
        rest = dataclasses.replace(shape, values=None)
        values = tuple(value for value in shape.values if self.admits(rest, value, path))
        if not values:
            self.contradictions.append(f"{path} leaves none of the values of 'enum' or 'const'")
            return None
        return dataclasses.replace(shape, values=values)

    # Which values satisfy a shape.

    def admits(self, shape: Shape, value: Any, path: str = "#") -> bool:
        """Whether a value satisfies a shape."""
        if shape.values is not None and not any(same(value, one) for one in shape.values):
            return False
        kind = _type_of(value)
        if kind not in shape.possible_types:
            return False
        if kind in ("integer", "fraction"):
            number = exact(value)
            inside = _inside(number, shape.low, shape.high)
            return inside and (shape.multiple == 1 or number % shape.multiple == 0)
        if kind == "string":
            longest = math.inf if shape.longest is None else shape.longest
            if not shape.shortest <= len(value) <= longest:
                return False
            if not all(matching(pattern).accepts(value) for pattern in shape.patterns):
                return False
            if shape.formats and not shape.strings().accepts(value):
                refuse(
                    path,
                    f"the value {value!r} beside format {shape.formats[0]!r}, which may be spelled otherwise",
                    "leave one of the two out",
                )
            return True
        if kind == "array":
            most = math.inf if shape.most_items is None else shape.most_items
            unlike = all(not same(a, b) for a, b in itertools.combinations(value, 2)) if shape.unique else True
            return (
                shape.fewest_items <= len(value) <= most
                and unlike
                and all(self._admitted(shape.element(place), inner, path) for place, inner in enumerate(value))
            )
        if kind == "object":
            most = math.inf if shape.most_properties is None else shape.most_properties
            return (
                shape.fewest_properties <= len(value) <= most
                and all(name in value for name in shape.required)
                and all(self._admitted(shape.property_(name), inner, path) for name, inner in value.items())
            )
        return True

    def _admitted(self, schemas: Sequence[Located], value: Any, path: str) -> bool:
        return any(self.admits(shape, value, path) for shape in self.of(schemas))

    # Which shapes exclude each other.

    def _exclusive(self, branches: list[list[Shape]], path: str) -> list[list[Shape]]:
        """The branches of `oneOf`, without the values that two of them have."""
        shared: list[tuple[Shape, Any]] = []
        for (one, first), (other, second) in itertools.combinations(enumerate(branches), 2):
            for a, b in itertools.product(first, second):
                if a.values is not None and b.values is not None:
                    both = [value for value in a.values if any(same(value, match) for match in b.values)]
                    shared += [(shape, value) for value in both for shape in (a, b)]
                elif not self.exclude(a, b):
                    kinds = ", ".join(sorted(_kinds(a.possible_types & b.possible_types)))
                    refuse(
                        path,
                        f"branches {one} and {other} may hold for one value (of type {kinds})",
                        "use `anyOf`, or tell them apart by `type`, bounds, or a required property with another "
                        "`const` in each",
                    )
        left = []
        for branch in branches:
            left.append([])
            for shape in branch:
                gone = [value for owner, value in shared if owner is shape]
                if shape.values is not None:
                    kept = tuple(v for v in shape.values if not any(same(v, one) for one in gone))
                    if not kept:
                        self.contradictions.append(f"{path} has no value that only one branch allows")
                        continue
                    shape = dataclasses.replace(shape, values=kept)
                left[-1].append(shape)
        return left

    def exclude(self, one: Shape, other: Shape) -> bool:
        """Whether it can be shown that no value satisfies both shapes."""
        for first, second in ((one, other), (other, one)):
            if first.values is not None:
                return not any(self.admits(second, value) for value in first.values)
        return all(self._exclude_of_type(kind, one, other) for kind in one.possible_types & other.possible_types)

    def _exclude_of_type(self, kind: str, one: Shape, other: Shape) -> bool:
        both = _both(one, other)
        if kind in ("integer", "fraction"):
            return _is_empty(both.low, both.high, whole=kind == "integer")
        if kind == "string":
            return both.strings(with_formats=False).is_empty
        if kind == "array":
            if both.most_items is not None and both.most_items < both.fewest_items:
                return True
            places = range(min(both.fewest_items, _MOST_DEPTH))
            return any(self._exclude_parts(one.element(place), other.element(place)) for place in places)
        if kind == "object":
            if both.most_properties is not None and both.most_properties < max(
                both.fewest_properties, len(both.required)
            ):
                return True
            return any(self._exclude_parts(one.property_(n), other.property_(n)) for n in both.required)
        return False

    def _exclude_parts(self, one: Sequence[Located], other: Sequence[Located]) -> bool:
        return all(self.exclude(a, b) for a, b in itertools.product(self.of(one), self.of(other)))


_MOST_MULTIPLE = 1000


def _both(one: Shape, other: Shape) -> Shape:
    values = one.values if other.values is None else other.values
    if one.values is not None and other.values is not None:
        values = tuple(value for value in one.values if any(same(value, match) for match in other.values))
    types = one.types if other.types is None else other.types
    if one.types is not None and other.types is not None:
        types = one.types & other.types
    return Shape(
        types=types,
        whole=one.whole or other.whole,
        values=values,
        low=max((b for b in (one.low, other.low) if b is not None), key=_low, default=None),
        high=min((b for b in (one.high, other.high) if b is not None), key=_high, default=None),
        multiple=math.lcm(one.multiple, other.multiple),
        shortest=max(one.shortest, other.shortest),
        longest=_least(one.longest, other.longest),
        patterns=tuple(dict.fromkeys((*one.patterns, *other.patterns))),
        formats=tuple(dict.fromkeys((*one.formats, *other.formats))),
        number_formats=tuple(dict.fromkeys((*one.number_formats, *other.number_formats))),
        elements=(*one.elements, *other.elements),
        fewest_items=max(one.fewest_items, other.fewest_items),
        most_items=_least(one.most_items, other.most_items),
        unique=one.unique or other.unique,
        properties=(*one.properties, *other.properties),
        required=tuple(dict.fromkeys((*one.required, *other.required))),
        fewest_properties=max(one.fewest_properties, other.fewest_properties),
        most_properties=_least(one.most_properties, other.most_properties),
    )


def _low(bound: Bound) -> tuple[Fraction, bool]:
    return bound.value, bound.is_open


def _high(bound: Bound) -> tuple[Fraction, bool]:
    return bound.value, not bound.is_open


def _least(one: int | None, other: int | None) -> int | None:
    return min((bound for bound in (one, other) if bound is not None), default=None)


def _inside(number: Fraction, low: Bound | None, high: Bound | None) -> bool:
    above = low is None or (number > low.value if low.is_open else number >= low.value)
    return above and (high is None or (number < high.value if high.is_open else number <= high.value))


def _is_empty(low: Bound | None, high: Bound | None, *, whole: bool) -> bool:
    if low is None or high is None:
        return False
    if whole:
        first = math.floor(low.value) + 1 if low.is_open else math.ceil(low.value)
        return first > (math.ceil(high.value) - 1 if high.is_open else math.floor(high.value))
    return low.value > high.value or (low.value == high.value and (low.is_open or high.is_open))


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "fraction"
    return {str: "string", list: "array", dict: "object", type(None): "null"}[type(value)]


def _kinds(atoms: frozenset[str]) -> Iterator[str]:
    return iter({"number" if atom in ("integer", "fraction") else atom for atom in atoms})


def _count(schema: dict, keyword: str, path: str, default: int | None) -> int | None:
    if keyword not in schema:
        return default
    value = schema[keyword]
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
        refuse(path, f"{keyword!r} = {value!r}, which is no count", "give a whole number from 0 on")
    return int(value)


def _escaped(step: Any) -> str:
    return str(step).replace("~", "~0").replace("/", "~1")
