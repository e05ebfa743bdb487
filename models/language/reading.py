"""What turns the tokens of finished texts into strings; it holds a tokenizer and no network, and pickles so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import ArrayLike

__all__ = ["Reader"]


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Reads values with a leading particle axis, `{"tokens": int[N, T], "length": int[N]}`.

    Attributes:
        tokenizer: a `transformers` tokenizer.
        end_tokens: the tokens that end a text; they and what follows them are left out.
        silent: tokens that are left out wherever they stand.
    """

    tokenizer: Any
    end_tokens: tuple[int, ...]
    silent: tuple[int, ...] = ()

    def __eq__(self, other: object) -> bool:
        """Whether another reads the same: programs that differ in nothing else are compiled once."""
        if not isinstance(other, Reader) or (self.end_tokens, self.silent) != (other.end_tokens, other.silent):
            return False
        ours, theirs = self.tokenizer, other.tokenizer
        return ours is theirs or ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()

    def __hash__(self) -> int:
        return hash((self.end_tokens, self.silent))

    def __call__(self, value: Mapping[str, ArrayLike]) -> list[str]:
        """Return the texts, one for each particle."""
        tokens = np.asarray(value["tokens"])
        lengths = np.broadcast_to(value.get("length", tokens.shape[-1]), tokens.shape[:1])
        return [self.text(row, int(length)) for row, length in zip(tokens, lengths, strict=True)]

    def text(self, tokens: ArrayLike | Sequence[int], length: int | None = None) -> str:
        """Return one text.

        Args:
            tokens: shape (T,).
            length: how many of them count; None is all.
        """
        row = np.asarray(tokens, np.int64)[:length]
        ends = np.flatnonzero(np.isin(row, self.end_tokens))
        kept = row[: ends[0]] if ends.size else row
        return self.tokenizer.decode(kept[~np.isin(kept, self.silent)].tolist(), skip_special_tokens=False)
