"""Grammars: masks against brute force, the exact evidence, states after resampling, calls counted, bad input."""

import itertools
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC
from ppl.models import Grammar, MarkovChain, Regex
from ppl.models.constraints import Vocabulary, parser_states
from ppl.models.constraints.bound import bind_constraint
from tests.ppl.checks import assert_mean_within_5_standard_errors, compilations, repeat

SUMS = 'start: "a" | "(" start ")" | start "+" start\n'
PALINDROMES = 'start: "a" start "a" | "b" start "b" | "c"\n'
# The lexer could take the last letters for A or for B, and all that follows "(" is forced.
GREEDY = 'start: A B | "(a+a)"\nA: /a+/\nB: /[+(]+/\n'
SPACED = 'start: x | start "+" x\nx: "a"\n%ignore " "\n'

# Overlapping tokens, two of one text, one without letters, an end token, and a special one.
TOKENS = (b"a", b"(", b")", b"+", b"a+", b"(a", b"))", b"a", b"", b"</s>", None, b" ", b" a")
WRITTEN = Vocabulary(TOKENS, (9,))
STRIPPED = Vocabulary(TOKENS, (9,), strips_space=True)

JSON = r"""
start: value
value: object | array | STRING | NUMBER | "true" | "false" | "null"
object: "{" [pair ("," pair)*] "}"
pair: STRING ":" value
array: "[" [value ("," value)*] "]"
STRING: /"[^"\\\x00-\x1f]*"/
NUMBER: /-?(0|[1-9][0-9]*)/
%ignore " "
"""


def sums(text):
    """Whether a text can become a sum, and whether it is one."""
    depth, after = 0, False
    for letter in text:
        if letter not in (")+" if after else "(a"):
            return False, False
        depth += {"(": 1, ")": -1}.get(letter, 0)
        after = letter in "a)"
        if depth < 0:
            return False, False
    return True, after and depth == 0


def of_set(texts):
    prefixes = {text[:length] for text in texts for length in range(len(text) + 1)}
    return lambda text: (text in prefixes, text in texts)


def spaced(text):
    """As llguidance ignores: not before the first terminal, anywhere else."""
    if text.startswith(" "):
        return False, False
    letters = text.replace(" ", "")
    viable = all(letter == "a+"[place % 2] for place, letter in enumerate(letters))
    return viable, viable and len(letters) % 2 == 1


GREEDY_TEXTS = {"(a+a)"} | {
    "a" * many + "".join(rest)
    for many in range(1, 9)
    for n in range(1, 7)
    for rest in itertools.product("+(", repeat=n)
}
ORACLES = {SUMS: sums, GREEDY: of_set(GREEDY_TEXTS), SPACED: spaced}


@pytest.mark.parametrize("vocabulary", [WRITTEN, STRIPPED], ids=["written", "stripped"])
@pytest.mark.parametrize("lark", ORACLES, ids=["sums", "greedy", "spaced"])
def test_masks_equal_brute_force(lark, vocabulary):
    states, oracle = parser_states.parser_states(lark, vocabulary), ORACLES[lark]
    drawable = [token for token, text in enumerate(TOKENS) if text is not None and token != 9]
    rows = [row for length in range(4) for row in itertools.product(drawable, repeat=length)]
    rows = [row for row in rows if oracle(vocabulary.text(row).decode())[0]]
    assert len(rows) > 15
    tokens = np.array([[*row, *[0] * (3 - len(row))] for row in rows], np.int32)
    lengths = np.array([len(row) for row in rows])
    complete = np.array([oracle(vocabulary.text(row).decode())[1] for row in rows])
    np.testing.assert_array_equal(states.accepts(tokens, lengths), complete)
    for budget in (-1, 0, 1, 7):
        words = states.masks(tokens, lengths, np.full(len(rows), budget))
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : len(TOKENS)].astype(bool)
        expected = np.zeros_like(bits)
        for place, row in enumerate(rows):
            for token in drawable:
                viable, accepted = oracle(vocabulary.text([*row, token]).decode())
                expected[place, token] = viable if budget > 0 else accepted and budget == 0
            expected[place, 9] = complete[place]
        np.testing.assert_array_equal(bits, expected)


def test_the_empty_text_is_accepted_where_the_grammar_has_it():
    states = parser_states.parser_states('start: "" | "(" start ")"', WRITTEN)
    assert states.accepts(np.zeros((1, 1), np.int32), [0])[0]
    assert states.masks(np.zeros((1, 1), np.int32), [0], [-1])[0, 0] == 1 << 9


def test_a_refused_prefix_stays_refused_whatever_follows():
    states = parser_states.parser_states(SUMS, WRITTEN)
    tokens = np.array([[2, 0, 0], [0, 10, 0], [0, 3, 0]], np.int32)
    assert states.accepts(tokens, [3, 3, 3]).tolist() == [False, False, True]
    assert states.masks(tokens, [3, 3, 3], [1, 0, -1]).any(1).tolist() == [False, False, True]


def test_a_bound_grammar_works_under_nested_vmap_and_scan_like_one_particle_at_a_time():
    bind = bind_constraint(Grammar(SUMS), WRITTEN, 4, False)
    rows = jnp.array([[[0, 3, 0], [1, 0, 2]], [[5, 2, 9], [4, 0, 9]]])

    def walk(row):
        def step(state, token):
            state = bind.advance(state, token)
            return state, bind.allowed(state, 1)

        state, masks = jax.lax.scan(step, bind.start(), row)
        return masks, bind.accepts(state), state["length"]

    masks, accepted, lengths = jax.jit(jax.vmap(jax.vmap(walk)))(rows)
    assert lengths.tolist() == [[3, 3], [2, 2]]
    assert accepted.tolist() == [[True, True], [True, True]]
    for place in np.ndindex(2, 2):
        np.testing.assert_array_equal(masks[place], walk(rows[place])[0])


CHAIN = MarkovChain(
    np.array([0.3, -0.2, 0.1]), np.array([[0.5, 0.1, 1.0], [-0.4, 0.3, 0.2], [0.2, 0.9, -1.0]]), length=5
)


def exact_log_evidence(chain, accepted):
    def log_softmax(logits):
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    initial = log_softmax(np.asarray(chain.initial_logits, np.float64))
    transition = log_softmax(np.asarray(chain.transition_logits, np.float64))
    total = 0.0
    for path in itertools.product(range(len(initial)), repeat=chain.num_steps):
        if accepted("".join("abc"[token] for token in path)):
            total += np.exp(initial[path[0]] + sum(transition[pair] for pair in itertools.pairwise(path)))
    return np.log(total)


def is_palindrome(text):
    half = len(text) // 2
    return text == text[::-1] and text[half] == "c" and "c" not in text[:half]


@pytest.mark.parametrize("regex", [None, "(a|b)a.*"])
def test_the_evidence_of_a_chain_is_the_sum_over_its_paths(regex):
    exact = exact_log_evidence(CHAIN, lambda t: is_palindrome(t) and (regex is None or t[1] == "a"))
    constraint = Grammar(PALINDROMES) if regex is None else Regex(regex) & Grammar(PALINDROMES)
    target, algorithm = CHAIN.constrain(constraint).program(), SMC(32, ess_threshold=1.0)
    estimates = repeat(target, algorithm, lambda posterior: jnp.exp(posterior.log_evidence - exact), num_runs=200)
    assert_mean_within_5_standard_errors(estimates, 1.0)


def test_the_density_of_one_path_is_the_chain_s_where_the_grammar_accepts_and_zero_elsewhere():
    program = CHAIN.constrain(Grammar(PALINDROMES)).program()
    alone = CHAIN.constrain(Regex("(?s).*")).program()
    for text in ("abcba", "aacaa", "abcbb", "aaaaa", "cbcbc"):
        sites = {"path": jnp.array(["abc".index(letter) for letter in text], jnp.int32)}
        expected = ppl.log_density(alone, sites) if is_palindrome(text) else -np.inf
        np.testing.assert_allclose(ppl.log_density(program, sites), expected, rtol=1e-6)


def test_resampled_states_follow_their_ancestors():
    posterior = ppl.infer(CHAIN.constrain(Grammar(PALINDROMES)), SMC(64, ess_threshold=1.0), seed=3)
    ancestors = np.asarray(posterior.diagnostics["ancestors"])
    assert (ancestors != np.arange(64)).any()
    living = np.asarray(posterior.log_weights) > -np.inf
    texts = {"".join("abc"[token] for token in row) for row in np.asarray(posterior.value["tokens"])[living]}
    assert len(texts) > 1 and all(is_palindrome(text) for text in texts)


def test_one_call_a_step_for_all_particles(monkeypatch):
    calls = []
    for name in ("masks", "accepts"):
        original = getattr(parser_states.ParserStates, name)

        def counted(self, tokens, *rest, name=name, original=original):
            calls.append((name, len(tokens)))
            return original(self, tokens, *rest)

        monkeypatch.setattr(parser_states.ParserStates, name, counted)
    target = CHAIN.constrain(Grammar(PALINDROMES)).program()
    for seed in range(2):
        calls.clear()
        ppl.infer(target, SMC(16), seed=seed)
        assert calls == [("masks", 16)] * CHAIN.num_steps + [("accepts", 16)]


def test_an_equal_grammar_compiles_nothing():
    ppl.infer(CHAIN.constrain(Grammar(PALINDROMES)), SMC(16), seed=0)
    with compilations() as count:
        ppl.infer(CHAIN.constrain(Grammar(PALINDROMES)), SMC(16), seed=1)
    assert not count


def test_states_that_were_dropped_are_parsed_again(monkeypatch):
    monkeypatch.setattr(parser_states, "_KEPT", 1)
    states = parser_states.ParserStates(SUMS, WRITTEN)
    for length in (1, 2, 3, 4, 5, 6):
        states.accepts(np.array([[1, 0, 3, 0, 2, 3]], np.int32), [length])
    assert len(states._kept) == 4
    assert states.accepts(np.array([[1, 0, 3, 0, 2], [1, 0, 0, 0, 0]], np.int32), [5, 2]).tolist() == [True, False]


def test_what_the_parser_raises_is_raised_by_infer(monkeypatch):
    target = CHAIN.constrain(Grammar(PALINDROMES)).program()

    def broken(*_):
        raise RuntimeError("too complex")

    monkeypatch.setattr(parser_states.ParserStates, "masks", broken)
    with pytest.raises(ppl.HostError, match="'constraint' failed: RuntimeError: too complex"):
        ppl.infer(target, SMC(8))


def test_operators():
    sums, palindromes = Grammar(SUMS), Grammar(PALINDROMES)
    both = Regex("a.*") & palindromes
    assert both == palindromes & Regex("a.*") and both.matches("aca") and not both.matches("bcb")
    assert palindromes & palindromes == palindromes
    assert not (sums & palindromes).matches("c") and not palindromes.matches("é")
    for refused in (lambda: sums | palindromes, lambda: Regex("a") | sums, lambda: ~sums):
        with pytest.raises(TypeError, match="combines by `&` only.*inside the grammar"):
            refused()
    with pytest.raises(TypeError, match="Regex, Choice, JsonSchema or Grammar.*'abc'"):
        CHAIN.constrain("abc")


@pytest.mark.parametrize(
    ("lark", "message"),
    [
        ("start: b\nb: missing\n", r"(?s)2\(4\).*unknown name: .missing.*2 \| b: missing"),
        ("start: /[a/", "(?s)unclosed character class"),
        ('b: "a"', "no start rule"),
        ("start: x\nx[max_tokens=3]: /a+/", "line 2: `max_tokens` counts tokens"),
    ],
)
def test_an_invalid_grammar_is_refused_with_its_line(lark, message):
    with pytest.raises(ValueError, match=message):
        Grammar(lark)


def test_a_grammar_is_a_string():
    with pytest.raises(TypeError, match="`lark` must be a string, got int"):
        Grammar(3)


def test_a_grammar_that_no_text_can_begin_is_refused():
    with pytest.raises(ValueError, match="cannot be satisfied within `max_tokens` = 5"):
        CHAIN.constrain(Grammar('start: "x" start | "y"'))


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'genppl\[grammar\]'"):
        Grammar(SUMS)


@pytest.mark.weights
def test_json_of_the_real_model_parses_whenever_it_has_ended():
    from ppl.models import LanguageModel

    cache = os.environ.get("GENPPL_CACHE") or Path.home() / ".cache" / "genppl"
    path = Path(os.environ.get("GENPPL_SMOLLM2") or Path(cache) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not path.exists():
        pytest.fail(f"{path} is missing: run `python scripts/fetch_smollm2.py` or set GENPPL_SMOLLM2.")
    lm = LanguageModel.load(path)
    prompt = [{"role": "user", "content": "Write a JSON list of two fruits and their colors."}]
    chat = lm.chat(prompt, max_tokens=16).constrain(Grammar(JSON) & Regex(r"(?s)\[.*"))
    posterior = ppl.infer(chat, SMC(8), seed=1)
    living = np.flatnonzero(np.asarray(posterior.log_weights) > -np.inf)
    assert living.size and np.isfinite(posterior.log_evidence)
    for particle in living:
        assert isinstance(json.loads(posterior.texts[particle]), list)
