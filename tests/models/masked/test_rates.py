"""Continuous-time rates and weights solve the equation of weighted particles on a small chain, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.models.masked.rates import log_weight_rate, unmasking_rates

from . import tables

LENGTH, SIZE = 3, 2
STATES = tables.states(LENGTH, SIZE)
JOINTS = np.array([tables.random_joint(seed, LENGTH, SIZE) for seed in (1, 2, 3)])
HOLES = tables.random_joint(4, LENGTH, SIZE, forbid=[1, 4])
REWARD = np.random.default_rng(5).normal(size=len(STATES))
SCHEDULES = {
    "linear": (lambda tau: 1 - tau, lambda tau: -1.0),
    "cosine": (lambda tau: 1 - np.sin(np.pi * tau / 2), lambda tau: -np.pi / 2 * np.cos(np.pi * tau / 2)),
}
CASES = {
    "annealing": (JOINTS[:1], [2.5], 0.0),
    "flattening": (JOINTS[:1], [0.4], 0.0),
    "product": (JOINTS[:2], [1.0, 1.0], 0.0),
    "guidance": (JOINTS[:2], [-0.7, 1.7], 0.0),
    "guidance by what has holes": (np.stack([JOINTS[0], HOLES]), [-0.7, 1.7], 0.0),
    "general product": (JOINTS, [0.5, 1.7, -0.6], 0.0),
    "reward": (JOINTS[:1], [1.0], 1.0),
    "product with a reward": (JOINTS[:2], [1.3, 0.9], 1.0),
}


def marginals(joint, keep):
    """p_tau(x) of every state, and its number of masks."""
    whole, masks = tables.sequences(LENGTH, SIZE), (STATES == SIZE).sum(axis=1)
    agrees = np.all((STATES[:, None] == SIZE) | (STATES[:, None] == whole), axis=-1)
    return keep ** (LENGTH - masks) * (1 - keep) ** masks * (agrees @ joint), masks


def neighbours():
    """For each state, position and token the state with that token there."""
    out = np.repeat(STATES[:, None, None], LENGTH, axis=1).repeat(SIZE, axis=2)
    for position in range(LENGTH):
        out[:, position, :, position] = np.arange(SIZE)
    return tables.code(out, SIZE)


def residual(joints, powers, tilts, schedule, tau):
    """du/dt less inflow, outflow and weight, over u, for u = prod_i p_i^b_i exp(a(t) r)."""
    (alpha, alpha_rate), powers = SCHEDULES[schedule], np.array(powers)
    keep, rate = alpha(tau), alpha_rate(tau)
    a, a_rate = tilts * (1 - tau) ** 2, tilts * 2 * (1 - tau)  # of t = 1 - tau
    p, masks = zip(*(marginals(joint, keep) for joint in joints), strict=True)
    masks = masks[0]
    h = tables.raised(p, powers) * np.exp(a * REWARD)
    change = -powers.sum() * ((LENGTH - masks) * rate / keep - masks * rate / (1 - keep)) + a_rate * REWARD
    after = neighbours()
    jumps = a * (REWARD[after] - REWARD[:, None, None])
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([tables.conditionals(joint, LENGTH, SIZE) for joint in joints])).swapaxes(0, 1)
    arguments = (powers, STATES == SIZE, keep, -rate / keep, jumps)
    axes = (0, None, 0, None, None, 0)
    rates = np.asarray(jax.vmap(unmasking_rates, axes)(log_probs, *arguments))
    weight = np.asarray(jax.vmap(log_weight_rate, (*axes, 0))(log_probs, *arguments, a_rate * REWARD))
    assert rates.dtype == weight.dtype == np.float64
    inflow = np.zeros(len(STATES))
    np.add.at(inflow, after, h[:, None, None] * rates)
    alive = h > 0
    error = change * h - (inflow - rates.sum(axis=(1, 2)) * h + weight * h)
    assert np.all(inflow[~alive] == 0)
    return np.abs(error[alive] / h[alive])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_rates_and_weight_solve_the_equation(name, schedule):
    with jax.enable_x64(True):
        for tau in (0.05, 0.3, 0.7, 0.98):
            assert residual(*CASES[name], schedule, tau).max() < 1e-8


def test_published_forms_for_the_linear_schedule():
    """Annealing and the product as they are written in the paper."""
    with jax.enable_x64(True):
        tau, masked = 0.3, np.array([True, False, True])
        mu = np.random.default_rng(0).dirichlet(np.ones(4), (2, 3))
        found = log_weight_rate(jnp.log(mu[:1]), [2.5], masked, 1 - tau, 1 / (1 - tau))
        z = (mu[0] ** 2.5).sum(axis=-1)[masked]
        assert float(found) == pytest.approx(np.sum(2.5 * (1 - tau) ** 1.5 * tau**-2.5 * z - 2.5 / tau), rel=1e-12)
        found = log_weight_rate(jnp.log(mu), [1.0, 1.0], masked, 1 - tau, 1 / (1 - tau))
        z = (mu[0] * mu[1]).sum(axis=-1)[masked]
        assert float(found) == pytest.approx(np.sum(2 * (1 - tau) / tau**2 * z - 2 / tau), rel=1e-12)


def test_one_factor_unmasks_at_the_reversed_rates_without_weight():
    mu = np.random.default_rng(1).dirichlet(np.ones(4), (1, 3))
    masked = np.array([True, True, False])
    rates = unmasking_rates(jnp.log(mu), [1.0], masked, 0.4, 2.0)
    np.testing.assert_allclose(rates, np.where(masked[:, None], 2.0 * 0.4 / 0.6 * mu[0], 0.0), rtol=1e-5)
    assert abs(float(log_weight_rate(jnp.log(mu), [1.0], masked, 0.4, 2.0))) < 1e-5
