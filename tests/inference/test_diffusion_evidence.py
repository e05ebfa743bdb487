"""Evidences of diffusion targets: against closed forms of the path measure (L2), and against quadrature of densities.

The allowance for 100 and more steps with the matched variance is 0.10 nats, on top of 3 standard errors.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, FeynmanKac
from ppl.models import Diffusion, GaussianMixture, RectifiedFlow, VarianceExploding, VariancePreserving

SCHEDULES = {
    "exploding": VarianceExploding(0.01, 8.0),
    "linear": VariancePreserving(),
    "flow": RectifiedFlow(),
}
ALLOWANCE = 0.10
MULTINOMIAL = {"resampler": "multinomial", "ess_threshold": 0.7}


def log_evidences(target, algorithm, num_runs, seed=0):
    """Log-evidences of independent runs, `[num_runs]`, in one compiled map."""
    run = jax.vmap(lambda key: ppl.infer(target, algorithm, key=key).log_evidence)
    return np.asarray(jax.jit(run)(jax.random.split(jax.random.key(seed), num_runs)), np.float64)


# The measure on paths, where everything is jointly Gaussian: closed forms in float64.


class Quadratic:
    """A Gaussian integrand of a path (x_0, ..., x_K) of numbers, exp(constant + linear z - z precision z / 2)."""

    def __init__(self, size):
        self.precision, self.linear, self.constant = np.zeros((size, size)), np.zeros(size), 0.0

    def times_normal(self, row, offset, variance, power):
        """Multiply by N(row z + offset; 0, variance)^power; `row` is {index: coefficient}."""
        places, a = list(row), np.array(list(row.values()))
        self.precision[np.ix_(places, places)] += power * np.outer(a, a) / variance
        self.linear[places] -= power * a * offset / variance
        self.constant -= power * 0.5 * (math.log(2 * math.pi * variance) + offset**2 / variance)

    def mean(self):
        return np.linalg.solve(self.precision, self.linear)

    def log_integral(self):
        eigenvalues = np.linalg.eigvalsh(self.precision)
        assert eigenvalues[0] > 0
        half = 0.5 * self.linear @ self.mean() + 0.5 * len(self.linear) * math.log(2 * math.pi)
        return self.constant + half - 0.5 * np.log(eigenvalues).sum()


class Affine:
    """A model of numbers whose denoised value is affine in x: that of N(mean, scale^2), bent and moved."""

    def __init__(self, schedule, mean, scale, bend=1.0, move=0.0):
        self.schedule, self.mean, self.scale, self.bend, self.move = schedule, mean, scale, bend, move

    def coefficients(self, alpha, sigma):
        """D = a x + c."""
        slope = alpha * self.scale**2 / (alpha**2 * self.scale**2 + sigma**2)
        return self.bend * slope, self.mean * (1 - slope * alpha) + self.move

    def reverse(self, num_steps, **settings):
        def denoiser(x, t):
            slope, offset = self.coefficients(self.schedule.alpha(t), self.schedule.sigma(t))
            return slope * x + offset

        ratios = np.linspace(-5.0, 5.0, 60)
        error = self.scale**2 * np.exp(2 * ratios) / (self.scale**2 + np.exp(2 * ratios))
        table = (ratios, error)
        model = Diffusion(denoiser, (1,), self.schedule, "x0", mean=self.mean, scale=self.scale, error=table)
        return model.reverse(num_steps, **settings)


def path_integrand(models, samplers, powers, variance):
    """prod_i p_i(path)^b_i k(path|x_K)^(1 - sum b_i), from its definition."""
    levels = samplers[0].levels
    whole = Quadratic(levels.num_steps + 1)
    alpha, sigma = levels.alpha, levels.sigma
    error = np.mean([sampler.error for sampler in samplers], 0) if variance == "matched" else 0.0
    weight = alpha[1:] * levels.variance / sigma[:-1] ** 2
    if variance == "noising":
        spread = levels.variance / levels.rate**2
    else:
        spread = levels.variance * (sigma[1:] / sigma[:-1]) ** 2 + weight**2 * error
    for model, power in zip(models, powers, strict=True):
        start = sigma[0] ** 2 + (alpha[0] * model.scale) ** 2
        whole.times_normal({0: 1.0}, -alpha[0] * model.mean, start, power)
        for k in range(levels.num_steps):
            slope, offset = model.coefficients(alpha[k], sigma[k])
            from_x = levels.rate[k] * (sigma[k + 1] / sigma[k]) ** 2 + weight[k] * slope
            whole.times_normal({k + 1: 1.0, k: -from_x}, -weight[k] * offset, spread[k], power)
    for k in range(levels.num_steps):
        whole.times_normal({k: 1.0, k + 1: -levels.rate[k]}, 0.0, levels.variance[k], 1 - sum(powers))
    return whole


PATHS = {  # powers, number of steps, variance, slope of the linear reward, settings of the algorithm, schedule
    "annealed": ((2.0,), 3, "matched", 0.0, {}, "flow"),
    "flattened, posterior variance": ((0.6,), 5, "posterior", 0.0, {}, "exploding"),
    "flattened, noising variance": ((0.6,), 5, "noising", 0.0, {}, "exploding"),
    "annealed, multinomial, when needed": ((2.0,), 4, "matched", 0.0, MULTINOMIAL, "exploding"),
    "product": ((1.0, 1.0), 5, "matched", 0.0, {}, "flow"),
    "guided": ((-0.8, 1.8), 4, "matched", 0.0, {}, "exploding"),
    "tilted": ((1.0,), 4, "matched", 0.6, {}, "flow"),
    "product of powers, tilted": ((0.8, 0.5), 4, "matched", 0.5, {"ess_threshold": 1.0}, "exploding"),
}


@pytest.mark.parametrize("case", PATHS)
def test_path_measure_is_properly_weighted(case):
    """E[Z_hat] and E[Z_hat sum_n W_n x_n] are the integrals of the path measure, at any number of steps (L2)."""
    powers, num_steps, variance, slope, settings, schedule = PATHS[case]
    if schedule == "flow":  # moderate levels only, so that Z_hat has moderate moments
        schedule, grid = SCHEDULES["flow"], np.concatenate([[1.0], np.linspace(0.85, 0.1, num_steps)])
    else:
        schedule, grid = VarianceExploding(0.3, 3.0), np.linspace(1.0, 0.0, num_steps + 1)
    # Neither denoised value is exact, so that kernels are no reversal of the noising and weights are not constant.
    models = [Affine(schedule, 0.4, 1.1, 0.9, 0.1), Affine(schedule, -0.3, 0.8, 0.95, -0.1)][: len(powers)]
    samplers = [model.reverse(num_steps, variance=variance, grid=grid) for model in models]
    target = samplers[0].combination().raised(powers[0])
    for sampler, power in zip(samplers[1:], powers[1:], strict=True):
        target = target.join(sampler.combination().raised(power))
    if slope:
        target = target.tilt(lambda x: slope * x[0], twist=lambda state: slope * state["denoised"][0])
    integrand = path_integrand(models, samplers, powers, variance)
    integrand.linear[-1] += slope
    exact, mean = integrand.log_integral(), integrand.mean()[-1]

    def run(key):
        posterior = ppl.infer(target, SMC(8, **settings), key=key)
        return posterior.log_evidence, jnp.sum(jnp.exp(posterior.log_weights) * posterior.value[:, 0])

    logs, values = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), 10_000))
    ratios = np.exp(np.asarray(logs, np.float64) - exact)
    assert ratios.std() < 5, "too heavy a tail for a z-score"
    for estimate, truth in ((ratios, 1.0), (ratios * np.asarray(values, np.float64), mean)):
        error = estimate.std() / np.sqrt(len(estimate))
        print(f"{case}: {estimate.mean():.4f}, exact {truth:.4f}, standard error {error:.4f}")
        assert abs(estimate.mean() - truth) < 5 * error + 1e-5, (estimate.mean(), truth, error)


@pytest.mark.parametrize("name", ["posterior", "noising", "matched"])
def test_log_density_of_a_path_is_that_of_the_measure(name):
    schedule = SCHEDULES["linear"]
    models = [Affine(schedule, 0.4, 1.1), Affine(schedule, -0.3, 0.8)]
    with jax.enable_x64(True):
        times = models[1].reverse(6).levels.times
        samplers = [model.reverse(6, variance=name, grid=times) for model in models]
        integrand = path_integrand(models, samplers, (-0.5, 1.75), name)
        target = ppl.guide(samplers[0], samplers[1], weight=1.5).join((samplers[1] ** 0.25).combination())
        for seed in range(3):
            levels = samplers[0].levels
            z = np.random.default_rng(seed).normal(size=7) * np.hypot(levels.alpha, levels.sigma)
            found = ppl.log_density(target.program(), {"origin": z[:1], "path": z[1:, None]})
            wanted = integrand.constant + integrand.linear @ z - 0.5 * z @ integrand.precision @ z
            assert float(found) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("power", [0.6, 2.0, 3.0])
def test_path_measure_of_an_exact_reversal_has_no_bias_at_any_number_of_steps(schedule, power):
    """With the exact D and its error prod p^b k^(1 - b) is q^b(x_K) k(path|x_K): of a Gaussian in closed form."""
    model = Affine(SCHEDULES[schedule], 0.4, 1.1)
    for num_steps in (1, 2, 7, 40):
        sampler = model.reverse(num_steps)
        ratios = np.exp(2 * np.minimum(sampler.levels.log_ratio[:-1], 50.0))
        sampler.error = 1.1**2 * ratios / (1.1**2 + ratios)
        found = path_integrand([model], [sampler], (power,), "matched").log_integral()
        spread = (1.1 * sampler.levels.alpha[-1]) ** 2 + sampler.levels.sigma[-1] ** 2
        exact = 0.5 * ((1 - power) * math.log(2 * math.pi * spread) - math.log(power))
        assert found == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("variance", ["posterior", "noising"])
@pytest.mark.parametrize("power", [0.6, 2.0])
def test_bias_of_other_variances_falls_as_one_over_steps_in_closed_form(variance, power):
    """For a Gaussian the path measure's integral is known at any number of steps; that of q^b is its limit."""
    model = Affine(SCHEDULES["exploding"], 0.4, 1.1)
    biases = []
    for num_steps in (50, 200, 800):
        sampler = model.reverse(num_steps, variance=variance)
        spread = 1.1**2 + sampler.levels.sigma[-1] ** 2
        exact = 0.5 * ((1 - power) * math.log(2 * math.pi * spread) - math.log(power))
        biases.append(path_integrand([model], [sampler], (power,), variance).log_integral() - exact)
    assert np.all(np.sign(biases) == np.sign(power - 1)), biases
    off = np.abs(np.array(biases[:-1]) / biases[1:] - 4)  # each time four times as many steps
    assert np.all(np.diff(off) < 0) and off[-1] < 0.25, (biases, off)


# Densities of mixtures, by quadrature and closed forms.

MODES = {
    1: np.array([[-2.0], [0.3], [2.2]]),
    2: np.random.default_rng(0).uniform(-3, 3, (6, 2)),
}
CHANCES = {1: np.array([0.5, 0.2, 0.3]), 2: np.full(6, 1 / 6)}
OTHERS = {
    1: (np.array([[-1.0], [1.5]]), 0.6, np.array([0.6, 0.4])),
    2: (np.random.default_rng(1).uniform(-3, 3, (4, 2)), 0.7, np.array([0.4, 0.3, 0.2, 0.1])),
}
SLOPE = {1: np.array([0.8]), 2: np.array([0.7, -0.4])}


def mixture_log_density(x, means, scale, weights, level):
    alpha, sigma = level
    total = alpha**2 * scale**2 + sigma**2
    squares = ((x[:, None] - alpha * means) ** 2).sum(-1)
    logs = np.log(weights) - 0.5 * (squares / total + x.shape[1] * np.log(2 * np.pi * total))
    return np.logaddexp.reduce(logs, axis=1)


def quadrature(size, level, log_target):
    """log of the integral of exp(log_target(x)) over a box that holds all modes."""
    ends = np.linspace(-9 * level[0], 9 * level[0], 6001 if size == 1 else 901)
    x = ends[:, None] if size == 1 else np.stack(np.meshgrid(ends, ends), -1).reshape(-1, 2)
    return np.logaddexp.reduce(log_target(x)) + size * np.log(ends[1] - ends[0])


def mixture_case(case, size, schedule, num_steps, **settings):
    """A target on mixtures and its exact log-evidence."""
    own = (MODES[size], 0.45, CHANCES[size])
    half = (MODES[size][: len(MODES[size]) // 2 + 1], 0.45, CHANCES[size][: len(MODES[size]) // 2 + 1])
    half = (half[0], half[1], half[2] / half[2].sum())
    model = GaussianMixture(*own).diffuse(schedule)
    settings = {"grid": model.reverse(num_steps, "posterior").levels.times} | settings
    p = model.reverse(num_steps, **settings)
    level = p.levels.alpha[-1], p.levels.sigma[-1]

    def log_p(x):
        return mixture_log_density(x, *own, level)

    if case.startswith("annealed"):
        power = float(case.split()[1])
        return p**power, quadrature(size, level, lambda x: power * log_p(x))
    if case == "product":
        q = GaussianMixture(*OTHERS[size]).diffuse(schedule).reverse(num_steps, **settings)
        return p * q, quadrature(size, level, lambda x: log_p(x) + mixture_log_density(x, *OTHERS[size], level))
    if case == "guided":
        q = GaussianMixture(*half).diffuse(schedule).reverse(num_steps, **settings)
        exact = quadrature(size, level, lambda x: -1.5 * log_p(x) + 2.5 * mixture_log_density(x, *half, level))
        return ppl.guide(p, q, weight=2.5), exact
    slope = SLOPE[size]
    vector = jnp.asarray(slope, jnp.float32)
    target = p.tilt(lambda x: vector @ x, twist=lambda state: vector @ state["denoised"])
    return target, quadrature(size, level, lambda x: log_p(x) + x @ slope)


def assert_evidence(found, exact, label, allowance=ALLOWANCE):
    found = np.asarray(found)
    error = found.std(ddof=1) / math.sqrt(len(found))
    print(f"{label}: error {found.mean() - exact:+.3f}, standard error {error:.3f}")
    assert abs(found.mean() - exact) < 3 * error + allowance, (label, found, exact)


@pytest.mark.parametrize(
    "case, size, schedule",
    [
        ("annealed 2", 1, "flow"),
        ("guided", 1, "exploding"),
        ("tilted", 1, "flow"),
        ("annealed 0.6", 2, "linear"),
        ("annealed 2", 2, "exploding"),
        ("annealed 2", 2, "linear"),
        ("product", 2, "exploding"),
        ("guided", 2, "linear"),
        ("tilted", 2, "exploding"),
    ],
)
def test_log_evidence_of_mixtures_is_that_of_quadrature(case, size, schedule):
    target, exact = mixture_case(case, size, SCHEDULES[schedule], 120)
    found = log_evidences(target, SMC(3000), 6)
    assert_evidence(found, exact, f"{case}, {size}-D, {schedule}")


@pytest.mark.optimized
@pytest.mark.parametrize("case", ["annealed 2", "guided"])
def test_log_evidence_by_feynman_kac_is_that_of_quadrature(case):
    """Its bias falls with the steps: 400 of them, and twice the allowance."""
    target, exact = mixture_case(case, 1, SCHEDULES["exploding"], 400)
    found = log_evidences(target, SMC(2000, corrector=FeynmanKac()), 6)
    assert_evidence(found, exact, f"{case} by Feynman-Kac", 2 * ALLOWANCE)


@pytest.mark.optimized
@pytest.mark.parametrize("variance", ["posterior", "noising"])
def test_bias_of_other_variances_falls_with_the_steps(variance):
    biases, errors = [], []
    for num_steps in (40, 160):
        target, exact = mixture_case("annealed 2", 1, SCHEDULES["exploding"], num_steps, variance=variance)
        found = log_evidences(target, SMC(3000), 8) - exact
        biases.append(found.mean())
        errors.append(found.std(ddof=1) / np.sqrt(len(found)))
    assert biases[0] > 5 * errors[0], (biases, errors)
    # The next order in 1 / steps is below a half of the first at 40 steps.
    error = math.hypot(4 * errors[1], errors[0])
    assert abs(4 * biases[1] - biases[0]) < 5 * error + 0.5 * biases[0], (biases, errors)


SIXTEEN = (np.random.default_rng(5).uniform(-1.5, 1.5, (4, 16)), 0.5, np.array([0.4, 0.3, 0.2, 0.1]))


def test_log_evidence_of_a_tilt_in_16_dimensions():
    slope = np.random.default_rng(6).normal(size=16)
    slope *= 1.0 / np.linalg.norm(slope)
    sampler = GaussianMixture(*SIXTEEN).diffuse(SCHEDULES["exploding"]).reverse(100)
    total = 0.5**2 + sampler.levels.sigma[-1] ** 2
    exact = np.logaddexp.reduce(np.log(SIXTEEN[2]) + SIXTEEN[0] @ slope) + 0.5 * total
    vector = jnp.asarray(slope, jnp.float32)
    target = sampler.tilt(lambda x: vector @ x, twist=lambda state: vector @ state["denoised"])
    assert_evidence(log_evidences(target, SMC(2000), 6), exact, "tilted, 16-D")


@pytest.mark.optimized
def test_log_evidence_of_guidance_by_a_class_in_16_dimensions():
    """The integral of p^-1.5 q^2.5 is the mean of (q/p)^1.5 under q, which is bounded: a million draws tell it."""
    half = (SIXTEEN[0][:2], 0.5, np.array([4 / 7, 3 / 7]))
    times = GaussianMixture(*SIXTEEN).diffuse(SCHEDULES["exploding"]).reverse(100, "posterior").levels.times
    p, q = (GaussianMixture(*m).diffuse(SCHEDULES["exploding"]).reverse(100, grid=times) for m in (SIXTEEN, half))
    level = p.levels.alpha[-1], p.levels.sigma[-1]
    rng = np.random.default_rng(7)
    draws = half[0][rng.choice(2, 200_000, p=half[2])] + math.hypot(0.5, level[1]) * rng.normal(size=(200_000, 16))
    logs = mixture_log_density(draws, *half, level) - mixture_log_density(draws, *SIXTEEN, level)
    exact = np.log(np.mean(np.exp(1.5 * logs)))
    assert_evidence(log_evidences(ppl.guide(p, q, weight=2.5), SMC(2000), 6), exact, "guided, 16-D")


@pytest.mark.optimized
@pytest.mark.parametrize("power", [0.6, 2.0])
def test_log_evidence_of_an_annealed_gaussian_in_16_dimensions(power):
    """To the power 2 the noisy levels should have less: at the noise end their own power, a half of it here.

    Levels of full power, q_t^2, are far from the noised target q^2 in 16 dimensions, and weights heavy-tailed.
    """
    num_steps = 400 if power > 1 else 100
    sampler = GaussianMixture(SIXTEEN[0][:1], 0.5).diffuse(SCHEDULES["exploding"]).reverse(num_steps)
    total = (sampler.levels.alpha[-1] * 0.5) ** 2 + sampler.levels.sigma[-1] ** 2
    exact = 8 * ((1 - power) * math.log(2 * math.pi * total) - math.log(power))
    corrector = FeynmanKac(schedule=lambda t: 1 - 0.5 * t) if power > 1 else "auto"
    found = log_evidences(sampler**power, SMC(2000, corrector=corrector), 6)
    assert_evidence(found, exact, f"annealed {power}, single, 16-D")
