"""Entropic annealing in SMC: the exact form's bookkeeping, the published form's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, EntropicAnnealing
from ppl.kernels import annealing
from ppl.kernels.weights import summarize


@ppl.model
def walk(observations):
    def step(x, y):
        x = ppl.sample("x", dist.Normal(x, 1.0))
        ppl.observe("y", dist.Normal(x, 0.3), y)
        return x, x

    return ppl.scan(step, 0.0, observations)[1]


OBSERVATIONS = jnp.array([0.5, 2.0, 3.0, 3.5, 1.0, -1.0])


def run(annealing, **settings):
    return ppl.infer(walk(OBSERVATIONS), SMC(64, annealing=annealing, ess_threshold=1.0, **settings), seed=1)


def exact_log_evidence():
    mean, variance, total = 0.0, 0.0, 0.0
    for y in np.asarray(OBSERVATIONS, np.float64):
        variance += 1.0
        spread = variance + 0.09
        total += -0.5 * (np.log(2 * np.pi * spread) + (y - mean) ** 2 / spread)
        gain = variance / spread
        mean, variance = mean + gain * (y - mean), variance * (1 - gain)
    return total


def test_exact_annealing_keeps_the_evidence_unbiased():
    keys = jax.random.split(jax.random.key(0), 2000)
    algorithm = SMC(64, annealing=EntropicAnnealing(ess=0.6), ess_threshold=1.0)
    found = jax.jit(jax.vmap(lambda key: ppl.infer(walk(OBSERVATIONS), algorithm, key=key).log_evidence))(keys)
    ratios = np.exp(np.asarray(found, np.float64) - exact_log_evidence())
    assert abs(ratios.mean() - 1) < 5 * ratios.std() / np.sqrt(len(ratios))


def test_exact_annealing_draws_from_weights_as_even_as_asked():
    posterior = run(EntropicAnnealing(ess=0.6))
    temperatures, ess = posterior.diagnostics["temperature"], posterior.diagnostics["ess"]
    assert temperatures.shape == (6,)
    np.testing.assert_array_equal(temperatures > 1, ess < 0.6 * 64)
    assert posterior.guarantee == "unbiased" and np.isfinite(posterior.log_evidence)


def test_exact_annealing_at_a_fraction_already_reached_is_plain_resampling():
    plain = ppl.infer(walk(OBSERVATIONS), SMC(64, ess_threshold=1.0), seed=1)
    annealed = run(EntropicAnnealing(ess=1 / 64))
    np.testing.assert_array_equal(annealed.diagnostics["temperature"], 1.0)
    np.testing.assert_array_equal(annealed.diagnostics["ancestors"], plain.diagnostics["ancestors"])
    assert annealed.log_evidence == pytest.approx(float(plain.log_evidence), abs=1e-5)


def test_exact_annealing_to_equal_weights_keeps_every_particle():
    posterior = run(EntropicAnnealing(ess=1.0))
    np.testing.assert_array_equal(posterior.diagnostics["ancestors"], np.tile(np.arange(64), (6, 1)))
    never = ppl.infer(walk(OBSERVATIONS), SMC(64, ess_threshold=0.0), seed=1)
    assert posterior.log_evidence == pytest.approx(float(never.log_evidence), rel=1e-5)


@pytest.mark.parametrize("mode", ["ess", "entropy", "base"])
def test_published_temperatures_follow_their_formula(mode):
    log_weights = jnp.array([0.0, -3.0, -4.0, -9.0], jnp.float32)
    weights = np.exp(np.asarray(log_weights, np.float64))
    weights /= weights.sum()
    share, entropy = 1 / np.sum(weights**2) / 4, -np.sum(weights * np.log(weights)) / np.log(4)
    rule = EntropicAnnealing(mode=mode)
    weighing = summarize(log_weights)
    for progress in (0.1, 0.3, 0.49):
        expected = {
            "ess": max(1, (1 - progress) / share),
            "entropy": max(1, 1 / (entropy + (1 - entropy) * progress)),
            "base": 2 - progress,
        }[mode]
        assert rule.temperature(log_weights, weighing, progress) == pytest.approx(expected, rel=1e-5)
    assert rule.temperature(log_weights, weighing, 0.5) == 1  # no longer the early phase
    assert rule.temperature(jnp.zeros(4), summarize(jnp.zeros(4)), 0.1) == 1  # even enough


def test_published_annealing_is_heuristic_and_says_so():
    algorithm = SMC(64, annealing=EntropicAnnealing(mode="ess"), ess_threshold=1.0)
    posterior = ppl.infer(walk(OBSERVATIONS), algorithm, seed=1)
    assert algorithm.guarantee == posterior.guarantee == "heuristic"
    assert np.isnan(posterior.log_evidence) and np.isnan(posterior.diagnostics["log_evidence"]).all()
    assert bool(posterior.status.ok) and "heuristic" in repr(posterior)
    temperatures = np.asarray(posterior.diagnostics["temperature"])
    assert (temperatures[:2] > 1).any() and (temperatures[2:] == 1).all()  # steps 1 and 2 of 6 are early
    np.testing.assert_allclose(posterior.log_weights, -np.log(64), rtol=1e-6)


def test_annealing_with_dead_particles_never_draws_one():
    @ppl.model
    def model():
        def step(x, _):
            x = ppl.sample("x", dist.Normal(0.0, 1.0))
            ppl.factor("positive", jnp.where(x > 0.3, -x, -jnp.inf))
            return x, x

        return ppl.scan(step, 0.0, length=4)[1]

    for rule in (EntropicAnnealing(ess=1.0), EntropicAnnealing(entropy=0.9), EntropicAnnealing(mode="base")):
        posterior = ppl.infer(model(), SMC(200, annealing=rule, ess_threshold=1.0), seed=0)
        assert (np.asarray(posterior.value) > 0.3).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ess": 0.5, "entropy": 0.5}, "Give one of"),
        ({"ess": 0.5, "mode": "ess"}, "Give one of"),
        ({"ess": 0.0}, "`ess` is a fraction"),
        ({"entropy": 1.5}, "`entropy` is a fraction"),
        ({"mode": "warm"}, "`mode` must be one of 'ess', 'entropy', 'base', got 'warm'"),
        ({"early_phase": 2.0}, "`early_phase` is a fraction"),
    ],
)
def test_annealing_refuses_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        EntropicAnnealing(**settings)


def test_annealing_refuses_other_types():
    with pytest.raises(TypeError, match="`ess` must be a number"):
        EntropicAnnealing(ess="half")
    with pytest.raises(TypeError, match="`annealing` must be an EntropicAnnealing"):
        SMC(4, annealing=0.5)


def test_temperature_kernel_is_what_the_exact_form_asks():
    log_weights = jnp.array([0.0, -2.0, -5.0])
    rule = EntropicAnnealing(entropy=0.9)
    found = rule.temperature(log_weights, summarize(log_weights), 0.5)
    assert found == annealing.temperature(log_weights, entropy=0.9)
