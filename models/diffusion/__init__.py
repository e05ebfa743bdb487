"""Diffusion models: noise schedules, denoisers, and the processes that turn noise into data."""

from ppl.models.diffusion.mixtures import EmpiricalData as EmpiricalData
from ppl.models.diffusion.mixtures import GaussianMixture as GaussianMixture
from ppl.models.diffusion.model import Diffusion as Diffusion
from ppl.models.diffusion.schedules import EDM as EDM
from ppl.models.diffusion.schedules import RectifiedFlow as RectifiedFlow
from ppl.models.diffusion.schedules import VarianceExploding as VarianceExploding
from ppl.models.diffusion.schedules import VariancePreserving as VariancePreserving

__all__ = [
    "EDM",
    "Diffusion",
    "EmpiricalData",
    "GaussianMixture",
    "RectifiedFlow",
    "VarianceExploding",
    "VariancePreserving",
]
