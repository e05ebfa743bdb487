"""Mixtures and data sets: densities, scores and denoised values against their definitions, at every level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.models import EDM, EmpiricalData, GaussianMixture, RectifiedFlow, VarianceExploding, VariancePreserving

SCHEDULES = {
    "linear": VariancePreserving(),
    "cosine": VariancePreserving("cosine"),
    "exploding": VarianceExploding(0.02, 30.0),
    "from zero": VarianceExploding(0.02, 30.0, from_zero=True),
    "edm": EDM(),
    "flow": RectifiedFlow(),
    "shifted flow": RectifiedFlow(3.0),
}
TIMES = (0.0, 0.003, 0.2, 0.5, 0.9, 0.999, 1.0)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)

MEANS = np.random.default_rng(0).normal(3.0, 2.0, (5, 2, 3))
WEIGHTS = np.array([1.0, 2.0, 0.5, 3.0, 1.5])
SCALES = {"one scale": 0.4, "many scales": np.array([0.3, 0.9, 0.5, 1.4, 0.2])}
every_scale = pytest.mark.parametrize("scales", SCALES)


def log_density(x, alpha, sigma, means, scales, weights):
    """Equation (1) of the module, written out in float64."""
    x, size = np.asarray(x), means[0].size
    total = alpha**2 * np.asarray(scales, np.float64) ** 2 + sigma**2 + np.zeros(len(means))
    squares = ((x - alpha * means) ** 2).reshape(len(means), -1).sum(1)
    terms = np.log(weights / weights.sum()) - 0.5 * (squares / total + size * np.log(2 * np.pi * total))
    return np.logaddexp.reduce(terms)


def points(alpha, sigma, num=4):
    """Points where the noisy data are, and beyond."""
    rng = np.random.default_rng(1)
    spread = np.array([0.5, 1.0, 2.0, 3.0])[:num, None, None]
    return alpha * MEANS[:num] + spread * np.hypot(sigma, 0.4 * alpha) * rng.normal(size=(num, 2, 3))


@every_schedule
@every_scale
def test_log_density_is_the_definition_at_every_level(name, scales):
    schedule = SCHEDULES[name]
    with jax.enable_x64(True):
        model = GaussianMixture(MEANS, SCALES[scales], WEIGHTS).diffuse(schedule)
        for t in TIMES:
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            for x in points(alpha, sigma):
                wanted = log_density(x, alpha, sigma, MEANS, SCALES[scales], WEIGHTS)
                np.testing.assert_allclose(model.log_density(x, t), wanted, rtol=1e-11, atol=1e-11)


@every_schedule
@every_scale
def test_score_and_denoised_value_are_those_of_the_density_at_every_level(name, scales):
    """Tweedie: alpha D = x + sigma^2 grad log q; where there is no data D is their mean, without noise x / alpha."""
    schedule = SCHEDULES[name]
    with jax.enable_x64(True):
        model = GaussianMixture(MEANS, SCALES[scales], WEIGHTS).diffuse(schedule)
        gradient, score, denoise = (
            jax.jit(jax.vmap(f, (0, None))) for f in (jax.grad(model.log_density), model.score, model.denoise)
        )
        for t in TIMES:
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            x = points(alpha, sigma)
            slope = np.asarray(gradient(x, t))
            np.testing.assert_allclose(score(x, t), slope, rtol=1e-9, atol=1e-9 * np.abs(slope).max())
            denoised = denoise(x, t)
            np.testing.assert_allclose(alpha * denoised, x + sigma**2 * slope, rtol=1e-8, atol=1e-11)
            if alpha == 0:
                mean = np.tensordot(WEIGHTS / WEIGHTS.sum(), MEANS, 1)
                np.testing.assert_allclose(denoised, np.broadcast_to(mean, x.shape), rtol=1e-12)
            if sigma == 0:
                np.testing.assert_allclose(denoised, x / alpha, rtol=1e-12)


@every_schedule
def test_data_sets_are_mixtures_of_points(name):
    schedule, weights = SCHEDULES[name], np.ones(5)
    with jax.enable_x64(True):
        model = EmpiricalData(MEANS).diffuse(schedule)
        for t in TIMES:
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            for x in points(alpha, sigma):
                denoised = model.denoise(x, t)
                if sigma == 0:  # the density is no more, the denoised value is its limit
                    np.testing.assert_allclose(denoised, x / alpha, rtol=1e-12)
                    assert np.all(np.isfinite(model.score(x, t)))
                    continue
                np.testing.assert_allclose(
                    model.log_density(x, t), log_density(x, alpha, sigma, MEANS, 0.0, weights), rtol=1e-10, atol=1e-10
                )
                slope = jax.grad(model.log_density)(jnp.asarray(x), t)
                np.testing.assert_allclose(model.score(x, t), slope, rtol=1e-8)
                np.testing.assert_allclose(alpha * denoised, x + sigma**2 * slope, rtol=1e-8, atol=1e-11)


@every_schedule
@pytest.mark.parametrize("t", [0.0, 0.02, 0.5, 1.0])
def test_float32_is_right_at_every_level(name, t):
    """The density, score and denoised value in float32 against those in float64, far from the origin."""
    schedule, means = SCHEDULES[name], MEANS + 20.0
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = points(alpha, sigma) + alpha * 20.0
    x = x.astype(np.float32).astype(np.float64)

    def found():
        model = GaussianMixture(means, SCALES["many scales"], WEIGHTS).diffuse(schedule)
        return [np.asarray(jax.vmap(f, (0, None))(x, t)) for f in (model.log_density, model.score, model.denoise)]

    narrow = found()
    with jax.enable_x64(True):
        wide = found()
    # x itself is only known to float32: a relative step of 2^-24 in x changes these by its size times a slope.
    unit = np.abs(x).max() * np.finfo(np.float32).eps
    spread = np.hypot(0.2 * alpha, sigma)
    slopes = [np.abs(wide[1]).max(), 1 / spread**2, 1 / max(alpha, 0.2)]
    for got, wanted, slope in zip(narrow, wide, slopes, strict=True):
        tolerance = 10 * (unit * slope + np.finfo(np.float32).eps * np.abs(wanted).max())
        assert np.abs(got - wanted).max() < tolerance, (got, wanted, tolerance)


@pytest.mark.parametrize("label", [1, 2])
def test_labels_condition_the_data(label):
    labels = np.array([1, 1, 2, 2, 1])
    model = EmpiricalData(MEANS, labels).diffuse(RectifiedFlow()).given(label=label)
    alone = EmpiricalData(MEANS[labels == label]).diffuse(RectifiedFlow())
    x = points(0.5, 0.5)[0]
    np.testing.assert_allclose(model.denoise(x, 0.5), alone.denoise(x, 0.5), rtol=1e-6)
    np.testing.assert_allclose(model.log_density(x, 0.5), alone.log_density(x, 0.5), rtol=1e-6)
    assert model.scale == pytest.approx(alone.scale) and f"label={label}" in repr(model)


def test_classes_of_a_data_set_make_up_the_whole():
    """q = sum_c w_c q_c, so that scores are the mean of the classes', by their posterior probabilities."""
    labels = np.array([0, 1, 1, 2, 0])
    with jax.enable_x64(True):
        model = EmpiricalData(MEANS, labels).diffuse(VariancePreserving())
        classes = [model.given(label=c) for c in range(3)]
        x, t = points(0.5, 0.8)[1], 0.4
        logs = np.array([c.log_density(x, t) for c in classes]) + np.log(np.bincount(labels) / 5)
        assert float(model.log_density(x, t)) == pytest.approx(np.logaddexp.reduce(logs), rel=1e-12)
        chance = np.exp(logs - np.logaddexp.reduce(logs))
        mixed = sum(p * np.asarray(c.score(x, t)) for p, c in zip(chance, classes, strict=True))
        np.testing.assert_allclose(model.score(x, t), mixed, rtol=1e-9)


@every_scale
def test_draws_have_the_moments_of_the_mixture(scales):
    mixture = GaussianMixture(MEANS, SCALES[scales], WEIGHTS)
    draws = np.asarray(mixture.sample(jax.random.key(0), 20_000), np.float64)
    weights = WEIGHTS / WEIGHTS.sum()
    mean = np.tensordot(weights, MEANS, 1)
    square = np.tensordot(weights, MEANS**2, 1) + weights @ (np.asarray(SCALES[scales]) ** 2 + np.zeros(5))
    for values, wanted in ((draws, mean), (draws**2, square)):
        error = values.std(0) / np.sqrt(len(values))
        assert np.all(np.abs(values.mean(0) - wanted) < 5 * error)
    model = mixture.diffuse(RectifiedFlow())
    assert model.scale == pytest.approx(np.sqrt((square - mean**2).mean()), rel=1e-6)
    np.testing.assert_allclose(model.mean, mean, rtol=1e-6)


def test_measured_error_of_the_denoised_value_is_that_of_quadrature():
    """E |x_0 - D|^2 in one dimension; the table is a mean over 8192 draws at each level."""
    means, scale, weights = np.array([[-2.0], [0.5], [2.0]]), 0.3, np.array([0.5, 0.2, 0.3])
    model = GaussianMixture(means, scale, weights).diffuse(VarianceExploding(0.01, 20.0))
    sigma = np.array([0.05, 0.3, 0.7, 1.5, 4.0, 15.0])
    found = model.denoising_error(np.log(sigma))
    for s, got in zip(sigma, found, strict=True):
        x = np.linspace(-2 - 9 * np.hypot(s, scale), 2 + 9 * np.hypot(s, scale), 20_001)
        total = s**2 + scale**2
        density = weights * np.exp(-0.5 * (x[:, None] - means.T) ** 2 / total) / np.sqrt(2 * np.pi * total)
        own = (s**2 * means.T + scale**2 * x[:, None]) / total
        chance = density / density.sum(1, keepdims=True)
        denoised = (chance * own).sum(1)
        spread = (chance * (own - denoised[:, None]) ** 2).sum(1) + s**2 * scale**2 / total
        exact = np.sum(density.sum(1) * spread) * (x[1] - x[0])
        assert got == pytest.approx(exact, rel=0.12), s


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GaussianMixture(np.zeros((3, 2)), 0.0), "`scales` must be positive"),
        (lambda: GaussianMixture(np.zeros((3, 2)), np.ones(2)), r"`scales` must be a finite number or have shape \(3,"),
        (lambda: GaussianMixture(np.zeros((3, 2)), 1.0, [1.0, 0.0, 1.0]), "`weights` must be positive"),
        (lambda: GaussianMixture(np.full((3, 2), np.nan), 1.0), "`means` must be finite"),
        (lambda: GaussianMixture(np.zeros((0, 2)), 1.0), "`means` must be finite"),
        (lambda: EmpiricalData(np.zeros((3, 2)), labels=[1, 2]), r"`labels` must have shape \(3,\), got \(2,\)"),
        (lambda: EmpiricalData(np.array([[np.inf]])), "`data` must be finite"),
        (lambda: EmpiricalData(np.zeros((3, 2))).diffuse(EDM()).given(label=1), "has no labels"),
        (
            lambda: EmpiricalData(np.zeros((3, 2)), [1, 2, 2]).diffuse(EDM()).given(label=3),
            r"`label` must be one of \[1, 2\], got 3",
        ),
    ],
)
def test_impossible_data_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
