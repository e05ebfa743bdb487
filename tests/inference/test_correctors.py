"""Feynman-Kac drifts and weights against their partial differential equation; correctors and what they refuse.

The equation of a weighted diffusion dx = v dt + sqrt(c) g dW, dw = w dt, with the unnormalised density p:

    d_t p = -div(p v) + c/2 g^2 Lap p + p w                                                                       (1)

pointwise, without any constant left over, so that log Z is right as well.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ppl
from ppl.gaussian import Gaussian, Noising
from ppl.inference import SMC, FeynmanKac, KernelRatio
from ppl.inference.correctors.feynman_kac import drift, log_weight_rate
from ppl.models import EDM, GaussianMixture, MarkovChain, RectifiedFlow, VarianceExploding, VariancePreserving

SCHEDULES = {
    "linear": VariancePreserving(),
    "cosine": VariancePreserving("cosine"),
    "exploding": VarianceExploding(0.05, 8.0),
    "edm": EDM(0.05, 20.0),
    "flow": RectifiedFlow(),
}


def mixtures(size, num):
    """Mixtures of overlapping modes in some dimensions: means, scales, weights of each."""
    rng = np.random.default_rng(size)
    return [(rng.uniform(-2, 2, (3, size)), rng.uniform(0.4, 0.8, 3), rng.uniform(1, 3, 3)) for _ in range(num)]


def log_density(parameters, schedule):
    """The noisy density of a mixture as a function of x and t, in jax, by its definition."""
    means, scales, weights = (jnp.asarray(part) for part in parameters)

    def evaluate(x, t):
        total = schedule.alpha(t) ** 2 * scales**2 + schedule.sigma(t) ** 2
        squares = jnp.sum((x - schedule.alpha(t) * means) ** 2, axis=1)
        terms = jnp.log(weights / weights.sum()) - 0.5 * (squares / total + x.size * jnp.log(2 * jnp.pi * total))
        return jax.nn.logsumexp(terms)

    return evaluate


CASES = {  # powers b_i(t) and that of the reward, polynomials of t: coefficients of 1, t, t^2; churn
    "the diffusion itself": ([[1], [0], [0]], [0], 1.0),
    "the differential equation itself": ([[1], [0], [0]], [0], 0.0),
    "annealed, target score": ([[2], [0], [0]], [0], 1.0),
    "annealed, tempered noise": ([[2.5], [0], [0]], [0], 1 / 2.5),
    "flattened": ([[0.6], [0], [0]], [0], 1.0),
    "annealed, no noise": ([[3], [0], [0]], [0], 0.0),
    "annealed, much noise": ([[3], [0], [0]], [0], 2.7),
    "product": ([[1], [1], [0]], [0], 1.0),
    "product to a power, tempered noise": ([[1.7], [1.7], [0]], [0], 1 / 1.7),
    "guided": ([[-1.5], [2.5], [0]], [0], 1.0),
    "geometric mean, some churn": ([[0.3], [0.7], [0]], [0], 0.4),
    "many powers": ([[1.3], [-0.4], [0.8]], [0], 1.6),
    "experts that are guided": ([[-1], [1.5], [1.5]], [0], 0.0),
    "a power that changes": ([[1, 2, -1], [0], [0]], [0], 0.7),
    "powers that change": ([[1, 1], [0.5, 0, -1], [0]], [0], 1.0),
    "reward": ([[1], [0], [0]], [1, -1], 1.0),
    "reward of a constant power": ([[1], [0], [0]], [0.8], 1.0),
    "combination with a reward": ([[1.4], [-0.6], [0.9]], [1, 0, -1], 1.0),
    "everything changes": ([[2, -1], [0, 1], [0.3, 0, 1]], [1, -2, 1], 1.0),
}


def reward(x):
    return 0.7 * jnp.sum(jnp.sin(1.3 * x)) + 0.2 * jnp.sum(x) - 0.1 * jnp.sum(x**2) * jnp.cos(x[0])


def padded(coefficients):
    return np.array([[*row, 0.0, 0.0][:3] for row in coefficients], np.float64)


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("size", [1, 2])
def test_drift_and_weight_satisfy_the_weighted_fokker_planck_equation(schedule_name, size):
    schedule = SCHEDULES[schedule_name]
    with jax.enable_x64(True):
        parameters = mixtures(size, 3)
        models = [GaussianMixture(*parts).diffuse(schedule) for parts in parameters]
        densities = [log_density(parts, schedule) for parts in parameters]

        def residual(power_coefficients, reward_coefficients, churn, x, t):
            def powers(t):
                return power_coefficients @ jnp.array([1.0, t, t**2])

            def reward_power(t):
                return reward_coefficients @ jnp.array([1.0, t, t**2])

            def log_target(x, t):
                logs = jnp.array([density(x, t) for density in densities])
                return powers(t) @ logs + reward_power(t) * reward(x)

            rate = schedule.alpha_rate(t) / schedule.alpha(t)  # f = rate x
            squared_noise = 2 * schedule.sigma(t) * (schedule.sigma_rate(t) - rate * schedule.sigma(t))
            tilt = {"reward_gradient": jax.grad(reward)(x), "reward_power": reward_power(t)}

            def velocity(x):
                scores = [model.score(x, t) for model in models]
                given = tilt | {"reward_gradient": jax.grad(reward)(x)}
                return drift(scores, powers(t), rate * x, squared_noise, churn, **given)

            weight = log_weight_rate(
                [model.score(x, t) for model in models],
                powers(t),
                rate * x,
                rate * size,
                squared_noise,
                power_rates=-jax.jacfwd(powers)(t),  # generation runs against t
                log_densities=[model.log_density(x, t) for model in models],
                reward=reward(x),
                reward_power_rate=-jax.grad(reward_power)(t),
                **tilt,
            )
            slope, hessian = jax.grad(log_target)(x, t), jax.hessian(log_target)(x, t)
            terms = jnp.array(  # (1), divided by p
                [
                    -jax.grad(log_target, 1)(x, t),
                    jnp.trace(jax.jacfwd(velocity)(x)),
                    velocity(x) @ slope,
                    -0.5 * churn * squared_noise * (jnp.trace(hessian) + slope @ slope),
                    -weight,
                ]
            )
            return jnp.sum(terms), jnp.max(jnp.abs(terms))

        xs = jnp.asarray(np.random.default_rng(3).uniform(-3, 3, (40, size)))
        ts = jnp.asarray(np.random.default_rng(4).uniform(0.02, 0.97, 40))
        arrays = [np.stack(part) for part in zip(*((padded(b), padded([r])[0], c) for b, r, c in CASES.values()))]
        everywhere = jax.vmap(jax.vmap(residual, (None, None, None, 0, 0)), (0, 0, 0, None, None))
        errors, sizes = jax.jit(everywhere)(*arrays, xs, ts)
        assert np.all(np.isfinite(errors))
        relative = np.abs(errors / sizes).max(1)
        print(schedule_name, size, relative.max())
        assert np.all(relative < 1e-9), dict(zip(CASES, relative, strict=True))
