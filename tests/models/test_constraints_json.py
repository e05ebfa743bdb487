"""JSON under a schema: all that a constraint accepts parses and validates, over 500 generated schemas and by hand."""

import collections
import datetime
import itertools
import json
import random
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ppl.models.constraints import JsonSchema, Vocabulary
from ppl.models.constraints.byte_automaton import UNREACHABLE
from ppl.models.constraints.number_ranges import decimals_between, integers_between
from ppl.models.constraints.patterns import automaton_of

SCHEMAS = 500
# Bytes, so that every text can be written, and some tokens that span the structure of JSON.
VOCABULARY = Vocabulary(
    (*(bytes([byte]) for byte in range(256)), b'{"', b'":', b'", "', b"}]", b"tru", b"10", b'"}', None), ()
)


def sample(constraint, rng, free):
    """A text of the constraint: some tokens at random, then the shortest way to an end."""
    automaton = constraint.compile(VOCABULARY)
    table, token_class = np.asarray(automaton.next_state), np.asarray(automaton.token_class)
    distance = np.asarray(automaton.distance)
    tokens_of = collections.defaultdict(list)
    for token, one in enumerate(token_class):
        tokens_of[one].append(token)
    state, tokens = int(automaton.start), []
    assert distance[state] < UNREACHABLE
    while True:
        following = distance[table[state]]
        following[-1] = UNREACHABLE  # the class of end tokens
        if len(tokens) < free:
            classes = np.flatnonzero(following < UNREACHABLE)
            if distance[state] == 0 and (rng.random() < 0.1 or not classes.size):
                break
        else:
            if distance[state] == 0:
                break
            classes = np.flatnonzero(following == distance[state] - 1)
        chosen = rng.choice(classes.tolist())
        tokens.append(rng.choice(tokens_of[chosen]))
        state = int(table[state, chosen])
    return VOCABULARY.text(tokens).decode()


def check_samples(schema, constraint, seed, count):
    rng = random.Random(seed)
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    for number in range(count):
        text = sample(constraint, rng, free=(0, 5, 15, 40)[number % 4])
        assert constraint.matches(text)
        validator.validate(json.loads(text))


# What people write, with keywords among it that cannot be had.
COUNT = st.integers(0, 4)
BOUND = st.integers(-150, 150)
NAMES = st.sampled_from(["a", "b", "long name", 'q"uote', "é", "\n"])
VALUES = st.sampled_from([1, -7, 2.5, "a", "é\n", 'q"', None, True, [], {"k": 1.5}, [1, ["y"]], {"x": {}}])
PATTERNS = ["^a+$", "b", '^[^x]$|"', "^\\d{2}", "[a-c]$", "(?=a)", r"^(\w|\\)*$", "^é|\n", "^(yes|no)$", "(?i)^ab"]
FORMATS = ["date", "uuid", "date-time", "time", "email"]


def schema(kind, rare=None, **keywords):
    """Schemas of one type with each keyword half the time, and with a rare one of them now and then."""
    common = {name: strategy for name, strategy in keywords.items() if name != rare}
    plain = st.fixed_dictionaries({"type": st.just(kind)}, optional=common)
    if rare is None:
        return plain
    return st.one_of(
        plain, plain, st.fixed_dictionaries({"type": st.just(kind), rare: keywords[rare]}, optional=common)
    )


def in_objects(inner):
    @st.composite
    def build(draw):
        properties = draw(st.dictionaries(NAMES, inner, min_size=1, max_size=4))
        made = {"type": "object", "properties": properties}
        names = st.lists(st.sampled_from(sorted(properties)), unique=True)
        made |= draw(st.fixed_dictionaries({}, optional={"required": names, "additionalProperties": st.booleans()}))
        return made

    return build()


FLAT = st.one_of(
    schema("string", minLength=COUNT, maxLength=COUNT),
    schema("string", pattern=st.sampled_from(PATTERNS)),
    schema("string", format=st.sampled_from(FORMATS)),
    schema("integer", "multipleOf", minimum=BOUND, maximum=BOUND, multipleOf=st.integers(2, 3)),
    schema("integer", exclusiveMinimum=BOUND, exclusiveMaximum=BOUND),
    schema("number", minimum=BOUND, exclusiveMaximum=BOUND),
    schema("number", exclusiveMinimum=st.sampled_from([-2, 0, 0.5]), maximum=st.integers(-1, 3), title=st.just("x")),
    schema(["string", "null", "integer"], maxLength=COUNT, maximum=BOUND),
    schema("boolean"),
    schema("null"),
    st.fixed_dictionaries({"enum": st.lists(VALUES, min_size=1, max_size=4)}, optional={"type": st.just("string")}),
    st.fixed_dictionaries({"const": VALUES}, optional={"description": st.just("a constant")}),
)
SCHEMAS_OF_ALL_KINDS = st.recursive(
    FLAT,
    lambda inner: st.one_of(
        in_objects(inner),
        in_objects(inner),
        schema("object", "minProperties", additionalProperties=inner, minProperties=COUNT),
        schema("array", "uniqueItems", items=inner, minItems=COUNT, maxItems=COUNT, uniqueItems=st.booleans()),
        schema("array", prefixItems=st.lists(inner, min_size=1, max_size=3), items=st.just(False), maxItems=COUNT),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"oneOf": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"allOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"$ref": st.just("#/$defs/part"), "$defs": st.fixed_dictionaries({"part": inner})}),
        st.fixed_dictionaries({"not": inner}),
    ),
    max_leaves=5,
)


def test_five_hundred_generated_schemas_compile_or_are_refused_with_a_reason():
    counts, kinds, seen = collections.Counter(), set(), set()

    @settings(
        max_examples=2 * SCHEMAS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(SCHEMAS_OF_ALL_KINDS)
    def check(schema):
        text = json.dumps(schema)
        if text in seen or len(seen) == SCHEMAS:
            return
        seen.add(text)
        Draft202012Validator.check_schema(schema)
        try:
            constraint = JsonSchema(schema)
        except ValueError as error:
            assert re.search(r"`schema` is not supported at #|no JSON text satisfies|automaton of about", str(error))
            counts["refused"] += 1
            return
        counts["compiled"] += 1
        kinds.update(re.findall(r'"(\w+)":', text))
        check_samples(schema, constraint, seed=len(seen), count=4)

    check()
    assert len(seen) == SCHEMAS
    assert counts["compiled"] >= 150 and counts["refused"] >= 50
    assert kinds >= {"properties", "required", "prefixItems", "anyOf", "oneOf", "pattern", "format", "minimum", "enum"}


# The rules one by one: what is accepted, and what is not.
ACCEPTED = [
    (
        {"type": "string"},
        ['""', '"a b"', '"\\""', '"\\\\"', '"é\U0001f600"', '"\\n"'],
        ['"', '"a', '"\n"', '"\\x"', '"\x01"', "a"],
    ),
    ({"type": "string", "minLength": 1, "maxLength": 2}, ['"a"', '"\\n\U0001f600"'], ['""', '"abc"']),
    ({"type": "string", "pattern": "b"}, ['"b"', '"abc"'], ['""', '"ac"']),
    ({"type": "string", "pattern": "^b|c$"}, ['"bx"', '"xc"'], ['"xb"', '"cx"']),
    ({"type": "string", "pattern": '^"$'}, ['"\\""'], ['"""', '"a"']),
    (
        {"type": "string", "format": "date"},
        ['"2024-02-29"', '"2023-12-31"'],
        ['"2023-02-29"', '"2023-04-31"', '"1900-02-29"'],
    ),
    ({"type": "integer"}, ["0", "-1", "10", "9" * 19], ["-0", "01", "1.0", "1e3", "9" * 20, ""]),
    ({"type": "number"}, ["0", "-1.50", "1e5", "2.5E-07"], ["1.", ".5", "+1", "1e", "1e100", "NaN"]),
    (
        {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        ["0", "0.999999", "0.0"],
        ["1", "1.0", "-0.1", "0.9999999"],
    ),
    ({"type": "boolean"}, ["true", "false"], ["True", "1", "truefalse"]),
    ({"type": ["null", "boolean"]}, ["null", "true"], ["0"]),
    ({"enum": [1, "a", None, [1, {"k": 2.5}]]}, ["1", '"a"', "null", '[1, {"k":2.5}]'], ["2", "a", "[1]"]),
    ({"enum": [1, "a", True], "type": "integer"}, ["1"], ['"a"', "true"]),
    ({"const": "\ud800"}, ['"\\ud800"'], ['"a"']),
    (
        {"type": "array", "items": {"type": "null"}},
        ["[]", "[null]", "[ null, null ]"],
        ["[null,]", "[,]", "[null null]"],
    ),
    (
        {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2},
        ["[null]", "[null,null]"],
        ["[]", "[null,null,null]"],
    ),
    ({"type": "array", "items": {"type": "null"}, "maxItems": 0}, ["[]"], ["[null]"]),
    ({"type": "array", "items": False}, ["[]"], ["[null]"]),
    (
        {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"const": 3}, "minItems": 1},
        ["[1]", "[1,2]", "[1,2,3,3]"],
        ["[]", "[2]", "[1,3]", "[1,2,4]"],
    ),
    ({"type": "array", "prefixItems": [{"const": 1}, False], "items": {"const": 3}}, ["[]", "[1]"], ["[1,3]"]),
    (
        {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "required": ["b"]},
        ['{"b":2}', '{"a": 1, "b": 2}', '{"b":2,"c":3}', '{ "a":1,"b":2,"c":3 }'],
        ["{}", '{"a":1}', '{"b":2,"a":1}', '{,"b":2}', '{"b":2,}', '{"b":2,"d":4}', '{"b":2,"b":2}'],
    ),
    (
        {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}},
        ["{}", '{"b":2}', '{"a":1,"b":2}'],
        ['{"b":2,"a":1}'],
    ),
    ({"type": "object", "properties": {"a": False, 'q"': {"const": 2}}}, ["{}", '{"q\\"":2}'], ['{"a":1}']),
    ({"type": "object", "properties": {}}, ["{}"], ['{"a":1}']),
    (
        {"type": "object", "additionalProperties": {"const": 1}, "minProperties": 1, "maxProperties": 2},
        ['{"x":1}', '{"x":1, "":1}'],
        ["{}", '{"x":2}', '{"x":1,"y":1,"z":1}'],
    ),
    (
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"anyOf": [{"const": 1}, {"$ref": "#/$defs/c"}]}, "c": {"const": 2}}},
        ["1", "2"],
        ["3"],
    ),
    ({"oneOf": [{"type": "string"}, {"type": "integer"}], "title": "x"}, ['"a"', "1"], ["null"]),
    ({"allOf": [{"type": "null"}]}, ["null"], ["1"]),
]


@pytest.mark.parametrize(("schema", "right", "wrong"), ACCEPTED, ids=lambda value: json.dumps(value)[:60])
def test_each_rule_accepts_what_it_should_and_only_that(schema, right, wrong):
    constraint = JsonSchema(schema)
    assert [text for text in right if not constraint.matches(text)] == []
    assert [text for text in wrong if constraint.matches(text)] == []
    for text in right:
        Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(json.loads(text))
    check_samples(schema, constraint, seed=3, count=8)


REFUSED = [
    ({}, "#: any JSON value"),
    ({"type": "array"}, "#/items: any JSON value"),
    ({"type": "object"}, "'additionalProperties'"),
    ({"minimum": 3}, "without `type`"),
    ({"type": "strin"}, "type 'strin'"),
    ({"type": "integer", "multipleOf": 2}, "#: keyword 'multipleOf'"),
    ({"type": "object", "properties": {"a": {"not": {}}}}, "#/properties/a: keyword 'not'"),
    ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "'uniqueItems'"),
    ({"type": "object", "patternProperties": {}}, "'patternProperties'"),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]}, "'b' in 'required'"),
    ({"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2}, "'minProperties'"),
    ({"type": "string", "format": "email"}, "format 'email'"),
    ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    ({"type": "string", "pattern": "a", "minLength": 2}, "'pattern' together with"),
    ({"type": "string", "minLength": "a"}, "'minLength' = 'a'"),
    ({"type": "string", "maxLength": 10**6}, "about 14000002 states"),
    ({"type": "number", "minimum": 0.5}, "bounds of a number must be whole"),
    ({"const": 1, "minimum": 0}, "'minimum' beside 'const'"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf: two branches of type 'number'"),
    ({"allOf": [{"type": "null"}, {"type": "null"}]}, "'allOf'"),
    ({"$ref": "#"}, "recursive reference"),
    ({"$ref": "#/$defs/no"}, "leads nowhere"),
    ({"anyOf": [{"$id": "http://x", "type": "null"}]}, "#/anyOf/0: keyword '$id'"),
    ({"$ref": "http://x"}, "only those within the schema"),
    (
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "prefixItems": [{"type": "null"}]},
        "draft",
    ),
    (False, "no JSON text satisfies"),
    ({"type": "integer", "minimum": 2, "maximum": 1}, "no JSON text satisfies"),
    ({"enum": []}, "no JSON text satisfies"),
    ("{", "is no JSON"),
    ({"const": float("nan")}, "cannot be written as JSON"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=str)
def test_what_is_not_supported_is_refused_by_name(schema, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        JsonSchema(schema)


def test_schemas_may_be_texts_and_classes():
    class Model:
        @staticmethod
        def model_json_schema():
            return {"type": "integer", "maximum": 3, "minimum": 1}

    expected = JsonSchema({"type": "integer", "maximum": 3, "minimum": 1})
    assert JsonSchema(Model) == JsonSchema('{"type": "integer", "maximum": 3, "minimum": 1}') == expected
    assert hash(JsonSchema(Model)) == hash(expected) and expected.matches("2") and not expected.matches("4")
    with pytest.raises(TypeError, match="must be a mapping, JSON text or a pydantic model, got 3"):
        JsonSchema(3)


def test_whitespace_is_bounded_and_can_be_chosen():
    schema = {"type": "array", "items": {"type": "null"}}
    assert not JsonSchema(schema).matches("[  null]")
    lines = JsonSchema(schema, whitespace=r"(\n {0,2})?")
    assert lines.matches("[\n  null,\n  null\n]") and not lines.matches("[ null]")
    assert JsonSchema(schema, whitespace="").matches("[null,null]")
    with pytest.raises(ValueError, match=r"`whitespace` must match whitespace alone, got 'x\?'"):
        JsonSchema(schema, whitespace="x?")


def test_json_constraints_combine_with_others():
    numbers = JsonSchema({"type": "integer"}) & ~JsonSchema({"type": "integer", "maximum": 9})
    assert numbers.matches("10") and not numbers.matches("9") and not numbers.matches("ten")


def test_integer_intervals_are_exact():
    rng = random.Random(0)
    intervals = [(rng.randint(-1300, 1300), rng.randint(-1300, 1300)) for _ in range(60)]
    intervals += [
        (0, 0),
        (-1, 1),
        (10, 99),
        (9, 10),
        (-100, -10),
        (None, 5),
        (5, None),
        (None, None),
        (-7, None),
        (1, 1000),
    ]
    for low, high in intervals:
        pattern = integers_between(low, high)
        inside = {x for x in range(-1500, 1501) if (low is None or low <= x) and (high is None or x <= high)}
        if pattern is None:
            assert not inside
            continue
        language = automaton_of(pattern)
        assert {x for x in range(-1500, 1501) if language.accepts(str(x).encode())} == inside, (low, high)
        assert not language.accepts(b"-0") and not language.accepts(b"01") and not language.accepts(b"")


def test_decimal_intervals_are_exact():
    decimals = ["", ".0", ".000000", ".5", ".05", ".000001", ".999999"]
    numerals = [sign + str(n) + tail for sign in ("", "-") for n in range(13) for tail in decimals]
    numerals = [one for one in numerals if float(one) != 0 or one[0] != "-"]
    bounds = [None, -12, -3, -1, 0, 1, 2, 10]
    for low, high, open_below, open_above in itertools.product(bounds, bounds, (False, True), (False, True)):
        pattern = decimals_between(low, high, open_below=open_below, open_above=open_above)

        def inside(x, low=low, high=high, open_below=open_below, open_above=open_above):
            above = low is None or (x > low if open_below else x >= low)
            return above and (high is None or (x < high if open_above else x <= high))

        expected = [one for one in numerals if inside(float(one))]
        if pattern is None:
            assert not expected
            continue
        language = automaton_of(pattern)
        assert [one for one in numerals if language.accepts(one.encode())] == expected, (
            low,
            high,
            open_below,
            open_above,
        )
        assert not language.accepts(b"1.0000000") and not language.accepts(b"01") and not language.accepts(b"-0.0")


def test_dates_and_times_are_those_of_the_calendar():
    date = JsonSchema({"type": "string", "format": "date"})
    day = datetime.date(1999, 1, 1)
    for _ in range(2 * 366):
        assert date.matches(f'"{day.isoformat()}"')
        day += datetime.timedelta(days=1)
    rng = random.Random(0)
    moment = JsonSchema({"type": "string", "format": "date-time"})
    for _ in range(50):
        datetime.datetime.fromisoformat(json.loads(sample(moment, rng, free=8)).replace("Z", "+00:00"))
