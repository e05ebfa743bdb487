"""Inference algorithms: interpretations of programs, swapped by one line."""

from ppl.inference.annealing import EntropicAnnealing as EntropicAnnealing
from ppl.inference.correctors import FeynmanKac as FeynmanKac
from ppl.inference.correctors import KernelRatio as KernelRatio
from ppl.inference.importance import ImportanceSampling as ImportanceSampling
from ppl.inference.learned_twist import LearnedTwist as LearnedTwist
from ppl.inference.lookahead import Lookahead as Lookahead
from ppl.inference.sandwich import Sandwich as Sandwich
from ppl.inference.sandwich import sandwich as sandwich
from ppl.inference.smc import SMC as SMC
from ppl.inference.superposition import SuperposedAnd as SuperposedAnd

__all__ = [
    "SMC",
    "EntropicAnnealing",
    "FeynmanKac",
    "ImportanceSampling",
    "KernelRatio",
    "LearnedTwist",
    "Lookahead",
    "Sandwich",
    "SuperposedAnd",
    "sandwich",
]
