"""Langevin and Hamiltonian moves: invariance by quadrature in float64, long chains against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.diagnostics import effective_sample_size

from ppl.inference.acceptance import Point, evaluate_density
from ppl.inference.hamiltonian import HMC, hamiltonian_proposal, leapfrog
from ppl.inference.langevin import MALA, Langevin, adjusted_proposal, adjusted_step, unadjusted_step

# A mixture on the line: its density and score, known independently of the code under test.
WEIGHTS, MEANS, SCALES = np.array([0.3, 0.7]), np.array([-1.5, 1.0]), np.array([0.5, 0.9])


def density(x):
    """The mixture's density, numpy float64."""
    z = (np.asarray(x)[..., None] - MEANS) / SCALES
    return (WEIGHTS * np.exp(-0.5 * z**2) / SCALES / np.sqrt(2 * np.pi)).sum(-1)


def log_density(x):
    z = (x - MEANS) / SCALES
    return jax.nn.logsumexp(jnp.log(WEIGHTS / SCALES) - 0.5 * z**2) - 0.5 * np.log(2 * np.pi)


EVALUATE = evaluate_density(jax.value_and_grad(log_density))
CURVED = lambda x: Point(x, log_density(x), jnp.sin(3 * x))  # noqa: E731  a field that is no gradient of log pi
PROPOSALS = {
    "MALA": lambda evaluate, x, noise: adjusted_proposal(evaluate, evaluate(x), noise, 0.3),
    "HMC": lambda evaluate, x, noise: hamiltonian_proposal(evaluate, evaluate(x), noise, 0.4, 3),
}


@pytest.mark.parametrize("field", ["score", "another field"])
@pytest.mark.parametrize("name", PROPOSALS)
def test_adjusted_moves_leave_the_density_as_it_is(name, field):
    evaluate = EVALUATE if field == "score" else CURVED
    with jax.enable_x64(True):
        x, z = np.linspace(-7, 7, 1401), np.linspace(-7, 7, 1001)
        every = jax.vmap(jax.vmap(functools.partial(PROPOSALS[name], evaluate), (None, 0)), (0, None))
        proposed, log_ratio = jax.jit(every)(x, z)
        proposed, log_ratio = np.asarray(proposed.x), np.asarray(log_ratio)
    normal = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    flow = density(x)[:, None] * normal * np.minimum(1, np.exp(log_ratio)) * (x[1] - x[0]) * (z[1] - z[0])
    assert 0.02 < (flow * (np.abs(proposed - x[:, None]) > 0.1)).sum() < 0.999  # it moves, and not always
    for test in (lambda x: x, np.square, np.cos, lambda x: np.exp(-((x - 0.4) ** 2)), lambda x: np.tanh(3 * x)):
        change = (flow * (test(proposed) - test(x)[:, None])).sum()  # (pi K - pi)(test)
        assert abs(change) < 1e-6, (name, field, change)


def test_mala_is_in_detailed_balance_with_its_proposal_density():
    rng = np.random.default_rng(0)
    step = 0.3
    with jax.enable_x64(True):
        for a, b in rng.normal(0.0, 2.0, (50, 2)):
            score = jax.grad(log_density)

            def log_q(to, at, score=score):
                return -((to - at - step * float(score(at))) ** 2) / (4 * step)

            noise = (b - a - step * float(score(a))) / np.sqrt(2 * step)
            proposed, log_ratio = adjusted_proposal(EVALUATE, EVALUATE(jnp.float64(a)), noise, step)
            np.testing.assert_allclose(proposed.x, b, atol=1e-12)
            expected = np.log(density(b)) - np.log(density(a)) + log_q(a, b) - log_q(b, a)
            np.testing.assert_allclose(log_ratio, expected, rtol=1e-9, atol=1e-10)


def test_leapfrog_comes_back_and_preserves_volume():
    with jax.enable_x64(True):
        for evaluate in (EVALUATE, CURVED):

            def run(pair, evaluate=evaluate):
                point, momentum = leapfrog(evaluate, evaluate(pair[0]), pair[1], 0.3, 5)
                return jnp.stack([point.x, momentum])

            start = jnp.array([0.3, -1.2])
            end = run(start)
            np.testing.assert_allclose(run(end * jnp.array([1, -1])) * jnp.array([1, -1]), start, atol=1e-12)
            np.testing.assert_allclose(jnp.linalg.det(jax.jacfwd(run)(start)), 1.0, atol=1e-12)


def test_one_leapfrog_step_is_a_langevin_step():
    with jax.enable_x64(True):
        point = EVALUATE(jnp.float64(0.4))
        langevin = adjusted_proposal(EVALUATE, point, 0.7, 0.08)
        hamiltonian = hamiltonian_proposal(EVALUATE, point, 0.7, 0.4, 1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), langevin, hamiltonian)


def test_unadjusted_steps_are_exact_only_as_they_shrink():
    """On a Gaussian of variance 1 the step h keeps the variance 1 / (1 - h / 2)."""
    evaluate = evaluate_density(lambda x: (-0.5 * x**2, -x))
    for step in (0.1, 0.4):
        x = jnp.linspace(-1, 1, 5)
        moved = jax.vmap(lambda x: unadjusted_step(evaluate, evaluate(x), 1.0, step).x)(x)  # noqa: B023
        kept = 1 / (1 - step / 2)
        np.testing.assert_allclose(moved, (1 - step) * x + np.sqrt(2 * step), rtol=1e-5)
        np.testing.assert_allclose((1 - step) ** 2 * kept + 2 * step, kept)


@pytest.mark.parametrize("kernel", [MALA(0.25, 2), HMC(0.5, 4)])
def test_long_chains_have_the_moments_of_a_mixture(kernel):
    means = np.array([[-1.0, 0.5], [1.0, 0.0], [0.3, -1.2]])
    weights, scale = np.array([0.5, 0.3, 0.2]), 0.6

    def log_pi(x):
        return jax.nn.logsumexp(jnp.log(weights) - 0.5 * jnp.sum((x - means) ** 2, 1) / scale**2)

    evaluate = evaluate_density(jax.value_and_grad(log_pi))

    def sweep(points, key):
        def one(point, key):
            laws, keys = kernel.randomness((2,)), jax.random.split(key)
            random = {name: law.sample(key) for (name, law), key in zip(laws.items(), keys, strict=True)}
            return kernel.move(evaluate, point, random, kernel.step_size)

        points, rate = jax.vmap(one)(points, jax.random.split(key, 32))
        return points, (points.x, rate)

    start = jax.vmap(evaluate)(jnp.zeros((32, 2)))
    _, (x, rate) = jax.jit(lambda keys: jax.lax.scan(sweep, start, keys))(jax.random.split(jax.random.key(0), 2500))
    assert 0.5 < float(rate.mean()) < 0.999
    x = np.moveaxis(np.asarray(x[200:], np.float64), 1, 0)
    truth = {
        "mean": (x, weights @ means),
        "square": (x**2, weights @ (means**2 + scale**2)),
        "product": (x[..., :1] * x[..., 1:], weights @ (means[:, :1] * means[:, 1:])),
    }
    for name, (values, expected) in truth.items():
        ess = effective_sample_size(values)
        assert np.all(ess > 2000), (name, ess)
        z = (values.mean((0, 1)) - expected) / (values.std((0, 1)) / np.sqrt(ess))
        assert np.all(np.abs(z) < 5), (name, z, ess)


def test_each_particle_is_accepted_alone():
    evaluate = evaluate_density(jax.value_and_grad(lambda x: -0.5 * jnp.sum(x**2)))
    points = jax.vmap(evaluate)(jnp.array([[2.0, 0.0], [0.0, 0.0]]))
    noise = jnp.array([[-0.5, 0.0], [4.0, 4.0]])  # towards the mode, and far from it
    step = jax.vmap(adjusted_step, (None, 0, 0, None, None))
    moved, accepted = step(evaluate, points, noise, jnp.float32(0.5), jnp.float32(1.5))
    assert accepted.tolist() == [True, False]
    np.testing.assert_array_equal(moved.x[1], points.x[1])
    assert not np.allclose(moved.x[0], points.x[0])
    np.testing.assert_allclose(moved.score, -moved.x, atol=1e-6)


def test_what_is_not_a_number_is_refused():
    evaluate = evaluate_density(lambda x: (jnp.where(x > 1, jnp.nan, 0.0), jnp.zeros(())))
    moved, accepted = adjusted_step(evaluate, evaluate(jnp.float32(0.9)), 3.0, jnp.float32(0.0), 0.5)
    assert not bool(accepted)
    assert float(moved.x) == pytest.approx(0.9)


def test_bad_settings_are_refused():
    for step_size, error in ((0.0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("a", TypeError)):
        for kernel in (Langevin, MALA, HMC):
            with pytest.raises(error, match="`step_size` must be"):
                kernel(step_size)
    with pytest.raises(ValueError, match="`num_steps` must be at least 1, got 0"):
        MALA(0.1, 0)
    with pytest.raises(ValueError, match="`num_leapfrog` must be at least 1, got 0"):
        HMC(0.1, 0)
