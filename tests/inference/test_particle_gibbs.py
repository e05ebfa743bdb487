"""Particle Gibbs in all its forms: exact transition matrices, long runs against Kalman smoothing, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import MCMC, SMC, Lookahead, ParisianGibbs, ParticleGibbs
from ppl.testing import assert_invariant, transition_matrix
from tests.finite_programs import hidden_markov, remembering, stopping
from tests.ppl.checks import compilations, finished

OBSERVATIONS = jnp.array([0, 1])
CASES = {
    "two particles": (hidden_markov(OBSERVATIONS), ParticleGibbs(SMC(2))),
    "three particles": (hidden_markov(OBSERVATIONS[:1]), ParticleGibbs(SMC(3, ess_threshold=1.0))),
    "ancestors": (
        hidden_markov(OBSERVATIONS),
        ParticleGibbs(SMC(2, resampler="multinomial", ess_threshold=0.95), ancestor_sampling=True),
    ),
    "backwards": (hidden_markov(OBSERVATIONS), ParticleGibbs(SMC(2, ess_threshold=0.95), backward_sampling=True)),
    "parisian": (
        hidden_markov(OBSERVATIONS),
        ParisianGibbs(SMC(2, ess_threshold=1.0), lambda before, now, t: now["x"], num_draws=1),
    ),
    "whole futures": (remembering(OBSERVATIONS), ParticleGibbs(SMC(2, ess_threshold=1.0), ancestor_sampling=True)),
    "some sites": (remembering(OBSERVATIONS), ParticleGibbs(SMC(2), sites="x", ancestor_sampling=True)),
    "lengths that change": (stopping(), ParticleGibbs(SMC(2, ess_threshold=1.0), ancestor_sampling=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_form_leaves_the_posterior_as_it_is(case):
    program, kernel = CASES[case]
    assert_invariant(program, kernel, irreducible=kernel.sites is None)


@ppl.model
def linear_gaussian(observations):
    def step(x, y):
        x = ppl.sample("x", dist.Normal(0.9 * x, 1.0))
        ppl.observe("y", dist.Normal(x, 0.5), y)
        return x, None

    ppl.scan(step, 0.0, observations)


Y = jnp.array([0.3, 1.5, -1.0, 0.5, 2.0, 1.0])


def smoothed_means():
    """E[x_t | y] by solving the Gaussian's normal equations."""
    length = len(Y)
    precision = np.diag(np.full(length, 1.0 + 0.81 + 1 / 0.25))
    precision[-1, -1] -= 0.81
    precision -= 0.9 * (np.eye(length, k=1) + np.eye(length, k=-1))
    return np.linalg.solve(precision, np.asarray(Y, np.float64) / 0.25)


@pytest.mark.parametrize(
    "kernel",
    [
        ParticleGibbs(SMC(4)),
        ParticleGibbs(SMC(4, resampler="multinomial", ess_threshold=1.0), ancestor_sampling=True),
        ParticleGibbs(SMC(4, ess_threshold=1.0), backward_sampling=True),
    ],
    ids=["traced", "ancestors", "backwards"],
)
def test_a_hundred_thousand_sweeps_show_no_bias(kernel):
    run = MCMC(kernel, num_samples=50_000, num_warmup=200, num_chains=2)
    draws = np.asarray(ppl.infer(linear_gaussian(Y), run).sites["x"], np.float64)
    batches = draws.reshape(200, 500, len(Y)).mean(axis=1)
    error = batches.std(axis=0, ddof=1) / np.sqrt(len(batches))
    z = (batches.mean(axis=0) - smoothed_means()) / error
    assert np.abs(z).max() < 4, z


def test_one_iteration_is_importance_resampling():
    """With one iteration and no resampling the next trace is one of N - 1 fresh ones or the present one, by weight."""

    @ppl.model
    def once():
        x = ppl.sample("x", dist.Bernoulli(0.5))
        ppl.factor("w", jnp.where(x == 1, jnp.log(3.0), 0.0))

    traces, posterior, kernel = transition_matrix(once(), ParticleGibbs(SMC(2)))
    at = [int(x) for x in traces.sites["x"]]
    zero, one = at.index(0), at.index(1)
    # From 0: the fresh draw is 1 with probability 1/2, and is then chosen with probability 3/4.
    np.testing.assert_allclose([kernel[zero, one], kernel[one, zero]], [0.5 * 0.75, 0.5 * 0.25], atol=1e-6)
    np.testing.assert_allclose(posterior[[zero, one]], [0.25, 0.75], atol=1e-6)


def test_chains_continue_as_if_they_had_not_stopped():
    kernel = ParticleGibbs(SMC(4))
    whole = ppl.infer(linear_gaussian(Y), MCMC(kernel, num_samples=20, num_chains=2))
    half = MCMC(kernel, num_samples=10, num_chains=2)
    first = ppl.infer(linear_gaussian(Y), half)
    second = ppl.infer(linear_gaussian(Y), half, state=first.state, seed=99)
    parts = [np.asarray(p.sites["x"]).reshape(2, 10, -1) for p in (first, second)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), np.asarray(whole.sites["x"]).reshape(2, 20, -1))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ParticleGibbs(SMC(1)), "at least 2 particles"),
        (lambda: ParticleGibbs("smc"), "must be an SMC"),
        (lambda: ParticleGibbs(SMC(4, lookahead=Lookahead())), "lookahead"),
        (lambda: ParticleGibbs(SMC(4, resampler=lambda key, w, n: jnp.arange(n))), "conditional form"),
        (lambda: ParticleGibbs(SMC(4, corrector="none")), "unbiased"),
        (lambda: ParticleGibbs(SMC(4), ancestor_sampling=True, backward_sampling=True), "choose one"),
    ],
)
def test_what_has_no_conditional_form_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_backward_sampling_says_what_it_needs():
    kernel = ParticleGibbs(SMC(4), backward_sampling=True)
    with pytest.raises(ppl.SiteTypeError, match="ancestor_sampling=True"):
        ppl.infer(remembering(OBSERVATIONS), MCMC(kernel, 10))


def test_sites_that_do_not_exist_are_named():
    with pytest.raises(ppl.SiteValueError, match="'z'.*'x'"):
        ppl.infer(hidden_markov(OBSERVATIONS), MCMC(ParticleGibbs(SMC(4), sites="z"), 10))


def test_another_data_set_and_seed_compile_nothing():
    run = MCMC(ParticleGibbs(SMC(4)), 10)
    other = Y + 1.0
    finished(ppl.infer(linear_gaussian(Y), run).value)
    finished(jax.random.key(3))
    with compilations() as compiled:
        finished(ppl.infer(linear_gaussian(other), run, seed=3).value)
    assert not compiled
