"""Moves on traces between the iterations of SMC: unbiased when due beforehand, and nothing when they do nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import MH, SMC, Regenerate
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.testing import assert_properly_weighted
from tests.finite_programs import hidden_markov, stopping
from tests.ppl.checks import assert_mean_within_5_standard_errors, repeat


@dataclasses.dataclass(frozen=True)
class Identity(TraceKernel):
    """Moves nothing."""

    guarantee = "invariant"

    def bind(self, space):
        return _Stay()


class _Stay(Moves):
    sites = ()

    def step(self, key, sites, memory):
        return sites, memory, {"acceptance": jnp.float32(1.0)}


@ppl.model
def walk(observations):
    """A latent drawn before the loop, carried by a constant, and used after it."""
    drift = ppl.sample("drift", dist.Normal(0.0, 1.0))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + drift, 1.0))
        ppl.observe("y", dist.Normal(x, 0.5), y)
        return x, x

    last, path = ppl.scan(step, 0.0, observations)
    return {"drift": drift, "path": path, "last": last + drift}


Y = jnp.array([0.3, 1.5, 2.0, 3.5, 4.0])


def exact():
    """log Z and E[drift | y], from the Gaussian law of the observations."""
    length = len(Y)
    steps = np.arange(1, length + 1)
    covariance = np.minimum.outer(steps, steps) + np.outer(steps, steps) + 0.25 * np.eye(length)
    y = np.asarray(Y, np.float64)
    solved = np.linalg.solve(covariance, y)
    log_z = -0.5 * (y @ solved + np.linalg.slogdet(covariance)[1] + length * np.log(2 * np.pi))
    return log_z, steps @ solved


def test_a_kernel_that_does_nothing_changes_nothing_to_the_bit():
    plain, moved = (ppl.infer(walk(Y), SMC(64, rejuvenation=k)) for k in (None, Identity()))
    assert moved.guarantee == plain.guarantee == "unbiased"
    plain, moved = ((p.log_weights, p.log_evidence, p.sites, p.value) for p in (plain, moved))
    jax.tree.map(np.testing.assert_array_equal, plain, moved)


KERNEL = MH(lambda sites: {"drift": dist.Normal(sites["drift"], 0.5)})


@pytest.mark.parametrize("every", [1, 2])
def test_moves_keep_weights_unbiased(every):
    log_z, drift = exact()
    algorithm = SMC(32, rejuvenation=KERNEL, rejuvenate_every=every)

    def weighted(posterior):
        scale = jnp.exp(posterior.log_evidence - log_z)
        return scale * jnp.array([1.0, posterior.expectation(lambda v: v["drift"])])

    assert_mean_within_5_standard_errors(repeat(walk(Y), algorithm, weighted, 600), [1.0, drift])


def test_moves_keep_the_diversity_of_what_was_drawn_first():
    plain, moved = (ppl.infer(walk(Y), SMC(512, ess_threshold=1.0, rejuvenation=k)) for k in (None, KERNEL))
    assert len(np.unique(moved.sites["drift"])) > 2 * len(np.unique(plain.sites["drift"]))
    assert moved.diagnostics["acceptance"].shape == (len(Y),)


def test_what_depends_on_moved_sites_follows_them():
    posterior = ppl.infer(walk(Y), SMC(128, rejuvenation=KERNEL))
    value, sites = posterior.value, posterior.sites
    np.testing.assert_array_equal(value["drift"], sites["drift"])
    np.testing.assert_array_equal(value["path"], sites["x"])
    np.testing.assert_allclose(value["last"], sites["x"][:, -1] + sites["drift"], rtol=1e-6)


@pytest.mark.parametrize("program", [hidden_markov(jnp.array([0, 1])), stopping()], ids=["hidden markov", "until"])
def test_every_run_with_moves_counts_as_it_should(program):
    """Moves may start a stopped trace again, so that a loop with moves must not end early."""
    assert_properly_weighted(program, SMC(2, ess_threshold=1.0, rejuvenation=Regenerate(), rejuvenate_every=2))


@pytest.mark.parametrize("every", ["when resampled", lambda ess: True, 0, 1.5])
def test_moves_that_are_not_due_beforehand_are_refused(every):
    with pytest.raises((TypeError, ValueError), match="rejuvenate_every"):
        SMC(10, rejuvenation=KERNEL, rejuvenate_every=every)


def test_kernels_that_do_not_fit_are_refused_before_anything_runs():
    with pytest.raises(ppl.SiteValueError, match="'z'"):
        ppl.infer(walk(Y), SMC(10, rejuvenation=Regenerate("z")))
    with pytest.raises(TypeError, match="rejuvenation"):
        SMC(10, rejuvenation="MH")
