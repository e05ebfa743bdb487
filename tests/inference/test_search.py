"""Searches: their budgets counted by the network itself, their results against plain Python and known optima."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions
import optax
import pytest

import ppl
from ppl.inference import ImportanceSampling
from ppl.inference.search import NoiseOptimization, PathSearch, RandomSearch, RolloverSearch, ZeroOrderSearch
from ppl.inference.search.sampler import Sampler, Walk
from ppl.models import (
    Diffusion,
    GaussianMixture,
    MarkovChain,
    RectifiedFlow,
    Regex,
    VarianceExploding,
    VariancePreserving,
)
from tests.ppl.checks import assert_close, assert_equal, compilations, finished

MEANS = np.array([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]])
GOAL = jnp.array([2.0, 2.0])
SCHEDULE = VarianceExploding(0.01, 4.0)
ALL = [
    RandomSearch(60),
    ZeroOrderSearch(60, over="all"),
    PathSearch(60),
    RolloverSearch(60),
    NoiseOptimization(60, over="all"),
]
NOISE = [search for search in ALL if not isinstance(search, RandomSearch)]
ids = dict(ids=lambda search: type(search).__name__)


def reward(x):
    return -jnp.sum((x - GOAL) ** 2)


@functools.cache
def model(schedule=SCHEDULE, shift=0.0, alone=False, scale=0.5):
    means = np.array([[0.5, 0.5]]) if alone else MEANS + shift
    return GaussianMixture(means, scale).diffuse(schedule)


def sampler(num_steps=6, churn=1.0, **changes):
    return model(**changes).reverse(num_steps, churn=churn)


def network(denoiser, shape=(2,), schedule=SCHEDULE):
    """A model of a denoiser, its error said beforehand so that nothing is run to measure it."""
    return Diffusion(denoiser, shape, schedule, "x0", error=(np.array([-3.0, 3.0]), np.array([0.01, 0.5])))


CALLS = []
BOTH = ["origin", "path"]


def counted(x, t):
    jax.debug.callback(lambda x: CALLS.append(x), x)
    return jnp.tanh(x) * t + 0.5 * jnp.sin(x)


def calls_of(target, search):
    CALLS.clear()
    posterior = finished(ppl.infer(target, search))
    jax.effects_barrier()
    return len(CALLS), posterior.diagnostics["network_calls"]


# Budgets.


@pytest.mark.parametrize(
    ("search", "churn"),
    [
        *((search, 1.0) for search in ALL),
        (RandomSearch(61, batch_size=4), 0.0),
        (PathSearch(62, num_branches=2), 0.0),
        (RolloverSearch(61, num_kept=2, num_starts=3), 0.5),
        (NoiseOptimization(63, num_starts=2, rematerialise=False), 0.0),
        (NoiseOptimization(64), 0.0),
    ],
)
def test_network_calls_are_those_that_the_network_counts(search, churn):
    target = network(counted).reverse(4, churn=churn).tilt(reward)
    counted_calls, reported = calls_of(target, search)
    assert counted_calls == reported <= search.budget


def test_network_calls_of_heun_steps_from_pure_noise_are_those_that_the_network_counts():
    target = network(counted, schedule=RectifiedFlow()).reverse(4, churn=0.0).tilt(reward)
    for search in (RandomSearch(20), ZeroOrderSearch(60)):
        counted_calls, reported = calls_of(target, search)
        assert counted_calls == reported == 6 * (reported // 6)  # a start, and 1, 2, 2 and 0 calls


@pytest.mark.parametrize("search", [RandomSearch(40), PathSearch(60), RolloverSearch(40)], **ids)
def test_network_calls_of_guidance_count_both_networks(search):
    first, second = (network(counted).reverse(4) for _ in range(2))
    target = ppl.guide(first, second, weight=2.0).tilt(reward)
    counted_calls, reported = calls_of(target, search)
    assert counted_calls == reported <= search.budget


def test_rollover_spends_its_budget_to_the_last_call():
    assert ppl.infer(sampler(5).tilt(reward), RolloverSearch(53)).diagnostics["network_calls"] == 53


@pytest.mark.parametrize(
    ("search", "needed"),
    [
        (RandomSearch(1), 6),
        (ZeroOrderSearch(1), 6),
        (PathSearch(1), 3 + 2 * 4 * (1 + 3) - 4),
        (RolloverSearch(1), 6),
        (NoiseOptimization(1, num_starts=3), 18),
    ],
    **ids,
)
def test_a_budget_too_small_says_what_is_needed_and_that_is_enough(search, needed):
    target = sampler(6).tilt(reward)
    if isinstance(search, PathSearch):
        search = dataclasses.replace(search, start=0.5, forward=1 / 3, backward=0.5)
        # 4 calls for 3 steps; each round 4 branches, one call to place each and 3 steps; the last step calls nothing
        needed = 4 + 4 * (1 + 3) * 3 - 4
    with pytest.raises(ValueError, match=rf"`budget` must be at least {needed} network calls .* got 1\."):
        ppl.infer(target, search)
    enough = dataclasses.replace(search, budget=needed)
    assert ppl.infer(target, enough).diagnostics["network_calls"] == needed
    with pytest.raises(ValueError, match=f"at least {needed} "):
        ppl.infer(target, dataclasses.replace(search, budget=needed - 1))


# What every search promises.


@pytest.mark.optimized
@pytest.mark.parametrize("search", ALL, **ids)
def test_posterior_is_sorted_traced_deterministic_and_compiled_once(search):
    search = dataclasses.replace(search, budget=130, num_kept=2, **(
        {"num_starts": 2} if isinstance(search, NoiseOptimization) else {}
    ))  # fmt: skip
    target = sampler().tilt(reward)
    posterior = ppl.infer(target, search, seed=3)
    seen = posterior.diagnostics
    assert posterior.guarantee == "heuristic" and np.isnan(posterior.log_evidence)
    assert posterior.value.shape == (2, 2) and float(posterior.ess) == pytest.approx(2.0)
    assert_close(seen["kept_rewards"], jax.vmap(reward)(posterior.value))
    assert seen["kept_rewards"][0] >= seen["kept_rewards"][1]
    assert np.all(np.diff(seen["rewards"]) >= 0) and np.all(np.diff(seen["calls"]) >= 0)
    assert seen["rewards"].shape == seen["calls"].shape and seen["calls"][-1] == seen["network_calls"]
    if not isinstance(search, PathSearch | RolloverSearch):  # those also see guesses
        assert seen["rewards"][-1] == seen["kept_rewards"][0]
    assert_equal(posterior.value, ppl.infer(target, search, seed=3).value)
    other = sampler(shift=0.5).tilt(reward) ** 1.0
    with compilations() as compiled:
        different = finished(ppl.infer(other, search, seed=4).value)
    assert not compiled
    assert not np.array_equal(different, posterior.value)
    assert "heuristic" in repr(posterior)


@pytest.mark.parametrize("search", [RandomSearch(20), RolloverSearch(20)], **ids)
def test_search_runs_under_jit_and_vmap_of_the_user(search):
    target = sampler(4).tilt(reward)
    keys = jax.random.split(jax.random.key(0), 2)
    values = jax.jit(jax.vmap(lambda key: ppl.infer(target, search, key=key).value))(keys)
    alone = [ppl.infer(target, search, key=key).value for key in keys]
    assert_close(values, jnp.stack(alone))


@pytest.mark.parametrize("search", NOISE, **ids)
def test_weights_of_networks_and_rewards_are_arguments_of_the_compiled_run(search):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3000)), jnp.float32)
    process = network(lambda x, t: jnp.tanh(x @ weights) @ weights.T / 3000).reverse(4)
    scorer = jax.jit(lambda x: -jnp.sum(jnp.tanh((x - GOAL) @ weights) ** 2))
    text = search.lower(process.tilt(scorer)).as_text()
    assert "2x3000xf32" in text and not re.search(r"dense<[^>]{10000,}>", text)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("search", "improvement"),
    [
        (RandomSearch(12), 1.0),
        (ZeroOrderSearch(12, over="all"), 1.0),
        (PathSearch(52, num_branches=2), 0.5),
        (RolloverSearch(12), 0.5),
        (NoiseOptimization(12, over="all"), 1.0),
    ],
    **ids,
)
def test_a_larger_budget_finds_higher_rewards(search, improvement):
    target = sampler().tilt(reward)
    keys = jax.random.split(jax.random.key(1), 64)

    def best(budget):
        larger = dataclasses.replace(search, budget=budget)
        run = lambda key: ppl.infer(target, larger, key=key).diagnostics["kept_rewards"][0]  # noqa: E731
        return np.asarray(jax.jit(lambda keys: jax.lax.map(run, keys))(keys))

    gain = best(12 * search.budget) - best(search.budget)
    z = (gain.mean() - improvement) / (gain.std(ddof=1) / np.sqrt(len(gain)))
    assert z > 0, (gain.mean(), z)
    if isinstance(search, ZeroOrderSearch | NoiseOptimization):  # a longer run continues the shorter one
        assert np.all(gain >= -1e-5)


# Each search.


def test_random_search_is_the_best_of_plain_draws_with_the_same_key():
    process = sampler()
    drawn = [ppl.infer(process, ImportanceSampling(n), key=jax.random.fold_in(jax.random.key(5), b), keep=BOTH)
             for b, n in enumerate((4, 4, 2))]  # fmt: skip
    sites = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(run.sites for run in drawn))
    drawn = jnp.concatenate([run.value for run in drawn])
    rewards = jax.vmap(reward)(drawn)
    order = jnp.argsort(-rewards)
    found = ppl.infer(process.tilt(reward), RandomSearch(65, num_kept=6, batch_size=4), seed=5, keep=BOTH)
    assert_close(found.value, drawn[order[:6]])
    assert_close(found.sites, jax.tree.map(lambda values: values[order[:6]], sites))
    assert {name: mask.shape for name, mask in found.present.items()} == {"origin": (6,), "path": (6, 6)}
    assert_close(found.diagnostics["rewards"], jnp.array([rewards[: i + 1].max() for i in range(10)]))


def test_random_search_of_tokens_takes_constraints_and_host_rewards():
    rng = np.random.default_rng(0)
    chain = MarkovChain(rng.normal(size=3), rng.normal(size=(3, 3)), 4)
    prefer = ppl.host(lambda values: np.asarray(values["tokens"]).sum(axis=1))
    target = chain.constrain(Regex("a[a-c]*")).tilt(prefer)
    found = ppl.infer(target, RandomSearch(400, num_kept=5), seed=1)
    tokens = np.asarray(found.value["tokens"])
    assert np.all(tokens[:, 0] == 0) and tokens[0].tolist() == [0, 2, 2, 2]
    assert found.diagnostics["kept_rewards"].tolist() == tokens.sum(1).tolist()
    assert found.diagnostics["network_calls"] == 400


def test_zero_order_search_is_hill_climbing_over_its_neighbours():
    search = ZeroOrderSearch(6 * 9, num_kept=3, num_neighbours=4, radius=0.4, over="all")
    target = sampler().tilt(reward)
    made = Sampler(target, frozenset(BOTH))
    start_key, step_key, round_key = jax.random.split(jax.random.key(7), 3)
    pivot, run = (
        (made.start_noise(start_key, 1)[0], made.step_noise(step_key, 6)),
        jax.jit(made.run),
    )
    seen = [run(*pivot)]
    highest = reward(seen[0].value)
    for index in range(2):
        a, b = jax.random.split(jax.random.fold_in(round_key, index))
        near = [
            np.sqrt(1 - 0.4**2) * z + 0.4 * jax.random.normal(key, (4, *z.shape))
            for z, key in zip(pivot, (a, b), strict=True)
        ]
        for i in range(4):
            seen.append(run(near[0][i], near[1][i]))
        rewards = [float(reward(x.value)) for x in seen[-4:]]
        if max(rewards) > highest:
            highest = max(rewards)
            pivot = tuple(z[int(np.argmax(rewards))] for z in near)
    best = sorted(seen, key=lambda x: -float(reward(x.value)))[:3]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *best)
    found = ppl.infer(target, search, seed=7, keep=BOTH)
    assert_close(found.value, expected.value)
    assert_close(found.sites, expected.sites)


def test_neighbours_of_zero_order_search_have_the_starts_law():
    target = sampler().tilt(reward)
    made = Sampler(target)
    search = ZeroOrderSearch(60, num_neighbours=1, radius=0.5)

    def one(key):
        a, b = jax.random.split(key)
        z = made.start_noise(a, 1)[0]
        return z, search._neighbours(made, (z, None), b)[0][0]

    z, near = jax.vmap(one)(jax.random.split(jax.random.key(0), 20_000))
    size = z.size
    assert abs(float(jnp.mean(near**2)) - 1) < 5 * np.sqrt(2 / size)
    assert abs(float(jnp.mean(z * near)) - np.sqrt(0.75)) < 5 * np.sqrt((1 + 0.75) / size)


def test_path_search_is_the_best_branch_of_the_best_branch():
    target = sampler(4).tilt(reward)
    made = Sampler(target, frozenset(BOTH))
    step = jax.jit(made.step)
    search = PathSearch(1000, num_branches=3, start=0.5, forward=0.25, backward=0.5, num_paths=2)
    noise_key, first_key, round_key, last_key = jax.random.split(jax.random.key(2), 4)

    def steps(states, first, count, key):
        for j, k in enumerate(jax.random.split(key, count)):
            z = made.step_noise(k, len(states))
            states = [step(s, z[i], jnp.int32(first + j)) for i, s in enumerate(states)]
        return states

    states = steps([made.start(z) for z in made.start_noise(noise_key, 2)], 0, 2, first_key)
    for position, key in zip((2, 3), jax.random.split(round_key, 2), strict=True):
        a, b = jax.random.split(key)
        z = made.start_noise(a, 6)
        branches = [made.renoise(states[i // 3], z[i], position, position - 1) for i in range(6)]
        branches = steps(branches, position - 1, 2, b)
        branches.sort(key=lambda s: -float(reward(s.states[0]["denoised"])))
        states = branches[:2]
    expected = max(states, key=lambda s: float(reward(s.states[0]["x"])))
    found = ppl.infer(target, search, seed=2, keep=BOTH)
    assert_close(found.value[0], expected.states[0]["x"])
    assert_close({name: values[0] for name, values in found.sites.items()}, expected.drawn)
    # The rounds go from step 2 back to 1 and from 3 back to 2: what stands for steps 1 and 2 is what was renoised.
    assert_close(found.sites["path"][0, -1], found.value[0])


@pytest.mark.parametrize("schedule", [SCHEDULE, VariancePreserving(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_renoising_takes_the_law_of_one_level_to_that_of_a_noisier_one(schedule):
    process = sampler(8, schedule=schedule, alone=True, scale=0.7)
    made = Sampler(process.tilt(reward))

    def moved(x, z, down, up):
        return made.renoise(Walk([{"x": x, "denoised": x}], {}), z, down, up).states[0]["x"]

    for down, up in ((8, 7), (5, 1), (3, 0)):
        here, there = process.level(down), process.level(up)
        centre = moved(here.alpha * jnp.full(2, 0.5), jnp.zeros(2), down, up)
        np.testing.assert_allclose(centre, there.alpha * 0.5, atol=1e-5)
        by_x = jax.jacobian(lambda x: moved(x, jnp.zeros(2), down, up))(jnp.zeros(2))[0, 0]  # noqa: B023
        by_z = jax.jacobian(lambda z: moved(jnp.zeros(2), z, down, up))(jnp.zeros(2))[0, 0]  # noqa: B023
        variance = by_x**2 * (here.alpha**2 * 0.49 + here.sigma**2) + by_z**2
        np.testing.assert_allclose(variance, there.alpha**2 * 0.49 + there.sigma**2, rtol=1e-5)


@pytest.mark.parametrize(("num_steps", "budget", "num_starts"), [(6, 30, 5), (6, 33, 1), (2, 9, 2), (1, 4, 4)])
def test_rollover_follows_the_plain_rules_on_the_same_proposals(num_steps, budget, num_starts):
    target = sampler(num_steps).tilt(reward)
    made = Sampler(target, frozenset(BOTH))
    start, step_by = jax.jit(made.start), jax.jit(made.step)
    for seed in range(3):
        key = jax.random.split(jax.random.key(seed), 1)[0]
        start_key, proposal_key, last_key = jax.random.split(key, 3)
        starts = [start(z) for z in made.start_noise(start_key, num_starts)]
        seen = [float(reward(s.states[0]["denoised"])) for s in starts]
        best, states = max(seen), starts[int(np.argmax(seen))]
        quota = share = (budget - num_starts) // max(num_steps - 1, 1)
        total, left, accepted = 0, budget - num_starts, 0
        for step in range(num_steps - 1):
            if step == num_steps - 2:
                quota = left
            proposals, leftover = [], 0
            while len(proposals) < quota:
                z = made.step_noise(jax.random.fold_in(proposal_key, total), 1)[0]
                proposals.append(step_by(states, z, jnp.int32(step)))
                seen.append(float(reward(proposals[-1].states[0]["denoised"])))
                total, left = total + 1, left - 1
                if seen[-1] > best:
                    best, accepted = seen[-1], accepted + 1
                    if step < num_steps - 2:
                        leftover = quota - len(proposals)
                        break
            states = max(proposals, key=lambda s: float(reward(s.states[0]["denoised"])))
            quota = share + leftover
        walk = step_by(states, made.step_noise(last_key, 1)[0], jnp.int32(num_steps - 1))
        found = ppl.infer(target, RolloverSearch(budget, num_starts=num_starts), seed=seed, keep=BOTH)
        assert_close(found.value[0], walk.states[0]["x"])
        assert_close({name: values[0] for name, values in found.sites.items()}, walk.drawn)
        assert_close(found.diagnostics["rewards"], np.maximum.accumulate(seen))
        assert len(seen) == (budget if num_steps > 1 else num_starts)


@pytest.mark.parametrize(("churn", "over"), [(0.0, "start"), (1.0, "start"), (1.0, "all")])
def test_gradient_of_noise_optimisation_is_that_of_finite_differences(churn, over):
    with jax.enable_x64(True):
        search = NoiseOptimization(100, over=over, regulariser=0.3)
        process = GaussianMixture(MEANS, 0.5).diffuse(SCHEDULE).reverse(4, variance="posterior", churn=churn)
        made = Sampler(process.tilt(reward))
        rng = np.random.default_rng(0)
        noise = jnp.asarray(rng.normal(size=made.shape)), jnp.asarray(rng.normal(size=(4, *made.step_shape)))
        searched = noise if over == "all" else noise[:1]
        objective = jax.jit(lambda *z: search.objective(made, (*z, *noise[len(z) :]))[0])
        gradients = jax.grad(objective, tuple(range(len(searched))))(*searched)
        for place, gradient in enumerate(gradients):
            for index in np.ndindex(gradient.shape):
                bump = jnp.zeros(gradient.shape).at[index].set(1e-5)
                up, down = (
                    objective(*(z + s * bump if i == place else z for i, z in enumerate(searched))) for s in (1, -1)
                )
                assert float(gradient[index]) == pytest.approx(float(up - down) / 2e-5, rel=1e-6, abs=1e-7)


def test_regulariser_is_the_log_density_of_the_noises_length():
    made = Sampler(sampler(4, churn=0.0).tilt(lambda x: jnp.float32(0.0)))
    search = NoiseOptimization(100, regulariser=2.0)
    z = jnp.array([0.3, -1.2])
    length = float(jnp.linalg.norm(z))
    value, _ = search.objective(made, (z, jnp.zeros(4)))
    assert float(value) == pytest.approx(2.0 * (np.log(length) - length**2 / 2), rel=1e-5)


def test_rematerialised_steps_need_less_memory_for_the_same_result():
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(16, 1024)) / 16, jnp.float32)
    target = network(lambda x, t: jnp.tanh(jnp.tanh(x @ weights) @ weights.T), (16,)).reverse(32, churn=0.0)
    target = target.tilt(lambda x: -jnp.sum((x - 1.0) ** 2))
    searches = [NoiseOptimization(600), NoiseOptimization(600, rematerialise=False)]
    memory = [s.lower(target).compile().memory_analysis().temp_size_in_bytes for s in searches]
    assert memory[1] > 32 * 1024 * 4, memory  # what a network's hidden layer takes, at each step
    assert memory[0] < memory[1] / 4, memory
    kept, thrown = (Sampler(target).run, lambda *z: Sampler(target).run(*z, rematerialise=True))
    z = jnp.asarray(rng.normal(size=16), jnp.float32), jnp.zeros(32)
    assert_close(*(jax.jit(jax.grad(lambda z, s, run=run: run(z, s).value.sum()))(*z) for run in (kept, thrown)))


@pytest.mark.optimized
def test_noise_optimisation_reaches_the_known_optimum():
    process = sampler(8, churn=0.0, alone=True)  # the value is linear in the noise
    search = NoiseOptimization(
        15 * 2 * 150, num_kept=2, num_starts=2, optimiser=optax.adam(optax.cosine_decay_schedule(0.3, 75))
    )
    found = ppl.infer(process.tilt(reward), search)
    np.testing.assert_allclose(found.value, np.tile(GOAL, (2, 1)), atol=0.05)
    held = ppl.infer(sampler(8, alone=True).tilt(reward), dataclasses.replace(search, over="all"))
    np.testing.assert_allclose(held.value, np.tile(GOAL, (2, 1)), atol=0.05)


# What they keep.


@pytest.mark.optimized
def test_noise_that_was_found_leads_to_the_value_again():
    target = sampler(4, churn=0.0).tilt(reward)  # all is decided by the origin
    made = Sampler(target, frozenset(BOTH))
    found = finished(ppl.infer(target, NoiseOptimization(200, num_kept=2, num_starts=3), keep=["origin"]))
    assert set(found.sites) == {"origin"}
    assert_equal(found.present["origin"], jnp.ones(2, bool))
    law = made._origin()
    again = jax.vmap(made.run, (0, None))((found.sites["origin"] - law.loc) / law.squared_scale**0.5, jnp.zeros((4,)))
    np.testing.assert_allclose(again.value, found.value, atol=1e-3)
    held = ppl.condition(target, {"origin": found.sites["origin"][0], "path": again.sites["path"][0]})
    np.testing.assert_allclose(ppl.simulate(held).value, found.value[0], atol=1e-3)


def test_path_search_keeps_a_path_that_the_steps_can_take():
    """Where a step is certain, every x of the path but the renoised ones follows from the x before."""
    target = sampler(8, churn=0.0).tilt(reward)
    made = Sampler(target)
    found = ppl.infer(target, PathSearch(100, start=0.5, forward=0.25, backward=0.5), keep=["origin", "path"])
    xs = jnp.concatenate([found.sites["origin"], found.sites["path"][0]])
    follows = [
        bool(jnp.allclose(made._stepped([made.processes[0].placed(x, k)], (), jnp.int32(k))[0]["x"], after, atol=1e-4))
        for k, (x, after) in enumerate(zip(xs, xs[1:], strict=False))
    ]
    # Two rounds go from steps 4 and 6 back to 2 and 4: the last replacements stand.
    assert follows == [True, False, True, False, True, True, True, True]


class Halting(ppl.Process):
    """Doubles until a coin falls on heads; every step calls a network, which counts."""

    num_steps = 12

    def __init__(self, chance):
        self.chance = jnp.float32(chance)

    def start(self):
        return {"sum": jnp.float32(0.0), "ended": jnp.bool_(False)}

    def forward(self, state, step):
        jax.debug.callback(lambda x: CALLS.append(x), state["sum"])
        return numpyro.distributions.Bernoulli(self.chance)

    def advance(self, state, drawn, step):
        return {"sum": state["sum"] + 1, "ended": drawn == 1}

    def ended(self, state):
        return state["ended"]

    def finish(self, state, path):
        return state["sum"]


@pytest.mark.parametrize(("chance", "batch_size"), [(0.5, None), (0.5, 1), (0.5, 4), (0.9, 3), (0.0, 4), (1.0, 4)])
def test_calls_of_generations_that_end_early_are_those_that_the_network_counts(chance, batch_size):
    target = Halting(chance).tilt(lambda value: value)
    search = RandomSearch(12 * 10, batch_size=batch_size)
    counts, told = calls_of(target, search)
    assert counts == told <= 12 * 10
    if chance == 1.0:
        assert told == 10
    if batch_size == 1:  # nobody waits for anybody
        lengths = ppl.infer(target, dataclasses.replace(search, num_kept=10), seed=3)
        assert lengths.diagnostics["network_calls"] == float(jnp.sum(lengths.value))
        assert_equal(lengths.diagnostics["calls"][-1], lengths.diagnostics["network_calls"])


def test_random_search_keeps_where_a_generation_has_ended():
    target = Halting(0.5).tilt(lambda value: value)
    found = ppl.infer(target, RandomSearch(12 * 10, num_kept=10), keep=["path"])
    assert_equal(found.present["path"].sum(1), found.value)
    assert_equal(found.sites["path"].sum(1), (found.value < 12) | (found.sites["path"][:, -1] == 1))


# What they refuse.


@pytest.mark.parametrize("search", ALL, **ids)
def test_a_target_without_what_a_search_needs_is_refused(search):
    process = sampler(4)
    name = type(search).__name__
    with pytest.raises(ValueError, match=rf"{name} needs a reward .* sampler\.tilt\(log_reward\)"):
        ppl.infer(process, search)
    with pytest.raises(ValueError, match="weigh_steps has no place"):
        ppl.infer(process.tilt(reward).weigh_steps(lambda state: 0.0), search)
    with pytest.raises(TypeError, match=f"{name} searches the generations of a process"):
        ppl.infer(ppl.model(lambda: ppl.sample("x", process.origin()))(), search)
    with pytest.raises(ppl.SiteValueError, match=r"`keep` names \['paht'\]"):
        ppl.infer(process.tilt(reward), search, keep=["paht"])
    with pytest.raises(ValueError, match="has nothing to continue"):
        ppl.infer(process.tilt(reward), search, state=1)
    with pytest.raises(ValueError, match=r"\['origin'\] .* are conditioned"):
        ppl.infer(ppl.condition(process.tilt(reward).program(), {"origin": jnp.zeros(2)}), search)
    for everywhere, error in ((jnp.nan, ppl.InvalidWeight), (-jnp.inf, ppl.AllParticlesDied)):
        level = jnp.float32(everywhere)  # another value compiles nothing
        with pytest.raises(error, match="reward"):
            ppl.infer(process.tilt(lambda x: jnp.where(x[0] < 1e9, level, x[0])), search)  # noqa: B023


@pytest.mark.parametrize("search", NOISE, **ids)
def test_processes_without_noise_are_refused(search):
    chain = MarkovChain(np.zeros(3), np.zeros((3, 3)), 4).tilt(lambda value: value["tokens"].sum() * 1.0)
    with pytest.raises(TypeError, match="needs processes with noise levels, those of diffusions; got <MarkovChain"):
        ppl.infer(chain, search)


def test_rewards_without_a_gradient_are_refused_only_where_it_is_needed():
    black_box = sampler(4).tilt(ppl.host(lambda x: -np.sum((x - np.asarray(GOAL)) ** 2, axis=-1)))
    for search in (ZeroOrderSearch(40), PathSearch(60), RolloverSearch(40)):
        found = ppl.infer(black_box, search, seed=1)
        assert_close(found.value, ppl.infer(sampler(4).tilt(reward), search, seed=1).value)
    with pytest.raises(TypeError, match=r"NoiseOptimization needs the reward's gradient, and ppl\.host functions"):
        ppl.infer(black_box, NoiseOptimization(40))
    with pytest.raises(TypeError, match="a reward of type int32 has none"):
        ppl.infer(sampler(4).tilt(lambda x: jnp.argmax(x)), NoiseOptimization(40))


def test_rollover_refuses_steps_without_noise():
    with pytest.raises(ValueError, match="RolloverSearch needs steps that draw noise, .* churn 0"):
        ppl.infer(sampler(4, churn=0.0).tilt(reward), RolloverSearch(40))


def test_path_search_refuses_grids_too_coarse_for_its_shares():
    with pytest.raises(ValueError, match="of 2 steps, `start`, `forward` and `backward` are 1, 0 and 1"):
        ppl.infer(sampler(2).tilt(reward), PathSearch(40))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: RandomSearch(0), ValueError, "`budget` must be at least 1, got 0"),
        (lambda: RandomSearch(10.0), TypeError, "`budget` must be a whole number"),
        (lambda: RandomSearch(10, num_kept=0), ValueError, "`num_kept`"),
        (lambda: RandomSearch(10, batch_size=0), ValueError, "`batch_size`"),
        (lambda: ZeroOrderSearch(10, radius=1.5), ValueError, r"`radius` must be a number in \(0, 1\], got 1\.5"),
        (lambda: ZeroOrderSearch(10, over="steps"), ValueError, "`over` must be 'start' or 'all', got 'steps'"),
        (lambda: PathSearch(10, start=0.0), ValueError, r"`start` must be a share of the steps in \(0, 1\], got 0\.0"),
        (lambda: PathSearch(10, forward=0.6), ValueError, "`forward` must be at most `start`, 0.5, got 0.6"),
        (lambda: PathSearch(10, backward=0.2), ValueError, "`backward` must be more than `forward`, 0.25, got 0.2"),
        (lambda: RolloverSearch(10, num_starts=0), ValueError, "`num_starts`"),
        (lambda: NoiseOptimization(10, num_kept=2), ValueError, "`num_kept` must be at most `num_starts`, 1, got 2"),
        (lambda: NoiseOptimization(10, optimiser="adam"), TypeError, "`optimiser` must be an optax transformation"),
        (lambda: NoiseOptimization(10, regulariser=-1.0), ValueError, "`regulariser` must be a finite number"),
        (lambda: NoiseOptimization(10, rematerialise=1), TypeError, "`rematerialise` must be True or False"),
    ],
)
def test_settings_are_checked_when_a_search_is_built(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("search", [RandomSearch(30, num_kept=6), ZeroOrderSearch(30, num_kept=6), PathSearch(60, 3)])
def test_more_kept_values_than_were_made_are_refused(search):
    with pytest.raises(ValueError, match=f"`num_kept` must be at most the .* got {search.num_kept}"):
        ppl.infer(sampler(6).tilt(reward), search)
