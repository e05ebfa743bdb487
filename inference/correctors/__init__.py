"""Correctors: how the steps of a diffusion target are drawn and weighed."""

from ppl.inference.correctors.active import active_shares as active_shares
from ppl.inference.correctors.feynman_kac import FeynmanKac as FeynmanKac
from ppl.inference.correctors.kernel_ratio import KernelRatio as KernelRatio
from ppl.inference.correctors.kernel_ratio import Uncorrected as Uncorrected

__all__ = ["FeynmanKac", "KernelRatio", "Uncorrected", "active_shares"]
