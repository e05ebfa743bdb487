"""The estimate of a particle's log-density against exact ones, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.inference.correctors.ito import Reference, curvature, divergence, log_density_change, next_log_density
from ppl.models import GaussianMixture, VariancePreserving

MIXTURE = GaussianMixture([[-2.0, 0.5], [1.0, 1.5], [1.5, -2.0]], [0.4, 0.7, 0.5], [0.3, 0.5, 0.2])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def levels(model, steps):
    process = model.reverse(steps, variance="noising")
    return process, [process.level(k) for k in range(steps + 1)]


def squared(level):
    return (level.sigma / level.alpha) ** 2


def estimate_errors(mixture, steps, particles, *, speed=1.0, reference=None):
    """Errors of the estimate at the last level, along paths with `speed` times the drift of the model's own."""
    model = mixture.diffuse(VariancePreserving())
    process, _ = levels(model, steps)

    def path(key):
        def step(carry, inputs):
            x, log_density = carry
            k, key = inputs
            before, after = process.level(k), process.level(k + 1)
            fall = squared(before) - squared(after)
            denoised = model.denoise_at(x, before)
            y = x / before.alpha
            pull = (denoised - y) / squared(before)
            y = y + speed * fall * pull + jnp.sqrt(fall) * jax.random.normal(key, x.shape)
            x_next = after.alpha * y
            return (x_next, next_log_density(log_density, x, denoised, x_next, before, after, reference)), None

        start_key, key = jax.random.split(key)
        first = process.level(0)
        x = first.sigma * jax.random.normal(start_key, model.shape)
        inputs = jnp.arange(steps), jax.random.split(key, steps)
        (x, log_density), _ = jax.lax.scan(step, (x, model.log_density_at(x, first)), inputs)
        return log_density - model.log_density_at(x, process.level(steps))

    return np.asarray(jax.jit(jax.vmap(path))(jax.random.split(jax.random.key(0), particles)))


def own_reference(mixture):
    model = mixture.diffuse(VariancePreserving())
    return Reference(model.mean, model.scale**2)


def test_estimate_with_its_own_reference_is_exact_for_a_gaussian():
    gaussian = GaussianMixture([[1.0, -2.0]], 0.6)
    for speed in (0.0, 1.7):
        errors = estimate_errors(gaussian, 20, 50, speed=speed, reference=own_reference(gaussian))
        assert np.abs(errors).max() < 1e-9


@pytest.mark.parametrize("mixture", [GaussianMixture([[1.0, -2.0]], 0.6), MIXTURE], ids=["gaussian", "mixture"])
def test_error_falls_as_one_over_the_root_of_the_steps_and_its_mean_as_one_over_steps(mixture):
    few, many = (estimate_errors(mixture, steps, 4000, speed=1.2) for steps in (100, 900))
    assert 2.4 < few.std() / many.std() < 3.6
    noise, noise_many = few.std() / np.sqrt(4000), many.std() / np.sqrt(4000)
    assert abs(few.mean()) > 5 * noise
    assert abs(many.mean() - few.mean() / 9) < 0.3 * abs(few.mean()) / 9 + 5 * np.hypot(noise / 9, noise_many)


def test_reference_leaves_less_to_estimate_whatever_its_scale():
    plain = estimate_errors(MIXTURE, 100, 2000)
    for reference in (own_reference(MIXTURE), Reference(0.0, 1.0)):
        assert estimate_errors(MIXTURE, 100, 2000, reference=reference).std() < 0.6 * plain.std()


def flow_errors(steps, averaged):
    """Errors along the probability-flow differential equation, solved by Heun's method in T."""
    model = MIXTURE.diffuse(VariancePreserving())
    process, _ = levels(model, steps)
    basis = jnp.eye(2)

    def score_and_divergence(y, level):
        denoise = lambda x: model.denoise_at(x, level)  # noqa: E731
        x = level.alpha * y
        return (denoise(x) - y) / squared(level), curvature(denoise, x, level, basis)

    def path(y):
        def step(carry, k):
            y, log_density = carry
            before, after = process.level(k), process.level(k + 1)
            fall = squared(before) - squared(after)
            score, spread = score_and_divergence(y, before)
            score_next, spread_next = score_and_divergence(y + 0.5 * fall * score, after)
            change = 0.25 * fall * (score + score_next)
            if averaged:
                score, spread = (score + score_next) / 2, (spread + spread_next) / 2
            return (y + change, log_density + log_density_change(score, change, fall, spread)), None

        first, last = process.level(0), process.level(steps)
        start = model.log_density_at(first.alpha * y, first) + 2 * jnp.log(first.alpha)
        (y, log_density), _ = jax.lax.scan(step, (y, start), jnp.arange(steps))
        return log_density - model.log_density_at(last.alpha * y, last) - 2 * jnp.log(last.alpha)

    first = process.level(0)
    starts = first.sigma / first.alpha * jax.random.normal(jax.random.key(1), (200, 2))
    return np.asarray(jax.jit(jax.vmap(path))(starts))


def test_differential_equations_estimate_has_the_order_of_its_scores():
    for averaged, factor in ((False, 4.0), (True, 16.0)):
        few, many = (np.median(np.abs(flow_errors(steps, averaged))) for steps in (200, 800))
        assert 0.75 * factor < few / many < 1.3 * factor, (averaged, few, many)


def test_curvature_is_that_of_the_log_density_and_hutchinsons_estimate_has_its_trace():
    model = MIXTURE.diffuse(VariancePreserving())
    level, x, direction = model.level(0.4), jnp.array([0.3, -0.4]), jnp.array([0.6, 0.8])
    denoise = lambda x: model.denoise_at(x, level)  # noqa: E731

    @jax.jit
    def found():
        hessian = jax.hessian(lambda y: model.log_density_at(level.alpha * y, level))(x / level.alpha)
        along = [curvature(denoise, x, level, v) for v in (direction[None], jnp.eye(2), jnp.zeros((1, 2)))]
        keys = jax.random.split(jax.random.key(2), 4000)
        probed = [jax.vmap(lambda key, n=n: divergence(denoise, x, level, key, n))(keys) for n in (1, 4)]
        return hessian, along, probed

    hessian, (one, trace, none), (single, several) = jax.tree.map(np.asarray, found())
    np.testing.assert_allclose(one, direction @ hessian @ direction)
    np.testing.assert_allclose(trace, np.trace(hessian))
    assert none == 0
    assert abs(single.mean() - trace) < 5 * single.std() / np.sqrt(4000)
    assert several.std() == pytest.approx(single.std() / 2, rel=0.1)
