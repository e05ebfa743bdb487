"""Settings of files: what changes a network is carried out or refused by name, and numbers that cannot be are said."""

import json
import math

import pytest

from ppl.models.language import DecoderConfig, LanguageModel
from ppl.models.language.settings import NEUTRAL_GGUF, NEUTRAL_HF
from ppl.models.rewards.encoder import EncoderConfig

from .gguf_writer import copy_folder

LLAMA = dict(
    model_type="llama",
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
GPT2 = dict(model_type="gpt2", vocab_size=128, n_embd=32, n_head=4, n_layer=2, n_positions=64)
LLADA = dict(model_type="llada", vocab_size=128, d_model=32, n_heads=4, n_layers=2, max_sequence_length=64)
GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": ["a"] * 128,
}


def hf(**changes):
    return DecoderConfig.from_hf(LLAMA | changes, "here/config.json")


def from_gguf(**changes):
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return DecoderConfig.from_gguf(GGUF | changed, tied_embeddings=True, source="here/model.gguf")


@pytest.mark.parametrize("key", sorted(key for _, _, keys in NEUTRAL_HF for key in keys))
def test_settings_that_are_not_carried_out_are_refused_in_every_family(key):
    for config in (LLAMA, GPT2, LLADA, LLAMA | dict(model_type="qwen2"), LLAMA | dict(model_type="qwen3")):
        if config is LLADA and key in ("is_causal", "causal"):
            continue  # LLaDA reads both ways
        value = False if key in ("is_causal", "causal") else 7
        with pytest.raises(ValueError, match=f"`{key}` = {value}"):
            DecoderConfig.from_hf(config | {key: value})


@pytest.mark.parametrize("key", sorted(key for _, _, keys in NEUTRAL_GGUF for key in keys))
def test_gguf_settings_that_are_not_carried_out_are_refused(key):
    full = key[1:] if key.startswith(".") else f"llama.{key}"
    with pytest.raises(ValueError, match=rf"`{full}` = 7 in here/model.gguf asks for .*accepted is"):
        from_gguf(**{full: 7})


def test_neutral_and_unknown_settings_pass():
    for _, neutral, keys in NEUTRAL_HF:
        for value in neutral:
            assert hf(**dict.fromkeys(keys, value)) == hf()
    for _, neutral, keys in NEUTRAL_GGUF:
        full = {key[1:] if key.startswith(".") else f"llama.{key}": neutral[0] for key in keys}
        assert from_gguf(**full) == from_gguf()
    assert hf(torch_dtype="bfloat16", use_cache=True, attention_dropout=0.1, my_note={"a": [1]}) == hf()
    assert from_gguf(**{"general.name": "x", "llama.my_note": 3}) == from_gguf()


@pytest.mark.parametrize(
    "quantization",
    [
        dict(quant_method="awq", bits=4),
        dict(quant_method="gptq", bits=4, group_size=128),
        dict(quant_method="bitsandbytes", load_in_8bit=True),
        dict(quant_method="fp8"),
        dict(quant_method="compressed-tensors"),
        True,
    ],
)
def test_quantised_folders_are_refused(quantization):
    with pytest.raises(
        ValueError, match=r"`quantization_config` = .* in here/config.json asks for weights that are quan"
    ):
        hf(quantization_config=quantization)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "max_position_embeddings", "head_dim",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -1, 4.0, "4", True, [4, 8], 2**40])
def test_numbers_that_cannot_be_are_refused_with_file_key_and_value(key, value):
    with pytest.raises(ValueError, match=rf"`{key}` in here/config.json must be a whole number of at least 1.*, got"):
        hf(**{key: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1e-6", [1.0], True])
def test_measures_that_cannot_be_are_refused(value):
    with pytest.raises(ValueError, match="`rms_norm_eps` in here/config.json must be a finite number of at least 0"):
        hf(rms_norm_eps=value)
    with pytest.raises(ValueError, match="`rope_theta` in here/config.json must be a finite number above 0"):
        hf(rope_theta=value)
    with pytest.raises(ValueError, match="`factor` in the rotary settings in here/config.json must be a finite number"):
        hf(rope_scaling=dict(type="linear", factor=value))


def test_other_kinds_of_values_are_refused():
    for changes, message in (
        (dict(hidden_size=30), "`hidden_size` must be a multiple of `num_attention_heads`, got 30 and 4"),
        (dict(num_key_value_heads=3), "got 4 and 3 .`num_attention_heads` and `num_key_value_heads` in here/config"),
        (dict(tie_word_embeddings="yes"), "`tie_word_embeddings` in here/config.json must be true or false, got 'yes'"),
        (dict(attention_bias=1), "`attention_bias` in here/config.json must be true or false, got 1"),
        (dict(hidden_act=["silu"]), "`hidden_act` in here/config.json must be a string"),
        (dict(hidden_activation="gelu"), "`hidden_activation` in here/config.json must be 'silu' as `hidden_act`"),
        (dict(eos_token_id=128), r"`eos_token_id` in here/config.json must be tokens in \[0, 128\), got 128"),
        (dict(eos_token_id=[2, "x"]), r"`eos_token_id` in here/config.json must be tokens in"),
        (dict(rope_scaling="linear"), "`rope_scaling` in here/config.json must be settings by name, or null"),
        (dict(rope_scaling=dict(type="linear", factor=0)), "`factor` in the rotary settings .* above 0, got 0"),
        (dict(sliding_window=32), "sliding-window attention is not supported, .* `sliding_window` = 32"),
        (dict(layer_types="full_attention"), "`layer_types` has 'full_attention'"),
        (dict(use_qk_norm=True), "`use_qk_norm` in here/config.json must be false for llama, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            hf(**changes)
    with pytest.raises(ValueError, match="here/config.json must hold settings by name"):
        DecoderConfig.from_hf([1], "here/config.json")


def test_rotary_scaling_in_every_spelling_is_carried_out_or_refused():
    linear = hf(rope_scaling=dict(type="linear", factor=4))
    plain = dict(rope_type="default", rope_theta=10000.0)
    assert linear.rope_divisors == (4.0,) * 4
    # The older entry counts where both are there, as in transformers.
    assert hf(rope_scaling=dict(rope_type="linear", factor=4), rope_parameters=plain) == linear
    assert hf(rope_parameters=dict(rope_type="linear", factor=4, rope_theta=10000.0)) == linear
    assert hf(rope_scaling=None, rope_parameters=plain) == hf(rope_theta=10000.0) == hf()
    for kind in ("yarn", "dynamic", "longrope", "su", "mrope", "ntk"):
        for changes in (
            dict(rope_scaling=dict(type=kind, factor=4.0)),
            dict(rope_scaling=dict(rope_type=kind, factor=4.0), rope_parameters=plain),
            dict(rope_parameters=dict(rope_type=kind, factor=4.0)),
        ):
            with pytest.raises(
                ValueError, match=f"unknown rotary scaling '{kind}'; accepted are default, linear, llama3"
            ):
                hf(**changes)
    with pytest.raises(ValueError, match="contradict each other: 'linear' and 'default'"):
        hf(rope_scaling=plain, rope_parameters=dict(rope_type="linear", factor=4))
    with pytest.raises(ValueError, match="has settings for `full_attention` alone"):
        hf(rope_parameters=dict(full_attention=plain, sliding_attention=plain))
    with pytest.raises(ValueError, match="`partial_rotary_factor` = 0.25"):
        hf(rope_parameters=dict(plain, partial_rotary_factor=0.25))


def test_gguf_rotary_scaling_is_read_as_llama_cpp_reads_it():
    assert (
        from_gguf(**{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}).rope_divisors == (4.0,) * 4
    )
    assert from_gguf(**{"llama.rope.scaling.factor": 4.0}).rope_divisors == (4.0,) * 4  # linear, where it does not say
    assert from_gguf(**{"llama.rope.scale_linear": 4.0}).rope_divisors == (4.0,) * 4  # the old name
    assert from_gguf(**{"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}).rope_divisors == ()
    assert from_gguf(**{"llama.rope.scaling.factor": 0.0}).rope_divisors == ()
    for kind in ("yarn", "longrope", "dynamic"):
        with pytest.raises(ValueError, match=f"`llama.rope.scaling.type` is '{kind}'; accepted are none, linear"):
            from_gguf(**{"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.attention.head_count", 0, "`llama.attention.head_count` in here/model.gguf must be a whole number"),
        (
            "llama.attention.head_count",
            [4, 2],
            "`llama.attention.head_count` in here/model.gguf must be a whole number",
        ),
        (
            "llama.block_count",
            2.0,
            "`llama.block_count` in here/model.gguf must be a whole number of at least 1, got 2.0",
        ),
        ("llama.embedding_length", 30, "`llama.embedding_length` must be a multiple of `llama.attention.head_count`"),
        (
            "llama.attention.key_length",
            2**31,
            "`llama.attention.key_length` in here/model.gguf must be .* at most 65536",
        ),
        (
            "llama.attention.scale",
            0.5,
            "`llama.attention.scale` in here/model.gguf must be 0.353553 for heads of width 8",
        ),
        ("llama.attention.layer_norm_rms_epsilon", math.nan, "must be a finite number of at least 0, got nan"),
        ("llama.rope.freq_base", -1.0, "`llama.rope.freq_base` in here/model.gguf must be a finite number above 0"),
        ("tokenizer.ggml.eos_token_id", 128, r"`tokenizer.ggml.eos_token_id` .* must be tokens in \[0, 128\), got 128"),
        ("general.architecture", ["llama"], "unknown architecture: .* is .'llama'.; accepted are llama"),
    ],
)
def test_gguf_numbers_that_cannot_be_are_refused_with_file_key_and_value(key, value, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(**{key: value})


def test_gguf_lists_of_one_number_for_all_layers_are_that_number():
    assert from_gguf(**{"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [48, 48]}).groups == 2


def test_folder_settings_are_read_from_their_files(tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder("llama_tied"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())

    def write(name, content):
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    def refused(message):
        with pytest.raises(ValueError, match=message):
            LanguageModel.load(folder)

    for heads in (0, -4, None, "4", 4.5):
        write("config.json", config | dict(num_attention_heads=heads))
        refused(r"copy/config.json .*`num_attention_heads`|`num_attention_heads` in .*copy/config.json must be")
    write("config.json", config | dict(quantization_config=dict(quant_method="awq")))
    refused("`quantization_config` = .*copy/config.json")
    write("config.json", "[1, 2]")
    refused("copy/config.json must hold settings by name .* got list")
    write("config.json", "{" * 100_000)
    refused("copy/config.json is not valid JSON")
    write("config.json", config)
    write("generation_config.json", dict(eos_token_id=[2, 500]))
    refused(r"`eos_token_id` in .*copy/generation_config.json must be tokens in \[0, 128\), got \[2, 500\]")
    write("generation_config.json", dict(eos_token_id=[2, 9, 2]))
    assert LanguageModel.load(folder).end_tokens == (2, 9)
    write("adapter_config.json", dict(peft_type="LORA"))
    refused("copy has an adapter .adapter_config.json.*merge it")


def test_encoders_read_their_settings_the_same_way():
    plain = dict(
        model_type="bert", vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=16,
    )  # fmt: skip
    assert EncoderConfig.from_hf(plain).num_heads == 4
    for key, value in (
        ("num_attention_heads", 0),
        ("hidden_size", -32),
        ("vocab_size", "30"),
        ("num_hidden_layers", 1.5),
    ):
        with pytest.raises(ValueError, match=f"`{key}` in here/config.json must be a whole number of at least 1, got"):
            EncoderConfig.from_hf(plain | {key: value}, "here/config.json")
    with pytest.raises(ValueError, match="`quantization_config` = .* in here/config.json"):
        EncoderConfig.from_hf(plain | dict(quantization_config=dict(bits=8)), "here/config.json")
