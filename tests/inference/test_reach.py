"""Chains that cannot change a free site are refused, naming it and what moves it; starts that weigh nothing too."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import (
    HMC,
    MALA,
    MCMC,
    MH,
    NUTS,
    PMMH,
    SMC,
    Gibbs,
    Langevin,
    Mixture,
    ParallelTempering,
    ParticleGibbs,
    Regenerate,
    Repeat,
    ReplicaExchange,
    Sequence,
    SuffixMH,
    TemperedSMC,
)
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.models import GaussianMixture, VarianceExploding
from tests.ppl.checks import line_of

Y = jnp.array([1.0, 1.0, -1.0])


@ppl.model
def change_point(y):
    tau = ppl.sample("tau", dist.DiscreteUniform(0, 2))
    a = ppl.sample("a", dist.Normal(0.0, 1.0))
    count = ppl.sample("count", dist.Poisson(2.0))
    ppl.observe("y", dist.Normal(jnp.where(jnp.arange(3) < tau, a, -a) + count, 1.0), y)
    return tau


@ppl.model
def walk(y):
    drift = ppl.sample("drift", dist.Normal(0.0, 1.0))
    noise = ppl.sample("noise", dist.HalfNormal(1.0))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + drift, 1.0))
        ppl.observe("y", dist.Normal(x, noise), y)
        return x, None

    return ppl.scan(step, 0.0, y)[0]


def only(*names):
    return MH(lambda sites: {name: dist.Normal(sites[name], 0.3) for name in names})


LEFT = {
    "gradients leave what is discrete": (change_point, NUTS(), ["tau", "count"]),
    "HMC": (change_point, HMC(0.1), ["tau", "count"]),
    "MALA": (change_point, MALA(0.1), ["tau", "count"]),
    "Langevin": (change_point, Langevin(0.1), ["tau", "count"]),
    "Gibbs on one of several": (change_point, Gibbs("tau"), ["a", "count"]),
    "a proposal for one of several": (walk, only("drift", "x"), ["noise"]),
    "a sequence": (walk, Sequence(NUTS("drift"), NUTS("x")), ["noise"]),
    "a mixture": (walk, Mixture(NUTS("drift"), only("noise")), ["x"]),
    "a repetition": (walk, Repeat(Regenerate("noise"), 2), ["drift", "x"]),
    "particle Gibbs inside": (walk, ParticleGibbs(SMC(4), sites="x"), ["drift", "noise"]),
    "suffixes": (walk, SuffixMH(), ["drift", "noise"]),
    "replicas": (walk, ParallelTempering(Sequence(only("x"), NUTS("drift")), (1.0, 2.0)), ["noise"]),
    "all nested": (walk, Sequence(Mixture(SuffixMH(), Repeat(NUTS("noise"), 2)), only("x")), ["drift"]),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_chain_that_would_keep_a_site_as_it_began_is_refused(name):
    model, kernel, left = LEFT[name]
    with pytest.raises(ppl.SiteValueError, match="cannot change every free site") as refusal:
        ppl.infer(model(Y), MCMC(kernel, 2, 1))
    message = str(refusal.value)
    movers = {"tau": "Gibbs, Regenerate", "count": "Regenerate", "x": "SuffixMH"}
    for site in left:
        line = line_of(model.function, f'sample("{site}"')
        assert f"{site!r} ({line}), which " in message
        assert movers.get(site, "NUTS, HMC") in message
    assert not any(f"{site!r} (" in message for site in {"tau", "a", "count", "drift", "noise", "x"} - set(left))
    assert f"ppl.condition(program, {{'{left[0]}': value}})" in message and f"('{left[0]}'))" in message


@pytest.mark.parametrize(
    "program, kernel",
    [
        (lambda: ppl.condition(change_point(Y), {"tau": 1, "count": 0}), NUTS(step_size=0.1, max_tree_depth=1)),
        (lambda: ppl.condition(walk(Y), {"noise": 1.0}), Sequence(only("drift"), ParticleGibbs(SMC(2), sites="x"))),
        (lambda: walk(Y), PMMH("drift", SMC(2), scale=0.5)),
        (lambda: walk(Y), Sequence(SuffixMH(), only("drift", "noise"))),
        (lambda: walk(Y[:0]), only("drift", "noise")),
    ],
    ids=["conditioned", "one of them", "integrated out", "together", "no entries"],
)
def test_what_is_given_integrated_out_or_empty_needs_no_moves(program, kernel):
    posterior = ppl.infer(program(), MCMC(kernel, 2, 0))
    assert posterior.guarantee == "invariant" and bool(posterior.status.ok)


def test_populations_may_move_some_sites_only():
    algorithms = [SMC(4, rejuvenation=only("drift")), TemperedSMC(4, only("drift"), (2.0, 1.0))]
    assert [ppl.infer(walk(Y), algorithm).guarantee for algorithm in algorithms] == ["unbiased"] * 2


@ppl.model
def certain():
    z = ppl.sample("z", dist.Normal(0.0, 1.0))
    twice = ppl.sample("twice", dist.Delta(2.0 * z))
    ppl.observe("y", dist.Normal(twice, 1.0), 1.0)
    return twice


@pytest.mark.parametrize("kernel", [only("z"), HMC(0.4, 5), Regenerate("z")], ids=["MH", "HMC", "Regenerate"])
def test_a_site_that_is_certain_given_the_others_follows_them(kernel):
    """z given y = 1 is normal with mean 0.4 and variance 0.2."""
    posterior = ppl.infer(certain(), MCMC(kernel, 400, 50, num_chains=4))
    z = np.asarray(posterior.sites["z"], np.float64)
    np.testing.assert_allclose(posterior.sites["twice"], 2 * z, rtol=1e-6)
    np.testing.assert_allclose(posterior.value, 2 * z, rtol=1e-6)
    assert abs(z.mean() - 0.4) < 5 * z.std() / np.sqrt(float(posterior.ess)), (z.mean(), posterior.ess)
    assert len(np.unique(z)) > 40


def test_moves_that_do_not_say_what_they_move_are_refused():
    class Silent(TraceKernel):
        def bind(self, space):
            return SilentMoves()

    class SilentMoves(Moves):
        def step(self, key, sites, memory):
            return dict(sites), memory, {"acceptance": jnp.zeros(())}

    with pytest.raises(TypeError, match="SilentMoves.*must say in `sites`"):
        ppl.infer(certain(), MCMC(Silent(), 2))


# Starts --------------------------------------------------------------------------------------------------------------


@ppl.model
def broken(where):
    """NaN where z is below a bound: always, sometimes, or in the density of a draw alone."""
    z = ppl.sample("z", dist.Normal(0.0, 1.0))
    ppl.factor("fine", -0.1 * z**2)
    ppl.factor("broken", jnp.log(z - where))
    return z


KERNELS = {
    "MH": only("z"),
    "NUTS": NUTS(step_size=0.1, max_tree_depth=1),
    "Langevin": Langevin(0.1),
    "replicas": ParallelTempering(only("z"), (1.0, 2.0)),
    "particle Gibbs": ParticleGibbs(SMC(2)),
    "PMMH": PMMH("z", SMC(2), scale=0.5),
    "a mixture": Mixture(only("z"), Regenerate()),
}


@pytest.mark.parametrize("name", KERNELS)
def test_nan_where_a_chain_starts_is_an_invalid_weight(name):
    with pytest.raises(ppl.InvalidWeight) as failure:
        ppl.infer(broken(100.0), MCMC(KERNELS[name], 2, num_chains=2))
    line = line_of(broken.function, 'factor("broken"')
    assert f"'broken' ({line}; 32 times)" in str(failure.value)
    assert "chain's start" in str(failure.value) and "more particles" not in str(failure.value)


def test_one_draw_of_many_that_is_broken_is_named_from_the_same_draws():
    for seed in range(3):
        with pytest.raises(ppl.InvalidWeight, match="'broken'"):
            ppl.infer(broken(-2.0), MCMC(only("z"), 2, num_chains=8, num_starts=16), seed=seed)


class Peaked(dist.Normal):
    """A law whose density is infinite where it is drawn half of the time."""

    def log_prob(self, value):
        return jnp.where(value < 0, jnp.inf, super().log_prob(value))


@ppl.model
def peaked():
    """Weights of draws do not show their own density."""
    z = ppl.sample("z", Peaked(0.0, 1.0))
    ppl.observe("y", dist.Normal(z, 1.0), 1.0)


def test_a_start_that_no_move_can_leave_is_an_invalid_weight():
    kernel = Repeat(MH(lambda sites: {"z": dist.Normal(1.0, 1.0)}), 2)
    with pytest.raises(ppl.InvalidWeight, match="'z'"):
        ppl.infer(peaked(), MCMC(kernel, 2, num_chains=8, num_starts=1))


def test_no_start_of_positive_density_asks_for_more_of_them():
    @ppl.model
    def impossible():
        z = ppl.sample("z", dist.Normal(0.0, 1.0))
        ppl.factor("never", jnp.where(z > 1e6, 0.0, -jnp.inf))

    with pytest.raises(ppl.AllParticlesDied, match="'never'.*num_starts.*proposal=.*ppl.condition") as failure:
        ppl.infer(impossible(), MCMC(Regenerate(), 3, num_chains=2))
    assert "more particles" not in str(failure.value)


def test_under_a_jit_the_status_tells_how_a_chain_began():
    run = MCMC(only("z"), 2)
    code = jax.jit(lambda where: ppl.infer(broken(where), run, key=jax.random.key(0)).status.code)
    assert code(100.0) == 1 and code(-100.0) == 0


def test_replicas_that_weigh_nothing_are_an_invalid_weight():
    process = GaussianMixture(np.zeros((1, 1)), 0.5).diffuse(VarianceExploding(0.05, 3.0)).reverse(num_steps=2)
    for reward, error in ((jnp.nan, ppl.InvalidWeight), (0.0, None)):
        target = process.tilt(lambda x, reward=reward: jnp.sum(x) * 0 + reward)
        if error is None:
            assert bool(ppl.infer(target, ReplicaExchange(2, 1)).status.ok)
            continue
        with pytest.raises(error, match="'reward'"):
            ppl.infer(target, ReplicaExchange(2, 1))
