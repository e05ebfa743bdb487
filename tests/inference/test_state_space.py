"""Importance sampling and SMC against state-space models whose evidence and posterior are known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling
from tests.ppl.checks import assert_mean_within_5_standard_errors, repeat

NUM_RUNS = 300
YS = np.array([0.3, 1.1, 0.9, 2.0])
SCALE, NOISE = 1.0, 0.5


@ppl.model
def walk(observations, scale=SCALE):
    drift = ppl.sample("drift", dist.Normal(0.0, scale))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + drift, 1.0))
        ppl.observe("y", dist.Normal(x, NOISE), y)
        return x, x

    _, path = ppl.scan(step, 0.0, observations)
    return jnp.append(path, drift)


def walk_exactly():
    """The walk is jointly Gaussian in (path, drift): its evidence and posterior means, in float64."""
    steps = len(YS)
    times = np.arange(1, steps + 1)
    covariance = np.zeros((steps + 1, steps + 1))
    covariance[:steps, :steps] = np.minimum.outer(times, times) + SCALE**2 * np.outer(times, times)
    covariance[-1, :steps] = covariance[:steps, -1] = SCALE**2 * times
    covariance[-1, -1] = SCALE**2
    observed = covariance[:steps, :steps] + NOISE**2 * np.eye(steps)
    log_z = -0.5 * (YS @ np.linalg.solve(observed, YS) + np.linalg.slogdet(2 * np.pi * observed)[1])
    return log_z, covariance[:, :steps] @ np.linalg.solve(observed, YS)


INITIAL = np.array([0.5, 0.3, 0.2])
TRANSITION = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]])
EMISSION = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.1, 0.7]])
SYMBOLS = np.array([0, 1, 2, 2, 0])


@ppl.model
def hidden_markov(symbols):
    def step(state, symbol):
        state = ppl.sample("state", dist.Categorical(probs=jnp.asarray(TRANSITION, jnp.float32)[state]))
        ppl.observe("symbol", dist.Categorical(probs=jnp.asarray(EMISSION, jnp.float32)[state]), symbol)
        return state, state

    first = ppl.sample("first", dist.Categorical(probs=jnp.asarray(INITIAL, jnp.float32)))
    return jax.nn.one_hot(ppl.scan(step, first, symbols)[1], 3)


def hidden_markov_exactly():
    """The forward-backward recursions: evidence and smoothed marginals `[T, 3]`, in float64."""
    forward, message = [], INITIAL
    for symbol in SYMBOLS:
        message = (message @ TRANSITION) * EMISSION[:, symbol]
        forward.append(message)
    backward, message = [np.ones(3)], np.ones(3)
    for symbol in SYMBOLS[:0:-1]:
        message = TRANSITION @ (EMISSION[:, symbol] * message)
        backward.append(message)
    joint = np.array(forward) * np.array(backward[::-1])
    return np.log(forward[-1].sum()), joint / joint[0].sum()


MODELS = {
    "linear Gaussian walk": (walk(jnp.asarray(YS, jnp.float32)), walk_exactly),
    "hidden Markov": (hidden_markov(jnp.asarray(SYMBOLS)), hidden_markov_exactly),
}
ALGORITHMS = {
    "importance": ImportanceSampling(64),
    "never resampled": SMC(64, ess_threshold=0.0),
    "adaptive": SMC(64, ess_threshold=0.5),
    "every step": SMC(64, ess_threshold=1.0),
}


@functools.cache
def runs(model, algorithm):
    def summary(posterior):
        return posterior.log_evidence, posterior.expectation(lambda value: value)

    log_evidence, means = repeat(MODELS[model][0], ALGORITHMS[algorithm], summary, NUM_RUNS)
    return np.asarray(log_evidence, np.float64), np.asarray(means, np.float64)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("model", MODELS)
def test_evidence_is_unbiased(model, algorithm):
    log_z, _ = MODELS[model][1]()
    ratio = np.exp(runs(model, algorithm)[0] - log_z)
    assert_mean_within_5_standard_errors(ratio, 1.0, f"{algorithm}: Z_hat / Z")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("model", MODELS)
def test_evidence_times_expectation_is_unbiased(model, algorithm):
    log_z, means = MODELS[model][1]()
    log_evidence, estimates = runs(model, algorithm)
    ratio = np.exp(log_evidence - log_z).reshape(-1, *[1] * means.ndim)
    assert_mean_within_5_standard_errors(ratio * estimates, means, f"{algorithm}: Z_hat / Z * mean")


@pytest.mark.parametrize(
    "algorithm", [SMC(16384, ess_threshold=0.5), SMC(16384, ess_threshold=1.0)], ids=["adaptive", "every step"]
)
@pytest.mark.parametrize("model", MODELS)
def test_posterior_means_are_those_of_the_smoother(model, algorithm):
    _, exact = MODELS[model][1]()
    estimates = repeat(MODELS[model][0], algorithm, lambda p: p.expectation(lambda value: value), 20)
    # The bias of a ratio of averages is of the order 1/N, far below the standard error of 20 runs at this N.
    assert_mean_within_5_standard_errors(estimates, exact)


@pytest.mark.parametrize("model", MODELS)
def test_variance_of_log_evidence_falls_as_one_over_the_number_of_particles(model):
    sizes = np.array([64, 256, 1024])
    logs = [
        np.asarray(
            repeat(MODELS[model][0], SMC(int(n), ess_threshold=0.5), lambda p: p.log_evidence, NUM_RUNS), np.float64
        )
        for n in sizes
    ]
    log_variances = np.log([x.var(ddof=1) for x in logs])
    x = np.log(sizes) - np.log(sizes).mean()
    slope = (x @ log_variances) / (x @ x)
    # The log of a sample variance has standard error sqrt((kurtosis - 1) / runs); the slope is a weighted sum of three.
    kurtosis = np.array([np.mean((v - v.mean()) ** 4) / v.var() ** 2 for v in logs])
    error = np.sqrt(np.sum((x / (x @ x)) ** 2 * (kurtosis - 1) / NUM_RUNS))
    assert abs(slope + 1.0) < 5 * error, f"slope {slope}, expected -1, standard error {error}"


def test_evidence_of_a_walk_with_a_proposal_is_unbiased():
    @ppl.model
    def guided(observations):
        drift = ppl.sample("drift", dist.Normal(0.0, SCALE), proposal=dist.Normal(0.5, 0.8))

        def step(x, y):
            x = ppl.sample("x", dist.Normal(x + drift, 1.0), proposal=dist.Normal(0.5 * (x + drift + y), 0.8))
            ppl.observe("y", dist.Normal(x, NOISE), y)
            return x, None

        ppl.scan(step, 0.0, observations)

    log_z, _ = walk_exactly()
    log_evidence = repeat(
        guided(jnp.asarray(YS, jnp.float32)), SMC(64, ess_threshold=0.5), lambda p: p.log_evidence, NUM_RUNS
    )
    assert_mean_within_5_standard_errors(np.exp(np.asarray(log_evidence, np.float64) - log_z), 1.0)


def test_diagnostics_of_the_evidence_end_in_the_evidence():
    posterior = ppl.infer(MODELS["linear Gaussian walk"][0], SMC(256, ess_threshold=0.5))
    np.testing.assert_allclose(posterior.diagnostics["log_evidence"][-1], posterior.log_evidence, rtol=1e-5)
