"""What a decoder-only transformer is made of, read from a Hugging Face config or from GGUF metadata.

One description covers the architectures that `Decoder` can run: Llama 2 and 3 (SmolLM2 is one of them), Qwen2 and
Qwen2.5, Qwen3, GPT-2; and LLaDA, whose tokens attend to all others. What a file asks for and this description cannot
say is refused by name, never ignored.

Rotary positions rotate the pair `(i, i + head_dim / 2)` of a query or key at position `p` by the angle

    p * theta^(-2 i / head_dim) / divisor_i                                                                    (1)

where the divisors carry the scaling that stretches a model's context: 1 without scaling, the factor everywhere for
`linear` (Chen et al. 2023, arXiv 2306.15595), and for `llama3` the factor on wavelengths longer than the original
context, 1 on short ones and an interpolation between them (Llama team 2024, arXiv 2407.21783, sec. 3.4).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ppl.models.language.settings import NEUTRAL_GGUF, NEUTRAL_HF, Settings, refuse_what_is_not_carried_out

__all__ = ["ARCHITECTURES", "DecoderConfig"]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "llada")

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_WIDEST_HEAD = 2**16  # what a file says beyond it is damage, and would fill the memory with divisors


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder-only transformer.

    Attributes:
        architecture: one of `ARCHITECTURES`; which names the checkpoint's tensors have.
        vocab_size: number of tokens, V.
        hidden_size: width of the residual stream, E.
        num_layers: number of blocks, L.
        num_heads: query heads, H; a multiple of `num_kv_heads`.
        num_kv_heads: key and value heads, Hkv.
        head_dim: width of one head, D.
        intermediate_size: width of the feed-forward layer, F.
        context_length: largest number of positions.
        norm: "rms" or "layer".
        norm_eps: added to the variance.
        activation: "silu", "gelu" or "gelu_tanh".
        gated: feed-forward `down(act(gate x) * up x)` instead of `down(act(up x))`.
        positions: "rope" or "learned".
        rope_theta: base of the rotary angles, equation (1).
        rope_divisors: the divisors of equation (1), one for each of the `head_dim / 2` pairs; empty for all 1.
        qkv_bias: queries, keys and values have a bias.
        output_bias: the attention's output projection has a bias.
        mlp_bias: the feed-forward projections have biases.
        qk_norm: queries and keys are RMS-normalised head by head.
        tied_embeddings: the output head is the embedding table.
        causal: a token attends to itself and what is before it; else to the whole text, as masked diffusion needs.
        bos_token: token that starts a document, or None.
        end_tokens: tokens that end a text.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated: bool = True
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] = ()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    causal: bool = True
    bos_token: int | None = None
    end_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"`num_heads` must be a multiple of `num_kv_heads`, got {self.num_heads} and {self.num_kv_heads}."
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even for rotary positions, got {self.head_dim}.")
        if self.rope_divisors and len(self.rope_divisors) != self.head_dim // 2:
            raise ValueError(
                f"`rope_divisors` must have head_dim / 2 = {self.head_dim // 2} entries, got {len(self.rope_divisors)}."
            )

    @property
    def groups(self) -> int:
        """Query heads that share one key head, G = H / Hkv."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "config.json") -> "DecoderConfig":
        """Read the contents of a Hugging Face `config.json`.

        Args:
            config: the parsed file; both `rope_theta` with `rope_scaling` and the newer `rope_parameters` are read.
            source: what to call the file in messages.

        Returns:
            The description of the same network.

        Raises:
            ValueError: an architecture, rotary scaling, activation or attention that is not among the supported ones,
                an entry that is missing or cannot be, or a setting of `NEUTRAL_HF` that is not carried out.
        """
        file = Settings(config, source)
        architecture = _architecture(config.get("model_type"), f"`model_type` in {source}")
        if architecture == "gpt2":
            return cls(**_gpt2_from_hf(file))
        if architecture == "llada":
            return cls(**_llada_from_hf(file))
        refuse_what_is_not_carried_out(file, NEUTRAL_HF)
        _refuse_sliding_window(file)
        if file.flag("use_qk_norm", architecture == "qwen3") != (architecture == "qwen3"):
            raise file.wrong("use_qk_norm", f"{str(architecture == 'qwen3').lower()} for {architecture}")
        heads, kv_heads = _heads(file, "num_attention_heads", "num_key_value_heads")
        hidden = file.whole("hidden_size")
        # Qwen3 has a width of its own where the file says none; the others split the hidden size.
        if file.has("head_dim") or architecture == "qwen3":
            head_dim = file.whole("head_dim", 128, most=_WIDEST_HEAD)
        else:
            head_dim = _share(file, "hidden_size", hidden, "num_attention_heads", heads)
        context = file.whole("max_position_embeddings")
        theta, divisors = _hf_rope(file, head_dim, context)
        bias = file.flag("attention_bias", False)
        vocab_size = file.whole("vocab_size")
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_layers=file.whole("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=file.whole("intermediate_size"),
            context_length=context,
            norm_eps=file.number("rms_norm_eps", 1e-6, least=0),
            activation=_activation(file, "hidden_act", "silu"),
            rope_theta=theta,
            rope_divisors=divisors,
            qkv_bias=True if architecture == "qwen2" else bias,
            output_bias=False if architecture == "qwen2" else bias,
            mlp_bias=file.flag("mlp_bias", False),
            qk_norm=architecture == "qwen3",
            tied_embeddings=file.flag("tie_word_embeddings", False),
            bos_token=_start_token(file, vocab_size),
            end_tokens=file.tokens("eos_token_id", vocab_size),
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        tied_embeddings: bool,
        rope_factors: Sequence[float] = (),
        source: str = "the GGUF file",
    ) -> "DecoderConfig":
        """Read the metadata of a GGUF file.

        Args:
            metadata: the key-value section, with Python values.
            tied_embeddings: whether the file has no `output.weight`.
            rope_factors: the contents of `rope_freqs.weight`, where the file has it.
            source: what to call the file in messages.

        Returns:
            The description of the network in the file; its end tokens are those that have a key of their own.

        Raises:
            ValueError: an architecture or rotary scaling that is not among the supported ones, a key that is missing
                or cannot be, or a setting of `NEUTRAL_GGUF` that is not carried out.
        """
        architecture = _architecture(metadata.get("general.architecture"), f"`general.architecture` in {source}")
        if architecture == "llada":
            raise ValueError("LLaDA is read from safetensors folders alone, got a GGUF file.")
        file, tokens = Settings(metadata, source, f"{architecture}."), Settings(metadata, source, "tokenizer.ggml.")
        refuse_what_is_not_carried_out(file, NEUTRAL_GGUF)
        hidden = file.whole("embedding_length")
        heads, kv_heads = _heads(file, "attention.head_count", "attention.head_count_kv")
        if file.has("attention.key_length"):
            head_dim = file.whole("attention.key_length", most=_WIDEST_HEAD)
        else:
            head_dim = _share(file, "embedding_length", hidden, "attention.head_count", heads)
        if file.whole("attention.value_length", head_dim) != head_dim:
            raise ValueError(
                f"keys and values must have one width, got {architecture}.attention.key_length = {head_dim} and "
                f"value_length = {file.whole('attention.value_length')} in {source}."
            )
        if file.whole("rope.dimension_count", head_dim, least=0) != head_dim and architecture != "gpt2":
            raise ValueError(
                f"rotary positions must cover the whole head, got {architecture}.rope.dimension_count = "
                f"{file.whole('rope.dimension_count', least=0)} for heads of width {head_dim} in {source}."
            )
        scale = file.number("attention.scale", 0.0)
        if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-5):
            raise file.wrong("attention.scale", f"{head_dim**-0.5:g} for heads of width {head_dim}, or 0")
        learned = architecture == "gpt2"
        listed = metadata.get("tokenizer.ggml.tokens")
        vocab_size = file.whole("vocab_size", len(listed) if isinstance(listed, list) else 0, least=0)
        if not vocab_size:
            raise ValueError(f"{source} has neither `{architecture}.vocab_size` nor `tokenizer.ggml.tokens`.")
        ends = [tokens.tokens(f"{name}_token_id", vocab_size) for name in ("eos", "eot", "eom")]
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_layers=file.whole("block_count"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=file.whole("feed_forward_length"),
            context_length=file.whole("context_length"),
            norm="layer" if learned else "rms",
            norm_eps=file.number(
                "attention.layer_norm_epsilon" if learned else "attention.layer_norm_rms_epsilon", least=0
            ),
            activation="gelu_tanh" if learned else "silu",
            gated=not learned,
            positions="learned" if learned else "rope",
            rope_theta=file.number("rope.freq_base", 10000.0, above=0),
            rope_divisors=() if learned else _gguf_divisors(file, rope_factors, head_dim),
            qkv_bias=architecture in ("qwen2", "gpt2"),
            output_bias=learned,
            mlp_bias=learned,
            qk_norm=architecture == "qwen3",
            tied_embeddings=tied_embeddings,
            bos_token=_start_token(tokens, vocab_size),
            end_tokens=tuple(dict.fromkeys(token for end in ends for token in end)),
        )


def _architecture(name: Any, where: str) -> str:
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture: {where} is {name!r}; accepted are {', '.join(ARCHITECTURES)}.")
    return name


def _activation(file: Settings, key: str, default: str) -> str:
    name = file.text(key, default)
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"unknown activation {name!r}; accepted are {', '.join(_ACTIVATIONS)} (`{key}` in {file.source})."
        )
    for other in ("hidden_act", "hidden_activation", "activation_function"):
        said = file.text(other, name)
        if _ACTIVATIONS.get(said) != _ACTIVATIONS[name]:
            raise file.wrong(other, f"{name!r} as `{key}`, or no entry")
    return _ACTIVATIONS[name]


def _start_token(file: Settings, vocab_size: int) -> int | None:
    """The token that starts a document; it is a hint, so that one outside of the vocabulary counts as none."""
    key = "bos_token_id"
    token = file.whole(key, None, least=-1)
    return token if token is not None and 0 <= token < vocab_size else None


def _heads(file: Settings, own: str, shared: str) -> tuple[int, int]:
    heads = file.whole(own)
    kv_heads = file.whole(shared, heads)
    if heads % kv_heads:
        raise ValueError(
            f"`num_heads` must be a multiple of `num_kv_heads`, got {heads} and {kv_heads} (`{file.prefix}{own}` and "
            f"`{file.prefix}{shared}` in {file.source})."
        )
    return heads, kv_heads


def _share(file: Settings, whole: str, width: int, parts: str, heads: int) -> int:
    """The width of one head, where the file says that of all."""
    if width % heads or width // heads > _WIDEST_HEAD:
        raise ValueError(
            f"`{file.prefix}{whole}` must be a multiple of `{file.prefix}{parts}`, got {width} and {heads} in "
            f"{file.source}."
        )
    return width // heads


def _gpt2_from_hf(file: Settings) -> dict[str, Any]:
    for name, plain in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if file.flag(name, plain) != plain:
            raise ValueError(f"GPT-2 with `{name}` = {not plain} is not supported; accepted is {plain}.")
    if file.text("position_embedding_type", "absolute") != "absolute":
        raise file.wrong("position_embedding_type", "'absolute', or no entry")
    refuse_what_is_not_carried_out(file, NEUTRAL_HF)
    hidden, heads, vocab_size = file.whole("n_embd", 768), file.whole("n_head", 12), file.whole("vocab_size")
    return dict(
        architecture="gpt2",
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=file.whole("n_layer", 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_share(file, "n_embd", hidden, "n_head", heads),
        intermediate_size=file.whole("n_inner", 4 * hidden),
        context_length=file.whole("n_positions", 1024),
        norm="layer",
        norm_eps=file.number("layer_norm_epsilon", 1e-5, least=0),
        activation=_activation(file, "activation_function", "gelu_new"),
        gated=False,
        positions="learned",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_embeddings=file.flag("tie_word_embeddings", True),
        bos_token=_start_token(file, vocab_size),
        end_tokens=file.tokens("eos_token_id", vocab_size),
    )


def _llada_from_hf(file: Settings) -> dict[str, Any]:
    plain = {
        "block_type": "llama", "block_group_size": 1, "layer_norm_type": "rms", "layer_norm_with_affine": True,
        "attention_layer_norm": False, "input_emb_norm": False, "bias_for_layer_norm": False, "include_bias": False,
        "rope": True, "alibi": False, "clip_qkv": None, "scale_logits": False, "activation_type": "silu",
    }  # fmt: skip
    for name, accepted in plain.items():
        value = file.values.get(name, accepted)
        if value != accepted and not (value is None and not accepted):
            raise ValueError(f"LLaDA with `{name}` = {value!r} is not supported; accepted is {accepted!r}.")
    refuse_what_is_not_carried_out(file, NEUTRAL_HF, ("is_causal", "causal"))
    hidden, heads = file.whole("d_model"), file.whole("n_heads")
    vocab_size = file.whole("embedding_size", None) or file.whole("vocab_size")
    if not file.has("n_kv_heads"):
        kv_heads = 1 if file.flag("multi_query_attention", False) else heads
    else:
        kv_heads = _heads(file, "n_heads", "n_kv_heads")[1]
    return dict(
        architecture="llada",
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=file.whole("n_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_share(file, "d_model", hidden, "n_heads", heads),
        intermediate_size=file.whole("mlp_hidden_size", None) or file.whole("mlp_ratio", 4) * hidden,
        context_length=file.whole("max_sequence_length"),
        norm_eps=file.number("rms_norm_eps", 1e-5, least=0),
        rope_theta=file.number("rope_theta", 10000.0, above=0),
        qkv_bias=file.flag("include_qkv_bias", False),
        tied_embeddings=file.flag("weight_tying", True),
        causal=False,
        end_tokens=file.tokens("eos_token_id", vocab_size),
    )


def _refuse_sliding_window(file: Settings) -> None:
    kinds = file.values.get("layer_types") or []
    if not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}:
        shown = ", ".join(sorted(set(map(str, kinds)))) if isinstance(kinds, list) else repr(kinds)
        raise ValueError(
            f"`layer_types` has {shown}; only full_attention is supported, in every layer ({file.source})."
        )
    window = file.whole("sliding_window", 0, least=-1)
    # Qwen's files say by a flag whether the window counts, and from which layer on; elsewhere a window counts.
    qwen = file.values["model_type"] in ("qwen2", "qwen3")
    used = file.flag("use_sliding_window", not qwen)
    reached = not qwen or file.whole("max_window_layers", 28, least=0) < file.whole("num_hidden_layers")
    if used and window > 0 and not (qwen and kinds) and reached and window < file.whole("max_position_embeddings"):
        raise ValueError(
            f"sliding-window attention is not supported, got `use_sliding_window` = {used} with `sliding_window` = "
            f"{window} in {file.source}; accepted are models that attend to the whole context."
        )


def _hf_rope(file: Settings, head_dim: int, context: int) -> tuple[float, tuple[float, ...]]:
    """The base and the divisors of equation (1), from either form of the file.

    The older `rope_scaling` is what transformers takes where both are given.
    """
    old, new = file.group("rope_scaling"), file.group("rope_parameters")
    kinds = [group.text("rope_type", group.text("type", "default")) for group in (new, old)]
    if old.values and new.values and kinds[0] not in ("default", kinds[1]):
        raise ValueError(
            f"`rope_parameters` and `rope_scaling` in {file.source} contradict each other: {kinds[0]!r} and "
            f"{kinds[1]!r}; leave one of them out."
        )
    for key in new.values:
        if isinstance(new.values[key], Mapping):
            raise ValueError(
                f"`rope_parameters` in {file.source} has settings for `{key}` alone; accepted is one rotary setting "
                "for all layers."
            )
    said = {key: value for group in (new, old) for key, value in group.values.items() if value is not None}
    rope = Settings(said, f"the rotary settings in {file.source}")
    theta = rope.number("rope_theta", file.number("rope_theta", 10000.0, above=0), above=0)
    partial = rope.number("partial_rotary_factor", file.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(
            f"rotary positions must cover the whole head, got `partial_rotary_factor` = {partial} in {file.source}."
        )
    kind = kinds[1] if old.values else kinds[0]
    if kind == "default":
        return theta, ()
    if kind == "linear":
        return theta, (rope.number("factor", above=0),) * (head_dim // 2)
    if kind == "llama3":
        return theta, _llama3_divisors(rope, theta, head_dim, context)
    raise ValueError(f"unknown rotary scaling {kind!r}; accepted are default, linear, llama3 ({file.source}).")


def _llama3_divisors(rope: Settings, theta: float, head_dim: int, context: int) -> tuple[float, ...]:
    """Divisors that leave wavelengths below `original / high` alone and stretch those above `original / low`."""
    factor, low = rope.number("factor", above=0), rope.number("low_freq_factor", above=0)
    high = rope.number("high_freq_factor", above=low)
    original = rope.whole("original_max_position_embeddings", context)
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(divisors)


def _gguf_divisors(file: Settings, factors: Sequence[float], head_dim: int) -> tuple[float, ...]:
    """The divisors that a GGUF file gives; a factor without a type is linear, as llama.cpp reads it."""
    kind = file.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"unknown rotary scaling: `{file.prefix}rope.scaling.type` is {kind!r}; accepted are none, linear, and "
            f"the tensor rope_freqs.weight ({file.source})."
        )
    linear = file.number("rope.scaling.factor", file.number("rope.scale_linear", 1.0, least=0), least=0)
    linear = 1.0 if kind == "none" or linear == 0 else linear  # llama.cpp writes 0 for no scaling
    if factors and len(factors) != head_dim // 2:
        raise ValueError(
            f"tensor `rope_freqs.weight` in {file.source} must have head_dim / 2 = {head_dim // 2} entries, got "
            f"{len(factors)}."
        )
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise ValueError(f"tensor `rope_freqs.weight` in {file.source} must hold finite numbers above 0.")
    divisors = tuple(linear * float(factor) for factor in (factors or (1.0,) * (head_dim // 2)))
    return () if all(divisor == 1.0 for divisor in divisors) else divisors
