"""Finding a string in text that is written token by token, on the device.

The mark is how many bytes of the string the text so far ends in, the longest such number, as in Knuth, Morris and Pratt
(1977), "Fast pattern matching in strings"; a table holds the mark after each token. Once the string is complete the
mark stays.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

if TYPE_CHECKING:
    from ppl.models.constraints.vocabulary import Vocabulary

__all__ = ["Delimiter", "delimiter_of"]


class Delimiter:
    """A table of marks: entry (m, v) is the mark after token v where it was m; the last mark is completion."""

    def __init__(self, table: Int[np.ndarray, "L V"]):
        self.complete_mark = table.shape[0]
        with jax.ensure_compile_time_eval():  # it is kept, and may first be asked for while a model is staged
            self.table = jnp.asarray(table.astype(np.int32 if table.shape[0] > 255 else np.uint8))

    def advance(self, mark: Int[Array, ""], drawn: Int[Array, ""]) -> Int[Array, ""]:
        """Return the mark after a token."""
        after = self.table[jnp.minimum(mark, self.complete_mark - 1), drawn].astype(jnp.int32)
        return jnp.where(mark == self.complete_mark, mark, after)

    def complete(self, mark: Int[Array, ""]) -> Bool[Array, ""]:
        """Return whether the string has been written."""
        return mark == self.complete_mark


@functools.lru_cache(maxsize=16)
def delimiter_of(string: bytes, vocabulary: Vocabulary) -> Delimiter:
    """Build the table for a string of bytes over a vocabulary; tokens without text leave the mark."""
    following = np.zeros((len(string), 256), np.int64)
    for mark in range(len(string)):
        for byte in range(256):
            written = string[:mark] + bytes([byte])
            following[mark, byte] = max(
                k for k in range(len(written) + 1) if string.startswith(written[len(written) - k :])
            )
    table = np.repeat(np.arange(len(string))[:, None], len(vocabulary.tokens), axis=1)
    for token, text in enumerate(vocabulary.tokens):
        for byte in text or b"":
            table[:, token] = np.where(
                table[:, token] == len(string),
                len(string),
                following[np.minimum(table[:, token], len(string) - 1), byte],
            )
    return Delimiter(table)
