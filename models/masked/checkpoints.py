"""LLaDA checkpoints: the decoder reading both ways, as the denoiser of a masked diffusion model.

A folder holds `config.json` with the model type "llada" (keys `d_model`, `n_layers`, `n_heads`, `mlp_hidden_size`,
`mask_token_id`, ..), safetensors named `model.transformer.blocks.N...`, and the tokenizer.

Source: Nie et al. (2025), "Large language diffusion models", arXiv 2502.09992.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ppl.models.compiled import Compiled
from ppl.models.language.checkpoints import generation_end_tokens, locate, read_folder, read_json
from ppl.models.language.decoder import Decoder
from ppl.models.layers import for_device

if TYPE_CHECKING:
    from ppl.models.masked.model import MaskedDiffusion

__all__ = ["DecoderDenoiser", "load_masked"]

_LLADA_MASK = 126336  # of the released models, whose first configurations do not say


class DecoderDenoiser(Compiled):
    """A decoder that reads both ways, compiled once whatever program calls it."""

    def __init__(self, decoder: Decoder):
        """Wrap a network whose configuration is not causal.

        Raises:
            ValueError: it is.
        """
        if decoder.config.causal:
            raise ValueError(
                f"`decoder` reads from left to right ({decoder.config.architecture}); it must read both ways."
            )
        self.config = decoder.config
        self._graph, self._weights = nnx.split(for_device(decoder))
        self._compile()

    def _compile(self) -> None:
        def logits(weights, tokens):
            network = nnx.merge(self._graph, weights)
            return network.logits(network.forward(tokens)[0])

        self._logits = jax.jit(logits)

    def __call__(self, tokens: Int[Array, " L"]) -> Float[Array, "L V"]:
        """Return the logits of every position's token.

        Raises:
            ValueError: more tokens than the model's context has positions.
        """
        if tokens.shape[0] > self.config.context_length:
            raise ValueError(
                f"prompt and `length` make {tokens.shape[0]} tokens; the model's context holds "
                f"{self.config.context_length}."
            )
        return self._logits(self._weights, tokens)


def load_masked(kind: type[MaskedDiffusion], source: str | Path, length: int, dtype: Any) -> MaskedDiffusion:
    """Read a checkpoint; see `MaskedDiffusion.load`."""
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    path = locate(source)
    if not path.is_dir():
        raise ValueError(f"`source` must be a folder or a hub id, got the file {path}.")
    decoder, config, tokenizer = read_folder(path, dtype, causal=False)
    mask = read_json(path, "config.json").get("mask_token_id", _LLADA_MASK)
    if not 0 <= mask < config.vocab_size:
        raise ValueError(f"{path}: `mask_token_id` is {mask}; the vocabulary has {config.vocab_size} tokens.")
    if length > config.context_length:
        raise ValueError(f"`length` must be at most the model's context of {config.context_length}, got {length}.")
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    ends = dict.fromkeys((*config.end_tokens, *generation_end_tokens(path, config.vocab_size), *own))
    return kind(DecoderDenoiser(decoder), length, config.vocab_size, mask, tokenizer=tokenizer, end_tokens=tuple(ends))
