"""`ppl.scan` is `jax.lax.scan` for the values, with `until`, time axes and carries that know more than their arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.control_flow import LoopCarry
from ppl.inference import SMC, ImportanceSampling
from tests.ppl.checks import assert_close, assert_equal, assert_trace_agrees_with_log_density


def value_of(function, *args):
    return ppl.simulate(ppl.model(function)(*args)).value


def typed(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.asarray(x).dtype), tree)


# As jax.lax.scan -------------------------------------------

LOOPS = {
    "counter": (lambda c, x: (c + 1, c), 0, jnp.arange(3.0), None),
    "float from int": (lambda c, x: (c + x, c), 0, jnp.arange(3.0), None),
    "weak float": (lambda c, x: (c + 1.0, c * 2), 0.0, None, 3),
    "weak float in bfloat16": (lambda c, x: (c + x, c), 0.0, jnp.ones(3, jnp.bfloat16), None),
    "bool": (lambda c, x: (~c, c), False, None, 5),
    "int8": (lambda c, x: (c + jnp.int8(1), c), jnp.int8(3), None, 3),
    "pytrees": (
        lambda c, x: ({"a": c["a"] + x[0], "b": (c["b"][0] + 1, None)}, {"y": (c["a"], x[1]["k"])}),
        {"a": jnp.zeros(2), "b": (0, None)},
        (jnp.ones((4, 2)), {"k": np.arange(4)}),
        None,
    ),
    "ys None": (lambda c, x: (c + x, None), 0.0, jnp.arange(3.0), None),
    "length one": (lambda c, x: (c + x, c), 0.0, jnp.ones(1), None),
    "length zero": (lambda c, x: (c + x, (c, x)), 1.0, jnp.ones((0, 2)).sum(1), None),
    "xs None and length zero": (lambda c, x: (c + 1, c), 7, None, 0),
    "xs and length": (lambda c, x: (c + x, c), 0.0, jnp.ones(3), 3),
    "carry untouched": (lambda c, x: (c, c["a"] * x), {"a": jnp.arange(2.0), "b": 3}, jnp.ones(3), None),
    "carry swapped": (lambda c, x: ((c[1], c[0]), c[0]), (jnp.float32(1.0), jnp.float32(2.0)), None, 3),
    "constants": (lambda c, x: (1.0, 2), 0.0, None, 3),
    "key in the carry": (lambda c, x: (jax.random.fold_in(c, 1), jax.random.uniform(c)), jax.random.key(0), None, 3),
    "array of size zero": (lambda c, x: (c + x, c.sum()), jnp.zeros((2, 0)), jnp.ones(3), None),
    "no carry": (lambda c, x: ((), x * 2), (), jnp.arange(3.0), None),
    "y is a Python number": (lambda c, x: (c, 1), 0.0, None, 2),
}


@pytest.mark.parametrize("name", LOOPS)
def test_scan_returns_what_jax_lax_scan_returns(name):
    check_against_jax_lax_scan(*LOOPS[name], until=None)


@pytest.mark.parametrize("name", ["counter", "weak float", "pytrees", "length zero", "key in the carry", "no carry"])
def test_scan_whose_until_never_holds_returns_what_jax_lax_scan_returns(name):
    check_against_jax_lax_scan(*LOOPS[name], until=lambda c: jnp.array(False))


def check_against_jax_lax_scan(step, init, xs, length, until):
    expected = jax.tree.map(jnp.asarray, jax.lax.scan(step, init, xs, length=length))
    with_until = {} if until is None else {"until": until}
    actual = value_of(lambda: ppl.scan(step, init, xs, length=length, **with_until))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert typed(actual) == typed(expected)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    plain = lambda tree: jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)  # noqa: E731
    assert_close(plain(actual), plain(expected))


@pytest.mark.parametrize("name", LOOPS)
def test_weak_types_of_a_scan_promote_as_those_of_jax_lax_scan(name):
    step, init, xs, length = LOOPS[name]
    promote = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: x if jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key) else x + jnp.ones((), jnp.int8), tree
    )
    expected = typed(jax.jit(lambda: promote(jax.lax.scan(step, init, xs, length=length)))())
    assert typed(value_of(lambda: promote(ppl.scan(step, init, xs, length=length)))) == expected


def test_scan_nests_and_sites_gain_one_time_axis_for_each_loop():
    @ppl.model
    def program(xs):
        def outer(total, row):
            def inner(total, x):
                z = ppl.sample("z", dist.Normal(x, 1.0))
                return total + z, z

            total, zs = ppl.scan(inner, total, row)
            ppl.deterministic("total", total)
            return total, zs

        return ppl.scan(outer, 0.0, xs)

    xs = jnp.arange(6.0).reshape(3, 2)
    trace = ppl.simulate(program(xs))
    assert trace.sites["z"].shape == trace.present["z"].shape == (3, 2)
    assert_close(trace.value[1], trace.sites["z"])
    assert_close(trace.value[0], trace.sites["z"].sum())
    assert_close(trace.sites["total"], jnp.cumsum(trace.sites["z"].sum(1)))
    assert_close(trace.log_density, dist.Normal(xs, 1.0).log_prob(trace.sites["z"]).sum())


def test_scan_gives_every_iteration_and_loop_fresh_randomness():
    @ppl.model
    def program():
        step = lambda c, _: (c, ppl.sample("z", dist.Normal(0.0, 1.0)))  # noqa: E731
        with ppl.scope("a"):
            _, a = ppl.scan(step, 0.0, length=4)
        with ppl.scope("b"):
            _, b = ppl.scan(lambda c, _: (c, ppl.scan(step, 0.0, length=4)[1]), 0.0, length=4)
        return jnp.concatenate([a, b.ravel()])

    assert len(set(np.asarray(ppl.simulate(program()).value).tolist())) == 20
    assert len(set(np.asarray(ppl.infer(program(), SMC(5)).value).ravel().tolist())) == 100


def test_scan_of_5000_iterations_with_one_particle():
    @ppl.model
    def program():
        return ppl.scan(lambda c, _: (0.5 * c + ppl.sample("x", dist.Normal(0.0, 1.0)), None), 0.0, length=5000)[0]

    posterior = ppl.infer(program(), SMC(1))
    assert posterior.sites["x"].shape == (1, 5000)
    assert float(posterior.log_evidence) == 0.0
    assert_trace_agrees_with_log_density(program(), seeds=(0,))


# until -------------------------------------------


def counting(threshold, init=0, length=6):
    """Counts up; stops once the count reaches the threshold."""

    @ppl.model
    def program(init, threshold):
        def step(c, t):
            x = ppl.sample("x", dist.Exponential(1.0))
            ppl.factor("f", -x)
            return c + 1, (x, t)

        return ppl.scan(step, init, jnp.arange(1, length + 1), until=lambda c: c >= threshold)

    return program(jnp.int32(init), jnp.int32(threshold))


@pytest.mark.parametrize("threshold, ran", [(0, 0), (1, 1), (4, 4), (6, 6), (9, 6)])
def test_until_is_tested_before_each_iteration_and_freezes_carry_and_leaves_zeros(threshold, ran):
    program = counting(threshold)
    trace = ppl.simulate(program)
    count, (xs, ts) = trace.value
    assert int(count) == ran
    assert_equal(ts, np.arange(1, 7) * (np.arange(6) < ran))
    assert_equal(trace.present["x"], np.arange(6) < ran)
    assert np.all(np.asarray(trace.sites["x"])[ran:] == 0) and np.all(np.asarray(trace.sites["x"])[:ran] > 0)
    drawn = trace.sites["x"][:ran]
    assert_close(trace.log_density, jnp.sum(-2 * drawn))
    assert_close(ppl.log_density(program, trace.sites), trace.log_density)
    posterior = ppl.infer(program, SMC(3, ess_threshold=1.0))
    assert_equal(posterior.present["x"], np.broadcast_to(np.arange(6) < ran, (3, 6)))
    assert_equal(posterior.value[1][1], np.broadcast_to(ts, (3, 6)))


def test_log_density_ignores_entries_after_the_stop_whatever_they_are():
    program = counting(2)
    sites = ppl.simulate(program).sites["x"]
    expected = ppl.log_density(program, {"x": sites})
    for junk in (-1.0, jnp.nan, jnp.inf, 1e30):
        assert_equal(ppl.log_density(program, {"x": sites.at[2:].set(junk)}), expected)


@pytest.mark.parametrize("junk", [0.0, 1.0, -1.0, np.nan])
def test_gradient_of_log_density_passes_through_until_and_is_zero_after_the_stop(junk):
    @ppl.model
    def program(mu):
        def step(c, _):
            x = ppl.sample("x", dist.LogNormal(mu, 1.0))
            return c + x, None

        return ppl.scan(step, 0.0, length=5, until=lambda c: c > 2.0)

    sites = {"x": jnp.array([1.5, 1.0, junk, junk, junk])}
    by_mu = jax.grad(lambda mu: ppl.log_density(program(mu), sites))(0.3)
    by_x = jax.grad(lambda s: ppl.log_density(program(0.3), s))(sites)["x"]
    log_x = np.log([1.5, 1.0])
    assert_close(by_mu, np.sum(log_x - 0.3))
    assert_close(by_x, np.concatenate([-(log_x - 0.3 + 1) / np.array([1.5, 1.0]), np.zeros(3)]))


def stopping_at_its_own_time():
    @ppl.model
    def program():
        def step(c, t):
            x = ppl.sample("x", dist.Normal(0.5, 1.0))
            return {"sum": c["sum"] + x, "n": c["n"] + 1}, (x, t)

        return ppl.scan(step, {"sum": 0.0, "n": 0}, jnp.arange(1, 9), until=lambda c: c["sum"] > 1.0)

    return program()


@pytest.mark.parametrize("algorithm", [ImportanceSampling(50), SMC(50, ess_threshold=1.0)], ids=["importance", "smc"])
def test_particles_stop_at_their_own_times_and_their_histories_say_when(algorithm):
    posterior = ppl.infer(stopping_at_its_own_time(), algorithm)
    last, (xs, ts) = jax.tree.map(np.asarray, posterior.value)
    present = np.asarray(posterior.present["x"])
    assert len(set(last["n"].tolist())) > 2
    assert_equal(present, np.arange(8) < last["n"][:, None])
    assert_equal(ts, np.arange(1, 9) * present)
    assert_equal(posterior.sites["x"], xs)
    assert np.all(xs[~present] == 0)
    assert_close(xs.sum(1), last["sum"])
    partial = np.where(present, np.cumsum(xs, 1), -np.inf)
    assert np.all((partial > 1.0).sum(1) == (last["sum"] > 1.0))


def test_nested_until_marks_presence_along_both_time_axes():
    @ppl.model
    def program():
        def outer(c, _):
            def inner(d, _):
                return d + 1, ppl.sample("x", dist.Normal(0.0, 1.0))

            d, _ = ppl.scan(inner, 0, length=4, until=lambda d: d > c)
            ppl.deterministic("d", d)
            return c + 1, d

        return ppl.scan(outer, 0, length=3, until=lambda c: c >= 2)

    trace = ppl.simulate(program())
    expected = np.array([[True, False, False, False], [True, True, False, False], [False] * 4])
    assert_equal(trace.present["x"], expected)
    assert_equal(trace.present["d"], [True, True, False])
    assert_equal(np.asarray(trace.sites["x"]) != 0, expected)
    assert_equal(trace.value[1], [1, 2, 0])
    assert_close(ppl.log_density(program(), trace.sites), trace.log_density)
    assert_equal(ppl.infer(program(), SMC(3)).present["x"], np.broadcast_to(expected, (3, 3, 4)))


def test_loop_without_until_inside_one_with_it_is_absent_entry_by_entry():
    @ppl.model
    def program():
        def outer(c, _):
            return c + 1, ppl.scan(lambda d, _: (d, ppl.sample("x", dist.Normal(0.0, 1.0))), 0.0, length=2)[1]

        return ppl.scan(outer, 0, length=3, until=lambda c: c >= 2)

    expected = np.array([[True, True], [True, True], [False, False]])
    assert_equal(ppl.simulate(program()).present["x"], expected)
    assert_equal(ppl.infer(program(), SMC(2)).present["x"], np.broadcast_to(expected, (2, 3, 2)))


def test_until_inside_a_loop_without_it_is_absent_entry_by_entry():
    @ppl.model
    def program():
        def outer(c, _):
            inner = lambda d, _: (d + 1, ppl.sample("x", dist.Normal(0.0, 1.0)))  # noqa: E731
            return c + 1, ppl.scan(inner, 0, length=3, until=lambda d: d >= c)[1]

        return ppl.scan(outer, 0, length=3)

    expected = np.array([[False] * 3, [True, False, False], [True, True, False]])
    assert_equal(ppl.simulate(program()).present["x"], expected)
    assert_equal(ppl.infer(program(), SMC(2)).present["x"], np.broadcast_to(expected, (2, 3, 3)))


def test_loop_ends_early_once_every_particle_is_frozen():
    calls = []

    def note(t):
        calls.append(int(t))
        return np.float32(0)

    @ppl.model
    def program():
        def step(c, t):
            zero = jax.pure_callback(note, jax.ShapeDtypeStruct((), jnp.float32), t, vmap_method="sequential")
            return c + 1, ppl.sample("x", dist.Normal(zero, 1.0))

        return ppl.scan(step, 0, jnp.arange(1000), until=lambda c: c >= 3)

    jax.block_until_ready(ppl.infer(program(), SMC(4)).log_weights)
    assert sorted(set(calls)) == [0, 1, 2]


def test_predicate_that_reads_random_values_from_outside_of_the_loop():
    @ppl.model
    def program():
        limit = ppl.sample("limit", dist.Categorical(probs=jnp.ones(4) / 4))
        step = lambda c, _: (c + 1, ppl.sample("x", dist.Normal(0.0, 1.0)))  # noqa: E731
        return limit, ppl.scan(step, 0, length=5, until=lambda c: c >= limit)[0]

    limit, count = ppl.infer(program(), SMC(64, ess_threshold=1.0)).value
    assert_equal(limit, count)


def test_until_with_keys_in_carry_and_ys():
    @ppl.model
    def program():
        def step(c, _):
            key, use = jax.random.split(c["key"])
            x = ppl.sample("x", dist.Normal(jax.random.normal(use), 1.0))
            return {"key": key, "n": c["n"] + 1, "x": x}, use

        return ppl.scan(step, {"key": jax.random.key(0), "n": 0, "x": 0.0}, length=4, until=lambda c: c["x"] > 0.5)[0]

    assert_trace_agrees_with_log_density(program())
    assert ppl.infer(program(), SMC(4)).value["n"].shape == (4,)


# Carries -------------------------------------------


def test_carry_leaf_handed_on_untouched_is_a_constant_of_the_loop():
    big = jnp.arange(1000.0)

    @ppl.model
    def program():
        def step(c, _):
            cache, x = c
            return (cache, x + cache[0] + ppl.sample("z", dist.Normal(0.0, 1.0))), None

        return ppl.scan(step, (big, 0.0), length=3)[0][1]

    block = program().stage(keep_rules=False).block
    (loop,) = [node for node in block.nodes if hasattr(node, "invariant")]
    assert loop.invariant == (True, False)
    assert ppl.infer(program(), SMC(2, ess_threshold=1.0)).value.shape == (2,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Buffer:
    """A list of numbers that grows where it is full, and has room inside of a loop for all that its carry is given."""

    entries: jax.Array
    count: jax.Array
    free: int = dataclasses.field(default=0, metadata={"static": True})

    def push(self, x):
        full = self if self.free else self.resized(self.entries.size + 1, 1)
        return Buffer(full.entries.at[full.count].set(x), full.count + 1, full.free - 1)

    def resized(self, size, free):
        entries = jnp.concatenate([self.entries, jnp.zeros(max(size - self.entries.size, 0))])[:size]
        return Buffer(entries, self.count, free)

    def enter_loop(self, count, length):
        return self.resized(self.entries.size + count * length, self.free + count)

    def end_iteration(self, entered):
        added = (self.entries.size - self.free) - (entered.entries.size - entered.free)
        return self.resized(entered.entries.size, entered.free), max(added, 0)

    def exit_loop(self, count, length):
        return Buffer(self.entries, self.count, self.free - count)

    def scratch(self):
        return Buffer(True, False, self.free)


@pytest.mark.parametrize("pushes", [0, 1, 2])
def test_node_with_the_protocol_is_given_room_for_what_the_iterations_use(pushes):
    assert isinstance(Buffer(jnp.zeros(0), 0), LoopCarry)

    @ppl.model
    def program():
        def step(buffer, _):
            x = ppl.sample("x", dist.Normal(0.0, 1.0))
            for i in range(pushes):
                buffer = buffer.push(x + i)
            return buffer, x

        buffer, xs = ppl.scan(step, Buffer(jnp.zeros(0), jnp.int32(0)).push(7.0), length=3)
        return buffer.entries, buffer.count, xs

    entries, count, xs = jax.tree.map(np.asarray, ppl.infer(program(), SMC(4, ess_threshold=1.0)).value)
    assert entries.shape == (4, 1 + 3 * pushes)
    assert_equal(count, np.full(4, 1 + 3 * pushes))
    expected = (xs[:, :, None] + np.arange(pushes)).reshape(4, -1)
    assert_close(entries, np.concatenate([np.full((4, 1), 7.0), expected], 1))


def test_scratch_leaves_of_a_frozen_particle_do_not_show():
    @ppl.model
    def program():
        def step(c, _):
            x = ppl.sample("x", dist.Normal(0.0, 1.0))
            return {"buffer": c["buffer"].push(x), "stop": x > 0}, x

        init = {"buffer": Buffer(jnp.zeros(0), jnp.int32(0)), "stop": jnp.array(False)}
        c, xs = ppl.scan(step, init, length=6, until=lambda c: c["stop"])
        return c["buffer"].entries, c["buffer"].count, xs

    entries, count, xs = jax.tree.map(np.asarray, ppl.infer(program(), SMC(16)).value)
    kept = np.arange(6) < count[:, None]
    assert len(set(count.tolist())) > 1
    assert_close(np.where(kept, entries, 0), xs)


def test_protocol_nodes_nest_in_inner_loops():
    @ppl.model
    def program():
        def inner(buffer, _):
            x = ppl.sample("x", dist.Normal(0.0, 1.0))
            return buffer.push(x), x

        def outer(buffer, _):
            buffer, xs = ppl.scan(inner, buffer, length=2)
            return buffer.push(100.0), xs

        buffer, xs = ppl.scan(outer, Buffer(jnp.zeros(0), jnp.int32(0)), length=2)
        return buffer.entries, buffer.count, xs

    entries, count, xs = ppl.simulate(program()).value
    assert int(count) == 6
    assert_close(entries, np.concatenate([np.append(np.asarray(row), 100.0) for row in xs]))
