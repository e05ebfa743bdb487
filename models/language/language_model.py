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

from ppl.control_flow import NoRoom
from ppl.models.compiled import Compiled
from ppl.models.language.cache import Room, TextState
from ppl.models.language.checkpoints import generation_end_tokens, locate, read_folder
from ppl.models.language.completion import Completion
from ppl.models.language.config import DecoderConfig
from ppl.models.language.continuations import continuing
from ppl.models.language.decoder import Decoder
from ppl.models.language.next_token import NextToken
from ppl.models.language.prompts import prompt_tokens, render_conversation, start_tokens
from ppl.models.language.reading import Reader
from ppl.models.layers import for_device

__all__ = ["LanguageModel"]

_SMALLEST_BUCKET = 16
_GROWTH = 16  # slots that `extend` adds when it finds none, outside of loops
_PROMPTS = 4  # whose caches are kept
_HEAD_ROWS = 64  # rows of logits that `log_prob` holds at a time


class LanguageModel(Compiled):
    """A decoder-only transformer with its tokenizer.

    It pickles with its weights, as arrays: what is unpickled is the same model, whatever became of its files. Results
    hold no network: the posterior of a text pickles with the tokenizer alone.

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
        self._graph, self._weights = nnx.split(for_device(decoder))
        self.dtype = decoder.embedding.dtype
        self._compile()

    def _compile(self) -> None:
        def compiled(function: Callable) -> Callable:
            # One compiled function for each, the weights its first argument. Tracing is cached with it, so that the
            # blocks of a deep network are traced once and not in every program that calls it.
            return jax.jit(lambda weights, *arguments: function(nnx.merge(self._graph, weights), *arguments))

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
            start: the text starts a document: add what the tokenizer puts there (Llama's beginning-of-text token, the
                space of SentencePiece's tokenizers). Otherwise it goes on from another: nothing is added.

        Returns:
            The tokens.
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` must be a string, got {type(text).__name__}.")
        if start:
            return self._document_start + list(self.tokenizer.encode(text, add_special_tokens=False))
        return list(self._continuing.encode(text, add_special_tokens=False))

    @functools.cached_property
    def _document_start(self) -> list[int]:
        return start_tokens(self.tokenizer)

    @functools.cached_property
    def _continuing(self) -> Any:
        """The tokenizer for texts that go on from others; see `ppl.models.language.continuations`."""
        return continuing(self.tokenizer)

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None, **template: Any
    ) -> list[int]:
        """The prompt after which the model writes the next message of a conversation.

        Args:
            messages: dicts with `role` and `content`, a string or a list of parts `{"type": "text", "text": ...}`.
            tools: functions, or their JSON schemas, that the template describes to the model.
            **template: further arguments of the model's chat template, such as `enable_thinking=False`.

        Returns:
            Tokens of the conversation in the model's chat template, up to where the assistant's turn begins, or to the
            end of the last message where that is the assistant's own.

        Raises:
            TypeError: messages, contents or tools of another kind.
            ValueError: the tokenizer has no chat template, or the template refuses the conversation, leaves a system
                message out, or has no use for an argument.
        """
        return self._chat_prompt(messages, tools, template)[0]

    def _chat_prompt(self, messages: Any, tools: Any, template: Mapping[str, Any]) -> tuple[list[int], bool]:
        """The prompt, and whether the last message goes on."""
        text, continued = render_conversation(self.tokenizer, messages, tools, template)
        tokens = list(self.tokenizer.encode(text, add_special_tokens=False))  # what it begins with is the template's
        while tokens and not continued and tokens[-1] in self.end_tokens:
            tokens.pop()  # after an end token another document would begin
        return tokens, continued

    def decode(
        self, tokens: ArrayLike | Sequence[int], *, length: ArrayLike | None = None, start: bool = True
    ) -> str | list[str]:
        """The text of tokens, up to the first end token.

        Args:
            tokens: shape (T,) for one text, (N, T) for many.
            length: number of tokens that count, shape () or (N,); None is all.
            start: the tokens start a document: SentencePiece's tokenizers drop a space there. False for those that go
                on from others, whose text is the rest of the whole's: the counterpart of `encode(text)`.

        Returns:
            A string for one text, a list of strings for many; the end token and what follows it are left out.

        Raises:
            ValueError: `tokens` is of another rank.
        """
        array = np.asarray(tokens, dtype=np.int64)
        if array.ndim == 2:
            lengths = np.broadcast_to(array.shape[1] if length is None else np.asarray(length), array.shape[:1])
            return [self.decode(row, length=count, start=start) for row, count in zip(array, lengths, strict=True)]
        if array.ndim != 1:
            raise ValueError(f"`tokens` must have shape (T,) or (N, T), got {array.shape}.")
        reader = self.reader if start else self.continuing_reader
        return reader.text(array, None if length is None else int(length))

    def read(self, value: Mapping[str, ArrayLike]) -> list[str]:
        """The texts of a chat's values, `{"tokens": int32[N, T], "length": int32[N]}`; each is a text of its own."""
        return self.reader(value)

    @functools.cached_property
    def reader(self) -> Reader:
        """What reads values whose texts begin anew, as a chat's answers do."""
        return Reader(self.tokenizer, self.end_tokens)

    @functools.cached_property
    def continuing_reader(self) -> Reader:
        """What reads values whose texts go on from a prompt, as a completion's do."""
        return Reader(self._continuing, self.end_tokens)

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

    @functools.cached_property
    def continuing_vocabulary(self):
        """The same for texts that go on from others: no space is dropped at their beginning."""
        whole = self.byte_vocabulary
        return dataclasses.replace(whole, strips_space=False) if whole.strips_space else whole

    # Whole generations.

    def complete(self, prompt: str | Sequence[int] | Int[Array, "T"], *, max_tokens: int) -> Completion:
        """What the model writes after a prompt, as a process.

        A text ends by an end token within the budget, or fills the budget. Its probability is that of all its tokens,
        the end token included, so that what a constraint says of choices depends on `max_tokens`: with a budget of one
        token " sun" means that this token comes, with more that the text ends there too, and where options differ in
        their number of tokens some fill the budget and some must end. What the options are worth as continuations,
        whatever follows them, is `lm.log_prob(prompt, option)`. To compare them as whole texts take a budget that
        leaves room for an end token after the longest, and `constrain(..., require_end=True)`.

        Args:
            prompt: a text, or its tokens; inside of models traced ones too.
            max_tokens: the budget, the end token counted.

        Returns:
            A `ppl.Process` whose value is `{"tokens": int32[max_tokens], "length": int32}`. Its texts go on from the
            prompt: prompt and text together are the text of all tokens.

        Raises:
            ValueError: the prompt is empty, or prompt and budget do not fit the model's context.
        """
        return Completion(self, prompt if _traced(prompt) else self._prompt_tokens(prompt), max_tokens)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int,
        tools: Sequence[Any] | None = None,
        **template: Any,
    ) -> Completion:
        """What the model answers in a conversation, as a process like that of `complete`.

        An answer ends by an end token, or fills the budget; see `complete` for what that means for constraints: a
        choice is among whole answers where the budget has room for an end token.

        Args:
            messages: dicts with `role` and `content`, a string or a list of parts `{"type": "text", "text": ...}`. The
                last one is continued where its role is assistant.
            max_tokens: the budget, the end token counted.
            tools: functions, or their JSON schemas, that the template describes to the model.
            **template: further arguments of the model's chat template, such as `enable_thinking=False`.

        Returns:
            A `ppl.Process` as `complete` gives. An answer is a text of its own: the space that SentencePiece's
            tokenizers put before a text is no part of it. What continues a message goes on from it.

        Raises:
            TypeError, ValueError: as for `chat_prompt`, and as for `complete`.
        """
        prompt, continued = self._chat_prompt(messages, tools, template)
        return Completion(self, self._prompt_tokens(prompt), max_tokens, continues=continued)

    # The pieces of a generation.

    def prefill(
        self,
        prompt: str | Sequence[int] | Int[Array, "T"],
        length: Int[ArrayLike, ""] | None = None,
        *,
        max_tokens: int = 0,
    ) -> TextState:
        """Read a prompt.

        Args:
            prompt: a text, or its tokens; they may be traced, drawn in the program too.
            length: how many of the tokens count, traced or not; the others are padding, which nothing attends to. None
                is all.
            max_tokens: how many tokens to make room for at once, static. `ppl.scan` makes room for its iterations, and
                `extend` for a few more whenever there is none, so this is seldom needed.

        Returns:
            The state after the prompt, with `max_tokens` slots. Prompts of the same bucket (16, 32, 64, ... tokens)
            differ in arrays alone, so that a program traced with one runs with the other. A traced `length` outside of
            [1, T] gives NaN, which is an invalid weight where it counts.

        Raises:
            TypeError: `length` with a text, or tokens that are not integers.
            ValueError: the prompt is empty, prompt and `max_tokens` exceed the context, or `max_tokens` is negative.
        """
        if max_tokens < 0:
            raise ValueError(f"`max_tokens` must be at least 0, got {max_tokens}.")
        padded, count, known = self._prompt_array(prompt, length)
        keys, values, hidden = self._read_prompt(padded, count)
        count = jnp.asarray(count)  # an array of rank 1 is an input of the program that is staged, a number is not
        # A length that is known only when the program runs may be none: then nothing that follows is a number.
        position = count[0] if known is not None else jnp.where(count[0] >= 1, count[0], self.context_length)
        c = self.config
        room = (c.num_layers, 0, c.num_kv_heads, c.head_dim)
        state = TextState(
            prompt_keys=keys,
            prompt_values=values,
            prompt_length=count[0],
            keys=jnp.zeros(room, self.dtype),
            values=jnp.zeros(room, self.dtype),
            valid=jnp.zeros(0, bool),
            cursor=jnp.zeros(1, jnp.int32)[0],
            position=position,
            hidden=hidden,
            context_length=self.context_length,
            room=Room(prompt=known),
        )
        if (known or 1) + max_tokens > self.context_length:
            raise ValueError(
                f"a prompt of {known or 1} tokens and `max_tokens` = {max_tokens} do not fit the model's context of "
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

        The state that is given stays as it is, so that a text may branch: extend it twice and there are two texts, each
        with room of its own, inside of loops too. A branch costs a copy of what its text has after the prompt.

        Args:
            state: a text so far.
            token: the token, in [0, V).

        Returns:
            The state after it; the prompt's leaves are the same objects.

        Raises:
            TypeError: `token` is not an integer.
            ValueError: `token` is not one token, or not in the vocabulary, or the context of the model is full: inside
                of a `ppl.scan` it must have room in the last iteration.
        """
        token = _one_token(token, self.vocab_size)
        if state.free == 0:
            if state.room_in_context < 1:
                raise NoRoom(f"lm.extend: {state.full(1)}")
            state = state.reserve(min(_GROWTH, state.room_in_context))
        elif not _traced(state.cursor) and int(np.asarray(state.cursor).max()) >= state.slots:
            raise ValueError(
                f"lm.extend: all {state.slots} slots of this state are written, though its room says {state.free} are "
                "free: a loop ran longer than it was entered for. ppl.scan makes room for its iterations."
            )
        plain = dataclasses.replace(state, room=Room())  # what is known of the room is no part of the compiled step
        keys, values, valid, hidden = self._extend(self._weights, plain, token)
        return dataclasses.replace(
            state,
            keys=keys,
            values=values,
            valid=valid,
            hidden=hidden,
            cursor=state.cursor + 1,
            position=state.position + 1,
            room=dataclasses.replace(state.room, free=state.free - 1),
        )

    def log_prob(self, prompt: str, continuation: str) -> float:
        """Log-probability of a continuation, in one parallel pass.

        Args:
            prompt: what comes before; not empty.
            continuation: the text that is scored, without an end token.

        Returns:
            Natural logarithm of `prod_t p(x_t | prompt, x_<t)` over the tokens of `continuation`, each string being
            tokenised on its own, the continuation as it stands: a tokenizer's space before a text is left out. Those
            are the tokens that follow the prompt in the joined string, except where one token would span the cut
            ("new", "s" of "news"): then its two parts are scored as they are cut.

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

    @functools.cached_property
    def _prompts(self) -> dict[tuple[bytes, bytes], tuple[Array, Array, Array]]:
        """What was read last, oldest first."""
        return {}

    def _read_prompt(self, tokens: Int[Array, "S"], count: Int[Array, "1"]) -> tuple[Array, Array, Array]:
        """The keys, values and last hidden state of a prompt.

        What is known while a program is staged is read there and then, by one compiled pass for all programs: they are
        given its cache, as they are given the weights. A few prompts are remembered, for the parts of a target that
        begin alike.
        """
        if _traced((tokens, count)):
            return _prefill(self._graph, self._weights, tokens, count)
        key = tokens.tobytes(), count.tobytes()
        if key not in self._prompts:
            with jax.ensure_compile_time_eval():
                self._prompts[key] = _prefill(self._graph, self._weights, tokens, count)
            while len(self._prompts) > _PROMPTS:
                self._prompts.pop(next(iter(self._prompts)))
        return self._prompts[key]

    def _prompt_array(self, prompt: Any, length: Any) -> tuple[Any, Any, int | None]:
        """A prompt in its bucket, `int32[S]`, how many tokens it has, `int32[1]`, and that number where it is known."""
        if length is None and not _traced(prompt):
            tokens = self._prompt_tokens(prompt)
            return *self._pad(tokens), len(tokens)
        if isinstance(prompt, str):
            raise TypeError("`length` says how many tokens of an array count; a text has all of its own.")
        tokens = jnp.asarray(prompt)
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"`prompt` must hold tokens, which are integers; got {tokens.dtype}.")
        if tokens.ndim != 1 or tokens.shape[0] == 0:
            raise ValueError(
                f"`prompt` must be one text's tokens, of shape (T,) with T at least 1, got {tokens.shape}; "
                "read many texts by jax.vmap."
            )
        count = jnp.asarray(tokens.shape[0] if length is None else length)
        if count.shape != () or not jnp.issubdtype(count.dtype, jnp.integer):
            raise TypeError(f"`length` must be one integer, got {count.dtype} of shape {count.shape}.")
        known = None if _traced(length) else tokens.shape[0] if length is None else int(length)
        if known is not None and not 1 <= known <= tokens.shape[0]:
            raise ValueError(f"`length` must be in [1, {tokens.shape[0]}], the number of tokens given; got {known}.")
        if known is not None and not _traced(prompt):
            return *self._pad(self._prompt_tokens(np.asarray(prompt)[:known])), known
        if known is not None:
            tokens = tokens[:known]
        bucket = self._bucket(tokens.shape[0], "`prompt` has")
        padded = jnp.zeros(bucket, jnp.int32).at[: tokens.shape[0]].set(tokens.astype(jnp.int32))
        count = jnp.where(count <= tokens.shape[0], count, 0) if known is None else count
        return padded, count.astype(jnp.int32)[None], known

    def _prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        encode = functools.partial(self.encode, start=True)
        return prompt_tokens(prompt, encode, self.vocab_size, self.config.bos_token)

    def _pad(self, tokens: list[int], what: str = "`prompt` has") -> tuple[np.ndarray, np.ndarray]:
        """The tokens in the next bucket, and how many they are, as NumPy arrays of rank 1."""
        padded = np.zeros(self._bucket(len(tokens), what), np.int32)
        padded[: len(tokens)] = tokens
        return padded, np.array([len(tokens)], np.int32)

    def _bucket(self, length: int, what: str) -> int:
        if length > self.context_length:
            raise ValueError(f"{what} {length} tokens; the model's context holds {self.context_length}.")
        bucket = _SMALLEST_BUCKET
        while bucket < length:
            bucket *= 2
        return min(bucket, self.context_length)


def _traced(value: Any) -> bool:
    """Whether a value, or a part of it, is known only when a program runs."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def _one_token(token: Any, vocab_size: int) -> Int[Array, ""]:
    """One token as an int32 array."""
    given = token if _traced(token) else np.asarray(token)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"lm.extend: `token` must be an integer, got {given.dtype}.")
    if given.shape != ():
        raise ValueError(
            f"lm.extend: `token` must be one token, of shape (), got shape {given.shape}; read several one after the "
            "other: ppl.scan(lambda state, token: (lm.extend(state, token), None), state, tokens)."
        )
    if not _traced(given) and not 0 <= int(given) < vocab_size:
        raise ValueError(f"lm.extend: `token` must be in [0, {vocab_size}), got {int(given)}.")
    return jnp.asarray(given, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)  # one for all networks of a shape, as copies of a model are
def _prefill(graph: nnx.GraphDef, weights: nnx.State, tokens: Int[Array, "S"], length: Int[Array, "1"]):
    hidden, keys, values = nnx.merge(graph, weights).forward(tokens)
    last = jax.lax.dynamic_index_in_dim(hidden, length[0] - 1, keepdims=False)
    return keys, values, jnp.where(length[0] >= 1, last, jnp.nan)  # a traced length may be anything


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
