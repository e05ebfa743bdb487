"""Text that goes on from a prompt: the tokens of a continuation write it and nothing else, whatever the tokenizer."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import ppl
from ppl.inference import ImportanceSampling
from ppl.models import Choice, Regex
from ppl.models.language import Decoder, LanguageModel
from ppl.models.language.continuations import continuing
from ppl.models.rewards.reward_model import _separator_token

TEXTS = ["hello world, the news is new", "a new world says hello to the world", "well, the news: hello!"] * 20
TO_SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def trained(*, bytes_alone=False, normalizer=None, cuts, decoder, start=None):
    tokenizer = Tokenizer(models.BPE(byte_fallback=not bytes_alone, unk_token=None if bytes_alone else "<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, cuts
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bytes_alone else []
    special = ["<unk>", "<s>", "</s>", *([] if bytes_alone else BYTES)]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoder
    if start is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(unspecial(tokenizer.to_str())), bos_token="<s>", eos_token="</s>"
    )


def unspecial(text):
    """A trained tokenizer whose byte tokens are plain ones, as files have them."""
    whole = json.loads(text)
    whole["added_tokens"] = [token for token in whole["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(whole)


def build(name):
    level = pre_tokenizers.ByteLevel
    stripped = decoders.Sequence([*TO_SPACES, decoders.Strip(" ", 1, 0)])
    if name == "bytes":
        return trained(bytes_alone=True, cuts=level(add_prefix_space=False), decoder=decoders.ByteLevel())
    if name == "bytes with a space":
        return trained(bytes_alone=True, cuts=level(add_prefix_space=True), decoder=decoders.ByteLevel())
    if name == "sentencepiece":
        return trained(cuts=pre_tokenizers.Metaspace(), decoder=stripped)
    if name == "sentencepiece that starts a document":
        return trained(cuts=pre_tokenizers.Metaspace(prepend_scheme="first"), decoder=stripped, start="<s>")
    if name == "metaspace decoder":
        both = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        return trained(cuts=pre_tokenizers.Metaspace(), decoder=both)
    assert name == "sentencepiece by normalizer"
    replaced = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    cut = pre_tokenizers.Split("▁", behavior="merged_with_next")  # only so that training has words
    tokenizer = trained(normalizer=replaced, cuts=cut, decoder=stripped)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


NAMES = (
    "bytes",
    "bytes with a space",
    "sentencepiece",
    "sentencepiece that starts a document",
    "sentencepiece by normalizer",
    "metaspace decoder",
)
BUILT = {}


@pytest.fixture(params=NAMES)
def lm(request, tiny):
    return model(request.param, tiny)


def model(name, tiny):
    if name not in BUILT:
        tokenizer = build(name)
        config = dataclasses.replace(tiny("llama3").config, vocab_size=len(tokenizer), num_layers=1, end_tokens=(2,))
        BUILT[name] = LanguageModel(Decoder(config, rngs=nnx.Rngs(0)), tokenizer)
    return BUILT[name]


def pairs():
    rng = random.Random(0)
    yield from [("hello", " world"), ("new", "s"), ("hello ", "world"), ("the", ""), ("a", "  b"), ("hello", ", the")]
    for _ in range(60):
        text = "".join(rng.choice(["hello", "world", " ", " ", "new", "s", ",", "é", "x", "\n"]) for _ in range(8))
        cut = rng.randrange(1, len(text))
        yield text[:cut], text[cut:]


def test_tokens_of_prompt_and_continuation_write_both(lm):
    kept = joined_cuts = 0
    for prompt, continuation in pairs():
        before, after = lm.tokenizer.encode(prompt, add_special_tokens=False), lm.encode(continuation)
        whole = lm.decode([*before, *after])
        assert whole == lm.decode(before) + continuation
        if lm.decode(before) == prompt:  # some tokenizers add a space to a text, or drop its first
            kept += 1
            assert whole == prompt + continuation
        assert lm.decode(after, start=False) == continuation
        joined = lm.tokenizer.encode(prompt + continuation, add_special_tokens=False)
        if joined[: len(before)] == before:  # no token spans the cut
            joined_cuts += 1
            assert joined[len(before) :] == after
    assert joined_cuts > 20 and (kept > 40 or "bytes with a space" in BUILT and lm is BUILT["bytes with a space"])


def test_document_start_is_as_the_tokenizer_has_it(lm):
    start = lm.tokenizer.encode("hello world")
    assert lm.encode("hello world", start=True) == start
    assert lm.decode(start) == lm.tokenizer.decode(start)
    plain = lm.tokenizer is BUILT["bytes"].tokenizer if "bytes" in BUILT else False
    assert (continuing(lm.tokenizer) is lm.tokenizer) == plain  # nothing is rebuilt where nothing is done


@pytest.mark.parametrize("name", NAMES[1:4])
def test_log_prob_scores_the_tokens_after_the_prompt(tiny, name):
    lm = model(name, tiny)
    before, world = lm.encode("hello", start=True), lm.encode(" world")
    assert len(world) == 1  # the word with its space, and no other space
    exact = lm.next_token(lm.prefill(before)).log_prob(world[0])
    assert lm.log_prob("hello", " world") == pytest.approx(float(exact), abs=1e-4)
    spans = lm.encode("news", start=True)
    part, rest = lm.encode("new", start=True), lm.encode("s")
    assert spans != part + rest  # one token spans the cut: its parts are scored
    exact = lm.next_token(lm.prefill(part)).log_prob(rest[0])
    assert lm.log_prob("new", "s") == pytest.approx(float(exact), abs=1e-4)


@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece by normalizer"])
def test_constraint_on_a_continuation_says_what_log_prob_says(tiny, name):
    lm = model(name, tiny)
    story = lm.complete("hello", max_tokens=1)
    exact = lm.log_prob("hello", " world")
    for constraint in (Choice([" world"]), Regex(" world")):
        posterior = ppl.infer(story.constrain(constraint), ImportanceSampling(2))
        assert posterior.log_evidence == pytest.approx(exact, abs=1e-4)
        assert posterior.texts == [" world"] * 2
    # An answer is a text of its own: the tokenizer's space before it is no part of it.
    answer = dataclasses.replace(story.combination(), factors=((chat_like(lm), 1.0),))
    posterior = ppl.infer(answer.constrain(Choice(["world"])), ImportanceSampling(2))
    assert posterior.texts == ["world"] * 2
    spelled = [token for token in range(lm.vocab_size) if lm.byte_vocabulary.tokens[token] in (b" world", b"world")]
    law = lm.next_token(lm.prefill("hello"))
    assert posterior.log_evidence == pytest.approx(float(jax.nn.logsumexp(law.log_prob(jnp.array(spelled)))), abs=1e-4)


def chat_like(lm):
    from ppl.models.language.completion import Completion

    return Completion(lm, lm.encode("hello", start=True), 1, continues=False)


def test_texts_follow_the_prompt(lm):
    tokens = lm.encode(" world hello")
    value = {"tokens": np.array([tokens, tokens[::-1]]), "length": np.array([len(tokens), 1])}
    story = lm.complete("hello", max_tokens=4)
    assert story.texts(value) == [" world hello", lm.decode(tokens[-1:], start=False)]
    before = lm.tokenizer.encode("hello", add_special_tokens=False)
    assert lm.decode([*before, *tokens]) == lm.decode(before) + story.texts(value)[0]


def test_separator_of_a_reward_stands_inside_of_a_text(lm):
    token = _separator_token(lm.tokenizer, "\n")
    assert lm.decode([token], start=False) == "\n"


def test_stretch_of_text_ends_with_the_delimiter_wherever_it_stands(tiny):
    lm = model("sentencepiece", tiny)
    delimiter = lm.complete("hello", max_tokens=3).delimit(" world")
    mark = delimiter.advance(jnp.int32(0), jnp.int32(lm.encode(" world")[0]))
    assert bool(delimiter.complete(mark))
