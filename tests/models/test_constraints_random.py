"""Some of the random cases of `tests/fuzz/constraints.py`, and patterns of ECMA-262 by hand."""

import pytest

from ppl.models.constraints.ecma_patterns import search
from ppl.models.constraints.expressions import automaton_of
from tests.fuzz.constraints import check_ecma_pattern, check_pattern, check_schema, run


def test_random_patterns_and_schemas_agree_with_their_references():
    assert run(600.0, seed=0, max_cases=60, node=False) == 60


@pytest.mark.parametrize(
    "pattern",
    [
        "^v1$|^v2$",
        r"\d+(?:\.\d\d)?$",
        r"^[^\W\d]\S*\s?$",
        r"^\u0061\u{62}[\u{1F600}-\u{1F64F}]?\ud83d\ude00*$",
        r"[\b\cJ\0\v]|\cI",
        "^[^]$|[]",
        r"^[\w.\-]+\/(?<name>a|b){2,}?$",
        r"\Ba|^\B$",
        "(?:^a|b$)+|$^",
        "^[a-]]?}{$",
    ],
)
def test_patterns_of_ecma_262_agree_with_their_translation(pattern):
    check_ecma_pattern(pattern, node=False)


def test_a_wrong_meaning_is_found_and_made_smaller(monkeypatch):
    """The checks can fail: with the dot of another dialect, and with bounds that are forgotten."""
    from tests.fuzz import constraints as fuzz

    monkeypatch.setattr(fuzz, "python_pattern", lambda pattern: pattern)
    with pytest.raises(AssertionError, match="should be"):
        check_ecma_pattern("^.$", node=False)
    monkeypatch.setattr(fuzz, "JsonSchema", lambda schema: fuzz.Regex(r"-?[1-9]"))
    with pytest.raises(AssertionError, match="is accepted, (but|and)"):
        check_schema({"type": "integer", "minimum": 0})
    monkeypatch.setattr(fuzz, "Regex", lambda pattern: type("", (), {"matches": lambda self, text: True})())
    with pytest.raises(AssertionError, match=r"case 0 of seed 0, pattern '.{0,6}'"):
        run(60.0, 0, 1, kinds=["pattern"])


def test_general_categories_are_those_of_unicode():
    for name, right, wrong in (("Lu", "AÉ", "a1"), ("L", "aÉß字", "1_"), ("Nd", "0٣", "a²"), ("P", "-_", "a+")):
        letters = automaton_of(search(rf"^\p{{{name}}}$"))
        assert all(map(letters.accepts, right)) and not any(map(letters.accepts, wrong))
    assert check_pattern(r"\w") is None
