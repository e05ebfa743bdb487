"""GGUF checkpoints: one file with metadata, tokenizer and quantised weights.

The weights are read through the `gguf` package and dequantised to float32. Files of the `llama` architecture store
queries and keys with their rows reordered for rotations of neighbouring pairs; `build_decoder` undoes it.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ppl.models.language.checkpoints import Tensors, build_decoder
from ppl.models.language.config import DecoderConfig
from ppl.models.language.decoder import Decoder
from ppl.models.language.gguf_tokenizer import build_tokenizer

__all__ = ["read_gguf"]

_NAMES = {
    "embedding": "token_embd.weight",
    "positions": "position_embd.weight",
    "final_norm": "output_norm",
    "head": "output.weight",
    "attention_norm": "blk.{}.attn_norm",
    "query": "blk.{}.attn_q",
    "key": "blk.{}.attn_k",
    "value": "blk.{}.attn_v",
    "query_norm": "blk.{}.attn_q_norm",
    "key_norm": "blk.{}.attn_k_norm",
    "output": "blk.{}.attn_output",
    "mlp_norm": "blk.{}.ffn_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
}


def read_gguf(path: Path, dtype: Any) -> tuple[Decoder, DecoderConfig, Any]:
    """Read a GGUF file.

    Args:
        path: the file.
        dtype: of the weights on the device.

    Returns:
        The network, its configuration, and the tokenizer.

    Raises:
        ValueError: not a whole GGUF file, or an architecture, tokenizer, quantisation or tensor that is not supported.
    """
    reader = _open(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> np.ndarray:
        tensor = stored[name]
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"tensor `{name}` in {path} is quantised as {tensor.tensor_type.name}, which cannot be read."
            ) from error

    factors = read("rope_freqs.weight").ravel().tolist() if "rope_freqs.weight" in stored else ()
    config = DecoderConfig.from_gguf(metadata, tied_embeddings="output.weight" not in stored, rope_factors=factors)
    tokenizer = build_tokenizer(metadata)
    names = _NAMES | ({"qkv": "blk.{}.attn_qkv"} if config.architecture == "gpt2" else {})
    decoder = build_decoder(
        config,
        Tensors(list(stored), read, str(path)),
        names,
        dtype=dtype,
        interleaved=config.architecture == "llama",
        redundant=lambda name: name == "rope_freqs.weight",
    )
    return decoder, config, tokenizer


def _open(path: Path) -> gguf.GGUFReader:
    with open(path, "rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {start!r}, not b'GGUF'.")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # a cut file surfaces as whatever the reader trips over first
        raise ValueError(
            f"{path} is not a whole GGUF file of {path.stat().st_size} bytes "
            f"({type(error).__name__}: {error}); fetch it again."
        ) from error
