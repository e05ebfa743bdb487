"""Conditional SMC: E[1 / Z_hat] = 1 / Z over every run it could make, and the bounds it gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, EntropicAnnealing, ImportanceSampling, sandwich
from ppl.models import MarkovChain

LENGTH = 3
PATHS = np.array(list(itertools.product(range(2), repeat=LENGTH)), np.int32)
CHAIN = MarkovChain(jnp.array([0.3, -0.2]), jnp.array([[0.5, -0.5], [-0.3, 0.9]]), LENGTH)
TARGET = (CHAIN**1.5).tilt(
    lambda value: 0.8 * value["tokens"][0] - 0.6 * value["tokens"][-1], twist=lambda state: 0.4 * state["length"]
)


ROUGH = CHAIN.tilt(lambda value: 3.0 * (value["tokens"][0] == value["tokens"][-1]))  # two particles miss it by far


def exact(target=TARGET):
    program = target.program()
    log_density = jax.jit(jax.vmap(lambda path: ppl.log_density(program, {"path": path})))
    return np.asarray(log_density(PATHS), np.float64)


SCHEMES = ["multinomial", "systematic", "stratified", "residual", "ssp", "killing"]


@pytest.mark.parametrize(
    ("scheme", "threshold"), [*((scheme, 1.0) for scheme in SCHEMES), ("multinomial", 0.97), ("killing", 0.97)]
)
def test_conditional_runs_average_to_one_over_z(scheme, threshold):
    densities = np.exp(exact())
    algorithm, runs = SMC(3, resampler=scheme, ess_threshold=threshold), 4000
    drawn = np.random.default_rng(0).choice(len(PATHS), runs, p=densities / densities.sum())
    program = TARGET.program()

    @jax.jit
    def run(keys, paths):
        def one(x):
            posterior = algorithm.conditional_run(program, x[0], {"path": x[1]})
            return posterior.log_evidence, posterior.value["tokens"][0]

        return jax.lax.map(one, (keys, paths), batch_size=1000)

    log_evidence, kept = run(jax.random.split(jax.random.key(1), runs), PATHS[drawn])
    np.testing.assert_array_equal(kept, PATHS[drawn])  # particle 0 is the path
    ratio = densities.sum() / np.exp(np.asarray(log_evidence, np.float64))
    assert abs(ratio.mean() - 1) < 5 * ratio.std(ddof=1) / np.sqrt(runs)


def test_sandwich_holds_log_z():
    densities = np.exp(exact(ROUGH))
    drawn = np.random.default_rng(1).choice(len(PATHS), 150, p=densities / densities.sum())
    bounds = sandwich(ROUGH, SMC(2), {"path": PATHS[drawn]}, num_runs=150)
    log_z = np.log(densities.sum())
    assert bounds.lower - 5 * bounds.lower_error < log_z < bounds.upper + 5 * bounds.upper_error
    assert bounds.gap > 3 * np.hypot(bounds.lower_error, bounds.upper_error)


@pytest.mark.parametrize(
    "algorithm", [ImportanceSampling(4), SMC(4, annealing=EntropicAnnealing(mode="ess"))], ids=["importance", "ePF"]
)
def test_sandwich_wants_an_unbiased_smc(algorithm):
    with pytest.raises(ValueError, match="`algorithm` must be an SMC whose guarantee is unbiased"):
        sandwich(TARGET, algorithm, {"path": PATHS[:1]})


def test_sandwich_names_what_is_missing_or_unknown():
    with pytest.raises(ppl.SiteValueError, match="values are missing for the sites .*path"):
        sandwich(TARGET, SMC(4), {})
    with pytest.raises(ValueError, match="`resampler` must be the name of a scheme"):
        sandwich(TARGET, SMC(4, resampler=lambda key, w, num: jnp.arange(num)), {"path": PATHS[:1]})
    with pytest.raises(ValueError, match="`num_runs` must be at least 2"):
        sandwich(TARGET, SMC(4), {"path": PATHS[:1]}, num_runs=1)
