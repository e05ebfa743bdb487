"""Reading checkpoints: what is missing, left over, misshapen, damaged or unknown is said by name."""

import json

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppl.models.language import LanguageModel

from .gguf_writer import add_byte_tokenizer, copy_folder, write_gguf


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return copy_folder(tiny_folder("qwen2"), tmp_path / "copy")


def rewrite(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_missing_tensor_is_named(folder):
    rewrite(folder, lambda weights: weights.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(ValueError, match=r"has no tensor `model.layers.1.self_attn.k_proj.bias`"):
        LanguageModel.load(folder)


def test_left_over_tensor_is_named(folder):
    rewrite(folder, lambda weights: weights.update({"model.layers.0.extra.weight": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=r"1 tensors .* no use for: `model.layers.0.extra.weight`"):
        LanguageModel.load(folder)


def test_redundant_tensors_are_ignored(folder, tiny_folder, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda weights: weights.update({name: np.zeros(4, np.float32)}))
    LanguageModel.load(folder)
    tied = copy_folder(tiny_folder("llama_tied"), tmp_path / "tied")
    rewrite(tied, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].copy()}))
    LanguageModel.load(tied)


def test_wrong_shape_is_named_with_both_shapes(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda weights: weights.update({name: np.zeros((3, 32), np.float32)}))
    with pytest.raises(ValueError, match=rf"`{name}` .* has shape \(3, 32\); .* calls for \(48, 32\)"):
        LanguageModel.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        LanguageModel.load(folder)


def test_missing_tokenizer_is_said(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer: none of tokenizer.json"):
        LanguageModel.load(folder)


def test_missing_shard_is_named(tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder("llama3"), tmp_path / "copy")
    (folder / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model-00003-of-00004.safetensors"):
        LanguageModel.load(folder)


def test_cut_safetensors_file_is_said(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        LanguageModel.load(folder)


def test_gpt2_names_without_prefix_are_read(tiny_folder, tiny, expected, tmp_path):
    folder = copy_folder(tiny_folder("gpt2"), tmp_path / "copy")

    def strip(weights):
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        weights["h.0.attn.bias"] = np.ones((1, 1, 128, 128), np.float32)

    rewrite(folder, strip)
    tokens = expected("gpt2")["tokens"]
    np.testing.assert_array_equal(LanguageModel.load(folder).forward(tokens), tiny("gpt2").forward(tokens))


def test_generation_config_adds_end_tokens(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    assert LanguageModel.load(folder).end_tokens == (2, 77)


def test_unknown_source_says_what_is_accepted(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; accepted are a folder, a \.gguf file"):
        LanguageModel.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no such file or folder; accepted"):
        LanguageModel.load("missing.gguf")
    with pytest.raises(FileNotFoundError, match="could not be reached .* accepted are a folder"):
        LanguageModel.load("nobody/no-such-model")


def test_file_that_is_not_gguf_is_said(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(ValueError, match=r"is not a GGUF file: it starts with b'<!DO'"):
        LanguageModel.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        LanguageModel.load(path)


@pytest.mark.parametrize("kept", [10, 24, 200, 3000, -4096, -1])
def test_cut_gguf_file_is_said_wherever_it_is_cut(tiny_folder, tmp_path, kept):
    path = write_gguf(tiny_folder("llama2"), tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is not a whole GGUF file"):
        LanguageModel.load(path)


def write_metadata(path, architecture="llama", **changes):
    writer = gguf.GGUFWriter(path, architecture)
    add_byte_tokenizer(writer, changes.pop("pre", "gpt-2"))
    numbers = dict(block_count=1, context_length=64, embedding_length=32, feed_forward_length=48)
    numbers |= {"attention.head_count": 4} | changes
    for name, value in numbers.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((128, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_of_unknown_kind_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="unknown architecture: .* is 'mamba'; accepted are llama, qwen2, qwen3, gpt2"):
        LanguageModel.load(write_metadata(tmp_path / "a.gguf", "mamba"))
    with pytest.raises(ValueError, match="unknown word rule: `tokenizer.ggml.pre` is 'kimi-k2'; accepted are"):
        LanguageModel.load(write_metadata(tmp_path / "b.gguf", pre="kimi-k2"))
    with pytest.raises(ValueError, match="rope.dimension_count = 4 for heads of width 8"):
        LanguageModel.load(write_metadata(tmp_path / "c.gguf", **{"rope.dimension_count": 4}))
    with pytest.raises(ValueError, match="has no tensor `output_norm.weight`|has no tensor `blk.0"):
        LanguageModel.load(write_metadata(tmp_path / "d.gguf"))
