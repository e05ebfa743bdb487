"""Python functions as rewards and twists: called once for all particles, and named where they fail."""

import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling
from ppl.models import MarkovChain
from tests.ppl.checks import compilations

CHAIN = MarkovChain(jnp.zeros(3), jnp.zeros((3, 3)), 4)


def count_ones(values):
    return 0.5 * np.sum(values["tokens"] == 1, axis=1)


def test_host_reward_is_that_of_the_same_jax_function():
    def reward(value):
        return 0.5 * jnp.sum(value["tokens"] == 1)

    on_host = ppl.infer(CHAIN.tilt(ppl.host(count_ones)), ImportanceSampling(32), seed=3)
    on_device = ppl.infer(CHAIN.tilt(reward), ImportanceSampling(32), seed=3)
    np.testing.assert_array_equal(on_host.value["tokens"], on_device.value["tokens"])
    np.testing.assert_allclose(on_host.log_weights, on_device.log_weights, atol=1e-6)


def test_host_functions_are_called_once_for_all_particles():
    calls = []

    def reward(values):
        calls.append(len(values["tokens"]))
        return np.zeros(len(values["tokens"]))

    ppl.infer(CHAIN.tilt(ppl.host(reward)), SMC(8))
    assert calls == [8]
    calls.clear()
    ppl.infer(CHAIN.tilt(lambda value: 0.0, twist=ppl.host(reward)), SMC(8))
    assert len(calls) == CHAIN.num_steps + 1  # after every step, and at the start, where all particles are still alike
    assert calls[1:] == [8] * CHAIN.num_steps


def test_host_reward_forbids_by_minus_infinity():
    posterior = ppl.infer(
        CHAIN.tilt(ppl.host(lambda values: np.where(values["tokens"][:, 0] == 0, 0.0, -np.inf))), SMC(64)
    )
    alive = np.asarray(posterior.weights) > 0
    assert (np.asarray(posterior.value["tokens"])[alive, 0] == 0).all()


def test_another_seed_compiles_nothing():
    target = CHAIN.tilt(ppl.host(count_ones))
    ppl.infer(target, SMC(8))
    with compilations() as names:
        ppl.infer(target, SMC(8), seed=1)
        ppl.infer(CHAIN.tilt(ppl.host(count_ones)), SMC(8), seed=2)
    assert not names


def broken(values):
    raise RuntimeError("the reward model is away")


@pytest.mark.parametrize("site", ["reward", "twist"])
@pytest.mark.parametrize(
    "function, message",
    [
        (broken, "RuntimeError: the reward model is away"),
        (lambda values: [0.0], r"it must return \d numbers, one for each particle; got shape"),
        (lambda values: [[0.0]] * len(values["tokens"]), "one for each particle; got shape"),
        (lambda values: np.full(len(values["tokens"]), np.nan), "it returned nan; a log-weight is a number or -inf"),
        (lambda values: np.full(len(values["tokens"]), np.inf), "it returned inf; a log-weight is a number or -inf"),
    ],
    ids=["raises", "too few", "a column", "nan", "infinite"],
)
def test_host_functions_that_fail_are_named(site, function, message):
    host = ppl.host(function)
    target = CHAIN.tilt(host) if site == "reward" else CHAIN.tilt(lambda value: 0.0, twist=host)
    with pytest.raises(ppl.HostError, match=f"the host function of '{site}' failed: .*{message}"):
        ppl.infer(target, SMC(4))
    ppl.infer(CHAIN.tilt(ppl.host(count_ones)), SMC(4))  # the failure is forgotten


def test_a_single_trace_reports_failures_too():
    target = CHAIN.tilt(ppl.host(broken))
    for run in (
        lambda: ppl.log_density(target.program(), {"path": jnp.zeros(4, jnp.int32)}),
        lambda: ppl.simulate(target),
    ):
        with pytest.raises(ppl.HostError, match="the host function of 'reward' failed: RuntimeError"):
            run()


def test_host_wants_a_function():
    with pytest.raises(TypeError, match="ppl.host takes a function, got int"):
        ppl.host(3)
