"""Particles with long rows: the dead are overwritten in place, and a particle stays whole (law L3)."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, EntropicAnnealing
from ppl.inference.population import lower
from ppl.kernels import moves

WIDTH = 2048  # 8 KiB a row


@ppl.model
def remembering(width, steps):
    """Keep all that was drawn in a long row beside the path."""
    label = ppl.sample("label", dist.Normal(0.0, 1.0))

    def step(memory, t):
        x = ppl.sample("x", dist.Normal(label, 1.0))
        memory = memory.at[t].set(x).at[width - 1].add(label)
        ppl.factor("w", -jnp.abs(x - 1.0) * 2)
        return memory, x

    memory, path = ppl.scan(step, jnp.zeros(width), jnp.arange(steps))
    return {"memory": memory, "path": path, "label": label}


@pytest.mark.parametrize(
    "settings",
    [
        {"ess_threshold": 1.0},
        {"ess_threshold": 0.7},
        {"ess_threshold": 1.0, "resampler": "killing"},
        {"ess_threshold": 1.0, "annealing": EntropicAnnealing(ess=0.9)},
    ],
    ids=["every step", "adaptive", "killing", "annealed"],
)
def test_long_rows_follow_the_same_ancestors_as_everything_else(settings):
    posterior = ppl.infer(remembering(WIDTH, 12), SMC(50, **settings), seed=2)
    memory, path = np.asarray(posterior.value["memory"]), np.asarray(posterior.value["path"])
    assert np.asarray(posterior.diagnostics["resampled"]).sum() > 2
    np.testing.assert_allclose(memory[:, :12], path, rtol=1e-5, atol=1e-6)  # XLA may compute x twice, in two roundings
    np.testing.assert_allclose(memory[:, -1], 12 * np.asarray(posterior.value["label"]), rtol=1e-5)
    for ancestors in np.asarray(posterior.diagnostics["ancestors"]):
        np.testing.assert_array_equal(ancestors[ancestors], ancestors)  # a parent keeps its slot


def test_the_answer_does_not_depend_on_how_rows_are_moved():
    keys = jax.random.split(jax.random.key(0), 300)
    algorithm = SMC(30, ess_threshold=0.8)

    def estimates(width):
        run = jax.vmap(lambda key: ppl.infer(remembering(width, 6), algorithm, key=key).log_evidence)
        return np.exp(np.asarray(jax.jit(run)(keys), np.float64))

    short, long = estimates(16), estimates(WIDTH)
    error = np.sqrt((short.var() + long.var()) / len(short))
    assert abs(short.mean() - long.mean()) < 5 * error


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_no_second_population_is_allocated(threshold):
    particles, width = 64, 1 << 16
    assert moves.has_long_rows(jnp.zeros((particles, width)))
    memory = lower(remembering(width, 4), SMC(particles, ess_threshold=threshold)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * particles * width * 4
