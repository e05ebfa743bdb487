"""Settings of a model's file: reading them with their types, and refusing what would change the network unheard.

A key that this library does not know cannot be refused: files carry many that concern training, licences or other
readers. But a key that is known to change what the network computes, and that no code here carries out, must not pass:
the tables below list those, with the values at which they change nothing. A key with another value is refused by its
name. So a setting is read where the network is described, or stands here, or means nothing to a forward pass.

Sources of the names: the configurations of transformers 5 (`configuration_*.py`), and `gguf/constants.py` of llama.cpp,
as both were in 2026.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["NEUTRAL_GGUF", "NEUTRAL_HF", "Settings", "refuse_what_is_not_carried_out"]

_MOST = 2**31 - 1
_ABSENT: Any = object()

# Each line: what the settings are about, the values at which they change nothing, and their names in config.json.
NEUTRAL_HF: tuple[tuple[str, tuple[Any, ...], tuple[str, ...]], ...] = (
    (
        "weights that are quantised or compressed",
        (None,),
        ("quantization_config", "compression_config", "quantization", "quant_config", "sparsity_config"),
    ),
    (
        "a cap on logits or scores",
        (None, 0),
        (
            "attn_logit_softcapping", "final_logit_softcapping", "attn_logit_softcap", "final_logit_softcap",
            "logits_soft_cap", "output_logit_soft_cap", "clip_qkv",
        ),
    ),
    (
        "a factor on logits, embeddings or the residual stream",
        (None, 1),
        (
            "logit_scale", "logits_scaling", "logits_scale", "output_multiplier_scale", "lm_head_multiplier",
            "mup_width_multiplier", "width_scale", "embedding_multiplier", "embedding_scale",
            "embedding_multiplier_scale", "mup_embeddings_multiplier", "scale_emb", "residual_multiplier",
            "residual_scale", "key_multiplier", "attention_in_multiplier", "attention_out_multiplier",
            "attention_output_multiplier", "rope_ratio",
        ),
    ),
    (
        "another scale of attention scores",
        (None,),
        (
            "query_pre_attn_scalar", "attention_multiplier", "attention_scale", "attn_scale", "softmax_scale",
            "mup_attn_multiplier", "scale_depth", "dim_model_base", "attn_temperature_tuning",
        ),
    ),
    (
        "a mixture of experts",
        (None, 0),
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"),
    ),
    (
        "attention that does not reach the whole context",
        (None, 0),
        (
            "attention_chunk_size", "sliding_window_pattern", "_sliding_window_pattern", "sliding_window_size",
            "global_attn_every_n_layers", "attention_window", "window_size", "sparse_attention_config",
        ),
    ),
    (
        "positions other than rotary ones over the whole head",
        (None, False),
        (
            "alibi", "use_alibi", "use_mrope", "use_dynamic_ntk", "use_logn_attn", "no_rope_layers",
            "no_rope_layer_interval", "rope_interleaved", "rope_interleave", "rope_local_base_freq",
            "local_rope_theta", "global_rope_theta", "nope_layer_interval",
        ),
    ),
    ("rotary positions over a part of the head", (None, 1), ("rotary_pct", "rope_pct")),
    (
        "attention of another kind",
        (None, False, 0),
        (
            "kv_lora_rank", "q_lora_rank", "num_kv_shared_layers", "cla_share_factor", "attention_sinks",
            "use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention", "parallel_attn",
            "use_parallel_residual", "parallel_residual", "pruned_heads",
        ),
    ),
    ("a text that is not read from left to right", (None, True), ("is_causal", "causal")),
)  # fmt: skip

# The same for GGUF, after "<architecture>."; a key with a dot in front stands by itself.
NEUTRAL_GGUF: tuple[tuple[str, tuple[Any, ...], tuple[str, ...]], ...] = (
    (
        "a cap on logits or scores",
        (0,),
        ("attn_logit_softcapping", "final_logit_softcapping", "attention.clamp_kqv", "router_logit_softcapping"),
    ),
    ("a factor on logits", (0, 1), ("logit_scale",)),
    ("a factor on embeddings or the residual stream", (0, 1), ("embedding_scale", "residual_scale")),
    ("another factor of rotary scaling", (1,), ("rope.scaling.attn_factor",)),
    ("a mixture of experts", (0,), ("expert_count", "expert_used_count", "expert_shared_count")),
    (
        "attention that does not reach the whole context",
        (0,),
        ("attention.sliding_window", "attention.sliding_window_pattern", "attention.shared_kv_layers"),
    ),
    ("positions by a bias on scores", (0,), ("attention.max_alibi_bias",)),
    ("rotary positions in sections", ([], [0, 0, 0, 0]), ("rope.dimension_sections",)),
    (
        "attention of another kind",
        (0, False),
        (
            "attention.kv_lora_rank", "attention.q_lora_rank", "attention.key_length_mla",
            "attention.value_length_mla", "use_parallel_residual", "full_attention_interval",
            "moe_every_n_layers", "swin_norm", "rescale_every_n_layers",
        ),
    ),
    ("a text that is not read from left to right", (True,), ("attention.causal",)),
    ("another order of the weights", ("Meta AI original pth",), ("tensor_data_layout",)),
    ("a file that holds no whole model", ("model",), (".general.type",)),
    ("tokens that are never drawn", ([],), (".tokenizer.ggml.suppress_tokens",)),
)  # fmt: skip


class Settings:
    """The settings of one file, read by key; an error names the file, the key, what is given and what is accepted."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = ""):
        """Wrap settings.

        Args:
            values: the settings by key.
            source: what to call their file in messages.
            prefix: stands before the keys that are asked for, as in GGUF's "llama.".

        Raises:
            ValueError: `values` is no mapping.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{source} must hold settings by name, got {_shown(values)}.")
        self.values, self.source, self.prefix = values, source, prefix

    def has(self, key: str) -> bool:
        """Whether the key is there with a value that is not null."""
        return self.values.get(self.prefix + key) is not None

    def whole(self, key: str, default: Any = _ABSENT, *, least: int = 1, most: int = _MOST) -> int:
        """An integer in [least, most]; `default` where the key is missing or null.

        A list of equal integers counts as that integer: GGUF has one number for all layers, or one for each.

        Raises:
            ValueError: it is missing without a default, no integer, or outside of the range.
        """
        value = self._value(key, default)
        if value is default:
            return default
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            upper = f" and at most {most}" if most < _MOST else ""
            raise self.wrong(key, f"a whole number of at least {least}{upper}")
        return value

    def number(self, key: str, default: Any = _ABSENT, *, above: float = -math.inf, least: float = -math.inf) -> float:
        """A finite number above `above` and at least `least`; `default` where the key is missing or null.

        Raises:
            ValueError: it is missing without a default, no number, infinite, NaN or outside of the range.
        """
        value = self._value(key, default)
        if value is default:
            return default
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            good = good and math.isfinite(value) and value > above and value >= least
        except OverflowError:  # an integer beyond every float
            good = False
        if not good:
            bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
            raise self.wrong(key, f"a finite number{bound}")
        return float(value)

    def flag(self, key: str, default: Any = _ABSENT) -> bool:
        """True or false; `default` where the key is missing or null."""
        value = self._value(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: Any = _ABSENT) -> str:
        """A string; `default` where the key is missing or null."""
        value = self._value(key, default)
        if value is not default and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def group(self, key: str) -> "Settings":
        """The settings under a key, empty where it is missing or null."""
        value = self.values.get(self.prefix + key)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, "settings by name, or null")
        return Settings(value or {}, f"`{key}` in {self.source}")

    def tokens(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """A token, several or none, without repeats, each in [0, vocab_size)."""
        value = self.values.get(self.prefix + key)
        listed = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < vocab_size for t in listed):
            raise self.wrong(key, f"tokens in [0, {vocab_size})")
        return tuple(dict.fromkeys(listed))

    def wrong(self, key: str, accepted: str) -> ValueError:
        """The error for a value that is not accepted."""
        given = _shown(self.values.get(self.prefix + key))
        return ValueError(f"`{self.prefix}{key}` in {self.source} must be {accepted}, got {given}.")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(self.prefix + key)
        if value is None and default is _ABSENT:
            raise ValueError(f"{self.source} has no entry `{self.prefix}{key}`, which describes the network.")
        return default if value is None else value


def refuse_what_is_not_carried_out(
    settings: Settings,
    table: Sequence[tuple[str, tuple[Any, ...], tuple[str, ...]]],
    carried_out: Sequence[str] = (),
) -> None:
    """Refuse settings that change the network and that nothing here carries out.

    Args:
        settings: of a model's file.
        table: `NEUTRAL_HF` or `NEUTRAL_GGUF`.
        carried_out: keys that the caller reads itself.

    Raises:
        ValueError: a key of the table has a value that is not neutral.
    """
    for what, neutral, keys in table:
        for key in keys:
            full = key[1:] if key.startswith(".") else settings.prefix + key
            if key in carried_out or full not in settings.values:
                continue
            value = settings.values[full]
            if value in neutral or (not value and value != 0 and None in neutral):  # empty lists and mappings
                continue
            raise ValueError(
                f"`{full}` = {_shown(value)} in {settings.source} asks for {what}, which is not supported; accepted is "
                f"{' or '.join(repr(entry) for entry in neutral if entry is not None) or 'null'}, or no such entry."
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
