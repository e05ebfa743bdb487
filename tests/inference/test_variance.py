"""Variances told from one run: exactly, by enumerating all runs, and against many runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, EntropicAnnealing, ImportanceSampling, Lookahead
from ppl.inference.variance import eve_indices, evidence_variance, expectation_error
from tests import enumeration
from tests.enumeration import Finite
from tests.inference.test_state_space import SYMBOLS, hidden_markov, hidden_markov_exactly
from tests.ppl.checks import assert_close, assert_mean_within_5_standard_errors, repeat

TRANSITION = jnp.array([[0.7, 0.3], [0.2, 0.8]])
LOG_WEIGHTS = jnp.array([[0.0, -1.5], [-0.7, 0.4]])


@ppl.model
def tiny(observations):
    def step(state, y):
        state = ppl.sample("x", Finite(TRANSITION[state]))
        ppl.factor("y", LOG_WEIGHTS[state, y])
        return state, state

    last, _ = ppl.scan(step, jnp.int32(0), observations)
    ppl.factor("after", jnp.where(last == 1, 0.5, -0.25))
    return last


MULTINOMIAL = {
    "importance": ImportanceSampling(2),
    "never resampled": SMC(2, ess_threshold=0.0),
    "every step": SMC(2, resampler=enumeration.multinomial, ess_threshold=1.0),
    "adaptive": SMC(2, resampler=enumeration.multinomial, ess_threshold=0.9),
    "annealed": SMC(
        2, resampler=enumeration.multinomial, ess_threshold=0.95, annealing=EntropicAnnealing(entropy=0.98)
    ),
    "looking ahead": SMC(2, resampler=enumeration.multinomial, ess_threshold=0.9, lookahead=Lookahead(defensive=0.2)),
}


def enumerated(algorithm, resampler):
    """Return, over all runs: probabilities, Z_hat, V."""
    program, key = tiny(jnp.array([0, 1])), jax.random.key(0)

    @jax.jit
    def run():
        posterior = ppl.infer(program, algorithm, key=key)
        return posterior.log_evidence, evidence_variance(posterior, resampler=resampler)

    probabilities, results = zip(*enumeration.runs(run), strict=True)
    log_evidence, variance = np.array(results, np.float64).T
    assert sum(probabilities) == pytest.approx(1.0, abs=1e-9)
    return np.array(probabilities), np.exp(log_evidence), variance


@pytest.mark.parametrize("name", MULTINOMIAL)
def test_variance_of_the_evidence_is_unbiased_with_independent_ancestors(name):
    probabilities, z, variance = enumerated(MULTINOMIAL[name], "multinomial")
    exact = probabilities @ z**2 - (probabilities @ z) ** 2
    assert probabilities @ (z**2 * variance) == pytest.approx(exact, rel=2e-5)


def test_other_schemes_overstate_the_variance_of_the_evidence():
    algorithm = SMC(2, resampler=enumeration.systematic, ess_threshold=1.0)
    probabilities, z, variance = enumerated(algorithm, "systematic")
    exact = probabilities @ z**2 - (probabilities @ z) ** 2
    assert exact < probabilities @ (z**2 * variance) < 2 * exact


# Many runs ------------------------------------------------------------------------------------------------------------

SCHEMES = ["multinomial", "systematic", "residual", "killing"]
NUM, NUM_RUNS = 256, 400


def last_state(value):
    return value[-1]


@functools.cache
def many(scheme, threshold):
    """Return Z_hat / Z, V, the estimates of P(last state) and their squared errors as told, of 400 runs."""

    def summary(posterior):
        error = expectation_error(posterior, last_state)
        return posterior.log_evidence, evidence_variance(posterior), posterior.expectation(last_state), error**2

    program, algorithm = hidden_markov(jnp.asarray(SYMBOLS)), SMC(NUM, resampler=scheme, ess_threshold=threshold)
    log_evidence, *rest = (np.asarray(a, np.float64) for a in repeat(program, algorithm, summary, NUM_RUNS))
    return np.exp(log_evidence - hidden_markov_exactly()[0]), *rest


@pytest.mark.parametrize("threshold", [1.0, 0.5], ids=["every step", "adaptive"])
def test_mean_of_the_estimate_is_the_variance_over_many_runs(threshold):
    ratio, variance, *_ = many("multinomial", threshold)
    # Z_hat^2 V is unbiased for Var[Z_hat], Z_hat^2 - Z^2 as well: the mean of the difference is 0.
    assert_mean_within_5_standard_errors(ratio**2 * variance - (ratio**2 - 1), 0.0)
    assert_mean_within_5_standard_errors(ratio**2 * variance - (ratio - 1) ** 2, 0.0)
    assert variance.mean() > 5 * variance.std(ddof=1) / np.sqrt(NUM_RUNS)  # neither of them says nothing


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_variance_is_overstated_by_at_most_one_over_n_for_each_resampling(scheme):
    ratio, variance, *_ = many(scheme, 1.0)
    excess = NUM * (ratio**2 * variance - (ratio - 1) ** 2) / len(SYMBOLS)
    error = excess.std(ddof=1) / np.sqrt(NUM_RUNS)
    allowed = 1.0 if scheme in ("residual", "killing") else 0.25
    assert -5 * error < excess.mean() < allowed + 5 * error, (excess.mean(), error)


@pytest.mark.parametrize(
    ("scheme", "threshold"), [*((scheme, 1.0) for scheme in SCHEMES), ("multinomial", 0.5), ("systematic", 0.5)]
)
def test_error_of_an_expectation_is_its_spread_over_many_runs(scheme, threshold):
    _, _, means, squared_errors = many(scheme, threshold)
    exact = hidden_markov_exactly()[1][-1]
    assert_mean_within_5_standard_errors(squared_errors - (means - exact) ** 2, 0.0)


LONG, LAG = 150, 12


def test_long_run_forgets_its_eves_and_a_lag_helps():
    symbols = np.random.RandomState(3).randint(0, 3, LONG)
    program, algorithm = hidden_markov(jnp.asarray(symbols)), SMC(64, resampler="multinomial", ess_threshold=1.0)

    def summary(posterior):
        lagged = expectation_error(posterior, last_state, lag=LAG)
        blind = expectation_error(posterior, last_state, lag=0)
        full = expectation_error(posterior, last_state)
        return posterior.log_evidence_error, posterior.expectation(last_state), lagged**2, blind**2, full

    error, means, lagged, blind, full = (np.asarray(a, np.float64) for a in repeat(program, algorithm, summary, 200))
    collapsed = np.isnan(error)
    assert collapsed.mean() > 0.5  # one Eve: no standard error of log Z is made up
    np.testing.assert_array_equal(np.isnan(full).all(1), np.isnan(full).any(1))
    assert np.isnan(full).all(1).mean() > 0.5 and np.isfinite(lagged).all()
    spread = (means - means.mean(0)) ** 2 * 200 / 199
    assert_mean_within_5_standard_errors(lagged - spread, 0.0)
    assert np.all(blind.mean(0) < 0.75 * spread.mean(0))  # without any lag what resampling did is left out


# Closed forms ---------------------------------------------------------------------------------------------------------


@ppl.model
def weighted():
    x = ppl.sample("x", dist.Normal(0.0, 1.0))
    ppl.factor("f", 0.5 * x)
    return {"x": x, "vector": jnp.array([x, x**2])}


@pytest.fixture(scope="module")
def posterior():
    return ppl.infer(weighted(), ImportanceSampling(100))


def test_importance_sampling_has_the_usual_errors(posterior):
    x = np.asarray(posterior.value["x"], np.float64)
    w = np.exp(0.5 * x)
    expected = w.var(ddof=1) / 100 / w.mean() ** 2
    assert float(evidence_variance(posterior)) == pytest.approx(expected, rel=1e-4)
    assert float(posterior.log_evidence_error) == pytest.approx(np.sqrt(expected), rel=1e-4)
    normalised = w / w.sum()
    usual = lambda f: np.sqrt(100 / 99 * np.sum(normalised**2 * (f - normalised @ f) ** 2))  # noqa: E731
    errors = expectation_error(posterior, lambda value: value)
    assert_close(errors, {"x": usual(x), "vector": np.array([usual(x), usual(x**2)])})
    np.testing.assert_array_equal(eve_indices(posterior), np.arange(100))


def test_posterior_prints_the_error_of_its_evidence_and_keeps_it_when_resampled(posterior):
    shown = f"log-evidence {float(posterior.log_evidence):.3f} ± {float(posterior.log_evidence_error):.3f}"
    assert shown in repr(posterior) and shown in posterior._repr_html_()
    drawn = posterior.resample(n=100)
    assert drawn.drawn_again and not posterior.drawn_again
    assert float(drawn.log_evidence_error) == float(posterior.log_evidence_error)
    assert float(drawn.resample(n=100).log_evidence_error) == float(posterior.log_evidence_error)


def test_equal_weights_have_no_error_and_one_particle_none_that_is_known():
    constant = ppl.model(lambda: ppl.factor("f", -3.0 + 0.0 * ppl.sample("x", dist.Normal(0.0, 1.0))))
    assert float(ppl.infer(constant(), ImportanceSampling(50)).log_evidence_error) < 1e-6
    alone = ppl.infer(weighted(), ImportanceSampling(1))
    assert np.isnan(alone.log_evidence_error) and "±" not in repr(alone)


def test_dead_particles_are_no_family():
    forced = ppl.model(
        lambda: ppl.factor("f", jnp.where(ppl.sample("k", Finite(jnp.full(4, 0.25))) == 0, 0.0, -jnp.inf))
    )
    for _, error in enumeration.runs(lambda: _error_and_living(forced())):
        assert np.isnan(error[0]) == (error[1] < 2)


def _error_and_living(program):
    posterior = SMC(2)(program, jax.random.key(0))
    return posterior.log_evidence_error, jnp.sum(posterior.weights > 0)


def test_without_evidence_there_is_no_error(posterior):
    heuristic = dataclasses.replace(posterior, log_evidence=jnp.nan)
    assert np.isnan(heuristic.log_evidence_error) and np.isnan(evidence_variance(heuristic))
    assert "±" not in repr(heuristic)


def test_several_runs_at_once_have_an_error_each(posterior):
    several = jax.tree.map(lambda a: jnp.stack([a, a]), posterior)
    assert_close(several.log_evidence_error, jnp.full(2, posterior.log_evidence_error))
    assert_close(jax.jit(lambda p: p.log_evidence_error)(posterior), posterior.log_evidence_error)


def test_eves_are_found_through_steps_that_resampled():
    posterior = ppl.infer(hidden_markov(jnp.asarray(SYMBOLS)), SMC(8, resampler="multinomial", ess_threshold=0.9))
    ancestors = np.asarray(posterior.diagnostics["ancestors"])
    for lag in (None, 0, 2, 100):
        line = np.arange(8)
        for parents in ancestors[::-1][:lag]:
            line = parents[line]
        np.testing.assert_array_equal(eve_indices(posterior, lag), line)


def test_what_has_no_genealogy_is_named(posterior):
    with pytest.raises(ValueError, match="`lag` must be at least 0 iterations, or None for all of them; got -1"):
        eve_indices(posterior, lag=-1)
    with pytest.raises(ValueError, match=r"ImportanceSampling\(num_particles=100\) of 4 draws"):
        expectation_error(posterior.resample(n=4), lambda value: value["x"])
