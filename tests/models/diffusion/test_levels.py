"""Levels and the kernels between them: composition, Bayes' rule, and which variance the reversal has."""

import math

import numpy as np
import pytest

from ppl.models import EDM, RectifiedFlow, VarianceExploding, VariancePreserving
from ppl.models.diffusion.levels import make_levels

SCHEDULES = {
    "linear": VariancePreserving(),
    "cosine": VariancePreserving("cosine"),
    "exploding": VarianceExploding(0.01, 20.0),
    "from zero": VarianceExploding(0.01, 20.0, from_zero=True),
    "edm": EDM(),
    "flow": RectifiedFlow(),
    "shifted flow": RectifiedFlow(3.0),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
GRIDS = {"default": None, "time": "time", "given": np.array([1.0, 0.9, 0.6, 0.55, 0.2, 0.05, 0.01])}
every_grid = pytest.mark.parametrize("grid", GRIDS)


def levels_of(name, grid, num_steps=6):
    return make_levels(SCHEDULES[name], num_steps, GRIDS[grid], 0.7)


@every_schedule
@every_grid
def test_kernels_compose(name, grid):
    """One step from level i to k is a step from i to j after one from j to k: r = r_1 r_2, v = v_1 + r_1^2 v_2."""
    levels, times = levels_of(name, grid), levels_of(name, grid).times
    for i, j, k in ((0, 1, 2), (1, 3, 6), (0, 2, 5), (3, 4, 6)):
        whole = make_levels(SCHEDULES[name], 1, times[[i, k]], 0.7)
        parts = make_levels(SCHEDULES[name], 2, times[[i, j, k]], 0.7)
        (first, second), (v_first, v_second) = parts.rate, parts.variance
        assert whole.rate[0] == pytest.approx(first * second, rel=1e-13)
        assert whole.variance[0] == pytest.approx(v_first + first**2 * v_second, rel=1e-11)
        assert levels.rate[i:k].prod() == pytest.approx(whole.rate[0], rel=1e-12)


@every_schedule
@every_grid
def test_noising_leads_from_level_to_level(name, grid):
    """x' = alpha' x_0 + sigma' eps and x = r x' + sqrt(v) eps have the law of level k."""
    levels = levels_of(name, grid)
    np.testing.assert_allclose(levels.rate * levels.alpha[1:], levels.alpha[:-1], rtol=1e-13, atol=1e-15)
    spread = levels.rate**2 * levels.sigma[1:] ** 2 + levels.variance
    np.testing.assert_allclose(spread, levels.sigma[:-1] ** 2, rtol=1e-12)
    np.testing.assert_array_equal(levels.alpha, SCHEDULES[name].alpha(levels.times))
    np.testing.assert_array_equal(levels.sigma, SCHEDULES[name].sigma(levels.times))
    assert levels.num_steps == 6 and levels.times[0] == 1.0


@every_schedule
@every_grid
def test_exact_reversal_is_bayes_rule(name, grid):
    """q(x'|x_0) k(x|x') as a function of x' is Gaussian with the posterior variance and the mean of (2)."""
    levels = levels_of(name, grid)
    for k in range(levels.num_steps):
        if levels.sigma[k + 1] == 0:
            assert levels.reverse_variance("posterior")[k] == 0
            continue
        alpha_next, squared_next = levels.alpha[k + 1], levels.sigma[k + 1] ** 2
        r, v = levels.rate[k], levels.variance[k]
        precision = 1 / squared_next + r**2 / v
        assert levels.reverse_variance("posterior")[k] == pytest.approx(1 / precision, rel=1e-11)
        x, x_0 = 1.3 * np.hypot(levels.alpha[k], levels.sigma[k]), -0.8
        mean = (alpha_next * x_0 / squared_next + r * x / v) / precision
        own = (r * squared_next * x + alpha_next * v * x_0) / levels.sigma[k] ** 2
        assert own == pytest.approx(mean, rel=1e-9, abs=1e-12)
        if levels.alpha[0] > 0:  # else some are infinite
            assert levels.reverse_variance("noising")[k] == pytest.approx(v / r**2, rel=1e-14)


@pytest.mark.parametrize("name", ["exploding", "linear", "flow"])
def test_matched_variance_is_the_mean_variance_of_the_reversal(name):
    """E_x Var(x'|x) by quadrature over x and x' of a mixture in one dimension, with the mean squared error likewise."""
    means, scale, weights = np.array([-1.0, 0.3, 1.2]), 0.25, np.array([0.5, 0.2, 0.3])
    schedule = SCHEDULES[name]
    times = schedule.time(np.log([3.0, 1.0, 0.6, 0.25, 0.1]))
    levels = make_levels(schedule, 5, np.concatenate([[1.0], times]), 1.0)
    for k in range(1, 5):
        (alpha, alpha_next), (sigma, sigma_next) = levels.alpha[k : k + 2], levels.sigma[k : k + 2]

        def density(x, alpha=alpha_next, sigma=sigma_next):
            total = alpha**2 * scale**2 + sigma**2
            squares = (x[..., None] - alpha * means) ** 2
            return (weights * np.exp(-0.5 * squares / total) / np.sqrt(2 * np.pi * total)).sum(-1)

        wide = 10 * math.hypot(sigma, alpha * scale)
        x = np.linspace(alpha * means.min() - wide, alpha * means.max() + wide, 1501)
        narrow = 10 * math.hypot(sigma_next, alpha_next * scale)
        x_next = np.linspace(alpha_next * means.min() - narrow, alpha_next * means.max() + narrow, 3001)
        v = levels.variance[k]
        joint = density(x_next)[:, None] * np.exp(-0.5 * (x - levels.rate[k] * x_next[:, None]) ** 2 / v)
        mass = joint.sum(0)
        mean = (joint * x_next[:, None]).sum(0) / mass
        spread = (joint * x_next[:, None] ** 2).sum(0) / mass - mean**2
        exact = np.sum(mass * spread) / mass.sum()
        # The denoised value and its error, from the posterior of x_0 given x.
        total = alpha**2 * scale**2 + sigma**2
        own = (sigma**2 * means + alpha * scale**2 * x[:, None]) / total
        chance = weights * np.exp(-0.5 * (x[:, None] - alpha * means) ** 2 / total)
        marginal, chance = chance.sum(1), chance / chance.sum(1, keepdims=True)
        denoised = (chance * own).sum(1)
        variance = (chance * (own - denoised[:, None]) ** 2).sum(1) + scale**2 * sigma**2 / total
        error = np.sum(marginal * variance) / marginal.sum()
        matched = levels.reverse_variance("posterior")[k] + (alpha_next * v / sigma**2) ** 2 * error
        assert matched == pytest.approx(exact, rel=1e-6)
        # (2): the mean of the reversal has D in the place of x_0.
        own_mean = (levels.rate[k] * sigma_next**2 * x + alpha_next * v * denoised) / sigma**2
        likely = mass > 1e-8 * mass.max()
        np.testing.assert_allclose(own_mean[likely], mean[likely], atol=1e-7)


@every_schedule
def test_default_grid_is_uniform_in_the_log_ratio(name):
    levels = make_levels(SCHEDULES[name], 40, None, 0.7)
    ratios = levels.log_ratio
    if math.isinf(ratios[0]):
        ratios = ratios[1:]
        assert ratios[0] == pytest.approx(math.log(80 * 0.7), rel=1e-6)
    np.testing.assert_allclose(np.diff(ratios), np.diff(ratios).mean(), rtol=1e-5)
    assert ratios[-1] == pytest.approx(math.log(0.01 * 0.7), abs=1e-5) or levels.times[-1] == 0.0


@every_schedule
def test_grid_in_time_reaches_the_end_of_the_schedule(name):
    levels = make_levels(SCHEDULES[name], 10, "time", 1.0)
    np.testing.assert_allclose(levels.times, np.linspace(1, 0, 11), atol=1e-15)
    assert levels.sigma[-1] == SCHEDULES[name].sigma(0.0)
    assert np.all(np.isfinite(levels.sigma_rate))


@every_schedule
def test_one_step_is_enough(name):
    levels = make_levels(SCHEDULES[name], 1, None, 1.0)
    assert levels.times.shape == (2,) and levels.variance.shape == (1,) and levels.variance[0] > 0


def test_equal_compares_all_levels():
    levels = levels_of("flow", "time")
    assert levels.equal(levels_of("flow", "time"))
    assert not levels.equal(levels_of("flow", "given")) and not levels.equal(levels_of("shifted flow", "time"))
    assert "6 steps" in repr(levels)


@pytest.mark.parametrize(
    "grid, message",
    [
        ("uniform", r"`grid` must be None, 'time' or an array of 3 times, got 'uniform'"),
        (np.array([1.0, 0.5]), r"`grid` must have 3 times for 2 steps, got shape \(2,\)"),
        (np.array([0.1, 0.5, 0.9]), r"`grid` must fall within \[0, 1\], got times from 0.1 to 0.9"),
        (np.array([1.0, 0.5, 0.5]), "`grid` must fall within"),
        (np.array([1.2, 0.5, 0.1]), "`grid` must fall within"),
        (np.array([1.0, 0.5, -0.1]), "`grid` must fall within"),
        (np.array([1.0, np.nan, 0.1]), "`grid` must fall within"),
    ],
)
def test_impossible_grids_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        make_levels(RectifiedFlow(), 2, grid, 1.0)


def test_schedule_without_enough_noise_is_refused():
    with pytest.raises(ValueError, match="noise-to-data ratio of 0.02, not above 0.03"):
        make_levels(VarianceExploding(0.001, 0.02), 10, None, 3.0)


def test_noising_variance_needs_data_at_every_level():
    with pytest.raises(ValueError, match="'noising' is infinite at a level without data"):
        make_levels(RectifiedFlow(), 5, None, 1.0).reverse_variance("noising")
