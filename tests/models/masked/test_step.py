"""Steps of masked diffusion against the definition of every target, transition by transition, and their marginals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.models.masked import LeastEntropy, LeftToRight, MostConfident, Random, Remasking
from ppl.products import product_law

from . import tables
from .tables import ExactTarget, conditionals, model, random_joint, random_table

LENGTH, SIZE = 3, 2
STATES = tables.states(LENGTH, SIZE)
ROWS = 64
JOINT = {name: random_joint(seed, LENGTH, SIZE) for name, seed in (("p", 1), ("q", 2), ("r", 3))}
JOINT["holes"] = random_joint(4, LENGTH, SIZE, forbid=[1, 5])
MODELS = {name: model(conditionals(joint, LENGTH, SIZE), LENGTH, SIZE) for name, joint in JOINT.items()}
MODELS["own way"] = model(random_table(5, LENGTH, SIZE), LENGTH, SIZE)
MODELS["other way"] = model(random_table(6, LENGTH, SIZE), LENGTH, SIZE)

TARGETS = {
    "plain": (("p",), (1.0,)),
    "power": (("p",), (2.5,)),
    "fractional power": (("p",), (0.4,)),
    "product": (("p", "q"), (1.0, 1.0)),
    "product with holes": (("p", "holes"), (1.0, 1.0)),
    "power of zero": (("p", "holes"), (1.0, 0.0)),
    "guide": (("p", "q"), (-0.5, 1.5)),
    "guide away from holes": (("holes", "q"), (-0.5, 1.5)),
    "three": (("p", "q", "r"), (0.5, 1.7, -0.6)),
    "inconsistent": (("own way", "other way"), (1.3, 0.9)),
}
POLICIES = {
    "random": (Random(), tables.independent),
    "uniform": (Random(fixed=True), tables.uniform),
    "left to right": (LeftToRight(), tables.left_to_right),
    "most confident": (MostConfident(), tables.best(tables.confidence)),
    "softly most confident": (MostConfident(0.3), tables.soft(tables.confidence, 0.3)),
    "least entropy": (LeastEntropy(), tables.best(tables.negative_entropy)),
    "softly least entropy": (LeastEntropy(0.5), tables.soft(tables.negative_entropy, 0.5)),
    "blocks": (MostConfident(0.3).blocks(2), tables.soft(tables.confidence, 0.3)),
}
SETTINGS = {
    "one by one": dict(num_steps=3),
    "several at once": dict(num_steps=2),
    "cosine": dict(num_steps=4, schedule="cosine"),
    "remasking": dict(num_steps=4, remask=0.4),
    "loop": dict(num_steps=8, remask=Remasking(0.7, window=(0.65, 0.3))),
}


def processes(names, policy, settings):
    return [MODELS[name].reverse(policy=policy, **settings) for name in names]


@functools.cache
def transitions(factors, powers, policy_name, setting):
    """F(x'|x) and the weight for all x' of many x, as one compiled function of (step, tokens, remasked)."""
    made = processes(factors, POLICIES[policy_name][0], SETTINGS[setting])

    def one(step, tokens, remasked):
        state = {"tokens": tokens} | ({"remasked": remasked} if made[0].plan.remasks else {})
        laws = [process.forward(state, step) for process in made]
        law, log_weight = laws[0].multiply(laws, [jnp.float32(b) for b in powers], powers)
        return jax.vmap(law.log_prob)(STATES), jax.vmap(log_weight)(STATES)

    return made, jax.jit(jax.vmap(one, (None, 0, 0)))


CASES = [
    (target, policy, setting)
    for t, target in enumerate(TARGETS)
    for s, setting in enumerate(SETTINGS)
    for n, policy in enumerate(POLICIES)
    if ("remasking" not in setting and "loop" not in setting or not POLICIES[policy][0].looks)
    and (policy != "blocks" or setting in ("several at once", "cosine"))
    and ((3 * t + 2 * s + n) % 10 == 0 or target == "product with holes" and setting in ("remasking", "loop"))
]


@pytest.mark.parametrize("target, policy, setting", CASES)
def test_proposal_times_weight_is_the_target_of_every_transition(target, policy, setting):
    names, powers = TARGETS[target]
    made, compiled = transitions(names, powers, policy, setting)
    exact = ExactTarget(made, powers, POLICIES[policy][1])
    levels = exact.reached()
    for step in range(made[0].num_steps):
        reached = list(levels[step])
        rows = [reached[i % len(reached)] for i in range(max(ROWS, len(reached)))]  # one shape for all steps
        tokens = np.array([state for state, _ in rows], np.int32)
        remasked = np.array([[at in again for at in range(LENGTH)] for _, again in rows])
        log_law, log_weight = (np.asarray(a, np.float64) for a in compiled(step, tokens, remasked))
        # Where the proposal is at a loss it may draw anything; the weight is then -inf.
        np.testing.assert_allclose(np.exp(log_law).sum(axis=1), 1.0, atol=2e-5)
        with np.errstate(invalid="ignore"):
            drawn = np.where(log_law > -np.inf, np.exp(log_law + log_weight), 0.0)
        for row, key in enumerate(reached):
            expected = np.zeros(len(STATES))
            for new, _, measure in exact.transitions(step, *key):
                expected[tables.code(np.array(new), SIZE)] += measure
            np.testing.assert_allclose(drawn[row], expected, rtol=1e-5, atol=1e-6)


EXACT = [
    (target, policy, setting)
    for t, target in enumerate(TARGETS)
    for n, policy in enumerate(POLICIES)
    for setting in ("one by one", "loop")
    if ((t + n) % 3 == 0 or setting == "loop")
    and target != "inconsistent"
    and policy not in ("random", "blocks")
    and (setting == "one by one" or not POLICIES[policy][0].looks)
]


@pytest.mark.parametrize("target, policy, setting", EXACT)
def test_marginal_of_a_consistent_target_is_the_product_of_powers(target, policy, setting):
    names, powers = TARGETS[target]
    made = processes(names, POLICIES[policy][0], SETTINGS[setting])
    exact = ExactTarget(made, powers, POLICIES[policy][1])
    product = tables.raised([JOINT[name] for name in names], powers)
    np.testing.assert_allclose(exact.marginal(), product, rtol=1e-9, atol=1e-12)


def test_masking_again_really_happens_in_the_loop():
    made = processes(("p",), Random(fixed=True), SETTINGS["loop"])
    exact = ExactTarget(made, (1.0,), tables.uniform)
    assert any(again for level in exact.reached() for _, again in level)
    assert exact.marginal().sum() == pytest.approx(1.0)


@pytest.mark.parametrize("setting", ["one by one", "loop"])
def test_one_factor_to_the_power_one_has_weight_zero(setting):
    names, powers = TARGETS["plain"]
    made, compiled = transitions(names, powers, "random", setting)
    tokens = np.repeat(STATES, 2, axis=0)
    remasked = (tokens == SIZE) & (np.arange(len(tokens))[:, None] % 2 == 1)
    log_law, log_weight = compiled(1, tokens, remasked)
    np.testing.assert_allclose(np.where(np.isfinite(log_law), log_weight, 0.0), 0.0, atol=1e-6)
    law = made[0].forward(made[0].start(), 0)
    assert product_law([law], [1.0], [1.0]) == (law, None)


def test_laws_bring_their_own_products():
    made = processes(("p", "q"), Random(), SETTINGS["one by one"])
    laws = [process.forward(process.start(), 0) for process in made]
    law, log_weight = product_law(laws, [1.0, 1.0], [1.0, 1.0])
    drawn = jnp.array([0, SIZE, SIZE])
    mu = [m.model.table[-1] for m in made]
    assert float(log_weight(drawn)) == pytest.approx(np.log((mu[0][0] * mu[1][0]).sum()), rel=1e-5)
    assert type(law) is type(laws[0])


@pytest.mark.parametrize(
    "policy, remask", [("random", 0.5), ("uniform", 0.5), ("softly most confident", None), ("blocks", None)]
)
def test_draws_follow_the_density(policy, remask):
    process = MODELS["holes"].reverse(4, POLICIES[policy][0], remask=remask)
    num = 10_000

    @jax.jit
    def both(state, step):
        law = process.forward(state, step)
        return law.sample(jax.random.key(0), (num,)), jax.vmap(law.log_prob)(STATES)

    for step, tokens in enumerate(([2, 2, 2], [2, 0, 2])):
        state = {"tokens": jnp.array(tokens)} | ({"remasked": jnp.zeros(3, bool)} if remask else {})
        drawn, log_prob = both(state, step)
        counts = np.bincount(tables.code(np.asarray(drawn), SIZE), minlength=len(STATES))
        expected = np.exp(np.asarray(log_prob, np.float64))
        assert np.all(counts[expected == 0] == 0)
        deviation = np.sqrt(num * expected * (1 - expected)) + 1e-9
        assert np.all(np.abs(counts - num * expected) <= 5 * deviation + 1)


def test_sampled_confidence_keeps_the_likeliest_draws():
    law = MODELS["p"].reverse(3, "sampled_confidence")
    step = law.forward(law.start(), 0)
    drawn = np.asarray(step.sample(jax.random.key(3), (2000,)))
    assert np.all((drawn != SIZE).sum(axis=1) == 1)
    mu = MODELS["p"].table[-1]
    expected = np.zeros(len(STATES))
    for offer in tables.sequences(LENGTH, SIZE):
        sampled = mu[np.arange(LENGTH), offer]
        kept = np.argmax(sampled)
        new = np.where(np.arange(LENGTH) == kept, offer, SIZE)
        expected[tables.code(new, SIZE)] += sampled.prod()
    counts = np.bincount(tables.code(drawn, SIZE), minlength=len(STATES)) / len(drawn)
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(drawn)) + 1e-9)
    assert np.isnan(float(step.log_prob(drawn[0])))
    assert law.guarantee == "heuristic" and MODELS["p"].reverse(3).guarantee == "unbiased"
