"""Masked diffusion: token sequences that are unmasked in steps, in any order."""

from ppl.models.masked.model import MaskedDiffusion as MaskedDiffusion
from ppl.models.masked.policies import Blocks as Blocks
from ppl.models.masked.policies import LeastEntropy as LeastEntropy
from ppl.models.masked.policies import LeftToRight as LeftToRight
from ppl.models.masked.policies import MostConfident as MostConfident
from ppl.models.masked.policies import Random as Random
from ppl.models.masked.policies import SampledConfidence as SampledConfidence
from ppl.models.masked.schedule import Remasking as Remasking

__all__ = [
    "Blocks",
    "LeastEntropy",
    "LeftToRight",
    "MaskedDiffusion",
    "MostConfident",
    "Random",
    "Remasking",
    "SampledConfidence",
]
