"""Parser states of a grammar on the host: which tokens may follow each of many texts, found in one call.

A state is named by the tokens that led to it, which a particle carries: it is immutable, follows its ancestor with the
rest of the particle, and equal texts share one. What is kept here is a cache of parsers and of their masks, the least
recently used of which are dropped; a dropped one is parsed again from its longest prefix that is still known. Answers
so depend on the arguments alone, however often and in whatever order a compiled run asks.

The parser reads the vocabulary's own bytes, and every tokenisation of a text counts: forced stretches are not
tokenised for the model (`no_forcing`). Which tokens complete a text is a second mask, of the grammar followed by a
marker over tokens followed by that marker.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ppl.models.constraints.vocabulary import Vocabulary

__all__ = ["ParserStates", "llguidance", "nested", "parser_states"]

_KEPT = 1024  # states at least, of about 22 kB each for 49,152 tokens; a larger population keeps four a particle
_PARALLEL = 8  # new masks from which threads pay


def llguidance() -> Any:
    """Return the package that parses.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import llguidance
        import llguidance.numpy
    except ImportError as error:
        raise ImportError(
            "a Grammar needs the package llguidance, an optional extra: pip install 'genppl[grammar]'."
        ) from error
    return llguidance


def nested(lark: str, marker: int | None = None) -> str:
    """Return what llguidance reads for a grammar, or for it followed by a marker token."""
    end = "" if marker is None else f" <[{marker}]>"
    outer = '%llguidance {"no_forcing": true}\n' + f"start: @text{end}"
    return json.dumps({"grammars": [{"lark_grammar": outer}, {"name": "text", "lark_grammar": lark}]})


@functools.lru_cache(maxsize=8)
def parser_states(lark: str, vocabulary: Vocabulary) -> ParserStates:
    """Return the states of a grammar over a vocabulary; the same for equal arguments."""
    return ParserStates(lark, vocabulary)


@dataclasses.dataclass(eq=False)
class _State:
    """A text's parser, None where the grammar has refused it, and its masks, for budgets -1, 0 and more."""

    matcher: Any
    started: bool  # whether anything was written: SentencePiece's tokenizers drop a space before that
    masks: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def accepts(self) -> bool:
        return self.matcher is not None and self.matcher.is_accepting()


class ParserStates:
    """The cache of parsers of one grammar over one vocabulary."""

    def __init__(self, lark: str, vocabulary: Vocabulary):
        """Build the parser of the empty text; see `Grammar` for what it refuses."""
        self.lark, self.vocabulary = lark, vocabulary
        self.texts = _Texts(vocabulary)
        size = len(vocabulary.tokens)
        texts = self.texts.texts[:size]
        silent = [token for token in range(size) if vocabulary.tokens[token] is None]
        self._own = _words(range(size), size)
        self._ends = _words(vocabulary.end_tokens, size)
        self._empty = _words((t for t in set(range(size)) - set(silent) if not texts[t]), size) & ~self._ends
        self._kept: collections.OrderedDict[bytes, _State] = collections.OrderedDict()
        self._lock = threading.Lock()
        matcher = llguidance().LLMatcher(_tokenizer(vocabulary, False), nested(lark), log_level=0)
        _check(matcher)
        self._start = _State(matcher, False)
        self._executor = llguidance().LLExecutor()

    @property
    def num_words(self) -> int:
        """How many 32-bit words a mask has."""
        return len(self._own)

    def masks(self, tokens: np.ndarray, lengths: np.ndarray, budgets: np.ndarray) -> np.ndarray:
        """The tokens that may follow each text.

        Args:
            tokens: int32, shape (N, T), what was written; later entries do not count.
            lengths: shape (N,), how many tokens were written.
            budgets: shape (N,), for how many text tokens there is room after the next one: 0 lets through only tokens
                that complete a text, less than 0 only end tokens.

        Returns:
            uint32, shape (N, W), a bit for each token, lowest first; end tokens where the text is complete.

        Raises:
            RuntimeError: a text exceeds llguidance's limits.
        """
        with self._lock:
            states = self._states(tokens, lengths)
            kinds = np.clip(budgets, -1, 1).tolist()
            self._fill([state for state, kind in zip(states, kinds, strict=True) if kind == 1])
            for row, (state, kind) in enumerate(zip(states, kinds, strict=True)):
                if kind not in state.masks:
                    state.masks[kind] = self._last(state, tokens[row, : lengths[row]], kind)
            return np.stack([state.masks[kind] for state, kind in zip(states, kinds, strict=True)])

    def accepts(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Whether each text is complete: bool, shape (N,)."""
        with self._lock:
            return np.array([state.accepts for state in self._states(tokens, lengths)], bool)

    def _states(self, tokens: np.ndarray, lengths: np.ndarray) -> list[_State]:
        rows = [row[:length] for row, length in zip(np.asarray(tokens, np.int32), lengths, strict=True)]
        states = [self._state(row) for row in rows]
        while len(self._kept) > max(_KEPT, 4 * len(rows)):
            self._kept.popitem(last=False)
        return states

    def _state(self, row: np.ndarray) -> _State:
        key = row.tobytes()
        known = next((at for at in range(len(row), 0, -1) if key[: at * row.itemsize] in self._kept), 0)
        state = self._kept[key[: known * row.itemsize]] if known else self._start
        if known < len(row):
            state = self._after(state, row[known:].tolist())
            self._kept[key] = state
        elif known:
            self._kept.move_to_end(key)
        return state

    def _after(self, state: _State, tokens: list[int]) -> _State:
        if state.matcher is None:
            return _State(None, True)
        ids, started = self.texts.read(tokens, state.started)
        if ids is None:
            return _State(None, True)
        matcher = state.matcher.deep_copy()
        return _State(matcher if _consume(matcher, ids) else None, started)

    def _fill(self, states: list[_State]) -> None:
        """The masks of states where more than one token may follow, in parallel."""
        missing = list({id(state): state for state in states if 1 not in state.masks}.values())
        living = [state for state in missing if state.matcher is not None]
        raw = self._raw([state.matcher for state in living], len(self.texts.tokens))
        for state, bits in zip(living, raw, strict=True):
            own = bits[: self.num_words] & self._own
            if not state.started and self.texts.first is not None:
                own = _words(np.flatnonzero(_bits(bits)[self.texts.first]), len(self.vocabulary.tokens))
                own |= _words(self.texts.vanishing, len(self.vocabulary.tokens))
            own |= self._empty
            state.masks[1] = own | self._ends if state.accepts else own & ~self._ends
        for state in missing:
            state.masks.setdefault(1, np.zeros(self.num_words, np.uint32))

    def _last(self, state: _State, row: np.ndarray, kind: int) -> np.ndarray:
        """The mask where at most one more token may be written."""
        words = np.zeros(self.num_words, np.uint32)
        if state.matcher is None:
            return words
        if kind == 0:
            size = len(self.vocabulary.tokens)
            closing = self._closing.deep_copy()
            ids, _ = self.texts.read(row.tolist(), False)
            if not _consume(closing, ids):
                raise RuntimeError(
                    f"llguidance reads the tokens {row.tolist()} in one place and refuses them in another."
                )
            bits = _bits(self._raw([closing], len(self.texts.closing))[0])[len(self.texts.tokens) :]
            first = not state.started and self.texts.first is not None
            words |= _words(np.flatnonzero(bits[self.texts.first] if first else bits[:size]), size)
            if state.accepts:
                words |= self._empty | (_words(self.texts.vanishing, size) if first else 0)
            words &= ~self._ends
        return words | self._ends if state.accepts else words

    def _raw(self, matchers: list[Any], size: int) -> np.ndarray:
        package = llguidance()
        bits = np.zeros((len(matchers), -(-size // 32)), np.int32)
        if len(matchers) >= _PARALLEL:
            pairs = [(matcher, row) for row, matcher in enumerate(matchers)]
            package.numpy.fill_next_token_bitmask_par(self._executor, pairs, bits)
        else:
            for row, matcher in enumerate(matchers):
                package.numpy.fill_next_token_bitmask(matcher, bits, row)
        for matcher in matchers:
            _check(matcher)
        return bits.view(np.uint32)

    @functools.cached_property
    def _closing(self) -> Any:
        """The parser of the grammar followed by the marker, before the first token."""
        made = llguidance().LLMatcher(
            _tokenizer(self.vocabulary, True), nested(self.lark, self.texts.marker), log_level=0
        )
        _check(made)
        return made


class _Texts:
    """What llguidance's tokens write, and which of them stands for which of ours.

    Attributes:
        texts: those of the vocabulary; after them, where a first space is dropped, the same without it.
        tokens: these, every single byte (so that any text can be tokenised), the marker and an end token.
        closing: `tokens`, then every text followed by the marker.
        first: shape (V,), the number of each token's text at the beginning; None where nothing is dropped.
        vanishing: tokens that are one space, which is dropped at the beginning.
    """

    def __init__(self, vocabulary: Vocabulary):
        ends = set(vocabulary.end_tokens)
        own = [b"" if text is None or token in ends else text for token, text in enumerate(vocabulary.tokens)]
        self.vocabulary, self.texts, self.first, self.vanishing = vocabulary, list(own), None, []
        if vocabulary.strips_space:
            spaced = [token for token, text in enumerate(own) if text.startswith(b" ")]
            self.first = np.arange(len(own))
            self.first[spaced] = len(own) + np.arange(len(spaced))
            self.texts += [own[token][1:] for token in spaced]
            self.vanishing = [token for token in spaced if own[token] == b" "]
        self.marker = len(self.texts) + 256
        self.tokens = [*self.texts, *(bytes([byte]) for byte in range(256)), b"\xff<end of the text>", b"\xff<end>"]
        tail = b"\xff[%d]" % self.marker
        self.closing = [*self.tokens, *(text + tail if text else b"" for text in self.texts)]

    def read(self, tokens: list[int], started: bool) -> tuple[list[int] | None, bool]:
        """Return the numbers of tokens that write something, and whether anything was written; None for no text."""
        ids = []
        for token in tokens:
            text = self.vocabulary.tokens[token]
            if text is None or token in self.vocabulary.end_tokens:
                return None, True
            number = token if started or self.first is None else int(self.first[token])
            if self.texts[number]:
                ids.append(number)
            started = started or bool(text)
        return ids, started


class _Wrapped:
    """The tokenizer as llguidance's wrapper wants it: texts are read byte by byte."""

    def __init__(self, texts: _Texts, closing: bool):
        self.tokens = texts.closing if closing else texts.tokens
        self.special_token_ids = [texts.marker, texts.marker + 1]
        self.eos_token_id, self.bos_token_id, self._first_byte = texts.marker + 1, None, texts.marker - 256

    def __call__(self, text: bytes | str) -> list[int]:
        written = text.encode() if isinstance(text, str) else text
        return [self._first_byte + byte for byte in written]


@functools.lru_cache(maxsize=8)
def _tokenizer(vocabulary: Vocabulary, closing: bool) -> Any:
    package = llguidance()
    return package.LLTokenizer(package.TokenizerWrapper(_Wrapped(_Texts(vocabulary), closing)))


def _consume(matcher: Any, ids: list[int]) -> bool:
    taken = matcher.try_consume_tokens(ids)
    _check(matcher)
    return taken == len(ids)


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise RuntimeError(f"llguidance: {matcher.get_error()}")


def _words(tokens: Any, size: int) -> np.ndarray:
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[np.fromiter(tokens, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _bits(words: np.ndarray) -> np.ndarray:
    return np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little").astype(bool)
