"""Derivatives of the evidence by enumeration: draws, proposals, resampling, moves and stops of finite programs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.derivatives import path_draws
from ppl.inference import MCMC, MH, SMC, EntropicAnnealing, ImportanceSampling, Lookahead, Regenerate
from ppl.testing import assert_unbiased_gradient, enumerate_runs

THETA = {"stay": 0.7, "start": 0.4}


@ppl.model
def chain(theta, proposes=False):
    """A chain of two states; its draws, its observations and the array it closes over have derivatives."""

    def step(x, y):
        probability = jnp.where(x == 1, theta["stay"], theta["start"])
        x = ppl.sample("x", dist.Bernoulli(probability), proposal=dist.Bernoulli(0.5) if proposes else None)
        ppl.observe("y", dist.Bernoulli(jnp.where(x == 1, theta["stay"], 0.2)), y)
        return x, x

    return ppl.scan(step, 1, jnp.array([1, 0]))[1]


@ppl.model
def moving(theta, proposes=False):
    """Values that move with theta along a path, and draws whose law they enter."""

    def step(x, _):
        up = ppl.sample("up", dist.Bernoulli(logits=x), proposal=dist.Bernoulli(0.6) if proposes else None)
        x = x * theta["stay"] + up * theta["start"]
        ppl.observe("y", dist.Normal(x, 1.0), 0.5)
        return x, x

    return ppl.scan(step, theta["start"], length=2)[1]


@ppl.model
def stopping(theta, proposes=False):
    """A loop that a particle leaves when it draws a 1, with a factor after it."""

    def step(state, _):
        x = ppl.sample("x", dist.Bernoulli(theta["start"]), proposal=dist.Bernoulli(0.3) if proposes else None)
        ppl.factor("w", theta["stay"] * x)
        return (x == 1, state[1] + 1.0), x

    (_, count), xs = ppl.scan(step, (jnp.array(False), 0.0), length=2, until=lambda state: state[0])
    ppl.factor("after", -theta["stay"] * count)
    return xs


EVERY = {"ess_threshold": 1.0}
CASES = {
    "importance sampling, proposed": (chain, True, ImportanceSampling(2)),
    "multinomial": (chain, False, SMC(2, resampler="multinomial", **EVERY)),
    "systematic, proposed": (chain, True, SMC(2, **EVERY)),
    "adaptive": (chain, False, SMC(2, resampler="stratified", ess_threshold=0.8)),
    "residual": (moving, False, SMC(2, resampler="residual", **EVERY)),
    "ssp, proposed": (moving, True, SMC(2, resampler="ssp", ess_threshold=0.9)),
    "killing": (moving, False, SMC(2, resampler="killing", **EVERY)),
    "annealed": (chain, False, SMC(2, **EVERY, annealing=EntropicAnnealing(ess=0.9))),
    "looking ahead": (moving, True, SMC(2, **EVERY, lookahead=Lookahead(0.2))),
    "stopped": (stopping, False, SMC(2, resampler="multinomial", **EVERY)),
    "stopped, alone and proposed": (stopping, True, ImportanceSampling(2)),
    "moved": (chain, False, SMC(2, **EVERY, rejuvenation=MH(lambda sites: {"x": dist.Bernoulli(jnp.full(2, 0.4))}))),
    "moved now and then": (chain, True, SMC(2, ess_threshold=0.8, rejuvenation=Regenerate(), rejuvenate_every=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_derivative_of_the_evidence_is_unbiased(name):
    model, proposes, algorithm = CASES[name]
    assert_unbiased_gradient(lambda theta: model(theta, proposes), THETA, algorithm)


def test_fisher_estimate_of_the_score_has_its_known_mean():
    @ppl.model
    def coin(theta):
        z = ppl.sample("z", dist.Bernoulli(theta))
        ppl.factor("y", jnp.log(jnp.where(z == 1, 0.9, 0.2)))

    for num, score, mass in ((1, 0.0, 0.7), (2, 0.636364, 0.7), (4, 1.152082, 0.7)):

        def gradients(theta, key, num=num):
            def log_evidence(theta):
                return ImportanceSampling(num)(coin(theta), key).log_evidence

            value, slope = jax.value_and_grad(log_evidence)(theta)
            return slope, jnp.exp(value) * slope

        runs = list(enumerate_runs(gradients, 0.3, jax.random.key(0))(0.3, jax.random.key(0)))
        assert sum(p * g[0] for p, g in runs) == pytest.approx(score, abs=1e-5)
        assert sum(p * g[1] for p, g in runs) == pytest.approx(mass, abs=1e-5)


# Along a given path --------------------------------------------------------------------------------------------------


def conditional_mass(stay, start, retained, num=2):
    """Return E[Z_hat] of conditional SMC with multinomial ancestors on `chain`, by its definition, in float64."""
    stay, start = np.float64(stay), np.float64(start)
    emission = lambda x, y: np.where(y == 1, np.where(x, stay, 0.2), 1 - np.where(x, stay, 0.2))  # noqa: E731
    total = 0.0
    for first in itertools.product((0, 1), repeat=num - 1):
        x = np.array([retained[0], *first])
        p_first = np.prod(np.where(x[1:], stay, 1 - stay))  # from state 1
        w = emission(x, 1)
        for others in itertools.product(range(num), repeat=num - 1):
            parents = x[[0, *others]]
            p_parents = np.prod((w / w.sum())[list(others)])
            for second in itertools.product((0, 1), repeat=num - 1):
                x2 = np.array([retained[1], *second])
                up = np.where(parents == 1, stay, start)[1:]
                p_second = np.prod(np.where(x2[1:], up, 1 - up))
                total += p_first * p_parents * p_second * w.mean() * emission(x2, 0).mean()
    return total


def test_derivative_along_a_given_path_is_that_of_its_mean():
    retained, step = (1, 0), 1e-4
    algorithm = SMC(2, resampler="multinomial", ess_threshold=1.0)

    def estimate(theta, key):
        sites = {"x": jnp.array(retained)}
        return jnp.exp(algorithm.conditional_run(chain(theta), key, sites).log_evidence)

    arguments = (jax.tree.map(jnp.float32, THETA), jax.random.key(0))
    runs = list(enumerate_runs(jax.value_and_grad(estimate), *arguments)(*arguments))
    values = THETA["stay"], THETA["start"]
    assert sum(p * z for p, (z, _) in runs) == pytest.approx(conditional_mass(*values, retained), abs=1e-6)
    for i, name in enumerate(("stay", "start")):
        up, down = list(values), list(values)
        up[i], down[i] = up[i] + step, down[i] - step
        exact = (conditional_mass(*up, retained) - conditional_mass(*down, retained)) / (2 * step)
        assert sum(p * g[name] for p, (_, g) in runs) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"resampler": "multinomial", "annealing": EntropicAnnealing(ess=0.9)}])
def test_other_derivatives_along_a_given_path_are_refused(settings):
    def estimate(stay):
        program, sites = chain({"stay": stay, "start": 0.4}), {"x": jnp.array([1, 0])}
        return SMC(2, ess_threshold=1.0, **settings).conditional_run(program, jax.random.key(0), sites).log_evidence

    with pytest.raises(ppl.DerivativeError, match='resampler="multinomial"'):
        jax.grad(estimate)(0.7)


# Paths and jumps -----------------------------------------------------------------------------------------------------


def paths(model, *args):
    staged = model(*args).stage(keep_rules=True)
    return path_draws(staged.block, frozenset(staged.given))


@ppl.model
def mixed(theta):
    smooth = ppl.sample("smooth", dist.Normal(theta, 1.0))
    compared = ppl.sample("compared", dist.Normal(theta, 1.0))
    rounded = ppl.sample("rounded", dist.Gamma(theta, 1.0))
    relu = ppl.sample("relu", dist.Normal(theta, 1.0))
    mixture = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.5, 0.5])), dist.Normal(jnp.stack([theta, 0.0]), 1.0))
    ppl.sample("mixture", mixture)
    ppl.sample("count", dist.Poisson(theta))
    ppl.factor("a", smooth**2 + jnp.where(compared > 0, 1.0, 0.0) + jnp.floor(rounded) + jax.nn.relu(relu))

    def step(state, _):
        x = ppl.sample("x", dist.Normal(state[0], 1.0))
        y = ppl.sample("y", dist.Normal(x, 1.0))
        ppl.observe("z", dist.Normal(y, 1.0), 0.0)
        return (x, state[1] + y), None

    ppl.scan(step, (0.0, 0.0), length=3, until=lambda state: state[0] > 1.0)


def test_draws_go_by_their_path_where_they_meet_no_jump():
    assert paths(mixed, 1.5) == {"smooth", "relu", "y"}


def test_a_path_that_meets_a_jump_gives_the_derivative_of_the_jump():
    """P(x > 1) for x ~ N(theta, 1): the path alone sees nothing of it."""

    def estimate(theta, key):
        @ppl.model
        def above():
            x = ppl.sample("x", dist.Normal(theta, 1.0))
            ppl.factor("above", jnp.where(x > 1.0, 0.0, -jnp.inf))

        return jnp.exp(ppl.infer(above(), ImportanceSampling(20), key=key).log_evidence)

    keys = jax.random.split(jax.random.key(0), 20_000)
    found = np.asarray(jax.jit(jax.vmap(jax.grad(estimate), (None, 0)))(0.5, keys), np.float64)
    exact = np.exp(-0.125) / np.sqrt(2 * np.pi)
    assert abs(found.mean() - exact) < 5 * found.std() / np.sqrt(len(found))


def test_a_support_that_moves_is_followed_along_the_path_or_refused():
    def estimate(theta, jumps):
        @ppl.model
        def scaled():
            z = ppl.sample("z", dist.Uniform(0.0, theta))
            ppl.factor("f", jnp.log(z) + (jnp.where(z > 0.1, 0.3, 0.0) if jumps else 0.0))

        return jnp.exp(ppl.infer(scaled(), ImportanceSampling(4096)).log_evidence)

    assert jax.grad(lambda theta: estimate(theta, False))(0.7) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(3 * 4096))
    with pytest.raises(ppl.DerivativeError, match="'z'.*support"):
        jax.grad(lambda theta: estimate(theta, True))(0.7)


def test_a_reparameterised_proposal_is_trained_by_the_bound_of_one_particle():
    """z ~ N(.5, 1), y ~ N(z, 1): the derivative of E log Z_hat, and none of exp(log_evidence)."""

    def bound(phi, key):
        @ppl.model
        def posterior():
            z = ppl.sample("z", dist.Normal(0.5, 1.0), proposal=dist.Normal(phi[0], phi[1]))
            ppl.observe("y", dist.Normal(z, 1.0), 1.5)

        return ppl.infer(posterior(), ImportanceSampling(1), key=key).log_evidence

    keys = jax.random.split(jax.random.key(0), 20_000)
    gradients = jax.jit(jax.vmap(jax.grad(bound), (None, 0)))(jnp.array([0.2, 0.8]), keys)
    found = np.asarray(gradients, np.float64)
    assert np.all(np.abs(found.mean(0) - [1.6, -0.35]) < 5 * found.std(0) / np.sqrt(len(found)))


# Refusals ------------------------------------------------------------------------------------------------------------


def test_the_derivative_of_a_discrete_proposal_is_refused_with_its_site():
    def bound(phi):
        @ppl.model
        def coin():
            z = ppl.sample("z", dist.Bernoulli(0.3), proposal=dist.Bernoulli(phi))
            ppl.factor("y", jnp.log(jnp.where(z == 1, 0.9, 0.2)))

        return ppl.infer(coin(), ImportanceSampling(4)).log_evidence

    with pytest.raises(ppl.DerivativeError, match="proposal of 'z'.*stop_gradient"):
        jax.grad(bound)(0.4)
    assert jax.grad(lambda phi: bound(jax.lax.stop_gradient(phi)))(0.4) == 0.0


def test_the_derivative_of_a_chain_is_refused():
    def mean(theta):
        posterior = ppl.infer(chain({"stay": theta, "start": 0.4}), MCMC(Regenerate(), num_samples=2))
        return posterior.value.mean()

    with pytest.raises(ppl.DerivativeError, match="MCMC.*has no derivative"):
        jax.grad(mean)(0.7)
