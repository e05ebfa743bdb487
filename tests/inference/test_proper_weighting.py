"""Law L2, by enumerating all randomness of importance sampling and SMC on tiny programs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, EntropicAnnealing, ImportanceSampling, Lookahead
from tests import enumeration
from tests.enumeration import Finite

ALGORITHMS = {
    "importance": ImportanceSampling(2),
    "every step, systematic": SMC(2, resampler=enumeration.systematic, ess_threshold=1.0),
    "adaptive, systematic": SMC(2, resampler=enumeration.systematic, ess_threshold=0.9),
    "every step, multinomial": SMC(2, resampler=enumeration.multinomial, ess_threshold=1.0),
    "adaptive, multinomial": SMC(2, resampler=enumeration.multinomial, ess_threshold=0.9),
    "annealed to an ESS": SMC(
        2, resampler=enumeration.systematic, ess_threshold=1.0, annealing=EntropicAnnealing(ess=0.97)
    ),
    "adaptive, annealed to an entropy": SMC(
        2, resampler=enumeration.multinomial, ess_threshold=0.95, annealing=EntropicAnnealing(entropy=0.98)
    ),
}
TRANSITION = jnp.array([[0.7, 0.3], [0.2, 0.8]])
EMISSION = jnp.array([[0.9, 0.1], [0.4, 0.6]])


def hidden_markov(proposal=False, weigh=None):
    """Two steps of a hidden Markov chain, with a latent drawn before the loop and used within and after it."""

    weigh = jnp.log(EMISSION) if weigh is None else weigh

    @ppl.model
    def program(observations):
        bias = ppl.sample("bias", Finite(jnp.array([0.25, 0.75])))

        def step(state, y):
            probs = jnp.where(bias == 1, TRANSITION[state], TRANSITION[state][::-1])
            state = ppl.sample("x", Finite(probs), proposal=Finite(jnp.array([0.4, 0.6])) if proposal else None)
            ppl.factor("y", weigh[state, y])
            return state, state

        last, path = ppl.scan(step, jnp.int32(0), observations)
        ppl.factor("after", jnp.where(bias == last, 0.5, -0.25))
        return {"bias": bias, "path": path}

    return program(jnp.array([0, 1]))


def stopping():
    """A loop of at most three steps that a particle leaves when it draws a 1."""

    @ppl.model
    def program():
        def step(state, _):
            x = ppl.sample("x", Finite(jnp.array([0.6, 0.4])))
            ppl.factor("w", jnp.where(x == 1, 0.7, -0.3) * (1 + state["count"]))
            return {"count": state["count"] + 1, "stop": x == 1}, x

        state, xs = ppl.scan(step, {"count": 0, "stop": jnp.array(False)}, length=3, until=lambda s: s["stop"])
        return {"bias": state["count"] % 2, "path": xs}

    return program()


def forbidding():
    """A program in which a quarter of the draws have weight zero."""
    return hidden_markov(weigh=jnp.array([[0.0, -jnp.inf], [-0.5, 0.3]]))


def nested():
    """A loop inside a loop: particles are resampled only between outer iterations."""

    @ppl.model
    def program():
        def outer(state, _):
            def inner(total, _):
                x = ppl.sample("x", Finite(jnp.array([0.3, 0.7])))
                ppl.factor("w", 0.4 * x - 0.1 * total)
                return total + x, x

            total, xs = ppl.scan(inner, state, length=2)
            return total % 2, xs

        last, xs = ppl.scan(outer, jnp.int32(0), length=2)
        return {"bias": last, "path": xs.reshape(-1)}

    return program()


PROGRAMS = {
    "hidden markov": (hidden_markov(), [(2,), (2, 2)]),
    "with a proposal": (hidden_markov(proposal=True), [(2,), (2, 2)]),
    "with forbidden values": (forbidding(), [(2,), (2, 2)]),
    "until": (stopping(), [(2, 2, 2)]),
    "nested loops": (nested(), [(2, 2, 2, 2)]),
}


def assignments(program):
    """Return all values of all sites of a finite program, stacked."""
    staged = program.stage()
    sites = {name: site.shape for name, site in staged.sites.items() if site.kind == "sample"}
    size = sum(int(np.prod(shape)) for shape in sites.values())
    table = np.array(list(itertools.product([0, 1], repeat=size)), np.int32)
    values, place = {}, 0
    for name, shape in sites.items():
        width = int(np.prod(shape))
        values[name] = jnp.asarray(table[:, place : place + width].reshape(-1, *shape))
        place += width
    return values


def exact_integrals(program, tests):
    """Integrate test functions of the value under the program's measure by summing over all traces."""
    values = assignments(program)

    def weigh(sites):
        fixed = ppl.condition(program, sites)
        return ppl.log_density(program, sites), ppl.simulate(fixed).value

    log_densities, returned = jax.vmap(weigh)(values)
    weights = np.exp(np.asarray(log_densities, np.float64))
    # Entries after a loop has stopped are ignored: each trace is met once for every way of filling them.
    filled = jax.vmap(lambda sites: ppl.simulate(ppl.condition(program, sites)).sites)(values)
    keys = np.concatenate([np.asarray(v).reshape(len(weights), -1) for v in filled.values()], axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)
    return [float(np.sum((weights * np.asarray(jax.vmap(f)(returned), np.float64))[first])) for f in tests]


@functools.cache
def integrals(name):
    """The exact integrals of the tests below, once for all algorithms."""
    return exact_integrals(PROGRAMS[name][0], TESTS)


TESTS = [
    lambda v: jnp.float32(1.0),
    lambda v: v["bias"].astype(float),
    lambda v: v["path"][0] * 1.0 + v["path"][-1] * 2.0,
    lambda v: v["bias"] * (v["path"][0] + 0.5) * 1.0,
    lambda v: (v["path"][0] == v["path"][1]) * 1.0,
]


LOOKING_AHEAD = {
    "every step, looking ahead": SMC(
        2, resampler=enumeration.systematic, ess_threshold=1.0, lookahead=Lookahead(defensive=0.2)
    ),
    "adaptive, looking ahead, annealed": SMC(
        2,
        resampler=enumeration.systematic,
        ess_threshold=0.97,
        annealing=EntropicAnnealing(ess=0.98),
        lookahead=Lookahead(),
    ),
}
CASES = [(program, algorithm) for program in PROGRAMS for algorithm in ALGORITHMS]
CASES.remove(("nested loops", "every step, multinomial"))  # 4096 runs; the adaptive one says the same of fewer
CASES += [(program, algorithm) for program in ("hidden markov", "with forbidden values") for algorithm in LOOKING_AHEAD]


@pytest.mark.parametrize("program, algorithm", CASES)
def test_population_is_properly_weighted_in_every_run_it_could_make(program, algorithm):
    exact = integrals(program)
    program, algorithm = PROGRAMS[program][0], (ALGORITHMS | LOOKING_AHEAD)[algorithm]

    @jax.jit
    def run():
        posterior = algorithm(program, jax.random.key(0))
        estimates = jnp.stack([posterior.expectation(f) for f in TESTS])
        return posterior.log_evidence, estimates

    total, expected = 0.0, np.zeros(len(TESTS))
    for probability, (log_evidence, estimates) in enumeration.runs(run):
        total += probability
        if np.isfinite(log_evidence):
            expected += probability * np.exp(float(log_evidence)) * estimates
    assert total == pytest.approx(1.0, abs=1e-9)
    np.testing.assert_allclose(expected, exact, rtol=2e-6, atol=2e-7)
