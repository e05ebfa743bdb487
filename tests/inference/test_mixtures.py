"""Mixtures of processes: their densities summed over the index, alone, multiplied, raised and tilted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.gaussian import Gaussian, Noising
from ppl.inference import SMC
from ppl.mixture import MixtureOfSteps
from ppl.models import GaussianMixture, MarkovChain, VarianceExploding

A = MarkovChain(jnp.array([0.1, 0.5, 0.2]), jnp.array([[0.2, 0.1, 0.3], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), 3)
B = MarkovChain(jnp.array([1.0, 0.0, 0.0]), jnp.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-jnp.inf, 0.0, 0.0]]), 3)
PATHS = list(itertools.product(range(3), repeat=3))


def probabilities(chain) -> np.ndarray:
    first, then = (np.asarray(jax.nn.log_softmax(x, axis=-1)) for x in (chain.initial_logits, chain.transition_logits))
    return np.exp([first[p[0]] + sum(then[i, j] for i, j in itertools.pairwise(p)) for p in PATHS])


MIXED = 0.3 * probabilities(A) + 0.7 * probabilities(B)


def test_density_of_a_mixture_is_that_of_the_value():
    program = ppl.mixture(A, B, [0.3, 0.7]).program()
    found = [float(ppl.log_density(program, {"path": jnp.array(path)})) for path in PATHS]
    assert np.allclose(np.exp(found), MIXED, atol=1e-6)


@pytest.mark.parametrize("form", ["power", "product", "tilted power", "guide"])
def test_density_of_every_path_of_a_target_with_a_mixture(form):
    both = ppl.mixture(A, B, weights=[3, 7])
    reward = lambda value: 0.4 * jnp.sum(value["tokens"])  # noqa: E731
    sums = np.exp([0.4 * sum(path) for path in PATHS])
    target, expected = {
        "power": (both**1.7, MIXED**1.7),
        "product": (both * A, MIXED * probabilities(A)),
        "tilted power": ((both.tilt(reward)) ** 2.0, (MIXED * sums) ** 2),
        "guide": (ppl.guide(both, A, weight=1.5), MIXED**-0.5 * probabilities(A) ** 1.5),
    }[form]
    found = [float(ppl.log_density(target.program(), {"path": jnp.array(path)})) for path in PATHS]
    assert np.allclose(np.exp(found), expected, rtol=2e-5)


def test_step_weights_of_gaussian_mixtures_are_those_of_the_rule():
    """In float64: for every x' the weight is sum b [log p - log k] + log k - log F."""
    with jax.enable_x64(True):
        x = jnp.array([0.3, -0.8])
        noising = Noising(x, 0.9, 0.3)
        parts = [Gaussian(x * 0.8 + shift, 0.2, noising) for shift in (0.1, -0.3, 0.5)]
        mixed = MixtureOfSteps(parts[:2], jnp.log(jnp.array([0.25, 0.75])))
        for laws, powers in (([mixed], [2.3]), ([mixed, parts[2]], [1.0, 0.7]), ([parts[2], mixed], [-0.5, 1.5])):
            proposal, weigh = mixed.multiply(laws, powers, powers)
            for seed in range(4):
                drawn = proposal.sample(jax.random.key(seed))
                back = Gaussian(0.9 * drawn, 0.3).log_prob(x)
                total = sum(b * law.log_prob(drawn) for b, law in zip(powers, laws, strict=True))
                expected = total + (1 - sum(powers)) * back - proposal.log_prob(drawn)
                assert abs(weigh(drawn) - expected) < 1e-10
    grid = jnp.linspace(-8, 8, 4001)
    one = MixtureOfSteps(
        [Gaussian(jnp.array(0.5), 0.3), Gaussian(jnp.array(-1.0), 0.7)], jnp.log(jnp.array([0.4, 0.6]))
    )
    assert abs(float(jnp.exp(jax.vmap(one.log_prob)(grid)).sum() * 16 / 4000) - 1) < 1e-5
    draws = np.asarray(one.sample(jax.random.key(0), (200_000,)))
    assert abs(draws.mean() - (0.4 * 0.5 - 0.6)) < 5 * draws.std() / np.sqrt(draws.size)
    superposed = one.superposed()
    assert np.isclose(superposed.loc, 0.4 * 0.5 - 0.6) and np.isclose(superposed.squared_scale, 0.4 * 0.3 + 0.6 * 0.7)


MEANS = np.array([[-2.0, 0.0], [1.5, 1.0], [0.5, -2.0]])


def samplers(num_steps: int = 60):
    schedule = VarianceExploding(0.01, 8.0)
    whole = GaussianMixture(MEANS, 0.5).diffuse(schedule).reverse(num_steps)
    parts = [GaussianMixture(MEANS[i], 0.5).diffuse(schedule).reverse(num_steps) for i in ([0], [1, 2])]
    return whole, ppl.mixture(*parts, weights=[1, 2])


def test_mixture_of_diffusions_has_the_classes_shares():
    _, both = samplers()
    values = np.asarray(ppl.infer(both, SMC(4000), seed=1).value)
    nearest = np.argmin(((values[:, None] - MEANS) ** 2).sum(-1), axis=1)
    shares = np.bincount(nearest, minlength=3) / len(values)
    assert np.all(np.abs(shares - 1 / 3) < 5 * np.sqrt(2 / 9 / len(values)) + 0.01)


def test_superposed_score_is_a_proposal_that_the_weights_correct():
    _, both = samplers()
    runs = [ppl.infer(both.propose(lambda law, state: law.superposed()), SMC(2000), seed=seed) for seed in range(6)]
    evidence = np.exp([float(run.log_evidence) for run in runs])
    assert abs(evidence.mean() - 1) < 5 * evidence.std(ddof=1) / np.sqrt(len(evidence)) + 1e-3


def test_power_of_a_mixture_of_diffusions_is_that_of_the_whole():
    whole, both = samplers(100)
    pairs = np.array(
        [[float(ppl.infer(t**2.0, SMC(2000), seed=seed).log_evidence) for t in (whole, both)] for seed in range(6)]
    )
    means, errors = pairs.mean(axis=0), pairs.std(axis=0, ddof=1) / np.sqrt(len(pairs))
    axis = np.linspace(-8, 8, 801)
    squares = (axis[:, None] - MEANS[:, 0]) ** 2 / 2 / 0.5**2, (axis[:, None] - MEANS[:, 1]) ** 2 / 2 / 0.5**2
    density = np.exp(-squares[0][:, None] - squares[1][None]).mean(-1) / (2 * np.pi * 0.5**2)
    truth = np.log((density**2).sum() * (axis[1] - axis[0]) ** 2)
    assert np.all(np.abs(means - truth) < 3 * errors + 0.1)


def test_bad_mixtures():
    with pytest.raises(TypeError, match="mix first"):
        ppl.mixture(A**2.0, B)
    with pytest.raises(ValueError, match="2 positive numbers"):
        ppl.mixture(A, B, [1.0, 0.0])
    with pytest.raises(ValueError, match="cannot be mixed"):
        ppl.mixture(A, MarkovChain(A.initial_logits, A.transition_logits, 4))
    with pytest.raises(ValueError, match="at least one process"):
        ppl.mixture()
