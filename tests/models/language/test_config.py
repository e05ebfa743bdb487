"""Configurations: both forms of the files are read, and what is not supported is refused by name."""

import json

import pytest

from ppl.models.language import DecoderConfig

from .conftest import FIXTURES, TINY

LLAMA = dict(
    model_type="llama",
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def test_old_and_new_form_of_rotary_settings_mean_the_same():
    old = DecoderConfig.from_hf(LLAMA | dict(rope_theta=16.0, rope_scaling=dict(SCALING, rope_type="llama3")))
    new = DecoderConfig.from_hf(LLAMA | dict(rope_parameters=dict(SCALING, rope_type="llama3", rope_theta=16.0)))
    assert old == new and old.rope_theta == 16.0
    assert len(set(new.rope_divisors)) > 2 and new.rope_divisors[0] == 1.0 and new.rope_divisors[-1] == 8.0
    oldest = DecoderConfig.from_hf(LLAMA | dict(rope_scaling=dict(type="linear", factor=2)))
    assert oldest.rope_divisors == (2.0,) * 4 and oldest.rope_theta == 10000.0
    assert DecoderConfig.from_hf(LLAMA | dict(rope_scaling=None)).rope_divisors == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="mamba"), r"unknown architecture: .* is 'mamba'; accepted are llama, qwen2, qwen3, gpt2"),
        (dict(model_type=None), "unknown architecture: .* is None"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=2)), "scaling 'yarn'; accepted are default, linear, llama3"),
        (dict(rope_scaling=dict(rope_type="linear")), "no entry `factor`"),
        (dict(partial_rotary_factor=0.5), "`partial_rotary_factor` = 0.5"),
        (dict(hidden_act="relu2"), "unknown activation 'relu2'; accepted are silu"),
        (dict(hidden_size=None), "no entry `hidden_size`"),
        (dict(num_key_value_heads=3), "`num_heads` must be a multiple of `num_kv_heads`, got 4 and 3"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "`layer_types` has .*sliding_attention"),
        (
            dict(model_type="qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=1),
            "`use_sliding_window` = True with `sliding_window` = 32",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(LLAMA | change)


def test_sliding_window_that_no_layer_uses_is_accepted():
    base = LLAMA | dict(model_type="qwen2", sliding_window=32)
    DecoderConfig.from_hf(base | dict(use_sliding_window=False))
    DecoderConfig.from_hf(base | dict(use_sliding_window=True, max_window_layers=2))


def test_families_differ_where_they_should():
    configs = {name: DecoderConfig.from_hf(json.loads((FIXTURES / name / "config.json").read_text())) for name in TINY}
    assert configs["qwen2"].qkv_bias and not configs["qwen2"].output_bias
    assert configs["qwen3"].qk_norm and configs["qwen3"].head_dim == 16
    assert configs["gpt2"].positions == "learned" and configs["gpt2"].tied_embeddings
    assert configs["llama_tied"].tied_embeddings and not configs["llama2"].tied_embeddings
    assert configs["llama3"].groups == 2 and configs["llama2"].groups == 1
    assert all(config.end_tokens == (2,) and config.bos_token == 1 for config in configs.values())
