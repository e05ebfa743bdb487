"""Targets of masked diffusion through `ppl.infer`: the whole library's answer against the sum over all sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling
from ppl.inference.voting import MajorityVote
from ppl.models.masked import MostConfident, Random, Remasking
from tests.ppl.checks import assert_mean_within_5_standard_errors, compilations, repeat

from . import tables
from .tables import conditionals, model, random_joint

LENGTH, SIZE = 3, 2
SEQUENCES = tables.sequences(LENGTH, SIZE)
JOINT = {name: random_joint(seed, LENGTH, SIZE, concentration=5.0) for name, seed in (("p", 1), ("q", 2))}
P, Q = (model(conditionals(joint, LENGTH, SIZE), LENGTH, SIZE) for joint in JOINT.values())
LOOP = dict(policy=Random(fixed=True), num_steps=8, remask=Remasking(0.7, window=(0.65, 0.3)))
WAYS = {
    "any order": dict(policy=Random(fixed=True), num_steps=3),
    "softly most confident": dict(policy=MostConfident(0.5), num_steps=3),
    "most confident": dict(policy="most_confident", num_steps=3),
    "loop": LOOP,
}


def reward(value):
    return 0.8 * value["tokens"][0] - 0.5 * value["tokens"][1] * value["tokens"][2]


def guess(state):
    """A twist that is far from the reward's expectation."""
    return 0.4 * jnp.sum(jnp.where(state["masked"], 0, state["tokens"])) - 0.2 * jnp.sum(state["masked"])


REWARD = 0.8 * SEQUENCES[:, 0] - 0.5 * SEQUENCES[:, 1] * SEQUENCES[:, 2]
p, q = JOINT["p"], JOINT["q"]
TARGETS = {
    "plain": (lambda a, b: a, p),
    "annealed": (lambda a, b: a**1.7, p**1.7),
    "product": (lambda a, b: a * b, p * q),
    "guided": (lambda a, b: ppl.guide(a, b, weight=1.4), p**-0.4 * q**1.4),
    "tilted": (lambda a, b: a.tilt(reward, twist=guess), p * np.exp(REWARD)),
    "nested": (lambda a, b: ((a * b).tilt(reward) ** 0.8) * b, (p * q * np.exp(REWARD)) ** 0.8 * q),
}
CASES = [
    (t, w) for i, t in enumerate(TARGETS) for j, w in enumerate(WAYS) if (i + j) % 3 == 0 or w == "loop" and i in (1, 5)
]


def measure(posterior):
    """The weighted share of every sequence, times the evidence."""
    places = posterior.value["tokens"] @ jnp.array([4, 2, 1])
    shares = jnp.sum(jax.nn.one_hot(places, 8) * posterior.weights[:, None], axis=0)
    return jnp.exp(posterior.log_evidence) * shares


@pytest.mark.parametrize("target, way", CASES)
def test_smc_is_unbiased_for_the_measure_of_finished_sequences(target, way):
    make, exact = TARGETS[target]
    program = make(P.reverse(**WAYS[way]), Q.reverse(**WAYS[way])).program()
    estimates = repeat(program, SMC(32, ess_threshold=0.7), measure, 150)
    assert_mean_within_5_standard_errors(estimates, exact, f"{target}, {way}")


def test_the_evidence_of_a_model_alone_is_one():
    posterior = ppl.infer(P.reverse(3), ImportanceSampling(16))
    assert float(posterior.log_evidence) == pytest.approx(0.0, abs=1e-6)
    assert posterior.value["tokens"].shape == (16, LENGTH)
    assert posterior.value["tokens"].dtype == jnp.int32 and int(posterior.value["tokens"].max()) < SIZE
    assert posterior.guarantee == "unbiased"


def test_density_of_a_path_is_the_product_of_its_choices():
    """`log_density` of a written path: sets by the uniform policy, tokens by the denoiser to the powers."""
    a, b = (m.reverse(3, Random(fixed=True)) for m in (P, Q))
    path = np.array([[2, 1, 2], [0, 1, 2], [0, 1, 1]], np.int32)
    states = np.array([[2, 2, 2], [2, 1, 2], [0, 1, 2]])
    positions = [1, 0, 2]
    mu = [
        [m.table[tables.code(x, SIZE), at, path[-1, at]] for x, at in zip(states, positions, strict=True)]
        for m in (P, Q)
    ]
    sets = np.log(1 / 3) + np.log(1 / 2)
    for program, expected in ((a, np.log(mu[0]).sum()), (a * b**2, np.log(mu[0]).sum() + 2 * np.log(mu[1]).sum())):
        found = ppl.log_density(ppl.condition(program.program(), {}), {"path": path})
        assert float(found) == pytest.approx(sets + expected, rel=1e-5)


def test_a_process_runs_inside_a_model():
    @ppl.model
    def pair():
        first = ppl.generate(P.reverse(3), name="first")["tokens"]
        second = ppl.generate(Q.reverse(3), name="second")["tokens"]
        ppl.factor("agree", jnp.where(jnp.all(first == second), 0.0, -jnp.inf))
        return first

    posterior = ppl.infer(pair(), SMC(4000, ess_threshold=0.0))
    alike = [tables.ExactTarget([m.reverse(3)], (1.0,), tables.independent).marginal() for m in (P, Q)]
    agreement = float(np.sum(alike[0] * alike[1]))
    assert abs(np.exp(posterior.log_evidence) - agreement) < 5 * np.sqrt(agreement * (1 - agreement) / 4000)


def test_a_replaced_proposal_is_weighed():
    flat = model(tables.random_table(9, LENGTH, SIZE), LENGTH, SIZE).reverse(3)

    def instead(law, state):
        return flat.forward({"tokens": state["tokens"]}, law.step)

    program = (P.reverse(3).tilt(reward)).propose(instead).program()
    estimates = repeat(program, SMC(32), measure, 150)
    assert_mean_within_5_standard_errors(estimates.sum(axis=1), _sum_over_independent_steps(), "proposal")


def _sum_over_independent_steps():
    """The tilted target's evidence where several positions may be unmasked at once."""
    exact = tables.ExactTarget([P.reverse(3)], (1.0,), tables.independent)
    return (exact.marginal() * np.exp(REWARD)).sum()


def test_block_schedules_vote():
    """HEX: one model under several block schedules, the most frequent answer."""
    members = [P.reverse(3, Random(fixed=True).blocks(size)) for size in (1, 3)]
    vote = MajorityVote(lambda value: int(value["tokens"].sum()), members[1:], SMC(500))
    posterior = ppl.infer(members[0], vote)
    shares = np.bincount(SEQUENCES.sum(axis=1), p)
    answers, votes = posterior.diagnostics["answers"], posterior.diagnostics["votes"]
    expected = shares[list(answers)]
    assert np.all(np.abs(votes - expected) <= 5 * np.sqrt(expected * (1 - expected) / 1000))
    assert answers[0] == int(np.argmax(shares)) and np.isnan(float(posterior.log_evidence))


def test_another_power_compiles_nothing():
    a, b = P.reverse(3), Q.reverse(3)
    ppl.infer(a**1.3 * b, SMC(8))
    with compilations() as names:
        ppl.infer(a**1.4 * b, SMC(8), seed=2)
    assert not names


def test_processes_that_unfold_differently_are_not_multiplied():
    with pytest.raises(ValueError, match="policy"):
        P.reverse(3) * Q.reverse(3, "most_confident")
    with pytest.raises(ValueError, match="steps"):
        P.reverse(3) * Q.reverse(4)
    short = model(tables.random_table(1, 2, SIZE), 2, SIZE)
    with pytest.raises(ValueError, match="length"):
        P.reverse(3) * short.reverse(3)
    with pytest.raises(ValueError, match="vocabulary"):
        P.reverse(3) * model(tables.random_table(1, LENGTH, 3), LENGTH, 3).reverse(3)
    with pytest.raises(ValueError, match="cannot be constrained .* Tilt by a reward"):
        P.reverse(3).constrain("a+")


def test_a_policy_that_looks_at_draws_makes_the_run_heuristic():
    process = P.reverse(3, "sampled_confidence")
    for target in (process, process**2.0):
        posterior = ppl.infer(target, SMC(8))
        assert posterior.guarantee == "heuristic" and np.isnan(float(posterior.log_evidence))
        assert int(posterior.value["tokens"].max()) < SIZE
