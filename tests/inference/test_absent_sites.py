"""Kernels of a fixed number of sites, where a loop may stop or a prefix ends: what counts, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.diagnostics import bulk_ess
from ppl.errors import SiteTypeError, SiteValueError
from ppl.inference import HMC, MALA, MCMC, NUTS, SMC, Langevin, Regenerate, Sequence
from ppl.inference.hamiltonian_moves import _cut
from ppl.inference.presence import require_fixed_presence
from ppl.trace_space import TraceSpace
from tests.ppl.checks import assert_mean_within_5_standard_errors, repeat


@ppl.model
def stopped(ys):
    """The number of iterations is random, but not decided by the sites that move."""
    length = ppl.sample("length", dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])))

    def step(count, y):
        x = ppl.sample("x", dist.Normal(0.5, 1.0))
        ppl.observe("y", dist.Normal(x, 1.0), y)
        return count + 1, x

    return ppl.scan(step, 0, ys, until=lambda count: count >= length)[1]


def test_absent_entries_do_not_count():
    ys = np.array([0.3, 2.0])
    kernel = Sequence(HMC(num_leapfrog=3, sites="x"), Regenerate())
    posterior = ppl.infer(stopped(jnp.asarray(ys)), MCMC(kernel, 3000, num_warmup=200, num_chains=4), seed=2)
    length, x = np.asarray(posterior.sites["length"]), np.asarray(posterior.sites["x"])
    present = np.asarray(posterior.present["x"])
    np.testing.assert_array_equal(present, np.arange(2) < length[:, None])
    assert np.all(x[~present] == 0)
    each = np.exp(-((ys - 0.5) ** 2) / 4) / np.sqrt(4 * np.pi)
    weights = np.array([0.2, 0.5, 0.3]) * np.cumprod(np.append(1.0, each))
    weights /= weights.sum()
    means = (ys + 0.5) / 2
    truth = [weights[1], weights[2], (weights[1] + weights[2]) * means[0], weights[2] * means[1]]
    columns = np.column_stack([length == 1, length == 2, x[:, 0], x[:, 1]]).astype(float).reshape(4, -1, 4)
    z = (columns.mean((0, 1)) - truth) / (columns.std((0, 1)) / np.sqrt(bulk_ess(columns)))
    assert np.all(np.abs(z) < 5), z


@pytest.mark.parametrize("dense", [False, True])
def test_momenta_are_those_of_the_present_entries_alone(dense):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(4, 4))
    inverse_mass = factor @ factor.T + np.eye(4) if dense else rng.random(4) + 0.5
    mask = np.array([True, False, True, True])
    root = np.asarray(_cut(jnp.asarray(inverse_mass, jnp.float32), jnp.asarray(mask)))
    covariance = root @ root.T if dense else np.diag(root**2)
    expected = np.zeros((4, 4))
    block = inverse_mass[np.ix_(mask, mask)] if dense else np.diag(inverse_mass[mask])
    expected[np.ix_(mask, mask)] = np.linalg.inv(block)
    np.testing.assert_allclose(covariance, expected, atol=1e-5)


@ppl.model
def narrow(length):
    """Supports at whose zeros maps to R^d are infinite, one of them a site of the same iteration."""

    def step(carry, _):
        count, last = carry
        width = ppl.sample("width", dist.HalfNormal(1.0 + last))
        inside = ppl.sample("inside", dist.Uniform(0.0, width).expand([2]).to_event(1))
        return (count + 1, width), inside

    carry, _ = ppl.scan(step, (0, 1.0), length=3, until=lambda carry: carry[0] >= length)
    return ppl.sample("after", dist.Normal(carry[1], 1.0))


@pytest.mark.parametrize("kernel", [NUTS(step_size=0.3, dense_mass=True), MALA(0.05)], ids=["NUTS", "MALA"])
def test_absent_entries_of_bounded_sites_stay_and_gradients_are_finite(kernel):
    space = TraceSpace(narrow(jnp.int32(2)).stage(), differentiable=True)
    moves = kernel.bind(space)

    @jax.jit
    def run(key):
        sites, _ = space.simulate(key)
        memory = moves.init(key, sites, 0)
        after, memory, info = moves.step(jax.random.fold_in(key, 1), sites, memory)
        return sites, after, memory, info, moves.refresh(key, after, memory)

    before, after, memory, info, refreshed = jax.vmap(run)(jax.random.split(jax.random.key(0), 50))
    for leaf in jax.tree.leaves((memory, refreshed)):
        assert np.all(np.isfinite(leaf))
    # A step remembers z itself, refreshing computes it from a site: at 0.999 of an interval's width, the farthest of
    # these draws, one rounding of the site is 6e-5 of z.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), memory, refreshed)
    assert float(np.mean(info["acceptance"])) > 0.5
    for name in ("width", "inside"):
        assert np.all(np.asarray(after[name])[:, 2] == 0)
        assert np.mean(np.asarray(after[name])[:, :2] != np.asarray(before[name])[:, :2]) > 0.5


def test_what_follows_a_prefix_stays():
    space = TraceSpace(narrow(jnp.int32(9)).stage(), differentiable=True).prefix(jnp.int32(1))
    moves = MALA(0.02).bind(space)
    sites = {
        "width": jnp.array([2.0, 0.0, 0.0]),
        "inside": jnp.array([[1.0, 0.5], [0.0, 0.0], [0.0, 0.0]]),
        "after": jnp.float32(0.0),
    }
    run = jax.jit(lambda key: moves.step(key, sites, moves.init(key, sites, 0)))
    after, memory, _ = run(jax.random.key(1))
    assert float(after["after"]) == 0.0
    assert np.all(np.asarray(after["width"])[1:] == 0) and np.all(np.asarray(after["inside"])[1:] == 0)
    assert float(after["width"][0]) != 2.0
    score = np.asarray(memory.point.score)
    assert np.count_nonzero(score) == 3 and np.all(np.isfinite(score))


@ppl.model
def walk(observations):
    drift = ppl.sample("drift", dist.Normal(0.0, 1.0))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + drift, 1.0))
        ppl.observe("y", dist.Normal(x, 0.7), y)
        return x, x

    return ppl.scan(step, 0.0, observations)[1], drift


def test_moves_inside_smc_leave_it_unbiased():
    ys = np.array([0.9, 2.4, 3.0])
    times = np.arange(1, 4)
    covariance = np.minimum.outer(times, times) + np.outer(times, times)
    observed = covariance + 0.49 * np.eye(3)
    log_z = -0.5 * (ys @ np.linalg.solve(observed, ys) + np.linalg.slogdet(2 * np.pi * observed)[1])
    drift = times @ np.linalg.solve(observed, ys)

    def statistics(posterior):
        ratio = jnp.exp(posterior.log_evidence - log_z)
        return jnp.stack([ratio, ratio * (jnp.exp(posterior.log_weights) @ posterior.value[1])])

    runs = repeat(walk(jnp.asarray(ys)), SMC(16, rejuvenation=HMC(0.4, 3)), statistics, 400)
    assert_mean_within_5_standard_errors(runs, np.array([1.0, drift]))


# What decides when a loop stops ------------------------------------------------------------------------------------


@ppl.model
def many_loops():
    """Only `a`, `b`, `c` and `word` reach an `until`: as a constant, the start, a constant within, and the carry."""
    a = ppl.sample("a", dist.Normal(0.0, 1.0))
    b = ppl.sample("b", dist.Normal(0.0, 1.0))
    c = ppl.sample("c", dist.Normal(0.0, 1.0))
    free = ppl.sample("free", dist.Normal(a, 1.0))

    def step(carry, _):
        total, other = carry
        y = ppl.sample("y", dist.Normal(free + other, 1.0))
        _, ys = ppl.scan(
            lambda k, _: (k + 1.0, ppl.sample("z", dist.Normal(y, 1.0))), 0.0, length=2, until=lambda k: k > c
        )
        return (total + 1.0, other + y + ys.sum()), y

    (_, other), _ = ppl.scan(step, (b, 0.0), length=3, until=lambda carry: carry[0] > a)

    def write(x, _):
        x = ppl.sample("word", dist.Normal(0.5 * other, 1.0))
        return x, x

    return ppl.scan(write, -1.0, length=3, until=lambda x: x > 0.0)[1]


def test_dataflow_finds_what_decides_when_a_loop_stops():
    space = TraceSpace(many_loops().stage())

    def decides(name):
        try:
            require_fixed_presence("NUTS", space, name)
        except SiteTypeError:
            return True
        return False

    assert {name for name in space.sites if decides(name)} == {"a", "b", "c", "word"}


@pytest.mark.parametrize(("kernel", "name"), [(NUTS, "a"), (HMC, "c"), (MALA, "word"), (Langevin, "b")])
def test_sites_that_decide_when_a_loop_stops_are_refused(kernel, name):
    space = TraceSpace(many_loops().stage(), differentiable=True)
    with pytest.raises(
        SiteTypeError, match=rf"{kernel.__name__} cannot move the site '{name}' .*stops depends on it.*SuffixMH"
    ):
        kernel(sites=[name]).bind(space)
    assert kernel(sites=["free", "y", "z"]).bind(space).sites == ("free", "y", "z")


# What else is refused ----------------------------------------------------------------------------------------------


@ppl.model
def mixed():
    tokens = ppl.sample("tokens", dist.Categorical(probs=jnp.array([0.5, 0.5])))
    direction = ppl.sample("direction", dist.ProjectedNormal(jnp.array([1.0, 0.0, 0.5])))
    return ppl.sample("x", dist.Normal(tokens + direction[0], 1.0))


def test_sites_that_gradients_cannot_move_are_refused_by_name():
    space = TraceSpace(mixed().stage(), differentiable=True)
    with pytest.raises(SiteTypeError, match=r"NUTS cannot move the site 'tokens' .*discrete.*Gibbs.*SuffixMH"):
        NUTS("tokens").bind(space)
    with pytest.raises(SiteTypeError, match=r"HMC cannot move the site 'direction' .*no map from R\^d"):
        HMC(sites="direction").bind(space)
    with pytest.raises(SiteValueError, match="`sites` names 'nobody'"):
        MALA(sites=["x", "nobody"]).bind(space)

    @ppl.model
    def discrete():
        return ppl.sample("tokens", dist.Bernoulli(0.5))

    with pytest.raises(SiteTypeError, match=r"Langevin moves continuous sites, of which the program has none"):
        Langevin().bind(TraceSpace(discrete().stage(), differentiable=True))


@pytest.mark.parametrize("kernel", [NUTS(), HMC(), MALA(), Langevin()], ids=lambda kernel: type(kernel).__name__)
def test_without_a_step_size_warm_up_is_asked_for(kernel):
    @ppl.model
    def gaussian():
        return ppl.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="nothing to adapt its step size with: give `step_size`, or `num_warmup`"):
        ppl.infer(gaussian(), MCMC(kernel, 10))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="`target_accept` must lie between 0 and 1, got 1"):
        NUTS(target_accept=1)
    with pytest.raises(ValueError, match="`max_tree_depth` must be at least 1, got 0"):
        NUTS(max_tree_depth=0)
    with pytest.raises(TypeError, match="`dense_mass` must be True or False"):
        NUTS(dense_mass=["x"])
    with pytest.raises(ValueError, match="`step_size` must be positive"):
        HMC(step_size=-1.0)
    assert len({NUTS(sites=["x"]), NUTS(sites=("x",))}) == 1


def test_a_chain_continues_as_if_it_had_never_stopped():
    """The second run is told of another warm-up, which plays no part: the chain has had its own."""

    @ppl.model
    def gaussian():
        return ppl.sample("x", dist.Normal(0.0, 1.0))

    kernel = HMC(num_leapfrog=2)
    whole = ppl.infer(gaussian(), MCMC(kernel, 25, 30, 2), seed=3)
    first = ppl.infer(gaussian(), MCMC(kernel, 10, 30, 2), seed=3)
    rest = ppl.infer(gaussian(), MCMC(kernel, 15, 50, 2), seed=9, state=first.state)
    joined = np.concatenate([np.reshape(p.value, (2, -1)) for p in (first, rest)], axis=1)
    np.testing.assert_array_equal(joined, np.reshape(whole.value, (2, -1)))
