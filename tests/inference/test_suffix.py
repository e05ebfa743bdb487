"""Suffixes drawn anew: exact transition matrices, lengths that change, prefixes, and where runs begin."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.errors import SiteTypeError
from ppl.inference import MCMC, SMC, SuffixMH
from ppl.models import MarkovChain
from ppl.testing import assert_invariant, assert_properly_weighted, transition_matrix

LOGITS = np.log([0.6, 0.4]).astype(np.float32)
ROWS = np.log([[0.7, 0.3], [0.2, 0.8]]).astype(np.float32)
OTHER = np.log([[0.1, 0.9], [0.5, 0.5]]).astype(np.float32)


@ppl.model
def stops(proposed=True):
    """A text whose length is its own business: symbol 0 ends it."""
    start = ppl.sample("start", dist.Bernoulli(0.7))

    def step(last, t):
        x = ppl.sample("x", dist.Bernoulli(0.3 + 0.3 * last), proposal=dist.Bernoulli(0.6) if proposed else None)
        ppl.factor("reward", jnp.where(x == 1, 0.8, -0.3) * (t + 1))
        return x, None

    last, _ = ppl.scan(step, 1 + start, jnp.arange(3), until=lambda last: last == 0)
    after = ppl.sample("after", dist.Bernoulli(0.2 + 0.3 * last), proposal=dist.Bernoulli(0.5))
    ppl.factor("end", 0.7 * after)
    return last


@ppl.model
def two_loops():
    """Two loops, the first of which may stop, with sites between and inside them."""

    def first(c, _):
        x = ppl.sample("x", dist.Bernoulli(0.4))
        return c + x, None

    count, _ = ppl.scan(first, jnp.int32(0), length=2, until=lambda c: c > 0)
    middle = ppl.sample("middle", dist.Bernoulli(0.3 + 0.2 * count))
    _, _ = ppl.scan(lambda c, _: (c + 1, None), 0, length=3)  # no sites: nothing to choose here

    def second(c, _):
        y = ppl.sample("y", dist.Bernoulli(0.2 + 0.5 * c), proposal=dist.Bernoulli(0.5))
        ppl.factor("score", 0.6 * y * (1 + count))
        return y, None

    ppl.scan(second, middle, length=1)


@ppl.model
def nested():
    """An inner loop that another site keeps from beginning."""

    def outer(c, _):
        def inner(d, _):
            y = ppl.sample("y", dist.Bernoulli(0.3))
            return d + y + 1, None

        d, _ = ppl.scan(inner, c, length=2, until=lambda d: d >= 2)
        ppl.factor("score", 0.4 * d)
        return d - 1, None

    ppl.scan(outer, jnp.int32(0), length=2)


@ppl.model
def short():
    """Two iterations at most."""

    def step(last, t):
        x = ppl.sample("x", dist.Bernoulli(0.3), proposal=dist.Bernoulli(0.6))
        ppl.factor("reward", 0.5 * x * (t + 1))
        return x, None

    last, _ = ppl.scan(step, 1, jnp.arange(2), until=lambda last: last == 0)
    after = ppl.sample("after", dist.Bernoulli(0.2 + 0.3 * last))
    ppl.factor("end", 0.7 * after)


CHAIN = MarkovChain(LOGITS, ROWS, 3)
REWARDED = (CHAIN * MarkovChain(LOGITS[::-1], OTHER, 3)).tilt(
    lambda v: 0.5 * jnp.sum(v["tokens"]), twist=lambda s: 0.3 * s["tokens"][0]
)
TARGETS = {"product": REWARDED, "by steps": (CHAIN**2.0).by_steps(1, max_steps=2, step_tokens=2)}


def test_lengths_that_change_leave_the_posterior_as_it_is():
    assert_invariant(stops(), SuffixMH())


def test_every_suffix_is_reached_by_blocks():
    program = ppl.condition(stops(False), {"start": jnp.int32(1)})
    assert_invariant(program, SuffixMH(block=2), irreducible=True)


def test_two_loops_are_one_suffix():
    assert_invariant(two_loops(), SuffixMH(), irreducible=True)


def test_inner_loops_that_do_not_begin():
    assert_invariant(nested(), SuffixMH(), irreducible=True)


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name):
    assert_invariant(TARGETS[name], SuffixMH(), irreducible=True)


def test_power_moves_are_accepted_by_the_ratio_of_local_masses():
    """Between paths that part at t: the locally optimal weights of what follows."""
    traces, pi, matrix = transition_matrix(CHAIN**2.0, SuffixMH())
    np.testing.assert_allclose(pi @ matrix, pi, atol=1e-6)
    paths = traces.value["tokens"]
    start, rows = np.exp(2 * LOGITS), np.exp(2 * ROWS)
    mass = np.array([rows[i].sum() for i in range(2)])

    def kernel(x, y):
        total = 0.0
        for t in range(3):
            if (x[:t] != y[:t]).any():
                continue
            drawn = np.prod(
                [(start / start.sum())[y[s]] if s == 0 else (rows / mass[:, None])[y[s - 1], y[s]] for s in range(t, 3)]
            )
            ratio = np.prod([mass[y[s - 1]] / mass[x[s - 1]] for s in range(max(t, 1), 3)])
            total += drawn * min(1.0, ratio) / 3
        return total

    expected = np.array([[kernel(x, y) for y in paths] for x in paths])
    off = ~np.eye(len(paths), dtype=bool)
    np.testing.assert_allclose(matrix[off], expected[off], atol=1e-6)


def test_prefixes_keep_weights_proper():
    """The blockwise scheme: after every block the text so far moves, and later entries stay as they are."""
    blockwise = SMC(num_particles=1, rejuvenation=SuffixMH(), rejuvenate_every=1)
    assert_properly_weighted(short(), blockwise)


def test_prefixes_that_end_in_a_second_loop_keep_weights_proper():
    program = ppl.condition(two_loops(), {"middle": jnp.int32(1)})
    assert_properly_weighted(program, SMC(num_particles=1, rejuvenation=SuffixMH(), rejuvenate_every=5))


def test_chains_follow_a_law_of_many_lengths():
    """Beyond enumeration: 20 iterations at most, the probability of each length in closed form."""

    @ppl.model
    def program():
        def step(done, _):
            end = ppl.sample("end", dist.Bernoulli(0.1), proposal=dist.Bernoulli(0.25))
            return end == 1, None

        ppl.scan(step, jnp.array(False), length=20, until=lambda done: done)

    posterior = ppl.infer(program(), MCMC(SuffixMH(), num_samples=400, num_warmup=50, num_chains=64), seed=1)
    lengths = np.asarray(posterior.present["end"]).sum(1).reshape(64, 400)
    for n in (1, 2, 5, 20):
        exact = 0.9 ** (n - 1) * (1.0 if n == 20 else 0.1)
        rates = (lengths == n).mean(axis=1)
        error = rates.std(ddof=1) / 8
        assert abs(rates.mean() - exact) < 5 * error < 0.1


def test_programs_without_a_loop_are_refused():
    @ppl.model
    def flat():
        x = ppl.sample("x", dist.Bernoulli(0.5))
        ppl.scan(lambda c, _: (c + x, None), 0, length=3)

    with pytest.raises(SiteTypeError, match=r"SuffixMH needs a ppl.scan .* \['x'\].*Regenerate"):
        ppl.infer(flat(), MCMC(SuffixMH(), num_samples=2))


@pytest.mark.parametrize(("block", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_blocks_are_whole_numbers_from_one(block, error):
    with pytest.raises(error, match="`block` must be"):
        SuffixMH(block)
