"""Superposition, AND: log-densities that stay equal, on mixtures whose log-densities are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, SuperposedAnd
from ppl.inference.superposition import Superposition
from ppl.models import GaussianMixture, RectifiedFlow, VarianceExploding, VariancePreserving

pytestmark = pytest.mark.optimized

FIRST = GaussianMixture([[-2.0, 1.0], [1.0, 2.0], [2.0, -1.5]], [0.3, 0.6, 0.8])
SECOND = GaussianMixture([[-1.0, -2.0], [1.5, 1.0]], [0.5, 0.4])
RNG = np.random.default_rng(0)
IN_FIVE = tuple(GaussianMixture(RNG.uniform(-1, 1, (2, 5)), scale) for scale in (0.5, 0.6, 0.7))


def product(mixtures, steps, schedule=None, **options):
    schedule = VariancePreserving() if schedule is None else schedule
    options = {"variance": "noising"} | options  # no variance is used
    processes = [mixture.diffuse(schedule).reverse(steps, **options) for mixture in mixtures]
    target = processes[0] * processes[1]
    for process in processes[2:]:
        target = target * process
    return target, processes[0].aligned_with(processes)


def exact_log_densities(processes, x):
    level = processes[0].level(processes[0].num_steps)
    return np.stack([jax.vmap(lambda v, p=p: p.model.log_density_at(v, level))(x) for p in processes], axis=1)


def rms(values):
    return float(np.sqrt(np.mean(np.asarray(values, np.float64) ** 2)))


def shortfall(mixtures, steps, algorithm):
    """Return rms errors: of the estimates' equality, of the estimates, and of the log-densities' equality."""
    target, processes = product(mixtures, steps)
    posterior = ppl.infer(target, algorithm)
    estimated = np.asarray(posterior.sites["log_density"])
    exact = exact_log_densities(processes, posterior.value)
    return [rms(values - values.mean(1, keepdims=True)) for values in (estimated, exact)], rms(estimated - exact)


def test_log_densities_end_equal_up_to_an_error_that_falls_with_steps():
    with jax.enable_x64(True):
        found = [shortfall((FIRST, SECOND), steps, SuperposedAnd(1000)) for steps in (100, 900)]
    (_, many_gap), many_error = found[0]
    (_, gap), error = found[1]
    assert 2.2 < many_gap / gap < 4.5 and 2.2 < many_error / error < 4.5, found  # 1 / sqrt(steps), or better
    assert gap < 0.1 and error < 0.2


def test_estimates_stay_equal_along_the_run():
    target, _ = product((FIRST, SECOND), 100)
    watched = target.watch("seen", lambda state: state["log_density"])
    posterior = ppl.infer(watched, SuperposedAnd(200))
    seen = np.asarray(posterior.sites["seen"])
    assert seen.shape == (200, 100, 2)
    gaps = np.abs(seen[..., 0] - seen[..., 1]).max(0)
    assert gaps[0] < 0.2 and gaps.max() < gaps[0] + 2e-3  # float32; the gap is that of the two models' starts
    assert gaps[-1] < 2e-3
    np.testing.assert_array_equal(seen[:, -1], posterior.sites["log_density"])


def test_published_form_keeps_estimates_equal_but_not_log_densities():
    with jax.enable_x64(True):
        (estimated, exact), _ = shortfall((FIRST, SECOND), 800, SuperposedAnd(1000, exact=False))
    assert estimated < 1e-6 and exact > 0.3


def test_published_step_is_that_of_the_closed_form_of_kappa():
    with jax.enable_x64(True):
        _, processes = product((FIRST, SECOND), 50)
        whole = Superposition(processes, (0.0, 0.0), exact=False)
        noise, x, k = jnp.array([0.4, -1.1]), jnp.array([0.5, 0.3]), 30
        denoised = jnp.stack([process.denoise(x, k) for process in processes])
        state = {"x": x, "denoised": denoised, "log_density": jnp.zeros(2)}
        found = whole.advance(state, noise, k)["x"]
        before, after = processes[0].level(k), processes[0].level(k + 1)
        squared = (before.sigma / before.alpha) ** 2
        fall = squared - (after.sigma / after.alpha) ** 2
        y = x / before.alpha
        first, second = (denoised - y) / squared
        apart = first - second
        plain = fall * second + jnp.sqrt(fall) * noise
        kappa = (0.5 * fall * (first @ first - second @ second) - apart @ plain) / (fall * apart @ apart)
        np.testing.assert_allclose(found, after.alpha * (y + plain + kappa * fall * apart), rtol=1e-10)


def test_corners_that_two_models_share_are_found():
    def corners(*points):
        return GaussianMixture(3 * (np.array(points, float) - 0.5), 0.4)

    mixtures = corners((0, 1), (1, 1)), corners((1, 0), (1, 1))
    target, processes = product(mixtures, 200, VarianceExploding(0.01, 40.0))
    posterior = ppl.infer(target, SuperposedAnd(1000))
    exact = exact_log_densities(processes, posterior.value)
    assert np.median(np.abs(exact[:, 0] - exact[:, 1])) < 0.1
    shared = np.linalg.norm(np.asarray(posterior.value) - 1.5, axis=1) < 4 * 0.4
    assert shared.mean() > 0.9


def test_three_models_in_more_dimensions_agree_in_float32():
    target, processes = product(IN_FIVE, 200)
    posterior = ppl.infer(target, SuperposedAnd(300))
    estimated = np.asarray(posterior.sites["log_density"])
    assert np.ptp(estimated, axis=1).max() < 5e-3
    exact = exact_log_densities(processes, posterior.value)
    assert rms(exact - exact.mean(1, keepdims=True)) < 0.3
    assert np.asarray(posterior.value).std(0).min() > 0.05  # two directions of five have lost their noise


def test_equal_models_are_one_model():
    target, processes = product((SECOND, SECOND), 200)
    posterior = ppl.infer(target, SuperposedAnd(2000))
    x, estimated = np.asarray(posterior.value), np.asarray(posterior.sites["log_density"])
    assert np.isfinite(x).all() and np.isfinite(estimated).all()
    alone = np.asarray(ppl.infer(processes[0], SMC(2000, ess_threshold=0.0), seed=1).value)
    spread = np.sqrt(x.var(0) / 2000 + alone.var(0) / 2000)
    assert np.all(np.abs(x.mean(0) - alone.mean(0)) < 5 * spread)
    np.testing.assert_allclose(x.std(0), alone.std(0), rtol=0.1)


def test_lift_is_how_far_a_log_density_ends_above():
    target, processes = product((FIRST, SECOND), 400)
    posterior = ppl.infer(target, SuperposedAnd(500, lift=(2.0, 0.0)))
    estimated = np.asarray(posterior.sites["log_density"])
    np.testing.assert_allclose(estimated[:, 0] - estimated[:, 1], 2.0, atol=5e-3)
    exact = exact_log_densities(processes, posterior.value)
    assert np.median(exact[:, 0] - exact[:, 1]) == pytest.approx(2.0, abs=0.1)


def test_a_run_is_heuristic_and_counts_its_networks():
    target, processes = product((FIRST, SECOND), 20)
    posterior = ppl.infer(target, SuperposedAnd(50))
    assert posterior.guarantee == "heuristic" and np.isnan(posterior.log_evidence)
    assert posterior.diagnostics["network_calls"] == 50 * 20 * 4
    assert Superposition(processes, (0.0, 0.0), exact=False).network_calls() == 20 * 2
    again = ppl.infer(target, SuperposedAnd(50))
    np.testing.assert_array_equal(posterior.value, again.value)


def test_what_cannot_be_superposed_is_refused():
    target, (first, second) = product((FIRST, SECOND), 10)

    def refused(error, match, target, algorithm=None):
        with pytest.raises(error, match=match):
            ppl.infer(target, algorithm or SuperposedAnd(10))

    refused(ValueError, "two or more different", first)
    refused(ValueError, "two or more different", first * first)
    refused(ValueError, "two or more different", first * second**2.0)
    refused(ValueError, "no rewards", target.tilt(lambda x: x[0]))
    refused(ValueError, "`lift` must have one number for each of 2", target, SuperposedAnd(10, lift=(1.0,)))
    refused(ValueError, "churn 1", product((FIRST, SECOND), 10, churn=0.5)[0])
    refused(ValueError, "data at every level", product((FIRST, SECOND), 10, RectifiedFlow(), variance="posterior")[0])
    chain = ppl.models.MarkovChain(jnp.zeros(2), jnp.zeros((2, 2)), 3)
    refused(TypeError, "diffusion processes", chain * ppl.models.MarkovChain(jnp.zeros(2), jnp.zeros((2, 2)), 3))
    with pytest.raises(TypeError, match="finite numbers"):
        SuperposedAnd(10, lift=2.0)
    with pytest.raises(ValueError, match="`num_particles`"):
        SuperposedAnd(0)
