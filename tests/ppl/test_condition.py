"""`ppl.condition`: a program in which sites are observed."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling
from tests.ppl.checks import assert_close, assert_equal, assert_mean_within_5_standard_errors, repeat


@ppl.model
def nested():
    mu = ppl.sample("mu", dist.Normal(0.0, 1.0))

    def outer(c, _):
        a = ppl.sample("a", dist.Normal(mu, 1.0))
        inner = lambda d, _: (d + ppl.sample("z", dist.Normal(a, 1.0)), d)  # noqa: E731
        d, _ = ppl.scan(inner, c, length=2)
        ppl.factor("f", -jnp.abs(d))
        return d, a

    last, _ = ppl.scan(outer, 0.0, length=3)
    return ppl.sample("end", dist.Normal(last, 1.0))


VALUES = {
    "mu": jnp.float32(0.5),
    "a": jnp.array([0.1, -0.4, 1.0]),
    "z": jnp.arange(6.0).reshape(3, 2) / 5,
    "end": jnp.float32(-0.2),
}


@pytest.mark.parametrize("names", [["mu"], ["z"], ["a", "end"]], ids=str)
def test_conditioned_sites_hold_their_values_and_the_density_is_the_joint_one(names):
    fixed = {name: VALUES[name] for name in names}
    program = ppl.condition(nested(), fixed)
    trace = ppl.simulate(program)
    joint = ppl.log_density(nested(), {**trace.sites, **fixed})
    assert_close(trace.log_density, joint)
    free = {name: v for name, v in trace.sites.items() if name not in names}
    assert_close(ppl.log_density(program, free), joint)
    sites = ppl.infer(program, SMC(4, ess_threshold=1.0)).sites
    for name in fixed.keys() & sites.keys():
        assert_equal(sites[name], jnp.broadcast_to(fixed[name], (4, *fixed[name].shape)))


def test_program_with_every_site_conditioned_has_its_density_as_evidence():
    program = ppl.condition(nested(), VALUES)
    expected = ppl.log_density(nested(), VALUES)
    for algorithm in (SMC(3, ess_threshold=1.0), ImportanceSampling(1)):
        assert_close(ppl.infer(program, algorithm).log_evidence, expected)


def test_condition_equals_observe_in_law():
    @ppl.model
    def sampled():
        x = ppl.sample("x", dist.Normal(0.0, 1.0))
        ppl.sample("y", dist.Normal(x, 1.0))
        return x

    program = ppl.condition(sampled(), {"y": 1.0})
    runs = repeat(
        program,
        ImportanceSampling(200),
        lambda p: jnp.exp(p.log_evidence) * jnp.array([1.0, p.expectation(lambda x: x)]),
        200,
    )
    z = np.exp(-0.25) / np.sqrt(4 * np.pi)
    assert_mean_within_5_standard_errors(runs, np.array([z, z / 2]))


def test_conditions_add_up_and_later_ones_win():
    program = ppl.condition(ppl.condition(nested(), {"mu": 1.0, "end": 0.0}), {"mu": 2.0})
    sites = ppl.simulate(program).sites
    assert (float(sites["mu"]), float(sites["end"])) == (2.0, 0.0)


def test_condition_drops_the_proposal_of_its_site():
    program = ppl.model(lambda: ppl.sample("x", dist.Normal(0.0, 1.0), proposal=dist.Normal(3.0, 1.0)))()
    assert_close(ppl.infer(ppl.condition(program, {"x": 0.5}), SMC(2)).log_evidence, dist.Normal().log_prob(0.5))


@pytest.mark.parametrize("value", [1, True, np.int64(1), np.array(1), jnp.int32(1)], ids=lambda v: type(v).__name__)
def test_condition_takes_numbers_of_every_kind(value):
    program = ppl.model(lambda: (ppl.sample("x", dist.Normal(0.0, 1.0)), ppl.sample("b", dist.Bernoulli(0.5))))()
    trace = ppl.simulate(ppl.condition(program, {"x": value, "b": value}))
    assert_equal(trace.value, (1.0, 1))
    assert (trace.value[0].dtype, trace.value[1].dtype) == (jnp.float32, jnp.int32)


def test_condition_on_values_outside_of_the_support_has_no_mass():
    program = ppl.condition(ppl.model(lambda: ppl.sample("x", dist.Exponential(1.0)))(), {"x": -1.0})
    assert float(ppl.log_density(program, {})) == -np.inf
    with pytest.raises(ppl.AllParticlesDied, match="'x'"):
        ppl.infer(program, SMC(2))


def test_condition_is_differentiable_and_maps():
    def evidence(mu):
        return ppl.log_density(ppl.condition(nested(), {"mu": mu}), {k: v for k, v in VALUES.items() if k != "mu"})

    expected = jax.grad(lambda mu: ppl.log_density(nested(), {**VALUES, "mu": mu}))(0.5)
    assert_close(jax.grad(evidence)(0.5), expected)
    assert_close(jax.vmap(evidence)(jnp.array([0.5, 1.0]))[0], ppl.log_density(nested(), VALUES))


def test_condition_within_until_ignores_entries_after_the_stop():
    @ppl.model
    def program():
        step = lambda c, _: (c + ppl.sample("x", dist.Exponential(1.0)), None)  # noqa: E731
        return ppl.scan(step, 0.0, length=4, until=lambda c: c > 1.0)[0]

    fixed = ppl.condition(program(), {"x": jnp.array([0.7, 0.6, -5.0, jnp.nan])})
    trace = ppl.simulate(fixed)
    assert_close((trace.log_density, trace.value), (-1.3, 1.3))
    assert_close(trace.sites["x"], jnp.array([0.7, 0.6, 0.0, 0.0]))
    assert_close(ppl.infer(fixed, SMC(2, ess_threshold=1.0)).log_evidence, -1.3)
