"""Feynman-Kac drifts and weights against their partial differential equation; correctors and what they refuse.

The equation of a weighted diffusion dx = v dt + sqrt(c) g dW, dw = w dt, with the unnormalised density p:

    d_t p = -div(p v) + c/2 g^2 Lap p + p w                                                                       (1)

pointwise, without any constant left over, so that log Z is right as well.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, FeynmanKac, KernelRatio
from ppl.inference.correctors.feynman_kac import drift, log_weight_rate
from ppl.models import EDM, GaussianMixture, MarkovChain, RectifiedFlow, VarianceExploding, VariancePreserving

SCHEDULES = {
    "linear": VariancePreserving(),
    "cosine": VariancePreserving("cosine"),
    "exploding": VarianceExploding(0.05, 8.0),
    "edm": EDM(0.05, 20.0),
    "flow": RectifiedFlow(),
}


def mixtures(size, num):
    """Mixtures of overlapping modes in some dimensions: means, scales, weights of each."""
    rng = np.random.default_rng(size)
    return [(rng.uniform(-2, 2, (3, size)), rng.uniform(0.4, 0.8, 3), rng.uniform(1, 3, 3)) for _ in range(num)]


def log_density(parameters, schedule):
    """The noisy density of a mixture as a function of x and t, in jax, by its definition."""
    means, scales, weights = (jnp.asarray(part) for part in parameters)

    def evaluate(x, t):
        total = schedule.alpha(t) ** 2 * scales**2 + schedule.sigma(t) ** 2
        squares = jnp.sum((x - schedule.alpha(t) * means) ** 2, axis=1)
        terms = jnp.log(weights / weights.sum()) - 0.5 * (squares / total + x.size * jnp.log(2 * jnp.pi * total))
        return jax.nn.logsumexp(terms)

    return evaluate


CASES = {  # powers b_i(t) and that of the reward, polynomials of t: coefficients of 1, t, t^2; churn
    "the diffusion itself": ([[1], [0], [0]], [0], 1.0),
    "the differential equation itself": ([[1], [0], [0]], [0], 0.0),
    "annealed, target score": ([[2], [0], [0]], [0], 1.0),
    "annealed, tempered noise": ([[2.5], [0], [0]], [0], 1 / 2.5),
    "flattened": ([[0.6], [0], [0]], [0], 1.0),
    "annealed, no noise": ([[3], [0], [0]], [0], 0.0),
    "annealed, much noise": ([[3], [0], [0]], [0], 2.7),
    "product": ([[1], [1], [0]], [0], 1.0),
    "product to a power, tempered noise": ([[1.7], [1.7], [0]], [0], 1 / 1.7),
    "guided": ([[-1.5], [2.5], [0]], [0], 1.0),
    "geometric mean, some churn": ([[0.3], [0.7], [0]], [0], 0.4),
    "many powers": ([[1.3], [-0.4], [0.8]], [0], 1.6),
    "experts that are guided": ([[-1], [1.5], [1.5]], [0], 0.0),
    "a power that changes": ([[1, 2, -1], [0], [0]], [0], 0.7),
    "powers that change": ([[1, 1], [0.5, 0, -1], [0]], [0], 1.0),
    "reward": ([[1], [0], [0]], [1, -1], 1.0),
    "reward of a constant power": ([[1], [0], [0]], [0.8], 1.0),
    "combination with a reward": ([[1.4], [-0.6], [0.9]], [1, 0, -1], 1.0),
    "everything changes": ([[2, -1], [0, 1], [0.3, 0, 1]], [1, -2, 1], 1.0),
}


def reward(x):
    return 0.7 * jnp.sum(jnp.sin(1.3 * x)) + 0.2 * jnp.sum(x) - 0.1 * jnp.sum(x**2) * jnp.cos(x[0])


def padded(coefficients):
    return np.array([[*row, 0.0, 0.0][:3] for row in coefficients], np.float64)


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("size", [1, 2])
def test_drift_and_weight_satisfy_the_weighted_fokker_planck_equation(schedule_name, size):
    schedule = SCHEDULES[schedule_name]
    with jax.enable_x64(True):
        parameters = mixtures(size, 3)
        models = [GaussianMixture(*parts).diffuse(schedule) for parts in parameters]
        densities = [log_density(parts, schedule) for parts in parameters]

        def residual(power_coefficients, reward_coefficients, churn, x, t):
            def powers(t):
                return power_coefficients @ jnp.array([1.0, t, t**2])

            def reward_power(t):
                return reward_coefficients @ jnp.array([1.0, t, t**2])

            def log_target(x, t):
                logs = jnp.array([density(x, t) for density in densities])
                return powers(t) @ logs + reward_power(t) * reward(x)

            rate = schedule.alpha_rate(t) / schedule.alpha(t)  # f = rate x
            squared_noise = 2 * schedule.sigma(t) * (schedule.sigma_rate(t) - rate * schedule.sigma(t))
            tilt = {"reward_gradient": jax.grad(reward)(x), "reward_power": reward_power(t)}

            def velocity(x):
                scores = [model.score(x, t) for model in models]
                given = tilt | {"reward_gradient": jax.grad(reward)(x)}
                return drift(scores, powers(t), rate * x, squared_noise, churn, **given)

            weight = log_weight_rate(
                [model.score(x, t) for model in models],
                powers(t),
                rate * x,
                rate * size,
                squared_noise,
                power_rates=-jax.jacfwd(powers)(t),  # generation runs against t
                log_densities=[model.log_density(x, t) for model in models],
                reward=reward(x),
                reward_power_rate=-jax.grad(reward_power)(t),
                **tilt,
            )
            slope, hessian = jax.grad(log_target)(x, t), jax.hessian(log_target)(x, t)
            terms = jnp.array(  # (1), divided by p
                [
                    -jax.grad(log_target, 1)(x, t),
                    jnp.trace(jax.jacfwd(velocity)(x)),
                    velocity(x) @ slope,
                    -0.5 * churn * squared_noise * (jnp.trace(hessian) + slope @ slope),
                    -weight,
                ]
            )
            return jnp.sum(terms), jnp.max(jnp.abs(terms))

        xs = jnp.asarray(np.random.default_rng(3).uniform(-3, 3, (40, size)))
        ts = jnp.asarray(np.random.default_rng(4).uniform(0.02, 0.97, 40))
        arrays = [
            np.stack(part) for part in zip(*((padded(b), padded([r])[0], c) for b, r, c in CASES.values()), strict=True)
        ]
        everywhere = jax.vmap(jax.vmap(residual, (None, None, None, 0, 0)), (0, 0, 0, None, None))
        errors, sizes = jax.jit(everywhere)(*arrays, xs, ts)
        assert np.all(np.isfinite(errors))
        relative = np.abs(errors / sizes).max(1)
        print(schedule_name, size, relative.max())
        assert np.all(relative < 1e-9), dict(zip(CASES, relative, strict=True))


# The steps of `FeynmanKac`.


def sampler_of(schedule, num_steps=12, seed=2, **settings):
    model = GaussianMixture(*mixtures(2, 4)[seed]).diffuse(schedule)
    return model.reverse(num_steps, **({"variance": "posterior"} | settings))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("churn", [0.0, 0.4, 1.0, 2.0])
def test_small_steps_follow_drift_and_weight(name, churn):
    """(x' - x) / h, its variance / h and the weight / h become v, c g^2 and w as the step h in time becomes small."""
    schedule, step, t = SCHEDULES[name], 1e-6, 0.4
    powers = jnp.array([1.7, -0.5])
    with jax.enable_x64(True):
        grid = np.array([t, t - step])
        processes = [sampler_of(schedule, 1, seed, grid=grid, churn=churn) for seed in (0, 1)]
        x = jnp.array([0.7, -0.4])
        states = [process.placed(x, 0) for process in processes]
        law, log_weight = FeynmanKac()(processes, states, powers, [1.7, -0.5], jnp.int32(0), None)
        rate = schedule.alpha_rate(t) / schedule.alpha(t)
        squared_noise = 2 * schedule.sigma(t) * (schedule.sigma_rate(t) - rate * schedule.sigma(t))
        scores = [process.model.score(x, t) for process in processes]
        velocity = drift(scores, powers, rate * x, squared_noise, churn)
        weight = log_weight_rate(scores, powers, rate * x, 2 * rate, squared_noise)
        np.testing.assert_allclose((law.mean - x) / step, velocity, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(law.variance / step, churn * squared_noise * jnp.ones(2), rtol=1e-4)
        assert float(log_weight(x)) / step == pytest.approx(float(weight), rel=1e-4)


TARGETS = {
    "annealed": lambda p, q: p**1.6,
    "flattened": lambda p, q: p**0.6,
    "product": lambda p, q: p * q,
    "guided": lambda p, q: ppl.guide(p, q, weight=1.5),
    "tilted": lambda p, q: (p * q).tilt(lambda x: x[0], twist=lambda state: state["denoised"][0]),
}


@pytest.mark.parametrize(
    "target, name", list(zip(TARGETS, ["linear", "exploding", "edm", "linear", "exploding"], strict=True))
)
def test_kernel_ratio_with_the_noising_variance_is_feynman_kac_at_churn_1(name, target):
    """Both laws and weights agree, so that runs of equal seeds are the same, path by path."""
    with jax.enable_x64(True):
        p, q = (sampler_of(SCHEDULES[name], 25, seed, variance="noising") for seed in (0, 1))
        whole = TARGETS[target](p, q)
        ratio, increments = (ppl.infer(whole, SMC(40, corrector=c), seed=3) for c in (KernelRatio(), FeynmanKac()))
        assert float(ratio.log_evidence) == pytest.approx(float(increments.log_evidence), rel=1e-8)
        np.testing.assert_allclose(ratio.value, increments.value, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(ratio.diagnostics["ancestors"], increments.diagnostics["ancestors"])


def test_kernel_ratio_with_the_noising_variance_is_feynman_kac_in_float32():
    p = sampler_of(SCHEDULES["exploding"], 100, variance="noising")
    found = [ppl.infer(p**2.0, SMC(500, corrector=c), seed=1).log_evidence for c in (KernelRatio(), FeynmanKac())]
    assert float(found[0]) == pytest.approx(float(found[1]), abs=0.02)


@pytest.mark.optimized
@pytest.mark.parametrize("churn, power", [(0.5, 0.7), (2.0, 1.5), (1 / 1.5, 1.5)])
def test_feynman_kac_at_other_churns_gives_the_evidence(churn, power):
    """Of a single Gaussian; its increments are of continuous time, at 600 steps."""
    sampler = GaussianMixture(np.array([[0.5, -1.0]]), 0.7).diffuse(SCHEDULES["exploding"]).reverse(600, churn=churn)
    variance = 0.7**2 + sampler.levels.sigma[-1] ** 2
    exact = (1 - power) * math.log(2 * math.pi * variance) - math.log(power)
    algorithm = SMC(4000, corrector=FeynmanKac())
    found = np.array([float(ppl.infer(sampler**power, algorithm, seed=seed).log_evidence) for seed in range(5)])
    allowance = 0.1  # of the steps, as stated for two dimensions
    assert abs(found.mean() - exact) < 3 * found.std(ddof=1) / np.sqrt(len(found)) + allowance


# What is promised, and what is refused.


def test_guarantees():
    target = sampler_of(SCHEDULES["exploding"]) ** 1.5
    for corrector, guarantee in (
        ("auto", "unbiased"),
        (KernelRatio(), "unbiased"),
        (FeynmanKac(), "discretised"),
        (FeynmanKac(churn=1.0), "discretised"),
        ("none", "heuristic"),
    ):
        algorithm = SMC(16, corrector=corrector)
        posterior = ppl.infer(target, algorithm)
        assert algorithm.guarantee == posterior.guarantee == guarantee
        assert np.isnan(posterior.log_evidence) == (guarantee == "heuristic")
        assert guarantee in repr(posterior)


@pytest.mark.parametrize(
    "name, churn", [("exploding", 0.0), ("linear", 0.5), ("flow", 0.0), ("flow", 0.5), ("cosine", 1.0)]
)
def test_without_a_corrector_nothing_is_weighed(name, churn):
    grid = None if churn == 1.0 else np.linspace(0.99, 0.01, 13)
    p, q = (sampler_of(SCHEDULES[name], 12, seed, churn=churn, grid=grid) for seed in (0, 1))
    for whole in (p, ppl.guide(p, q, weight=1.5).tilt(lambda x: 5 * x[0])):
        posterior = ppl.infer(whole, SMC(32, corrector="none"))
        assert np.isnan(posterior.log_evidence) and posterior.guarantee == "heuristic"
        np.testing.assert_allclose(posterior.log_weights, -math.log(32), rtol=1e-6)
        assert np.all(np.isfinite(posterior.value)) and len(np.unique(posterior.value[:, 0])) == 32
        assert np.all(np.abs(posterior.value) < 20)


@pytest.mark.parametrize("churn", [0.0, 0.5])
def test_without_a_corrector_other_churns_need_data_at_every_level(churn):
    p = sampler_of(SCHEDULES["flow"], churn=churn)
    with pytest.raises(ValueError, match="'none' at churn .* needs data at every level"):
        ppl.infer(p**2.0, SMC(8, corrector="none"))
    assert np.all(np.isfinite(ppl.infer(p, SMC(8, corrector="none")).value))  # alone its own steps are taken


def test_without_a_corrector_a_process_alone_is_itself():
    for churn in (0.0, 0.5, 1.0):
        sampler = sampler_of(SCHEDULES["exploding"], churn=churn)
        plain, same = (ppl.infer(sampler, SMC(8, corrector=c)).value for c in ("auto", "none"))
        np.testing.assert_allclose(plain, same, rtol=1e-4, atol=1e-5)


def test_guidance_without_a_corrector_moves_by_the_guided_score():
    """F's mean is p's reverse kernel with the guided denoised value in the place of its own."""
    with jax.enable_x64(True):
        p, q = (sampler_of(SCHEDULES["linear"], 12, seed, variance="noising") for seed in (0, 1))
        q = q.with_steps(p.steps)
        x = jnp.array([0.3, -0.9])
        states = [process.placed(x, 5) for process in (p, q)]
        laws = [process.forward(state, 5) for process, state in zip((p, q), states, strict=True)]
        law, _ = laws[0].multiply(laws, [-1.0, 2.0], [-1.0, 2.0])
        mixed = {"x": x, "denoised": 2 * states[1]["denoised"] - states[0]["denoised"]}
        np.testing.assert_allclose(law.loc, p.forward(mixed, 5).loc, rtol=1e-9)


CHAIN = MarkovChain(jnp.log(jnp.array([0.6, 0.4])), jnp.log(jnp.array([[0.7, 0.3], [0.2, 0.8]])), 3)


@pytest.mark.parametrize(
    "run, error, message",
    [
        (lambda p: (p(churn=0.0) ** 2.0, "auto", 0.0), ValueError, "has churn 0: its steps have no backward kernel"),
        (lambda p: (p(churn=0.5) ** 2.0, KernelRatio(), 1.0), ValueError, "has churn 0.5: its steps have no backward"),
        (
            lambda p: (p(churn=0.0) ** 2.0, FeynmanKac(), None),
            ValueError,
            "stay equal for ever, got `ess_threshold` None",
        ),
        (
            lambda p: (p(churn=0.0) ** 2.0, FeynmanKac(), 0.5),
            ValueError,
            "stay equal for ever, got `ess_threshold` 0.5",
        ),
        (
            lambda p: (p() ** 2.0, FeynmanKac(churn=2.0), None),
            ValueError,
            r"`churn` must be that of the process, 1, got 2",
        ),
        (lambda p: (p(num_steps=2) ** 3.0, FeynmanKac(), None), ValueError, "step 0 is too coarse for FeynmanKac"),
        (lambda p: (p(num_steps=2) * p(num_steps=2) * p(num_steps=2), FeynmanKac(), None), ValueError, "too coarse"),
        (lambda p: (CHAIN**2.0, FeynmanKac(), None), TypeError, "FeynmanKac is for diffusion processes"),
        (lambda p: (ppl.model(lambda: jnp.ones(()))(), FeynmanKac(), None), TypeError, "`corrector` is for processes"),
    ],
)
def test_impossible_correctors_are_refused(run, error, message):
    def process(**settings):
        return sampler_of(SCHEDULES["exploding"], **settings)

    target, corrector, threshold = run(process)
    with pytest.raises(error, match=message):
        ppl.infer(target, SMC(8, corrector=corrector, ess_threshold=threshold))


def test_feynman_kac_without_resampling_runs_at_churn_0():
    target = sampler_of(SCHEDULES["exploding"], 40, churn=0.0) ** 1.2
    posterior = ppl.infer(target, SMC(8, corrector=FeynmanKac(churn=0.0), ess_threshold=0.0))
    assert np.isfinite(posterior.log_evidence) and not np.any(posterior.diagnostics["resampled"])


def test_feynman_kac_needs_data_at_every_level():
    with pytest.raises(ValueError, match="needs data at every level: start the grid later"):
        ppl.infer(sampler_of(SCHEDULES["flow"]) ** 1.2, SMC(8, corrector=FeynmanKac()))


@pytest.mark.parametrize("corrector", ["kernel_ratio", None, FeynmanKac])
def test_unknown_correctors_are_refused(corrector):
    with pytest.raises(ValueError, match="`corrector` must be 'auto', 'none', KernelRatio"):
        SMC(4, corrector=corrector)


@pytest.mark.parametrize("churn", [-1.0, math.inf, math.nan, "1"])
def test_impossible_churns_are_refused(churn):
    with pytest.raises(ValueError, match="`churn` must be a number of at least 0 or None"):
        FeynmanKac(churn=churn)


def test_heuristic_runs_are_no_inner_estimates_and_chains_are_left_alone():
    posterior = ppl.infer(CHAIN**2.0, SMC(8, corrector="none"))
    assert posterior.guarantee == "heuristic" and np.isnan(posterior.log_evidence)
    np.testing.assert_allclose(posterior.log_weights, -math.log(8), rtol=1e-6)
