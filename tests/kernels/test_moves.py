"""Moves: every ancestor vector of few particles, both ways of moving, buffers that are really overwritten."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.kernels import moves
from ppl.kernels.moves import gather, has_long_rows, move, offspring_order, survivors_stay

LONG = 1024  # numbers of four bytes: the shortest row that is copied by itself
order = jax.jit(offspring_order)
stay = jax.jit(survivors_stay)


def assert_in_form(before, after):
    """The same ancestors, every survivor in its slot, every parent its own ancestor."""
    before, after = np.asarray(before), np.asarray(after)
    n = len(before)
    assert after.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(after, minlength=n), np.bincount(before, minlength=n))
    alive = np.unique(before)
    np.testing.assert_array_equal(after[alive], alive)


def random_ancestors(n, dead_share, seed=0):
    """Ancestors in any order, about `dead_share` of the particles without offspring."""
    rng = np.random.default_rng(seed)
    alive = rng.permutation(n)[: max(n - round(dead_share * n), 1)]
    return rng.permutation(np.concatenate([alive, rng.choice(alive, n - len(alive))])).astype(np.int32)


def population(n, seed=0):
    """Arrays of many types and ranks, some with long rows."""
    rng = np.random.default_rng(seed)
    return {
        "weights": jnp.asarray(rng.normal(size=n), jnp.float32),
        "more": (jnp.asarray(rng.normal(size=n), jnp.float32), jnp.arange(n)),
        "key": jax.random.split(jax.random.key(seed), n),
        "flag": jnp.asarray(rng.random(n) < 0.5),
        "matrix": jnp.asarray(rng.normal(size=(n, 3, 4)), jnp.float32),
        "cache": [jnp.asarray(rng.normal(size=(n, 2, LONG // 2)), jnp.float32) for _ in range(2)],
        "bytes": jnp.asarray(rng.integers(-128, 128, (n, 4 * LONG)), jnp.int8),
        "half": jnp.asarray(rng.normal(size=(n, 2 * LONG)), jnp.float16),
        "brain": jnp.asarray(rng.normal(size=(n, 2 * LONG)), jnp.bfloat16),
        "mask": jnp.asarray(rng.random((n, 4 * LONG)) < 0.5),
        "empty": jnp.zeros((n, 0)),
    }


def assert_trees_equal(actual, desired):
    def plain(x):
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(plain(a), plain(b))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_survivors_stay_for_every_ancestor_vector_of_few_particles(n):
    vectors = np.array(list(itertools.product(range(n), repeat=n)), np.int32)
    after = np.asarray(jax.jit(jax.vmap(survivors_stay))(vectors))
    orders = np.asarray(jax.jit(jax.vmap(offspring_order))(vectors))
    for before, s, rearranged in zip(vectors, orders, after, strict=True):
        assert_in_form(before, rearranged)
        np.testing.assert_array_equal(np.sort(s), np.arange(n))
        np.testing.assert_array_equal(before[s], rearranged)
    again = np.asarray(jax.jit(jax.vmap(offspring_order))(after))
    np.testing.assert_array_equal(again, np.broadcast_to(np.arange(n), again.shape))


@pytest.mark.parametrize("n", [31, 1000, 2**17 + 1, 2**20])
@pytest.mark.parametrize("dead_share", [0.0, 0.25, 0.9])
def test_survivors_stay_of_many_particles(n, dead_share):
    for ancestors in (random_ancestors(n, dead_share), np.sort(random_ancestors(n, dead_share))):
        after = stay(ancestors)
        assert_in_form(ancestors, after)
        np.testing.assert_array_equal(order(after), np.arange(n))


@pytest.mark.parametrize("n", [7, 1000])
def test_survivors_stay_of_permutations_and_of_one_parent(n):
    permuted = np.random.default_rng(0).permutation(n).astype(np.int32)
    np.testing.assert_array_equal(stay(permuted), np.arange(n))
    np.testing.assert_array_equal(permuted[np.asarray(order(permuted))], np.arange(n))
    for parent in (0, n // 2, n - 1):
        np.testing.assert_array_equal(stay(np.full(n, parent, np.int32)), np.full(n, parent))
    pinned = random_ancestors(n, 0.5)
    pinned[0] = 0
    assert stay(pinned)[0] == 0


def test_offspring_order_fills_dead_slots_in_the_given_order():
    ancestors = np.array([4, 4, 1, 4, 1, 7, 6, 6], np.int32)  # dead: 0, 2, 3, 5; left over: 1, 3, 4, 7
    np.testing.assert_array_equal(order(ancestors), [1, 2, 3, 4, 0, 7, 6, 5])
    np.testing.assert_array_equal(stay(ancestors), [4, 1, 4, 1, 4, 6, 6, 7])


@pytest.mark.parametrize("dead_share", [0.0, 0.25, 0.5, 0.95])
@pytest.mark.parametrize("jit", [True, False])
def test_move_of_many_types_and_ranks_equals_gather(dead_share, jit):
    tree = population(20)
    ancestors = survivors_stay(random_ancestors(20, dead_share, seed=1))
    expected = jax.tree.map(lambda x: x[np.asarray(ancestors)], tree)
    assert_trees_equal((jax.jit(move) if jit else move)(tree, ancestors), expected)
    assert_trees_equal(gather(tree, ancestors), expected)


def test_move_for_every_form_of_four_particles():
    x = jnp.arange(4 * LONG, dtype=jnp.float32).reshape(4, LONG)
    for before in itertools.product(range(4), repeat=4):
        ancestors = stay(np.array(before, np.int32))
        np.testing.assert_array_equal(jax.jit(move)(x, ancestors), np.asarray(x)[np.asarray(ancestors)])


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_move_along_any_axis(axis):
    n = 6
    ancestors = survivors_stay(random_ancestors(n, 0.5))
    shape = [3, 5, LONG]
    shape[axis] = n
    tree = [jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32), jnp.ones(shape, jnp.int16)]
    expected = [np.take(np.asarray(x), np.asarray(ancestors), axis) for x in tree]
    assert_trees_equal(jax.jit(move, static_argnums=2)(tree, ancestors, axis), expected)
    assert_trees_equal(gather(tree, ancestors, axis), expected)


def test_gather_takes_ancestors_in_any_order_and_number():
    tree, ancestors = population(5), np.array([3, 0, 1, 1, 4, 2, 0], np.int32)
    assert_trees_equal(jax.jit(gather)(tree, ancestors), jax.tree.map(lambda x: x[ancestors], tree))


def test_move_under_vmap_and_derivatives_equals_gather():
    n, rng = 6, np.random.default_rng(0)
    ancestors = jnp.stack([survivors_stay(random_ancestors(n, share)) for share in (0.0, 0.5, 0.8)])
    x = jnp.asarray(rng.normal(size=(3, n, LONG)), jnp.float32)
    assert has_long_rows(x[0])
    np.testing.assert_array_equal(jax.jit(jax.vmap(move))(x, ancestors), jax.vmap(gather)(x, ancestors))
    for axes in ((None, 0), (0, None)):
        args = (x[0], ancestors) if axes[0] is None else (x, ancestors[1])
        np.testing.assert_array_equal(jax.vmap(move, axes)(*args), jax.vmap(gather, axes)(*args))

    def total(way, x, ancestors):
        moved = way({"x": x, "fixed": jnp.ones((n, LONG), jnp.int32)}, ancestors)
        return jnp.sum(jnp.sin(moved["x"]) * moved["fixed"])

    for one, a in zip(x, ancestors, strict=True):
        gradients = [jax.grad(total, argnums=1)(way, one, a) for way in (move, gather)]
        np.testing.assert_array_equal(*gradients)
        tangents = [jax.jvp(lambda v, w=way, a=a: total(w, v, a), (one,), (one,))[1] for way in (move, gather)]
        np.testing.assert_array_equal(*tangents)
    batched = [jax.vmap(jax.grad(lambda v, a, w=way: total(w, v, a)))(x, ancestors) for way in (move, gather)]
    np.testing.assert_array_equal(*batched)


cpu_only = pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere everything is gathered")


@cpu_only
def test_move_overwrites_donated_buffers():
    tree = [jnp.ones((16, 64 * LONG)), jnp.ones((16, 2, 32 * LONG))]
    ancestors = survivors_stay(random_ancestors(16, 0.5))
    expected = jax.tree.map(lambda x: np.asarray(x)[np.asarray(ancestors)], tree)
    addresses = [x.unsafe_buffer_pointer() for x in tree]
    moved = jax.jit(move, donate_argnums=0)(tree, ancestors)
    assert all(x.is_deleted() for x in tree)
    assert [x.unsafe_buffer_pointer() for x in moved] == addresses
    assert_trees_equal(moved, expected)


@cpu_only
@pytest.mark.parametrize("kind", ["alone", "scan", "cond in scan"])
def test_move_allocates_no_second_array(kind):
    n, width = 16, 128 * LONG
    ancestors = jnp.stack([survivors_stay(random_ancestors(n, 0.5, seed)) for seed in range(3)])

    def step(x, a):
        x = jax.lax.dynamic_update_slice(x, x[:, :1] + 1, (0, 1))
        return (move(x, a) if kind == "scan" else jax.lax.cond(a[0] >= 0, move, lambda x, a: x, x, a)), x[0, 0]

    def run(x, ancestors):
        return move(x, ancestors[0]) if kind == "alone" else jax.lax.scan(step, x, ancestors)[0]

    x = jax.ShapeDtypeStruct((n, width), jnp.float32)
    compiled = jax.jit(run, donate_argnums=0).lower(x, ancestors).compile()
    array = 4 * n * width
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * array / n  # a row or two, not the array
    copies = [line for line in compiled.as_text().splitlines() if f"f32[{n},{width}]" in line and " copy(" in line]
    assert not copies


def test_move_by_known_ancestors_inside_a_traced_function():
    x = jnp.arange(3 * LONG, dtype=jnp.float32).reshape(3, LONG)
    np.testing.assert_array_equal(jax.jit(lambda x: move(x, jnp.array([2, 1, 2])))(x), x[jnp.array([2, 1, 2])])


def test_move_refuses_what_it_cannot_do():
    x = jnp.zeros((3, LONG))
    with pytest.raises(ValueError, match="`ancestors` must be in the form that `survivors_stay` gives"):
        move(x, jnp.array([1, 2, 2]))
    with pytest.raises(ValueError, match=r"must have 2 particles along axis 0.*got shape \(3, 1024\)"):
        move(x, jnp.array([0, 1]))
    with pytest.raises(ValueError, match="along axis 2"):
        move(x, jnp.array([0, 1, 2]), 2)
    for function in (survivors_stay, offspring_order, lambda a: move(x, a)):
        with pytest.raises(ValueError, match=r"`ancestors` must have shape \(n,\).*got shape \(2, 3\)"):
            function(jnp.zeros((2, 3), jnp.int32))
        with pytest.raises(ValueError, match="`ancestors` must have shape"):
            function(jnp.zeros(0, jnp.int32))
        with pytest.raises(TypeError, match="`ancestors` must be int32 indices of particles, got float32"):
            function(jnp.zeros(3))


def test_rows_are_long_by_the_bytes_that_lie_together():
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    assert has_long_rows(shape(2, LONG)) and not has_long_rows(shape(2, LONG - 1))
    assert has_long_rows(shape(2, 4 * LONG, dtype=jnp.int8)) and not has_long_rows(shape(2, 4 * LONG - 1, dtype=bool))
    assert has_long_rows(shape(8, 2, LONG), 1) and not has_long_rows(shape(LONG, 8), 1)
    assert not has_long_rows(shape(2, 8 * LONG, dtype=jnp.bfloat16)) and not has_long_rows(shape())
    assert moves._LONG == 4 * LONG
