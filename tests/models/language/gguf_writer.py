"""Write small GGUF files and safetensors for the tests, from recorded checkpoints."""

import json
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(folder: Path, path: Path, *, rope_factors=(), linear=None, tokenizer=True) -> Path:
    """Convert a recorded checkpoint as converters to GGUF do: llama's queries and keys get interleaved rotations."""
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    gpt2 = kind == "gpt2"
    writer = gguf.GGUFWriter(path, kind)
    heads = config["n_head" if gpt2 else "num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    hidden = config["n_embd" if gpt2 else "hidden_size"]
    writer.add_block_count(config["n_layer" if gpt2 else "num_hidden_layers"])
    writer.add_context_length(config["n_positions" if gpt2 else "max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(4 * hidden if gpt2 else config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    if gpt2:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if kind == "qwen3":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if linear is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(linear)
    if tokenizer:
        add_byte_tokenizer(writer)
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, np.float32))
    for name, array in _weights(folder).items():
        stem, suffix = name.rsplit(".", 1)
        layer = [part for part in stem.split(".") if part.isdigit()]
        key = stem.split(f".{layer[0]}.", 1)[1] if layer else stem
        if kind == "llama" and key.endswith(("q_proj", "k_proj")):
            count = heads if key.endswith("q_proj") else kv_heads
            array = array.reshape(count, 2, -1, hidden).swapaxes(1, 2).reshape(array.shape)
        if gpt2 and ".c_" in f".{key}" and suffix == "weight":
            array = array.T
        prefix = f"blk.{layer[0]}." if layer else ""
        writer.add_tensor(f"{prefix}{_LLAMA[key]}.{suffix}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_tokenizer(writer: gguf.GGUFWriter, pre: str = "gpt-2") -> None:
    """The tokenizer of the tiny networks: three special tokens and 125 bytes, one merge."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:124]
    tokens = ["<unk>", "<s>", "</s>", *alphabet, "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 125)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def copy_folder(folder: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, target))


def save_bfloat16(weights: dict[str, np.ndarray], folder: Path) -> None:
    """Replace the weights of a folder; written by hand, byte by byte, as the format says."""
    header, offset = {}, 0
    for name, array in weights.items():
        header[name] = {
            "dtype": "BF16",
            "shape": array.shape,
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in weights.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def _weights(folder: Path) -> dict[str, np.ndarray]:
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights
