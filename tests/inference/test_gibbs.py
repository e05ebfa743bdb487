"""Gibbs sampling of finite sites: exact transition matrices, and what it refuses."""

import itertools

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.errors import SiteTypeError, SiteValueError
from ppl.inference import MCMC, Gibbs
from ppl.testing import assert_invariant
from ppl.testing.invariance import transition_matrix
from ppl.trace_space import TraceSpace


def bernoulli(p):
    return dist.Bernoulli(probs=p)


@ppl.model
def chain():
    """A site outside of a loop, three-valued sites in it, an observation that ties them."""
    a = ppl.sample("a", bernoulli(0.3))

    def step(x, y):
        x = ppl.sample("x", dist.Categorical(probs=jnp.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])[x]))
        ppl.observe("y", bernoulli(jnp.array([[0.2, 0.5, 0.9], [0.7, 0.4, 0.1]])[a, x]), y)
        return x, x

    return ppl.scan(step, 1, jnp.array([1, 0]))[1]


@ppl.model
def plate():
    """Entries without a loop, one value of which is impossible together with another."""
    z = ppl.sample("z", dist.Categorical(probs=jnp.array([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])).to_event(1))
    ppl.factor("tie", jnp.where((z[0] == 1) & (z[1] == 1), -jnp.inf, 0.7 * z[0] + 0.4 * z[1] * z[2]))
    return z


@ppl.model
def stopped():
    """How many iterations there are is decided by a site that is not moved."""
    length = ppl.sample("length", dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])))

    def step(carry, _):
        count, x = carry
        x = ppl.sample("x", bernoulli(jnp.array([0.3, 0.8])[x]))
        ppl.factor("f", 0.9 * x)
        return (count + 1, x), x

    return ppl.scan(step, (0, 0), length=2, until=lambda carry: carry[0] >= length)[1]


@pytest.mark.parametrize(
    ("model", "sites", "irreducible"),
    [(chain, None, True), (chain, "x", False), (chain, ["a"], False), (plate, None, True), (stopped, "x", False)],
)
def test_gibbs_leaves_the_posterior_as_it_is(model, sites, irreducible):
    assert_invariant(model(), Gibbs(sites), irreducible=irreducible)


def test_one_site_is_drawn_from_its_full_conditional():
    traces, pi, matrix = transition_matrix(chain(), Gibbs("a"))
    same = np.all(traces.sites["x"][:, None] == traces.sites["x"][None], axis=-1)
    conditional = np.where(same, pi[None, :], 0.0)
    np.testing.assert_allclose(matrix, conditional / conditional.sum(1, keepdims=True), atol=1e-6)


def test_a_run_counts_traces_as_their_probabilities_say():
    posterior = ppl.infer(plate(), MCMC(Gibbs(), num_samples=2000, num_chains=8), keep=["z"])
    weights = {}
    for z in itertools.product([0, 1], repeat=3):
        weights[z] = float(np.exp(ppl.log_density(plate(), {"z": np.array(z)})))
    total = sum(weights.values())
    draws = np.asarray(posterior.sites["z"]).reshape(8, 2000, 3)
    for z, weight in weights.items():
        share = np.all(draws == np.array(z), axis=-1).mean(axis=1)  # chains are independent
        if weight == 0:
            assert share.max() == 0
            continue
        error = share.std(ddof=1) / np.sqrt(len(share))
        assert abs(share.mean() - weight / total) < 7 * error, (z, share, weight / total)  # 5 sigma of t with 7 degrees


def test_other_families_with_known_values():
    @ppl.model
    def model():
        n = ppl.sample("n", dist.Binomial(3, probs=0.4))
        u = ppl.sample("u", dist.DiscreteUniform(-1, 1))
        ppl.factor("f", 0.3 * n * u)
        return n

    sites = Gibbs().bind(TraceSpace(model().stage()))
    assert [list(v) for v in sites.values.values()] == [[0, 1, 2, 3], [-1, 0, 1]]
    assert_invariant(model(), Gibbs(), irreducible=True)


# What is refused ---------------------------------------------------------------------------------------------------


def bind(model, kernel):
    return kernel.bind(TraceSpace(model.stage()))


def test_sites_without_finitely_many_known_values_are_refused_by_name():
    @ppl.model
    def model():
        x = ppl.sample("x", dist.Normal(0.0, 1.0))
        n = ppl.sample("n", dist.Poisson(3.0))
        k = ppl.sample("k", dist.Binomial(n, probs=0.4))
        return x + k

    with pytest.raises(SiteTypeError, match="Gibbs cannot move the site 'x' .*continuous. NUTS"):
        bind(model(), Gibbs("x"))
    with pytest.raises(SiteTypeError, match="Gibbs cannot move the site 'n' .*finitely many"):
        bind(model(), Gibbs(["n"]))
    with pytest.raises(SiteTypeError, match="Gibbs cannot move the site 'k' .*known before it runs"):
        bind(model(), Gibbs("k"))
    with pytest.raises(SiteValueError, match="`sites` names 'nobody'"):
        bind(model(), Gibbs("nobody"))


def test_a_program_without_discrete_sites_is_refused():
    @ppl.model
    def model():
        return ppl.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(SiteTypeError, match=r"has none: .*\['x'\]"):
        bind(model(), Gibbs())


def test_sites_that_decide_when_a_loop_stops_are_refused():
    with pytest.raises(SiteTypeError, match=r"'length' .*test_gibbs.py:\d+ stops depends on it.*SuffixMH"):
        bind(stopped(), Gibbs())

    @ppl.model
    def word():
        def step(x, _):
            x = ppl.sample("x", bernoulli(0.4))
            return x, x

        return ppl.scan(step, 0, length=3, until=lambda x: x == 1)[1]

    with pytest.raises(SiteTypeError, match="'x' .*stops depends on it"):
        bind(word(), Gibbs("x"))
