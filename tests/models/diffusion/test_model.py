"""`Diffusion`: what the denoiser sees, what is made of its output, other schedules, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC
from ppl.models import EDM, Diffusion, EmpiricalData, GaussianMixture, RectifiedFlow, VariancePreserving
from ppl.models.diffusion import Tabulated
from ppl.models.diffusion.predictions import from_denoised

MEAN, SCALE = 0.7, 0.5
FLOW = RectifiedFlow()
TABLE = Tabulated(tuple(np.linspace(0.999, 0.01, 11) ** 2))


def exact(schedule, predicts="x0"):
    """The network of Gaussian data, in closed form, as any prediction."""

    def denoiser(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        total = alpha**2 * SCALE**2 + sigma**2
        denoised = (sigma**2 * MEAN + alpha * SCALE**2 * x) / total
        return from_denoised(predicts, denoised, x, alpha, sigma, schedule.alpha_rate(t), schedule.sigma_rate(t))

    return denoiser


@pytest.mark.parametrize("predicts", ["x0", "epsilon", "v", "velocity", "score"])
def test_all_predictions_give_the_same_samples(predicts):
    schedule = VariancePreserving()
    settings = {"mean": MEAN, "scale": SCALE, "error": ([-6.0, 6.0], [1e-4, 0.25])}
    model = Diffusion(exact(schedule, predicts), (3,), schedule, predicts, **settings)
    other = Diffusion(exact(schedule), (3,), schedule, "x0", **settings)
    values = [ppl.infer(m.reverse(8), SMC(4), seed=1).value for m in (model, other)]
    assert np.allclose(*values, atol=2e-4)


def test_flow_model_on_a_variance_preserving_path():
    schedule = VariancePreserving()
    model = Diffusion(exact(FLOW, "velocity"), (2,), FLOW, "velocity", mean=MEAN, scale=SCALE).on(schedule)
    x = jnp.array([0.3, -1.2])
    for t in (0.02, 0.4, 0.9):
        assert np.allclose(model.denoise(x, t), exact(schedule)(x, jnp.float32(t)), atol=1e-5)
    known = GaussianMixture(np.zeros((1, 2)) + MEAN, SCALE).diffuse(FLOW).on(schedule)
    assert np.allclose(known.denoise(x, 0.4), model.denoise(x, 0.4), atol=1e-5)
    values = np.asarray(ppl.infer(model.reverse(60), SMC(4000), seed=0).value)
    error = SCALE / np.sqrt(values.size)
    assert abs(values.mean() - MEAN) < 5 * error + 0.01
    assert abs(values.std() / SCALE - 1) < 5 / np.sqrt(2 * values.size) + 0.01


def test_what_the_denoiser_is_given():
    seen = {}

    def denoiser(x, level, label=0, name=None):
        seen.update(level=level, label=label, name=name)
        return x

    x = jnp.zeros(2)
    Diffusion(denoiser, 2, EDM(), "x0").denoise(x, 0.5)
    assert np.isclose(seen["level"], 0.5)
    Diffusion(denoiser, 2, EDM(), "x0", conditioning="sigma").denoise(x, 0.5)
    assert np.isclose(seen["level"], EDM().sigma(0.5), rtol=1e-6)
    Diffusion(denoiser, 2, TABLE, "x0", conditioning="step").denoise(x, 0.5)
    assert np.isclose(seen["level"], 5.0)
    model = Diffusion(denoiser, 2, EDM(), "x0").given(label=3).given(name="five")
    model.denoise(x, 0.5)
    assert seen["label"] == 3 and seen["name"] == "five"
    assert "label=3" in repr(model)


def test_pilot_run_measures_the_error_of_a_network():
    schedule = VariancePreserving()
    model = Diffusion(exact(schedule), (16,), schedule, "x0", mean=MEAN, scale=SCALE)
    ratios = np.array([-2.0, -0.5, 0.0, 1.0, 3.0])
    squared = np.exp(2 * ratios)
    truth = SCALE**2 * squared / (SCALE**2 + squared)
    assert np.allclose(model.denoising_error(ratios), truth, rtol=0.1)
    known = GaussianMixture(np.zeros((1, 16)), SCALE).diffuse(schedule)
    assert np.allclose(known.denoising_error(ratios), truth, rtol=0.02)


def test_labels_condition_a_data_set():
    data = np.array([[-1.0, 0.0], [-1.2, 0.1], [1.0, 2.0]])
    model = EmpiricalData(data, [0, 0, 1]).diffuse(VariancePreserving())
    one = model.given(label=1)
    values = np.asarray(ppl.infer(one.reverse(20), SMC(8)).value)
    assert np.allclose(values, data[2], atol=0.1)
    with pytest.raises(ValueError, match=r"`label` must be one of \[0, 1\], got 5"):
        model.given(label=5)
    with pytest.raises(ValueError, match="no labels"):
        EmpiricalData(data).diffuse(VariancePreserving()).given(label=0)


def build(**changes):
    settings = {"denoiser": lambda x, t: x, "shape": (2,), "schedule": VariancePreserving()} | changes
    return Diffusion(settings.pop("denoiser"), settings.pop("shape"), settings.pop("schedule"), **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predicts": "noise"}, "`predicts` must be one of 'epsilon'"),
        ({"conditioning": "time"}, "`conditioning` must be 't', 'sigma' or 'step'"),
        ({"conditioning": "step"}, "needs a schedule with steps"),
        ({"scale": -1.0}, "`scale` must be a positive number"),
        ({"mean": np.zeros(3)}, "`mean` must be a number or have the shape"),
        ({"error": ([0.0, 1.0], [0.1])}, "`error` must be a pair"),
        ({"error": ([1.0, 0.0], [0.1, 0.2])}, "`error` must be a pair"),
    ],
)
def test_bad_models(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build(**changes)


def test_bad_denoisers_and_schedules():
    with pytest.raises(TypeError, match="`denoiser` must be a function"):
        build(denoiser=3)
    with pytest.raises(TypeError, match="`schedule` must be a Schedule"):
        build(schedule="cosine")
    with pytest.raises(ValueError, match=r"shape \(2,\) for one x of that shape, got shape \(3,\)"):
        build(denoiser=lambda x, t: jnp.zeros(3)).reverse(4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be an int of at least 1"),
        ({"num_steps": 4, "variance": "small"}, "`variance` must be one of 'matched'"),
        ({"num_steps": 4, "churn": -1.0}, "`churn` must be a number of at least 0"),
        ({"num_steps": 4, "grid": "log"}, "`grid` must be None, 'time' or"),
        ({"num_steps": 4, "grid": [1.0, 0.5, 0.1]}, "must have 5 times"),
        ({"num_steps": 2, "grid": [0.1, 0.5, 1.0]}, "must fall within"),
    ],
)
def test_bad_processes(settings, message):
    model = build(error=([-6.0, 6.0], [0.1, 0.5]))
    with pytest.raises(ValueError, match=message):
        model.reverse(**settings)


def test_score_is_the_gradient_of_the_log_density_of_an_energy():
    schedule = VariancePreserving()

    def log_density(x, t):
        total = schedule.alpha(t) ** 2 * SCALE**2 + schedule.sigma(t) ** 2
        return -0.5 * jnp.sum((x - schedule.alpha(t) * MEAN) ** 2) / total

    model = Diffusion(None, (2,), schedule, log_density=log_density, mean=MEAN, scale=SCALE)
    x = jnp.array([0.4, -0.3])
    assert np.allclose(model.score(x, 0.5), jax.grad(log_density)(x, 0.5), rtol=1e-4)
    assert np.allclose(model.denoise(x, 0.5), exact(schedule)(x, jnp.float32(0.5)), rtol=1e-4)
