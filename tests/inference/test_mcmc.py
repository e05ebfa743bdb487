"""Chains: Metropolis-Hastings and Regenerate exactly, runs that continue, starts, and refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import MCMC, MH, SMC, Regenerate, Sequence
from ppl.models import MarkovChain
from ppl.testing import assert_invariant


@ppl.model
def stopping():
    """A latent before a loop that a trace leaves at a time of its own, and a statement after it."""
    fast = ppl.sample("fast", dist.Bernoulli(0.3))

    def step(stop, _):
        x = ppl.sample("x", dist.Bernoulli(jnp.where(fast == 1, 0.8, 0.4)), proposal=dist.Bernoulli(0.5))
        ppl.factor("w", jnp.where(x == 1, 0.7, -0.3))
        return x == 1, x

    stopped, xs = ppl.scan(step, jnp.array(False), length=2, until=lambda stop: stop)
    ppl.factor("after", jnp.where(stopped, 0.2, 0.6) * fast)
    return xs


def flips(sites):
    """Propose every entry by what it is now: neither symmetric nor the program's law."""
    return {
        "fast": dist.Bernoulli(jnp.where(sites["fast"] == 1, 0.4, 0.7)),
        "x": dist.Bernoulli(jnp.where(sites["x"] == 1, 0.3, 0.6)),
    }


KERNELS = {
    "MH": MH(flips),
    "MH of a latent": MH(lambda sites: {"fast": dist.Bernoulli(0.9 - 0.5 * sites["x"][0])}),
    "Regenerate": Regenerate(),
    "Regenerate some": Regenerate("x"),
    "Regenerate by a function": Regenerate(lambda name: name == "fast"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_transition_matrix_keeps_the_posterior(name):
    assert_invariant(stopping(), KERNELS[name], irreducible=name in ("MH", "Regenerate"))


def test_a_proposal_that_misses_values_does_not_pass():
    with pytest.raises(AssertionError, match="fast"):
        assert_invariant(stopping(), MH(lambda sites: {"fast": dist.Bernoulli(1.0)}), irreducible=True)


@ppl.model
def gaussian(y):
    mean = ppl.sample("mean", dist.Normal(0.0, 1.0))
    ppl.observe("y", dist.Normal(mean, 0.5), y)
    return {"twice": 2.0 * mean}


KERNEL = MH(lambda sites: {"mean": dist.Normal(sites["mean"], 0.7)})
RUN = MCMC(KERNEL, num_samples=2000, num_warmup=100, num_chains=4)


def test_draws_have_the_posterior_and_stand_chain_by_chain():
    posterior = ppl.infer(gaussian(1.0), RUN)
    draws = np.asarray(posterior.sites["mean"], np.float64)
    assert draws.shape == (8000,) and posterior.num_chains == 4
    error = draws.std() / np.sqrt(float(posterior.ess))
    assert abs(draws.mean() - 0.8) < 5 * error
    assert abs(draws.std() - np.sqrt(0.2)) < 5 * error
    np.testing.assert_allclose(posterior.value["twice"], 2 * draws, rtol=1e-6)
    assert posterior.diagnostics["acceptance"].shape == (4, 2000)
    assert np.isnan(posterior.log_evidence) and posterior.guarantee == "invariant"
    chains = draws.reshape(4, 2000)
    assert np.mean(chains[:, 1:] == chains[:, :-1]) > 0.1  # refused proposals repeat the draw, within a chain only


def test_a_run_in_parts_is_the_run():
    whole = ppl.infer(gaussian(1.0), MCMC(KERNEL, 12, num_warmup=5, num_chains=2, thinning=3))
    first = ppl.infer(gaussian(1.0), MCMC(KERNEL, 4, num_warmup=5, num_chains=2, thinning=3))
    then = MCMC(KERNEL, 8, num_chains=2, thinning=3)
    second = ppl.infer(gaussian(1.0), then, state=first.state, seed=7)
    parts = [np.asarray(p.sites["mean"]).reshape(2, -1) for p in (first, second)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), np.asarray(whole.sites["mean"]).reshape(2, -1))


def test_state_of_other_chains_is_refused():
    state = ppl.infer(gaussian(1.0), MCMC(KERNEL, 4)).state
    with pytest.raises(ValueError, match="Regenerate"):
        ppl.infer(gaussian(1.0), MCMC(Regenerate(), 4), state=state)
    with pytest.raises(ValueError, match="num_chains"):
        ppl.infer(gaussian(1.0), MCMC(KERNEL, 4, num_chains=3), state=state)
    with pytest.raises(TypeError, match="posterior.state"):
        ppl.infer(gaussian(1.0), MCMC(KERNEL, 4), state=3)


def test_chains_run_inside_the_users_own_jit():
    run = MCMC(KERNEL, 10)
    inside = jax.jit(lambda y: ppl.infer(gaussian(y), run, key=jax.random.key(3)).sites["mean"])(1.0)
    np.testing.assert_allclose(inside, ppl.infer(gaussian(1.0), run, seed=3).sites["mean"], rtol=1e-6)


def test_a_start_without_density_is_said_by_its_site():
    @ppl.model
    def impossible():
        x = ppl.sample("x", dist.Normal(0.0, 1.0))
        ppl.factor("never", jnp.where(x > 1e6, 0.0, -jnp.inf))

    with pytest.raises(ppl.AllParticlesDied, match="never"):
        ppl.infer(impossible(), MCMC(Regenerate(), 3))


def test_processes_and_targets_have_chains():
    rng = np.random.default_rng(0)
    target = MarkovChain(*(rng.normal(size=s).astype(np.float32) for s in (3, (3, 3))), 2) ** 2.0
    paths = np.array(list(itertools.product(range(3), repeat=2)), np.int32)
    density = np.exp(jax.vmap(lambda path: ppl.log_density(target, {"path": path}))(paths), dtype=np.float64)
    posterior = ppl.infer(target, MCMC(Regenerate(), num_samples=2000, num_chains=4), keep=["path"])
    draws = np.asarray(posterior.value["tokens"])
    np.testing.assert_array_equal(draws, posterior.sites["path"])
    error = np.sqrt(0.25 / float(posterior.ess))
    for token in range(3):
        exact = density[paths[:, 0] == token].sum() / density.sum()
        assert abs(np.mean(draws[:, 0] == token) - exact) < 5 * error
    assert ppl.infer(target, MCMC(Regenerate(), num_samples=2000, num_chains=4)).sites == {}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MCMC(SMC(10), 10), "kernel"),
        (lambda: MCMC(KERNEL, 0), "num_samples"),
        (lambda: MCMC(KERNEL, 10, num_warmup=-1), "num_warmup"),
        (lambda: MCMC(KERNEL, 10, num_chains=0), "num_chains"),
        (lambda: MCMC(KERNEL, 10, thinning=1.5), "thinning"),
        (lambda: MH(dist.Normal(0.0, 1.0)), "proposal"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    "kernel, message",
    [
        (Regenerate("z"), "'z'.*mean"),
        (Regenerate(lambda name: False), "chooses no site"),
        (MH(lambda sites: {"z": dist.Normal(0.0, 1.0)}), "'z'"),
        (MH(lambda sites: {"mean": dist.Bernoulli(0.5)}), "discrete"),
        (MH(lambda sites: {"mean": dist.Normal(jnp.zeros(2), 1.0)}), "shape"),
        (MH(lambda sites: {"mean": 0.5}), "not a distribution"),
        (MH(lambda sites: None), "by site name"),
    ],
)
def test_kernels_that_do_not_fit_the_program_say_why(kernel, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ppl.infer(gaussian(1.0), MCMC(kernel, 10))


def test_events_along_a_loop_that_may_stop_are_refused():
    kernel = MH(lambda sites: {"x": dist.Bernoulli(jnp.full(2, 0.5)).to_event(1)})
    with pytest.raises(ppl.SiteValueError, match="Do not make an event"):
        ppl.infer(stopping(), MCMC(Sequence(kernel, Regenerate("fast")), 10))
