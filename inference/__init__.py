"""Inference algorithms: interpretations of programs, swapped by one line."""

from ppl.inference.annealing import EntropicAnnealing as EntropicAnnealing
from ppl.inference.correctors import FeynmanKac as FeynmanKac
from ppl.inference.correctors import KernelRatio as KernelRatio
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
from ppl.inference.particle_gibbs import ParticleGibbs as ParticleGibbs
from ppl.inference.replica_exchange import ReplicaExchange as ReplicaExchange
from ppl.inference.sandwich import Sandwich as Sandwich
from ppl.inference.sandwich import sandwich as sandwich
from ppl.inference.search import NoiseOptimization as NoiseOptimization
from ppl.inference.search import PathSearch as PathSearch
from ppl.inference.search import RandomSearch as RandomSearch
from ppl.inference.search import RolloverSearch as RolloverSearch
from ppl.inference.search import ZeroOrderSearch as ZeroOrderSearch
from ppl.inference.smc import SMC as SMC
from ppl.inference.suffix import SuffixMH as SuffixMH
from ppl.inference.superposition import SuperposedAnd as SuperposedAnd
from ppl.inference.voting import MajorityVote as MajorityVote

__all__ = [
    "HMC",
    "MALA",
    "MCMC",
    "MH",
    "SMC",
    "EntropicAnnealing",
    "FeynmanKac",
    "ImportanceSampling",
    "KernelRatio",
    "Langevin",
    "LearnedTwist",
    "LevelExchange",
    "Lookahead",
    "MajorityVote",
    "NoiseOptimization",
    "ParticleGibbs",
    "PathSearch",
    "RandomSearch",
    "Regenerate",
    "ReplicaExchange",
    "RolloverSearch",
    "Sandwich",
    "SuffixMH",
    "SuperposedAnd",
    "ZeroOrderSearch",
    "sandwich",
]
