"""Schedules are their definitions, exact at both ends of time in float32 and float64, with exact rates and inverses."""

import decimal
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl.models.diffusion.schedules import EDM, RectifiedFlow, VarianceExploding, VariancePreserving
from ppl.models.diffusion.tabulated_schedule import Tabulated

TABLE = tuple(np.cumprod(1 - np.linspace(0.01, 0.2, 30)).tolist())
SCHEDULES = {
    "linear": VariancePreserving(),
    "constant": VariancePreserving(beta_min=5.0, beta_max=5.0),
    "cosine": VariancePreserving("cosine"),
    "exploding": VarianceExploding(0.01, 10.0),
    "from zero": VarianceExploding(0.01, 10.0, from_zero=True),
    "edm": EDM(),
    "edm rho 1": EDM(0.01, 50.0, 1.0),
    "flow": RectifiedFlow(),
    "shifted flow": RectifiedFlow(3.0),
    "flow shifted to data": RectifiedFlow(0.5),
    "table": Tabulated(TABLE),
    "table to nothing": Tabulated((*TABLE[:-1], 0.0)),
}
WITHOUT_NOISE = ("linear", "constant", "cosine", "from zero", "flow", "shifted flow", "flow shifted to data")
WITHOUT_DATA = ("cosine", "flow", "shifted flow", "flow shifted to data", "table to nothing")
ROOT_START = ("linear", "constant", "cosine", "from zero")  # sigma ~ sqrt(t)
INTERIOR = np.linspace(0.013, 0.987, 40)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def test_alphas_and_sigmas_are_their_definitions():
    t = INTERIOR
    linear = np.exp(-(20.0 - 0.1) * t**2 / 4 - 0.1 * t / 2)
    cosine = np.cos(np.pi / 2 * (t + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)
    for name, alpha in {"linear": linear, "cosine": cosine, "constant": np.exp(-5.0 * t / 2)}.items():
        np.testing.assert_allclose(SCHEDULES[name].alpha(t), alpha, rtol=1e-12)
        np.testing.assert_allclose(SCHEDULES[name].sigma(t), np.sqrt(1 - alpha**2), rtol=1e-12)
    karras = (80 ** (1 / 7) + (1 - t) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sigmas = {"exploding": 0.01 * 1000**t, "from zero": 0.01 * np.sqrt(1000 ** (2 * t) - 1), "edm": karras}
    for name, sigma in sigmas.items():
        np.testing.assert_array_equal(SCHEDULES[name].alpha(t), np.ones_like(t))
        np.testing.assert_allclose(SCHEDULES[name].sigma(t), sigma, rtol=1e-12)
    for shift in (1.0, 3.0):
        s = shift * t / (1 + (shift - 1) * t)
        np.testing.assert_allclose(RectifiedFlow(shift).sigma(t), s, rtol=1e-12)
        np.testing.assert_allclose(RectifiedFlow(shift).alpha(t), 1 - s, rtol=1e-12)


@pytest.mark.parametrize("name", ["table", "table to nothing"])
def test_a_table_is_met_at_its_steps_and_monotone_between(name):
    schedule = SCHEDULES[name]
    table = np.asarray(schedule.alphas_cumprod)
    t = np.arange(table.size) / (table.size - 1)
    np.testing.assert_allclose(schedule.alpha(t) ** 2, table, rtol=1e-12, atol=1e-28)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, 1 - table, rtol=1e-12)
    np.testing.assert_allclose(schedule.step(t), np.arange(table.size), rtol=1e-14)
    fine = np.linspace(0.0, 1.0, 3001)
    assert np.all(np.diff(schedule.log_ratio(fine)) > 0)
    middle = schedule.log_ratio((np.arange(28) + 0.5) / 29)
    ends = 0.5 * np.log((1 - table[:29]) / table[:29])
    np.testing.assert_allclose(middle, (ends[1:] + ends[:-1]) / 2, rtol=1e-11, atol=1e-13)


def test_a_table_to_nothing_ends_in_a_straight_line_of_alpha_over_sigma():
    schedule = SCHEDULES["table to nothing"]
    t = 1 - np.linspace(0.0, 1.0, 11) / 29
    ratio = schedule.alpha(t) / schedule.sigma(t)
    start = math.sqrt(TABLE[-2] / (1 - TABLE[-2]))
    np.testing.assert_allclose(ratio, start * np.linspace(0.0, 1.0, 11), rtol=1e-12, atol=1e-15)


def decimal_sin(angle: Decimal) -> Decimal:
    term, total, n = angle, angle, 1
    while abs(term) > Decimal(10) ** -45 * abs(total) and term:
        n += 2
        term *= -angle * angle / (n * (n - 1))
        total += term
    return total


def decimal_level(name: str, t: float) -> tuple[Decimal, Decimal]:
    t = Decimal(t)
    if name == "linear":
        alpha = (-(Decimal(20.0) - Decimal(0.1)) * t * t / 4 - Decimal(0.1) * t / 2).exp()
    else:
        angle = Decimal("3.14159265358979323846264338327950288419716939937510") / 2 / Decimal(1.008)
        alpha = decimal_sin(angle * (1 - t)) / decimal_sin(angle)
    return alpha, (1 - alpha * alpha).sqrt()


TIMES = [2.0**-k for k in (1, 4, 8, 13, 20, 23)]
TIMES += [1 - time for time in TIMES]


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-6), (np.float64, 4e-15)])
def test_nothing_cancels_at_the_ends(name, dtype, tolerance):
    with decimal.localcontext(prec=60):
        for time in TIMES:
            exact = decimal_level(name, time)
            got = SCHEDULES[name].alpha(dtype(time)), SCHEDULES[name].sigma(dtype(time))
            for value, truth in zip(got, exact, strict=True):
                assert value.dtype == dtype
                assert abs(float(Decimal(float(value)) / truth - 1)) < tolerance, (time, value, truth)


@every_schedule
def test_float32_has_its_precision_at_both_ends(name):
    schedule = SCHEDULES[name]
    times = np.asarray(TIMES, np.float32)
    for method in ("alpha", "sigma", "alpha_rate", "sigma_rate"):
        wide = getattr(schedule, method)(times.astype(np.float64))
        for narrow in (getattr(schedule, method)(times), getattr(schedule, method)(jnp.asarray(times))):
            assert narrow.dtype == np.float32
            np.testing.assert_allclose(narrow, wide, rtol=4e-6, err_msg=f"{method}")
    wide = schedule.log_ratio(times.astype(np.float64))
    np.testing.assert_allclose(schedule.log_ratio(jnp.asarray(times)), wide, rtol=1e-6, atol=1e-6)


@every_schedule
def test_the_ends_are_what_they_should_be(name):
    schedule = SCHEDULES[name]
    for t in (np.array([0.0, 1.0]), np.array([0, 1]), jnp.array([0.0, 1.0])):
        with np.errstate(divide="raise", invalid="raise", over="raise"):
            alpha, sigma, log_ratio = schedule.alpha(t), schedule.sigma(t), schedule.log_ratio(t)
            alpha_rate, sigma_rate = schedule.alpha_rate(t), schedule.sigma_rate(t)
        assert (sigma[0] == 0) == (name in WITHOUT_NOISE) == bool(log_ratio[0] == -math.inf)
        assert (alpha[1] == 0) == (name in WITHOUT_DATA) == bool(log_ratio[1] == math.inf)
        assert np.all(np.isfinite(alpha)) and np.all(np.isfinite(sigma)) and np.all(np.isfinite(alpha_rate))
        assert (sigma_rate[0] == math.inf) == (name in ROOT_START)
        assert np.isfinite(sigma_rate[1])


@every_schedule
def test_log_ratio_is_that_of_the_level(name):
    schedule = SCHEDULES[name]
    ratio = np.log(schedule.sigma(INTERIOR)) - np.log(schedule.alpha(INTERIOR))
    np.testing.assert_allclose(schedule.log_ratio(INTERIOR), ratio, rtol=1e-12, atol=1e-13)


@every_schedule
@settings(max_examples=60, deadline=None)
@given(time=st.floats(0.0, 1.0))
def test_time_undoes_log_ratio(name, time):
    schedule = SCHEDULES[name]
    assert abs(schedule.time(schedule.log_ratio(time)) - time) < 1e-12


@every_schedule
def test_time_undoes_log_ratio_in_float32(name):
    times = np.linspace(0.0, 1.0, 201, dtype=np.float32)
    back = SCHEDULES[name].time(SCHEDULES[name].log_ratio(jnp.asarray(times)))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, times, atol=2e-6)


@pytest.mark.parametrize("name", WITHOUT_NOISE)
def test_small_times_come_back_to_relative_precision(name):
    times = np.array([1e-12, 1e-9, 1e-6, 1e-3])
    np.testing.assert_allclose(SCHEDULES[name].time(SCHEDULES[name].log_ratio(times)), times, rtol=1e-12)


@every_schedule
def test_levels_beyond_an_end_are_that_end(name):
    for library in (np, jnp):
        levels = library.asarray([-math.inf, -1e3, 1e3, math.inf])
        with np.errstate(divide="raise", invalid="raise", over="raise"):
            np.testing.assert_allclose(SCHEDULES[name].time(levels), [0.0, 0.0, 1.0, 1.0], atol=2e-7)


@every_schedule
def test_rates_are_the_derivatives(name):
    schedule = SCHEDULES[name]
    with jax.enable_x64(True):
        t = jnp.asarray(INTERIOR)
        for value, rate in ((schedule.alpha, schedule.alpha_rate), (schedule.sigma, schedule.sigma_rate)):
            derivative = jax.vmap(jax.grad(lambda t, value=value: value(t)))(t)
            np.testing.assert_allclose(rate(t), derivative, rtol=1e-11, atol=1e-13)
            np.testing.assert_allclose(rate(t), rate(INTERIOR), rtol=1e-12, atol=1e-14)
        slope = jax.vmap(jax.grad(schedule.log_ratio))(t)
        relative = schedule.sigma_rate(t) / schedule.sigma(t) - schedule.alpha_rate(t) / schedule.alpha(t)
        np.testing.assert_allclose(slope, relative, rtol=1e-10)


@every_schedule
def test_rates_at_the_noise_end_are_one_sided_derivatives(name):
    schedule, step = SCHEDULES[name], 1e-7
    for value, rate in ((schedule.alpha, schedule.alpha_rate), (schedule.sigma, schedule.sigma_rate)):
        difference = (3 * value(1.0) - 4 * value(1 - step) + value(1 - 2 * step)) / (2 * step)
        np.testing.assert_allclose(rate(1.0), difference, rtol=1e-6, atol=1e-6)


@every_schedule
def test_numpy_and_jax_agree_and_one_compilation_serves_all_times(name):
    schedule, traces = SCHEDULES[name], []
    with jax.enable_x64(True):

        @jax.jit
        def levels(t):
            traces.append(t)
            return schedule.alpha(t), schedule.sigma(t), schedule.time(schedule.log_ratio(t))

        for t in (0.0, 0.3, 1.0):
            wanted = schedule.alpha(t), schedule.sigma(t), t
            np.testing.assert_allclose(levels(jnp.float64(t)), wanted, rtol=1e-12, atol=1e-12)
    assert len(traces) == 1


def test_python_floats_give_float64():
    for schedule in SCHEDULES.values():
        assert schedule.alpha(0.5).dtype == schedule.sigma(1).dtype == schedule.time(0.0).dtype == np.float64


def test_schedules_are_values():
    assert RectifiedFlow(3.0) == RectifiedFlow(3.0) != RectifiedFlow(2.0)
    assert Tabulated(list(TABLE)) == Tabulated(np.asarray(TABLE)) and len(set(SCHEDULES.values())) == len(SCHEDULES)
    assert len({Tabulated(TABLE), Tabulated(TABLE)}) == 1
    assert repr(Tabulated(TABLE)).startswith("Tabulated(30 steps, 0.99 .. ")


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: VariancePreserving("sine"), "`kind` must be 'linear' or 'cosine', got 'sine'"),
        (lambda: VariancePreserving(beta_min=0.0), "`beta_min` must be positive"),
        (lambda: VariancePreserving(beta_min=-1.0), "`beta_min` must be positive"),
        (lambda: VariancePreserving(beta_max=math.nan), "`beta_max` must be positive"),
        (
            lambda: VariancePreserving(beta_min=2.0, beta_max=1.0),
            "`beta_max` must be at least `beta_min`, got 1.0 and 2",
        ),
        (lambda: VarianceExploding(0.0, 10.0), "`sigma_min` must be positive"),
        (lambda: VarianceExploding(1.0, 1.0), "`sigma_max` must be above `sigma_min`, got 1.0 and 1.0"),
        (lambda: VarianceExploding(0.01, math.inf), "`sigma_max` must be positive and finite"),
        (lambda: EDM(sigma_min=-0.1), "`sigma_min` must be positive"),
        (lambda: EDM(sigma_max=0.001), "`sigma_max` must be above `sigma_min`"),
        (lambda: EDM(rho=0.0), "`rho` must be positive"),
        (lambda: RectifiedFlow(0.0), "`shift` must be positive"),
        (lambda: RectifiedFlow(-3.0), "`shift` must be positive"),
        (lambda: Tabulated((0.5,)), "`alphas_cumprod` must have at least 2 steps, got 1"),
        (lambda: Tabulated((0.9, 0.9)), "`alphas_cumprod` must fall"),
        (lambda: Tabulated((1.0, 0.5)), "`alphas_cumprod` must fall from below 1"),
        (lambda: Tabulated((0.9, 0.0, -0.1)), "`alphas_cumprod` must fall"),
        (lambda: Tabulated((0.9, math.nan)), "`alphas_cumprod` must fall"),
    ],
)
def test_degenerate_parameters_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: RectifiedFlow("3"), "`shift` must be a number, got '3'"),
        (lambda: EDM(True), "`sigma_min` must be a number"),
        (lambda: VarianceExploding(0.01, 10.0, 1), "`from_zero` must be a bool"),
        (lambda: Tabulated(0.5), "`alphas_cumprod` must be a sequence of numbers"),
    ],
)
def test_parameters_of_another_type_are_refused(build, message):
    with pytest.raises(TypeError, match=message):
        build()
