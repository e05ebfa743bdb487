"""Replica exchange over noise levels: acceptance against densities in float64, chains against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.diagnostics import effective_sample_size

import ppl
from ppl.inference.langevin import MALA, Langevin
from ppl.inference.level_exchange import Ladder, LevelExchange
from ppl.inference.replica_exchange import ReplicaExchange
from ppl.models import Diffusion, GaussianMixture, MarkovChain, VarianceExploding, VariancePreserving

MIXTURE = GaussianMixture(np.array([[-1.2], [1.5]]), np.array([0.5, 0.8]), np.array([0.4, 0.6]))
GAUSSIAN = GaussianMixture(np.array([[0.7, -0.3]]), 0.8)
EXPLODING = VarianceExploding(0.05, 4.0)


def log_normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def normal(x, mean, variance):
    return np.exp(log_normal(x, mean, variance))


def level_density(process, k, x):
    """The mixture's density at a level, numpy float64."""
    alpha, sigma = process.levels.alpha[k], process.levels.sigma[k]
    variance = alpha**2 * MIXTURE.scales**2 + sigma**2
    return (MIXTURE.weights * normal(np.asarray(x)[..., None], alpha * MIXTURE.means[:, 0], variance)).sum(-1)


def start_density(process, x):
    alpha, sigma, model = process.levels.alpha[0], process.levels.sigma[0], process.model
    mean = MIXTURE.weights @ MIXTURE.means[:, 0]
    return normal(x, alpha * mean, sigma**2 + (alpha * model.scale) ** 2)


def step_parts(process, k, x, power):
    """log G(x, x') on a vector of x and one of x', `[n, m]`, and F's mean and variance, numpy float64.

    From the definitions: p = N((r sigma'^2 x + alpha' v D) / sigma^2, u), k = N(x; r x', v), G = p^b k^(1 - b).
    """
    levels = process.levels
    alpha, sigma, alpha_next, sigma_next = levels.alpha[k], levels.sigma[k], levels.alpha[k + 1], levels.sigma[k + 1]
    rate, noise = alpha / alpha_next, sigma**2 - (alpha / alpha_next * sigma_next) ** 2
    total = alpha**2 * MIXTURE.scales**2 + sigma**2
    parts = MIXTURE.weights * normal(x[:, None], alpha * MIXTURE.means[:, 0], total)
    chance = parts / parts.sum(1, keepdims=True)
    each = (sigma**2 * MIXTURE.means[:, 0] + alpha * MIXTURE.scales**2 * x[:, None]) / total
    mean = (rate * sigma_next**2 * x + alpha_next * noise * (chance * each).sum(1)) / sigma**2
    variance = float(process.forward(process.placed(jnp.zeros(1), k), k).squared_scale)  # the model's choice
    precision = power / variance + (1 - power) * rate**2 / noise
    best = (power * mean / variance + (1 - power) * rate * x / noise) / precision

    def log_g(to):
        p = log_normal(to[None], mean[:, None], variance)
        return power * p + (1 - power) * log_normal(x[:, None], rate * to[None], noise)

    return log_g, best, 1 / precision, rate, noise


def states(process, k, x):
    return [jax.vmap(lambda x: process.placed(x, k))(jnp.asarray(x)[:, None])]


@pytest.mark.parametrize(("schedule", "power"), [(EXPLODING, 1.0), (VariancePreserving(), 2.0)], ids=["VE, 1", "VP, 2"])
def test_exchanges_are_in_detailed_balance_with_the_levels(schedule, power):
    """(1) with the log-densities of the levels: pi pi q a is the same there and back, from definitions in numpy."""
    with jax.enable_x64(True):
        process = MIXTURE.diffuse(schedule).reverse(num_steps=4)
        ladder = Ladder((process**power).combination())
        assert ladder.knows_densities
        rng = np.random.default_rng(0)
        for k in range(4):
            top = k == 0
            x, to = rng.normal(0, 1.5, 6) * np.hypot(1.5, process.levels.sigma[k]), rng.normal(0, 1.5, 6)
            back, end = rng.normal(0, 1.5, 6) * np.hypot(1.5, process.levels.sigma[k]), rng.normal(0, 1.5, 6)
            weight = jax.vmap(lambda high, low: ladder.log_weight(k, high, low, True))  # noqa: B023
            log_ratio = weight(states(process, k, x), states(process, k + 1, to)) - weight(
                states(process, k, back), states(process, k + 1, end)
            )

            def log_pi(k, x, process=process):
                return power * np.log(start_density(process, x) if k == 0 else level_density(process, k, x))

            def log_q(high, low, new_high, new_low, k=k):
                """Down from `high` to `new_low`, up from `low` to `new_high`."""
                _, mean, variance, rate, noise = step_parts(process, k, high, power)
                return log_normal(new_low, mean, variance) + log_normal(new_high, rate * low, noise)

            # there: (x, end) -> (back, to)
            there = log_pi(k, x) + log_pi(k + 1, end) + log_q(x, end, back, to)
            return_ = log_pi(k, back) + log_pi(k + 1, to) + log_q(back, to, x, end)
            np.testing.assert_allclose(log_ratio, return_ - there, rtol=1e-6, atol=1e-6, err_msg=f"{k} {top}")


def test_kernel_ratios_are_those_of_densities_where_steps_invert_the_noising():
    """One Gaussian with the matched variance: the two weights differ by a constant of the level."""
    with jax.enable_x64(True):
        known = GAUSSIAN.diffuse(VariancePreserving())
        ratios = known.reverse(num_steps=5).levels.log_ratio[:-1][::-1]
        squared = np.exp(2 * ratios)
        exact = Diffusion(
            known.denoise,
            (2,),
            known.schedule,
            "x0",
            mean=known.mean,
            scale=known.scale,
            error=(ratios, 0.64 * squared / (0.64 + squared)),  # at the grid's levels, where nothing is interpolated
            log_density=known.log_density,
        )
        process = exact.reverse(num_steps=5)
        ladder = Ladder((process**2.0).combination())
        rng = np.random.default_rng(1)
        for k in range(5):
            differences = []
            for _ in range(5):
                high, low = ([process.placed(jnp.asarray(rng.normal(0, 1, 2)), j)] for j in (k, k + 1))
                weights = [float(ladder.log_weight(k, high, low, use)) for use in (True, False)]
                differences.append(weights[0] - weights[1])
            np.testing.assert_allclose(differences, differences[0], atol=1e-9)


def path_marginal(process, power, grid, log_reward=0.0):
    """The last level's law under the measure on paths, by quadrature, numpy float64."""
    mass = start_density(process, grid) ** power
    for k in range(process.num_steps):
        mass = (mass[:, None] * np.exp(step_parts(process, k, grid, power)[0](grid))).sum(0)
        mass /= mass.sum()
    mass = mass * np.exp(log_reward)
    return mass / mass.sum()


def assert_moments(draws, grid, mass, fewest=400):
    """Compare the moments of chains `[chains, samples]` with those on a grid, by 5 standard errors at their ESS."""
    assert_values = {"mean": lambda x: x, "square": np.square, "right": lambda x: np.tanh(2 * x)}
    for name, function in assert_values.items():
        values = function(np.asarray(draws, np.float64))
        ess = effective_sample_size(values)
        assert ess > fewest, (name, ess)
        z = (values.mean() - mass @ function(grid)) / (values.std() / np.sqrt(ess))
        assert abs(z) < 5, (name, values.mean(), mass @ function(grid), z, ess)


GRID = np.linspace(-25, 25, 2001)
FINE = np.linspace(-6, 6, 2401)


@pytest.mark.optimized
@pytest.mark.parametrize(("power", "num_steps", "slope"), [(0.5, 3, 0.0), (1.3, 4, 0.7)])
def test_paths_have_the_measure_on_paths_however_few_the_steps(power, num_steps, slope):
    process = MIXTURE.diffuse(EXPLODING).reverse(num_steps=num_steps)
    target = process**power
    if slope:
        target = target.tilt(lambda x: slope * x[0], twist=lambda state: 0.5 * state["denoised"][0])
    posterior = ppl.infer(target, ReplicaExchange(2000, 50, 16, LevelExchange(paths=True)))
    assert posterior.guarantee == "invariant"
    exact = path_marginal(process, power, GRID, slope * GRID)
    assert_moments(posterior.value[:, 0].reshape(16, -1), GRID, exact)


@pytest.mark.optimized
@pytest.mark.parametrize("exploration", [None, MALA(0.3)])
def test_levels_have_the_power_of_the_last_density_however_few_the_steps(exploration):
    process = MIXTURE.diffuse(EXPLODING).reverse(num_steps=3)
    posterior = ppl.infer(process**2, ReplicaExchange(2000, 50, 16, LevelExchange(exploration=exploration)))
    assert posterior.guarantee == "invariant"
    exact = level_density(process, 3, FINE) ** 2
    assert_moments(posterior.value[:, 0].reshape(16, -1), FINE, exact / exact.sum())


def test_levels_and_paths_differ_where_steps_are_few():
    """The two exact answers are not one: what each chain is compared with above matters."""
    process = MIXTURE.diffuse(EXPLODING).reverse(num_steps=3)
    level = level_density(process, 3, GRID) ** 0.5
    assert abs((level / level.sum() - path_marginal(process, 0.5, GRID)) @ GRID**2) > 0.1


@pytest.mark.optimized
def test_a_model_without_densities_is_exchanged_by_kernels():
    known = GAUSSIAN.diffuse(VarianceExploding(0.05, 5.0))
    model = Diffusion(
        known.denoise, (2,), known.schedule, "x0", mean=known.mean, scale=known.scale, error=known._error_table
    )
    process = model.reverse(num_steps=6)
    posterior = ppl.infer(process**2, ReplicaExchange(1000, 50, 16))
    assert posterior.guarantee == "discretised"
    variance = (0.64 + process.levels.sigma[-1] ** 2) / 2
    for axis in (0, 1):
        sd, mean = np.sqrt(variance), GAUSSIAN.means[0, axis]
        grid = np.linspace(mean - 8 * sd, mean + 8 * sd, 2001)
        mass = normal(grid, mean, variance)
        assert_moments(posterior.value[:, axis].reshape(16, -1), grid, mass / mass.sum())


def test_posterior_of_chains():
    process = GAUSSIAN.diffuse(VarianceExploding(0.05, 5.0)).reverse(num_steps=4)
    for kernel, each in (
        (LevelExchange(paths=True), 5),
        (LevelExchange(exploration=Langevin(num_steps=2)), 9 + 3 * 2),
        (LevelExchange(), 9),
    ):
        assert kernel.network_calls(Ladder((process * process).combination()), 8) == 4 + 8 * each
    posterior = ppl.infer(process**2, ReplicaExchange(5, 3, 2))
    assert posterior.value.shape == (10, 2)
    assert np.isnan(posterior.log_evidence)
    np.testing.assert_allclose(posterior.weights, 0.1, rtol=1e-5)
    assert posterior.diagnostics["acceptance"].shape == (2, 4)
    assert posterior.diagnostics["network_calls"] == 2 * (4 + 8 * each)
    assert "guarantee: invariant" in repr(posterior)
    again = ppl.infer(process**2, ReplicaExchange(5, 3, 2))
    np.testing.assert_array_equal(posterior.value, again.value)
    other = ppl.infer(process**2, ReplicaExchange(5, 3, 2), seed=1)
    assert not np.allclose(posterior.value, other.value)


def test_one_step_is_two_levels():
    process = GAUSSIAN.diffuse(VarianceExploding(0.05, 5.0)).reverse(num_steps=1)
    assert ppl.infer(process, ReplicaExchange(5, 0, 1)).value.shape == (5, 2)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        ReplicaExchange(0)
    with pytest.raises(TypeError, match="`kernel` must be a LevelExchange"):
        ReplicaExchange(10, kernel=MALA())
    with pytest.raises(TypeError, match="`exploration` must be"):
        LevelExchange(exploration="mala")
    with pytest.raises(ValueError, match="`exploration` moves a level's density, which paths do not have"):
        LevelExchange(paths=True, exploration=Langevin())
    with pytest.raises(TypeError, match="`paths` must be True or False"):
        LevelExchange(paths=1)


def test_targets_that_do_not_fit_are_refused():
    process = GAUSSIAN.diffuse(VarianceExploding(0.05, 5.0)).reverse(num_steps=4)
    run = ReplicaExchange(5)

    @ppl.model
    def plain():
        return jnp.zeros(())

    with pytest.raises(TypeError, match="levels of diffusion targets"):
        ppl.infer(plain(), run)
    with pytest.raises(TypeError, match="noise levels of diffusion models"):
        ppl.infer(MarkovChain(jnp.zeros(2), jnp.zeros((2, 2)), 3), run)
    with pytest.raises(ValueError, match="churn 0.5"):
        ppl.infer(GAUSSIAN.diffuse(EXPLODING).reverse(num_steps=4, churn=0.5), run)
    with pytest.raises(ValueError, match="the target has \\['watch'\\]"):
        ppl.infer(process.watch("x", lambda state: state["x"]), run)
    with pytest.raises(TypeError, match="`log_reward` must be a JAX function"):
        ppl.infer(process.tilt(ppl.host(lambda texts: [0.0])), run)
    with pytest.raises(ValueError, match="`exploration` does not see the twist"):
        tilted = process.tilt(lambda x: x[0], twist=lambda state: state["x"][0])
        ppl.infer(tilted, ReplicaExchange(5, kernel=LevelExchange(exploration=Langevin())))
    model = Diffusion(lambda x, t: x, (2,), EXPLODING, error=([0.0], [0.1]))
    with pytest.raises(TypeError, match="needs the log-density"):
        ppl.infer(model.reverse(num_steps=4), ReplicaExchange(5, kernel=LevelExchange(exploration=MALA())))
    with pytest.raises(ValueError, match="`keep` names sites"):
        ppl.infer(process, run, keep=["path"])
    with pytest.raises(ValueError, match="`state` continues"):
        ppl.infer(process, run, state=1)
