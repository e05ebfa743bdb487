"""The reverse process: exact on Gaussians and points; its laws, its calls of the network, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import ppl
from ppl import runners
from ppl.gaussian import Gaussian, Noising
from ppl.inference import SMC, FeynmanKac
from ppl.models import (
    EDM,
    Diffusion,
    EmpiricalData,
    GaussianMixture,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)
from ppl.models.diffusion.reverse import Reverse
from tests.ppl.checks import assert_equal, compilations, finished
from tests.ppl.test_compilation import dense_constants, held_arrays, lowered_text

SCHEDULES = {
    "linear": VariancePreserving(),
    "cosine": VariancePreserving("cosine"),
    "exploding": VarianceExploding(0.01, 8.0),
    "edm": EDM(),
    "flow": RectifiedFlow(),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
MEAN, SCALE = np.array([1.5, -0.5, 0.3]), 0.7


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    runners.clear_cache()
    jax.clear_caches()


def single_gaussian(schedule, num_steps=5, grid=None, mean=MEAN, **settings):
    """Data N(MEAN, SCALE^2) whose denoised value and its error are exact at every level of the run."""

    def denoiser(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return mean + alpha * SCALE**2 * (x - alpha * mean) / (alpha**2 * SCALE**2 + sigma**2)

    bare = Diffusion(denoiser, mean.shape, schedule, "x0", mean=mean, scale=SCALE, error=([0.0], [1.0]))
    levels = bare.reverse(num_steps, grid=grid).levels
    ratios = np.minimum(levels.log_ratio[:-1][::-1], 50.0)
    error = SCALE**2 * np.exp(2 * ratios) / (SCALE**2 + np.exp(2 * ratios))
    model = Diffusion(denoiser, mean.shape, schedule, "x0", mean=mean, scale=SCALE, error=(ratios, error))
    return model.reverse(num_steps, grid=grid, **settings)


def normal_log_density(x, mean, variance):
    return -0.5 * (np.sum((x - mean) ** 2, -1) / variance + np.shape(x)[-1] * np.log(2 * np.pi * variance))


@every_schedule
@pytest.mark.parametrize("grid", [None, "time"])
def test_single_gaussian_is_reversed_exactly(name, grid):
    """The path's density is that of the noised data: log p(path) = log q(x_K) + sum_k log k(x_k|x_(k+1))."""
    schedule = SCHEDULES[name]
    with jax.enable_x64(True):
        sampler = single_gaussian(schedule, 5, grid)
        levels = sampler.levels
        rng = np.random.default_rng(0)
        xs = np.array(
            [
                a * MEAN + np.hypot(s, a * SCALE) * rng.normal(size=3)
                for a, s in zip(levels.alpha, levels.sigma, strict=True)
            ]
        )
        found = ppl.log_density(sampler, {"origin": xs[0], "path": xs[1:]})
        alpha, sigma = levels.alpha[-1], levels.sigma[-1]
        wanted = normal_log_density(xs[-1], alpha * MEAN, alpha**2 * SCALE**2 + sigma**2)
        for k in range(5):
            wanted += normal_log_density(xs[k], levels.rate[k] * xs[k + 1], levels.variance[k])
        # Where the first level has no data the schedule's table ends at a ratio of e^50, not at infinity.
        np.testing.assert_allclose(found, wanted, rtol=1e-8)


@every_schedule
@pytest.mark.parametrize("churn", [0.3, 1.0])
def test_points_are_generated_with_the_right_noise_at_every_level(name, churn):
    """One datum x_0 is D for certain: x' must be N(alpha' x_0, sigma'^2) if x is N(alpha x_0, sigma^2)."""
    datum = np.array([[2.0, -1.0]])
    with jax.enable_x64(True):
        sampler = EmpiricalData(datum).diffuse(SCHEDULES[name]).reverse(12, "posterior", churn=churn)
        levels = sampler.levels
        for k in range(12):
            x = jnp.array([0.4, 1.1])
            law = sampler.forward(sampler.placed(x, k), k)
            other = sampler.forward(sampler.placed(x + 1.0, k), k)
            slope = float((other.loc - law.loc)[0])
            np.testing.assert_allclose(
                levels.alpha[k + 1] * datum[0] + slope * (x - levels.alpha[k] * datum[0]), law.loc, atol=1e-9
            )
            spread = slope**2 * levels.sigma[k] ** 2 + float(law.squared_scale)
            assert spread == pytest.approx(levels.sigma[k + 1] ** 2, rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "exploding", "flow", "cosine"])
def test_differential_equation_is_solved_to_second_order(name):
    """Of a single Gaussian the flow is affine: x - alpha m scales with the standard deviation."""
    with jax.enable_x64(True):
        errors = []
        for num_steps in (20, 40, 80):
            times = np.asarray(SCHEDULES[name].time(np.linspace(2.0, -3.0, num_steps + 1)))
            sampler = single_gaussian(SCHEDULES[name], num_steps, times, churn=0.0)
            levels = sampler.levels
            x = MEAN * levels.alpha[0] + np.array([1.0, -2.0, 0.5]) * levels.sigma[0]
            deviation = np.hypot(levels.alpha * SCALE, levels.sigma)
            wanted = levels.alpha[-1] * MEAN + (x - levels.alpha[0] * MEAN) * deviation[-1] / deviation[0]

            def step(state, k, sampler=sampler):
                return sampler.advance(state, sampler.forward(state, k).sample(jax.random.key(0)), k), None

            end, _ = jax.lax.scan(step, sampler.placed(jnp.asarray(x), 0), jnp.arange(num_steps))
            errors.append(np.abs(end["x"] - wanted).max())
        orders = np.log2(np.array(errors[:-1]) / errors[1:])
        assert np.all(orders > 1.8), (errors, orders)


@pytest.mark.parametrize(
    "name, churn, grid",
    [
        ("linear", 0.0, None),
        ("linear", 1.0, "time"),
        ("cosine", 0.0, "time"),
        ("exploding", 0.5, None),
        ("edm", 2.0, None),
        ("flow", 0.0, None),
        ("flow", 0.5, "time"),
        ("flow", 1.0, None),
    ],
)
def test_samples_have_the_data_s_moments(name, churn, grid):
    mixture = GaussianMixture(np.array([[-1.0, 0.0], [1.5, 1.0]]), 0.3, [1.0, 2.0])
    sampler = mixture.diffuse(SCHEDULES[name]).reverse(60, grid=grid, churn=churn)
    x = np.asarray(ppl.infer(sampler, SMC(3000)).value)
    assert np.all(np.isfinite(x))
    alpha, sigma = sampler.levels.alpha[-1], sampler.levels.sigma[-1]
    mean = alpha * np.array([4 / 6, 2 / 3])
    spread = np.sqrt(alpha**2 * (np.array([12.5, 2.0]) / 9 + 0.09) + sigma**2)
    # 5 standard errors, and what 60 steps leave.
    assert np.all(np.abs(x.mean(0) - mean) < 5 * spread / np.sqrt(3000) + 0.05), (x.mean(0), mean)
    assert np.all(np.abs(x.std(0) / spread - 1) < 5 / np.sqrt(6000) + 0.05), (x.std(0), spread)


# Products of Gaussian laws.


def gaussians(values, steps):
    """Laws in float64, as numpy sees them, of means and variances; with a noising kernel where `steps`."""
    noising = Noising(jnp.asarray(values["x"]), values["rate"], values["variance"]) if steps else None
    return [Gaussian(jnp.asarray(m), u, noising) for m, u in zip(values["means"], values["variances"], strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    powers=st.lists(st.floats(-2.0, 3.0) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    rate=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    steps=st.booleans(),
)
def test_product_of_gaussians_is_the_definition(powers, seed, rate, steps):
    """sum_i b_i [log p_i - log k] + log k - log F is the weight, at any x'."""
    rng = np.random.default_rng(seed)
    values = {
        "x": rng.normal(size=3),
        "rate": rate,
        "variance": rng.uniform(0.1, 2.0),
        "means": rng.normal(size=(len(powers), 3)),
        "variances": rng.uniform(0.05, 2.0, len(powers)),
    }
    precision = np.sum(np.array(powers) / values["variances"])
    precision += (1 - sum(powers)) * rate**2 / values["variance"] if steps else 0.0
    if precision < 1e-3:
        return  # no proposal: what a target checks before it runs
    with jax.enable_x64(True):
        laws = gaussians(values, steps)
        law, log_weight = laws[0].multiply(laws, powers, powers)
        assert float(law.squared_scale) == pytest.approx(1 / precision, rel=1e-9)
        for drawn in rng.normal(size=(3, 3)) * 2:
            wanted = sum(
                b * normal_log_density(drawn, m, u)
                for b, m, u in zip(powers, values["means"], values["variances"], strict=True)
            )
            if steps:
                back = normal_log_density(values["x"], rate * drawn, values["variance"])
                wanted += (1 - sum(powers)) * back
            wanted -= float(law.log_prob(drawn))
            assert float(log_weight(jnp.asarray(drawn))) == pytest.approx(wanted, rel=1e-7, abs=1e-7)


@every_schedule
@pytest.mark.parametrize("powers", [(2.0,), (0.6,), (1.0, 1.0), (-1.5, 2.5)])
def test_weights_of_the_last_steps_are_right_in_float32(name, powers):
    """64 dimensions, noise of 0.01 of the data's scale: the same states weighed in float32 and in float64."""
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(4, 64)) * 2, 0.6), (rng.normal(size=(3, 64)) * 2, 0.5)]

    mixtures = [GaussianMixture(*part) for part in parts[: len(powers)]]
    levels = mixtures[0].diffuse(SCHEDULES[name]).reverse(100, "posterior").levels
    error = 0.4 * np.minimum(np.exp(2 * levels.log_ratio[:-1]), 1.0)  # one for all, in both precisions

    def laws_of(x, k):
        samplers = [Reverse(m.diffuse(SCHEDULES[name]), levels, "matched", 1.0, error) for m in mixtures]
        return [sampler.forward(sampler.placed(jnp.asarray(x), k), k) for sampler in samplers]

    for k in (2, 50, 97, 98, 99):
        alpha, sigma = levels.alpha[k], levels.sigma[k]
        x = alpha * parts[0][0][0] + np.hypot(alpha * 0.6, sigma) * rng.normal(size=64)
        x = x.astype(np.float32)
        narrow_laws = laws_of(x, k)
        narrow = float(narrow_laws[0].multiply(narrow_laws, powers, powers)[1](x))
        with jax.enable_x64(True):
            wide_laws = laws_of(x.astype(np.float64), k)
            wide = float(wide_laws[0].multiply(wide_laws, powers, powers)[1](x))
        assert narrow == pytest.approx(wide, abs=2e-3), (k, narrow, wide)


# Calls of the network.


def counting_model(calls, schedule=None):
    """A denoiser that counts how many arrays it is called with."""

    def denoiser(x, t):
        jax.debug.callback(lambda _: calls.append(1), x[0])
        return 0.5 * x

    return Diffusion(denoiser, (2,), schedule or EDM(0.01, 10.0), "x0", error=([0.0], [0.1]))


@pytest.mark.parametrize("last, churn", [("exploding", 1.0), ("exploding", 0.0), ("flow", 0.0), ("flow", 0.5)])
def test_network_calls_are_what_is_reported(last, churn):
    calls = []
    model = counting_model(calls, RectifiedFlow() if last == "flow" else None)
    sampler = model.reverse(7, grid="time" if last == "flow" else None, churn=churn)
    posterior = finished(ppl.infer(sampler, SMC(3)))
    jax.effects_barrier()
    assert posterior.diagnostics["network_calls"] == sampler.network_calls() * 3
    assert len(calls) == posterior.diagnostics["network_calls"]


@pytest.mark.parametrize(
    "corrector, churn",
    [
        ("auto", 1.0),
        ("feynman-kac", 0.5),
        ("none", 0.5),
        ("feynman-kac", 0.0),
        ("none", 0.0),
    ],
)
def test_network_calls_of_targets_are_what_is_reported(corrector, churn):
    calls = []
    model = counting_model(calls)
    target = model.reverse(5, churn=churn) * model.reverse(5, churn=churn) ** 0.5
    chosen = FeynmanKac() if corrector == "feynman-kac" else corrector
    posterior = finished(ppl.infer(target, SMC(3, corrector=chosen, ess_threshold=0.0)))
    jax.effects_barrier()
    assert len(calls) == posterior.diagnostics["network_calls"]


class Network(nnx.Module):
    def __init__(self, seed, activation):
        rngs, self.activation = nnx.Rngs(seed), activation
        self.first, self.second = nnx.Linear(9, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x, t):
        return self.second(self.activation(self.first(jnp.concatenate([x, t[None]]))))


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.silu, jax.nn.relu])
def test_network_s_weights_are_arguments_and_other_weights_compile_nothing(activation):
    def make(seed):
        model = Diffusion(Network(seed, activation), (8,), VariancePreserving(), error=([0.0], [0.1]))
        return model.reverse(30) ** 1.5

    algorithm = SMC(8)
    runners.clear_cache()
    text = lowered_text(make(0).program(), algorithm)
    assert dense_constants(text) == [], "compiled in"
    assert sum(held_arrays(entry) for entry in runners._RUNNERS.items()) == 0, "held by the cache"
    first = ppl.infer(make(0), algorithm)
    with compilations() as compiled:
        second = finished(ppl.infer(make(1), algorithm))
    assert len(compiled) == 0
    assert float(first.log_evidence) != float(second.log_evidence)


def mixture_target(seed=0, power=2.0, scale=0.5, schedule=None):
    means = np.random.default_rng(seed).normal(size=(3, 2))
    sampler = GaussianMixture(means, scale).diffuse(schedule or VarianceExploding(0.01, 8.0)).reverse(20)
    return sampler**power


@pytest.mark.parametrize(
    "again",
    {
        "another seed": lambda: (mixture_target(), 5),
        "other means": lambda: (mixture_target(seed=3), 0),
        "another power": lambda: (mixture_target(power=1.3), 0),
        "another scale": lambda: (mixture_target(scale=0.8), 0),
        "another range of noise": lambda: (mixture_target(schedule=VarianceExploding(0.02, 11.0)), 0),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("corrector", ["auto", FeynmanKac()], ids=["kernel ratio", "feynman-kac"])
def test_second_run_compiles_nothing_with(again, corrector):
    algorithm = SMC(16, corrector=corrector)
    finished(ppl.infer(mixture_target(), algorithm))
    mixture_target(seed=3), mixture_target(power=1.3)
    target, seed = again[1]()
    with compilations() as compiled:
        finished(ppl.infer(target, algorithm, seed=seed))
    assert len(compiled) == 0


def test_another_target_gives_other_numbers():
    """What compiles nothing must not be stale."""
    results = {
        float(ppl.infer(t, SMC(16)).log_evidence) for t in (mixture_target(s, p) for s in (0, 3) for p in (2, 1.3))
    }
    assert len(results) == 4


def test_same_seed_gives_the_same_numbers_and_another_seed_others():
    first, second, other = (ppl.infer(mixture_target(), SMC(16), seed=s) for s in (5, 5, 6))
    assert_equal(
        (first.value, first.log_weights, first.log_evidence), (second.value, second.log_weights, second.log_evidence)
    )
    assert not np.array_equal(first.value, other.value)


def test_infer_inside_of_the_users_jit_and_vmap_gives_the_same_numbers():
    target, algorithm = mixture_target(), SMC(16)

    def run(seed):
        posterior = ppl.infer(target, algorithm, key=jax.random.key(seed))
        return posterior.value, posterior.log_evidence

    plain = [run(s) for s in range(3)]
    mapped = jax.jit(jax.vmap(run))(jnp.arange(3))
    for i in range(3):
        for got, wanted in zip(mapped, plain[i], strict=True):
            np.testing.assert_allclose(got[i], wanted, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(jax.jit(run)(i)[1], plain[i][1], rtol=1e-4, atol=1e-4)


def test_sites_are_stored_only_when_they_are_named():
    target = mixture_target()
    assert ppl.infer(target, SMC(8)).sites == {}
    posterior = ppl.infer(target, SMC(8), keep=["path", "origin"])
    assert posterior.sites["path"].shape == (8, 20, 2) and posterior.sites["origin"].shape == (8, 2)
    np.testing.assert_array_equal(posterior.sites["path"][:, -1], posterior.value)
    plain = ppl.infer(target, SMC(8))
    np.testing.assert_array_equal(plain.value, posterior.value)


def test_sampler_runs_inside_a_model():
    """x from the prior, observed with noise: the evidence is that of the mixture convolved with it."""
    means, scale = np.array([[-1.0], [1.0]]), 0.3
    sampler = GaussianMixture(means, scale).diffuse(VarianceExploding(0.001, 8.0)).reverse(60)

    @ppl.model
    def observed(y):
        x = ppl.generate(sampler, name="x")
        ppl.observe("y", dist.Normal(x[0], 0.5), y)
        return x

    posterior = ppl.infer(observed(0.8), SMC(4000), keep=["x/path"])
    assert posterior.sites["x/path"].shape == (4000, 60, 1)
    variance = scale**2 + 0.25
    exact = np.log(np.mean(np.exp(-0.5 * (0.8 - means) ** 2 / variance) / np.sqrt(2 * np.pi * variance)))
    assert float(posterior.log_evidence) == pytest.approx(exact, abs=0.08)


# What is refused.


def small(schedule=None, shape=(2,), **settings):
    model = GaussianMixture(np.zeros((2, *shape)), 0.5).diffuse(schedule or RectifiedFlow())
    return model.reverse(**({"num_steps": 4} | settings))


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: small(VariancePreserving()), r"schedule: RectifiedFlow\(shift=1.0\) and VariancePreserving\("),
        (lambda: small(num_steps=5), "grid: 4 steps, the default and 5 steps, the default"),
        (lambda: small(grid="time"), "grid: 4 steps, the default and 4 steps, .* to 0"),
        (lambda: small(shape=(3,)), r"shape: \(2,\) and \(3,\)"),
        (lambda: small(churn=0.5), "churn: 1.0 and 0.5"),
        (lambda: small(variance="posterior"), "variance: matched and posterior"),
    ],
)
def test_products_of_what_unfolds_differently_print_both(other, message):
    for combine in (lambda p, q: p * q, lambda p, q: ppl.guide(p, q, weight=2.0)):
        with pytest.raises(ValueError, match=message):
            combine(small(), other())


@pytest.mark.parametrize("corrector", ["auto", FeynmanKac(), "none"])
def test_powers_that_sum_to_nothing_are_refused(corrector):
    p, q = small(VarianceExploding(0.01, 5.0)), small(VarianceExploding(0.01, 5.0))
    for target in (p**0.0, ppl.guide(p, q, weight=2.0) ** 0.0):
        with pytest.raises(ValueError, match="sum to 0; a target's powers must sum to more than 0"):
            ppl.infer(target, SMC(4, corrector=corrector))


def test_guidance_without_positive_precision_is_refused():
    """p is much narrower than q: p^-2 q^3 grows without bound."""
    schedule = VarianceExploding(0.01, 1.0)
    p, q = (GaussianMixture(np.zeros((1, 2)), scale).diffuse(schedule).reverse(4) for scale in (0.2, 2.0))
    with pytest.raises(
        ValueError, match=r"no positive precision at .*: the power of <Reverse of .*> \*\* -2 is too neg"
    ):
        ppl.infer(ppl.guide(p, q, weight=3.0), SMC(4))


def test_denoiser_of_the_wrong_shape_is_refused():
    model = Diffusion(lambda x, t: x[:1], (3,), RectifiedFlow())
    with pytest.raises(ValueError, match=r"`denoiser` must return an array of shape \(3,\) .*, got shape \(1,\)"):
        model.reverse(4)
    model = Diffusion(lambda x, t: (x, t), (3,), RectifiedFlow())
    with pytest.raises(ValueError, match=r"`denoiser` must return an array of shape \(3,\) .*, got tuple"):
        model.reverse(4)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Diffusion(None, (2,), EDM()), TypeError, "`denoiser` must be a function"),
        (lambda: Diffusion(lambda x, t: x, (2,), "vp"), TypeError, "`schedule` must be a Schedule"),
        (lambda: Diffusion(lambda x, t: x, (2,), EDM(), "eps"), ValueError, "`predicts` must be one of 'epsilon'"),
        (lambda: Diffusion(lambda x, t: x, (2,), EDM(), conditioning="time"), ValueError, "`conditioning` must be"),
        (
            lambda: Diffusion(lambda x, t: x, (2,), EDM(), conditioning="step"),
            ValueError,
            "needs a schedule with steps",
        ),
        (lambda: Diffusion(lambda x, t: x, (2,), EDM(), mean=np.zeros(3)), ValueError, "`mean` must be a number"),
        (lambda: Diffusion(lambda x, t: x, (2,), EDM(), scale=0.0), ValueError, "`scale` must be a positive number"),
        (lambda: Diffusion(lambda x, t: x, (2,), EDM(), error=([0.0, 0.0], [1.0, 1.0])), ValueError, "`error` must be"),
        (lambda: Diffusion(lambda x, t: x, (2,), EDM(), error=([0.0], [-1.0])), ValueError, "`error` must be"),
        (lambda: small(num_steps=0), ValueError, "`num_steps` must be an int of at least 1, got 0"),
        (lambda: small(num_steps=2.0), ValueError, "`num_steps` must be an int"),
        (lambda: small(variance="exact"), ValueError, "`variance` must be one of 'matched', 'posterior', 'noising'"),
        (lambda: small(churn=-0.1), ValueError, "`churn` must be a number of at least 0, got -0.1"),
        (lambda: small(variance="noising"), ValueError, "'noising' is infinite at a level without data"),
        (lambda: small(variance="posterior", grid="time"), ValueError, "'posterior' is 0 at the last step"),
    ],
)
def test_impossible_models_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_last_level_without_noise_is_allowed_with_the_matched_variance():
    """The value is then that of the data themselves, and log Z that of their density."""
    mixture = GaussianMixture(np.array([[-1.0], [1.0]]), 0.4)
    sampler = mixture.diffuse(RectifiedFlow()).reverse(100, grid="time")
    assert sampler.levels.sigma[-1] == 0.0
    posterior = ppl.infer(sampler**2.0, SMC(4000))
    x = np.linspace(-5, 5, 4001)
    density = np.exp(-0.5 * ((x[:, None] - [-1, 1]) / 0.4) ** 2).mean(1) / (0.4 * np.sqrt(2 * np.pi))
    exact = np.log(np.sum(density**2) * (x[1] - x[0]))
    assert float(posterior.log_evidence) == pytest.approx(exact, abs=0.2)
