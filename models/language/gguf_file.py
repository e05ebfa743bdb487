"""GGUF checkpoints: one file with metadata, tokenizer and quantised weights.

The weights are dequantised to float32 by the `gguf` package. Files of the `llama` architecture store queries and keys
with their rows reordered for rotations of neighbouring pairs; `build_decoder` undoes it.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ppl.models.language.checkpoints import Tensors, build_decoder, check_vocabulary
from ppl.models.language.config import DecoderConfig
from ppl.models.language.decoder import Decoder
from ppl.models.language.gguf_container import open_gguf
from ppl.models.language.gguf_tokenizer import build_tokenizer, end_tokens_of

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
    """Read a GGUF file, or all parts of one that was split.

    Args:
        path: the file, or any of its parts.
        dtype: of the weights on the device.

    Returns:
        The network, its configuration with all end tokens, and the tokenizer.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: not a whole GGUF file, or an architecture, setting, tokenizer, quantisation or tensor that is not
            supported.
    """
    file = open_gguf(path)
    factors = file.read("rope_freqs.weight").ravel().tolist() if "rope_freqs.weight" in file.names else ()
    config = DecoderConfig.from_gguf(
        file.metadata, tied_embeddings="output.weight" not in file.names, rope_factors=factors, source=str(path)
    )
    tokenizer = build_tokenizer(file.metadata, str(path))
    check_vocabulary(tokenizer, config.vocab_size, str(path))
    config = dataclasses.replace(config, end_tokens=end_tokens_of(file.metadata, str(path)))
    names = _NAMES | ({"qkv": "blk.{}.attn_qkv"} if config.architecture == "gpt2" else {})
    decoder = build_decoder(
        config,
        Tensors(file.names, file.read, str(path)),
        names,
        dtype=dtype,
        interleaved=config.architecture == "llama",
        redundant=lambda name: name == "rope_freqs.weight",
    )
    return decoder, config, tokenizer
