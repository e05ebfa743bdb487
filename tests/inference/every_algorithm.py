"""Every public algorithm and kernel once, each on a small program that it fits, with the promise that it must print."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import ppl
from ppl.inference import (
    HMC,
    MALA,
    MCMC,
    MH,
    NUTS,
    PMMH,
    SMC,
    SMC2,
    AdaptiveImportanceSampling,
    BackwardSmoothing,
    EntropicAnnealing,
    FeynmanKac,
    Gibbs,
    ImportanceSampling,
    KernelRatio,
    Langevin,
    LevelExchange,
    Lookahead,
    MajorityVote,
    Mixture,
    NoiseOptimization,
    ParallelTempering,
    PaRIS,
    ParisianGibbs,
    ParticleGibbs,
    PathSearch,
    RandomSearch,
    Regenerate,
    Repeat,
    ReplicaExchange,
    RolloverSearch,
    Sequence,
    SuffixMH,
    SuperposedAnd,
    TemperedSMC,
    ZeroOrderSearch,
)
from ppl.models import GaussianMixture, MarkovChain, VarianceExploding
from tests.finite_programs import EMISSION, TRANSITION


@ppl.model
def walk(y):
    """A continuous latent before a loop, and one in it."""
    level = ppl.sample("level", dist.Normal(0.0, 1.0))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(0.9 * x + level, 1.0))
        ppl.observe("y", dist.Normal(x, 0.5), y)
        return x, x

    _, path = ppl.scan(step, 0.0, y)
    return {"level": level, "path": path}


def observed_walk():
    return walk(jnp.asarray([0.3, -0.2]))


@ppl.model
def hidden(symbols):
    """Finite sites in a loop, whose next state is the iteration's site."""

    def step(state, y):
        state = ppl.sample("x", dist.Categorical(probs=TRANSITION[state]))
        ppl.factor("y", jnp.log(EMISSION[state, y]))
        return state, state

    return ppl.scan(step, jnp.zeros((), int), symbols)[1]


def symbols():
    return hidden(jnp.array([0, 1, 1]))


@functools.cache
def diffusion(mean):
    return GaussianMixture(np.array([[mean]]), 0.5).diffuse(VarianceExploding(0.05, 3.0)).reverse(num_steps=3)


def power():
    return diffusion(0.5) ** 2.0


def product():
    return diffusion(0.5) * diffusion(-0.5)


def rewarded():
    return diffusion(0.5).tilt(lambda x: -jnp.sum(x**2))


def text():
    return MarkovChain(np.zeros(2, np.float32), np.array([[0.5, 0.0], [0.0, 1.0]], np.float32), 3) ** 2.0


def walked(sites):
    return {"level": dist.Normal(sites["level"], 0.3), "x": dist.Normal(sites["x"], 0.3)}


def chosen(before, now, t):
    return {"ones": jnp.asarray(now["x"] == 1, jnp.float32)}


class Case(NamedTuple):
    """An algorithm, the program it runs on, made under the present settings of JAX, and what it promises there."""

    algorithm: object
    program: object
    guarantee: str


def chain(kernel):
    return MCMC(kernel, num_samples=2, num_warmup=1)


POPULATIONS = {
    "ImportanceSampling": Case(ImportanceSampling(4), observed_walk, "unbiased"),
    "AdaptiveImportanceSampling": Case(
        AdaptiveImportanceSampling(40, lambda value: value["level"], num_round=10), observed_walk, "unbiased"
    ),
    "SMC": Case(SMC(4, annealing=EntropicAnnealing(), lookahead=Lookahead()), observed_walk, "unbiased"),
    "SMC with moves": Case(SMC(4, rejuvenation=MALA(0.1), rejuvenate_every=2), observed_walk, "unbiased"),
    "SMC, KernelRatio": Case(SMC(4, corrector=KernelRatio()), power, "unbiased"),
    "SMC, FeynmanKac": Case(SMC(4, corrector=FeynmanKac()), power, "discretised"),
    "SMC with moves of levels": Case(SMC(4, rejuvenation=HMC(0.1, 2)), power, "discretised"),
    "SMC of a process": Case(SMC(4, twist=lambda state: 0.1 * state["tokens"][0]), text, "unbiased"),
    "TemperedSMC": Case(TemperedSMC(4, MH(walked), (2.0, 1.0)), observed_walk, "unbiased"),
    "TemperedSMC, adaptive": Case(TemperedSMC(4, HMC(0.1, 2), max_steps=3), observed_walk, "consistent"),
    "SMC2": Case(SMC2(4, SMC(4), "level", scale=0.5, move_every=2), observed_walk, "unbiased"),
    "SMC2, adaptive": Case(SMC2(4, SMC(4), "level"), observed_walk, "consistent"),
    "PaRIS": Case(PaRIS(SMC(4), chosen), symbols, "unbiased"),
    "BackwardSmoothing": Case(BackwardSmoothing(SMC(4)), symbols, "consistent"),
    "MajorityVote": Case(MajorityVote(lambda value: int(value["tokens"][0]), algorithm=SMC(4)), text, "heuristic"),
    "SuperposedAnd": Case(SuperposedAnd(4), product, "heuristic"),
    "RandomSearch": Case(RandomSearch(12), rewarded, "heuristic"),
    "ZeroOrderSearch": Case(ZeroOrderSearch(20), rewarded, "heuristic"),
    "PathSearch": Case(PathSearch(30), rewarded, "heuristic"),
    "RolloverSearch": Case(RolloverSearch(40), rewarded, "heuristic"),
    "NoiseOptimization": Case(NoiseOptimization(20), rewarded, "heuristic"),
}

CHAINS = {
    "MH": Case(chain(MH(walked)), observed_walk, "invariant"),
    "Regenerate": Case(chain(Regenerate()), observed_walk, "invariant"),
    "NUTS": Case(chain(NUTS(max_tree_depth=1)), observed_walk, "invariant"),
    "HMC": Case(chain(HMC(num_leapfrog=2)), observed_walk, "invariant"),
    "MALA": Case(chain(MALA()), observed_walk, "invariant"),
    "Langevin": Case(chain(Langevin()), observed_walk, "discretised"),
    "Gibbs": Case(chain(Gibbs()), symbols, "invariant"),
    "SuffixMH": Case(chain(SuffixMH()), text, "invariant"),
    "ParticleGibbs": Case(chain(ParticleGibbs(SMC(3), ancestor_sampling=True)), symbols, "invariant"),
    "ParisianGibbs": Case(chain(ParisianGibbs(SMC(3), chosen)), symbols, "invariant"),
    "PMMH": Case(chain(PMMH("level", SMC(3), scale=0.5)), observed_walk, "invariant"),
    "ParallelTempering": Case(chain(ParallelTempering(MH(walked), (1.0, 2.0))), observed_walk, "invariant"),
    "Sequence, Repeat": Case(
        chain(Sequence(Repeat(ParticleGibbs(SMC(3), sites="x"), 2), HMC(0.3, 1, sites="level"))),
        observed_walk,
        "invariant",
    ),
    "Mixture": Case(chain(Mixture(MH(walked), Regenerate("x"))), observed_walk, "invariant"),
    "ReplicaExchange": Case(ReplicaExchange(2, 1, kernel=LevelExchange(exploration=Langevin())), power, "discretised"),
}

CASES = POPULATIONS | CHAINS
