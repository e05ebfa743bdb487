"""What the tokens of a vocabulary write: one byte string each, so that a text is the concatenation of its tokens.

Tokens are bytes and not strings, since a token may end in the middle of a character: byte-level tokenizers cut emoji
and many scripts that way, and SentencePiece falls back to single bytes.

A token is text or special by what it is, not by the role it has: a comma that also starts documents, or pads them, is
a comma. Text is what the tokenizer's model writes by itself, single units and what merges make of them; other tokens
that are declared special, and the end tokens, write nothing.
"""

import dataclasses
import functools
import json
import random
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["Vocabulary"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CHECKED_TEXTS = 64  # random token sequences on which a tokenizer's `decode` is compared with the bytes


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The texts of all tokens, and which of them end a generation. Equal, and hashed, by content.

    Attributes:
        tokens: what every token writes, one entry for each of the V tokens. None is a token that may never be drawn
            under a constraint: special tokens, and rows of the embedding that no token belongs to.
        end_tokens: the tokens that end a text; what they write does not count.
        strips_space: the tokenizer drops one space at the beginning of a text, as SentencePiece's does.

    Raises:
        ValueError: no token, or an end token outside of the vocabulary.
    """

    tokens: tuple[bytes | None, ...]
    end_tokens: tuple[int, ...] = ()
    strips_space: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "end_tokens", tuple(int(token) for token in self.end_tokens))
        if not self.tokens:
            raise ValueError("`tokens` is empty: a vocabulary needs at least one token.")
        wrong = next((token for token in self.tokens if token is not None and not isinstance(token, bytes)), None)
        if wrong is not None:
            raise ValueError(f"`tokens` must hold bytes or None, got {wrong!r}.")
        outside = [token for token in self.end_tokens if not 0 <= token < len(self.tokens)]
        if outside:
            raise ValueError(f"`end_tokens` must be in [0, {len(self.tokens)}), got {outside}.")

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.tokens, self.end_tokens, self.strips_space))

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        silent = sum(token is None for token in self.tokens)
        return f"Vocabulary({len(self.tokens)} tokens, {silent} of them without text, end {self.end_tokens})"

    def text(self, tokens: Sequence[int]) -> bytes:
        """The bytes that tokens write together, up to the first end token.

        Args:
            tokens: any tokens that may be drawn, and end tokens.

        Returns:
            The concatenation; it need not be valid UTF-8 where a character has been cut.

        Raises:
            ValueError: one of the tokens writes no text.
        """
        written = []
        for token in tokens:
            if token in self.end_tokens:
                break
            if self.tokens[token] is None:
                raise ValueError(f"token {token} writes no text.")
            written.append(self.tokens[token])
        joined = b"".join(written)
        return joined[1:] if self.strips_space and joined.startswith(b" ") else joined

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, *, vocab_size: int | None = None, end_tokens: Sequence[int] = ()
    ) -> "Vocabulary":
        """The vocabulary of a `transformers` fast tokenizer: byte-level BPE, or SentencePiece with byte tokens.

        Args:
            tokenizer: the tokenizer.
            vocab_size: number of logits of the model, V; tokens that the tokenizer does not know write no text. None
                is the tokenizer's own size.
            end_tokens: the tokens that end a text.

        Returns:
            The vocabulary; its `text` is the tokenizer's `decode`, which is checked on random tokens.

        Raises:
            ValueError: a tokenizer that writes its text in another way; the message names its decoder.
        """
        size = len(tokenizer) if vocab_size is None else vocab_size
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        decoder = backend["decoder"] or {"type": "none"}
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            write = _byte_level
        elif "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
            write = _sentencepiece
        else:
            raise ValueError(f"`tokenizer` writes text by {kinds}; accepted are ByteLevel and SentencePiece's steps.")
        special = _special(tokenizer, backend["model"])
        names = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
        ends = set(end_tokens)
        tokens = [
            None if name is None or token in special or token in ends else write(name)
            for token, name in enumerate(names)
        ]
        tokens += [None] * (size - len(tokens))
        vocabulary = cls(tuple(tokens), tuple(end_tokens), "Strip" in kinds)
        _check(vocabulary, tokenizer, kinds)
        return vocabulary


def _special(tokenizer: Any, model: dict[str, Any]) -> set[int]:
    """The tokens that are declared special and that the tokenizer's model does not write as text by itself."""
    declared = set(tokenizer.all_special_ids)
    declared |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    merges = (merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model.get("merges") or ())
    merged = {"".join(merge) for merge in merges} if declared else set()
    known = model.get("vocab") or ()
    own = known if isinstance(known, dict) else {piece: place for place, (piece, _) in enumerate(known)}
    special = set()
    for token in declared:
        name = tokenizer.convert_ids_to_tokens(token)
        unit = name is not None and (len(name) == 1 or _BYTE_TOKEN.fullmatch(name) or name in merged)
        if not (unit and own.get(name) == token):
            special.add(token)
    return special


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The characters by which byte-level tokenizers name bytes: printable ones themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    names = {chr(byte): byte for byte in printable}
    return names | {chr(0x100 + position): byte for position, byte in enumerate(others)}


def _byte_level(name: str) -> bytes:
    table = _byte_of_character()
    if all(character in table for character in name):
        return bytes(table[character] for character in name)
    return name.encode()  # an added token, which is written as it is


def _sentencepiece(name: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("▁", " ").encode()


def _check(vocabulary: Vocabulary, tokenizer: Any, kinds: list[str]) -> None:
    """Compare with the tokenizer on random sequences; those that cut a character are decoded by no common rule."""
    rng = random.Random(0)
    drawable = [token for token, text in enumerate(vocabulary.tokens) if text is not None]
    for _ in range(_CHECKED_TEXTS if drawable else 0):
        tokens = rng.choices(drawable, k=6)
        written = vocabulary.text(tokens).decode(errors="replace")
        if "�" not in written and written != (read := tokenizer.decode(tokens, skip_special_tokens=False)):
            raise ValueError(
                f"`tokenizer` (decoder {kinds}) writes {read!r} for the tokens {tokens}, whose bytes are {written!r}: "
                "its texts are no concatenations of its tokens (a clean-up of spaces, or an unknown step)."
            )
