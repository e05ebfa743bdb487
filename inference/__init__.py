"""Inference algorithms: interpretations of programs, swapped by one line."""

from ppl.inference.adaptive_importance import AdaptiveImportanceSampling as AdaptiveImportanceSampling
from ppl.inference.annealing import EntropicAnnealing as EntropicAnnealing
from ppl.inference.backward_smoothing import BackwardSmoothing as BackwardSmoothing
from ppl.inference.composition import Mixture as Mixture
from ppl.inference.composition import Repeat as Repeat
from ppl.inference.composition import Sequence as Sequence
from ppl.inference.control_variates import expectations as expectations
from ppl.inference.correctors import FeynmanKac as FeynmanKac
from ppl.inference.correctors import KernelRatio as KernelRatio
from ppl.inference.gibbs import Gibbs as Gibbs
from ppl.inference.hamiltonian import HMC as HMC
from ppl.inference.importance import ImportanceSampling as ImportanceSampling
from ppl.inference.langevin import MALA as MALA
from ppl.inference.langevin import Langevin as Langevin
from ppl.inference.learned_twist import LearnedTwist as LearnedTwist
from ppl.inference.level_exchange import LevelExchange as LevelExchange
from ppl.inference.lookahead import Lookahead as Lookahead
from ppl.inference.mcmc import MCMC as MCMC
from ppl.inference.metropolis_hastings import MH as MH
from ppl.inference.metropolis_hastings import Regenerate as Regenerate
from ppl.inference.nuts import NUTS as NUTS
from ppl.inference.parallel_tempering import ParallelTempering as ParallelTempering
from ppl.inference.paris import PaRIS as PaRIS
from ppl.inference.paris import ParisianGibbs as ParisianGibbs
from ppl.inference.particle_gibbs import ParticleGibbs as ParticleGibbs
from ppl.inference.pmmh import PMMH as PMMH
from ppl.inference.replica_exchange import ReplicaExchange as ReplicaExchange
from ppl.inference.sandwich import Sandwich as Sandwich
from ppl.inference.sandwich import sandwich as sandwich
from ppl.inference.schemes import resampler as resampler
from ppl.inference.search import NoiseOptimization as NoiseOptimization
from ppl.inference.search import PathSearch as PathSearch
from ppl.inference.search import RandomSearch as RandomSearch
from ppl.inference.search import RolloverSearch as RolloverSearch
from ppl.inference.search import ZeroOrderSearch as ZeroOrderSearch
from ppl.inference.smc import SMC as SMC
from ppl.inference.smc2 import SMC2 as SMC2
from ppl.inference.suffix import SuffixMH as SuffixMH
from ppl.inference.superposition import SuperposedAnd as SuperposedAnd
from ppl.inference.tempered_smc import TemperedSMC as TemperedSMC
from ppl.inference.variance import evidence_variance as evidence_variance
from ppl.inference.variance import expectation_error as expectation_error
from ppl.inference.voting import MajorityVote as MajorityVote

__all__ = [
    "HMC",
    "MALA",
    "MCMC",
    "MH",
    "NUTS",
    "PMMH",
    "SMC",
    "SMC2",
    "AdaptiveImportanceSampling",
    "BackwardSmoothing",
    "EntropicAnnealing",
    "FeynmanKac",
    "Gibbs",
    "ImportanceSampling",
    "KernelRatio",
    "Langevin",
    "LearnedTwist",
    "LevelExchange",
    "Lookahead",
    "MajorityVote",
    "Mixture",
    "NoiseOptimization",
    "ParallelTempering",
    "PaRIS",
    "ParisianGibbs",
    "ParticleGibbs",
    "PathSearch",
    "RandomSearch",
    "Regenerate",
    "Repeat",
    "ReplicaExchange",
    "RolloverSearch",
    "Sandwich",
    "Sequence",
    "SuffixMH",
    "SuperposedAnd",
    "TemperedSMC",
    "ZeroOrderSearch",
    "evidence_variance",
    "expectation_error",
    "expectations",
    "resampler",
    "sandwich",
]
