"""Smoothing of a finite hidden Markov model: PaRIS and backward sampling against all paths, and in every run."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import MCMC, SMC, BackwardSmoothing, PaRIS, ParisianGibbs
from ppl.testing import enumerate_runs
from tests.finite_programs import EMISSION, TRANSITION, hidden_markov, remembering
from tests.ppl.checks import assert_mean_within_5_standard_errors

SYMBOLS = np.array([0, 1, 1, 0, 1])


def functional(before, now, t):
    """How often the state is 1, at which time, and how often it stays."""
    one, stays = now["x"] == 1, (now["x"] == before["x"]) & (t > 0)
    return {"ones": 1.0 * one, "when": one * t, "stays": 1.0 * stays}


def sums(path):
    """The same of whole paths, `[..., T]`."""
    stays = (path[..., 1:] == path[..., :-1]).sum(-1)
    return np.stack([(path == 1).sum(-1), ((path == 1) * np.arange(path.shape[-1])).sum(-1), stays], -1)


def figures(additive):
    return jnp.stack([additive["ones"], additive["when"], additive["stays"]]).astype(float)


def exactly(symbols):
    """All paths `[K, T]` and their densities, in float64."""
    paths = np.array(list(itertools.product(range(2), repeat=len(symbols))))
    transition, emission = np.asarray(TRANSITION, np.float64), np.asarray(EMISSION, np.float64)
    before = np.concatenate([np.zeros((len(paths), 1), int), paths[:, :-1]], 1)
    return paths, (transition[before, paths] * emission[paths, symbols]).prod(1)


@pytest.mark.parametrize("threshold, num_draws", [(1.0, 2), (0.9, 1)])
def test_paris_is_exact_over_all_of_its_runs(threshold, num_draws):
    """Weighted by Z_hat its estimate is that of the sum over paths, however few particles and draws there are."""
    symbols = SYMBOLS[:2]
    paths, density = exactly(symbols)
    algorithm = PaRIS(SMC(2, ess_threshold=threshold), functional, num_draws)

    def run(key):
        posterior = algorithm(hidden_markov(jnp.asarray(symbols)), key)
        return jnp.exp(posterior.log_evidence) * jnp.append(figures(posterior.diagnostics["additive"]), 1.0)

    runs = enumerate_runs(run, jax.random.key(0))(jax.random.key(0))
    estimate = sum(probability * np.asarray(result, np.float64) for probability, result in runs)
    np.testing.assert_allclose(estimate, [*(density @ sums(paths)), density.sum()], rtol=1e-5)


@pytest.mark.parametrize("threshold, length", [(1.0, 3), (0.9, 2)])
def test_backward_smoothing_is_exact_over_all_of_its_runs(threshold, length):
    """The same of each whole path: how often it is drawn, weighted by Z_hat."""
    paths, density = exactly(SYMBOLS[:length])
    algorithm = BackwardSmoothing(SMC(2, ess_threshold=threshold), num_traces=1)

    def run(key):
        posterior = algorithm(hidden_markov(jnp.asarray(SYMBOLS[:length])), key)
        return jnp.exp(posterior.log_evidence), posterior.sites["x"][0]

    mass = np.zeros(len(paths))
    for probability, (evidence, path) in enumerate_runs(run, jax.random.key(0))(jax.random.key(0)):
        mass[np.flatnonzero((paths == path).all(1))[0]] += probability * evidence
    np.testing.assert_allclose(mass, density, rtol=1e-5)


def test_many_runs_find_the_smoothed_expectations():
    paths, density = exactly(SYMBOLS)
    expected = density @ sums(paths) / density.sum()
    program, smc = hidden_markov(jnp.asarray(SYMBOLS)), SMC(32)

    def run(key):
        online = ppl.infer(program, PaRIS(smc, functional), key=key)
        lines = ppl.infer(program, BackwardSmoothing(smc, num_traces=16), key=key)
        drawn = lines.sites["x"]
        stays = jnp.sum(drawn[:, 1:] == drawn[:, :-1], axis=1)
        means = jnp.stack([jnp.sum(drawn, 1), drawn @ jnp.arange(len(SYMBOLS)), stays], -1).mean(0)
        weights = jnp.exp(jnp.stack([online.log_evidence, lines.log_evidence]))
        return weights[:, None] * (jnp.stack([figures(online.diagnostics["additive"]), means]) - expected)

    keys = jax.random.split(jax.random.key(0), 200)
    assert_mean_within_5_standard_errors(jax.jit(jax.vmap(run))(keys), np.zeros((2, 3)))


def test_draws_of_the_past_are_more_than_the_lines_of_the_last_particles():
    program, smc = hidden_markov(jnp.asarray(np.resize(SYMBOLS, 60))), SMC(32, ess_threshold=1.0)
    lines, smoothed = ppl.infer(program, smc), ppl.infer(program, BackwardSmoothing(smc))
    first = [len(np.unique(np.asarray(p.sites["x"])[:, :8], axis=0)) for p in (lines, smoothed)]
    assert first[1] > 2 * first[0], first
    assert smoothed.num_particles == 32 and smoothed.guarantee == "consistent"
    np.testing.assert_allclose(smoothed.log_evidence, lines.log_evidence, rtol=0.2)


def test_programs_whose_future_depends_on_more_than_one_iteration_are_refused():
    for algorithm in (PaRIS(SMC(4), functional), BackwardSmoothing(SMC(4)), MCMC(ParisianGibbs(SMC(4), functional), 2)):
        with pytest.raises(ppl.SiteTypeError, match="one ppl.scan, last of its statements"):
            ppl.infer(remembering(jnp.array([0, 1])), algorithm)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: PaRIS(MCMC, functional), TypeError, "`smc` must be an SMC"),
        (lambda: PaRIS(SMC(4), "x"), TypeError, "`functional` must be a function"),
        (lambda: PaRIS(SMC(4), functional, 0), ValueError, "`num_draws` must be at least 1"),
        (lambda: BackwardSmoothing(4), TypeError, "`smc` must be an SMC"),
        (lambda: BackwardSmoothing(SMC(4), 0), ValueError, "`num_traces` must be at least 1"),
    ],
)
def test_settings_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()
