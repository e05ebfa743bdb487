"""Kernels for GPUs, written in Pallas, for those who ask for them by name.

Nothing chooses them by itself: they were tested in interpret mode and lowered for CUDA, but neither run nor timed on a
GPU. The plain forms in `ppl.kernels` are the reference: `ppl.kernels.resampling.systematic`,
`ppl.kernels.tokens.sample_tokens` and `ppl.kernels.moves.move`, which take the same arguments; only the logits of a
proposal are not taken here.
"""

from ppl.kernels.pallas.move import move
from ppl.kernels.pallas.systematic import systematic
from ppl.kernels.pallas.tokens import sample_tokens

__all__ = ["move", "sample_tokens", "systematic"]
