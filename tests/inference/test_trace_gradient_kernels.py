"""HMC, NUTS, MALA and Langevin on traces: posteriors known in closed form, by z-scores at fixed keys."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions.transforms import OrderedTransform

import ppl
from ppl.diagnostics import bulk_ess
from ppl.inference import HMC, MALA, MCMC, NUTS, Gibbs, Langevin, Sequence

YS = np.array([0.4, 1.3, 0.2])


@ppl.model
def everything(ys):
    """Sites on every kind of support, one of which is another site, and a loop."""
    width = ppl.sample("width", dist.Gamma(3.0, 1.0))
    ppl.sample("inside", dist.Uniform(0.0, width))
    ppl.sample("shares", dist.Dirichlet(jnp.array([2.0, 3.0, 4.0])))
    two = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    ppl.sample("ordered", dist.TransformedDistribution(two, OrderedTransform()))
    mean = ppl.sample("mean", dist.Normal(0.0, 1.0))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + mean, 1.0))
        ppl.observe("y", dist.Normal(x, 0.5), y)
        return x, x

    return ppl.scan(step, 0.0, ys)[1]


def walk_exactly():
    """Means and variances of (x, mean) given the observations."""
    times = np.arange(1, len(YS) + 1)
    steps = np.append(times, 1)
    covariance = np.outer(steps, steps).astype(float)
    covariance[:-1, :-1] += np.minimum.outer(times, times)
    gain = covariance[:, :-1] @ np.linalg.inv(covariance[:-1, :-1] + 0.25 * np.eye(len(YS)))
    return gain @ YS, np.diag(covariance - gain @ covariance[:-1])


def figures(sites):
    """What is compared with its exact mean, one column each."""
    x = np.column_stack([sites["x"], sites["mean"]])
    means, variances = walk_exactly()
    low, high = np.asarray(sites["ordered"]).T
    columns = [
        (np.asarray(sites["width"]), 3.0),
        ((np.asarray(sites["width"]) - 3) ** 2, 3.0),
        (np.asarray(sites["inside"]), 1.5),
        (np.asarray(sites["inside"]) ** 2, 4.0),
        (np.asarray(sites["inside"]) / np.asarray(sites["width"]), 0.5),
        (low, 0.0),
        (low**2, 1.0),
        (np.log(high - low), 0.0),
        (np.log(high - low) ** 2, 1.0),
    ]
    columns += [(np.asarray(sites["shares"])[:, i], (i + 2) / 9) for i in range(3)]
    columns += [(np.asarray(sites["shares"])[:, 0] ** 2, 2 * 3 / (9 * 10))]
    columns += [(x[:, i], means[i]) for i in range(4)]
    columns += [((x[:, i] - means[i]) ** 2, variances[i]) for i in range(4)]
    return np.column_stack([c for c, _ in columns]), np.array([truth for _, truth in columns])


def assert_means_within_5_standard_errors(values, truth, num_chains):
    """Compare means of chains' draws, errors from their effective sample sizes."""
    values = np.asarray(values, np.float64).reshape(num_chains, -1, values.shape[-1])
    ess = bulk_ess(values)
    assert np.all(ess > 100), ess
    z = (values.mean((0, 1)) - truth) / (values.std((0, 1)) / np.sqrt(ess))
    assert np.all(np.abs(z) < 5), (z, ess)


@pytest.mark.parametrize(("kernel", "num_samples"), [(NUTS(), 1000), (MALA(num_steps=4), 3000)])
def test_exact_kernels_draw_from_closed_form_posteriors(kernel, num_samples):
    posterior = ppl.infer(everything(jnp.asarray(YS)), MCMC(kernel, num_samples, num_warmup=400, num_chains=4), seed=1)
    assert_means_within_5_standard_errors(*figures(posterior.sites), num_chains=4)
    acceptance = posterior.diagnostics["acceptance"].mean()
    assert abs(acceptance - kernel.target_accept) < 0.15, acceptance
    assert posterior.guarantee == "invariant"
    assert np.isnan(posterior.log_evidence)


@ppl.model
def gaussian():
    return ppl.sample("x", dist.Normal(0.0, 2.0))


def test_unadjusted_langevin_has_the_variance_of_its_step():
    """x' = (1 - h / s^2) x + sqrt(2 h) z on N(0, s^2) has the stationary variance s^2 / (1 - h / (2 s^2))."""
    step_size = 2.0
    posterior = ppl.infer(gaussian(), MCMC(Langevin(step_size, num_steps=8), 4000, num_warmup=10, num_chains=4), seed=0)
    x = np.asarray(posterior.sites["x"])[:, None]
    variance = 4.0 / (1 - step_size / 8)
    assert_means_within_5_standard_errors(np.hstack([x, x**2]), np.array([0.0, variance]), 4)
    assert posterior.guarantee == "discretised"


def test_langevin_finds_a_step_that_is_nearly_exact():
    posterior = ppl.infer(gaussian(), MCMC(Langevin(num_steps=8), 2000, num_warmup=300, num_chains=4), seed=0)
    assert abs(posterior.diagnostics["acceptance"].mean() - 0.95) < 0.03
    step_size = np.exp(posterior.state.memory.log_step_size)
    assert np.all((0.05 < step_size / 4.0) & (step_size / 4.0 < 0.6))


# Together with other kernels --------------------------------------------------------------------------------------


@ppl.model
def two_parts(y):
    part = ppl.sample("part", dist.Bernoulli(probs=0.3))
    mean = ppl.sample("mean", dist.Normal(2.0 * part, 1.0))
    ppl.observe("y", dist.Normal(mean, 1.0), y)
    return mean


@pytest.mark.parametrize("kernel", [HMC(0.9, 3, sites="mean"), MALA(0.6, num_steps=2, sites="mean")])
def test_gradients_follow_what_another_kernel_did(kernel):
    weights = np.array([0.7, 0.3]) * np.exp(-(np.array([0.7, 2.0 - 0.7]) ** 2) / 4)
    weights /= weights.sum()
    means = (np.array([0.0, 2.0]) + 0.7) / 2
    posterior = ppl.infer(two_parts(0.7), MCMC(Sequence(kernel, Gibbs("part")), 4000, num_warmup=20, num_chains=4))
    part, mean = np.asarray(posterior.sites["part"]), np.asarray(posterior.sites["mean"])
    assert_means_within_5_standard_errors(
        np.column_stack([part, mean, mean * part]), np.array([weights[1], weights @ means, weights[1] * means[1]]), 4
    )
