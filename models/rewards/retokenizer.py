"""From a language model's tokens to a sentence encoder's pieces: exactly by way of the text, or by table on the device.

An exact map goes by way of the text, and its pieces depend on whole words. `Retokenizer` leaves the device for it: it
decodes and cuts the texts on the host, once for all particles, and hands the pieces back. `ApproximateRetokenizer`
stays on the device and looks up each token in a table, in one of two forms: as the start of a word, or, where the token
goes on with the word that the token before it ended in, as its continuation. That is exact for texts whose words are
one token each, and differs

- where a word of several tokens is cut at other places by the encoder ("app|les" becomes "app|##les", not "apples"),
- where a character is spread over several tokens: it is lost,
- where a token has more pieces than the table holds: the last are lost.

Measured with SmolLM2 and all-MiniLM-L6-v2 on twenty opening sentences of novels: eleven come out in the same pieces;
the cosine between the approximate and the exact vector is 0.92 on average and 0.49 at worst; the similarity to three
reference sentences is off by 0.02 on average and 0.12 at worst.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int
from tokenizers import Tokenizer

from ppl.models.rewards.batches import check_texts

if TYPE_CHECKING:
    from ppl.models.language import LanguageModel
    from ppl.models.language.reading import Reader
    from ppl.models.rewards.sentence_encoder import SentenceEncoder

__all__ = ["ApproximateRetokenizer", "Retokenizer"]

_CONTINUES = "##"  # WordPiece writes it before a piece that goes on with a word
_ROOM = 4  # pieces a token that there is room for, where nothing else is said


class _Map:
    """A map from tokens to pieces, and the similarity that it allows inside of a program."""

    def __init__(self, encoder: "SentenceEncoder", lm: "LanguageModel"):
        self._encoder, self._vocab_size = encoder, lm.vocab_size
        self._room = _ROOM

    def __call__(
        self, tokens: Int[ArrayLike, "T"], length: Int[ArrayLike, ""], *, size: int | None = None
    ) -> tuple[Int[Array, "S"], Int[Array, ""]]:
        """Map one text's tokens; pure, for use inside `jit`, `vmap` and programs.

        Args:
            tokens: the text's tokens, and padding.
            length: how many of them are text.
            size: S, static, at least 2; None is `4 T + 2` (for a table, T times its pieces and 2), at most the
                encoder's `max_length`. A smaller one is faster, and cuts longer texts.

        Returns:
            The pieces with the encoder's markers and padding, and how many of them are real, in [2, S].

        Raises:
            ValueError: `tokens` is not of rank 1, or `size` is not in [2, `max_length`].
        """
        tokens, longest = jnp.asarray(tokens, jnp.int32), self._encoder.max_length
        if tokens.ndim != 1:
            raise ValueError(f"`tokens` must have shape (T,), got {tokens.shape}; use jax.vmap for many texts.")
        size = min(tokens.shape[0] * self._room + 2, longest) if size is None else size
        if not 2 <= size <= longest:
            raise ValueError(f"`size` must be in [2, {longest}], got {size}.")
        return self._map(tokens, jnp.asarray(length, jnp.int32), size)

    def similarity(
        self, references: Sequence[str], *, size: int | None = None
    ) -> Callable[[Int[ArrayLike, "T"], Int[ArrayLike, ""]], Float[Array, ""]]:
        """The nearness to some texts, as a pure function of a completion's `tokens` and `length`.

        Args:
            references: one string or more.
            size: as in `__call__`.

        Returns:
            A function that gives the largest cosine between the text and a reference, float32 in [-1, 1]. As a reward,
            multiply it by the nats that a cosine of 1 is worth.

        Raises:
            TypeError: not a list of strings.
            ValueError: an empty list.
        """
        return _Similarity(self, jnp.asarray(self._encoder.encode(check_texts(references, "references"))), size)


@dataclasses.dataclass(frozen=True, eq=False)
class _Similarity:
    """The largest cosine between one text, given by its tokens, and the reference vectors."""

    retokenizer: _Map
    known: Float[Array, "R E"]
    size: int | None

    def __call__(self, tokens: Int[ArrayLike, "T"], length: Int[ArrayLike, ""]) -> Float[Array, ""]:
        pieces = self.retokenizer(tokens, length, size=self.size)
        return jnp.max(self.known @ self.retokenizer._encoder.embed(*pieces))


class Retokenizer(_Map):
    """The exact map, by way of the text: one call of the host for all particles."""

    def __init__(self, encoder: "SentenceEncoder", lm: "LanguageModel"):
        """Build the map; `SentenceEncoder.retokenizer` does the same.

        Args:
            encoder: whose pieces are wanted.
            lm: whose tokens are given.
        """
        super().__init__(encoder, lm)
        self._read = lm.reader

    def __repr__(self) -> str:
        return f"Retokenizer({self._vocab_size} tokens, exact, by way of the text)"

    def _map(self, tokens: Int[Array, "T"], length: Int[Array, ""], size: int) -> tuple[Array, Array]:
        shapes = (jax.ShapeDtypeStruct((size,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32))
        call = _ByText(self._encoder, self._read, size)
        return jax.pure_callback(call, shapes, tokens, length, vmap_method="broadcast_all")


@dataclasses.dataclass(frozen=True)
class _ByText:
    """The callback: Python alone, for the device is waiting. Equal ones make equal programs, compiled once."""

    encoder: "SentenceEncoder"
    read: "Reader"
    size: int

    def __call__(self, tokens: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch, encoder = np.shape(length), self.encoder
        rows, lengths = np.asarray(tokens).reshape(-1, np.shape(tokens)[-1]), np.asarray(length).reshape(-1)
        texts = self.read({"tokens": rows, "length": lengths})
        pieces, counts = np.zeros((len(texts), self.size), np.int32), np.zeros(len(texts), np.int32)
        for row, encoding in enumerate(encoder.tokenizer.encode_batch(texts, add_special_tokens=False)):
            real = [encoder.start_token, *encoding.ids[: self.size - 2], encoder.end_token]
            pieces[row, : len(real)], counts[row] = real, len(real)
        return pieces.reshape(*batch, self.size), counts.reshape(batch)


class ApproximateRetokenizer(_Map):
    """A table from tokens to pieces, each token by itself: all on the device.

    Attributes:
        max_pieces: most pieces of a token, K.
        num_cut: tokens of the language model whose text has more pieces than that.
    """

    def __init__(self, encoder: "SentenceEncoder", lm: "LanguageModel", *, max_pieces: int = 4):
        """Build the table; `SentenceEncoder.approximate_retokenizer` does the same.

        Args:
            encoder: whose pieces are wanted.
            lm: whose tokens are given.
            max_pieces: K, at least 1.

        Raises:
            ValueError: `max_pieces` below 1.
        """
        if max_pieces < 1:
            raise ValueError(f"`max_pieces` must be at least 1, got {max_pieces}.")
        super().__init__(encoder, lm)
        self.max_pieces = self._room = max_pieces
        starts, continuations, goes_on, is_open = _pieces(encoder.tokenizer, _token_texts(lm))
        self.num_cut = sum(max(len(a), len(b)) > max_pieces for a, b in zip(starts, continuations, strict=True))
        table = np.full((2, lm.vocab_size, max_pieces), -1, np.int32)
        for form, rows in enumerate((starts, continuations)):
            for token, pieces in enumerate(rows):
                table[form, token, : len(pieces)] = pieces[:max_pieces]
        self._tables = (jnp.asarray(table), jnp.asarray(goes_on), jnp.asarray(is_open))

    def __repr__(self) -> str:
        return (
            f"ApproximateRetokenizer({self._vocab_size} tokens, at most {self.max_pieces} pieces each, "
            f"{self.num_cut} of them cut)"
        )

    def _map(self, tokens: Int[Array, "T"], length: Int[Array, ""], size: int) -> tuple[Array, Array]:
        markers = dict(start=self._encoder.start_token, end=self._encoder.end_token)
        return _look_up(*self._tables, tokens, length, size=size, **markers)


@functools.partial(jax.jit, static_argnames=("size", "start", "end"))
def _look_up(
    table: Int[Array, "2 V K"],
    goes_on: Bool[Array, "V"],
    is_open: Bool[Array, "V"],
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    *,
    size: int,
    start: int,
    end: int,
) -> tuple[Int[Array, "S"], Int[Array, ""]]:
    """The pieces of all tokens without gaps, between the markers."""
    place = jnp.arange(tokens.shape[0])
    form = (place > 0) & goes_on[tokens] & is_open[jnp.roll(tokens, 1)]
    pieces = table[form.astype(jnp.int32), tokens]
    real = ((pieces >= 0) & (place < length)[:, None]).ravel()
    target = jnp.where(real, jnp.cumsum(real), size)  # 1 is the first place after the start marker
    count = jnp.minimum(jnp.sum(real), size - 2)
    row = jnp.zeros(size, jnp.int32).at[target].set(pieces.ravel(), mode="drop")
    row = row.at[0].set(start).at[count + 1].set(end)
    return row, count + 2


def _token_texts(lm: "LanguageModel") -> list[str]:
    """What each token adds to a text; by itself, some tokenizers strip the space that a token starts with."""
    before = lm.encode("a")
    skipped = len(lm.tokenizer.decode(before))
    return [lm.tokenizer.decode([*before, token])[skipped:] for token in range(lm.vocab_size)]


def _pieces(
    tokenizer: Tokenizer, texts: list[str]
) -> tuple[list[list[int]], list[list[int]], Bool[np.ndarray, "V"], Bool[np.ndarray, "V"]]:
    """The pieces of each text as a start and as a continuation; whether it goes on with a word, and leaves one open."""
    normalizer = tokenizer.normalizer
    normal = texts if normalizer is None else [normalizer.normalize_str(text) for text in texts]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    starts = [encoding.ids for encoding in encodings]

    def count(text: str) -> int:
        return len(tokenizer.pre_tokenizer.pre_tokenize_str(text))

    # A letter put before a text makes one word more, or it lengthens the first.
    counts = [count(text) for text in normal]
    goes_on = np.array([words > 0 and count("a" + text) == words for words, text in zip(counts, normal, strict=True)])
    is_open = np.array([words > 0 and count(text + "a") == words for words, text in zip(counts, normal, strict=True)])
    continuations = []
    for encoding, text, joined in zip(encodings, normal, goes_on, strict=True):
        if joined:
            first = tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0]
            rest = [piece for piece, word in zip(encoding.ids, encoding.word_ids, strict=True) if word != 0]
            continuations.append(_continuation(tokenizer, first) + rest)
        else:
            continuations.append(encoding.ids)
    return starts, continuations, goes_on, is_open


def _continuation(tokenizer: Tokenizer, word: str) -> list[int]:
    """The pieces of the rest of a word: the longest known one, again and again."""
    pieces, place = [], 0
    while place < len(word):
        for stop in range(len(word), place, -1):
            piece = tokenizer.token_to_id(_CONTINUES + word[place:stop])
            if piece is not None:
                break
        else:
            return [tokenizer.token_to_id(tokenizer.model.unk_token)]
        pieces.append(piece)
        place = stop
    return pieces
