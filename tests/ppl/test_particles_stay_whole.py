"""Law L3: whatever depends on randomness follows its ancestor.

Each program carries a copy of everything it draws along a path of its own. A particle is whole if all copies agree at
the end, bit by bit where they were copied and up to rounding where they were summed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC
from tests.ppl.checks import assert_close, assert_equal

ALGORITHMS = {
    "every step": SMC(
        32, resampler=lambda key, w, num: jax.random.categorical(key, w, shape=(num,)), ess_threshold=1.0
    ),
    "adaptive": SMC(32, ess_threshold=0.7),
}


@pytest.fixture(params=["every step"])
def run(request):
    def infer(function, *args):
        posterior = ppl.infer(ppl.model(function)(*args), ALGORITHMS[request.param], seed=7)
        assert np.asarray(posterior.diagnostics["resampled"]).sum() > 1, "the test needs resampling"
        moved = np.asarray(posterior.diagnostics["ancestors"]) != np.arange(32)
        assert moved.any(), "the test needs particles that move"
        return jax.tree.map(np.asarray, posterior)

    return infer


def weigh(x):
    ppl.factor("w", 2.0 * x)


def test_carry_agrees_with_the_history_of_sites_and_ys(run):
    def program():
        def step(c, _):
            z = ppl.sample("z", dist.Normal(0.0, 1.0))
            c = c + z
            weigh(z)
            return c, (c, z)

        return ppl.scan(step, 0.0, length=8)

    posterior = run(program)
    last, (sums, zs) = posterior.value
    assert_equal(posterior.sites["z"], zs)
    assert_close(np.cumsum(zs, 1), sums)
    assert_equal(sums[:, -1], last)


def test_latent_drawn_before_the_loop_is_one_value_before_in_and_after_it(run):
    def program():
        a = ppl.sample("a", dist.Normal(0.0, 1.0))
        b = 3 * a

        def step(c, _):
            z = ppl.sample("z", dist.Normal(a, 1.0))
            weigh(z)
            return c + 1, (a, b)

        _, (inside, tripled) = ppl.scan(step, 0, length=6)
        ppl.deterministic("after", a)
        return a, b, inside, tripled, a + b

    posterior = run(program)
    a, b, inside, tripled, total = posterior.value
    assert len(set(a.tolist())) < 32
    assert_equal(inside, np.broadcast_to(a[:, None], (32, 6)))
    assert_equal(tripled, np.broadcast_to(b[:, None], (32, 6)))
    assert_equal(posterior.sites["a"], a)
    assert_equal(posterior.sites["after"], a)
    assert_close(b, 3 * a)
    assert_close(total, 4 * a)


def test_latent_that_only_its_site_and_the_value_hold_follows_too(run):
    def program():
        a = ppl.sample("a", dist.Normal(0.0, 1.0))
        ppl.deterministic("doubled", 2 * a)

        def step(c, _):
            z = ppl.sample("z", dist.Normal(0.0, 1.0))
            weigh(z)
            return jnp.where(c == 0.0, a, c), z

        return ppl.scan(step, 0.0, length=5)[0]

    posterior = run(program)
    assert_equal(posterior.sites["a"], posterior.value)
    assert_close(posterior.sites["doubled"], 2 * posterior.value)


@pytest.mark.parametrize("run", ALGORITHMS, indirect=True)
def test_random_xs_of_a_loop_follow_their_particle(run):
    def program():
        noise = ppl.sample("noise", dist.Normal(0.0, 1.0).expand([8]))

        def step(c, e):
            weigh(e)
            return c + e, (c + e, e)

        last, (sums, es) = ppl.scan(step, 0.0, noise)
        return noise, last, sums, es

    posterior = run(program)
    noise, last, sums, es = posterior.value
    assert_equal(posterior.sites["noise"], noise)
    assert_equal(es, noise)
    assert_close(sums, np.cumsum(noise, 1))
    assert_close(last, noise.sum(1))


def test_random_xs_that_nothing_reads_after_the_loop_follow_their_particle(run):
    def program():
        shift = ppl.sample("shift", dist.Normal(0.0, 5.0))

        def step(c, x):
            z = ppl.sample("z", dist.Normal(0.0, 1.0))
            weigh(z)
            return c, x

        return shift, ppl.scan(step, 0.0, {"t": jnp.arange(6.0), "s": shift + jnp.zeros(6)})[1]["s"]

    shift, seen = run(program).value
    assert_equal(seen, np.broadcast_to(shift[:, None], (32, 6)))


def test_inner_loop_follows_the_outer_ones_resampling(run):
    def program():
        def outer(c, _):
            def inner(d, _):
                z = ppl.sample("z", dist.Normal(c, 1.0))
                ppl.factor("w", z)
                return d + z, (z, c)

            d, (zs, cs) = ppl.scan(inner, 0.0, length=3)
            return c + d, (zs, cs, d)

        return ppl.scan(outer, 0.0, length=4)

    posterior = run(program)
    last, (zs, cs, ds) = posterior.value
    assert_equal(posterior.sites["z"], zs)
    assert_close(zs.sum(2), ds)
    before = np.cumsum(ds, 1) - ds
    np.testing.assert_allclose(cs, np.broadcast_to(before[:, :, None], cs.shape), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(last, ds.sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("run", ALGORITHMS, indirect=True)
def test_two_loops_in_sequence_move_all_that_crosses_them(run):
    def program():
        a = ppl.sample("a", dist.Normal(0.0, 1.0))

        def first(c, _):
            x = ppl.sample("x", dist.Normal(a, 1.0))
            weigh(x)
            return c + x, c + x

        c, xs = ppl.scan(first, 0.0, length=5)
        b = ppl.sample("b", dist.Normal(c, 1.0))

        def second(d, x):
            y = ppl.sample("y", dist.Normal(b, 1.0))
            ppl.factor("v", y)
            return d + y, (d + y, c, b)

        d, (ys, cs, bs) = ppl.scan(second, a, length=5)
        return {"a": a, "b": b, "c": c, "d": d, "xs": xs, "ys": ys, "cs": cs, "bs": bs}

    posterior = run(program)
    v, sites = posterior.value, posterior.sites
    assert_equal(sites["a"], v["a"])
    assert_equal(sites["b"], v["b"])
    assert_equal(v["bs"], np.broadcast_to(v["b"][:, None], (32, 5)))
    assert_equal(v["cs"], np.broadcast_to(v["c"][:, None], (32, 5)))
    assert_equal(v["xs"][:, -1], v["c"])
    assert_equal(v["ys"][:, -1], v["d"])
    assert_close(np.cumsum(sites["x"], 1), v["xs"])
    np.testing.assert_allclose(v["a"][:, None] + np.cumsum(sites["y"], 1), v["ys"], rtol=1e-5, atol=1e-4)
    assert posterior.diagnostics["ess"].shape == (10,)


def test_second_loop_walks_along_what_the_first_one_put_out(run):
    def program():
        def first(c, _):
            x = ppl.sample("x", dist.Normal(0.0, 1.0))
            weigh(x)
            return c, x

        _, xs = ppl.scan(first, 0.0, length=5)

        def second(c, x):
            y = ppl.sample("y", dist.Normal(x, 1.0))
            ppl.factor("v", y)
            return c + x, x

        return xs, *ppl.scan(second, 0.0, xs)

    posterior = run(program)
    xs, total, seen = posterior.value
    assert_equal(posterior.sites["x"], xs)
    assert_equal(seen, xs)
    assert_close(total, xs.sum(1))


def test_loop_in_a_jitted_helper_moves_the_values_of_its_caller(run):
    @jax.jit
    def helper(start):
        def step(c, _):
            z = ppl.sample("z", dist.Normal(start, 1.0))
            weigh(z)
            return c + z, start

        return ppl.scan(step, start, length=6)

    def program():
        a = ppl.sample("a", dist.Normal(0.0, 1.0))
        last, starts = helper(a)
        return a, last, starts

    posterior = run(program)
    a, last, starts = posterior.value
    assert_equal(posterior.sites["a"], a)
    assert_equal(starts, np.broadcast_to(a[:, None], (32, 6)))
    np.testing.assert_allclose(last, a + posterior.sites["z"].sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("run", ALGORITHMS, indirect=True)
def test_frozen_particles_are_resampled_whole(run):
    def program():
        a = ppl.sample("a", dist.Normal(0.0, 1.0))

        def step(c, _):
            z = ppl.sample("z", dist.Normal(0.5, 1.0))
            weigh(0.5 * z)
            return {"sum": c["sum"] + z, "n": c["n"] + 1, "a": a}, (z, c["sum"] + z)

        init = {"sum": 0.0, "n": 0, "a": jnp.zeros(())}
        last, (zs, sums) = ppl.scan(step, init, length=8, until=lambda c: c["sum"] > a + 1.5)
        return a, last, zs, sums

    posterior = run(program)
    a, last, zs, sums = posterior.value
    present = posterior.present["z"]
    assert_equal(present, np.arange(8) < last["n"][:, None])
    assert_equal(posterior.sites["z"], zs)
    assert_equal(posterior.sites["a"], a)
    assert_equal(last["a"], np.where(last["n"] > 0, a, 0.0))
    assert_close(np.cumsum(zs, 1) * present, sums)
    stopped = np.where(present, sums > a[:, None] + 1.5, False)
    assert np.all(stopped.sum(1) <= 1)
    assert_close(zs.sum(1), last["sum"])


def test_untouched_random_carry_follows_its_particle(run):
    def program():
        table = ppl.sample("table", dist.Normal(0.0, 1.0).expand([3]))

        def step(c, _):
            table, i = c
            z = ppl.sample("z", dist.Normal(table[i % 3], 1.0))
            weigh(z)
            return (table, i + 1), table[i % 3]

        (last, _), seen = ppl.scan(step, (table, 0), length=6)
        return table, last, seen

    posterior = run(program)
    table, last, seen = posterior.value
    assert_equal(posterior.sites["table"], table)
    assert_equal(last, table)
    assert_equal(seen, table[:, np.arange(6) % 3])


def test_keys_carried_by_particles_follow_them(run):
    def program():
        def step(key, _):
            bit = ppl.sample("bit", dist.Bernoulli(0.5))
            weigh(1.0 * bit)
            key = jax.random.fold_in(key, bit)
            return key, jax.random.key_data(key)

        key, history = ppl.scan(step, jax.random.key(0), length=6)
        return jax.random.key_data(key), history

    posterior = run(program)
    key, history = posterior.value
    assert_equal(history[:, -1], key)

    def replay(bits):
        return jax.random.key_data(
            jax.lax.scan(lambda k, b: (jax.random.fold_in(k, b), None), jax.random.key(0), bits)[0]
        )

    assert_equal(key, jax.vmap(replay)(posterior.sites["bit"]))


def test_generated_process_inside_a_loop_follows_its_particle(run):
    @ppl.model
    def inner(start):
        return ppl.scan(lambda c, _: (c + ppl.sample("z", dist.Normal(0.0, 1.0)), c), start, length=3)[0]

    def program():
        def step(c, _):
            c = ppl.generate(inner(c), name="inner")
            weigh(c)
            return c, c

        return ppl.scan(step, 0.0, length=4)

    posterior = run(program)
    last, cs = posterior.value
    assert posterior.sites["inner/z"].shape == (32, 4, 3)
    np.testing.assert_allclose(np.cumsum(posterior.sites["inner/z"].sum(2), 1), cs, rtol=1e-5, atol=1e-4)
    assert_equal(cs[:, -1], last)


def test_ancestors_in_the_diagnostics_lead_from_the_draws_to_the_histories():
    """Replays the run by hand: each step's label is drawn once for each slot, and the ancestors say who survives."""

    @ppl.model
    def program():
        def step(c, _):
            z = ppl.sample("z", dist.Normal(0.0, 1.0))
            ppl.factor("w", 2.0 * z)
            return c + z, None

        return ppl.scan(step, 0.0, length=6)[0]

    posterior = jax.tree.map(np.asarray, ppl.infer(program(), SMC(16, ess_threshold=1.0)))
    ancestors, z = posterior.diagnostics["ancestors"], posterior.sites["z"]
    assert ancestors.shape == (6, 16) and ancestors.dtype == np.int32
    # Two particles share the entry at t exactly when their ancestral lines meet there.
    slots = np.arange(16)
    for t in reversed(range(6)):
        slots = ancestors[t][slots]
        assert_equal(z[:, None, t] == z[None, :, t], slots[:, None] == slots[None, :])


def test_ancestors_are_oneself_where_nothing_was_resampled():
    @ppl.model
    def program():
        return ppl.scan(lambda c, _: (c, ppl.sample("z", dist.Normal(0.0, 1.0))), 0.0, length=3)[1]

    diagnostics = ppl.infer(program(), SMC(8)).diagnostics
    assert not np.asarray(diagnostics["resampled"]).any()
    assert_equal(diagnostics["ancestors"], np.broadcast_to(np.arange(8), (3, 8)))
    assert_close(diagnostics["ess"], np.full(3, 8.0))
