"""SMC squared: properly weighted in every run of finite programs, and the evidence of a Gaussian walk."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import PMMH, SMC, SMC2, EntropicAnnealing
from ppl.inference import smc2 as module
from ppl.testing import assert_properly_weighted
from tests.ppl.checks import assert_mean_within_5_standard_errors, repeat


@ppl.model
def three_steps(certain):
    """Steps that are certain where told so, which keeps the number of runs small."""
    bias = ppl.sample("bias", dist.Bernoulli(0.75), proposal=dist.Bernoulli(0.5))
    ppl.factor("first", 0.3 * bias)

    def step(state, xs):
        t, certain = xs
        state = ppl.sample("x", dist.Bernoulli(logits=jnp.where(certain, 1e4, 0.3 + 0.3 * state - bias)))
        ppl.factor("y", 0.5 * state * bias - 0.4 * t * bias)
        return state, state

    last, path = ppl.scan(step, 0, (jnp.arange(3), certain))
    ppl.factor("last", 0.5 * bias * last)
    return {"bias": bias, "path": path}


def flip(sites):
    return {"bias": dist.Bernoulli(logits=1e4 * (1.0 - 2.0 * sites["bias"]))}


# Copies with a common future, resampled and moved while it lies ahead; and populations of two.
OUTER = three_steps(jnp.array([True, True, False])), SMC2(2, SMC(1), "bias", flip, ess_threshold=1.0, move_every=2)
INNER = three_steps(jnp.array([True, False, True])), SMC2(1, SMC(2, ess_threshold=0.0), "bias", flip, move_every=2)


@pytest.mark.parametrize("program, algorithm", [OUTER, INNER], ids=["outer", "inner"])
def test_every_run_is_properly_weighted(program, algorithm):
    assert_properly_weighted(program, algorithm)


def test_moves_that_look_at_later_evidence_would_be_seen(monkeypatch):
    class Foreseeing(module._Population):
        def moved(self, key, particles, log_weights, t):
            return super().moved(key, particles, log_weights, t + 1)

    monkeypatch.setattr(module, "_Population", Foreseeing)
    program = three_steps(jnp.array([True, True, True]))
    with pytest.raises(AssertionError, match="is not properly weighted"):
        assert_properly_weighted(program, SMC2(2, SMC(1, ess_threshold=0.0), "bias", flip, move_every=2))


YS = np.array([0.3, 1.1, 0.9, 2.0])


@ppl.model
def walk(observations):
    drift = ppl.sample("drift", dist.Normal(0.0, 1.0), proposal=dist.Normal(0.3, 1.2))
    noise = ppl.sample("noise", dist.LogNormal(-0.5, 0.5))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + drift, 1.0))
        ppl.observe("y", dist.Normal(x, noise), y)
        return x, x

    ppl.scan(step, 0.0, observations)
    return jnp.stack([drift, jnp.log(noise)])


PROGRAM = walk(jnp.asarray(YS, jnp.float32))


def walk_exactly():
    """Given the noise the walk is Gaussian in (path, drift); log noise is integrated by quadrature, in float64."""
    times = np.arange(1, 5)
    log_noise, rule = np.polynomial.hermite_e.hermegauss(60)
    log_noise = -0.5 + 0.5 * log_noise
    mass, drift = np.zeros(60), np.zeros(60)
    for i, s in enumerate(np.exp(log_noise)):
        covariance = np.minimum.outer(times, times) + np.outer(times, times) + s**2 * np.eye(4)
        solved = np.linalg.solve(covariance, YS)
        mass[i] = np.exp(-0.5 * (YS @ solved + np.linalg.slogdet(2 * np.pi * covariance)[1]))
        drift[i] = times @ solved
    mass *= rule / rule.sum()
    return np.log(mass.sum()), np.array([mass @ drift, mass @ log_noise]) / mass.sum()


def test_evidence_and_posterior_of_a_gaussian_walk():
    """The walk's steps are unconstrained: the Jacobian of the noise counts in every acceptance."""
    algorithm = SMC2(8, SMC(8), ["drift", "noise"], scale=(0.8, 0.5), move_every=2, ess_threshold=0.7)
    assert algorithm.guarantee == "unbiased"
    log_z, means = walk_exactly()

    def estimates(posterior):
        weight = jnp.exp(posterior.log_evidence - log_z)
        return weight * jnp.append(posterior.expectation(lambda v: v), 1.0)

    samples = repeat(PROGRAM, algorithm, estimates, 250)
    assert_mean_within_5_standard_errors(samples, np.append(means, 1.0))


def test_moves_are_made_where_the_population_is_uneven():
    posterior = ppl.infer(PROGRAM, SMC2(64, SMC(16), ["drift", "noise"], num_moves=2), seed=1)
    figures = {name: np.asarray(figure) for name, figure in posterior.diagnostics.items()}
    assert posterior.guarantee == "consistent" and posterior.num_particles == 64
    np.testing.assert_array_equal(figures["resampled"], figures["ess"] < 32)
    np.testing.assert_array_equal(figures["moved"], figures["resampled"])
    assert figures["moved"].any() and figures["acceptance"][figures["moved"]].min() > 0.05
    assert np.all(figures["acceptance"][~figures["moved"]] == 0)
    assert posterior.sites["x"].shape == (64, 4) and figures["ancestors"].shape == (4, 64)
    assert float(posterior.log_evidence_error) > 0


@ppl.model
def late(observations):
    start = ppl.sample("start", dist.Normal(0.0, 1.0))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x, 1.0))
        ppl.observe("y", dist.Normal(x, 1.0), y)
        return x, x

    last, _ = ppl.scan(step, start, observations)
    return ppl.sample("end", dist.Normal(last, 1.0))


@pytest.mark.parametrize("name", ["x", "end"])
def test_parameters_are_drawn_before_the_loop(name):
    with pytest.raises(ValueError, match=rf"`parameters` \['{name}'\] are drawn in the loop or after it.*\['start'\]"):
        ppl.infer(late(jnp.zeros(2)), SMC2(4, SMC(4), name))


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"smc": PMMH("drift", SMC(8), scale=1.0)}, TypeError, "`smc` must be an SMC"),
        ({"smc": SMC(8, annealing=EntropicAnnealing(mode="ess"))}, ValueError, "must be unbiased"),
        ({"smc": SMC(8, rejuvenation=PMMH("drift", SMC(8), scale=1.0))}, ValueError, "cannot run inside SMC2"),
        ({"num_parameters": 0}, ValueError, "`num_parameters` must be at least 1"),
        ({"move_every": 0}, ValueError, "`move_every` must be at least 1"),
        ({"proposal": flip, "scale": 1.0}, ValueError, "leave one out"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        SMC2(**({"num_parameters": 8, "smc": SMC(8), "parameters": "drift"} | settings))
