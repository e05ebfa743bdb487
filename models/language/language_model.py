"""`LanguageModel`: a text model as distributions and states, for programs that generate left to right.

    state = lm.prefill("Once upon a time")          the prompt, read once
    token = sample(lm.next_token(state))            p(x_t | x_<t), a NumPyro distribution
    state = lm.extend(state, token)

so that a text has the density `prod_t p(x_t | x_<t)`, which `log_prob` computes in one parallel pass.

`extend` stops at the last hidden state and `next_token` applies the head: what is carried from step to step, and what
resampling moves, is E numbers and not V. The compiled functions take the weights as arguments; staged in a program,
the weights are that program's constants, arrays that its runner can pass in.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ppl.models.language.cache import TextState
from ppl.models.language.checkpoints import generation_end_tokens, locate, read_folder
from ppl.models.language.completion import Completion
from ppl.models.language.config import DecoderConfig
from ppl.models.language.decoder import Decoder
from ppl.models.language.next_token import NextToken

__all__ = ["LanguageModel"]

_SMALLEST_BUCKET = 16
_GROWTH = 16  # slots that `extend` adds when it finds none, outside of loops
_HEAD_ROWS = 64  # rows of logits that `log_prob` holds at a time


class LanguageModel:
    """A decoder-only transformer with its tokenizer.

    Attributes:
        tokenizer: the `transformers` tokenizer.
        config: the network's shape.
        end_tokens: the tokens that end a text; any of them does.
        vocab_size: number of tokens, V.
        context_length: largest number of positions.
        dtype: of weights, caches and hidden states; logits are float32.
    """

    def __init__(self, decoder: Decoder, tokenizer: Any, *, end_tokens: Sequence[int] | None = None):
        """Wrap a network and a tokenizer that are at hand; `load` reads them from files.

        Args:
            decoder: the network.
            tokenizer: a `transformers` tokenizer for the same vocabulary.
            end_tokens: the tokens that end a text; None takes the configuration's.

        Raises:
            ValueError: an end token outside of the vocabulary.
        """
        self.config: DecoderConfig = decoder.config
        self.tokenizer = tokenizer
        self.end_tokens = tuple(self.config.end_tokens if end_tokens is None else end_tokens)
        self.vocab_size = self.config.vocab_size
        self.context_length = self.config.context_length
        outside = [token for token in self.end_tokens if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"`end_tokens` must be in [0, {self.vocab_size}), got {outside}.")
        self.padding_token = self.end_tokens[0] if self.end_tokens else 0
        self._graph, self._weights = nnx.split(decoder)
        self.dtype = decoder.embedding.dtype

        def compiled(function: Callable) -> Callable:
            # One compiled function for each, the weights its first argument. Tracing is cached with it, so that the
            # blocks of a deep network are traced once and not in every program that calls it.
            return jax.jit(lambda weights, *arguments: function(nnx.merge(self._graph, weights), *arguments))

        self._prefill = compiled(_prefill)
        self._extend = compiled(Decoder.extend)
        self._logits = compiled(Decoder.logits)
        self._forward = compiled(lambda decoder, tokens: decoder.logits(decoder.forward(tokens)[0]))
        self._log_probs = compiled(_log_probs)

    @property
    def decoder(self) -> Decoder:
        """The network, as a module of its own that shares the weights' arrays."""
        return nnx.merge(self._graph, self._weights)

    @classmethod
    def load(cls, source: str | Path, *, dtype: Any = None) -> "LanguageModel":
        """Read a model from disk or from the hub.

        Args:
            source: a hub id such as "HuggingFaceTB/SmolLM2-135M-Instruct", a folder with config, safetensors and
                tokenizer, or a `.gguf` file.
            dtype: of weights, caches and hidden states; None is float32 on CPU and bfloat16 on accelerators.

        Returns:
            The model, its weights on JAX's default device.

        Raises:
            FileNotFoundError: no such file, folder or hub repository, or one of a folder's files is missing.
            ValueError: a file that is damaged, or an architecture, rotary scaling, tokenizer or tensor that is not
                supported; the message names it.
        """
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        path = locate(source)
        if path.is_dir():
            decoder, config, tokenizer = read_folder(path, dtype)
            ends = (*config.end_tokens, *generation_end_tokens(path, config.vocab_size))
        else:
            from ppl.models.language.gguf_file import read_gguf  # needs the gguf package, folders do not

            decoder, config, tokenizer = read_gguf(path, dtype)
            ends = config.end_tokens
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        return cls(decoder, tokenizer, end_tokens=tuple(dict.fromkeys((*ends, *own))))

    def __repr__(self) -> str:
        c = self.config
        return (
            f"LanguageModel({c.architecture}, {c.num_layers} layers of width {c.hidden_size}, vocabulary "
            f"{self.vocab_size}, context {self.context_length}, {jnp.dtype(self.dtype).name})"
        )

    # Text and tokens.

    def encode(self, text: str, *, start: bool = False) -> list[int]:
        """Cut a text into tokens.

        Args:
            text: any string; the names of special tokens in it become these tokens.
            start: the text starts a document: add what the tokenizer puts there (Llama's beginning-of-text token).

        Returns:
            The tokens.
        """
        return list(self.tokenizer.encode(text, add_special_tokens=start))

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt after which the model writes the next message of a conversation.

        Args:
            messages: dicts with `role` and `content`.

        Returns:
            Tokens of the conversation in the model's chat template, up to where the assistant's turn begins.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: this is no chat model; give a prompt instead.")
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.encode(text)

    def decode(self, tokens: ArrayLike | Sequence[int], *, length: ArrayLike | None = None) -> str | list[str]:
        """The text of tokens, up to the first end token.

        Args:
            tokens: shape (T,) for one text, (N, T) for many.
            length: number of tokens that count, shape () or (N,); None is all.

        Returns:
            A string for one text, a list of strings for many; the end token and what follows it are left out.

        Raises:
            ValueError: `tokens` is of another rank.
        """
        array = np.asarray(tokens, dtype=np.int64)
        if array.ndim == 2:
            lengths = np.broadcast_to(array.shape[1] if length is None else np.asarray(length), array.shape[:1])
            return [self.decode(row, length=count) for row, count in zip(array, lengths, strict=True)]
        if array.ndim != 1:
            raise ValueError(f"`tokens` must have shape (T,) or (N, T), got {array.shape}.")
        array = array[: None if length is None else int(length)]
        ends = np.flatnonzero(np.isin(array, self.end_tokens))
        kept = array[: ends[0]] if ends.size else array
        return self.tokenizer.decode(kept.tolist(), skip_special_tokens=False)

    def read(self, value: Mapping[str, ArrayLike]) -> list[str]:
        """The texts of a completion's values, `{"tokens": int32[N, T], "length": int32[N]}`."""
        return self.decode(value["tokens"], length=value["length"])

    def is_end(self, token: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether a token is one of the end tokens."""
        return jnp.any(token == jnp.asarray(np.array(self.end_tokens, np.int32)))

    @functools.cached_property
    def vocabulary(self) -> list[str]:
        """The text of every token by itself, `V` strings; part of a character reads as the replacement character."""
        return [self.tokenizer.decode([token], skip_special_tokens=False) for token in range(self.vocab_size)]

    @functools.cached_property
    def byte_vocabulary(self):
        """The bytes that every token writes: a `Vocabulary` of `ppl.models.constraints`."""
        from ppl.models.constraints.vocabulary import Vocabulary  # only constraints need it

        return Vocabulary.from_tokenizer(self.tokenizer, vocab_size=self.vocab_size, end_tokens=self.end_tokens)

    # Whole generations.

    def complete(self, prompt: str | Sequence[int], *, max_tokens: int) -> Completion:
        """What the model writes after a prompt, as a process.

        Args:
            prompt: a text, or its tokens.
            max_tokens: the budget, the end token counted.

        Returns:
            A `ppl.Process` whose value is `{"tokens": int32[max_tokens], "length": int32}`.

        Raises:
            ValueError: the prompt is empty, or prompt and budget do not fit the model's context.
        """
        return Completion(self, self._prompt_tokens(prompt), max_tokens)

    def chat(self, messages: Sequence[Mapping[str, str]], *, max_tokens: int) -> Completion:
        """What the model answers in a conversation, as a process like that of `complete`.

        Args:
            messages: dicts with `role` and `content`.
            max_tokens: the budget, the end token counted.
        """
        return Completion(self, self.chat_prompt(messages), max_tokens)

    # The pieces of a generation.

    def prefill(self, prompt: str | Sequence[int] | Int[Array, "T"], *, max_tokens: int = 0) -> TextState:
        """Read a prompt.

        Args:
            prompt: a text, or its tokens.
            max_tokens: how many tokens to make room for at once, static. `ppl.scan` makes room for its iterations, and
                `extend` outside of loops for a few more whenever there is none, so this is seldom needed.

        Returns:
            The state after the prompt, with `max_tokens` slots. Prompts of the same bucket (16, 32, 64, ... tokens)
            differ in arrays alone, so that a program traced with one runs with the other.

        Raises:
            ValueError: the prompt is empty, prompt and `max_tokens` exceed the context, or `max_tokens` is negative.
        """
        if max_tokens < 0:
            raise ValueError(f"`max_tokens` must be at least 0, got {max_tokens}.")
        tokens = self._prompt_tokens(prompt)
        padded, length = self._pad(tokens)
        keys, values, hidden = self._prefill(self._weights, padded, length)
        c = self.config
        room = (c.num_layers, 0, c.num_kv_heads, c.head_dim)
        state = TextState(
            prompt_keys=keys,
            prompt_values=values,
            prompt_length=length[0],
            keys=jnp.zeros(room, self.dtype),
            values=jnp.zeros(room, self.dtype),
            valid=jnp.zeros(0, bool),
            cursor=jnp.zeros(1, jnp.int32)[0],
            position=length[0],
            hidden=hidden,
            context_length=self.context_length,
        )
        if len(tokens) + max_tokens > self.context_length:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and `max_tokens` = {max_tokens} do not fit the model's context of "
                f"{self.context_length} tokens."
            )
        return state.reserve(max_tokens)

    def next_token(self, state: TextState) -> NextToken:
        """The distribution of the next token.

        Args:
            state: a text so far.

        Returns:
            A NumPyro categorical distribution over the V tokens, with float32 logits.
        """
        return NextToken(logits=self._logits(self._weights, state.hidden))

    def extend(self, state: TextState, token: Int[ArrayLike, ""]) -> TextState:
        """Read one more token.

        Args:
            state: a text so far.
            token: the token, in [0, V).

        Returns:
            The state after it; the prompt's leaves are the same objects.

        Raises:
            ValueError: the context of the model is full.
        """
        if state.used is None and state.free == 0:
            state = state.reserve(min(_GROWTH, max(state.room_in_context, 1)))
        counted = {"free": state.free - 1} if state.used is None else {"used": state.used + 1}
        plain = dataclasses.replace(state, free=0, used=None)  # what is counted is no part of the compiled step
        keys, values, valid, hidden = self._extend(self._weights, plain, jnp.asarray(token, jnp.int32))
        return dataclasses.replace(
            state,
            keys=keys,
            values=values,
            valid=valid,
            hidden=hidden,
            cursor=state.cursor + 1,
            position=state.position + 1,
            **counted,
        )

    def log_prob(self, prompt: str, continuation: str) -> float:
        """Log-probability of a continuation, in one parallel pass.

        Args:
            prompt: what comes before; not empty.
            continuation: the text that is scored, without an end token.

        Returns:
            Natural logarithm of `prod_t p(x_t | prompt, x_<t)` over the tokens of `continuation`, each string being
            tokenised on its own.

        Raises:
            ValueError: the prompt is empty, or both together are longer than the context.
        """
        before, after = self._prompt_tokens(prompt), self.encode(continuation)
        padded, length = self._pad(before + after, "`prompt` and `continuation` together have")
        scores = self._log_probs(self._weights, padded, jnp.array([len(before)], jnp.int32), length)
        return float(np.sum(np.asarray(scores, np.float64)))

    def forward(self, tokens: Sequence[int] | Int[ArrayLike, "T"]) -> Float[Array, "T V"]:
        """Logits after every token of a text, in one parallel pass.

        Args:
            tokens: the text; each length compiles once.

        Returns:
            Row t holds the float32 logits of the token after `tokens[: t + 1]`.
        """
        return self._forward(self._weights, jnp.asarray(tokens, jnp.int32))

    def _prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        tokens = self.encode(prompt, start=True) if isinstance(prompt, str) else np.asarray(prompt).tolist()
        if not tokens:
            start = self.config.bos_token
            hint = "" if start is None else f", for instance the one that starts a document: [{start}]"
            raise ValueError(f"`prompt` is empty: give at least one token{hint}.")
        outside = [token for token in tokens if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"`prompt` has tokens outside of [0, {self.vocab_size}): {outside[:4]}.")
        return tokens

    def _pad(self, tokens: list[int], what: str = "`prompt` has") -> tuple[Int[Array, "S"], Int[Array, "1"]]:
        """The tokens in the next bucket, and how many they are, as arrays of rank 1."""
        if len(tokens) > self.context_length:
            raise ValueError(f"{what} {len(tokens)} tokens; the model's context holds {self.context_length}.")
        bucket = _SMALLEST_BUCKET
        while bucket < len(tokens):
            bucket *= 2
        padded = np.zeros(min(bucket, self.context_length), np.int32)
        padded[: len(tokens)] = tokens
        return jnp.asarray(padded), jnp.asarray(np.array([len(tokens)], np.int32))


def _prefill(decoder: Decoder, tokens: Int[Array, "S"], length: Int[Array, "1"]):
    hidden, keys, values = decoder.forward(tokens)
    last = jax.lax.dynamic_index_in_dim(hidden, length[0] - 1, keepdims=False)
    return keys, values, last


def _log_probs(
    decoder: Decoder, tokens: Int[Array, "S"], start: Int[Array, "1"], stop: Int[Array, "1"]
) -> Float[Array, "S"]:
    """Log-probabilities of the tokens at `start` to `stop`, 0 elsewhere, shifted to the place before each."""
    hidden, _, _ = decoder.forward(tokens)
    following = jnp.roll(tokens, -1)

    def score(rows: tuple[Array, Array]) -> Array:
        return NextToken(logits=decoder.logits(rows[0])).log_prob(rows[1])

    scores = jax.lax.map(score, (hidden, following), batch_size=_HEAD_ROWS)
    place = jnp.arange(tokens.shape[0]) + 1
    return jnp.where((place >= start) & (place < stop), scores, 0.0)
