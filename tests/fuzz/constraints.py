"""Constraints on random patterns and schemas, beside `re.fullmatch`, ECMA-262 and `jsonschema`.

Three kinds of cases, drawn from a seed:

- a pattern of Python: texts of its automaton, mutations of them and random ones are accepted iff `re.fullmatch` does;
- a pattern of ECMA-262: the same, beside a translation into Python's dialect (`python_pattern`) and, where the program
  `node` is installed, beside its regular expressions with the flag `u`;
- a schema: what is accepted validates under `jsonschema`, and what validates and is written in the promised form is
  accepted. Refusals must say where.

A failure is made smaller before it is raised, and says how to run it again: `python -m tests.fuzz.constraints`.
"""

import functools
import json
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jsonschema

from ppl.models.constraints import JsonSchema, Regex
from ppl.models.constraints.character_automaton import CharacterAutomaton
from ppl.models.constraints.code_points import contains
from ppl.models.constraints.ecma_patterns import search
from ppl.models.constraints.expressions import automaton_of
from ppl.models.constraints.patterns import parse
from ppl.models.constraints.tables import UNREACHABLE, distances

__all__ = ["check_ecma_pattern", "check_pattern", "check_schema", "members", "python_pattern", "python_schema", "run"]

ALPHABET = list("abkKsSiI019_ -\n\r\t\f\x1c\x85") + list("éſıİK٣²\u2028\ufeff\xa0\U0001f600\U0010ffff")


def run(
    seconds: float, seed: int, max_cases: int | None = None, *, kinds: Iterable[str] = (), node: bool | None = None
) -> int:
    """Try random cases.

    Args:
        seconds: when to stop.
        seed: of the cases; equal seeds give equal cases.
        max_cases: how many at most.
        kinds: which of "pattern", "ecma" and "schema"; all if none is named.
        node: whether to ask node about patterns of ECMA-262; None is where it is installed.

    Returns:
        How many cases were tried.

    Raises:
        AssertionError: a case fails; the message gives the smallest that was found.
    """
    checks = {
        "pattern": (_pattern, check_pattern, _smaller_tree, _written),
        "ecma": (_ecma_pattern, functools.partial(check_ecma_pattern, node=node), _smaller_tree, _written),
        "schema": (_schema, check_schema, _smaller_json, lambda schema: schema),
    }
    chosen = tuple(kinds) or tuple(checks)
    stop, case = time.monotonic() + seconds, 0
    while time.monotonic() < stop and (max_cases is None or case < max_cases):
        kind = chosen[case % len(chosen)]
        draw, check, smaller, write = checks[kind]
        made = draw(random.Random(f"{seed} {case}"))
        try:
            check(write(made), seed)
        except AssertionError:
            made = _shrunk(made, lambda one: _fails(check, write(one), seed), smaller)  # noqa: B023
            try:
                check(write(made), seed)
            except AssertionError as error:
                raise AssertionError(f"case {case} of seed {seed}, {kind} {write(made)!r}: {error}") from error
            raise
        case += 1
    return case


def check_pattern(pattern: str, seed: int = 0) -> None:
    """Compare a pattern of Python with `re.fullmatch`.

    Raises:
        AssertionError: they differ on a text.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled, regex = re.compile(pattern), Regex(pattern)
        values = automaton_of(parse(pattern))
    for text in _texts(values, random.Random(seed)):
        expected = compiled.fullmatch(text) is not None
        assert regex.matches(text) == expected, f"{text!r} should be {'accepted' if expected else 'refused'}"


def check_ecma_pattern(pattern: str, seed: int = 0, *, node: bool | None = None) -> None:
    """Compare a pattern of ECMA-262 with its translation, and with node.

    Args:
        pattern: the pattern.
        seed: of the texts.
        node: whether to ask node; None is where it is installed.

    Raises:
        AssertionError: they differ on a text.
    """
    values = automaton_of(search(pattern))
    translated = python_pattern(pattern)
    compiled = None if translated is None else re.compile(translated, re.ASCII)
    texts = list(_texts(values, random.Random(seed)))
    asked = _node().ask(pattern, texts) if node or (node is None and shutil.which("node")) else None
    for place, text in enumerate(texts):
        accepted = values.accepts(text)
        if compiled is not None:
            expected = compiled.search(text) is not None
            assert accepted == expected, f"{text!r} should be {'accepted' if expected else 'refused'}"
        if asked is not None:
            assert accepted == asked[place], (
                f"{text!r}, says node, should be {'accepted' if asked[place] else 'refused'}"
            )


def check_schema(schema: Any, seed: int = 0, count: int = 8) -> bool:
    """Compare a schema with `jsonschema`, whose patterns are translated.

    Args:
        schema: the schema.
        seed: of the texts.
        count: how many members to draw.

    Returns:
        Whether it was compiled, and not refused.

    Raises:
        AssertionError: a text is accepted that does not validate, or the other way round; a refusal says no place.
    """
    try:
        constraint = JsonSchema(schema)
    except ValueError as error:
        known = r"`schema` is not supported at #.*: .*\. Instead, |no JSON text satisfies `schema` .*: #|is too large"
        assert re.search(known, str(error), re.DOTALL), f"the refusal says no place: {error}"
        if str(error).startswith("no JSON text"):
            valid = [value for value in _VALUES if _validator(schema).is_valid(value)]
            assert not valid, f"{error}, but {valid[0]!r} validates"
        return False
    validator, rng = _validator(schema), random.Random(seed)
    promised = _is_strict(schema)
    for text in members(constraint.language, rng, count):
        value = json.loads(text)
        errors = [error.message for error in validator.iter_errors(value)]
        assert not errors, f"{text} is accepted, but {errors[0]}"
        for _ in range(4):
            other = _mutated_value(value, rng)
            valid = validator.is_valid(other)
            spelled = [_compact(other), _compact(_sorted(other))]
            accepted = any(constraint.matches(one) for one in spelled)
            assert valid or not accepted, f"{spelled[0]} is accepted, and does not validate"
            if promised and valid and _is_plain(other):
                assert accepted, f"{spelled[0]} validates, and is refused"
    return True


def _validator(schema: Any) -> Any:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(python_schema(schema), format_checker=kind.FORMAT_CHECKER)


def members(language: Any, rng: random.Random, count: int) -> Iterator[str]:
    """Texts of an automaton over bytes: some bytes at random, then the shortest way to an end."""
    distance = distances(language.next_state, language.accepting)
    for number in range(count):
        free, state, written = (0, 4, 12, 30, 80)[number % 5], language.start, bytearray()
        while True:
            following: dict[int, list[int]] = {}
            for byte, target in enumerate(language.next_state[state].tolist()):
                if distance[target] < UNREACHABLE and (len(written) < free or distance[target] < distance[state]):
                    following.setdefault(target, []).append(byte)
            if distance[state] == 0 and (len(written) >= free or not following or rng.random() < 0.05):
                break
            target = rng.choice(sorted(following))
            written.append(rng.choice(following[target]))
            state = target
        yield written.decode()


# Patterns: trees of ("text", text) and (kind, children, how they are written).


_ATOMS = ["a", "b", "k", "K", "é", "ſ", "i", "0", "_", r"\n", r"\.", "-", "."]
_ATOMS += [r"\w", r"\W", r"\d", r"\D", r"\s", r"\S", "[ab]", "[^b]", "[a-k]", r"[\w-]", r"[^\W_]", r"[^\s\S]", "[^\n]"]
_PYTHON_ATOMS = ["^", "$", r"\A", r"\Z", r"\b", r"\B", r"\x41", "(?!)", "(?#x)", r"[\da-b]", r"\U0001f600", "[ı-ſ]"]
_PYTHON_GROUPS = ["({})", "(?:{})", "(?i:{})", "(?s:{})", "(?m:{})", "(?a:{})", "(?-i:{})", "(?x:{} )"]
_ECMA_ATOMS = [
    "^",
    "$",
    r"\b",
    r"\B",
    r"\x41",
    r"\u0061",
    r"\u{1F600}",
    r"\ud83d\ude00",
    r"\cJ",
    "[]",
    "[^]",
    r"(?:\0)",
]
_ECMA_ATOMS += [r"[\b]", r"\/", r"\-", r"[\d\-a]", r"[^\S\n]", r"\v", r"[a-]", "]", "}"]
_ECMA_ATOMS += [r"\p{L}", r"\P{Lu}", r"[\p{Nd}_]"]
_REPEATS = ["{}*", "{}+", "{}?", "{}*?", "{}+?", "{}??", "{}{{2}}", "{}{{1,2}}", "{}{{2,}}", "{}{{0,2}}?", "{}{{0}}"]


def _pattern(rng: random.Random) -> Any:
    flags = rng.choice(["", "", "", "(?i)", "(?s)", "(?m)", "(?a)", "(?ms)", "(?ai)", "(?im)", "(?x)"])
    return ("of", [_tree(rng, _ATOMS + _PYTHON_ATOMS * 2, _PYTHON_GROUPS, rng.randint(1, 9))], flags + "{}")


def _ecma_pattern(rng: random.Random) -> Any:
    return _tree(rng, _ATOMS + _ECMA_ATOMS * 2, ["({})", "(?:{})", "(?<x>{})"], rng.randint(1, 8), [False])


def _tree(rng: random.Random, atoms: list[str], groups: list[str], size: int, named: list[bool] | None = None) -> Any:
    if size <= 1:
        return ("text", [], rng.choice(atoms))
    kind = rng.random()
    if kind < 0.35:
        group = rng.choice(groups)
        while named is not None and "?<" in group and named[0]:
            group = rng.choice(groups)
        if named is not None and "?<" in group:
            named[0] = True  # a name may stand once
        inner = _tree(rng, atoms, groups, size - 1, named)
        group = ("of", [inner], group)
        return ("of", [group], rng.choice(_REPEATS)) if rng.random() < 0.7 else group
    left = rng.randint(1, size - 1)
    parts = [_tree(rng, atoms, groups, one, named) for one in (left, size - left)]
    return ("of", [("of", parts, "{}|{}")], "(?:{})") if kind < 0.6 else ("of", parts, "{}{}")


def _written(tree: Any) -> str:
    kind, children, form = tree
    return form if kind == "text" else form.format(*map(_written, children))


def _smaller_tree(tree: Any) -> Iterator[Any]:
    kind, children, form = tree
    yield from children
    for place, child in enumerate(children):
        for smaller in _smaller_tree(child):
            yield (kind, [*children[:place], smaller, *children[place + 1 :]], form)
    if kind == "text" and form != "a":
        yield ("text", [], "a")


def _texts(values: CharacterAutomaton, rng: random.Random) -> Iterator[str]:
    found = [""] + ["".join(rng.choices(ALPHABET, k=rng.randint(1, 4))) for _ in range(12)]
    distance = distances(values.next_state, values.accepting)
    moves_of = functools.cache(values.moves)
    for number in range(8 if distance[values.start] < UNREACHABLE else 0):
        state, text = values.start, ""
        while len(text) < 12:
            free = len(text) < number
            if distance[state] == 0 and (not free or rng.random() < 0.1):
                break
            moves = [
                (points, target)
                for points, target in moves_of(state)
                if distance[target] < UNREACHABLE and (free or distance[target] < distance[state])
            ]
            if not moves:
                break
            points, state = rng.choice(moves)
            usual = [one for one in ALPHABET if contains(points, one)]
            text += rng.choice(usual) if usual else chr(rng.choice(points)[rng.randint(0, 1)])
        found.append(text)
        for _ in range(3):
            place = rng.randint(0, len(text))
            kept = place + rng.randint(0, 1)
            found.append(text[:place] + rng.choice(["", *rng.choices(ALPHABET, k=3)]) + text[kept:])
    return iter(dict.fromkeys(found))


# The dialect of ECMA-262 in Python's.


_ECMA_SPACE = r"\t-\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_NO_ECMA_SPACE = (
    r"\x00-\x08\x0e-\x1f!-\x9f\xa1-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2fff"
    r"\u3001-\ufefe\uff00-\U0010ffff"
)
_TOKEN = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u\{[0-9a-fA-F]+\}|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}"
    r"|\\c[A-Za-z]|\\[pP]\{[^}]*\}|\\.|\[\^\]|\[\]|\(\?<(?=\w)|[\s\S]",
    re.DOTALL,
)


def python_pattern(pattern: str) -> str | None:
    r"""Translate a pattern of ECMA-262, read by code points, for Python's `re` with the flag ASCII.

    With that flag `\d`, `\w` and `\b` are ECMA's. The other tokens are replaced one by one. `\p` has no translation.

    Args:
        pattern: the pattern.

    Returns:
        The pattern for `re.search`, None where it has none.
    """
    written, inside = [], False
    for token in _TOKEN.findall(pattern):
        if token in ("[]", "[^]") and not inside:
            written.append("(?!)" if token == "[]" else r"(?s:.)")
        elif token.startswith((r"\p", r"\P")):
            return None
        elif token == r"\s":
            written.append(_ECMA_SPACE if inside else f"[{_ECMA_SPACE}]")
        elif token == r"\S":
            written.append(_NO_ECMA_SPACE if inside else f"[{_NO_ECMA_SPACE}]")
        elif token.startswith(r"\u") and len(token) == 12:
            pair = bytes.fromhex(token[2:6] + token[8:12]).decode("utf-16-be")
            written.append(re.escape(pair))
        elif token.startswith(r"\u"):
            written.append(rf"\U{int(token[2:].strip('{}'), 16):08x}")
        elif token.startswith(r"\c"):
            written.append(rf"\x{ord(token[2]) % 32:02x}")
        elif token == r"\0":
            written.append(r"\x00")
        elif token == r"\B" and not inside:
            written.append(r"(?:\B|\A\Z)")  # Python's `\B` is false in the empty text, before 3.14
        elif token.startswith("\\") and not token[1].isalnum():
            written.append(re.escape(token[1]))
        elif inside:
            inside = token != "]"
            written.append(r"\[" if token == "[" else token)
        elif token == "[":
            inside = True
            written.append(token)
        else:
            other = {"$": r"\Z", ".": r"[^\n\r\u2028\u2029]", "(?<": "(?P<"}
            written.append(other.get(token, token))
    return "".join(written)


def python_schema(schema: Any) -> Any:
    """Translate a schema's patterns, for a validator that reads them as Python's; what has none is left out."""
    if isinstance(schema, list):
        return [python_schema(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for keyword, value in schema.items():
        if keyword in ("const", "enum", "required", "examples", "default"):
            made[keyword] = value
        elif keyword == "pattern" and isinstance(value, str):
            translated = python_pattern(value)
            made |= {} if translated is None else {keyword: f"(?a:{translated})"}
        elif keyword == "patternProperties":
            made[keyword] = {f"(?a:{python_pattern(name)})": python_schema(one) for name, one in value.items()}
        elif keyword in ("properties", "$defs", "definitions"):
            made[keyword] = {name: python_schema(one) for name, one in value.items()}
        else:
            made[keyword] = python_schema(value)
    return made


class _Node:
    """A process of node that answers one question a line.

    The pattern stands between `^[^]*?(?:` and `)[^]*$`: node begins a search within a pair of surrogates too, where
    by code points no character begins.
    """

    _PROGRAM = """
    require('readline').createInterface({input: process.stdin}).on('line', line => {
      const [pattern, texts] = JSON.parse(line);
      let compiled;
      try {
        new RegExp(pattern, 'u');
        compiled = new RegExp('^[^]*?(?:' + pattern + ')[^]*$', 'u');
      } catch (error) { console.log('null'); return; }
      console.log(JSON.stringify(texts.map(text => compiled.test(text))));
    });
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            ["node", "-e", self._PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, pattern: str, texts: list[str]) -> list[bool] | None:
        """What `test` says of every text; None where node refuses the pattern."""
        self.process.stdin.write(json.dumps([pattern, texts]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def _node(kept: list[_Node] = []) -> _Node:  # noqa: B006  one process for all cases
    if not kept:
        kept.append(_Node())
    return kept[0]


# Schemas.


_NAMES = ["a", "b", "c d", 'q"', "é", "$x"]
_STRINGS = ["a", "", "é\n", 'q"', "2024-02-29", "ab", "\\"]
_NUMBERS = [0, 1, -1, 3, 1.0, 0.5, 0.1, -2.25, 1e3, 2e10, 10, 99, -150, 2**53, 1e-7, 123456.789]
_VALUES = [*_STRINGS, *_NUMBERS, True, False, None, [], {}, [1], [1.0, "x"], {"a": 1}, {"a": {"b": [None]}}]
_PATTERNS = ["^a+$", "b", r"^\d{2}", "[a-c]$", r"^\w*$", r"\s", "^é|b", "^(yes|no)$", r"^[^\W\d]", "a$|^b", r"\bab\b"]
_PATTERNS += [r"^.{2}$", r"^\S+$", r"^[\x21-\x7e]*$", "^$", "(?=a)"]
_FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email", "int32", "float"]


def _schema(rng: random.Random) -> Any:
    made, definitions = _hoisted(_part(rng))
    return made | {"$defs": definitions} if definitions else made


def _hoisted(schema: Any) -> tuple[Any, dict[str, Any]]:
    """A schema without the definitions inside of it, and those."""
    if isinstance(schema, list):
        parts = [_hoisted(one) for one in schema]
        return [one for one, _ in parts], {name: one for _, found in parts for name, one in found.items()}
    if not isinstance(schema, dict):
        return schema, {}
    found: dict[str, Any] = {}
    made = {}
    for keyword, value in schema.items():
        inner, more = _hoisted(value)
        found |= more
        if keyword == "$defs":
            found |= inner
        else:
            made[keyword] = inner
    return made, found


def _part(rng: random.Random, depth: int = 2, strict: bool | None = None) -> Any:
    strict = rng.random() < 0.6 if strict is None else strict
    if rng.random() < 0.02:
        return rng.choice([True, False, {}])
    if depth and rng.random() < 0.55:
        return _nested(rng, depth - 1, strict)
    made: dict[str, Any] = {}

    def maybe(keyword: str, chance: float, draw: Callable[[], Any]) -> None:
        if rng.random() < chance:
            made[keyword] = draw()

    kind = rng.choice(["string", "string", "integer", "number", "number", "enum", "boolean", "null", "mixed"])
    if kind == "enum":
        maybe("enum", 0.7, lambda: rng.sample(_VALUES, rng.randint(1, 4)))
        maybe("const", 0.2 if made else 1.0, lambda: rng.choice(_VALUES))
        maybe("type", 0.3, lambda: rng.choice(["string", "number", "integer", "array", "object"]))
    elif kind == "mixed":
        made["type"] = rng.sample(["string", "integer", "number", "null", "boolean"], 2)
    else:
        made["type"] = kind
    types = made.get("type", [])
    if "string" in types:
        maybe("minLength", 0.25, lambda: rng.randint(0, 3))
        maybe("maxLength", 0.25, lambda: rng.randint(0, 4))
        maybe("pattern", 0.3, lambda: rng.choice(_PATTERNS))
        maybe("format", 0.12, lambda: rng.choice(_FORMATS))
    if "integer" in types or "number" in types:
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            maybe(keyword, 0.25, lambda: rng.choice(_NUMBERS))
        maybe("multipleOf", 0.08, lambda: rng.choice([1, 2, 3, 7, 2.0, 0.5]))
        maybe("format", 0.08, lambda: rng.choice(["int32", "int64", "float", "double", "date"]))
    return made


def _nested(rng: random.Random, depth: int, strict: bool) -> Any:
    def inner() -> Any:
        return _part(rng, depth, strict)

    kinds = ["object", "object", "map", "array", "tuple", "anyOf", "oneOf", "tagged", "allOf", "ref", "unique"]
    kind = rng.choice(kinds)
    if kind == "object":
        names = sorted(rng.sample(_NAMES, rng.randint(0, 3)))
        made: dict[str, Any] = {"type": "object", "properties": {name: inner() for name in names}}
        if rng.random() < 0.6:
            made["required"] = [name for name in names if rng.random() < 0.5]
        if strict or rng.random() < 0.3:
            made["additionalProperties"] = False
        if rng.random() < 0.2:
            made[rng.choice(["minProperties", "maxProperties"])] = rng.randint(0, 3)
        if rng.random() < 0.1:
            made["patternProperties"] = {rng.choice(["^a", "b"]): inner()}
        return made
    if kind == "map":
        made = {"type": "object", "additionalProperties": rng.choice([inner(), inner(), False])}
        if rng.random() < 0.5:
            made["patternProperties"] = {name: inner() for name in rng.sample(["^a", r"\d", "^.b", "é$"], 2)}
        if rng.random() < 0.3:
            made[rng.choice(["minProperties", "maxProperties"])] = rng.randint(0, 2)
        return made
    if kind in ("array", "tuple", "unique"):
        made = {"type": "array", "items": rng.choice([inner(), inner(), False])}
        if kind == "tuple":
            made["prefixItems"] = [inner() for _ in range(rng.randint(1, 3))]
        if kind == "unique":
            made |= {"uniqueItems": True, "items": {"enum": rng.sample(_VALUES, rng.randint(1, 4))}}
        for keyword in ("minItems", "maxItems"):
            if rng.random() < 0.3:
                made[keyword] = rng.randint(0, 4)
        return made
    if kind == "ref":
        name = f"{rng.choice(['a b', 'x/y', 'plain', '~t'])}{rng.randrange(10**6)}"
        pointer = name.replace("~", "~0").replace("/", "~1").replace(" ", "%20")
        schema = inner()
        steps = rng.choice(["", "/anyOf/0"])
        return {"$ref": f"#/$defs/{pointer}{steps}", "$defs": {name: {"anyOf": [schema]} if steps else schema}}
    if kind == "tagged":
        branches = []
        for tag in rng.sample(["x", "y", 1, 1.0, None], 2):
            properties = {"a": inner(), "kind": {"const": tag}}
            branches.append({"type": "object", "properties": properties, "required": ["kind"]})
            if strict:
                branches[-1]["additionalProperties"] = False
        return {"oneOf": branches}
    made = {kind: [inner() for _ in range(rng.randint(1, 3))]}
    beside = inner() if not strict and depth and rng.random() < 0.3 else {}
    if isinstance(beside, dict) and "$defs" not in beside:
        made = beside | made
    return made


def _is_strict(schema: Any) -> bool:
    """Whether all that validates has a promised form: objects without further properties, and no formats."""
    if isinstance(schema, list):
        return all(map(_is_strict, schema))
    if not isinstance(schema, dict):
        return True
    if "format" in schema or "patternProperties" in schema or ("allOf" in schema and len(schema["allOf"]) > 1):
        return False
    if "properties" in schema and schema.get("additionalProperties") is not False:
        return False
    return all(map(_is_strict, schema.values()))


def _is_plain(value: Any) -> bool:
    """Whether a value is written in the promised form by `json.dumps`."""
    if isinstance(value, dict):
        return all(_is_plain(name) and _is_plain(one) for name, one in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return not re.search(r"[\x00-\x1f]", re.sub(r"[\b\f\n\r\t]", "", value))
    if isinstance(value, float):
        written = repr(value)
        digits = written.replace("-", "").replace(".", "").lstrip("0")
        return "e" not in written and not value.is_integer() and len(digits) <= 15 and len(written.split(".")[1]) <= 6
    return not isinstance(value, int) or abs(value) < 10**15


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(one) for one in value] if isinstance(value, list) else value


def _mutated_value(value: Any, rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return rng.choice(_VALUES)
    if isinstance(value, dict) and value:
        name = rng.choice(sorted(value))
        if rng.random() < 0.4:
            return {key: one for key, one in value.items() if key != name}
        return {key: _mutated_value(one, rng) if key == name else one for key, one in value.items()}
    if isinstance(value, list) and value:
        place = rng.randrange(len(value))
        if rng.random() < 0.4:
            return [*value[:place], *value[place + 1 :]] if rng.random() < 0.5 else [*value, value[place]]
        return [_mutated_value(one, rng) if at == place else one for at, one in enumerate(value)]
    if isinstance(value, bool) or value is None:
        return rng.choice([True, False, None])
    if isinstance(value, int | float):
        return rng.choice([value + 1, value - 1, value + 0.5, -value, value + 1e-6, *_NUMBERS])
    if isinstance(value, str):
        place = rng.randint(0, len(value))
        return value[:place] + rng.choice(["", "a", "b", "é", "\n", "0"]) + value[place + rng.randint(0, 1) :]
    return value


def _smaller_json(schema: Any) -> Iterator[Any]:
    if isinstance(schema, dict):
        for keyword in schema:
            yield {key: value for key, value in schema.items() if key != keyword}
        yield from (value for value in schema.values() if isinstance(value, dict))
        for keyword, value in schema.items():
            for smaller in _smaller_json(value):
                yield {**schema, keyword: smaller}
    elif isinstance(schema, list):
        yield from (one for one in schema if isinstance(one, dict))
        for place, value in enumerate(schema):
            yield [*schema[:place], *schema[place + 1 :]]
            for smaller in _smaller_json(value):
                yield [*schema[:place], smaller, *schema[place + 1 :]]


def _fails(check: Callable[[Any, int], Any], case: Any, seed: int) -> bool:
    try:
        check(case, seed)
    except AssertionError:
        return True
    except Exception:  # noqa: BLE001  a smaller case need not be one at all
        return False
    return False


def _shrunk(case: Any, fails: Callable[[Any], bool], smaller: Callable[[Any], Iterator[Any]]) -> Any:
    """A case from which no part can be taken such that it still fails."""
    tried = 0
    while True:
        for one in smaller(case):
            tried += 1
            if tried > 500:
                return case
            if fails(one):
                case = one
                break
        else:
            return case


if __name__ == "__main__":
    arguments = [float(one) for one in sys.argv[1:]]
    seconds, seed = arguments[0] if arguments else 60.0, int(arguments[1]) if len(arguments) > 1 else 0
    print(run(seconds, seed, int(arguments[2]) if len(arguments) > 2 else None), "cases")
