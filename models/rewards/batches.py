"""Many texts of different lengths through a function of one text, with few compilations.

Rows are padded to the next power of two of the longest, and their number to a power of two, so that a function that is
called again and again with N texts of at most S tokens compiles at most `log2(S)` times, whatever the texts are.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["check_texts", "in_batches", "pad_rows"]

_SMALLEST_ROW = 16
_TOKENS_AT_ONCE = 1 << 14


def check_texts(texts: Sequence[str], name: str = "texts") -> list[str]:
    """Check a list of texts.

    Args:
        texts: what the user gave.
        name: the argument's name, for messages.

    Returns:
        The list.

    Raises:
        TypeError: one string, or something that is not a string among them.
        ValueError: no text.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"`{name}` must be a list of strings, got {type(texts).__name__}; give [text] for one text.")
    foreign = [text for text in texts if not isinstance(text, str)]
    if foreign:
        raise TypeError(f"`{name}` must be a list of strings; it holds {foreign[0]!r} ({type(foreign[0]).__name__}).")
    if not texts:
        raise ValueError(f"`{name}` is empty: give at least one string.")
    return list(texts)


def pad_rows(
    rows: Sequence[Sequence[int]], *, largest: int, padding: int = 0
) -> tuple[Int[np.ndarray, "N S"], Int[np.ndarray, "N"]]:
    """Stand token lists below each other.

    Args:
        rows: N of them, none longer than `largest`.
        largest: the largest S.
        padding: the token that fills the rows.

    Returns:
        Tokens, int32, S the longest row's next power of two and at least 16 but at most `largest`; and the lengths.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    size = min(max(_power_of_two(int(lengths.max())), _SMALLEST_ROW), largest)
    tokens = np.full((len(rows), size), padding, np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    return tokens, lengths


def in_batches(
    function: Callable[[Int[np.ndarray, "B S"], Int[np.ndarray, "B"]], Float[Array, "B *shape"]],
    tokens: Int[np.ndarray, "N S"],
    lengths: Int[np.ndarray, "N"],
) -> Float[np.ndarray, "N *shape"]:
    """Apply a compiled function of a batch to all rows.

    Args:
        function: of a batch of rows and their lengths.
        tokens: the rows.
        lengths: their lengths, at least 1.

    Returns:
        What it gives, row by row. Batches have N rows rounded up to a power of two, and about 16,000 tokens at most.
    """
    count, size = tokens.shape
    rows = min(_power_of_two(count), max(_TOKENS_AT_ONCE // size, 1))
    added = -count % rows
    tokens = np.concatenate([tokens, np.broadcast_to(tokens[-1:], (added, size))])
    lengths = np.concatenate([lengths, np.broadcast_to(lengths[-1:], (added,))])
    parts = [function(tokens[i : i + rows], lengths[i : i + rows]) for i in range(0, len(tokens), rows)]
    return np.concatenate(jax.device_get(parts))[:count]


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
