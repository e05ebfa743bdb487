"""Generations written in the language: what is built on networks and gives processes and distributions."""

from ppl.models.constraints import Choice as Choice
from ppl.models.constraints import Grammar as Grammar
from ppl.models.constraints import JsonSchema as JsonSchema
from ppl.models.constraints import Regex as Regex
from ppl.models.diffusion import EDM as EDM
from ppl.models.diffusion import Diffusion as Diffusion
from ppl.models.diffusion import EmpiricalData as EmpiricalData
from ppl.models.diffusion import GaussianMixture as GaussianMixture
from ppl.models.diffusion import RectifiedFlow as RectifiedFlow
from ppl.models.diffusion import VarianceExploding as VarianceExploding
from ppl.models.diffusion import VariancePreserving as VariancePreserving
from ppl.models.language import LanguageModel as LanguageModel
from ppl.models.markov_chain import MarkovChain as MarkovChain
from ppl.models.masked import MaskedDiffusion as MaskedDiffusion
from ppl.models.rewards import RewardModel as RewardModel
from ppl.models.rewards import SentenceEncoder as SentenceEncoder

__all__ = [
    "EDM",
    "Choice",
    "Diffusion",
    "EmpiricalData",
    "GaussianMixture",
    "Grammar",
    "JsonSchema",
    "LanguageModel",
    "MarkovChain",
    "MaskedDiffusion",
    "RectifiedFlow",
    "Regex",
    "RewardModel",
    "SentenceEncoder",
    "VarianceExploding",
    "VariancePreserving",
]
