"""Kernels out of kernels: exact transition matrices, what parts remember, and what compositions promise."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import (
    HMC,
    MCMC,
    MH,
    Gibbs,
    Langevin,
    Mixture,
    Regenerate,
    Repeat,
    Sequence,
)
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.testing.invariance import transition_matrix
from ppl.trace_space import TraceSpace


@ppl.model
def coins():
    """Two sites that depend on each other, with a factor."""
    a = ppl.sample("a", dist.Bernoulli(probs=0.3))
    b = ppl.sample("b", dist.Bernoulli(probs=jnp.array([0.2, 0.7])[a]))
    ppl.factor("f", 0.8 * a - 0.5 * b * (1 - a))
    return a + b


PROGRAM = coins()
PARTS = {
    "MH": MH(lambda sites: {"a": dist.Bernoulli(probs=jnp.where(sites["b"] == 1, 0.8, 0.4))}),
    "Gibbs": Gibbs("b"),
    "Regenerate": Regenerate("b"),
}
MATRICES = {}


def matrix_of(kernel):
    if kernel not in MATRICES:
        _, pi, MATRICES[kernel] = transition_matrix(PROGRAM, kernel)
        np.testing.assert_allclose(pi @ MATRICES[kernel], pi, atol=1e-6)
    return MATRICES[kernel]


MOVE, DRAW, REDRAW = PARTS.values()


@pytest.mark.parametrize(
    ("first", "second"),
    [("MH", "MH"), ("MH", "Gibbs"), ("Gibbs", "MH"), ("Gibbs", "Regenerate"), ("Regenerate", "MH")],
)
def test_a_sequence_of_two_is_the_product_of_their_matrices(first, second):
    first, second = PARTS[first], PARTS[second]
    np.testing.assert_allclose(matrix_of(Sequence(first, second)), matrix_of(first) @ matrix_of(second), atol=1e-6)


def test_a_mixture_is_the_mean_of_its_parts_matrices():
    mixed = matrix_of(Mixture(MOVE, DRAW, probabilities=[1, 3]))
    np.testing.assert_allclose(mixed, 0.25 * matrix_of(MOVE) + 0.75 * matrix_of(DRAW), atol=1e-6)


def test_parts_look_at_what_others_have_done():
    """Twice in a row: a part that remembers density and presence of an old trace would not leave the posterior."""
    both = matrix_of(MOVE) @ matrix_of(DRAW)
    np.testing.assert_allclose(matrix_of(Repeat(Sequence(MOVE, DRAW), 2)), both @ both, atol=1e-6)
    mixed = 0.5 * matrix_of(MOVE) + 0.5 * matrix_of(DRAW)
    np.testing.assert_allclose(matrix_of(Repeat(Mixture(MOVE, DRAW), 2)), mixed @ mixed, atol=1e-6)


def test_compositions_nest():
    kernel = Mixture(Sequence(DRAW, Repeat(MOVE, 2)), Sequence(Mixture(REDRAW, DRAW), MOVE), probabilities=(0.3, 0.7))
    move, draw, redraw = (matrix_of(part) for part in (MOVE, DRAW, REDRAW))
    expected = 0.3 * draw @ move @ move + 0.7 * (0.5 * redraw + 0.5 * draw) @ move
    np.testing.assert_allclose(matrix_of(kernel), expected, atol=1e-6)
    assert np.all(np.linalg.matrix_power(matrix_of(kernel), 3) > 0)  # irreducible


# What parts are told ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Count(TraceKernel):
    """Moves nothing or one site by nothing, and counts: steps, refreshes, and steps on a trace it has not seen."""

    site: str | None = "a"
    promise: str = "invariant"
    gradient: bool = False

    @property
    def guarantee(self):
        return self.promise

    @property
    def needs_gradient(self):
        return self.gradient

    def prepare(self, program):
        return ppl.condition(program, {}) if self.promise == "invariant" else dataclasses.replace(program, decode=repr)

    def bind(self, space):
        return CountingMoves(self)


class CountingMoves(Moves):
    def __init__(self, kernel):
        self.sites = () if kernel.site is None else (kernel.site,)
        self.sequential = kernel.gradient

    def init(self, key, sites, num_warmup):
        return {"steps": jnp.int32(0), "seen": jnp.int32(0), "told": num_warmup}

    def step(self, key, sites, memory):
        info = {"acceptance": jnp.float32(0.25 if self.sites == ("a",) else 0.75), "own": jnp.float32(2.0)}
        return sites, memory | {"steps": memory["steps"] + 1}, info

    def refresh(self, key, sites, memory):
        return memory | {"seen": memory["seen"] + 1}


def run_of(kernel, num_steps, num_warmup=0):
    """Return the memory after some steps, and the figures of the last one."""
    moves = kernel.bind(TraceSpace(PROGRAM.stage()))
    sites = {"a": jnp.int32(0), "b": jnp.int32(1)}
    memory = moves.init(jax.random.key(0), sites, num_warmup)
    for key in jax.random.split(jax.random.key(1), num_steps):
        sites, memory, info = moves.step(key, sites, memory)
    return memory, info, moves


def test_repeat_refreshes_nothing_and_counts_its_steps_as_warm_up():
    memory, info, _ = run_of(Repeat(Count(), 3), 2, num_warmup=5)
    assert {name: int(value) for name, value in memory.items()} == {"steps": 6, "seen": 0, "told": 15}
    assert float(info["acceptance"]) == 0.25


def test_a_sequence_refreshes_parts_that_others_leave_behind():
    (first, second), info, moves = run_of(Sequence(Count("a"), Count("b")), 4)
    assert int(first["seen"]) == int(second["seen"]) == 4
    assert float(info["acceptance"]) == 0.5 and float(info["acceptance/1"]) == 0.75 and float(info["own/0"]) == 2.0
    assert moves.sites == ("a", "b")
    (first, second), _, _ = run_of(Sequence(Count("a"), Count(None)), 4)
    assert int(first["seen"]) == 0 and int(second["seen"]) == 4


def test_a_mixture_refreshes_a_part_only_when_another_came_before():
    memory, _, moves = run_of(Mixture(Count("a"), Count("b")), 12)
    keys = jax.random.split(jax.random.key(1), 12)
    order = [int(jax.random.categorical(jax.random.split(key, 3)[0], jnp.log(jnp.array([0.5, 0.5])))) for key in keys]
    for i, part in enumerate(memory.parts):
        assert int(part["steps"]) == order.count(i)
        # The first step of all sees what `init` saw.
        assert int(part["seen"]) == sum(a != b == i for a, b in itertools.pairwise(order))
    again = moves.refresh(keys[0], {"a": 0, "b": 1}, memory)
    _, after, _ = moves.step(keys[0], {"a": jnp.int32(0), "b": jnp.int32(1)}, again)
    assert sum(int(part["seen"]) for part in after.parts) == 1 + sum(int(part["seen"]) for part in memory.parts)


def test_parts_of_a_mixture_have_tuned_when_warm_up_ends():
    memory, _, moves = run_of(Mixture(Count("a"), Count("b"), probabilities=[3, 1]), 8, num_warmup=8)
    assert [(int(part["steps"]), part["told"]) for part in memory.parts] == [(6, 6), (2, 2)]
    assert moves.order(8).tolist() == [0, 0, 1, 0, 0, 0, 1, 0]


# What they promise -----------------------------------------------------------------------------------------------


def test_a_composition_promises_the_least_that_a_part_promises():
    assert Sequence(MOVE, HMC(0.1)).guarantee == "invariant"
    assert Sequence(MOVE, Langevin(0.1)).guarantee == "discretised"
    assert Mixture(Repeat(Langevin(0.1), 2), DRAW).guarantee == "discretised"
    assert Repeat(Mixture(Count(promise="heuristic"), MOVE), 2).guarantee == "heuristic"
    assert MCMC(Sequence(MOVE, Langevin(0.1)), 10).guarantee == "discretised"


def test_a_composition_asks_for_what_a_part_asks_for():
    assert not Sequence(MOVE, DRAW).needs_gradient
    assert Sequence(MOVE, Repeat(Count(gradient=True), 2)).needs_gradient
    space = TraceSpace(PROGRAM.stage())
    assert not Sequence(MOVE, DRAW).bind(space).sequential
    assert Mixture(MOVE, Repeat(Count(gradient=True), 2)).bind(space).sequential
    assert Sequence(MOVE, Repeat(Count(promise="heuristic"), 2)).prepare(PROGRAM).decode is repr


def test_compositions_print_as_they_are_written():
    assert repr(Sequence(Gibbs("a"), Repeat(Gibbs("b"), 2))) == (
        "Sequence(Gibbs(sites='a'), Repeat(kernel=Gibbs(sites='b'), num_steps=2))"
    )
    assert repr(Mixture(Gibbs("a"), Gibbs("b"), probabilities=[1, 2])) == (
        "Mixture(Gibbs(sites='a'), Gibbs(sites='b'), probabilities=(1.0, 2.0))"
    )
    assert len({Sequence(DRAW, MOVE), Sequence(DRAW, MOVE), Mixture(DRAW, MOVE)}) == 2


def test_bad_settings_are_refused():
    with pytest.raises(TypeError, match="`Sequence` composes kernels on traces.*got 'NUTS'"):
        Sequence(DRAW, "NUTS")
    with pytest.raises(ValueError, match="`Mixture` needs at least one kernel"):
        Mixture()
    with pytest.raises(ValueError, match="`num_steps` must be at least 1, got 0"):
        Repeat(DRAW, 0)
    with pytest.raises(ValueError, match=r"`probabilities` must be 2 numbers.*got \[1.0\]"):
        Mixture(DRAW, MOVE, probabilities=[1.0])
    with pytest.raises(ValueError, match="`probabilities` must be positive"):
        Mixture(DRAW, MOVE, probabilities=[1.0, 0.0])


def test_compositions_run_as_chains_and_continue():
    kernel = Mixture(MOVE, REDRAW)
    whole = ppl.infer(PROGRAM, MCMC(kernel, 30, 6, 2), seed=3)
    first = ppl.infer(PROGRAM, MCMC(kernel, 10, 6, 2), seed=3)
    rest = ppl.infer(PROGRAM, MCMC(kernel, 20, 6, 2), seed=9, state=first.state)
    joined = np.concatenate([np.reshape(p.sites["a"], (2, -1)) for p in (first, rest)], axis=1)
    np.testing.assert_array_equal(joined, np.reshape(whole.sites["a"], (2, -1)))
