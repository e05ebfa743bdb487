"""Prefix sums: exact, and the same by the loop of a CPU and by the tree of other backends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ppl.kernels import prefix
from ppl.kernels.resampling import inverse_cdf


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_prefix_sums_are_exact(n):
    rng = np.random.default_rng(n)
    whole = rng.integers(0, 2**31 // n, size=n).astype(np.int32)
    part = rng.integers(0, 2**32, size=n, dtype=np.uint64).astype(np.uint32)
    found = jax.jit(prefix.prefix_sum)((jnp.asarray(whole // 2), jnp.asarray(part)))
    exact = np.cumsum(((whole // 2).astype(object) << 32) + part.astype(object))
    joined = (np.asarray(found[0]).astype(object) << 32) + np.asarray(found[1]).astype(object)
    assert joined.tolist() == exact.tolist()
    np.testing.assert_array_equal(prefix.prefix_sum_whole(jnp.asarray(whole // n)), np.cumsum(whole // n))
    np.testing.assert_array_equal(prefix.running_max(jnp.asarray(whole)), np.maximum.accumulate(whole))


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 4097])
def test_the_tree_of_other_backends_gives_the_same_bits(n):
    rng = np.random.default_rng(n)
    values = (
        jnp.asarray(rng.integers(0, 2**31 // n - 1, size=n), jnp.int32),
        jnp.asarray(rng.integers(0, 2**32, size=n, dtype=np.uint64).astype(np.uint32)),
    )
    tree = jax.jit(functools.partial(lax.associative_scan, prefix._add))
    for a, b in zip(prefix.prefix_sum(values), tree(values), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("n, num", [(1, 1), (1, 9), (9, 1), (5, 8), (1000, 1000), (300, 4000)])
def test_points_are_placed_alike_by_walking_and_by_searching(n, num, spread):
    rng = np.random.default_rng(n + num)
    log_weights = (rng.normal(size=n) * spread).astype(np.float32)
    log_weights[rng.random(n) < 0.3] = -np.inf
    log_weights[n // 2] = 0.0
    weights, _ = inverse_cdf.relative_weights(jnp.asarray(log_weights))
    sums = inverse_cdf.scaled_prefix_sum(weights, num)
    bits = jnp.asarray(rng.integers(0, 2**32, size=num + 1, dtype=np.uint64).astype(np.uint32))
    points = inverse_cdf.sorted_points(bits, num)
    drawn = tuple(x[:num] for x in points)
    whole, part = (np.asarray(x).astype(object) for x in drawn)
    below = np.asarray(sums[0]).astype(object) << 32
    below = below + np.asarray(sums[1]).astype(object)
    place = np.array([int(np.searchsorted(below, p, side="right")) for p in (whole << 32) + part])
    last = int(np.argmax(below == below[-1]))
    expected = np.minimum(place, last)
    np.testing.assert_array_equal(jax.jit(inverse_cdf.place, static_argnums=2)(drawn, sums, num), expected)

    counts = jax.jit(inverse_cdf.count_points, static_argnums=3)(drawn, sums, num, num)
    np.testing.assert_array_equal(counts, np.cumsum(np.bincount(expected, minlength=n)))
    searched = jax.jit(inverse_cdf.search_points, static_argnums=2)(drawn, sums, num)
    reached = below == below[-1]
    np.testing.assert_array_equal(np.where(reached, num, searched), counts)  # what other backends do
    np.testing.assert_array_equal(inverse_cdf.fill(counts, num), expected)
