"""Several expectations from one weighted sample, on posteriors whose moments are known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import ImportanceSampling
from ppl.inference.adaptive_importance import AdaptiveImportanceSampling, GaussianProposal, fit_proposal
from ppl.inference.control_variates import expectations
from tests.ppl.checks import assert_mean_within_5_standard_errors, repeat

NUM_RUNS, BUDGET = 200, 2000
DESIGN = np.array([[1.0, 0.5], [-0.4, 1.2], [0.7, 0.3]])
YS, NOISE = np.array([1.0, 0.2, 1.5]), 0.5


@ppl.model
def regression(ys):
    x = ppl.sample("x", dist.Normal(jnp.zeros(2), 1.0))
    ppl.observe("y", dist.Normal(jnp.asarray(DESIGN, jnp.float32) @ x, NOISE), ys)
    return x


PROGRAM = regression(jnp.asarray(YS, jnp.float32))
PRECISION = np.eye(2) + DESIGN.T @ DESIGN / NOISE**2
MEAN = np.linalg.solve(PRECISION, DESIGN.T @ YS / NOISE**2)
SECOND = np.linalg.inv(PRECISION) + np.outer(MEAN, MEAN)
TRUTH = np.array([*MEAN, SECOND[0, 0], SECOND[0, 1]])
SPREAD = DESIGN @ DESIGN.T + NOISE**2 * np.eye(3)
LOG_Z = -0.5 * (YS @ np.linalg.solve(SPREAD, YS) + np.linalg.slogdet(2 * np.pi * SPREAD)[1])


def functions(x):
    return jnp.array([x[0], x[1], x[0] ** 2, x[0] * x[1]])


def prior_moments(x):
    return x, x**2 - 1, x[0] * x[1]


def score(x):
    return -jnp.asarray(PRECISION, jnp.float32) @ (x - jnp.asarray(MEAN, jnp.float32))


def assert_calibrated(means, errors):
    """Check z-scores of independent runs: mean 0, mean square 1, 95% within 1.96, each within 5 standard errors."""
    z = (np.asarray(means, np.float64) - TRUTH) / np.asarray(errors, np.float64)
    assert_mean_within_5_standard_errors(z, 0.0, "z")
    assert_mean_within_5_standard_errors(z**2, 1.0, "z^2")
    covered = (np.abs(z) < 1.96).mean(0)
    assert np.all(np.abs(covered - 0.95) < 5 * np.sqrt(0.95 * 0.05 / len(z))), covered


@functools.cache
def importance_runs():
    """Return estimates of runs from the prior: with its moments as controls, and with log Z known besides."""

    def summary(posterior):
        usual = expectations(posterior, functions, prior_moments)
        return usual, expectations(posterior, functions, prior_moments, log_evidence=LOG_Z)

    return jax.tree.map(np.asarray, repeat(PROGRAM, ImportanceSampling(BUDGET), summary, NUM_RUNS))


@functools.cache
def adaptive_runs():
    """Return estimates, log-evidences and the number of rounds of adaptive runs."""
    estimate, runs = jax.jit(lambda posterior: expectations(posterior, functions)), []
    algorithm = AdaptiveImportanceSampling(BUDGET, functions, num_round=250)
    for key in jax.random.split(jax.random.key(5), NUM_RUNS):
        posterior = algorithm(PROGRAM, key)
        rounds = posterior.diagnostics.pop("num_rounds")
        assert posterior.num_particles == BUDGET - 250 * rounds >= BUDGET / 2
        runs.append((estimate(posterior), posterior.log_evidence, rounds))
    return jax.tree.map(lambda *leaves: np.array(leaves), *runs)


@pytest.mark.parametrize("kind", [0, 1], ids=["moments of the proposal", "and known evidence"])
def test_errors_of_importance_sampling_are_calibrated(kind):
    runs = importance_runs()[kind]
    assert_calibrated(runs.mean, runs.standard_error)
    assert_calibrated(runs.plain_mean, runs.plain_error)


def test_controls_lower_the_variance_of_importance_sampling():
    moments, known = importance_runs()
    gain = moments.variance_ratio.mean(0)  # of the prior's moments, which tell little of so narrow a posterior
    assert np.all(gain > 1.05), gain
    assert np.all(moments.mean.var(0) < moments.plain_mean.var(0))
    assert np.all(known.variance_ratio.mean(0) > gain)  # log Z helps


def test_errors_of_adaptive_importance_sampling_are_calibrated_and_its_evidence_unbiased():
    estimates, log_evidence, num_rounds = adaptive_runs()
    assert set(num_rounds) == {3, 4}  # some stop as another round would not pay, some at half of the budget
    assert_calibrated(estimates.mean, estimates.standard_error)
    assert_calibrated(estimates.plain_mean, estimates.plain_error)
    assert_mean_within_5_standard_errors(np.exp(log_evidence.astype(np.float64) - LOG_Z), 1.0, "Z_hat / Z")


def test_adaptive_importance_sampling_has_an_eighth_of_the_variance_for_the_same_budget():
    estimates, *_ = adaptive_runs()
    plain = importance_runs()[0].plain_mean.var(0)
    assert np.all(plain / estimates.plain_mean.var(0) > 1.5)  # the proposal
    assert np.all(plain / estimates.mean.var(0) > 8)  # and its moments as controls
    np.testing.assert_allclose(
        estimates.plain_mean.var(0) / estimates.mean.var(0), estimates.variance_ratio.mean(0), rtol=0.5
    )


@pytest.fixture(scope="module")
def posterior():
    return ppl.infer(PROGRAM, ImportanceSampling(500))


def test_score_of_the_posterior_leaves_next_to_no_variance_of_linear_functions(posterior):
    found = expectations(posterior, lambda x: {"x": x}, posterior_controls=score)
    assert np.all(np.asarray(found.variance_ratio["x"]) > 1e4)
    assert np.all(np.abs(found.mean["x"] - MEAN) < 5 * found.standard_error["x"] + 1e-6)


def test_without_controls_it_is_the_plain_estimate(posterior):
    found = expectations(posterior, functions)
    weights, values = np.asarray(posterior.weights, np.float64), np.asarray(jax.vmap(functions)(posterior.value))
    mean = weights @ values
    error = np.sqrt(500 / 499 * np.sum((weights[:, None] * (values - mean)) ** 2, axis=0))
    for means, errors in ((found.mean, found.standard_error), (found.plain_mean, found.plain_error)):
        np.testing.assert_allclose(means, mean, rtol=1e-5)
        np.testing.assert_allclose(errors, error, rtol=1e-5)


def test_repeated_and_constant_controls_do_no_harm(posterior):
    once = expectations(posterior, functions, prior_moments)
    padded = expectations(posterior, functions, lambda x: (prior_moments(x), 2 * x, jnp.zeros(2)))
    np.testing.assert_allclose(padded.mean, once.mean, rtol=1e-4)
    np.testing.assert_allclose(padded.standard_error, once.standard_error, rtol=1e-2)  # 4 more counted


@ppl.model
def counts(observed):
    rate = ppl.sample("rate", dist.Gamma(3.0, 1.0))
    ppl.observe("count", dist.Poisson(rate), observed)

    def step(number, _):
        return number + 1, ppl.sample("noise", dist.Normal(0.0, 1.0))

    ppl.scan(step, jnp.int32(0), length=3, until=lambda number: number >= 2)
    return rate


def test_constrained_and_absent_entries_keep_their_densities():
    posterior = ppl.infer(counts(jnp.int32(4)), AdaptiveImportanceSampling(4000, lambda rate: rate), seed=2)
    log_z = 3 * np.log(0.5) + 4 * np.log(0.5) + np.log(15.0)  # negative binomial: C(6, 4) / 2^7
    assert abs(float(posterior.log_evidence) - log_z) < 5 * float(posterior.log_evidence_error)
    assert float(posterior.log_evidence_error) < 0.05
    found = expectations(posterior, lambda rate: rate)
    assert abs(float(found.mean) - 3.5) < 5 * float(found.standard_error) < 0.2
    np.testing.assert_array_equal(posterior.sites["noise"][:, 2], 0.0)
    np.testing.assert_array_equal(posterior.present["noise"], [[True, True, False]] * posterior.num_particles)
    assert np.all(np.asarray(posterior.sites["rate"]) > 0)


def test_proposal_is_fitted_to_what_the_functions_need():
    # p = N(0, 1), f = x: p |x| has variance E|x|^3 / E|x| = 2, and no other weights than |x| are given.
    z = jax.random.normal(jax.random.key(0), (40_000, 1))
    far = GaussianProposal(jnp.array([5.0]), jnp.array([[3.0]]))
    fit = jax.jit(fit_proposal)
    fitted = fit(z, jnp.zeros(len(z)), z, far)
    assert abs(float(fitted.mean[0])) < 0.05
    assert float(fitted.scale_tril[0, 0]) ** 2 == pytest.approx(2.0, abs=0.1)
    one_draw = fit(z, jnp.where(jnp.arange(len(z)) == 0, 0.0, jnp.nan), z, far)
    assert float(one_draw.scale_tril[0, 0]) > 1.0  # a single living draw does not make it collapse


def test_draws_that_are_not_independent_are_refused(posterior):
    resampled = dataclasses.replace(posterior, diagnostics={"resampled": jnp.array([False, True])})
    chains = dataclasses.replace(posterior, num_chains=2)
    again = dataclasses.replace(posterior, _error_before=jnp.ones(()))  # as `resample` marks it
    for wrong in (resampled, chains, again):
        with pytest.raises(ValueError, match="independent weighted draws.*got one by Importance"):
            expectations(wrong, functions)
    few = jax.tree.map(lambda a: a[:5], posterior.value)
    with pytest.raises(ValueError, match="has 5 draws, too few to fit 5 controls: at least 7"):
        expectations(
            dataclasses.replace(posterior, value=few, log_weights=posterior.log_weights[:5]), functions, prior_moments
        )


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="`num_samples` must be at least twice the 32 draws of a round, got 50"):
        AdaptiveImportanceSampling(50, functions)
    with pytest.raises(TypeError, match="`functions` must be a function"):
        AdaptiveImportanceSampling(1000, None)
    with pytest.raises(ValueError, match="`control_degree` must be 0, 1 or 2, got 3"):
        AdaptiveImportanceSampling(1000, functions, control_degree=3)
    coin = ppl.model(lambda: ppl.sample("coin", dist.Bernoulli(0.5)))()
    with pytest.raises(ppl.SiteTypeError, match="'coin'.*discrete"):
        ppl.infer(coin, AdaptiveImportanceSampling(1000, functions))
    with pytest.raises(TypeError, match="Call it outside"):
        jax.jit(lambda key: ppl.infer(PROGRAM, AdaptiveImportanceSampling(1000, functions), key=key))(jax.random.key(0))
