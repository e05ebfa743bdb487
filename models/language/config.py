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
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read the contents of a Hugging Face `config.json`.

        Args:
            config: the parsed file; both `rope_theta` with `rope_scaling` and the newer `rope_parameters` are read.

        Returns:
            The description of the same network.

        Raises:
            ValueError: an architecture, rotary scaling, activation or attention that is not among the supported ones,
                or an entry that is missing.
        """
        architecture = _architecture(config.get("model_type"), "`model_type` in config.json")
        if architecture == "gpt2":
            return cls(**_gpt2_from_hf(config))
        if architecture == "llada":
            return cls(**_llada_from_hf(config))
        _refuse_sliding_window(config)
        heads = _need(config, "num_attention_heads")
        hidden = _need(config, "hidden_size")
        # Qwen3 has a width of its own where the file says none; the others split the hidden size.
        head_dim = config.get("head_dim") or (128 if architecture == "qwen3" else hidden // heads)
        context = _need(config, "max_position_embeddings")
        theta, divisors = _hf_rope(config, head_dim, context)
        bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=_need(config, "vocab_size"),
            hidden_size=hidden,
            num_layers=_need(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            intermediate_size=_need(config, "intermediate_size"),
            context_length=context,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            activation=_activation(config.get("hidden_act", "silu")),
            rope_theta=theta,
            rope_divisors=divisors,
            qkv_bias=True if architecture == "qwen2" else bias,
            output_bias=False if architecture == "qwen2" else bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=architecture == "qwen3",
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token=config.get("bos_token_id"),
            end_tokens=_token_tuple(config.get("eos_token_id")),
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, tied_embeddings: bool, rope_factors: Sequence[float] = ()
    ) -> "DecoderConfig":
        """Read the metadata of a GGUF file.

        Args:
            metadata: the key-value section, with Python values.
            tied_embeddings: whether the file has no `output.weight`.
            rope_factors: the contents of `rope_freqs.weight`, where the file has it.

        Returns:
            The description of the network in the file.

        Raises:
            ValueError: an architecture or rotary scaling that is not among the supported ones, or a key that is
                missing.
        """
        architecture = _architecture(metadata.get("general.architecture"), "`general.architecture` in the GGUF file")
        if architecture == "llada":
            raise ValueError("LLaDA is read from safetensors folders alone, got a GGUF file.")

        def need(key: str) -> Any:
            return _need(metadata, f"{architecture}.{key}")

        def get(key: str, default: Any) -> Any:
            return metadata.get(f"{architecture}.{key}", default)

        heads, hidden = need("attention.head_count"), need("embedding_length")
        head_dim = get("attention.key_length", hidden // heads)
        if get("attention.value_length", head_dim) != head_dim:
            raise ValueError(
                f"keys and values must have one width, got {architecture}.attention.key_length = {head_dim} and "
                f"value_length = {get('attention.value_length', head_dim)}."
            )
        if get("rope.dimension_count", head_dim) != head_dim:
            raise ValueError(
                f"rotary positions must cover the whole head, got {architecture}.rope.dimension_count = "
                f"{get('rope.dimension_count', head_dim)} for heads of width {head_dim}."
            )
        if get("attention.sliding_window", 0):
            raise ValueError(
                f"sliding-window attention is not supported, got {architecture}.attention.sliding_window = "
                f"{get('attention.sliding_window', 0)}."
            )
        learned = architecture == "gpt2"
        vocab_size = metadata.get(f"{architecture}.vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ()))
        if not vocab_size:
            raise ValueError(f"neither `{architecture}.vocab_size` nor `tokenizer.ggml.tokens` is given.")
        ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_layers=need("block_count"),
            num_heads=heads,
            num_kv_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate_size=need("feed_forward_length"),
            context_length=need("context_length"),
            norm="layer" if learned else "rms",
            norm_eps=need("attention.layer_norm_epsilon" if learned else "attention.layer_norm_rms_epsilon"),
            activation="gelu_tanh" if learned else "silu",
            gated=not learned,
            positions="learned" if learned else "rope",
            rope_theta=get("rope.freq_base", 10000.0),
            rope_divisors=() if learned else _gguf_divisors(architecture, metadata, rope_factors, head_dim),
            qkv_bias=architecture in ("qwen2", "gpt2"),
            output_bias=learned,
            mlp_bias=learned,
            qk_norm=architecture == "qwen3",
            tied_embeddings=tied_embeddings,
            bos_token=metadata.get("tokenizer.ggml.bos_token_id"),
            end_tokens=_token_tuple([token for token in ends if token is not None]),
        )


def _architecture(name: Any, where: str) -> str:
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture: {where} is {name!r}; accepted are {', '.join(ARCHITECTURES)}.")
    return name


def _need(mapping: Mapping[str, Any], key: str) -> Any:
    if mapping.get(key) is None:
        raise ValueError(f"the model's configuration has no entry `{key}`.")
    return mapping[key]


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; accepted are {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def _token_tuple(tokens: int | Sequence[int] | None) -> tuple[int, ...]:
    if tokens is None:
        return ()
    return tuple(dict.fromkeys([tokens] if isinstance(tokens, int) else tokens))


def _gpt2_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    for name, plain in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if config.get(name, plain) != plain:
            raise ValueError(f"GPT-2 with `{name}` = {config[name]} is not supported; accepted is {plain}.")
    if config.get("add_cross_attention"):
        raise ValueError("GPT-2 with `add_cross_attention` = True is not supported; accepted is False.")
    hidden, heads = config.get("n_embd", 768), config.get("n_head", 12)
    if hidden % heads:
        raise ValueError(f"`n_embd` must be a multiple of `n_head`, got {hidden} and {heads}.")
    return dict(
        architecture="gpt2",
        vocab_size=_need(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=config.get("n_layer", 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=config.get("n_inner") or 4 * hidden,
        context_length=config.get("n_positions", 1024),
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=_activation(config.get("activation_function", "gelu_new")),
        gated=False,
        positions="learned",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
        bos_token=config.get("bos_token_id"),
        end_tokens=_token_tuple(config.get("eos_token_id")),
    )


def _llada_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {
        "block_type": "llama", "block_group_size": 1, "layer_norm_type": "rms", "layer_norm_with_affine": True,
        "attention_layer_norm": False, "input_emb_norm": False, "bias_for_layer_norm": False, "include_bias": False,
        "rope": True, "alibi": False, "clip_qkv": None, "scale_logits": False, "activation_type": "silu",
    }  # fmt: skip
    for name, accepted in plain.items():
        value = config.get(name, accepted)
        if value != accepted and not (value is None and not accepted):
            raise ValueError(f"LLaDA with `{name}` = {value!r} is not supported; accepted is {accepted!r}.")
    hidden, heads = _need(config, "d_model"), _need(config, "n_heads")
    if hidden % heads:
        raise ValueError(f"`d_model` must be a multiple of `n_heads`, got {hidden} and {heads}.")
    return dict(
        architecture="llada",
        vocab_size=config.get("embedding_size") or _need(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=_need(config, "n_layers"),
        num_heads=heads,
        num_kv_heads=config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads),
        head_dim=hidden // heads,
        intermediate_size=config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * hidden,
        context_length=_need(config, "max_sequence_length"),
        norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=float(config.get("rope_theta", 10000.0)),
        qkv_bias=bool(config.get("include_qkv_bias", False)),
        tied_embeddings=bool(config.get("weight_tying", True)),
        causal=False,
        end_tokens=_token_tuple(config.get("eos_token_id")),
    )


def _refuse_sliding_window(config: Mapping[str, Any]) -> None:
    kinds = set(config.get("layer_types") or ())
    if kinds - {"full_attention"}:
        raise ValueError(
            f"`layer_types` has {', '.join(sorted(kinds))}; only full_attention is supported, in every layer."
        )
    reached = config.get("max_window_layers", 28) < _need(config, "num_hidden_layers")
    if config.get("use_sliding_window") and config.get("sliding_window") and not kinds and reached:
        raise ValueError(
            f"sliding-window attention is not supported, got `use_sliding_window` = True with `sliding_window` = "
            f"{config['sliding_window']}; accepted are models that attend to the whole context."
        )


def _hf_rope(config: Mapping[str, Any], head_dim: int, context: int) -> tuple[float, tuple[float, ...]]:
    """The base and the divisors of equation (1), from either form of the file."""
    rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    rope.update({key: value for key, value in (config.get("rope_parameters") or {}).items() if value is not None})
    theta = float(rope["rope_theta"] or 10000.0)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"rotary positions must cover the whole head, got `partial_rotary_factor` = {partial}.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, ()
    if kind == "linear":
        return theta, (float(_need(rope, "factor")),) * (head_dim // 2)
    if kind == "llama3":
        return theta, _llama3_divisors(
            theta,
            head_dim,
            factor=_need(rope, "factor"),
            low=_need(rope, "low_freq_factor"),
            high=_need(rope, "high_freq_factor"),
            original=rope.get("original_max_position_embeddings") or context,
        )
    raise ValueError(f"unknown rotary scaling {kind!r}; accepted are default, linear, llama3.")


def _llama3_divisors(
    theta: float, head_dim: int, *, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """Divisors that leave wavelengths below `original / high` alone and stretch those above `original / low`."""
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(divisors)


def _gguf_divisors(
    architecture: str, metadata: Mapping[str, Any], factors: Sequence[float], head_dim: int
) -> tuple[float, ...]:
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"unknown rotary scaling: `{architecture}.rope.scaling.type` is {kind!r}; accepted are none, linear, and "
            "the tensor rope_freqs.weight."
        )
    linear = float(metadata.get(f"{architecture}.rope.scaling.factor", 1.0)) if kind == "linear" else 1.0
    divisors = tuple(linear * float(factor) for factor in (factors or (1.0,) * (head_dim // 2)))
    return () if all(divisor == 1.0 for divisor in divisors) else divisors
