"""Targets on the real SmolLM2: log Z against sums over all tokenisations, valid JSON, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC
from ppl.models import Choice, JsonSchema, MarkovChain, Regex

pytestmark = [pytest.mark.slow, pytest.mark.weights]
WORDS = "yes no red blue one two six ten cat dog cow hen oak elm fig pea tea sun sea ice".split()


@pytest.fixture(scope="module")
def question(smollm2):
    return smollm2.chat([{"role": "user", "content": "Say one short English word, in lower case."}], max_tokens=6)


def tokenisations(word, vocabulary):
    """Every sequence of tokens that writes a word."""
    if not word:
        return [()]
    return [
        (token, *rest)
        for length in range(1, len(word) + 1)
        for token in vocabulary.get(word[:length], [])
        for rest in tokenisations(word[length:], vocabulary)
    ]


def test_choice_has_the_evidence_of_all_its_tokenisations(smollm2, question):
    """A completion counts if its tokens, whatever they are, write one of the words and an end token follows."""
    vocabulary = {}
    for token, text in enumerate(smollm2.byte_vocabulary.tokens):
        if text is not None:
            vocabulary.setdefault(text, []).append(token)
    prompt = list(question.prompt)
    log_probs = []
    for word in WORDS:
        for tokens in tokenisations(word.encode(), vocabulary):
            logits = np.asarray(smollm2.forward([*prompt, *tokens]), np.float64)[len(prompt) - 1 :]
            logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
            written = sum(row[token] for row, token in zip(logits, tokens, strict=False))
            log_probs.append(written + np.logaddexp.reduce(logits[len(tokens)][list(smollm2.end_tokens)]))
    assert len(log_probs) > 2 * len(WORDS)
    exact = np.logaddexp.reduce(log_probs)
    target = question.constrain(Choice(WORDS))
    runs = [ppl.infer(target, SMC(64), seed=seed) for seed in range(30)]
    assert {text for run in runs for text in run.texts} <= set(WORDS)
    ratio = np.exp(np.array([float(run.log_evidence) for run in runs]) - exact)
    error = ratio.std(ddof=1) / np.sqrt(len(runs))
    assert error < 0.2
    assert abs(ratio.mean() - 1) < 5 * error


def test_json_is_valid_every_time(shallow):
    schema = {
        "type": "object",
        "properties": {
            "fruit": {"type": "string", "maxLength": 8},
            "count": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["fruit", "count"],
    }
    chat = shallow.chat([{"role": "user", "content": "Three apples, as JSON."}], max_tokens=28)
    posterior = ppl.infer(chat.constrain(JsonSchema(schema), require_end=True), SMC(16), seed=1)
    for text in posterior.texts:
        value = json.loads(text)
        assert set(value) == {"fruit", "count"} and len(value["fruit"]) <= 8 and 1 <= value["count"] <= 9


def test_power_of_a_completion_is_the_power_of_its_probability(shallow):
    """Two tokens of a restricted alphabet: log Z of p^2 against the sum of squares."""
    target = shallow.complete("The letters are", max_tokens=2).constrain(Choice([" a b", " a c", " b c"]))
    plain = ppl.infer(target, SMC(8), seed=0)
    squared = target**2.0
    path = shallow.encode(plain.texts[0])
    assert len(path) == 2
    once, twice = (float(ppl.log_density(t.program(), {"path": jnp.array(path)})) for t in (target, squared))
    assert twice == pytest.approx(2 * once, rel=1e-5)
    assert once == pytest.approx(shallow.log_prob("The letters are", plain.texts[0]), rel=1e-4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p.constrain(Regex("(a")), "`pattern` '\\(a' is no regular expression"),
        (
            lambda p: p.constrain(Regex("a{200}")),
            "cannot be satisfied within `max_tokens` = 6: its shortest text takes",
        ),
        (lambda p: p * p.lm.complete("a", max_tokens=7), "cannot be multiplied: max_tokens: 6 and 7"),
        (lambda p: p * MarkovChain(jnp.zeros(2), jnp.zeros((2, 2)), 6), "vocabulary: 49152 tokens .* and 2 symbols"),
        (lambda p: p**-1, "power must be at least 0"),
        (lambda p: ppl.infer(p**0.0, SMC(2)), "powers must sum to more than 0"),
        (lambda p: ppl.infer(p.by_steps("", max_steps=2, step_tokens=2), SMC(2)), "`delimiter` must be a string"),
        (lambda p: p.by_steps("x", max_steps=0, step_tokens=2), "`max_steps` must be an int of at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_running(question, make, message):
    with pytest.raises(ValueError, match=message):
        make(question)


def test_host_function_is_called_once_for_all_particles(shallow):
    question = shallow.complete("One word:", max_tokens=6)
    calls = []

    def reward(texts):
        calls.append(len(texts))
        return [0.1 * len(text) for text in texts]

    posterior = ppl.infer(question.tilt(ppl.host(reward)), SMC(4))
    assert calls == [4]
    lengths = np.array([len(text) for text in posterior.texts])
    np.testing.assert_allclose(posterior.log_weights, 0.1 * lengths - np.logaddexp.reduce(0.1 * lengths), atol=1e-5)
