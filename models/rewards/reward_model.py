"""`RewardModel`: a decoder with a score head, which judges a text as a whole or step by step.

With h_t the last hidden state after token t, after the final norm, and n the text's length, the reward is

    r = w . h_(n-1)                                                                                             (1)

for a sequence classifier of one label (the value of the last token that is no padding, as transformers computes it; a
preference model in the sense of Ouyang et al. 2022, arXiv 2203.02155, sec. 3.5, so in nats up to a constant for each
prompt), and for Qwen's reward models the same with a head of two layers, `W2 relu(W1 h + b1) + b2`. A process reward
model reads its head at the tokens that end a step,

    p_k = softmax(W2 relu(W1 h_(t_k) + b1) + b2)_1,     t_k the place of the k-th separator                     (2)

the probability that step k is right (Zhang et al. 2025, arXiv 2501.07301).

`reward` and `step_rewards` take token ids of the checkpoint's own tokenizer, so that they serve on the device where the
language model shares it; `score_texts` takes strings. What the text answers belongs to it: put the prompt's tokens
before a completion's, and count them in `length`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ppl.models.compiled import Compiled
from ppl.models.language.checkpoints import (
    NAMES_LLAMA,
    REDUNDANT,
    Tensors,
    build_decoder,
    check_vocabulary,
    locate,
    open_safetensors,
    read_json,
    read_tokenizer,
)
from ppl.models.language.config import DecoderConfig
from ppl.models.language.continuations import continuing
from ppl.models.language.decoder import Decoder, Linear
from ppl.models.layers import for_device
from ppl.models.rewards.batches import check_texts, in_batches, pad_rows

__all__ = ["RewardModel", "ScoreHead"]

# What each class of checkpoint has: the decoder's `model_type`, layers of the head, outputs of the head.
_ARCHITECTURES = {
    "LlamaForSequenceClassification": ("llama", 1, 1),
    "Qwen2ForSequenceClassification": ("qwen2", 1, 1),
    "Qwen3ForSequenceClassification": ("qwen3", 1, 1),
    "Qwen2ForRewardModel": ("qwen2", 2, 1),
    "Qwen2ForProcessRewardModel": ("qwen2", 2, 2),
}
_AGGREGATIONS = ("product", "min", "mean", "last")
_SEPARATOR = "<extra_0>"


class ScoreHead(nnx.Module):
    """One linear layer, or two with a ReLU between; float32."""

    def __init__(self, hidden_size: int, outputs: int, *, layers: int, rngs: nnx.Rngs):
        """Draw random weights: one layer has no bias, two have."""
        if layers not in (1, 2):
            raise ValueError(f"`layers` must be 1 or 2, got {layers}.")
        widths = [hidden_size] * layers + [outputs]
        self.outputs = outputs
        self.layers = nnx.List(
            Linear(width_in, width_out, bias=layers > 1, rngs=rngs, dtype=jnp.float32)
            for width_in, width_out in zip(widths[:-1], widths[1:], strict=True)
        )

    def __call__(self, hidden: Float[Array, "*T E"]) -> Float[Array, "*T outputs"]:
        """Apply the head to hidden states after the final norm."""
        x = hidden.astype(jnp.float32)
        for index, layer in enumerate(self.layers):
            x = layer(jax.nn.relu(x) if index else x)
        return x


class RewardModel(Compiled):
    """A reward model with its tokenizer.

    Attributes:
        tokenizer: the `transformers` tokenizer.
        config: the decoder's shape.
        is_process: whether it judges steps; only then has it `step_rewards`.
        separator: the token that ends a step, for a process reward model; else None.
        aggregation: what `reward` makes of the steps' values, for a process reward model; else None.
        vocab_size: number of tokens, V.
        context_length: largest number of tokens.
        dtype: of the decoder's weights and hidden states; rewards are float32.
    """

    def __init__(
        self,
        decoder: Decoder,
        head: ScoreHead,
        tokenizer: Any,
        *,
        separator: int | None = None,
        aggregation: str = "product",
    ):
        """Wrap networks and a tokenizer that are at hand; `load` reads them from files.

        Args:
            decoder: the network below the head.
            head: one output for a reward of the whole text, two for a process reward model.
            tokenizer: a `transformers` tokenizer for the decoder's vocabulary.
            separator: the token that ends a step; needed with two outputs and only then.
            aggregation: of the steps' values: "product", "min", "mean" or "last".

        Raises:
            ValueError: the head has other outputs, the separator is missing, not called for or outside of the
                vocabulary, or the aggregation is unknown.
        """
        self.config: DecoderConfig = decoder.config
        self.tokenizer = tokenizer
        self.vocab_size, self.context_length = self.config.vocab_size, self.config.context_length
        if head.outputs not in (1, 2):
            raise ValueError(f"`head` must have 1 output, or 2 for a process reward model; got {head.outputs}.")
        self.is_process = head.outputs == 2
        if self.is_process != (separator is not None):
            raise ValueError(
                f"`separator` must be {'a token' if self.is_process else 'None'} for a head of {head.outputs} "
                f"output(s), got {separator}."
            )
        if separator is not None and not 0 <= separator < self.vocab_size:
            raise ValueError(f"`separator` must be in [0, {self.vocab_size}), got {separator}.")
        if aggregation not in _AGGREGATIONS:
            raise ValueError(f"`aggregation` must be one of {', '.join(_AGGREGATIONS)}; got {aggregation!r}.")
        self.separator, self.aggregation = separator, aggregation if self.is_process else None
        self.dtype = decoder.embedding.dtype
        self._graph, self._weights = nnx.split((for_device(decoder), head))
        self._compile()

    def _compile(self) -> None:
        separator, aggregation = self.separator, self.aggregation

        def merged(function: Any) -> Any:
            return lambda weights, *arguments: function(*nnx.merge(self._graph, weights), *arguments)

        def reward(decoder: Decoder, head: ScoreHead, tokens: Array, length: Array) -> Array:
            if self.is_process:
                return _aggregate(*_step_rewards(decoder, head, tokens, length, separator), aggregation)
            return _last_value(decoder, head, tokens, length)

        def step_rewards(decoder: Decoder, head: ScoreHead, tokens: Array, length: Array) -> tuple[Array, Array]:
            return _step_rewards(decoder, head, tokens, length, separator)

        # The weights are arguments: they are not compiled in.
        self._reward, self._step_rewards = jax.jit(merged(reward)), jax.jit(merged(step_rewards))
        self._reward_rows = jax.jit(jax.vmap(merged(reward), in_axes=(None, 0, 0)))

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: Any = None,
        separator: str | int | None = None,
        aggregation: str = "product",
    ) -> "RewardModel":
        """Read a reward model from disk or from the hub.

        Args:
            source: a folder with config, safetensors and tokenizer, or a hub id such as
                "Qwen/Qwen2.5-Math-PRM-7B". Its architecture is a sequence classifier of one label on Llama, Qwen2 or
                Qwen3, `Qwen2ForRewardModel` or `Qwen2ForProcessRewardModel`.
            dtype: of the decoder's weights and hidden states; None is float32 on CPU and bfloat16 on accelerators.
            separator: what ends a step for a process reward model, a token or its text; None is `<extra_0>`.
            aggregation: what `reward` makes of the steps' values: "product", "min", "mean" or "last".

        Returns:
            The model, its weights on JAX's default device.

        Raises:
            FileNotFoundError: no such folder or hub repository, or one of the files is missing.
            ValueError: a file that is damaged, an architecture or tensor that is not supported, a score head that is
                missing, or a separator that is no single token.
        """
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        folder = locate(source)
        if not folder.is_dir():
            raise ValueError(
                f"`source` = {str(source)!r} is a file; accepted are a folder with config, safetensors and tokenizer, "
                "and a hub id."
            )
        settings = read_json(folder, "config.json")
        layers, outputs = _head_shape(settings)
        settings |= {"tie_word_embeddings": True}  # there is no head of words
        config = DecoderConfig.from_hf(settings, str(folder / "config.json"))
        tokenizer = read_tokenizer(folder)
        check_vocabulary(tokenizer, config.vocab_size, str(folder))
        tensors = open_safetensors(folder, prefix="")
        head = _read_head(tensors, config.hidden_size, outputs, layers)
        decoder = build_decoder(
            config,
            tensors,
            NAMES_LLAMA,
            dtype=dtype,
            redundant=lambda name: bool(REDUNDANT.fullmatch(name)) or name == "lm_head.weight",
        )
        if outputs == 2:
            separator = _separator_token(tokenizer, _SEPARATOR if separator is None else separator)
        elif separator is not None:
            raise ValueError(f"`separator` = {separator!r} is for process reward models; {folder} is none.")
        return cls(decoder, head, tokenizer, separator=separator, aggregation=aggregation)

    def __repr__(self) -> str:
        c = self.config
        kind = f"process rewards at {self.separator}, {self.aggregation}" if self.is_process else "one reward"
        return (
            f"RewardModel({c.architecture}, {c.num_layers} layers of width {c.hidden_size}, {kind}, context "
            f"{self.context_length}, {jnp.dtype(self.dtype).name})"
        )

    def reward(self, tokens: Int[ArrayLike, "T"], length: Int[ArrayLike, ""]) -> Float[Array, ""]:
        """The reward of one text; pure, for use inside `jit`, `vmap` and programs.

        Args:
            tokens: the text's tokens, and padding of any content; T at most the context.
            length: how many of them are real, at most T.

        Returns:
            Equation (1), float32; NaN for an empty text. For a process reward model the aggregate of the steps'
            probabilities, in [0, 1], and 1 for a text in which no step has ended.

        Raises:
            ValueError: `tokens` is not of rank 1, or longer than the context.
        """
        return self._reward(self._weights, *self._checked(tokens, length))

    def step_rewards(
        self, tokens: Int[ArrayLike, "T"], length: Int[ArrayLike, ""]
    ) -> tuple[Float[Array, "T"], Bool[Array, "T"]]:
        """The value of every step of one text; pure, for use inside `jit`, `vmap` and programs.

        Args:
            tokens: the text's tokens with a separator after each step, and padding; T at most the context.
            length: how many of them are real, at most T.

        Returns:
            Equation (2) at the separators and 0 elsewhere, float32; and where the separators are.

        Raises:
            ValueError: this is no process reward model, or `tokens` is not of rank 1 or longer than the context.
        """
        if not self.is_process:
            raise ValueError("`step_rewards` needs a process reward model; this one judges whole texts: use `reward`.")
        return self._step_rewards(self._weights, *self._checked(tokens, length))

    def score_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N"]:
        """The rewards of texts, each tokenised with what the tokenizer puts before and after a document.

        Args:
            texts: N strings, prompt and answer together, in the chat template where the model was trained with one.

        Returns:
            What `reward` gives for each, float32. N and the number of tokens are rounded up to powers of two, so that
            calls with as many texts compile anew only where a longer one comes. It runs compiled code, which
            `ppl.host` allows on a CPU; on accelerators, which may not run one program while they wait in another, use
            `reward` inside of programs.

        Raises:
            TypeError: not a list of strings.
            ValueError: an empty list, a text without tokens, or one longer than the context.
        """
        rows = [list(self.tokenizer.encode(text)) for text in check_texts(texts)]
        for index, row in enumerate(rows):
            if not 1 <= len(row) <= self.context_length:
                raise ValueError(
                    f"`texts[{index}]` has {len(row)} tokens; accepted are 1 to {self.context_length}, the context."
                )
        tokens, lengths = pad_rows(rows, largest=self.context_length)
        return in_batches(lambda *batch: self._reward_rows(self._weights, *batch), tokens, lengths)

    def _checked(self, tokens: ArrayLike, length: ArrayLike) -> tuple[Array, Array]:
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 1 or not 1 <= tokens.shape[0] <= self.context_length:
            raise ValueError(
                f"`tokens` must have shape (T,) with T in [1, {self.context_length}], got {tokens.shape}; use jax.vmap "
                "for many texts."
            )
        return tokens, jnp.asarray(length, jnp.int32)


def _last_value(decoder: Decoder, head: ScoreHead, tokens: Int[Array, "T"], length: Int[Array, ""]) -> Array:
    hidden, _, _ = decoder.forward(tokens)
    last = jax.lax.dynamic_index_in_dim(hidden, length - 1, keepdims=False)
    return jnp.where(length > 0, head(last)[0], jnp.nan)  # (1)


def _step_rewards(
    decoder: Decoder, head: ScoreHead, tokens: Int[Array, "T"], length: Int[Array, ""], separator: int
) -> tuple[Float[Array, "T"], Bool[Array, "T"]]:
    hidden, _, _ = decoder.forward(tokens)
    ends = (tokens == separator) & (jnp.arange(tokens.shape[0]) < length)
    return jnp.where(ends, jax.nn.softmax(head(hidden), axis=-1)[:, 1], 0.0), ends  # (2)


def _aggregate(values: Float[Array, "T"], ends: Bool[Array, "T"], how: str) -> Float[Array, ""]:
    steps = jnp.sum(ends)
    if how == "product":
        return jnp.prod(jnp.where(ends, values, 1.0))
    if how == "min":
        return jnp.min(jnp.where(ends, values, 1.0))
    if how == "mean":
        return jnp.where(steps > 0, jnp.sum(values) / jnp.maximum(steps, 1), 1.0)
    last = ends.shape[0] - 1 - jnp.argmax(ends[::-1])
    return jnp.where(steps > 0, values[last], 1.0)


def _head_shape(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Layers and outputs of the score head that a configuration calls for."""
    names = settings.get("architectures") or []
    if len(names) != 1 or names[0] not in _ARCHITECTURES:
        raise ValueError(
            f"unknown architecture: `architectures` in config.json is {names}; accepted for a reward model: "
            f"{', '.join(_ARCHITECTURES)}."
        )
    kind, layers, outputs = _ARCHITECTURES[names[0]]
    if settings.get("model_type") != kind:
        raise ValueError(
            f"`model_type` in config.json is {settings.get('model_type')!r}; accepted for {names[0]} is {kind!r}."
        )
    # transformers writes the labels only where they are not two.
    labels = settings.get("num_labels") or len(settings.get("id2label") or (0, 1))
    if layers == 1 and labels != outputs:
        raise ValueError(
            f"a classifier of {labels} labels is no reward model: `id2label` in config.json must have {outputs}."
        )
    return layers, outputs


def _read_head(tensors: Tensors, width: int, outputs: int, layers: int) -> ScoreHead:
    if not any(name.startswith("score.") for name in tensors.names):
        raise ValueError(
            f"{tensors.source} has no score head: none of its tensors starts with `score.`. A language model is read "
            "by `LanguageModel.load`."
        )
    head = ScoreHead(width, outputs, layers=layers, rngs=nnx.Rngs(0))
    if layers == 1:
        names = ["score"]
    else:
        names = ["score.0", "score.2"]  # a ReLU stands between
    for name, layer in zip(names, head.layers, strict=True):
        shape = layer.kernel[...].shape[::-1]
        kernel = np.ascontiguousarray(tensors.take(f"{name}.weight", shape).T)
        layer.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))
        if layer.bias is not None:
            layer.bias = nnx.Param(jnp.asarray(tensors.take(f"{name}.bias", shape[:1]), jnp.float32))
    return head


def _separator_token(tokenizer: Any, separator: str | int) -> int:
    if isinstance(separator, int):
        return separator
    tokens = continuing(tokenizer).encode(separator, add_special_tokens=False)  # it stands inside of a text
    if len(tokens) != 1:
        raise ValueError(
            f"`separator` = {separator!r} must be one token of the model's tokenizer, got {len(tokens)}: {tokens}."
        )
    return tokens[0]
