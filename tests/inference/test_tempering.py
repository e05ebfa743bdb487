"""Tempered measures, and tempered SMC: exact on finite programs, 5 standard errors on a Gaussian one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import MH, PMMH, SMC, Gibbs, ParticleGibbs, Regenerate, SuffixMH, TemperedSMC
from ppl.inference.tempering import Split, scored, split_log_density, tempered
from ppl.inference.trace_kernel import TraceKernel
from ppl.testing import assert_properly_weighted, transition_matrix
from ppl.trace_space import TraceSpace
from tests.finite_programs import remembering
from tests.ppl.checks import assert_mean_within_5_standard_errors, repeat


@ppl.model
def bit(weights=(0.4, -0.5)):
    x = ppl.sample("x", dist.Bernoulli(0.3), proposal=dist.Bernoulli(0.6))
    ppl.factor("w", jnp.where(x == 1, *weights))
    return x


@ppl.model
def stopping(forbid=False):
    def step(state, _):
        x = ppl.sample("x", dist.Normal(state, 1.0))
        ppl.observe("y", dist.Normal(x, 0.3), 0.5)
        return x, x

    last, _ = ppl.scan(step, 0.0, length=4, until=lambda x: x > 0.8)
    ppl.factor("end", jnp.where(last > 5.0, -jnp.inf, -last) if forbid else -last)
    return last


@ppl.model
def gaussian(y):
    x = ppl.sample("x", dist.Normal(0.0, 1.0))
    z = ppl.sample("z", dist.Normal(x, 1.0))
    ppl.observe("y", dist.Normal(z, 0.2), y)
    return jnp.stack([x, z])


Y = 1.5
LOG_Z = float(dist.Normal(0.0, np.sqrt(2.04)).log_prob(Y))
MEAN = Y / 2.04 * np.array([1.0, 2.0])
NUDGE = MH(lambda sites: {"x": dist.Normal(sites["x"], 0.6), "z": dist.Normal(sites["z"], 0.4)})


def space_of(program):
    return TraceSpace(program.stage(keep_rules=False))


@pytest.mark.parametrize("names", [None, ("y",), ("end",)])
def test_log_density_is_linear_in_the_inverse_temperature(names):
    space = space_of(stopping())
    sites, _ = space.simulate(jax.random.key(1))
    base, log_likelihood = split_log_density(space, sites, names)
    for beta in (0.0, 0.3, 1.0):
        expected = tempered(space, beta, names).log_density(sites)
        np.testing.assert_allclose(base + beta * log_likelihood, expected, rtol=1e-5)
    assert float(space.log_density(sites)) == pytest.approx(float(base + log_likelihood), rel=1e-5)


def test_what_is_forbidden_is_forbidden_at_every_temperature():
    space = space_of(stopping(forbid=True))
    sites = {"x": jnp.array([6.0, 0.0, 0.0, 0.0])}
    split = split_log_density(space, sites, None)
    assert float(split.base) == -np.inf and np.isfinite(split.log_likelihood)
    assert isinstance(split, Split)


def test_powers_multiply_and_their_statements_must_be_the_same():
    space = space_of(stopping())
    sites, _ = space.simulate(jax.random.key(2))
    once, twice = tempered(space, 0.25, None), tempered(tempered(space, 0.5, None), 0.5, None)
    assert float(once.log_density(sites)) == float(twice.log_density(sites))
    with pytest.raises(ValueError, match="tempered already in all observations and factors"):
        tempered(once, 0.5, ("y",))


def test_statements_are_chosen_by_name_prefix_or_function():
    space = space_of(stopping())
    assert scored(space, None) is None
    assert scored(space, ["end", "y"]) == ("y", "end")
    assert scored(space, lambda name: name.startswith("e")) == ("end",)
    with pytest.raises(ppl.errors.SiteValueError, match="'x', no observation or factor .* \\['end', 'y'\\]"):
        scored(space, "x")
    free = ppl.model(lambda: ppl.sample("x", dist.Normal(0.0, 1.0)))
    with pytest.raises(ppl.errors.SiteValueError, match="nothing to temper"):
        scored(space_of(free()), None)


@pytest.mark.parametrize("weights, waste_free", [((0.4, -0.5), True), ((0.4, -0.5), False), ((-jnp.inf, -0.5), False)])
def test_fixed_temperatures_are_properly_weighted(weights, waste_free):
    algorithm = TemperedSMC(2, Regenerate(), temperatures=(2.0, 1.0), waste_free=waste_free)
    assert_properly_weighted(bit(weights), algorithm)


def test_chosen_temperatures_do_not_promise_to_be_unbiased():
    assert TemperedSMC(2, Regenerate()).guarantee == "consistent"
    with pytest.raises(ValueError, match="unbiased"):
        assert_properly_weighted(bit(), TemperedSMC(2, Regenerate()))


def test_evidence_and_posterior_of_a_gaussian():
    algorithm = TemperedSMC(32, NUDGE, temperatures=(16.0, 4.0, 1.0), num_moves=3, waste_free=True)

    def estimates(posterior):
        weight = jnp.exp(posterior.log_evidence - LOG_Z)
        return weight * jnp.append(posterior.expectation(lambda v: v), 1.0)

    samples = repeat(gaussian(Y), algorithm, estimates, 300)
    assert_mean_within_5_standard_errors(samples, np.append(MEAN, 1.0))


def test_a_run_chooses_temperatures_of_the_effective_sample_size_that_was_asked():
    algorithm = TemperedSMC(256, NUDGE, ess=0.7)
    posterior = ppl.infer(gaussian(Y), algorithm, seed=3, progress=False)
    figures = {name: np.asarray(figure) for name, figure in posterior.diagnostics.items()}
    temperature, ess = figures["temperature"], figures["ess"]
    assert np.all(np.diff(temperature) < 0) and temperature[-1] == 1.0 and len(temperature) > 2
    np.testing.assert_allclose(ess[:-1], 0.7 * 256, rtol=2e-3)
    assert ess[-1] >= 0.7 * 256 * 0.998
    assert np.all((figures["acceptance"] > 0) & (figures["acceptance"] < 1))
    assert figures["ancestors"].shape == (len(temperature), 256)
    assert float(posterior.log_evidence) == pytest.approx(float(figures["log_evidence"][-1]), abs=1e-5)
    assert posterior.guarantee == "consistent"

    fixed = algorithm.pilot(gaussian(Y), seed=3)
    assert fixed.guarantee == "unbiased" and fixed.temperatures[-1] == 1.0
    assert fixed.temperatures != tuple(temperature.tolist())  # the pilot's randomness is its own
    np.testing.assert_allclose(fixed.temperatures[0], temperature[0], rtol=0.5)
    with pytest.raises(ValueError, match="`temperatures` are given already"):
        fixed.pilot(gaussian(Y))


FEW = TemperedSMC(16, Regenerate(), ess=0.999, max_steps=3)


def test_the_last_step_that_is_allowed_reaches_the_posterior():
    posterior = ppl.infer(bit((3.0, -3.0)), FEW)
    assert posterior.diagnostics["temperature"].shape == (3,)
    assert float(posterior.diagnostics["temperature"][-2]) > 2.0
    assert float(posterior.diagnostics["temperature"][-1]) == 1.0


def test_a_population_that_dies_says_what_killed_it():
    with pytest.raises(ppl.AllParticlesDied, match="killed by 'w'"):
        ppl.infer(bit((-jnp.inf, -jnp.inf)), FEW)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"kernel": 1}, TypeError, "`kernel` must be a kernel on traces"),
        ({"temperatures": (1.0, 2.0)}, ValueError, "must decrease and end with 1.0"),
        ({"temperatures": (4.0, 2.0)}, ValueError, "must decrease and end with 1.0"),
        ({"temperatures": ()}, TypeError, "sequence of finite numbers"),
        ({"ess": 1.0}, ValueError, "`ess` must be a fraction"),
        ({"waste_free": True, "num_moves": 3, "num_particles": 10}, ValueError, "must divide `num_particles`, got 10"),
        ({"resampler": "best"}, ValueError, "'best' is not known"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        TemperedSMC(**({"num_particles": 8, "kernel": Regenerate()} | settings))


@dataclasses.dataclass(frozen=True)
class AtPower(TraceKernel):
    """A kernel on the measure in which factors count to a power."""

    kernel: TraceKernel
    power: float

    def bind(self, space):
        return self.kernel.bind(space.tempered(self.power))


@pytest.mark.parametrize(
    "kernel",
    [
        MH(lambda sites: {"x": dist.Bernoulli(jnp.array([0.3, 0.6]))}),
        Regenerate(),
        Gibbs(),
        SuffixMH(),
        ParticleGibbs(SMC(2)),
        ParticleGibbs(SMC(2, ess_threshold=1.0), ancestor_sampling=True),
        PMMH("bias", SMC(2), proposal=lambda sites: {"bias": dist.Bernoulli(0.4)}),
    ],
    ids=["MH", "Regenerate", "Gibbs", "SuffixMH", "traced lines", "ancestor sampling", "PMMH"],
)
def test_every_kernel_moves_by_the_tempered_measure(kernel):
    observations = jnp.array([0, 1])
    _, pi, expected = transition_matrix(remembering(observations, 0.4), kernel)
    matrix = transition_matrix(remembering(observations), AtPower(kernel, 0.4))[2]
    np.testing.assert_allclose(matrix, expected, atol=1e-6)
    np.testing.assert_allclose(pi @ matrix, pi, atol=1e-6)
