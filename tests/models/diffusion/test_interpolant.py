"""A denoiser moved to another schedule is the exact denoiser there, and so is the velocity that it gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.models.diffusion.interpolant import converted, corresponding
from ppl.models.diffusion.predictions import from_denoised
from ppl.models.diffusion.schedules import EDM, RectifiedFlow, VarianceExploding, VariancePreserving
from ppl.models.diffusion.tabulated_schedule import Tabulated

SCHEDULES = {
    "linear": VariancePreserving(),
    "cosine": VariancePreserving("cosine"),
    "exploding": VarianceExploding(0.01, 10.0),
    "edm": EDM(),
    "flow": RectifiedFlow(),
    "shifted flow": RectifiedFlow(3.0),
    "table": Tabulated(tuple(np.cumprod(1 - np.linspace(0.001, 0.3, 40)).tolist())),
}
PAIRS = list(itertools.permutations(SCHEDULES, 2))
WHOLE = ("cosine", "flow", "shifted flow")  # from no noise to no data
MEAN, SCALE = 0.7, 0.4
X = np.linspace(-3.0, 3.0, 7)
every_pair = pytest.mark.parametrize("of, to", PAIRS)


def exact_denoiser(schedule):
    """The posterior mean of data from N(MEAN, SCALE^2)."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return MEAN + alpha * SCALE**2 * (x - alpha * MEAN) / (alpha**2 * SCALE**2 + sigma**2)

    return denoise


def exact_velocity(schedule, x, t):
    alpha, sigma, alpha_rate, sigma_rate = (
        getattr(schedule, name)(t) for name in ("alpha", "sigma", "alpha_rate", "sigma_rate")
    )
    variance_rate = 2 * (alpha * alpha_rate * SCALE**2 + sigma * sigma_rate)
    return alpha_rate * MEAN + 0.5 * variance_rate / (alpha**2 * SCALE**2 + sigma**2) * (x - alpha * MEAN)


def shared_times(of, to, num=9):
    """Times on `to` whose levels `of` has as well."""
    low = max(of.log_ratio(0.0), to.log_ratio(0.0), -6.0)
    high = min(of.log_ratio(1.0), to.log_ratio(1.0), 6.0)
    return to.time(np.linspace(low + 0.02, high - 0.02, num))


@every_pair
def test_the_denoised_value_is_that_of_the_schedule_it_runs_on(of, to):
    of, to = SCHEDULES[of], SCHEDULES[to]
    moved = converted(exact_denoiser(of), of, to)
    for r in shared_times(of, to):
        x = X * np.hypot(to.alpha(r), to.sigma(r))
        np.testing.assert_allclose(moved(x, r), exact_denoiser(to)(x, r), rtol=1e-11, atol=1e-12)


@every_pair
def test_a_level_and_its_counterpart_are_one_level(of, to):
    of, to = SCHEDULES[of], SCHEDULES[to]
    r = shared_times(of, to, 50)
    t, scale = corresponding(of, to, r)
    np.testing.assert_allclose(scale * to.alpha(r), of.alpha(t), rtol=1e-10)
    np.testing.assert_allclose(scale * to.sigma(r), of.sigma(t), rtol=1e-10)
    back, inverse = corresponding(to, of, t)
    np.testing.assert_allclose(back, r, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(inverse, 1 / scale, rtol=1e-10)


@every_pair
def test_the_velocity_formula_of_interpolant_conversion(of, to):
    of, to = SCHEDULES[of], SCHEDULES[to]
    for r in shared_times(of, to):
        t, scale = corresponding(of, to, r)
        rates = of.alpha_rate(t), of.sigma_rate(t), to.alpha_rate(r), to.sigma_rate(r)
        alpha, sigma, alpha_to, sigma_to = of.alpha(t), of.sigma(t), to.alpha(r), to.sigma(r)
        time_rate = (sigma**2 / sigma_to**2) * (sigma_to * rates[2] - alpha_to * rates[3])
        time_rate /= sigma * rates[0] - alpha * rates[1]
        stretch = rates[3] / sigma_to - rates[1] / sigma * time_rate  # c' / c of c = sbar / sigma
        x = X * np.hypot(alpha_to, sigma_to)
        moved = stretch * x + time_rate / scale * exact_velocity(of, x * scale, t)
        room = 1e-10 * (abs(rates[2]) + rates[3] + abs(stretch) * np.abs(x).max())
        np.testing.assert_allclose(moved, exact_velocity(to, x, r), rtol=1e-9, atol=room)
        denoised = converted(exact_denoiser(of), of, to)(x, r)
        predicted = from_denoised("velocity", denoised, x, alpha_to, sigma_to, rates[2], rates[3])
        np.testing.assert_allclose(predicted, exact_velocity(to, x, r), rtol=1e-9, atol=room)


@pytest.mark.parametrize("of, to", [("flow", "linear"), ("cosine", "flow"), ("edm", "exploding")])
def test_the_rates_in_the_velocity_formula_are_those_of_the_conversion(of, to):
    of, to = SCHEDULES[of], SCHEDULES[to]
    r, step = shared_times(of, to)[1:-1], 1e-6
    after, before = corresponding(of, to, r + step), corresponding(of, to, r - step)
    t, _ = corresponding(of, to, r)
    formula = of.sigma(t) ** 2 * (to.sigma(r) * to.alpha_rate(r) - to.alpha(r) * to.sigma_rate(r))
    formula /= to.sigma(r) ** 2 * (of.sigma(t) * of.alpha_rate(t) - of.alpha(t) * of.sigma_rate(t))
    np.testing.assert_allclose((after[0] - before[0]) / (2 * step), formula, rtol=1e-5)
    stretch = to.sigma_rate(r) / to.sigma(r) - of.sigma_rate(t) / of.sigma(t) * formula
    growth = (np.log(before[1]) - np.log(after[1])) / (2 * step)
    np.testing.assert_allclose(growth, stretch, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of, to", list(itertools.permutations(WHOLE, 2)))
def test_schedules_that_are_whole_are_exact_at_both_ends(of, to):
    of, to = SCHEDULES[of], SCHEDULES[to]
    moved = converted(exact_denoiser(of), of, to)
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        np.testing.assert_allclose(moved(X, 0.0), X, rtol=1e-14)
        np.testing.assert_allclose(moved(X, 1.0), np.full_like(X, MEAN), rtol=1e-14)


@every_pair
def test_every_time_is_finite_and_every_scale_precise_in_float32(of, to):
    of, to = SCHEDULES[of], SCHEDULES[to]
    close = 2.0 ** -jnp.arange(1.0, 24.0, 3.0)
    times = jnp.concatenate([jnp.array([0.0, 1.0]), close, 1 - close])
    t, scale = corresponding(of, to, times)
    assert t.dtype == scale.dtype == jnp.float32
    assert np.all((t >= 0) & (t <= 1)) and np.all(np.isfinite(scale)) and np.all(scale > 0)
    _, wide = corresponding(of, to, np.asarray(times, np.float64))
    np.testing.assert_allclose(scale, wide, rtol=1e-5)


def test_a_level_that_the_model_never_saw_is_its_nearest():
    of, to = SCHEDULES["exploding"], SCHEDULES["flow"]
    assert corresponding(of, to, 0.0)[0] == 0.0 and corresponding(of, to, 1.0)[0] == 1.0
    moved = converted(exact_denoiser(of), of, to)
    np.testing.assert_allclose(moved(X, 0.0), exact_denoiser(of)(X, 0.0), rtol=1e-14)
    np.testing.assert_allclose(moved(X, 1.0), exact_denoiser(of)(10.0 * X, 1.0), rtol=1e-14)


def test_conditions_are_passed_on_and_gradients_pass_through():
    def denoise(x, t, label):
        return label * x / (1 + t)

    moved = converted(denoise, RectifiedFlow(), VariancePreserving())
    t, scale = corresponding(RectifiedFlow(), VariancePreserving(), 0.4)
    slope = jax.grad(lambda x: moved(x, 0.4, label=3.0))(2.0)
    assert float(slope) == pytest.approx(3.0 * scale / (1 + t), rel=1e-6)


@pytest.mark.parametrize("name", ["of", "to"])
def test_what_is_no_schedule_is_refused(name):
    schedules = {"of": EDM(), "to": EDM(), name: "flow"}
    with pytest.raises(TypeError, match=f"`{name}` must be a Schedule, got 'flow'"):
        converted(lambda x, t: x, **schedules)
