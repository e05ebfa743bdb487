"""Densities of sites: masks, supports and parameters, at whatever depth of a distribution they stand."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ppl
from ppl.densities import latent, log_density, parameters_valid
from ppl.inference import MCMC, MH, NUTS, SMC, ImportanceSampling, ParticleGibbs, Regenerate

KEPT = jnp.array([True, False, True])
GIVEN = jnp.array([0.2, 0.7])


def density(distribution, value):
    """Return the log-density with values and parameters that nobody knows beforehand."""
    return jax.jit(log_density)(distribution, jnp.asarray(value))


# Masked observations -------------------------------------------------------------------------------------------------

MASKED = {
    "outermost": lambda d: d.mask(KEPT),
    "inside an event": lambda d: d.mask(KEPT).to_event(1),
    "twice": lambda d: d.mask(KEPT).mask(jnp.array([True, False, True])),
    "under expand": lambda d: d.mask(KEPT).expand([2, 3]).to_event(1),
    "events under expand": lambda d: d.mask(KEPT).to_event(1).expand([2]),
}


@pytest.mark.parametrize("wrapped", MASKED)
@pytest.mark.parametrize(
    "base",
    [dist.Normal(0.3, 0.5), dist.Beta(2.0, 3.0), dist.Uniform(0.0, 2.0), dist.LogNormal(0.0, 1.0)],
    ids=lambda d: type(d).__name__,
)
def test_masked_entries_do_not_count_whatever_stands_there(wrapped, base):
    distribution = MASKED[wrapped](base.expand([3]))
    exact = float(base.log_prob(GIVEN).sum())
    repeats = 2 if "expand" in wrapped else 1
    for bad in (jnp.nan, -7.0, jnp.inf):
        value = jnp.array([0.2, bad, 0.7]) * jnp.ones(distribution.shape())
        np.testing.assert_allclose(density(distribution, value), repeats * exact, rtol=1e-6)


def test_kept_entries_still_count_beside_masked_ones():
    masked = dist.Beta(2.0, 3.0).expand([3]).mask(KEPT)
    assert density(masked, jnp.array([1.5, jnp.nan, 0.7])) == -jnp.inf
    assert jnp.isnan(density(masked, jnp.array([0.5, 0.5, jnp.nan])))
    assert jnp.isnan(density(masked.to_event(1), jnp.array([0.5, 0.5, jnp.nan])))


@pytest.mark.parametrize("masked", [True, False])
def test_parameters_of_masked_entries_do_not_count(masked):
    def both(scale, value):
        law = dist.Normal(0.0, scale).mask(KEPT) if masked else dist.Normal(0.0, scale)
        return log_density(law, value), log_density(law.to_event(1), value)

    found = jax.jit(both)(jnp.array([0.5, -1.0, 0.5]), jnp.array([0.2, 0.5, 0.7]))
    exact = float(dist.Normal(0.0, 0.5).log_prob(GIVEN).sum()) if masked else np.nan
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_masked_padding_of_observations_gives_the_evidence_of_what_is_seen():
    @ppl.model
    def line(y, wrapped):
        x = ppl.sample("x", dist.Normal(0.0, 1.0))
        ppl.observe("y", MASKED[wrapped](dist.Normal(x * jnp.ones(3), 0.5)), y)

    y = jnp.array([0.2, jnp.nan, 0.7])
    found = [float(ppl.log_density(line(y, wrapped), {"x": 0.4})) for wrapped in ("outermost", "inside an event")]
    exact = float(dist.Normal(0.0, 1.0).log_prob(0.4) + dist.Normal(0.4, 0.5).log_prob(GIVEN).sum())
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    gradient = jax.grad(lambda x: ppl.log_density(line(y, "inside an event"), {"x": x}))(0.4)
    np.testing.assert_allclose(gradient, -0.4 + (GIVEN - 0.4).sum() / 0.25, rtol=1e-5)


# Masked latents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Normal(0.0, 1.0).mask(False),
        dist.Normal(0.0, 1.0).mask(jnp.array(False)),
        dist.Normal(jnp.zeros(3), 1.0).mask(KEPT),
        dist.Normal(jnp.zeros(3), 1.0).mask(KEPT).to_event(1),
        dist.Normal(jnp.zeros(3), 1.0).mask(KEPT).expand([2, 3]).to_event(2),
        dist.TransformedDistribution(dist.Normal(jnp.zeros(3), 1.0).mask(KEPT), dist.transforms.ExpTransform()),
    ],
    ids=["False", "traced", "entries", "event", "expanded", "transformed"],
)
def test_a_latent_site_keeps_the_density_of_masked_entries(distribution):
    plain = latent(distribution)
    value = plain.sample(jax.random.key(0))
    assert plain.shape() == distribution.shape()

    @ppl.model
    def site():
        ppl.sample("x", distribution)

    density = float(ppl.log_density(site(), {"x": value}))
    base = dist.Normal(0.0, 1.0)
    if isinstance(distribution, dist.TransformedDistribution):
        base = dist.LogNormal(0.0, 1.0)
    np.testing.assert_allclose(density, base.log_prob(value).sum(), rtol=1e-5)


@ppl.model
def padded(y):
    mu = ppl.sample("mu", dist.Normal(0.0, 1.0).mask(False))
    with numpyro.handlers.mask(mask=jnp.array([True, False])):
        numpyro.sample("pad", dist.Normal(jnp.zeros(2), 1.0))
    ppl.observe("y", dist.Normal(mu, 0.5), y)


def walk(sites):
    return {name: dist.Normal(value, 1.0) for name, value in sites.items()}


@pytest.mark.parametrize(
    "kernel", [NUTS(step_size=0.5), Regenerate(), MH(walk), ParticleGibbs(SMC(8))], ids=lambda k: type(k).__name__
)
def test_every_kernel_gives_masked_latents_the_same_posterior(kernel):
    """mu | y ~ N(4 y / 5, 1 / 5) and pad ~ N(0, 1), for each of many chains after the first steps."""
    chains = 512
    posterior = ppl.infer(padded(2.0), MCMC(kernel, num_samples=1, num_warmup=20, num_chains=chains))
    mu, pad = (np.asarray(posterior.sites[name], np.float64) for name in ("mu", "pad"))
    assert abs(mu.mean() - 1.6) < 5 * np.sqrt(0.2 / chains)
    assert np.all(np.abs(pad.mean(0)) < 5 / np.sqrt(chains))
    assert np.all(np.abs((pad**2).mean(0) - 1) < 5 * np.sqrt(2 / chains))


def test_populations_give_masked_latents_the_evidence_of_their_prior():
    exact = float(dist.Normal(0.0, np.sqrt(1.25)).log_prob(2.0))
    posterior = ppl.infer(padded(2.0), ImportanceSampling(10_000))
    assert abs(posterior.log_evidence - exact) < 5 / np.sqrt(posterior.ess)


# Supports ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "outside"),
    [
        (dist.TransformedDistribution(dist.Uniform(0.0, 1.0), dist.transforms.AffineTransform(2.0, 3.0)), 1.0),
        (dist.TransformedDistribution(dist.Gamma(2.0, 1.0), dist.transforms.AffineTransform(0.0, -1.0)), 0.5),
        (dist.Uniform(0.0, jnp.ones(3)).to_event(1), [0.5, 1.5, 0.5]),
        (dist.MixtureSameFamily(dist.Categorical(jnp.array([0.5, 0.5])), dist.Beta(jnp.ones(2), 1.0)), 1.5),
        (dist.TruncatedNormal(0.0, 1.0, low=0.0).expand([2]), [0.5, -0.5]),
        (dist.Binomial(4, 0.5), 5),
        (dist.Dirichlet(jnp.ones(3)), [0.5, 0.2, 0.2]),
    ],
)
def test_densities_are_zero_outside_of_supports(distribution, outside):
    assert density(distribution, jnp.asarray(outside)) == -jnp.inf


# Parameters ----------------------------------------------------------------------------------------------------------

INVALID = {
    "scale": lambda s: dist.Normal(0.0, s),
    "location": lambda s: dist.Normal(jnp.log(s), 1.0),
    "rate": lambda s: dist.Gamma(1.0, s),
    "probability": lambda s: dist.Bernoulli(1.5 + 0 * s),
    "logits": lambda s: dist.Categorical(logits=jnp.stack([jnp.sqrt(s), 0.0])),
    "simplex": lambda s: dist.Categorical(probs=jnp.array([0.7, 0.7]) * s / s),
    "negative probability": lambda s: dist.Categorical(probs=jnp.stack([1 - s, s])),
    "expanded": lambda s: dist.Normal(0.0, s).expand([3]).to_event(1),
    "mixture": lambda s: dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.5, 0.5])), dist.Normal(jnp.zeros(2), jnp.stack([s, 1.0]))
    ),
    "base": lambda s: dist.TransformedDistribution(dist.Normal(0.0, s), dist.transforms.ExpTransform()),
    "stretch": lambda s: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(0.0, 0 * s)
    ),
    "factor": lambda s: dist.MultivariateNormal(jnp.zeros(2), scale_tril=jnp.eye(2) * s),
    "not definite": lambda s: dist.MultivariateNormal(jnp.zeros(2), s * jnp.eye(2)),
    "bounds": lambda s: dist.Uniform(0.0, s),
    "whole bounds": lambda s: dist.DiscreteUniform(3 + (0 * s).astype(int), 1),
    "inflated": lambda s: dist.ZeroInflatedPoisson(0.5, s),
    "truncated": lambda s: dist.TruncatedNormal(0.0, s, low=0.0),
    "ordered": lambda s: dist.OrderedLogistic(0.0, jnp.stack([0.0, s])),
    "count": lambda s: dist.Binomial(-1 + (0 * s).astype(int), 0.5),
    "degrees": lambda s: dist.StudentT(s, 0.0, 1.0),
    "concentration": lambda s: dist.Dirichlet(jnp.stack([1.0, s])),
    "half": lambda s: dist.HalfCauchy(s),
}


@pytest.mark.parametrize("name", INVALID)
def test_parameters_outside_of_their_constraint_are_invalid(name):
    assert not jax.jit(lambda s: jnp.asarray(parameters_valid(INVALID[name](s))))(-0.5)


VALID = {
    "known": lambda one: dist.Normal(0.0, 1.0),
    "impossible categories": lambda one: dist.Categorical(logits=jnp.stack([one, -jnp.inf])),
    "zero probability": lambda one: dist.Categorical(probs=jnp.stack([one, 0.0])),
    "certain": lambda one: dist.Bernoulli(one),
    "many categories": lambda one: dist.Categorical(probs=jax.nn.softmax(one * jnp.linspace(0.0, 9.0, 50_000))),
    "infinite truncation": lambda one: dist.TruncatedNormal(0.0, one, low=-jnp.inf * one, high=1.0),
    "no counts": lambda one: dist.Poisson(one - 1),
    "correlations": lambda one: dist.LKJCholesky(3, one),
    "matrices": lambda one: dist.Wishart(5.0, jnp.eye(2) * one),
}


@pytest.mark.parametrize("name", VALID)
def test_parameters_on_the_boundary_that_mean_something_are_valid(name):
    def valid(one):
        found = parameters_valid(VALID[name](one))
        return jnp.asarray(True if found is None else found)

    assert jax.jit(valid)(1.0)


@pytest.mark.parametrize("algorithm", [ImportanceSampling(16), SMC(16)], ids=["importance", "smc"])
def test_invalid_parameters_of_a_draw_are_an_error_that_names_the_site(algorithm):
    @ppl.model
    def scales(offset):
        s = ppl.sample("s", dist.Normal(offset, 1.0))

        def step(x, _):
            return ppl.sample("x", dist.Normal(x, s)), None

        ppl.scan(step, 0.0, length=2)

    with pytest.raises(ppl.InvalidWeight, match=r"'x' \(test_densities.py:\d+, first at step 0"):
        ppl.infer(scales(0.0), algorithm)
    assert ppl.infer(scales(9.0), algorithm).log_evidence == pytest.approx(0.0, abs=1e-5)


def test_a_draw_of_which_no_value_is_possible_dies_with_its_site():
    @ppl.model
    def dead_end(logits):
        ppl.sample("x", dist.Categorical(logits=logits))

    impossible = jnp.full(3, -jnp.inf)
    assert jax.jit(lambda logits: log_density(dist.Categorical(logits=logits), 0))(impossible) == -jnp.inf
    with pytest.raises(ppl.AllParticlesDied, match="'x'"):
        ppl.infer(dead_end(impossible), ImportanceSampling(4))
    with pytest.raises(ppl.InvalidWeight, match="'x'"):
        ppl.infer(dead_end(impossible.at[0].set(jnp.nan)), ImportanceSampling(4))


def test_invalid_parameters_of_the_dead_are_ignored():
    @ppl.model
    def guarded():
        s = ppl.sample("s", dist.Normal(0.0, 1.0))
        ppl.factor("positive", jnp.where(s > 0, 0.0, -jnp.inf))
        ppl.sample("x", dist.Normal(0.0, s))

    posterior = ppl.infer(guarded(), ImportanceSampling(64))
    alive = np.asarray(posterior.weights) > 0
    assert alive.any() and np.all(np.asarray(posterior.sites["s"])[alive] > 0)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["deterministic", "returned"])
def test_nan_that_no_weight_shows_is_an_error(where):
    @ppl.model
    def lossy():
        x = ppl.sample("x", dist.Normal(0.0, 1.0))
        root = jnp.sqrt(x)
        return ppl.deterministic("root", root) if where == "deterministic" else root

    with pytest.raises(ppl.InvalidWeight, match="'root'" if where == "deterministic" else "returned value"):
        ppl.infer(lossy(), ImportanceSampling(16))


# Distributions without a sampler -------------------------------------------------------------------------------------


class Triangle(dist.Distribution):
    """A density alone: 2 x on the unit interval."""

    support = dist.constraints.unit_interval

    def __init__(self):
        super().__init__(batch_shape=(), event_shape=())

    def log_prob(self, value):
        return jnp.log(2 * value)


@ppl.model
def without_sampler(kind, proposal):
    law = {"triangle": Triangle(), "flat": dist.ImproperUniform(dist.constraints.unit_interval, (), ())}[kind]
    x = ppl.sample("x", law, proposal=proposal)
    ppl.factor("f", x)
    return x


@pytest.mark.parametrize(("kind", "exact"), [("triangle", 2.0), ("flat", np.e - 1)])
def test_a_density_alone_can_be_proposed_conditioned_and_scored(kind, exact):
    program = without_sampler(kind, dist.Beta(2.0, 1.5))
    posterior = ppl.infer(program, ImportanceSampling(10_000))
    assert abs(posterior.log_evidence - np.log(exact)) < 5 / np.sqrt(posterior.ess)
    log_prob = 0.0 if kind == "flat" else float(jnp.log(1.0))
    assert ppl.log_density(without_sampler(kind, None), {"x": 0.5}) == pytest.approx(log_prob + 0.5, abs=1e-6)
    conditioned = ppl.condition(without_sampler(kind, None), {"x": 0.5})
    assert ppl.infer(conditioned, ImportanceSampling(2)).log_evidence == pytest.approx(log_prob + 0.5, abs=1e-6)


@pytest.mark.parametrize("run", [lambda p: ppl.infer(p, ImportanceSampling(4)), ppl.simulate])
def test_a_density_alone_that_must_be_drawn_is_refused_with_the_way_out(run):
    with pytest.raises(ppl.SiteTypeError, match=r"'x' \(test_densities.py:\d+\) must be drawn.*proposal"):
        run(without_sampler("triangle", None))


def test_a_proposal_without_a_sampler_is_refused():
    with pytest.raises(ppl.SiteTypeError, match="proposal Triangle has no sampler"):
        ppl.infer(without_sampler("flat", Triangle()), ImportanceSampling(4))
