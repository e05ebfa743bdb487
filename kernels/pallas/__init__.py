"""Kernels for GPUs, written in Pallas, for those who ask for them by name.

Nothing chooses them by itself: they were tested in interpret mode and lowered for CUDA, but neither run nor timed on a
GPU. The plain forms in `ppl.kernels` are the reference.
"""

from ppl.kernels.pallas.systematic import systematic

__all__ = ["systematic"]
