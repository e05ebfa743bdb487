"""Text that goes on from a prompt: how a tokenizer cuts it, and reads it, without what it does where a text begins.

SentencePiece's tokenizers put a space before a text and drop one when they read tokens; byte-level ones may too
(`add_prefix_space`). Where a text goes on, that space is one that nobody wrote: after "hello", " world" would be cut
into the tokens of two spaces and a word. Here the text of the tokens is the text that was given, so that

    text(tokens of prompt + tokens of continuation) = text(tokens of prompt) + continuation                        (1)

The continuation is cut on its own. Where a token of the joined string ends at the prompt's end, these are the joined
string's tokens after it; where one token of the joined string spans that place, its parts are counted as they are cut.
"""

import json
from typing import Any

__all__ = ["continuing"]


def continuing(tokenizer: Any) -> Any:
    """The tokenizer for texts that go on.

    Args:
        tokenizer: a `transformers` fast tokenizer.

    Returns:
        The same object where it does nothing at the beginning of a text; else one over the same tokens that does
        nothing there. Its `encode(text, add_special_tokens=False)` and `decode` hold (1).
    """
    backend = tokenizer.backend_tokenizer
    steps = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    parts = {name: step and json.loads(step.__getstate__()) for name, step in steps.items()}
    plain = {name: _plain(part, name) for name, part in parts.items()}
    if plain == parts:
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast  # takes a second to import

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | plain)),
        clean_up_tokenization_spaces=bool(tokenizer.clean_up_tokenization_spaces),
    )


def _plain(part: dict[str, Any] | None, role: str) -> dict[str, Any] | None:
    """A step of a tokenizer, as its file names it, without what it does at the beginning of a text; None for none."""
    kind = None if part is None else part["type"]
    if kind == "Sequence":
        (name,) = (name for name in ("normalizers", "pretokenizers", "decoders") if name in part)
        return part | {name: [step for each in part[name] if (step := _plain(each, role)) is not None]}
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if kind == "ByteLevel" and role == "pre_tokenizer":
        return part | {"add_prefix_space": False}
    if kind == "Strip":  # a decoder's counts characters, a normalizer's says whether
        return part | ({"start": 0} if "start" in part else {"strip_left": False})
    return part
