"""Birth and death: the law of the offspring, exactly and by repeated draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.kernels.resampling import birth_death, resolve

WEIGHTS = {
    "spread": [0.1, 0.2, 0.3, 0.4],
    "one dead": [0.0, 0.5, 0.2, 0.3],
    "one alone": [0.0, 1.0, 0.0, 0.0],
    "two kinds": [1.0, 1.0, 3.0, 3.0],
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_offspring_are_n_times_the_weight_on_average(weights):
    weights = np.array(weights) / np.sum(weights)
    keys = jax.random.split(jax.random.key(0), 20_000)
    with np.errstate(divide="ignore"):
        log_weights = jnp.asarray(np.log(weights), jnp.float32)
    ancestors = np.asarray(jax.jit(jax.vmap(lambda key: birth_death(key, log_weights)))(keys))
    offspring = (ancestors[:, :, None] == np.arange(4)).sum(axis=1)
    mean, error = offspring.mean(axis=0), offspring.std(axis=0, ddof=1) / np.sqrt(len(keys))
    assert np.all(np.abs(mean - 4 * weights) <= 5 * error + 1e-6)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_survivors_stay_and_the_unfit_have_no_children_elsewhere(weights):
    fitness = np.array(weights) / np.mean(weights)
    with np.errstate(divide="ignore"):
        log_weights = jnp.asarray(np.log(weights), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 2_000)
    ancestors = np.asarray(jax.jit(jax.vmap(lambda key: birth_death(key, log_weights)))(keys))
    for slot in range(4):
        away = ancestors[ancestors[:, slot] != slot, slot]
        assert np.all(fitness[away] > 1)
        if fitness[slot] >= 1:
            assert away.size == 0
        else:  # its survival has the stated probability
            share = np.mean(ancestors[:, slot] == slot)
            assert abs(share - fitness[slot]) <= 5 * np.sqrt(0.25 / len(keys))


@pytest.mark.optimized
@pytest.mark.parametrize("num", [1, 2, 1000, 1 << 20])
def test_equal_weights_give_equal_ancestors(num):
    draw = jax.jit(birth_death)
    for level in (0.0, -1e30, 3.7):
        assert np.array_equal(draw(jax.random.key(3), jnp.full(num, level)), np.arange(num))


@pytest.mark.optimized
def test_a_million_particles_against_float64():
    rng = np.random.default_rng(0)
    log_weights = rng.normal(size=1 << 20).astype(np.float32)
    exact = np.exp(log_weights.astype(np.float64))
    exact *= len(exact) / exact.sum()
    draws = jax.jit(birth_death)
    counts = sum(
        np.bincount(draws(jax.random.key(seed), jnp.asarray(log_weights)), minlength=len(exact)) for seed in range(8)
    )
    groups = np.argsort(exact).reshape(64, -1)
    seen, expected = counts[groups].sum(axis=1), 8 * exact[groups].sum(axis=1)
    assert np.all(np.abs(seen - expected) <= 5 * np.sqrt(expected) + 1e-5 * expected)


def test_the_dead_never_have_children():
    log_weights = jnp.asarray([-jnp.inf, jnp.nan, 0.0, -80.0, -jnp.inf])
    draw = jax.jit(birth_death)
    for seed in range(50):
        ancestors = np.asarray(draw(jax.random.key(seed), log_weights))
        assert set(ancestors) <= {2, 3}
    assert np.array_equal(birth_death(jax.random.key(0), jnp.full(3, -jnp.inf)), np.arange(3))


def test_it_is_found_by_name_and_draws_as_many_as_there_are():
    assert resolve("birth_death") is birth_death
    with pytest.raises(ValueError, match="`num` must be the number of particles, 3"):
        birth_death(jax.random.key(0), jnp.zeros(3), 2)
