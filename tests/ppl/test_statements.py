"""sample, observe, factor, deterministic, scope; NumPyro's statements in a model; the distributions of sites."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density as numpyro_log_density

import ppl
from ppl.inference import ImportanceSampling
from tests.ppl.checks import (
    assert_close,
    assert_mean_within_5_standard_errors,
    assert_trace_agrees_with_log_density,
    repeat,
)

# Statements -------------------------------------------


def test_log_density_is_the_sum_of_sites_observations_and_factors():
    @ppl.model
    def program(y, scale=2.0):
        x = ppl.sample("x", dist.Normal(0.0, scale))
        ppl.observe("y", dist.Normal(x, 1.0), y)
        ppl.factor("f", -3.0 * x)
        return ppl.deterministic("double", 2 * x)

    x, y = 0.7, -0.2
    expected = dist.Normal(0.0, 2.0).log_prob(x) + dist.Normal(x, 1.0).log_prob(y) - 3 * x
    assert_close(ppl.log_density(program(y), {"x": x}), expected)
    trace = ppl.simulate(program(y))
    assert set(trace.sites) == {"x", "double"}
    assert_close(trace.sites["double"], 2 * trace.sites["x"])
    assert_close(trace.value, trace.sites["double"])


def test_observe_returns_the_value_as_an_array():
    @ppl.model
    def program():
        return ppl.observe("y", dist.Normal(0.0, 1.0), 1.5)

    assert float(ppl.simulate(program()).value) == 1.5


def test_scopes_nest_and_prefix_every_kind_of_statement():
    @ppl.model
    def program():
        with ppl.scope("a"):
            ppl.sample("x", dist.Normal(0.0, 1.0))
            with ppl.scope("b"):
                ppl.sample("x", dist.Normal(0.0, 1.0))
                ppl.deterministic("d", 1.0)
                ppl.scan(lambda c, _: (c, ppl.sample("z", dist.Normal(0.0, 1.0))), 0.0, length=2)
                ppl.factor("f", 0.5)
        return ppl.sample("x", dist.Normal(0.0, 1.0))

    assert set(ppl.simulate(program()).sites) == {"a/x", "a/b/x", "a/b/d", "a/b/z", "x"}
    assert "a/b/f" in program().stage().statements


def test_scope_is_closed_after_an_exception_that_the_model_catches():
    @ppl.model
    def program():
        try:
            with ppl.scope("a"):
                raise KeyError
        except KeyError:
            pass
        return ppl.sample("x", dist.Normal(0.0, 1.0))

    assert set(ppl.simulate(program()).sites) == {"x"}


def test_names_with_slashes_and_spaces_are_just_names():
    @ppl.model
    def program():
        return ppl.sample("a/b c", dist.Normal(0.0, 1.0))

    posterior = ppl.infer(program(), ImportanceSampling(3), keep=["a/b c"])
    assert posterior.sites["a/b c"].shape == (3,)


# NumPyro's statements -------------------------------------------


def _plates(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", 3):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
    return z


def _nested_plates(y):
    with numpyro.plate("rows", 4, dim=-2):
        a = numpyro.sample("a", dist.Normal(0.0, 2.0))
        with numpyro.plate("columns", 3, dim=-1):
            b = numpyro.sample("b", dist.Gamma(2.0, 1.0))
            numpyro.sample("y", dist.Normal(a * b, 1.0), obs=jnp.broadcast_to(y, (4, 3)))
    return b


def _factors(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("f", jnp.sum(y * x))
    numpyro.deterministic("d", x**2)


def _factor_in_a_plate(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", 3):
        numpyro.factor("f", x * 0.5)
        numpyro.factor("g", x * y)


def _masked_factor(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    with handlers.mask(mask=False):
        numpyro.factor("f", jnp.sum(y * x))


def _masked_observations(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", 3), handlers.mask(mask=jnp.array([True, False, True])):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def _masked_observations_outside_of_the_support(y):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    values = jnp.array([0.5, -1.0, 2.0]) + 0 * y
    with numpyro.plate("n", 3), handlers.mask(mask=values >= 0):
        numpyro.sample("y", dist.Exponential(rate), obs=values)


def _scaled_observations(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with handlers.scale(scale=2.5):
        numpyro.sample("y", dist.Normal(mu, 1.0).expand([3]), obs=y)


def _scaled_latent(y):
    with handlers.scale(scale=2.0):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu, 1.0).expand([3]), obs=y)


def _conditioned_by_a_handler(y):
    def inner():
        return numpyro.sample("mu", dist.Normal(0.0, 1.0))

    mu = handlers.condition(inner, {"mu": 0.3})()
    numpyro.sample("y", dist.Normal(mu, 1.0).expand([3]), obs=y)
    numpyro.sample("z", dist.Normal(mu, 1.0))


def _scoped(y):
    def inner():
        return numpyro.sample("mu", dist.Normal(0.0, 1.0))

    a = handlers.scope(inner, prefix="one")()
    b = handlers.scope(inner, prefix="two")()
    numpyro.sample("y", dist.Normal(a + b, 1.0).expand([3]), obs=y)


def _reparametrised(y):
    config = {"mu": numpyro.infer.reparam.LocScaleReparam(0.0)}
    mu = handlers.reparam(lambda: numpyro.sample("mu", dist.Normal(2.0, 3.0)), config)()
    numpyro.sample("y", dist.Normal(mu, 1.0).expand([3]), obs=y)


def _sample_shape(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0), sample_shape=(3,))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def _event_shapes(y):
    p = numpyro.sample("p", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    m = numpyro.sample("m", dist.MultivariateNormal(jnp.zeros(3), 2.0 * jnp.eye(3)))
    numpyro.sample("y", dist.Normal(m + p, 1.0).to_event(1), obs=y)


NUMPYRO_MODELS = [
    _plates,
    _nested_plates,
    _factors,
    _factor_in_a_plate,
    _masked_factor,
    _masked_observations,
    _masked_observations_outside_of_the_support,
    _scaled_observations,
    _scaled_latent,
    _conditioned_by_a_handler,
    _scoped,
    _reparametrised,
    _sample_shape,
    _event_shapes,
]


@pytest.mark.parametrize("function", NUMPYRO_MODELS, ids=lambda f: f.__name__.strip("_"))
def test_numpyro_statements_have_the_density_that_numpyro_gives_them(function):
    y = jnp.array([0.5, -1.0, 2.0])
    program = ppl.model(function)(y)
    trace = ppl.simulate(program)
    sites = {name: v for name, v in trace.sites.items() if program.stage().sites[name].kind == "sample"}
    # NumPyro warns of values outside of the support, which the masked ones are meant to be.
    with numpyro.validation_enabled(False):
        expected, _ = numpyro_log_density(function, (y,), {}, sites)
    assert_close(trace.log_density, expected)
    assert_close(ppl.log_density(program, sites), expected)


def test_jitted_helper_under_numpyro_scopes_shows_its_site_once_for_each():
    @jax.jit
    def helper(x):
        return numpyro.sample("h", dist.Normal(x, 1.0))

    @ppl.model
    def program():
        with handlers.scope(prefix="one"):
            a = helper(0.0)
        with handlers.scope(prefix="two"):
            return a + helper(a)

    assert set(ppl.simulate(program()).sites) == {"one/h", "two/h"}


def test_scaled_latent_is_weighed_by_the_density_that_its_draws_do_not_have():
    @ppl.model
    def program():
        with handlers.scale(scale=2.0):
            numpyro.sample("x", dist.Normal(0.0, 1.0))

    # The integral of N(x; 0, 1)^2.
    log_evidence = repeat(program(), ImportanceSampling(500), lambda p: p.log_evidence, 200)
    assert_mean_within_5_standard_errors(np.exp(log_evidence), 1 / (2 * np.sqrt(np.pi)))


def test_ppl_statements_stand_in_numpyro_plates():
    @ppl.model
    def program():
        with numpyro.plate("n", 3):
            x = ppl.sample("x", dist.Normal(0.0, 1.0))
            ppl.observe("y", dist.Normal(x, 1.0), jnp.ones(3))
        return x

    trace = ppl.simulate(program())
    x = trace.sites["x"]
    assert x.shape == (3,)
    assert len(set(np.asarray(x).tolist())) == 3
    assert_close(trace.log_density, jnp.sum(dist.Normal().log_prob(x) + dist.Normal(x, 1.0).log_prob(1.0)))


# Distributions -------------------------------------------

DISTRIBUTIONS = {
    "normal": dist.Normal(1.0, 2.0),
    "normal batch": dist.Normal(jnp.arange(3.0), 1.0),
    "gamma": dist.Gamma(2.0, 3.0),
    "beta": dist.Beta(2.0, 3.0),
    "dirichlet": dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])),
    "poisson": dist.Poisson(3.0),
    "bernoulli": dist.Bernoulli(0.3),
    "categorical": dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])),
    "binomial": dist.Binomial(5, 0.3),
    "multinomial": dist.Multinomial(10, jnp.array([0.2, 0.3, 0.5])),
    "multivariate normal": dist.MultivariateNormal(jnp.ones(2), jnp.array([[2.0, 0.5], [0.5, 1.0]])),
    "to event": dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(1),
    "truncated": dist.TruncatedNormal(0.0, 1.0, low=0.5, high=2.0),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.4, 0.6])), dist.Normal(jnp.array([-2.0, 2.0]), 1.0)
    ),
    "uniform": dist.Uniform(-1.0, 3.0),
    "von mises": dist.VonMises(0.0, 1.0),
    "wishart": dist.WishartCholesky(5.0, jnp.eye(3)),
    "transformed": dist.TransformedDistribution(
        dist.Normal(jnp.zeros(3), 1.0).to_event(1), dist.transforms.StickBreakingTransform()
    ),
    "zero inflated": dist.ZeroInflatedPoisson(0.3, 2.0),
    "delta": dist.Delta(2.0),
    "one array of size zero": dist.Normal(jnp.zeros((0, 3)), 1.0),
}


@pytest.mark.parametrize("law", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_every_draw_of_a_distribution_is_weighed_as_the_distribution_weighs_it(law):
    @ppl.model
    def program():
        return ppl.sample("x", law)

    posterior = ppl.infer(program(), ImportanceSampling(200))
    draws = posterior.sites["x"]
    assert draws.shape == (200, *law.batch_shape, *law.event_shape)
    ours, numpyros = jax.jit(jax.vmap(lambda x: (ppl.log_density(program(), {"x": x}), law.log_prob(x).sum())))(draws)
    assert_close(ours, numpyros)
    assert float(posterior.log_evidence) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    "name", ["gamma", "poisson", "dirichlet", "normal batch", "multivariate normal", "binomial", "truncated", "mixture"]
)
def test_population_draws_have_the_moments_of_the_distribution(name):
    law = DISTRIBUTIONS[name]

    @ppl.model
    def program():
        return ppl.sample("x", law)

    draws = np.asarray(ppl.infer(program(), ImportanceSampling(20_000)).sites["x"], np.float64)
    assert_mean_within_5_standard_errors(draws, np.asarray(law.mean), name)
    variance = np.diag(law.covariance_matrix) if name == "multivariate normal" else np.asarray(law.variance)
    assert_mean_within_5_standard_errors((draws - np.asarray(law.mean)) ** 2, variance, name)
    neighbours = (draws[1:] - np.asarray(law.mean)) * (draws[:-1] - np.asarray(law.mean))
    assert_mean_within_5_standard_errors(neighbours[::2], 0.0, f"{name}: particles are independent")


@pytest.mark.parametrize("family", ["gamma", "poisson", "beta", "normal", "categorical"])
def test_population_draws_follow_parameters_that_differ_between_particles(family):
    make = {
        "gamma": lambda b: dist.Gamma(1.0 + 3 * b, 2.0),
        "poisson": lambda b: dist.Poisson(1.0 + 30.0 * b),
        "beta": lambda b: dist.Beta(1.0 + b, 2.0),
        "normal": lambda b: dist.Normal(5.0 * b, 1.0 + b),
        "categorical": lambda b: dist.Categorical(
            probs=jnp.where(b == 1, jnp.array([0.1, 0.9]), jnp.array([0.6, 0.4]))
        ),
    }[family]

    @ppl.model
    def program():
        b = ppl.sample("b", dist.Bernoulli(0.5))
        return ppl.sample("x", make(b))

    sites = ppl.infer(program(), ImportanceSampling(20_000)).sites
    for b in (0, 1):
        law = make(jnp.int32(b))
        mean = law.probs[1] if family == "categorical" else law.mean
        assert_mean_within_5_standard_errors(
            np.asarray(sites["x"])[np.asarray(sites["b"]) == b], float(mean), f"{family} {b}"
        )


class Tent(dist.Distribution):
    """The sum of two uniforms. Its parameter is no pytree field, which NumPyro does not ask for."""

    arg_constraints = {}
    support = dist.constraints.interval(0.0, 2.0)

    def __init__(self, shift):
        self.shift = shift
        super().__init__(batch_shape=jnp.shape(shift), event_shape=())

    def sample(self, key, sample_shape=()):
        a, b = jax.random.split(key)
        shape = sample_shape + self.batch_shape
        return jax.random.uniform(a, shape) + jax.random.uniform(b, shape) + 0 * self.shift

    def log_prob(self, value):
        return jnp.log1p(-jnp.abs(value - 1.0)) + 0 * self.shift


def test_user_defined_distribution_without_pytree_fields_works_everywhere():
    @ppl.model
    def program():
        a = ppl.sample("a", dist.Normal(0.0, 1.0))
        return ppl.sample("x", Tent(a))

    assert_trace_agrees_with_log_density(program())
    draws = np.asarray(ppl.infer(program(), ImportanceSampling(20_000)).sites["x"], np.float64)
    assert_mean_within_5_standard_errors(draws, 1.0)
    assert_mean_within_5_standard_errors((draws - 1) ** 2, 1 / 6)
    assert float(ppl.log_density(program(), {"a": 0.0, "x": 2.5})) == -np.inf


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize(
    "law, value",
    [
        (dist.Exponential(1.0), -1.0),
        (dist.Gamma(2.0, 1.0), -0.5),
        (dist.Uniform(0.0, 1.0), 1.5),
        (dist.Beta(2.0, 2.0), 1.5),
        (dist.Dirichlet(jnp.ones(2)), [0.7, 0.7]),
        (dist.Bernoulli(0.5), 2),
        (dist.Categorical(probs=jnp.ones(3) / 3), 3),
        (dist.Poisson(2.0), -1),
        (dist.HalfNormal(1.0).expand([2]).to_event(1), [1.0, -1.0]),
        (dist.TruncatedNormal(0.0, 1.0, low=0.0), -0.5),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, dist.Distribution) else str(v),
)
def test_density_is_zero_outside_of_the_support_whatever_the_validation_flag(law, value, validation):
    @ppl.model
    def sampled():
        ppl.sample("x", law)

    @ppl.model
    def observed(y):
        ppl.observe("x", law, y)

    with numpyro.validation_enabled(validation):
        assert float(ppl.log_density(sampled(), {"x": jnp.asarray(value)})) == -np.inf
        assert float(ppl.log_density(observed(jnp.asarray(value)), {})) == -np.inf


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize(
    "law",
    [
        dist.Normal(0.0, 1.0),
        dist.Uniform(0.0, 1.0),
        dist.Exponential(1.0),
        dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)),
    ],
    ids=lambda law: type(law).__name__,
)
def test_nan_data_is_an_error_and_no_impossible_event_whatever_the_validation_flag(law, validation):
    @ppl.model
    def program(y):
        ppl.observe("y", law, y)

    with numpyro.validation_enabled(validation), pytest.raises(ppl.InvalidWeight, match="'y'"):
        ppl.infer(program(jnp.full(law.event_shape, jnp.nan)), ImportanceSampling(2))


# Proposals -------------------------------------------


def test_proposal_leaves_log_evidence_and_moments_as_they_are():
    @ppl.model
    def program():
        x = ppl.sample("x", dist.Normal(0.0, 1.0), proposal=dist.Normal(0.5, 1.5))
        ppl.observe("y", dist.Normal(x, 1.0), 1.0)
        return x

    def estimates(posterior):
        z = jnp.exp(posterior.log_evidence)
        return jnp.stack([z, z * posterior.expectation(lambda x: x), z * posterior.expectation(lambda x: x**2)])

    z = np.exp(-0.25) / np.sqrt(4 * np.pi)
    exact = np.array([z, z * 0.5, z * (0.5 + 0.25)])
    assert_mean_within_5_standard_errors(repeat(program(), ImportanceSampling(200), estimates, 300), exact)


def test_proposal_plays_no_part_in_simulate_and_log_density():
    def make(proposal):
        return ppl.model(lambda: ppl.sample("x", dist.Normal(0.0, 1.0), proposal=proposal))()

    plain, proposed = ppl.simulate(make(None), seed=3), ppl.simulate(make(dist.Normal(50.0, 1.0)), seed=3)
    assert float(plain.value) == float(proposed.value)
    assert float(plain.log_density) == float(proposed.log_density)
    assert float(ppl.log_density(make(dist.Normal(50.0, 1.0)), {"x": 1.0})) == pytest.approx(-1.4189385, abs=1e-5)


def test_proposal_that_leaves_the_support_kills_and_stays_unbiased():
    program = ppl.model(lambda: ppl.sample("x", dist.Exponential(1.0), proposal=dist.Normal(1.0, 2.0)))()
    log_evidence = repeat(program, ImportanceSampling(500), lambda p: p.log_evidence, 300)
    assert_mean_within_5_standard_errors(np.exp(log_evidence), 1.0)


def test_proposal_with_other_batch_shape_is_expanded_and_weighed_entry_by_entry():
    program = ppl.model(lambda: ppl.sample("x", dist.Normal(jnp.zeros(2), 1.0), proposal=dist.Normal(0.0, 1.3)))()
    log_evidence = repeat(program, ImportanceSampling(500), lambda p: p.log_evidence, 300)
    assert_mean_within_5_standard_errors(np.exp(log_evidence), 1.0)


def test_proposal_of_a_discrete_site_that_depends_on_another_draw():
    @ppl.model
    def program():
        a = ppl.sample("a", dist.Bernoulli(0.5))
        q = jnp.where(a == 1, jnp.array([0.8, 0.2]), jnp.array([0.3, 0.7]))
        b = ppl.sample("b", dist.Categorical(probs=jnp.array([0.25, 0.75])), proposal=dist.Categorical(probs=q))
        return 1.0 * (a == b)

    estimates = repeat(
        program(), ImportanceSampling(300), lambda p: jnp.exp(p.log_evidence) * p.expectation(lambda v: v), 300
    )
    assert_mean_within_5_standard_errors(estimates, 0.5)
