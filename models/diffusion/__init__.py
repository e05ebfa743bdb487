"""Diffusion models: noise schedules, denoisers, and the processes that turn noise into data."""

from ppl.models.diffusion.checkpoints import load_network as load_network
from ppl.models.diffusion.checkpoints import save_network as save_network
from ppl.models.diffusion.interpolant import converted as converted
from ppl.models.diffusion.mixtures import EmpiricalData as EmpiricalData
from ppl.models.diffusion.mixtures import GaussianMixture as GaussianMixture
from ppl.models.diffusion.model import Diffusion as Diffusion
from ppl.models.diffusion.networks import ConvolutionalDenoiser as ConvolutionalDenoiser
from ppl.models.diffusion.networks import TransformerDenoiser as TransformerDenoiser
from ppl.models.diffusion.scheduler_config import read_scheduler as read_scheduler
from ppl.models.diffusion.schedules import EDM as EDM
from ppl.models.diffusion.schedules import RectifiedFlow as RectifiedFlow
from ppl.models.diffusion.schedules import VarianceExploding as VarianceExploding
from ppl.models.diffusion.schedules import VariancePreserving as VariancePreserving
from ppl.models.diffusion.tabulated_schedule import Tabulated as Tabulated
from ppl.models.diffusion.training import Trained as Trained
from ppl.models.diffusion.training import train as train

__all__ = [
    "EDM",
    "ConvolutionalDenoiser",
    "Diffusion",
    "EmpiricalData",
    "GaussianMixture",
    "RectifiedFlow",
    "Tabulated",
    "Trained",
    "TransformerDenoiser",
    "VarianceExploding",
    "VariancePreserving",
    "converted",
    "load_network",
    "read_scheduler",
    "save_network",
    "train",
]
