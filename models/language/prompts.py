"""What a prompt may be: a text, the tokens of one text, or a conversation in a model's chat template.

A text becomes what the tokenizer makes of it, with what it puts before a document and without what it puts after one:
some tokenizers append an end token, after which a model would begin another document instead of going on.

A conversation is rendered by the tokenizer's template up to where the assistant writes. Where the last message is the
assistant's own, its text is left open and goes on. What a template does not use is refused, since it would change
nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["prompt_tokens", "render_conversation", "start_tokens"]

# Arguments of transformers' `apply_chat_template` that are decided here.
_DECIDED = frozenset(
    (
        "conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict",
        "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs",
        "add_special_tokens",
    )
)  # fmt: skip


def start_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a document.

    Args:
        tokenizer: a `transformers` tokenizer.

    Returns:
        The tokens, often none or one.
    """
    for probe in ("a", "0", "."):
        encoded = tokenizer(probe)
        tokens = list(encoded["input_ids"])
        if getattr(encoded, "is_fast", False):
            ours = [place for place, owner in enumerate(encoded.sequence_ids(0)) if owner is not None]
        else:
            own = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
            ours = [k for k in range(len(tokens)) if own and tokens[k : k + len(own)] == own]
        if ours:
            return tokens[: ours[0]]
    return []  # no letter of the probes is in the vocabulary: what stands around them cannot be told apart


def prompt_tokens(
    prompt: Any, encode: Callable[[str], list[int]], vocab_size: int, start: int | None = None
) -> list[int]:
    """The tokens of a prompt.

    Args:
        prompt: a text; or the tokens of one, a sequence or array of whole numbers, or what a tokenizer returns for one
            text (a mapping with `input_ids`, whose padding is left out by its `attention_mask`).
        encode: makes tokens of a text.
        vocab_size: number of tokens, V.
        start: the token that starts a document, for the advice in messages.

    Returns:
        The tokens.

    Raises:
        TypeError: anything else: bytes, several texts, numbers that are not whole.
        ValueError: no token, several rows of them, or tokens outside of [0, V).
    """
    tokens = encode(prompt) if isinstance(prompt, str) else _given_tokens(prompt)
    if not tokens:
        hint = "" if start is None else f", for instance the one that starts a document: [{start}]"
        raise ValueError(f"`prompt` is empty: give at least one token{hint}.")
    outside = [token for token in tokens if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"`prompt` has tokens outside of [0, {vocab_size}): {outside[:4]}.")
    return tokens


def _given_tokens(prompt: Any) -> list[int]:
    accepted = "accepted are one text (a string) and the tokens of one (whole numbers)"
    mask = None
    if isinstance(prompt, (bytes, bytearray)):
        raise TypeError(f"`prompt` is {type(prompt).__name__}; {accepted}: give prompt.decode().")
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            raise TypeError(f"`prompt` is a mapping without `input_ids`, it has {list(prompt)[:4]}; {accepted}.")
        prompt, mask = prompt["input_ids"], prompt.get("attention_mask")
    elif isinstance(getattr(prompt, "ids", None), list):
        prompt, mask = prompt.ids, getattr(prompt, "attention_mask", None)  # an encoding of the tokenizers library
    if isinstance(prompt, (list, tuple)) and any(isinstance(entry, str) for entry in prompt):
        raise TypeError(
            f"`prompt` is a list of {len(prompt)} strings; {accepted}. Join them, or make one process for each: "
            "[lm.complete(text, max_tokens=...) for text in texts]."
        )
    try:
        array = _row(np.asarray(prompt), "`prompt`", accepted)
    except ValueError as error:
        if "rows" in str(error):
            raise
        raise ValueError(f"`prompt` has rows of several lengths; {accepted}: one row at a time.") from error
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(
            f"`prompt` must hold whole numbers, got {array.dtype} ({array.ravel()[:4].tolist()}); {accepted}."
        )
    if mask is not None:
        counts = _row(np.asarray(mask), "the `attention_mask` of `prompt`", accepted)
        if counts.shape != array.shape:
            raise ValueError(f"the `attention_mask` of `prompt` has shape {counts.shape}, its tokens {array.shape}.")
        array = array[counts != 0]
    return [int(token) for token in array.tolist()]


def _row(array: np.ndarray, what: str, accepted: str) -> np.ndarray:
    if array.ndim == 2 and array.shape[0] == 1:
        return array[0]
    if array.ndim == 2:
        raise ValueError(f"{what} has {array.shape[0]} rows; {accepted}: one row at a time.")
    if array.ndim != 1:
        shown = repr(array.tolist() if array.ndim == 0 else array.shape)
        raise TypeError(f"{what} is {shown[:40]} of type {array.dtype}; {accepted}.")
    return array


def render_conversation(
    tokenizer: Any, messages: Any, tools: Sequence[Any] | None, template: Mapping[str, Any]
) -> tuple[str, bool]:
    """A conversation in the chat template of a tokenizer.

    Args:
        tokenizer: a `transformers` tokenizer.
        messages: dicts with `role` and `content`, a string or a list of parts `{"type": "text", "text": ...}`.
        tools: functions, or their JSON schemas, that the template describes to the model; None for none.
        template: further arguments of the template.

    Returns:
        The text up to where the model writes, and whether it goes on with the last message.

    Raises:
        TypeError: messages, contents or arguments of another kind.
        ValueError: no chat template, no message, parts that are no text, or what the template refuses or leaves out.
    """
    said = [_message(index, message) for index, message in enumerate(_messages(messages))]
    tools = _tools(tools)
    decided = sorted(_DECIDED & set(template))
    if decided:
        raise TypeError(f"`{decided[0]}` is decided by the conversation: it cannot be given to a chat.")
    if not tokenizer.chat_template and not template.get("chat_template"):
        raise ValueError("the tokenizer has no chat template: this is no chat model; give a prompt instead.")
    chosen = tokenizer.get_chat_template(template.get("chat_template"), tools)
    given = [name for name in template if name != "chat_template"] + (["tools"] if tools else [])
    unused = [name for name in given if not re.search(rf"\b{re.escape(name)}\b", chosen)]
    if unused:
        raise ValueError(
            f"the chat template has no use for `{unused[0]}`: it would change nothing. Its model was made without it; "
            "leave it out, or give a template that reads it by `chat_template=`."
        )
    last = said[-1]
    continued = last["role"] == "assistant" and not last.get("tool_calls")
    if continued and not last["content"]:
        said, continued = said[:-1], False  # an answer without a beginning is one that begins
    if not said:
        raise ValueError("`messages` has an empty assistant message alone; give at least one message with content.")
    try:
        text = tokenizer.apply_chat_template(
            said,
            tools=tools,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **template,
        )
    except Exception as error:  # a template raises what it likes
        roles = ", ".join(message["role"] for message in said)
        hint = (
            " Put what the system message says at the beginning of the first user message."
            if any(message["role"] == "system" for message in said)
            else ""
        )
        raise ValueError(
            f"the model's chat template refuses this conversation, with the roles {roles}: {error}.{hint}"
        ) from error
    for index, message in enumerate(said):
        content = "".join((message["content"] or "").split())
        if message["role"] == "system" and content not in "".join(text.split()):
            raise ValueError(
                f"the model's chat template leaves out `messages[{index}]`, of the role system: put what it says at "
                "the beginning of the first user message."
            )
    return text, continued


def _messages(messages: Any) -> list[Any]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(
            f"`messages` must be a list of dicts with `role` and `content`, got {type(messages).__name__}; for "
            'instance [{"role": "user", "content": "Name a fruit."}].'
        )
    if not messages:
        raise ValueError("`messages` is empty; give at least one dict with `role` and `content`.")
    return list(messages)


def _message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"`messages[{index}]` must be a dict with `role` and `content`, got {type(message).__name__}.")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"`messages[{index}]` must have a `role`, such as user, assistant or system; got {role!r}.")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise ValueError(f"`messages[{index}]`, of the role {role}, has no `content`.")
    if isinstance(content, (list, tuple)):
        content = "".join(_part(index, number, part) for number, part in enumerate(content))
    if content is not None and not isinstance(content, str):
        kind = type(content).__name__
        raise TypeError(f"`messages[{index}]` must have a string or a list of text parts as `content`, got {kind}.")
    return dict(message) | {"content": content}


def _part(index: int, number: int, part: Any) -> str:
    where = f"`messages[{index}]['content'][{number}]`"
    if not isinstance(part, Mapping):
        raise TypeError(f'{where} must be a part such as {{"type": "text", "text": ...}}, got {part!r}.')
    if part.get("type") != "text":
        raise ValueError(f"{where} is of type {part.get('type')!r}; this model reads text alone: accepted is 'text'.")
    if not isinstance(part.get("text"), str):
        raise TypeError(f"{where} must have a string as `text`, got {part.get('text')!r}.")
    return part["text"]


def _tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise TypeError(f"`tools` must be a list of functions or of JSON schemas, got {type(tools).__name__}.")
    wrong = [tool for tool in tools if not callable(tool) and not isinstance(tool, Mapping)]
    if wrong:
        raise TypeError(f"`tools` must hold functions or JSON schemas (dicts), got {wrong[0]!r}.")
    return list(tools) or None
