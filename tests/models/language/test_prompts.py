"""Prompts: texts, tokens, what tokenizers return, and conversations in chat templates."""

import jax.numpy as jnp
import numpy as np
import pytest

from ppl.models.language import LanguageModel

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Gemma's and older Mistral templates do.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DROPS_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
WITH_TOOLS = (
    "{% if tools %}tools:{% for t in tools %}{{ t['function']['name'] }};{% endfor %}{% endif %}"
    "{% if not thinking | default(true) %}quick;{% endif %}" + CHATML
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def lm(tiny):
    return tiny("llama_tied")


@pytest.fixture(scope="module")
def chatting(lm, byte_tokenizer):
    """A function from a chat template to a model with it."""

    def build(template):
        tokenizer = type(byte_tokenizer)(
            tokenizer_object=byte_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
        )
        tokenizer.chat_template = template
        return LanguageModel(lm.decoder, tokenizer)

    return build


def shown(lm, *arguments, **changes):
    return lm.tokenizer.decode(lm.chat_prompt(*arguments, **changes))


@pytest.mark.parametrize(
    "form",
    [
        tuple, np.array, jnp.array, lambda t: np.array(t, np.uint64), lambda t: np.array(t, np.int16),
        lambda t: [np.int64(token) for token in t], lambda t: [t], lambda t: np.array([t]),
        lambda t: {"input_ids": t}, lambda t: {"input_ids": [t], "attention_mask": [[1] * len(t)]},
        lambda t: {"input_ids": [[2, 2, *t]], "attention_mask": [[0, 0, *[1] * len(t)]]},
    ],
)  # fmt: skip
def test_tokens_come_in_every_form_of_one_row(lm, form):
    tokens = lm.encode("hello")
    assert lm.complete(form(tokens), max_tokens=2).prompt == tuple(tokens)


def test_what_a_tokenizer_returns_is_a_prompt(lm):
    tokens = tuple(lm.encode("hello"))
    for encoded in (
        lm.tokenizer("hello"),
        lm.tokenizer("hello", return_tensors="np"),
        lm.tokenizer(["hello"], return_tensors="np"),
        lm.tokenizer("hello", return_tensors="np").input_ids,
        lm.tokenizer.backend_tokenizer.encode("hello"),
    ):
        assert lm.complete(encoded, max_tokens=2).prompt == tokens
    np.testing.assert_array_equal(lm.prefill(lm.tokenizer("hello")).hidden, lm.prefill("hello").hidden)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (["one", "two"], TypeError, "`prompt` is a list of 2 strings; accepted are one text .*one process for each"),
        (np.array(["one"]), TypeError, "`prompt` must hold whole numbers, got <U3"),
        (b"hello", TypeError, r"`prompt` is bytes; accepted are .*give prompt.decode\(\)"),
        (bytearray(b"hello"), TypeError, "`prompt` is bytearray"),
        ([1.0, 2.0], TypeError, r"`prompt` must hold whole numbers, got float64 \(\[1.0, 2.0\]\)"),
        (np.array([True, False]), TypeError, "`prompt` must hold whole numbers, got bool"),
        ([None, 3], TypeError, "`prompt` must hold whole numbers, got object"),
        (5, TypeError, "`prompt` is 5 of type int64; accepted are"),
        (None, TypeError, "`prompt` is None of type object; accepted are"),
        ({"text": [1]}, TypeError, r"`prompt` is a mapping without `input_ids`, it has \['text'\]"),
        ([[1, 2], [3, 4]], ValueError, "`prompt` has 2 rows; accepted are .* one row at a time"),
        ([[1, 2], [3]], ValueError, "`prompt` has rows of several lengths"),
        ({"input_ids": [[1], [2]]}, ValueError, "`prompt` has 2 rows"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, ValueError, r"`attention_mask` of `prompt` has shape \(1,\)"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, ValueError, "`prompt` is empty"),
        (np.zeros((1, 1, 3), int), TypeError, r"`prompt` is \(1, 1, 3\) of type int64"),
        ([], ValueError, r"`prompt` is empty: give at least one token, .* \[1\]"),
        ("", ValueError, "`prompt` is empty"),
        (np.zeros(0, np.int32), ValueError, "`prompt` is empty"),
        ([3, -1], ValueError, r"tokens outside of \[0, 128\): \[-1\]"),
        (np.array([2**63], np.uint64), ValueError, r"tokens outside of \[0, 128\): \[9223372036854775808\]"),
    ],
)  # fmt: skip
def test_other_prompts_are_refused_with_what_is_accepted(lm, prompt, error, message):
    for read in (lm.prefill, lambda prompt: lm.complete(prompt, max_tokens=2)):
        with pytest.raises(error, match=message):
            read(prompt)


def test_encode_takes_one_string(lm):
    with pytest.raises(TypeError, match="`text` must be a string, got list"):
        lm.encode(["a"])


@pytest.mark.parametrize("template", [CHATML, WITH_TOOLS, ALTERNATES])
def test_a_chat_prompt_is_what_transformers_makes_of_the_conversation(chatting, template):
    lm = chatting(template)
    longer = [*TALK, {"role": "assistant", "content": "hello "}, {"role": "user", "content": "a\n b"}]
    for messages in (TALK, longer, tuple(TALK)):
        expected = lm.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)["input_ids"]
        assert lm.chat_prompt(messages) == expected
    for answer in ("yes, I", "yes ", "</s>", "hi"):
        messages = [*TALK, {"role": "assistant", "content": answer}]
        expected = lm.tokenizer.apply_chat_template(messages, continue_final_message=True)["input_ids"]
        assert lm.chat_prompt(messages) == expected
        assert lm.chat(messages, max_tokens=2).prompt == tuple(expected)


def test_a_last_message_of_the_assistant_is_continued(chatting):
    lm = chatting(CHATML)
    assert shown(lm, TALK) == "<user>hi</s><assistant>"
    assert shown(lm, [*TALK, {"role": "assistant", "content": "Iam"}]) == "<user>hi</s><assistant>Iam"
    assert shown(lm, [*TALK, {"role": "assistant", "content": ""}]) == "<user>hi</s><assistant>"
    assert lm.chat([*TALK, {"role": "assistant", "content": "Iam"}], max_tokens=2).continues
    assert not lm.chat(TALK, max_tokens=2).continues


def test_content_may_be_a_list_of_text_parts(chatting):
    lm = chatting(CHATML)
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert lm.chat_prompt([{"role": "user", "content": parts}]) == lm.chat_prompt(TALK)
    assert lm.chat_prompt([{"role": "user", "content": tuple(parts)}]) == lm.chat_prompt(TALK)


def test_tools_and_arguments_reach_the_template(chatting):
    lm = chatting(WITH_TOOLS)

    def weather(place: str) -> str:
        """Tell the weather.

        Args:
            place: where.
        """

    schema = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
    for tool in (weather, schema):
        assert shown(lm, TALK, tools=[tool]).startswith("tools:weather;<user>")
        assert lm.chat(TALK, max_tokens=2, tools=[tool]).prompt == tuple(lm.chat_prompt(TALK, tools=[tool]))
    assert shown(lm, TALK, thinking=False).startswith("quick;<user>")
    assert shown(lm, TALK, tools=[], thinking=True) == shown(lm, TALK, tools=None)
    assert shown(chatting(None), TALK, chat_template="{{ messages[0]['content'] }}!") == "hi!"


@pytest.mark.parametrize(
    ("template", "messages", "changes", "error", "message"),
    [
        (None, TALK, {}, ValueError, "no chat template"),
        (CHATML, "hi", {}, TypeError, "`messages` must be a list of dicts with `role` and `content`, got str"),
        (CHATML, TALK[0], {}, TypeError, "`messages` must be a list of dicts .*, got dict"),
        (CHATML, [], {}, ValueError, "`messages` is empty"),
        (CHATML, ["hi"], {}, TypeError, r"`messages\[0\]` must be a dict with `role` and `content`, got str"),
        (CHATML, [{"content": "hi"}], {}, ValueError, r"`messages\[0\]` must have a `role`"),
        (CHATML, [*TALK, {"role": "user"}], {}, ValueError, r"`messages\[1\]`, of the role user, has no `content`"),
        (CHATML, [{"role": "user", "content": 3}], {}, TypeError, r"`messages\[0\]` must have a string or .*, got int"),
        (CHATML, [{"role": "user", "content": ["hi"]}], {}, TypeError, r"`messages\[0\]\['content'\]\[0\]` must be"),
        (
            CHATML, [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], {}, ValueError,
            r"`messages\[0\]\['content'\]\[0\]` is of type 'image_url'; .* accepted is 'text'",
        ),
        (CHATML, [{"role": "user", "content": [{"type": "text"}]}], {}, TypeError, "must have a string as `text`"),
        (CHATML, [{"role": "assistant", "content": ""}], {}, ValueError, "has an empty assistant message alone"),
        (
            NO_SYSTEM, [{"role": "system", "content": "be kind"}, *TALK], {}, ValueError,
            "refuses this conversation, with the roles system, user: System role not supported.*first user message",
        ),
        (
            DROPS_SYSTEM, [{"role": "system", "content": "be kind"}, *TALK], {}, ValueError,
            r"leaves out `messages\[0\]`, of the role system: .*first user message",
        ),
        (ALTERNATES, [*TALK, *TALK], {}, ValueError, "with the roles user, user: roles must alternate"),
        ("{% for", TALK, {}, ValueError, "refuses this conversation"),
        ("{{ messages[0]['content'] + 3 }}", TALK, {}, ValueError, "refuses this conversation"),
        (CHATML, TALK, dict(tools=[lambda: 0]), ValueError, "the chat template has no use for `tools`"),
        (CHATML, TALK, dict(enable_thinkin=True), ValueError, "the chat template has no use for `enable_thinkin`"),
        (CHATML, TALK, dict(add_generation_prompt=False), TypeError, "`add_generation_prompt` is decided by"),
        (WITH_TOOLS, TALK, dict(tools="weather"), TypeError, "`tools` must be a list .*, got str"),
        (WITH_TOOLS, TALK, dict(tools=[3]), TypeError, r"`tools` must hold functions or JSON schemas \(dicts\), got 3"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_are_refused_in_words(chatting, template, messages, changes, error, message):
    with pytest.raises(error, match=message):
        chatting(template).chat(messages, max_tokens=2, **changes)


def test_a_template_that_appends_an_end_token_does_not_end_the_prompt_in_it(chatting):
    lm = chatting("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token }}")
    assert lm.chat_prompt(TALK) == lm.encode("hi")
    assert shown(chatting(CHATML), TALK).count("</s>") == 1  # within, it stays
