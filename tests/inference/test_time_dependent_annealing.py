"""Powers that change on the way: log Z against quadrature, and the estimate of log-densities against known ones."""

import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, FeynmanKac
from ppl.inference.langevin import Langevin
from ppl.models import Diffusion, GaussianMixture, VarianceExploding, VariancePreserving

MEANS = np.array([[-2.0, 0.5], [1.0, 1.5], [1.5, -2.0]])
SCALE, STEPS = 0.45, 200
MIXTURE = GaussianMixture(MEANS, SCALE, [0.3, 0.5, 0.2])
OTHER = GaussianMixture(MEANS + 0.4, SCALE)
ALLOWANCE = 0.10  # for the discretisation, in nats


def rising(t):
    return 1 - 0.6 * t


def falling(t):
    return 1 + 0.5 * t


def process(mixture=MIXTURE, steps=STEPS, schedule=None, **options):
    schedule = VarianceExploding(0.01, 20.0) if schedule is None else schedule
    return mixture.diffuse(schedule).reverse(steps, variance="noising", **options)


def network(mixture=MIXTURE):
    """A model that does not know its density."""
    known = mixture.diffuse(VarianceExploding(0.01, 20.0))
    return Diffusion(known.denoise, known.shape, known.schedule, "x0", mean=known.mean, scale=known.scale)


def quadrature(factors):
    """Return log of the integral of prod_i q_i^{b_i} at the last level, and its mean, on a grid."""
    line = np.linspace(-9, 9, 1201)
    grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    total = 0.0
    for reverse, power in factors:
        means, scales, weights = reverse.model._components
        alpha, sigma = reverse.levels.alpha[-1], reverse.levels.sigma[-1]
        spread = (alpha * scales) ** 2 + sigma**2
        squares = ((grid[:, None] - alpha * means) ** 2).sum(-1)
        logs = np.log(weights) - squares / 2 / spread - np.log(2 * np.pi * spread)
        total = total + power * np.logaddexp.reduce(logs, axis=1)
    density = np.exp(total)
    return np.log(density.sum() * (line[1] - line[0]) ** 2), density @ grid / density.sum()


def check_evidence(factors, corrector, runs=4, **settings):
    target = factors[0][0] ** factors[0][1]
    for reverse, power in factors[1:]:
        target = target * reverse**power
    found = [ppl.infer(target, SMC(3000, corrector=corrector, **settings), seed=seed) for seed in range(runs)]
    assert {posterior.guarantee for posterior in found} == {"discretised"}
    exact, mean = quadrature(factors)
    logs = np.array([float(posterior.log_evidence) for posterior in found])
    assert abs(logs.mean() - exact) < 3 * logs.std(ddof=1) / np.sqrt(runs) + ALLOWANCE, (logs, exact)
    means = np.array([posterior.expectation(lambda x: x) for posterior in found])
    assert np.all(np.abs(means.mean(0) - mean) < 5 * means.std(0, ddof=1) / np.sqrt(runs) + 0.1), (means, mean)


@pytest.mark.parametrize("power, schedule", [(2.0, rising), (0.6, rising), (0.6, falling)])
def test_evidence_is_that_of_the_final_powers(power, schedule):
    check_evidence([(process(), power)], FeynmanKac(schedule=schedule))


def test_evidence_of_a_product_under_a_schedule():
    check_evidence([(process(), 1.0), (process(OTHER), 0.5)], FeynmanKac(schedule=rising))


def test_evidence_where_data_shrink():
    check_evidence([(process(schedule=VariancePreserving()), 0.8)], FeynmanKac(schedule=rising))


def test_moves_follow_the_powers_of_their_level():
    check_evidence([(process(), 2.0)], FeynmanKac(schedule=rising), rejuvenation=Langevin())


def test_a_schedule_of_ones_changes_nothing():
    target = process() ** 2.0
    plain = ppl.infer(target, SMC(100, corrector=FeynmanKac()))
    scheduled = ppl.infer(target, SMC(100, corrector=FeynmanKac(schedule=lambda t: 1.0)))
    assert float(scheduled.log_evidence) == pytest.approx(float(plain.log_evidence), abs=1e-4)
    np.testing.assert_allclose(scheduled.value, plain.value, atol=1e-4)


def test_weights_by_estimated_log_densities_come_close_to_those_by_known_ones():
    def log_weights(steps, source):
        corrector = FeynmanKac(schedule=rising, log_density=source)
        posterior = ppl.infer(process(steps=steps) ** 1.2, SMC(2000, corrector=corrector, ess_threshold=0.0))
        return np.asarray(posterior.log_weights, np.float64), posterior

    errors = []
    for steps in (50, 450):
        (known, posterior), (estimated, heuristic) = log_weights(steps, "known"), log_weights(steps, "estimated")
        np.testing.assert_allclose(heuristic.value, posterior.value, atol=1e-4)  # weights alone differ
        apart = known - estimated
        errors.append(apart.std())
        assert apart.std() < 0.5 * known.std()
    assert errors[0] / errors[1] > 2  # 3 is 1 / sqrt(steps)


def test_a_model_without_density_is_annealed_heuristically():
    target = network().reverse(STEPS, variance="noising") ** 2.0
    posterior = ppl.infer(target, SMC(3000, corrector=FeynmanKac(schedule=rising)))
    assert posterior.guarantee == "heuristic" and np.isnan(posterior.log_evidence)
    assert np.isnan(posterior.diagnostics["log_evidence"]).all()
    assert posterior.diagnostics["network_calls"] == 3000 * STEPS
    _, mean = quadrature([(process(), 2.0)])
    assert np.abs(posterior.expectation(lambda x: x) - mean).max() < 0.35
    plain = ppl.infer(target, SMC(50, corrector=FeynmanKac()))
    assert plain.guarantee == "discretised" and np.isfinite(plain.log_evidence)


def test_an_energy_without_constants_is_not_taken_for_a_density_unless_told():
    known = MIXTURE.diffuse(VarianceExploding(0.01, 20.0))
    energy = Diffusion(
        None, known.shape, known.schedule, mean=known.mean, scale=known.scale, log_density=known.log_density
    )
    target = energy.reverse(20, variance="noising") ** 1.2

    def promise(source):
        return ppl.infer(target, SMC(20, corrector=FeynmanKac(schedule=rising, log_density=source))).guarantee

    assert [promise(source) for source in ("auto", "estimated", "known")] == ["heuristic", "heuristic", "discretised"]


def test_schedules_that_cannot_be_are_refused():
    target = process(steps=20) ** 1.2

    def refused(match, corrector, target=target, **settings):
        with pytest.raises(ValueError, match=match):
            ppl.infer(target, SMC(10, corrector=corrector, **settings))

    refused("`schedule` must be 1 at 0", FeynmanKac(schedule=lambda t: 2.0))
    refused("`schedule` must be positive", FeynmanKac(schedule=lambda t: 1 - 2 * t))
    refused("`schedule` must be positive", FeynmanKac(schedule=lambda t: 1 if t < 1 else float("nan")))
    refused("too coarse", FeynmanKac(schedule=lambda t: 1 + 5 * t))
    refused(
        "log-densities that the models know",
        FeynmanKac(schedule=rising, log_density="estimated"),
        rejuvenation=Langevin(),
    )
    slow = network().reverse(20, variance="noising", churn=0.5) ** 1.2
    refused("churn 1", FeynmanKac(schedule=rising), slow)
    refused("needs models that know it", FeynmanKac(schedule=rising, log_density="known"), network().reverse(20) ** 1.2)
    with pytest.raises(ValueError, match="`log_density` must be"):
        FeynmanKac(schedule=rising, log_density="exact")
    with pytest.raises(TypeError, match="`schedule` must be a function"):
        FeynmanKac(schedule=jnp.ones(3))
