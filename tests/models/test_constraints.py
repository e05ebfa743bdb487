"""Constraints: patterns against `re.fullmatch`, masks and distances against brute force, operators against sets."""

import functools
import itertools
import os
import random
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.models.constraints import (
    Choice,
    Regex,
    Vocabulary,
    accepts,
    advance,
    allowed,
    check_reachable,
)
from ppl.models.constraints.tables import UNREACHABLE

LENGTH = 5
END = 6
# Overlapping tokens, two of the same text, one that writes nothing, an end token, and a special one.
LETTERS = Vocabulary((b"a", b"b", b"ab", b"ba", b"bab", b"a", b"</s>", None), (END,))
# Tokens that cut characters: é is C3 A9, an emoji F0 9F 98 80.
BYTES = Vocabulary((b"a", b"\xc3", b"\xa9", b"\xc3\xa9a", b"\xf0\x9f", b"\x98\x80", b"\n", b"</s>"), (7,))

LETTER_PATTERNS = [
    "(ab|ba)*",
    "a*b?",
    "a|ab",
    "a*?",
    "(?:a|ab)(?:b|)",
    "[^a]+",
    "b{2,4}",
    "(a{1,2}b){1,3}",
    "^ab$|^b+",
    "(?i)A+B",
    "",
    ".{3}",
    "(?P<x>a)b(?:ab)+",
    r"\w*bb\w*",
    r"a[^\s\S]|b",
    "^ab$|^ba$",
    "^a(b|$)",
    r"a(?:b|\Z)+|(?:^b|a)*",
    r"a\b|\bb\Bab?\b",
    "(?!)|(a*?b)??",
]
BYTE_PATTERNS = [
    ".",
    ".*",
    "é+",
    "[^a]",
    "(?s).{2}",
    r"\w+",
    "é?a*",
    "[à-ü]a",
    "\U0001f600|\n",
    r"\W+",
    r"a\Z|\Aé",
    "[^\n]*a",
    "a$\n?|é$\n",
    "(?m)(?:^a$\n?|^é\n*$)*",
    r"(?a).*\b.*",
    r"\n\B.*|é\Ba",
    "(?:a|$)*\n?",
]


def sequences(vocabulary, length=LENGTH):
    drawable = [t for t, text in enumerate(vocabulary.tokens) if text is not None and t not in vocabulary.end_tokens]
    for count in range(length + 1):
        yield from itertools.product(drawable, repeat=count)


def text_of(vocabulary, tokens):
    """The text, or None where the bytes are not UTF-8."""
    try:
        return vocabulary.text(tokens).decode()
    except UnicodeDecodeError:
        return None


@functools.lru_cache(maxsize=4)
def all_texts(vocabulary):
    return [(tokens, text_of(vocabulary, tokens)) for tokens in sequences(vocabulary)]


def run(automaton, tokens):
    """The state after tokens, on the host."""
    table, token_class = np.asarray(automaton.next_state), np.asarray(automaton.token_class)
    state = int(automaton.start)
    for token in tokens:
        state = int(table[state, token_class[token]])
    return state


def accepted(automaton, vocabulary):
    accepting = np.asarray(automaton.accepting)
    return {tokens for tokens, _ in all_texts(vocabulary) if accepting[run(automaton, tokens)]}


def expected(vocabulary, matches):
    return {tokens for tokens, text in all_texts(vocabulary) if text is not None and matches(text)}


@pytest.mark.parametrize("pattern", LETTER_PATTERNS)
def test_regex_accepts_what_fullmatch_does_for_every_tokenisation(pattern):
    automaton = Regex(pattern).compile(LETTERS)
    assert accepted(automaton, LETTERS) == expected(LETTERS, lambda text: re.fullmatch(pattern, text))


@pytest.mark.parametrize("pattern", BYTE_PATTERNS)
def test_regex_accepts_what_fullmatch_does_where_tokens_cut_characters(pattern):
    automaton = Regex(pattern).compile(BYTES)
    assert accepted(automaton, BYTES) == expected(BYTES, lambda text: re.fullmatch(pattern, text))


@pytest.mark.parametrize(
    "pattern", [r"\w", r"\s", r"\d", r"\W", "(?i)k", "(?i)[^i]", "(?i)[a-zß-ÿ]", "(?ai)[k-s]", "(?a)\\w"]
)
def test_one_character_patterns_agree_with_fullmatch_on_every_character(pattern):
    language = Regex(pattern).language
    characters = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    expected = np.zeros(len(characters), bool)
    expected[[found.start() for found in re.finditer(pattern, characters)]] = True  # each match is one character
    width = np.searchsorted([0x80, 0x800, 0x10000], np.frombuffer(characters.encode("utf-32-le"), np.uint32), "right")
    text, accepted = np.frombuffer(characters.encode(), np.uint8), []
    for one in range(4):
        count = int((width == one).sum())
        state = np.full(count, language.start)
        for column in text[: count * (one + 1)].reshape(count, one + 1).T:
            state = language.next_state[state, column]
        accepted.append(language.accepting[state])
        text = text[count * (one + 1) :]
    assert np.flatnonzero(np.concatenate(accepted) != expected).tolist() == []


def test_choice_accepts_its_strings_alone():
    strings = ["ab", "abba", "", "é"]
    for vocabulary in (LETTERS, BYTES):
        automaton = Choice(strings).compile(vocabulary)
        assert accepted(automaton, vocabulary) == expected(vocabulary, lambda text: text in strings)


@pytest.mark.parametrize("vocabulary", [LETTERS, BYTES], ids=["letters", "bytes"])
def test_operators_are_those_of_sets(vocabulary):
    first, second = Regex("(?s)(ab|é|a|\n)*"), Regex("(?s).{1,3}|bb.*")
    texts = {tokens for tokens, text in all_texts(vocabulary) if text is not None}
    a, b = accepted(first.compile(vocabulary), vocabulary), accepted(second.compile(vocabulary), vocabulary)
    assert 0 < len(a & b) < len(a | b) < len(texts)
    cases = {
        first & second: a & b,
        first | second: a | b,
        ~first: texts - a,
        ~(first | second): texts - a - b,
        ~first & second | ~second & first: a ^ b,
        ~~first: a,
        first & ~first: set(),
        first | ~first: texts,
    }
    for constraint, tokens in cases.items():
        assert accepted(constraint.compile(vocabulary), vocabulary) == tokens, constraint


@pytest.mark.parametrize(
    ("constraint", "vocabulary"),
    [
        (Regex("(ab|ba)*"), LETTERS),
        (Regex("(a{1,2}b){1,3}"), LETTERS),
        (Choice(["abab", "bb"]), LETTERS),
        (~Regex("a*"), LETTERS),
        (Regex("é?a{2}|\U0001f600\n"), BYTES),
        (~Regex(".*a"), BYTES),
    ],
    ids=str,
)
def test_masks_and_distances_agree_with_brute_force(constraint, vocabulary):
    automaton = constraint.compile(vocabulary)
    found = accepted(automaton, vocabulary)
    mask_of = jax.jit(jax.vmap(allowed, in_axes=(None, None, 0)))
    masks = {}
    for tokens in sequences(vocabulary, 2):
        # The fewest tokens with which a prefix is completed; sequences of LENGTH tokens at most are seen.
        rest = LENGTH - len(tokens)
        state = run(automaton, tokens)
        needed = [len(one) - len(tokens) for one in found if one[: len(tokens)] == tokens]
        distance = int(automaton.distance[state])
        assert distance == min(needed) if needed else distance > rest
        if state not in masks:
            masks[state] = np.asarray(mask_of(automaton, state, jnp.arange(-1, rest)))
        for budget in range(-1, rest):
            for token in range(len(vocabulary.tokens)):
                if token in vocabulary.end_tokens:
                    possible = tokens in found
                elif vocabulary.tokens[token] is None:
                    possible = False
                else:
                    longer = (*tokens, token)
                    possible = any(one[: len(longer)] == longer and len(one) <= len(longer) + budget for one in found)
                assert masks[state][budget + 1, token] == possible, (tokens, token, budget)


def test_a_walk_along_masks_always_ends_in_time():
    automaton = Regex("(a{1,2}b){1,3}").compile(LETTERS)
    rng = random.Random(0)
    for _ in range(100):
        state, tokens, max_tokens = automaton.start, [], rng.randint(2, 7)
        while len(tokens) < max_tokens:
            mask = np.asarray(allowed(automaton, state, max_tokens - len(tokens) - 1))
            if not mask.any():  # accepted, but no longer text fits
                break
            token = rng.choice(np.flatnonzero(mask).tolist())
            state = advance(automaton, state, token)
            if token == END:
                break
            tokens.append(token)
        assert bool(accepts(automaton, state)) and re.fullmatch("(a{1,2}b){1,3}", LETTERS.text(tokens).decode())


def test_automata_are_pytrees_and_batch():
    automaton = Regex("(ab|ba)*").compile(LETTERS)
    states = jnp.arange(automaton.next_state.shape[0], dtype=jnp.int32)
    for state in states:
        for token in range(len(LETTERS.tokens)):
            one = advance(automaton, state, jnp.int32(token))
            assert one.dtype == jnp.int32
            row = jax.jit(jax.vmap(advance, in_axes=(None, 0, None)))(automaton, states, token)
            assert int(row[state]) == int(one)
            if token == END:
                assert int(one) == int(state)
    masks = jax.vmap(allowed, in_axes=(None, 0, None))(automaton, states, 3)
    assert masks.shape == (len(states), 8) and masks.dtype == bool
    assert not masks[-1].any() and not bool(accepts(automaton, states[-1]))  # the dead state

    def step(state, token):
        state = advance(automaton, state, token)
        return state, accepts(automaton, state)

    _, flags = jax.lax.scan(step, automaton.start, jnp.array([2, 0, 1, 3, END, END]))
    assert flags.tolist() == [True, False, True, True, True, True]
    leaves, structure = jax.tree.flatten(automaton)
    assert len(leaves) == 5 and jax.tree.unflatten(structure, leaves).num_bytes == automaton.num_bytes > 0
    assert re.fullmatch(r"Automaton\(\d+ states, \d+ classes of 8 tokens, \d+ bytes\)", repr(automaton))


def test_compilation_inside_a_trace_gives_arrays():
    regex = Regex("(ab)*|bba")

    @jax.jit
    def start_accepts(x):
        automaton = regex.compile(LETTERS)
        assert not isinstance(automaton.distance, jax.core.Tracer)
        return accepts(automaton, automaton.start) & (x > 0)

    assert bool(start_accepts(1.0))
    assert regex.compile(LETTERS) is Regex("(ab)*|bba").compile(Vocabulary(LETTERS.tokens, LETTERS.end_tokens))


def test_automata_are_the_smallest_there_are():
    one, other = Regex("(ab|ba)*"), Regex("((ab|ba)(ab|ba))*|(?:ba|ab)((ab|ba){2})*")
    assert one != other and one.language.next_state.shape == other.language.next_state.shape == (4, 256)
    # Over tokens that are whole pairs, the states within a pair are gone; equal tokens share a class.
    pairs = Vocabulary((b"ab", b"ba", b"ab", b"x", None), ())
    automaton = one.compile(pairs)
    assert automaton.next_state.shape == (2, 3) and automaton.num_bytes == 5 + 6 + 2 * 4 + 2 + 4
    assert len(set(np.asarray(automaton.token_class)[:3].tolist())) == 1


def test_a_budget_that_is_too_small_is_found_before_running():
    automaton = Regex("(ab){4}").compile(LETTERS)
    check_reachable(automaton, 4)
    with pytest.raises(ValueError, match=r"`max_tokens` = 3: its shortest text takes 4 tokens"):
        check_reachable(automaton, 3)
    for never in (Regex("x"), Regex("a") & Regex("b")):
        automaton = never.compile(LETTERS)
        assert int(automaton.distance[automaton.start]) == UNREACHABLE
        with pytest.raises(ValueError, match="no text that this vocabulary can write"):
            check_reachable(automaton, 1000)


# Where Python gives a meaning to an anchor, to a flag, to a boundary, it is that meaning.
MEANINGS = [
    (r"^v1$|^v2$", ["v1", "v2"], ["v1v2", "v1\n", ""]),
    ("^a(b|$)", ["a", "ab"], ["a\n", "b"]),
    (r"(?:^a|b)+", ["a", "ab", "bb"], ["ba", ""]),
    ("a^b|c$d", [], ["ab", "cd", "a\nb"]),
    ("a$\n", ["a\n"], ["a", "a\n\n"]),
    ("a\\Z\n", [], ["a\n", "a"]),
    ("(?m)a$\n^b", ["a\nb"], ["ab", "a\n"]),
    ("(?m:^a$\n)+a?$", ["a\n", "a\na\n", "a\na"], ["a", "aa"]),
    (r"\bné\b|\Bx", ["né"], ["x", "n"]),
    (r"(?a)né\b", [], ["né"]),
    (r"(?a)né\B", ["né"], []),
    (r"a\b.\bb", ["a b", "a-b"], ["axb", "ab"]),
    ("(?i)STRASSE|ſ", ["strasſe", "ſ", "S"], ["straße"]),
    ("(?i:a)B", ["aB", "AB"], ["ab"]),
    ("(?i)a(?-i:B)", ["AB", "aB"], ["Ab"]),
    ("(?x) a b # a comment", ["ab"], ["a b"]),
    ("(?#comment)(?P<name>a)", ["a"], [""]),
    (".\n|(?s:.)", ["a\n", "\n", "\r"], ["\n\n", "aa"]),
    (r"\d\s", ["٣\u2003", "0\x1c"], ["0\ufeff"]),
    ("[^]a]", ["b", "^", "\n"], ["]", "a"]),
    ("a{0}b{,2}", ["", "b", "bb"], ["a", "bbb"]),
    ("(?:a?){5}", ["", "aaaaa"], ["aaaaaa"]),
    (".", ["\U0010ffff", "\r", "\u2028"], ["\n", ""]),
    ("", [""], ["a", "\n"]),
    ("$", [""], ["\n"]),
    ("$\n", ["\n"], [""]),
    ("(?!)", [], ["", "a"]),
]


@pytest.mark.parametrize(("pattern", "right", "wrong"), MEANINGS, ids=str)
def test_each_construct_means_what_fullmatch_means(pattern, right, wrong):
    regex = Regex(pattern)
    for text in right + wrong:
        assert (re.fullmatch(pattern, text) is not None) == (text in right)
        assert regex.matches(text) == (text in right), text


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(a", "unterminated subpattern"),
        ("a**", "multiple repeat"),
        (r"\p{L}", "bad escape"),
        ("(?=a)b", "look-around.*`Regex(a) & Regex(b)`"),
        ("(?<!a)b", "look-around.*`Regex(a) & ~Regex(b)`"),
        (r"(a)\1", "back-reference.*Write its cases out"),
        ("(?P<x>a)(?P=x)", "back-reference"),
        ("(a)?(?(1)b|c)", "conditional group.*alternatives"),
        ("a++", "possessive.*`Regex(a) & ~Regex(b)`"),
        ("a{1,2}+", "possessive"),
        ("(?>a)", "atomic group.*`(?:...)`"),
        ("(a{100}){10000}", "about 1000000 states"),
        (".*a.{40}", "more than 30"),
        ("(?:a{0,300}){300}", "states"),
    ],
)
def test_patterns_that_cannot_be_had_are_named_with_what_to_write_instead(pattern, reason):
    parts = ".*".join(map(re.escape, reason.split(".*")))
    with pytest.raises(ValueError, match=rf"(?s)`pattern` {re.escape(repr(pattern))}.*{parts}"):
        Regex(pattern)


def test_operators_whose_automaton_would_be_too_large_are_refused():
    first, second = Regex("(?s).*a.{11}"), Regex("(?s).*b.{11}")
    with pytest.raises(ValueError, match=r"an automaton of more than \d+ states is needed; at most 300000"):
        (first & second).matches("a")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`strings` is empty"):
        Choice([])
    with pytest.raises(TypeError, match="the string 'yes'"):
        Choice("yes")
    with pytest.raises(ValueError, match="surrogate"):
        Choice(["\ud800"])
    with pytest.raises(TypeError, match="`pattern` must be a string, got int"):
        Regex(3)
    with pytest.raises(ValueError, match=r"`end_tokens` must be in \[0, 1\)"):
        Vocabulary((b"a",), (1,))
    with pytest.raises(ValueError, match="`tokens` is empty"):
        Vocabulary(())
    with pytest.raises(ValueError, match="`tokens` must hold bytes or None, got 'a'"):
        Vocabulary(("a",))
    with pytest.raises(TypeError):
        Regex("a") & "b"


# Vocabularies of tokenizers.


def byte_level():
    """Byte-level BPE with merges, a special token, and an added one that is not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("he", "l"), ("Ġ", "w"), ("Ã", "©"), ("ð", "Ł")]
    names += ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<end>", special=True), AddedToken("two words é", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)


def sentencepiece(prefix):
    from ppl.models.language.gguf_tokenizer import build_tokenizer

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "é", "▁▁"]
    types = [2, 3, 3, *([6] * 256), *([1] * 7)]
    return build_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_space_prefix": prefix,
        }
    )


@pytest.mark.parametrize(
    "build",
    [byte_level, lambda: sentencepiece(True), lambda: sentencepiece(False)],
    ids=["bytes", "sp", "sp-no-prefix"],
)
def test_the_bytes_of_tokens_are_what_the_tokenizer_decodes(build):
    tokenizer = build()
    size = len(tokenizer)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, vocab_size=size + 3, end_tokens=(tokenizer.eos_token_id,))
    assert len(vocabulary.tokens) == size + 3 and vocabulary.tokens[-3:] == (None,) * 3
    assert vocabulary.tokens[tokenizer.eos_token_id] is None
    rng = random.Random(1)
    drawable = [token for token, text in enumerate(vocabulary.tokens) if text is not None]
    compared = 0
    for length in [1] * len(drawable) + [2, 3, 5, 8] * 200:
        tokens = drawable[compared : compared + 1] if length == 1 else rng.choices(drawable, k=length)
        compared += length == 1
        text = text_of(vocabulary, tokens)
        if text is not None:
            assert tokenizer.decode(tokens, skip_special_tokens=False) == text, tokens
    for text in ("hello wé", " ab a  b", "\U0001f600 a"):
        assert vocabulary.text(tokenizer.encode(text, add_special_tokens=False)).decode() == text


def test_a_dropped_space_is_part_of_the_constraint():
    vocabulary = Vocabulary((b" a", b"a", b" ", b"b"), (), strips_space=True)
    for pattern in ("a a", " a", "(a ?)+b?", ""):
        automaton = Regex(pattern).compile(vocabulary)
        assert accepted(automaton, vocabulary) == expected(vocabulary, lambda text, p=pattern: re.fullmatch(p, text))


def test_tokenizers_that_write_otherwise_are_refused():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"\['WordPiece'\]; accepted are ByteLevel"):
        Vocabulary.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))


@pytest.fixture(scope="module")
def smollm2():
    from ppl.models import LanguageModel

    cache = os.environ.get("GENPPL_CACHE") or Path.home() / ".cache" / "genppl"
    path = Path(os.environ.get("GENPPL_SMOLLM2") or Path(cache) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not path.exists():
        pytest.fail(f"{path} is missing: run `python scripts/fetch_smollm2.py` or set GENPPL_SMOLLM2.")
    lm = LanguageModel.load(path)
    return lm, Vocabulary.from_tokenizer(lm.tokenizer, vocab_size=lm.vocab_size, end_tokens=lm.end_tokens)


@pytest.mark.weights
def test_the_bytes_of_a_real_vocabulary_are_what_the_model_decodes(smollm2):
    lm, vocabulary = smollm2
    rng = random.Random(0)
    drawable = [token for token, text in enumerate(vocabulary.tokens) if text is not None]
    assert len(vocabulary.tokens) == lm.vocab_size and len(drawable) > lm.vocab_size - 30
    singles = [[token] for token in rng.sample(drawable, 3000)]
    for tokens in singles + [rng.choices(drawable, k=rng.randint(2, 12)) for _ in range(2000)]:
        text = text_of(vocabulary, tokens)
        if text is not None:
            assert lm.decode(tokens) == text, tokens
    emoji = "naïve 😀🔥 日本"
    assert vocabulary.text([*lm.encode(emoji), *lm.end_tokens, 5]).decode() == emoji


@pytest.mark.weights
def test_a_real_vocabulary_spells_a_text_in_every_way(smollm2):
    lm, vocabulary = smollm2
    automaton = Regex(r"(Apples|Pears)\.").compile(vocabulary)
    assert automaton.num_bytes < 60_000
    texts = {b"Apples.", b"Pears."}
    # Sequences by brute force: every way to cut the two texts into tokens.
    tokens_of = {}
    for token, text in enumerate(vocabulary.tokens):
        if text is not None and any(text in one for one in texts):
            tokens_of.setdefault(text, []).append(token)

    def cuts(text):
        if not text:
            yield ()
        for width in range(1, len(text) + 1):
            for token in tokens_of.get(text[:width], ()):
                for rest in cuts(text[width:]):
                    yield (token, *rest)

    expected = {cut for text in texts for cut in cuts(text)}
    found = set()

    def walk(state, tokens):
        mask = np.asarray(allowed(automaton, state, 10))
        if mask[lm.end_tokens[0]]:
            found.add(tokens)
        for token in np.flatnonzero(mask):
            if token not in lm.end_tokens:
                walk(advance(automaton, state, int(token)), (*tokens, int(token)))

    walk(automaton.start, ())
    assert found == expected and len(found) > 20
    assert int(automaton.distance[automaton.start]) == min(map(len, expected))


@pytest.mark.parametrize("strips_space", [False, True])
def test_a_vocabulary_without_any_text_still_compiles(strips_space):
    vocabulary = Vocabulary((None, b"</s>"), (1,), strips_space)
    automaton = Regex("a?").compile(vocabulary)
    assert np.asarray(allowed(automaton, automaton.start, 3)).tolist() == [False, True]
