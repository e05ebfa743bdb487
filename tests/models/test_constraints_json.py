"""JSON under a schema: what each keyword accepts, what is refused and with which advice, numbers and dates in full."""

import datetime
import itertools
import json
import random
import re
from fractions import Fraction

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from ppl.models.constraints import JsonSchema, Vocabulary
from ppl.models.constraints.expressions import automaton_of
from ppl.models.constraints.number_ranges import decimals_between, integers_between
from ppl.models.constraints.patterns import parse
from ppl.models.constraints.tables import UNREACHABLE
from tests.fuzz.constraints import members, python_schema

# Bytes, so that every text can be written, and some tokens that span the structure of JSON.
VOCABULARY = Vocabulary(
    (*(bytes([byte]) for byte in range(256)), b'{"', b'":', b'", "', b"}]", b"tru", b"10", b'"}', None), ()
)


def check_samples(schema, constraint, seed, count):
    translated = python_schema(schema)
    validator = Draft202012Validator(translated, format_checker=Draft202012Validator.FORMAT_CHECKER)
    for text in members(constraint.language, random.Random(seed), count):
        assert constraint.matches(text)
        validator.validate(json.loads(text))


def test_texts_over_tokens_are_those_over_bytes():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["b"]}
    constraint, rng = JsonSchema(schema), random.Random(0)
    automaton = constraint.compile(VOCABULARY)
    table, token_class = np.asarray(automaton.next_state), np.asarray(automaton.token_class)
    distance = np.asarray(automaton.distance)
    for _ in range(20):
        state, tokens = int(automaton.start), []
        while distance[state]:
            free = len(tokens) < 15
            following = distance[table[state, token_class]]
            wanted = following < UNREACHABLE if free else following == distance[state] - 1
            tokens.append(rng.choice([t for t in np.flatnonzero(wanted).tolist() if VOCABULARY.tokens[t]]))
            state = int(table[state, token_class[tokens[-1]]])
        text = VOCABULARY.text(tokens).decode()
        assert constraint.matches(text)
        Draft202012Validator(schema).validate(json.loads(text))


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
    # Patterns are ECMA-262's.
    ({"type": "string", "pattern": r"^\d\w\s$"}, ['"0a "', '"9_\ufeff"'], ['"٣a "', '"0é "', '"0a\x1c"']),
    ({"type": "string", "pattern": "^.$"}, ['"a"', '"\U0001f600"', '"\x85"'], ['"\\n"', '"\\r"', '"\u2028"', '"ab"']),
    ({"type": "string", "pattern": "^a$"}, ['"a"'], ['"a\\n"', '"ba"']),
    ({"type": "string", "pattern": r"^[^]\u{1F600}\cJ\x41$"}, ['"é\U0001f600\\nA"'], ['"\U0001f600\\nA"']),
    ({"type": "string", "pattern": r"^\p{Lu}\P{L}$"}, ['"É1"'], ['"é1"', '"Éa"']),
    ({"type": "string", "pattern": "^v1$|^v2$"}, ['"v1"', '"v2"'], ['"v1v2"', '"xv1"']),
    ({"type": "string", "pattern": r"\bab\b"}, ['"ab"', '"x ab-y"', '"éab"'], ['"xab"', '"ab_"']),
    ({"type": "string", "pattern": "b", "minLength": 2, "maxLength": 3}, ['"ab"', '"bbb"'], ['"b"', '"abbb"']),
    ({"type": "string", "format": "date", "pattern": "^2024-02"}, ['"2024-02-29"'], ['"2024-03-01"']),
    ({"type": "string", "format": "ipv4"}, ['"192.168.0.1"', '"255.0.0.0"'], ['"256.0.0.1"', '"1.2.3"', '"01.2.3.4"']),
    ({"type": "string", "maxLength": 1}, ['"\U0001f600"', '"\\n"', '""'], ['"e\u0301"']),
    # Formats of numbers are bounds.
    ({"type": "integer", "format": "int32"}, ["2147483647", "-2147483648"], ["2147483648", "-2147483649"]),
    ({"type": "integer", "format": "int64"}, ["9223372036854775807"], ["9223372036854775808"]),
    ({"type": "number", "format": "int32"}, ["7"], ["7.5", "2147483648"]),
    ({"type": "number", "format": "double"}, ["7.5", "1e99"], []),
    ({"type": ["string", "null"], "format": "date"}, ["null", '"2024-02-29"'], ['"x"']),
    # Bounds of numbers.
    ({"type": "number", "minimum": 0.5, "maximum": 2}, ["0.5", "0.50", "1.75", "2", "2.0"], ["0.4", "0.499999", "2.1"]),
    ({"type": "number", "exclusiveMinimum": 0.1}, ["0.100001", "1", "0.2"], ["0.1", "0.10", "0", "-1"]),
    ({"type": "number", "minimum": 2e10}, ["20000000000", "20000000000.5"], ["19999999999.99", "2e10"]),
    ({"type": "number", "exclusiveMaximum": 0.1, "minimum": -0.25}, ["-0.25", "0", "0.0999"], ["0.1", "-0.26", "-0"]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1e-9}, ["0.000000001", "0.0000000001"], ["0", "0.00000001"]),
    ({"type": "integer", "minimum": 0.5, "maximum": 3.0}, ["1", "3"], ["0", "4"]),
    ({"type": "integer", "minimum": 1e3, "exclusiveMaximum": 1002}, ["1000", "1001"], ["999", "1002"]),
    ({"type": "integer", "minimum": 10**19, "maximum": 10**19 + 1}, [str(10**19)], [str(10**19 + 2), "9" * 19]),
    ({"type": "number", "minimum": -1e308, "maximum": 1.7e308}, ["-5.5", "9" * 15], ["1e3"]),
    ({"type": "integer", "exclusiveMaximum": 1e308}, ["-5", "9" * 40], ["1e3"]),
    ({"oneOf": [{"type": "number", "maximum": 1e50}, {"const": 1e60}]}, ["1e+60", "5", "-0.5"], []),
    ({"type": "integer", "multipleOf": 7, "minimum": -20}, ["-14", "0", "7", "700"], ["-21", "8", "-7.0"]),
    ({"type": "number", "multipleOf": 2.0}, ["4", "-2", "0"], ["3", "4.5"]),
    # Values.
    ({"enum": [1, 1.0, 2.5], "type": "number"}, ["1", "1.0", "2.5"], ["2", "2.50"]),
    ({"const": 1.0, "type": "integer"}, ["1"], ["1.0"]),
    ({"enum": [1, 5, 9, "a"], "type": "integer", "minimum": 2}, ["5", "9"], ["1", '"a"']),
    ({"enum": ["ab", "b", "a"], "pattern": "b", "maxLength": 1}, ['"b"'], ['"ab"', '"a"']),
    ({"enum": [[1], [1, 2], {"a": 1}], "items": {"maximum": 1}, "required": ["a"]}, ["[1]", '{"a":1}'], ["[1,2]"]),
    ({"const": {"b": [1, None], "a": "é"}}, ['{"b":[1,null],"a":"é"}', '{ "b": [1, null], "a": "é" }'], ['{"a":"é"}']),
    ({"const": "a\x01"}, [r'"a\u0001"'], ['"a"']),
    # Alternatives that exclude each other, and conjunctions.
    ({"oneOf": [{"const": "x"}, {"const": "y"}, {"const": 1}]}, ['"x"', '"y"', "1"], ['"z"']),
    ({"oneOf": [{"const": 1}, {"const": 1.0}, {"const": 2}]}, ["2"], ["1", "1.0"]),
    ({"oneOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}, ["1", "3"], ["2"]),
    ({"oneOf": [{"const": "a"}, {"type": "string", "minLength": 2}]}, ['"a"', '"bc"'], ['"b"', '""']),
    (
        {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "number", "exclusiveMinimum": 3}]},
        ["3", "-1", "3.5"],
        ["2.5"],
    ),
    ({"oneOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^b"}]}, ['"a"', '"bx"'], ['"c"']),
    (
        {
            "oneOf": [
                {"type": "object", "properties": {"t": {"const": k}, k: {"type": "null"}}, "required": ["t"]}
                for k in ("x", "y")
            ]
        },
        ['{"t":"x"}', '{"t":"y","y":null}'],
        ['{"t":"x","y":null}', "{}", '{"t":"z"}'],
    ),
    (
        {"oneOf": [{"type": "array", "items": {"type": "null"}, "minItems": n, "maxItems": n} for n in (1, 3)]},
        ["[null]", "[null,null,null]"],
        ["[]", "[null,null]"],
    ),
    ({"anyOf": [{"minimum": 3}, {"maximum": 0}], "type": "integer"}, ["3", "0", "-5"], ["1", "2"]),
    ({"allOf": [{"type": ["string", "null"]}, {"maxLength": 1}, {"type": "string"}]}, ['"a"'], ["null", '"ab"']),
    (
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"a": {"minimum": 3}, "b": {"const": 1}}},
            ]
        },
        ['{"a":3}', '{"a":3,"b":1}'],
        ['{"a":2}', '{"b":1}', '{"a":3,"b":2}'],
    ),
    # References.
    ({"anyOf": [{"const": 1}, {"type": "null"}], "$defs": {}}, ["1", "null"], []),
    (
        {"type": "array", "prefixItems": [{"const": 1}, {"$ref": "#/prefixItems/0"}], "items": False, "minItems": 2},
        ["[1,1]"],
        ["[1,2]"],
    ),
    ({"$ref": "#/$defs/a%20b/anyOf/1", "$defs": {"a b": {"anyOf": [{"const": 1}, {"const": 2}]}}}, ["2"], ["1"]),
    ({"$ref": "#/definitions/~0x%2F", "definitions": {"~x/": {"const": 1}, "~x": {"": {"const": 1}}}}, ["1"], ["2"]),
    ({"$ref": "#/$defs/s", "minLength": 2, "$defs": {"s": {"type": "string"}}}, ['"ab"'], ['"a"']),
    # Objects and arrays.
    (
        {"type": "object", "patternProperties": {"^a": {"const": 1}, "b$": {"type": "integer"}}},
        ["{}", '{"a":1}', '{"xb":7}', '{"ab":1}'],
        ['{"ab":2}', '{"x":1}', '{"a":2}'],
    ),
    (
        {"type": "object", "patternProperties": {"^a": {"const": 1}}, "additionalProperties": {"type": "null"}},
        ['{"a":1}', '{"b":null}'],
        ['{"a":null}', '{"b":1}'],
    ),
    (
        {"type": "object", "properties": {"ab": {"type": "integer"}}, "patternProperties": {"^a": {"minimum": 3}}},
        ['{"ab":3}', "{}"],
        ['{"ab":2}'],
    ),
    (
        {"type": "object", "required": ["a"], "additionalProperties": {"type": "null"}},
        ['{"a":null}'],
        ["{}", '{"a":1}'],
    ),
    (
        {"type": "object", "properties": {k: {"const": 1} for k in "abc"}, "minProperties": 1, "maxProperties": 2},
        ['{"a":1}', '{"b":1,"c":1}', '{"a":1,"c":1}'],
        ["{}", '{"a":1,"b":1,"c":1}'],
    ),
    ({"type": "object", "properties": {"\t\\é": {"const": 1}}}, [r'{"\t\\é":1}'], ['{"t":1}']),
    (
        {"type": "array", "items": {"enum": [1, 1.0, "x", True]}, "uniqueItems": True, "minItems": 2},
        ['[1,"x"]', '["x",true,1]'],
        ["[1,1]", "[1,1.0]", '["x"]', '["x","x"]'],
    ),
    ({"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}, ["[]", "[true,false]"], ["[true,true]"]),
    (
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "maxItems": 1},
        ["[]", '["a"]'],
        ['["a","b"]'],
    ),
    ({"anyOf": [True, {"type": "null"}], "type": "boolean"}, ["true"], ["null"]),
    ({"anyOf": [False, {"type": "null"}]}, ["null"], ["false"]),
]


@pytest.mark.parametrize(("schema", "right", "wrong"), ACCEPTED, ids=lambda value: json.dumps(value)[:60])
def test_each_rule_accepts_what_it_should_and_only_that(schema, right, wrong):
    constraint = JsonSchema(schema)
    assert [text for text in right if not constraint.matches(text)] == []
    assert [text for text in wrong if constraint.matches(text)] == []
    for text in right:
        Draft202012Validator(python_schema(schema), format_checker=Draft202012Validator.FORMAT_CHECKER).validate(
            json.loads(text)
        )
    check_samples(schema, constraint, seed=3, count=8)


# The place and what stands there, and what to use instead.
REFUSED = [
    ({}, "#: any JSON value", "`type`"),
    ({"type": "array"}, "#/items: any JSON value", "`type`"),
    ({"type": "object"}, "'additionalProperties'", "`properties`"),
    ({"type": "object", "properties": {"a/b": True}}, "#/properties/a~1b: any JSON value", "`type`"),
    ({"minimum": 3}, "#: a schema without `type`", "`type`"),
    ({"type": "strin"}, "type 'strin'", "integer, number"),
    ({"type": "integer", "multipleOf": 0.5}, "'multipleOf' = 0.5", "whole number"),
    ({"type": "integer", "multipleOf": 0}, "'multipleOf' = 0", "positive"),
    ({"type": "object", "properties": {"a": {"not": {}}}}, "#/properties/a: keyword 'not'", "& ~Regex"),
    ({"if": {}, "then": {}}, "#: keyword 'if'", "`anyOf`"),
    ({"type": "object", "dependentRequired": {}}, "keyword 'dependentRequired'", "`anyOf`"),
    ({"type": "object", "propertyNames": {}}, "keyword 'propertyNames'", "`patternProperties`"),
    ({"type": "null", "x-mine": 1}, "keyword 'x-mine'", "Supported keywords are"),
    ({"type": "null", "nullable": True}, "keyword 'nullable'", "null"),
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "'uniqueItems'", "`enum`"),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]}, "'b' in 'required'", "`properties`"),
    ({"type": "object", "properties": {}, "required": True}, "'required' = True", "as a list"),
    ({"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2}, "'minProperties'", "`required`"),
    ({"type": "object", "properties": {}, "minProperties": 1}, "'minProperties' above the number", "`properties`"),
    ({"type": "object", "patternProperties": {"^a": False}, "minProperties": 1}, "'minProperties' above", "name the"),
    # Every format is honoured or refused by name, on whatever type it stands.
    ({"type": "string", "format": "email"}, "#: format 'email'", "`pattern`"),
    ({"type": "integer", "format": "uint8"}, "format 'uint8'", "int32, int64"),
    ({"type": "array", "items": {"type": "null"}, "format": "table"}, "format 'table'", "Formats are"),
    ({"type": "object", "properties": {}, "format": "date"}, "format 'date' on type object", "type string"),
    ({"type": "integer", "format": "date-time"}, "format 'date-time' on type integer", "type string"),
    ({"type": "string", "format": "int32"}, "format 'int32' on type string", "type integer or number"),
    ({"type": "integer", "format": "double"}, "format 'double' on type integer", "type number"),
    ({"allOf": [{"type": "null"}, {"format": "int64"}]}, "format 'int64' on type null", "integer or number"),
    ({"type": "string", "format": "uuid", "pattern": "^[0-9A-F-]*A$"}, "#: format 'uuid' with a length", "leave one"),
    ({"type": "string", "format": "date", "maxLength": 9}, "#: format 'date' with a length", "leave one"),
    ({"type": "string", "format": ["date"]}, "format ['date']", "as a string"),
    ({"enum": ["2024-02-30"], "type": "string", "format": "date"}, "'2024-02-30' beside format 'date'", "leave one"),
    # Patterns.
    ({"type": "string", "pattern": "(?=a)"}, "#/pattern: pattern '(?=a)' has, at position 1, a lookahead", "`allOf`"),
    ({"type": "string", "pattern": "(?i)a"}, "'(?i)', which is not ECMA-262's", "[aA]"),
    ({"type": "string", "pattern": r"\Aa\Z"}, "which ECMA-262 does not have: anchors are `^` and `$`", "without it"),
    ({"type": "string", "pattern": r"(a)\1"}, "a back-reference", "Write the cases out"),
    ({"type": "string", "pattern": r"\p{Script=Greek}"}, "a property of characters", "general category"),
    ({"type": "string", "pattern": "a{,3}"}, "a count without its first number", "{0,n}"),
    ({"type": "string", "pattern": "("}, "pattern '('", "write the pattern"),
    ({"type": "string", "pattern": 3}, "#/pattern: 3, which is no pattern", "as a string"),
    ({"type": "object", "patternProperties": {"a++": {}}}, "#/patternProperties: pattern 'a++'", "possessive"),
    ({"type": "string", "pattern": "^\x01$"}, "control characters", "`enum`"),
    ({"type": "string", "minLength": "a"}, "'minLength' = 'a'", "whole number"),
    ({"type": "string", "maxLength": 10**6}, "about 2000000 states", "lower `minLength` and `maxLength`"),
    ({"type": "number", "minimum": 1e-300}, "#: a bound of more than 20 decimals", "fewer digits"),
    ({"type": "integer", "minimum": 1e300}, "#: integers of more than 40 digits", "smaller bounds"),
    ({"anyOf": []}, "#/anyOf: [] where schemas belong", "one or more"),
    ({"type": []}, "'type' = []", "integer, number"),
    ({"type": "number", "minimum": 10**17}, "bounds between which no number of 15 digits lies", "type integer"),
    ({"type": "number", "minimum": 3, "exclusiveMinimum": True}, "as in draft 4", "'exclusiveMinimum': 3"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf: branches 0 and 1 may hold", "`anyOf`"),
    ({"oneOf": [{"const": 1e45}, {"type": "number", "maximum": 1e50}]}, "#/oneOf: branches 0 and 1", "`anyOf`"),
    ({"oneOf": [{"const": 3}, {"type": "integer"}]}, "#/oneOf: branches 0 and 1", "`anyOf`"),
    (
        {"oneOf": [{"type": "object", "properties": {"t": {"const": k}}} for k in "ab"]},
        "(of type object)",
        "a required property",
    ),
    ({"$ref": "#"}, "recursive reference '#'", "`Grammar`"),
    (
        {"type": "object", "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, "required": ["next"]},
        "#/properties/next/anyOf/1: the recursive reference",
        "a `Grammar` (pip install 'genppl[grammar]')",
    ),
    ({"$ref": "#/$defs/no"}, "leads nowhere", "#/$defs/..."),
    ({"$ref": "#/anyOf/2", "$defs": {}}, "leads nowhere", "within the schema"),
    ({"$ref": "#name"}, "the reference '#name', which is no pointer", "#/$defs/..."),
    ({"anyOf": [{"$id": "http://x", "type": "null"}]}, "#/anyOf/0: keyword '$id'", "references from the root"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$id": "x", "type": "null"}}}, "'$id' of its own", "within the schema"),
    ({"$ref": "http://x"}, "the reference 'http://x'", "within the schema"),
    (
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "prefixItems": [{"type": "null"}]},
        "draft",
        "2020-12",
    ),
    ({"type": "array", "items": [{"type": "null"}]}, "'items' with a list", "`prefixItems`"),
    (
        {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/x", "minLength": 3},
        "'minLength' beside '$ref', which its draft ignores",
        "`allOf`",
    ),
]


@pytest.mark.parametrize(("schema", "reason", "instead"), REFUSED, ids=str)
def test_what_is_not_supported_is_refused_by_name_with_what_to_use_instead(schema, reason, instead):
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        JsonSchema(schema)
    assert "`schema` is not supported at #" in str(error.value) and instead in str(error.value)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (False, "no JSON text satisfies `schema` false: # is false"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, ": # has bounds between which no number lies"),
        ({"type": "integer", "exclusiveMinimum": 0.1, "exclusiveMaximum": 0.9}, "no JSON text satisfies"),
        ({"enum": []}, "# leaves none of the values"),
        ({"type": "string", "pattern": "^a$", "minLength": 2}, "# has a length and patterns"),
        ({"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}, "#/properties/a leaves none"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "#/allOf/1 leaves no type"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 1}, "'minItems' above 'maxItems'"),
        ({"type": "object", "properties": {}, "additionalProperties": False, "minProperties": 1}, "# needs more"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "#/oneOf has no value that only one branch allows"),
        ({"type": "array", "items": {"type": "string", "maxLength": 500}, "maxItems": 200}, "`schema` is too large"),
        ("{", "is no JSON"),
        ({"const": float("nan")}, "cannot be written as JSON"),
    ],
    ids=str,
)
def test_what_no_text_satisfies_and_what_is_no_schema_is_said(schema, reason):
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
        language = automaton_of(parse(pattern)).to_bytes()
        assert {x for x in range(-1500, 1501) if language.accepts(str(x).encode())} == inside, (low, high)
        assert not language.accepts(b"-0") and not language.accepts(b"01") and not language.accepts(b"")


def test_decimal_intervals_are_exact():
    decimals = ["", ".0", ".000000", ".5", ".05", ".000001", ".999999"]
    numerals = [sign + str(n) + tail for sign in ("", "-") for n in range(13) for tail in decimals]
    numerals = [one for one in numerals if float(one) != 0 or one[0] != "-"]
    bounds = [None, -12, -1, 0, 2, 10]
    for low, high, open_below, open_above in itertools.product(bounds, bounds, (False, True), (False, True)):
        pattern = decimals_between(low, high, open_below=open_below, open_above=open_above)

        def inside(x, low=low, high=high, open_below=open_below, open_above=open_above):
            above = low is None or (x > low if open_below else x >= low)
            return above and (high is None or (x < high if open_above else x <= high))

        expected = [one for one in numerals if inside(float(one))]
        if pattern is None:
            assert not expected
            continue
        language = automaton_of(parse(pattern))
        assert [one for one in numerals if language.accepts(one)] == expected, (low, high, open_below, open_above)
        assert not any(map(language.accepts, ("1.0000000", "01", "-0.0")))


def test_decimal_intervals_with_decimals_are_exact():
    numerals = [f"{n // 100}.{n % 100:02d}" for n in range(1300)] + [f"{n / 10:.1f}" for n in range(130)]
    numerals += [str(n) for n in range(13)]
    numerals += [f"-{one}" for one in numerals if float(one)]
    values = [Fraction(one) for one in numerals]
    rng = random.Random(0)
    for _ in range(12):
        low, high = sorted(Fraction(rng.randint(-1250, 1250), 100) for _ in range(2))
        open_below, open_above = rng.random() < 0.5, rng.random() < 0.5
        pattern = decimals_between(low, high, open_below=open_below, open_above=open_above)
        inside = [(low < x if open_below else low <= x) and (x < high if open_above else x <= high) for x in values]
        language = automaton_of(parse(pattern))
        assert [language.accepts(one) for one in numerals] == inside


def test_dates_and_times_are_those_of_the_calendar():
    date = JsonSchema({"type": "string", "format": "date"})
    day = datetime.date(1999, 1, 1)
    for _ in range(2 * 366):
        assert date.matches(f'"{day.isoformat()}"')
        day += datetime.timedelta(days=1)
    moment = JsonSchema({"type": "string", "format": "date-time"})
    for text in members(moment.language, random.Random(0), 50):
        datetime.datetime.fromisoformat(json.loads(text).replace("Z", "+00:00"))
