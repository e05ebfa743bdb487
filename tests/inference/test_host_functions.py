"""Python functions as rewards, twists and factors: called once for all particles, and named where they fail."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling, RandomSearch
from ppl.models import MarkovChain
from tests.ppl.checks import compilations

CHAIN = MarkovChain(jnp.zeros(3), jnp.zeros((3, 3)), 4)
HOSTS = sys.modules["ppl.host"]  # `ppl.host` is the function
LONG = MarkovChain(jnp.zeros(3), jnp.zeros((3, 3)), 400)


def count_ones(values):
    return 0.5 * np.sum(values["tokens"] == 1, axis=1)


class Told:
    """A function that does what it is told, so that one compiled run serves many tests."""

    def __init__(self):
        self.function = None

    def __call__(self, values):
        return self.function(values)


@pytest.fixture(scope="module")
def told():
    function = Told()
    host = ppl.host(function)
    return function, {"reward": CHAIN.tilt(host), "twist": CHAIN.tilt(lambda value: 0.0, twist=host)}


@ppl.model
def coin(weight=0.5):
    return ppl.sample("heads", dist.Bernoulli(weight))


def test_host_reward_is_that_of_the_same_jax_function():
    def reward(value):
        return 0.5 * jnp.sum(value["tokens"] == 1)

    on_host = ppl.infer(CHAIN.tilt(ppl.host(count_ones)), ImportanceSampling(32), seed=3)
    on_device = ppl.infer(CHAIN.tilt(reward), ImportanceSampling(32), seed=3)
    np.testing.assert_array_equal(on_host.value["tokens"], on_device.value["tokens"])
    np.testing.assert_allclose(on_host.log_weights, on_device.log_weights, atol=1e-6)


def test_host_functions_are_called_once_for_all_particles(told):
    function, targets = told
    calls = []

    def reward(values):
        calls.append(len(values["tokens"]))
        return np.zeros(len(values["tokens"]))

    function.function = reward
    ppl.infer(targets["reward"], SMC(4))
    assert calls == [4]
    calls.clear()
    ppl.infer(targets["twist"], SMC(4))
    assert len(calls) == CHAIN.num_steps + 1  # after every step, and at the start, where all particles are still alike
    assert calls[1:] == [4] * CHAIN.num_steps


def test_host_reward_forbids_by_minus_infinity(told):
    function, targets = told
    function.function = lambda values: np.where(values["tokens"][:, 0] == 0, 0.0, -np.inf)
    posterior = ppl.infer(targets["reward"], SMC(4))
    allowed = np.asarray(posterior.value["tokens"])[:, 0] == 0
    assert 0 < allowed.sum() < 4
    np.testing.assert_array_equal(np.asarray(posterior.weights) > 0, allowed)


def test_another_seed_compiles_nothing():
    target = CHAIN.tilt(ppl.host(count_ones))
    ppl.infer(target, ImportanceSampling(32))
    with compilations() as names:
        ppl.infer(target, ImportanceSampling(32), seed=1)
        ppl.infer(CHAIN.tilt(ppl.host(count_ones)), ImportanceSampling(32), seed=2)
    assert not names


# As a factor of a model.


def test_a_host_function_is_a_factor():
    calls = []

    def nats(heads, more):
        calls.append((heads.shape, more["a"].shape))
        return np.log(3.0) * heads * more["a"]

    @ppl.model
    def weighed():
        heads = ppl.sample("heads", dist.Bernoulli(0.25))
        ppl.factor("preference", ppl.host(nats)(heads, {"a": 1.0}))
        return heads

    posterior = ppl.infer(weighed(), ImportanceSampling(64), seed=1)
    share = np.mean(np.asarray(posterior.value))  # of heads among the draws; the weights make 3 of each
    assert calls == [((64,), (64,))]
    np.testing.assert_allclose(posterior.log_evidence, np.log(1 - share + 3 * share), rtol=1e-5)
    np.testing.assert_allclose(ppl.log_density(weighed(), {"heads": 1}), np.log(0.75), rtol=1e-5)


def test_a_host_function_may_be_scaled_and_stand_in_a_loop():
    def minus_square(x):
        return -(x**2)

    @ppl.model
    def walk():
        def step(x, _):
            x = ppl.sample("x", dist.Normal(x, 1.0))
            ppl.factor("near", 0.5 * ppl.host(minus_square)(x))
            return x, None

        return ppl.scan(step, 0.0, length=3)[0]

    path = jnp.array([0.3, -0.2, 0.9])
    plain = dist.Normal(jnp.array([0.0, 0.3, -0.2]), 1.0).log_prob(path).sum()
    np.testing.assert_allclose(ppl.log_density(walk(), {"x": path}), plain - 0.5 * jnp.sum(path**2), rtol=1e-5)


def test_a_failing_factor_is_named_with_its_line():
    def lost(x):
        raise ConnectionError("no route")

    @ppl.model
    def weighed():
        ppl.factor("f", ppl.host(lost)(ppl.sample("x", dist.Normal(0.0, 1.0))))

    with pytest.raises(ppl.HostError, match=r"'lost, called at test_host_functions.py:\d+' failed: ConnectionErr"):
        ppl.infer(weighed(), ImportanceSampling(4))


# Failures.


def broken(values):
    raise RuntimeError("the reward model is away")


def of_length(values):
    return len(values["tokens"])


FAULTS = {
    "raises": (broken, "RuntimeError: the reward model is away"),
    "too few": (lambda v: [], r"was given (\d) values? and must return \1 numbers?, one for each.*got shape \(0,\)"),
    "too many": (lambda v: np.zeros(of_length(v) + 1), r"was given (\d) values? .* \1 numbers?, .*got shape \(\d,\)"),
    "one number": (lambda v: 0.0, r"got shape \(\)"),
    "a column": (lambda v: [[0.0]] * of_length(v), r"got shape \(\d, 1\)"),
    "nan": (lambda v: np.full(of_length(v), np.nan), "it returned nan; a log-weight is a number or -inf"),
    "infinite": (lambda v: np.full(of_length(v), np.inf), "it returned inf; a log-weight is a number or -inf"),
    "truth values": (lambda v: v["tokens"][..., 0] == 0, r"truth values.*np.where\(allowed, 0.0, -np.inf\)"),
    "strings": (lambda v: ["good"] * of_length(v), "it returned list of str_"),
    "nothing": (lambda v: None, "it returned NoneType"),
    "nothing for each": (lambda v: [None] * of_length(v), "it returned list of NoneType"),
    "complex": (lambda v: np.full(of_length(v), 1j), "it returned ndarray of complex128"),
    "a dictionary": (lambda v: {"a": 1.0}, "it returned dict"),
    "a generator": (lambda v: (0.0 for _ in range(of_length(v))), "it returned generator"),
    "ragged": (lambda v: [[0.0], [0.0, 1.0]], "it returned list"),
}


@pytest.mark.parametrize("site", ["reward", "twist"])
@pytest.mark.parametrize("fault", FAULTS)
def test_host_functions_that_fail_are_named(told, site, fault):
    function, targets = told
    function.function, message = FAULTS[fault]
    with pytest.raises(ppl.HostError, match=f"the host function of '{site}' failed: .*{message}"):
        ppl.infer(targets[site], SMC(4))
    function.function = count_ones  # the failure is forgotten
    ppl.infer(targets[site], SMC(4))


def test_numbers_of_any_real_type_are_log_weights(told):
    function, targets = told
    for kind in (np.int8, np.uint64, np.float16, np.float64, jnp.bfloat16, list, jnp.asarray):
        zeros = np.zeros(4, kind) if isinstance(kind, type) and issubclass(kind, np.generic) else kind([0, 0, 0, 0])
        function.function = lambda values, zeros=zeros: zeros
        assert float(ppl.infer(targets["reward"], SMC(4)).log_evidence) == 0.0


def test_a_single_trace_reports_failures_too():
    target = CHAIN.tilt(ppl.host(broken))
    for run in (
        lambda: ppl.log_density(target.program(), {"path": jnp.zeros(4, jnp.int32)}),
        lambda: ppl.simulate(target),
    ):
        with pytest.raises(ppl.HostError, match="the host function of 'reward' failed: RuntimeError"):
            run()


def test_a_failure_ends_the_run_at_once():
    calls = []

    def fails_at_the_third(values):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the third")
        return np.zeros(len(values["tokens"]))

    steps = []

    def noted(state):  # every step of the loop passes here
        jax.debug.callback(lambda _: steps.append(1), state["tokens"][0])
        return state["tokens"][0] * 1.0

    watched = LONG.watch("noted", noted).weigh_steps(ppl.host(fails_at_the_third))
    with pytest.raises(ppl.HostError, match="'potential' failed: RuntimeError: the third"):
        ppl.infer(watched, SMC(4))
    jax.effects_barrier()
    assert len(calls) == 3
    assert len(steps) <= 4 * 4  # of 400 steps of 4 particles


def test_a_failure_ends_a_search_at_once():
    calls = []

    def broken_and_counted(values):
        calls.append(len(values["tokens"]))
        raise RuntimeError("away")

    with pytest.raises(ppl.HostError, match="'reward' failed: RuntimeError: away"):
        ppl.infer(CHAIN.tilt(ppl.host(broken_and_counted)), RandomSearch(400, batch_size=2))
    assert calls == [2]


def test_what_is_no_exception_comes_out_as_it_is(told):
    function, targets = told
    for kind in (KeyboardInterrupt, SystemExit):

        def leave(values, kind=kind):
            raise kind

        function.function = leave
        with pytest.raises(kind):
            ppl.infer(targets["twist"], SMC(4))


def test_under_a_jit_of_the_users_own_a_warning_tells():
    target = CHAIN.tilt(ppl.host(broken))
    run = jax.jit(lambda key: ppl.infer(target, SMC(4), key=key).status.ok)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not run(jax.random.key(0))
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert any("the host function of 'reward' failed: RuntimeError: the reward model is away" in m for m in messages)


def test_host_wants_a_function():
    with pytest.raises(TypeError, match="ppl.host takes a function, got int"):
        ppl.host(3)


# Runs inside of host functions, and side by side.


def test_a_host_function_may_run_programs(told):
    function, targets = told
    program = coin(0.25)
    exact = ppl.log_density(program, {"heads": 1})

    def inner(values):
        nats = float(ppl.log_density(program, {"heads": 1}))
        ppl.simulate(program, seed=1)
        return np.full(len(values["tokens"]), nats) + jnp.zeros(300_000)[0]

    function.function = inner
    nested = ppl.infer(targets["reward"], SMC(4))
    np.testing.assert_allclose(nested.log_evidence, exact, rtol=1e-6)


def test_failures_inside_and_outside_are_told_apart(told):
    function, targets = told
    inside = CHAIN.tilt(ppl.host(broken))

    def caught(values):
        with pytest.raises(ppl.HostError, match="the host function of 'reward' failed: RuntimeError"):
            ppl.simulate(inside)
        return count_ones(values)

    def uncaught(values):
        ppl.simulate(inside)

    def own(values):
        with pytest.raises(ppl.HostError):
            ppl.simulate(inside)
        raise ValueError("mine")

    function.function = caught
    ppl.infer(targets["reward"], SMC(4))
    nested = "of 'reward' failed: HostError: the host function of 'reward' failed: RuntimeError: the reward model"
    with pytest.raises(ppl.HostError, match=nested):
        function.function = uncaught
        ppl.infer(targets["reward"], SMC(4))
    with pytest.raises(ppl.HostError, match="of 'reward' failed: ValueError: mine"):
        function.function = own
        ppl.infer(targets["reward"], SMC(4))


def test_a_run_inside_for_which_no_thread_is_left_is_refused(told, monkeypatch):
    function, targets = told
    program = coin()

    def inner(values):
        ppl.simulate(program)
        return count_ones(values)

    function.function = inner
    monkeypatch.setattr(HOSTS, "_num_threads", lambda: 1)
    monkeypatch.setattr(HOSTS, "_warn_of_one_thread", lambda threads: None)
    monkeypatch.setattr(HOSTS, "_OCCUPIED", [0])  # whichever thread XLA calls this one on
    with pytest.raises(ppl.HostError, match="'twist' runs a program, which needs a thread.*PJRT_NPROC=2"):
        ppl.infer(targets["twist"], SMC(4))


def test_runs_in_threads_keep_their_failures_apart():
    """One compiled run, many at once: each gets its own failure or none."""
    meeting = threading.Barrier(4)

    def by_key(values):
        number = int(values["tokens"][0, 0])
        if number:
            raise ValueError(f"number {number}")
        return np.zeros(len(values["tokens"]))

    host = ppl.host(by_key)

    def run(number):
        chain = MarkovChain(jnp.where(jnp.arange(3) == number, 0.0, -jnp.inf), jnp.zeros((3, 3)), 4)
        meeting.wait()
        outcomes = []
        for seed in range(5):
            try:
                outcomes.append(float(ppl.infer(chain.tilt(host), SMC(4), seed=seed).log_evidence))
            except ppl.HostError as error:
                outcomes.append(str(error))
        return outcomes

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, [0, 1, 2, 0]))
    assert found[0] == found[3] == [0.0] * 5
    for number in (1, 2):
        assert all(f"ValueError: number {number}" in outcome for outcome in found[number]), found[number]


ONE_CPU = """
    import os
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax.numpy as jnp, numpy as np, numpyro.distributions as dist, ppl, signal, sys, time
    from ppl.inference import SMC
    from ppl.models import MarkovChain

    @ppl.model
    def walk():
        def step(x, _):
            x = ppl.sample("x", dist.Normal(x, 1.0))
            ppl.observe("y", dist.Normal(x, 1.0), 0.3)
            return x, None
        return ppl.scan(step, 0.0, length=20)[0]

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    inner = walk()
    calls = 0

    def reward(values):
        global calls
        calls += 1
        if calls == 1:
            ppl.infer(inner, SMC(1000))
            float(jnp.asarray(np.ones(300_000)).sum())
            print("nested", flush=True)
        time.sleep(0.05)
        return np.zeros(len(values["tokens"]))

    chain = MarkovChain(jnp.zeros(3), jnp.zeros((3, 3)), 1000)
    try:
        ppl.infer(chain.tilt(lambda value: 0.0, twist=ppl.host(reward)), SMC(8))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_one_cpu_neither_waits_for_ever_nor_leaves_ctrl_c_unanswered():
    environment = {k: v for k, v in os.environ.items() if k not in ("PJRT_NPROC", "NPROC")}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ONE_CPU)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            watchdog = threading.Timer(120, process.kill)
            watchdog.start()
            assert process.stdout.readline() == "nested\n"
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            pressed = time.monotonic()
            assert process.stdout.readline() == "interrupted\n"
            assert time.monotonic() - pressed < 10.0  # the run would take 50 seconds
        finally:
            watchdog.cancel()
            process.kill()
