"""Predictions become the denoised value and back: exact on Gaussian data, finite with finite gradients at both ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl.models.diffusion.predictions import PREDICTIONS, check_prediction, from_denoised, to_denoised
from ppl.models.diffusion.schedules import EDM, RectifiedFlow, VarianceExploding, VariancePreserving
from ppl.models.diffusion.tabulated_schedule import Tabulated

SCHEDULES = {
    "linear": VariancePreserving(),
    "cosine": VariancePreserving("cosine"),
    "exploding": VarianceExploding(0.01, 10.0),
    "from zero": VarianceExploding(0.01, 10.0, from_zero=True),
    "edm": EDM(),
    "flow": RectifiedFlow(),
    "shifted flow": RectifiedFlow(3.0),
    "table to nothing": Tabulated((0.99, 0.9, 0.7, 0.3, 0.05, 0.0)),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_prediction = pytest.mark.parametrize("predicts", PREDICTIONS)
MEAN, SCALE = 0.7, 0.4  # of Gaussian data
X = np.linspace(-3.0, 3.0, 9)


def level(schedule, t):
    return schedule.alpha(t), schedule.sigma(t), schedule.alpha_rate(t), schedule.sigma_rate(t)


def gaussian_predictions(x, alpha, sigma, alpha_rate, sigma_rate) -> dict[str, np.ndarray]:
    """What is to be predicted, of data from N(MEAN, SCALE^2), each by its own closed form."""
    variance = alpha**2 * SCALE**2 + sigma**2
    centred = x - alpha * MEAN
    score = -centred / variance  # the gradient of log N(x; alpha MEAN, variance)
    denoised = MEAN + alpha * SCALE**2 * centred / variance  # the posterior mean
    variance_rate = 2 * (alpha * alpha_rate * SCALE**2 + sigma * sigma_rate)
    velocity = alpha_rate * MEAN + 0.5 * variance_rate / variance * centred  # carries N(alpha MEAN, variance) along
    noise = sigma * centred / variance  # E[eps | x], by the covariance of eps and x
    return {
        "x0": denoised,
        "epsilon": noise,
        "score": score,
        "velocity": velocity,
        "v": (alpha * sigma * (1 - SCALE**2)) * centred / variance - sigma * MEAN,
    }


@every_schedule
@every_prediction
@pytest.mark.parametrize("t", [0.02, 0.3, 0.5, 0.77, 0.97])
def test_gaussian_data_exactly(name, predicts, t):
    at = level(SCHEDULES[name], t)
    x = X * np.hypot(at[0], at[1])
    exact = gaussian_predictions(x, *at)
    # The rounding of x = alpha D + sigma e, divided by what e or D is multiplied by in it, is what float64 leaves open.
    unit = 20 * np.finfo(np.float64).eps * np.abs(x).max()
    divisors = {"x0": 1.0, "epsilon": at[1], "score": at[1] ** 2, "v": at[1] / max(at[0], at[1])}
    divisor = divisors.get(predicts, at[1] / (at[3] + abs(at[2])))
    got = from_denoised(predicts, exact["x0"], x, *at)
    np.testing.assert_allclose(got, exact[predicts], rtol=1e-12, atol=unit / divisor)
    divisor = at[0] if predicts in ("epsilon", "score") else np.hypot(at[0], at[1])
    got = to_denoised(predicts, exact[predicts], x, *at)
    np.testing.assert_allclose(got, exact["x0"], rtol=1e-12, atol=unit / divisor)


@every_schedule
@every_prediction
@settings(max_examples=40, deadline=None)
@given(t=st.floats(0.01, 0.99), x=st.floats(-5.0, 5.0), denoised=st.floats(-5.0, 5.0))
def test_round_trips(name, predicts, t, x, denoised):
    alpha, sigma, *rates = level(SCHEDULES[name], t)
    x = x * np.hypot(alpha, sigma)
    back = to_denoised(predicts, from_denoised(predicts, denoised, x, alpha, sigma, *rates), x, alpha, sigma, *rates)
    # x = alpha D + sigma e is known to a rounding error, which epsilon and score divide by alpha
    assert abs(back - denoised) < 1e-12 + 1e-14 * (1 + abs(x) + sigma) / alpha


def test_v_of_a_level_that_preserves_no_variance():
    alpha, sigma, x, denoised = 3.0, 0.25, 1.7, -0.4
    noise = (x - alpha * denoised) / sigma
    assert from_denoised("v", denoised, x, alpha, sigma) == pytest.approx(alpha * noise - sigma * denoised, rel=1e-14)
    assert to_denoised("v", alpha * noise - sigma * denoised, x, alpha, sigma) == pytest.approx(denoised, rel=1e-13)


ENDS = {  # alpha, sigma, alpha_rate, sigma_rate
    "no noise": (1.0, 0.0, -0.05, np.inf),
    "no noise, flow": (1.0, 0.0, -1.0, 1.0),
    "no data": (0.0, 1.0, -1.5, 0.0),
    "no data, flow": (0.0, 1.0, -1.0, 1.0),
    "no data and no rates": (0.0, 1.0, 0.0, 0.0),
}


@every_prediction
@pytest.mark.parametrize("end", ["no noise", "no noise, flow"])
def test_without_noise_the_denoised_value_is_x(predicts, end):
    np.testing.assert_array_equal(to_denoised(predicts, 7.0 * X, X, *ENDS[end], mean=9.0), X)
    np.testing.assert_array_equal(to_denoised(predicts, 7.0 * X, 2 * X, 2.0, 0.0, 0.1, 0.1), X)


@pytest.mark.parametrize("end", ["no noise", "no noise, flow"])
def test_without_noise_nothing_is_said_of_it(end):
    given = {predicts: from_denoised(predicts, X, X, *ENDS[end]) for predicts in PREDICTIONS}
    for predicts in ("epsilon", "score", "v"):
        np.testing.assert_array_equal(given[predicts], np.zeros_like(X))
    np.testing.assert_array_equal(given["velocity"], ENDS[end][2] * X)


def test_epsilon_score_and_velocity_near_no_noise_go_to_what_is_taken_there():
    # Of Gaussian data: epsilon falls like sigma, and so does v + sigma D.
    for name in ("linear", "cosine", "flow"):
        at = level(SCHEDULES[name], 1e-10)
        exact = gaussian_predictions(X, *at)
        for predicts in ("epsilon", "v"):
            np.testing.assert_allclose(exact[predicts], 0.0, atol=3 * at[1] * (1 + np.abs(exact["score"]).max()))


@pytest.mark.parametrize("end", ["no data", "no data, flow", "no data and no rates"])
def test_without_data_the_mean_is_taken_where_nothing_is_said(end):
    mean = np.full_like(X, 0.3)
    at = ENDS[end]
    for predicts in ("epsilon", "score"):
        np.testing.assert_array_equal(to_denoised(predicts, 2.0 * X, X, *at, mean=mean), mean)
    np.testing.assert_array_equal(to_denoised("x0", 2.0 * X, X, *at, mean=mean), 2.0 * X)
    np.testing.assert_array_equal(to_denoised("v", 2.0 * X, X, *at, mean=mean), -2.0 * X)
    velocity = to_denoised("velocity", 2.0 * X, X, *at, mean=mean)
    if end == "no data and no rates":
        np.testing.assert_array_equal(velocity, mean)
    else:  # x = eps: the velocity's part of it goes out, what is left is alpha' D
        np.testing.assert_allclose(velocity, (2.0 * X - at[3] * X) / at[2], rtol=1e-14)


@every_schedule
@every_prediction
def test_both_ends_are_finite_with_finite_gradients_in_float32(name, predicts):
    schedule, x = SCHEDULES[name], jnp.asarray(X, jnp.float32)
    close = 2.0 ** -jnp.arange(1.0, 24.0, 2.0)
    times = jnp.concatenate([jnp.array([0.0, 1.0]), close, 1 - close])

    def both(output, x, t):
        at = level(schedule, t)
        return jnp.stack([to_denoised(predicts, output, x, *at, mean=0.1), from_denoised(predicts, output, x, *at)])

    @jax.jit
    @jax.vmap
    def values_and_slopes(t):
        slopes = jax.vmap(jax.jacobian(both, argnums=(0, 1)), (0, 0, None))(0.5 * x, x, t)
        return both(0.5 * x, x, t), *slopes

    for array in values_and_slopes(times):
        assert array.dtype == jnp.float32 and array.shape[0] == times.size
        assert np.all(np.isfinite(array)), (predicts, times[~np.isfinite(array).all(axis=(1, 2))])


@every_prediction
def test_ends_beside_other_levels_in_one_array_leave_them_as_they_are(predicts):
    at = [np.asarray(column)[:, None] for column in zip(*ENDS.values(), (0.8, 0.6, -0.3, 0.4), strict=True)]
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        together = to_denoised(predicts, 0.5 * X, X, *at, mean=0.1)
        back = from_denoised(predicts, 0.5 * X, X, *at)
    together, back = (np.broadcast_to(array, (6, 9)) for array in (together, back))
    for row, end in enumerate((*ENDS.values(), (0.8, 0.6, -0.3, 0.4))):
        np.testing.assert_array_equal(together[row], to_denoised(predicts, 0.5 * X, X, *end, mean=0.1))
        np.testing.assert_array_equal(back[row], from_denoised(predicts, 0.5 * X, X, *end))


@every_prediction
def test_numpy_and_jax_agree(predicts):
    at = level(SCHEDULES["cosine"], 0.4)
    with jax.enable_x64(True):
        for convert in (to_denoised, from_denoised):
            wanted = convert(predicts, 0.5 * X, X, *at)
            got = jax.jit(lambda *args, convert=convert: convert(predicts, *args))(jnp.asarray(0.5 * X), X, *at)
            np.testing.assert_allclose(got, wanted, rtol=1e-13)


@pytest.mark.parametrize(
    "convert",
    [
        check_prediction,
        lambda name: to_denoised(name, X, X, 1.0, 0.5),
        lambda name: from_denoised(name, X, X, 1.0, 0.5),
    ],
)
@pytest.mark.parametrize("name", ["eps", "v_prediction", None, "X0"])
def test_unknown_predictions_are_refused_with_those_that_are_accepted(convert, name):
    with pytest.raises(
        ValueError, match=f"`predicts` must be one of 'epsilon', 'x0', 'v', 'velocity', 'score', got {name!r}"
    ):
        convert(name)
