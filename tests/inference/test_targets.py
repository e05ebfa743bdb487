"""Targets over Markov chains: against the sum over all paths, and by every run that an algorithm can make."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling
from ppl.models import MarkovChain
from ppl.models.constraints import Regex
from tests import enumeration
from tests.ppl.checks import assert_mean_within_5_standard_errors, compilations, repeat

VOCABULARY, LENGTH = 3, 4
PATHS = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)), np.int32)


def chain(seed, forbid=None, cls=MarkovChain, length=LENGTH, size=VOCABULARY):
    rng = np.random.default_rng(seed)
    initial, transition = rng.normal(size=size), rng.normal(size=(size, size))
    if forbid is not None:
        transition[forbid] = -np.inf
    return cls(initial.astype(np.float32), transition.astype(np.float32), length)


def log_prob(process, paths=PATHS):
    """The paths' log-probabilities, float64."""

    def normalized(logits):
        logits = np.asarray(logits, np.float64)
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    first, then = normalized(process.initial_logits), normalized(process.transition_logits)
    return first[paths[:, 0]] + sum(then[paths[:, t], paths[:, t + 1]] for t in range(paths.shape[1] - 1))


def reward(value):
    return 0.7 * value["tokens"][0] - 0.4 * value["tokens"][-1] * value["tokens"][1]


def other_reward(value):
    return jnp.where(value["tokens"][2] == 1, 0.9, -0.2)


def guess(state):
    """A twist that is far from the reward's expectation, so that it has to be taken out."""
    return 0.3 * jnp.sum(state["tokens"]) - 0.1 * state["length"]


def numpy_reward(paths=PATHS):
    return 0.7 * paths[:, 0] - 0.4 * paths[:, -1] * paths[:, 1]


def numpy_other(paths=PATHS):
    return np.where(paths[:, 2] == 1, 0.9, -0.2)


P, Q, H = chain(1), chain(2), chain(3, forbid=(0, 1))
p, q, h = log_prob(P), log_prob(Q), log_prob(H)
MATCHES = np.array([re.fullmatch("[ab]+c?[ab]*", "".join("abc"[i] for i in path)) is not None for path in PATHS])
OPERATORS = {
    "power": (lambda a: a**1.7, lambda a: np.where(a == -np.inf, a, 1.7 * a)),
    "fractional power": (lambda a: a**0.4, lambda a: np.where(a == -np.inf, a, 0.4 * a)),
    "product": (lambda a: a * Q, lambda a: a + q),
    "product with what forbids": (lambda a: a * H, lambda a: a + h),
    "tilt": (lambda a: a.tilt(reward), lambda a: a + numpy_reward()),
    "tilt with a twist": (lambda a: a.tilt(other_reward, twist=guess), lambda a: a + numpy_other()),
    "guide": (lambda a: ppl.guide(a, Q, weight=1.5), lambda a: np.where(a == -np.inf, a, -0.5 * a) + 1.5 * q),
    "guided": (lambda a: ppl.guide(Q, a, weight=0.3), lambda a: np.where(a == -np.inf, a, 0.3 * a) + 0.7 * q),
    "constraint": (lambda a: a.constrain(Regex("[ab]+c?[ab]*")), lambda a: np.where(MATCHES, a, -np.inf)),
    "power of zero": (lambda a: (a**0.0) * Q, lambda a: np.where(a == -np.inf, a, 0.0) + q),
}
BASES = {"chain": (P, p), "chain that forbids": (H, h)}


def nestings():
    for base, (process, log_density) in BASES.items():
        for i, (first, (make, exact)) in enumerate(OPERATORS.items()):
            yield f"{base}, {first}", make(process), exact(log_density)
            if process is P:
                continue
            for j, (second, (outer, outer_exact)) in enumerate(OPERATORS.items()):
                if (i + j) % 3:  # of the pairs a third: each operator is within three or four, and around as many
                    continue
                yield f"{base}, {first}, {second}", outer(make(process)), outer_exact(exact(log_density))


NESTINGS = {name: rest for name, *rest in nestings()}


NESTINGS |= {
    "quotient": (P * Q / H, np.where(h == -np.inf, -np.inf, p + q - np.where(h == -np.inf, 0.0, h))),
    "power of a quotient": ((P**2.0 / Q) ** 1.5, 3 * p - 1.5 * q),
    "quotient by a tilt": (P**2.0 / Q.tilt(reward), 2 * p - q - numpy_reward()),
    "quotient of a constraint": (
        P.constrain(Regex("[ab]+c?[ab]*")) * P / Q,
        np.where(MATCHES, 2 * p - q, -np.inf),
    ),
}


def log_sum(log_density):
    return np.logaddexp.reduce(log_density)


@pytest.mark.parametrize("name", NESTINGS)
def test_density_of_every_nesting_is_the_formula(name):
    target, exact = NESTINGS[name]
    program = target.program()
    density = jax.jit(jax.vmap(lambda path: ppl.log_density(program, {"path": path})))
    np.testing.assert_allclose(density(PATHS), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [n for i, n in enumerate(NESTINGS) if i % 6 == 0])
def test_smc_estimates_log_z_of_nestings(name):
    target, exact = NESTINGS[name]
    estimates = repeat(target.program(), SMC(64), lambda posterior: posterior.log_evidence, 60)
    scaled = np.exp(np.asarray(estimates, np.float64) - log_sum(exact))
    assert_mean_within_5_standard_errors(scaled, 1.0)


class TapedLaw(dist.CategoricalLogits):
    """A categorical law whose draws come from the tape."""

    def sample(self, key, sample_shape=()):
        return enumeration.Finite(jax.nn.softmax(self.logits)).sample(key, sample_shape)


class TapedChain(MarkovChain):
    def law(self, logits):
        return TapedLaw(logits=logits)


A, B = chain(4, cls=TapedChain, length=2, size=2), chain(5, cls=TapedChain, length=2, size=2)
SHORT = np.array(list(itertools.product(range(2), repeat=2)), np.int32)
a, b = log_prob(A, SHORT), log_prob(B, SHORT)
SMALL = {
    "product": (A * B, a + b),
    "power": (A**2.5, 2.5 * a),
    "guide": (ppl.guide(A, B, weight=2.0), 2 * b - a),
    "quotient": (A**2.0 / B, 2 * a - b),
    "tilted product with a twist": (
        (A * B).tilt(lambda v: v["tokens"][0] * 0.8 - v["tokens"][1] * 0.5, twist=guess) ** 1.5,
        1.5 * (a + b + SHORT[:, 0] * 0.8 - SHORT[:, 1] * 0.5),
    ),
    "with a proposal": (
        (A * B).tilt(lambda v: v["tokens"][1] * 0.6).propose(lambda law, state: TapedLaw(logits=0.3 * law.logits)),
        a + b + SHORT[:, 1] * 0.6,
    ),
}
LONGER = chain(6, cls=TapedChain, length=3, size=2)
SMALL_STEPS = LONGER.by_steps(1, max_steps=3, step_tokens=2)
ALGORITHMS = {
    "importance": ImportanceSampling(2),
    "every step": SMC(2, resampler=enumeration.systematic, ess_threshold=1.0),
    "adaptive": SMC(2, resampler=enumeration.multinomial, ess_threshold=0.95),
    "with a twist": SMC(2, resampler=enumeration.systematic, ess_threshold=1.0, twist=guess),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", SMALL)
def test_every_run_on_a_target_averages_to_its_measure(name, algorithm):
    target, exact = SMALL[name]

    @jax.jit
    def run():
        posterior = ALGORITHMS[algorithm](target.program(), jax.random.key(0))
        tokens = posterior.value["tokens"]
        code = tokens[:, 0] * 2 + tokens[:, 1]
        return posterior.log_evidence, jnp.sum(jax.nn.one_hot(code, 4) * posterior.weights[:, None], axis=0)

    total, measure = 0.0, np.zeros(4)
    for probability, (log_evidence, marginal) in enumeration.runs(run):
        total += probability
        measure += probability * np.exp(float(log_evidence)) * marginal
    assert total == pytest.approx(1.0, abs=1e-9)
    np.testing.assert_allclose(measure, np.exp(exact), rtol=1e-5)


def step_states(path):
    """What a path has written at the end of every stretch of at most two tokens, which a 1 ends."""
    written, since = [], 0
    for t, token in enumerate(path):
        since += 1
        if token == 1 or since == 2 or t == len(path) - 1:
            written.append(path[: t + 1])
            since = 0
    return written


def late(state):
    """The number of tokens, less twice the last one."""
    return 0.3 * state["length"] - 0.4 * state["tokens"][jnp.maximum(state["length"] - 1, 0)]


STEPWISE = {
    "published": (SMALL_STEPS.weigh_steps(late), lambda s: sum(0.3 * len(w) - 0.4 * w[-1] for w in s)),
    "telescoped": (
        SMALL_STEPS.tilt(lambda v: 0.9 - 0.4 * v["tokens"][2], twist=late),
        lambda s: 0.9 - 0.4 * s[-1][-1],
    ),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", STEPWISE)
def test_every_run_by_steps_averages_to_its_measure(name, algorithm):
    target, log_weight = STEPWISE[name]
    paths = np.array(list(itertools.product(range(2), repeat=3)), np.int32)
    exact = np.exp(log_prob(LONGER, paths) + [log_weight(step_states(path.tolist())) for path in paths])

    @jax.jit
    def run():
        posterior = ALGORITHMS[algorithm](target.program(), jax.random.key(0))
        code = posterior.value["tokens"] @ jnp.array([4, 2, 1])
        return posterior.log_evidence, jnp.sum(jax.nn.one_hot(code, 8) * posterior.weights[:, None], axis=0)

    measure = sum(p * np.exp(float(z)) * marginal for p, (z, marginal) in enumeration.runs(run))
    np.testing.assert_allclose(measure, exact, rtol=1e-5)


def test_powers_and_rewards_join():
    nested = ((P**2).tilt(reward) * Q) ** 0.5
    (first, beta), (second, gamma) = nested.factors
    assert (first, second) == (P, Q) and (beta, gamma) == (1.0, 0.5)
    assert [tilt.power for tilt in nested.tilts] == [0.5]
    assert [power for _, power in (P * P).factors] == [2.0]  # one process runs once


def test_another_power_compiles_nothing():
    ppl.infer((P**1.3).tilt(reward), SMC(16))
    with compilations() as names:
        ppl.infer((P**1.4).tilt(reward), SMC(16), seed=3)
    assert not names


def test_a_quotient_alone_is_refused_with_its_factors():
    for quotient in (P / Q, P / P, Q / P**2.0):
        with pytest.raises(ValueError, match=r"MarkovChain.*powers must sum to more than 0"):
            ppl.infer(quotient, SMC(2))
    with pytest.raises(TypeError):
        P / 2.0
    with pytest.raises(ValueError, match="negative power is a quotient"):
        P**-1.0
