"""Moves at the noise levels of diffusion targets: runs against closed forms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, FeynmanKac
from ppl.inference.hamiltonian import HMC
from ppl.inference.langevin import MALA, Langevin
from ppl.inference.level_moves import LevelMoves
from ppl.models import Diffusion, GaussianMixture, MarkovChain, VarianceExploding, VariancePreserving
from tests.ppl.checks import assert_mean_within_5_standard_errors, repeat

# One Gaussian, for which steps with the matched variance invert the noising, so that every level is exact.

GAUSSIAN = GaussianMixture(np.array([[0.7, -0.3]]), 0.8)


def closed_form(process, power):
    """Mean, variance and log Z of the power of the Gaussian at the last level."""
    level = process.levels
    variance = (level.alpha[-1] * 0.8) ** 2 + level.sigma[-1] ** 2
    log_z = 0.5 * 2 * (np.log(2 * np.pi * variance) * (1 - power) - np.log(power))
    return level.alpha[-1] * GAUSSIAN.means[0], variance / power, log_z


@pytest.mark.parametrize(("kernel", "power"), [(MALA(), 1.0), (HMC(0.6, 3), 2.0), (MALA(0.5, num_steps=2), 2.0)])
def test_adjusted_moves_leave_an_exact_run_exact(kernel, power):
    process = GAUSSIAN.diffuse(VariancePreserving()).reverse(num_steps=8)
    mean, variance, log_z = closed_form(process, power)

    def statistics(posterior):
        ratio = jnp.exp(posterior.log_evidence - log_z)
        x = posterior.value
        weighted = jnp.exp(posterior.log_weights)[:, None] * jnp.concatenate([x - mean, (x - mean) ** 2 - variance], 1)
        return jnp.concatenate([jnp.sum(weighted, 0) * ratio, ratio[None]])

    runs = repeat(process**power, SMC(64, rejuvenation=kernel), statistics, 200)
    if power == 1.0:
        np.testing.assert_allclose(runs[:, -1], 1.0, atol=1e-4)
        runs, truth = runs[:, :-1], np.zeros(4)
    else:
        truth = np.array([0, 0, 0, 0, 1.0])
    assert_mean_within_5_standard_errors(runs, truth, repr(kernel))


def test_adjusted_moves_leave_a_tilted_run_exact():
    """The twist follows the state that moved: weights stay proper."""
    process = GAUSSIAN.diffuse(VarianceExploding(0.01, 5.0)).reverse(num_steps=8)
    slope = np.array([0.8, -0.5])
    mean, variance, _ = closed_form(process, 1.0)
    log_z = slope @ mean + 0.5 * variance * slope @ slope
    target = process.tilt(lambda x: x @ slope, twist=lambda state: 0.5 * state["denoised"] @ slope)

    def statistics(posterior):
        ratio = jnp.exp(posterior.log_evidence - log_z)
        centred = posterior.value - (mean + variance * slope)
        return jnp.concatenate([ratio * (jnp.exp(posterior.log_weights) @ centred), ratio[None]])

    runs = repeat(target, SMC(128, rejuvenation=MALA(0.5)), statistics, 200)
    assert_mean_within_5_standard_errors(runs, np.array([0, 0, 1.0]))


def test_two_factors_move_by_their_product():
    """A product of Gaussians is a Gaussian at every level."""
    schedule = VarianceExploding(0.01, 5.0)
    other = GaussianMixture(np.array([[-0.5, 0.4]]), 0.8)
    p, q = (data.diffuse(schedule).reverse(num_steps=8, grid="time") for data in (GAUSSIAN, other))
    variance = 0.8**2 + p.levels.sigma[-1] ** 2
    apart = np.sum((GAUSSIAN.means[0] - other.means[0]) ** 2)
    log_z = -np.log(4 * np.pi * variance) - apart / (4 * variance)
    middle = (GAUSSIAN.means[0] + other.means[0]) / 2

    def statistics(posterior):
        ratio = jnp.exp(posterior.log_evidence - log_z)
        return jnp.concatenate([ratio * (jnp.exp(posterior.log_weights) @ (posterior.value - middle)), ratio[None]])

    runs = repeat(p * q, SMC(64, rejuvenation=MALA(0.5)), statistics, 200)
    assert_mean_within_5_standard_errors(runs, np.array([0, 0, 1.0]))


def test_energies_move_as_mixtures_do():
    """A model made from its log-density is the mixture that the density is of."""
    exact = GAUSSIAN.diffuse(VarianceExploding(0.01, 5.0))

    def energy(x, t):
        level = exact.level(t)
        return -0.5 * jnp.sum((x - exact.mean) ** 2) / (0.64 + level.sigma**2)

    model = Diffusion(
        None, (2,), exact.schedule, mean=exact.mean, scale=exact.scale, error=exact._error_table, log_density=energy
    )
    assert model.knows_density
    x = jnp.array([0.3, 1.1])
    np.testing.assert_allclose(model.denoise(x, 0.4), exact.denoise(x, 0.4), rtol=1e-4)
    runs = [
        ppl.infer(m.reverse(num_steps=6) ** 2, SMC(64, rejuvenation=MALA(0.5)), keep=["moves/accepted"])
        for m in (model, exact)
    ]
    np.testing.assert_allclose(runs[0].value, runs[1].value, atol=1e-3)
    np.testing.assert_array_equal(runs[0].sites["moves/accepted"], runs[1].sites["moves/accepted"])
    accepted = np.asarray(runs[0].sites["moves/accepted"])
    assert set(np.unique(accepted)) == {0.0, 1.0}
    assert np.all(accepted[:, 0] == 1)  # none is due before the first step
    assert any(set(np.unique(column)) == {0.0, 1.0} for column in accepted.T)  # particles of one step differ


# What Langevin gives: modes are found again, at a bias that falls with the number of steps.


@pytest.mark.optimized
def test_langevin_finds_modes_at_little_cost_in_log_z():
    means = np.random.default_rng(0).uniform(-3, 3, (6, 2))
    data = GaussianMixture(means, 0.45)
    grid = np.linspace(-6, 6, 401)
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    squares = ((points[:, None] - means) ** 2).sum(-1)
    power = (np.exp(-0.5 * squares / 0.45**2).mean(1) / (2 * np.pi * 0.45**2)) ** 2
    log_z = np.log(power.sum() * (grid[1] - grid[0]) ** 2)
    mass = np.array([power[squares.argmin(1) == i].sum() for i in range(6)]) / power.sum()
    process = data.diffuse(VarianceExploding(0.01, 8.0)).reverse(num_steps=200)

    def statistics(posterior):
        near = jnp.argmin(jnp.sum((posterior.value[:, None] - means) ** 2, -1), 1)
        found = jnp.exp(posterior.log_weights) @ jax.nn.one_hot(near, 6)
        return jnp.stack([posterior.log_evidence - log_z, 0.5 * jnp.sum(jnp.abs(found - mass))])

    plain, langevin, mala = (
        np.asarray(repeat(process**2, SMC(2000, rejuvenation=kernel), statistics, 6, seed=3)).mean(0)
        for kernel in (None, Langevin(), MALA())
    )
    for moved in (langevin, mala):
        assert moved[1] < 0.75 * plain[1], (moved, plain)
        assert abs(moved[0]) < 0.1, (moved, plain)


def test_a_predictor_corrector_run_weighs_nothing():
    process = GAUSSIAN.diffuse(VariancePreserving()).reverse(num_steps=10)
    posterior = ppl.infer(process, SMC(500, rejuvenation=Langevin()))
    assert posterior.guarantee == "discretised"
    np.testing.assert_allclose(posterior.log_evidence, 0.0, atol=1e-6)
    np.testing.assert_allclose(posterior.ess, 500, rtol=1e-5)
    plain = ppl.infer(process, SMC(500))
    assert not np.allclose(posterior.value, plain.value)


@pytest.mark.parametrize(
    ("kernel", "each"), [(Langevin(num_steps=2), 2), (MALA(num_steps=2), 5), (HMC(num_leapfrog=3, num_steps=2), 13)]
)
def test_calls_of_moves_are_counted(kernel, each):
    process = GAUSSIAN.diffuse(VariancePreserving()).reverse(num_steps=10)
    for every, moves in ((1, 9), (3, 3), (4, 2), (9, 1)):
        assert LevelMoves(kernel, every).network_calls([process, process]) == 2 * moves * each
    posterior = ppl.infer(process, SMC(4, rejuvenation=kernel, rejuvenate_every=4))
    assert posterior.diagnostics["network_calls"] == 4 * (10 + 2 * each)


def test_moves_that_are_never_due_change_nothing():
    process = GAUSSIAN.diffuse(VariancePreserving()).reverse(num_steps=5)
    plain = ppl.infer(process**2, SMC(50))
    never = ppl.infer(process**2, SMC(50, rejuvenation=MALA(), rejuvenate_every=5))
    np.testing.assert_array_equal(plain.value, never.value)
    assert never.diagnostics["network_calls"] == plain.diagnostics["network_calls"]


def test_moves_are_due_at_fixed_steps():
    process = GAUSSIAN.diffuse(VariancePreserving()).reverse(num_steps=8)
    algorithm = SMC(200, rejuvenation=HMC(3.0, 1), rejuvenate_every=3)  # steps so long that many are refused
    accepted = ppl.infer(process**2, algorithm, keep=["moves/accepted"]).sites["moves/accepted"]
    refused = np.asarray(accepted == 0).any(0)
    assert refused.tolist() == [t in (3, 6) for t in range(8)]


def test_moves_go_with_continuous_time_weights():
    """Their bias falls as steps grow in number."""
    errors = []
    for num_steps in (25, 100):
        process = GAUSSIAN.diffuse(VarianceExploding(0.1, 5.0)).reverse(num_steps=num_steps)
        posterior = ppl.infer(process**2, SMC(1000, corrector=FeynmanKac(), rejuvenation=MALA()))
        assert posterior.guarantee == "discretised"
        errors.append(abs(float(posterior.log_evidence) - closed_form(process, 2.0)[2]))
    assert errors[1] < 0.5 * errors[0], errors


def test_guarantees():
    assert SMC(10, rejuvenation=MALA()).guarantee == "discretised"
    assert SMC(10, rejuvenation=Langevin(), corrector="none").guarantee == "heuristic"
    assert SMC(10).guarantee == "unbiased"


def test_bad_settings_are_refused():
    with pytest.raises(TypeError, match="`rejuvenation` must be a kernel such as .*Langevin"):
        SMC(10, rejuvenation="langevin")
    with pytest.raises(ValueError, match="`rejuvenate_every` must be at least 1, got 0"):
        SMC(10, rejuvenation=MALA(), rejuvenate_every=0)


def test_moves_that_do_not_fit_name_those_that_do():
    model = Diffusion(lambda x, t: x, (2,), VarianceExploding(0.01, 5.0), error=([0.0], [0.1]))
    process = model.reverse(num_steps=5)
    named = re.escape(repr(process))
    with pytest.raises(TypeError, match=f"`rejuvenation` MALA.* needs the log-density .*{named}.*Langevin"):
        ppl.infer(process, SMC(10, rejuvenation=MALA()))
    with pytest.raises(TypeError, match="needs the log-density"):
        known = GAUSSIAN.diffuse(VarianceExploding(0.01, 5.0)).reverse(num_steps=5, grid="time")
        ppl.infer(known * model.reverse(num_steps=5, grid="time"), SMC(10, rejuvenation=HMC()))
    with pytest.raises(TypeError, match="does not know its log-density"):
        model.log_density(jnp.zeros(2), 0.5)
    chain = MarkovChain(jnp.zeros(2), jnp.zeros((2, 2)), 3)
    for program in (chain, chain**2):
        with pytest.raises(TypeError, match="moves continuous sites, of which the program has none"):
            ppl.infer(program, SMC(10, rejuvenation=Langevin()))
    with pytest.raises(ValueError, match="by_steps"):
        ppl.infer(process.by_steps(max_steps=2, step_tokens=2), SMC(10, rejuvenation=Langevin()))
