"""`ppl.generate` and processes: programs inside of programs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling
from tests.ppl.checks import assert_close, assert_equal, assert_trace_agrees_with_log_density


@ppl.model
def walk(start, length=3):
    mu = ppl.sample("mu", dist.Normal(0.0, 1.0))

    def step(x, _):
        x = ppl.sample("x", dist.Normal(x + mu, 1.0))
        ppl.factor("f", -jnp.abs(x))
        return x, x

    return ppl.scan(step, start, length=length)[1]


class Steps(ppl.Process):
    """A random walk that ends once it leaves an interval, or never."""

    num_steps = 6

    def start(self):
        return jnp.float32(0.0)

    def forward(self, state, step):
        return dist.Normal(state, 1.0 + step)

    def advance(self, state, drawn, step):
        return drawn

    def finish(self, state, path):
        return {"last": state, "path": path}


class EndingSteps(Steps):
    def ended(self, state):
        return jnp.abs(state) > 1.5


def test_generate_prefixes_sites_and_multiplies_densities():
    @ppl.model
    def outer():
        a = ppl.generate(walk(0.0), name="first")
        return ppl.generate(walk(a[-1]), name="second")

    trace = ppl.simulate(outer())
    assert set(trace.sites) == {"first/mu", "first/x", "second/mu", "second/x"}
    parts = {
        name: {k.split("/")[1]: v for k, v in trace.sites.items() if k.startswith(name)} for name in ("first", "second")
    }
    expected = ppl.log_density(walk(0.0), parts["first"]) + ppl.log_density(
        walk(parts["first"]["x"][-1]), parts["second"]
    )
    assert_close(trace.log_density, expected)
    assert_trace_agrees_with_log_density(outer())


def test_generate_without_a_name_keeps_the_names():
    assert set(ppl.simulate(ppl.model(lambda: ppl.generate(walk(0.0)))()).sites) == {"mu", "x"}


def test_loops_of_generated_programs_do_not_resample_and_their_own_loops_do():
    inside = ppl.infer(ppl.model(lambda: ppl.generate(walk(0.0)))(), SMC(8, ess_threshold=1.0))
    alone = ppl.infer(walk(0.0), SMC(8, ess_threshold=1.0))
    assert inside.diagnostics["ess"].shape == (0,)
    assert np.asarray(alone.diagnostics["resampled"]).tolist() == [True] * 3


def test_generate_inside_a_loop_gains_its_time_axis():
    @ppl.model
    def outer():
        def step(c, _):
            xs = ppl.generate(walk(c), name="g")
            return xs[-1], xs

        return ppl.scan(step, 0.0, length=4)

    trace = ppl.simulate(outer())
    assert trace.sites["g/x"].shape == (4, 3)
    assert_close(trace.value[1], trace.sites["g/x"])
    assert_trace_agrees_with_log_density(outer())


@pytest.mark.parametrize(
    "values",
    [
        {"mu": 0.5},
        {"mu": 2},
        {"x": jnp.array([0.1, 0.2, 0.3])},
        {"x": np.array([1, 2, 3])},
        {"mu": 1.0, "x": [0.0, 1.0, 2.0]},
    ],
    ids=str,
)
def test_conditioned_sites_of_a_generated_program_are_observed(values):
    inner = ppl.condition(walk(0.0), values)
    outer = ppl.model(lambda: ppl.generate(inner, name="g"))()
    assert not {f"g/{name}" for name in values} & ppl.simulate(outer).sites.keys()
    trace = ppl.simulate(outer)
    free = {name.removeprefix("g/"): v for name, v in trace.sites.items()}
    values = {name: jnp.asarray(v, jnp.float32) for name, v in values.items()}
    assert_close(trace.log_density, ppl.log_density(walk(0.0), {**free, **values}))
    assert_close(ppl.log_density(outer, trace.sites), trace.log_density)
    if len(values) == 2:
        assert_close(ppl.infer(outer, SMC(2)).log_evidence, ppl.log_density(walk(0.0), values))


def test_generated_program_may_be_conditioned_on_random_values_inside_a_loop():
    @ppl.model
    def outer():
        def step(c, _):
            a = ppl.sample("a", dist.Normal(c, 1.0))
            xs = ppl.generate(ppl.condition(walk(c), {"x": a + jnp.arange(3.0)}), name="g")
            return a, xs

        return ppl.scan(step, 0.0, length=3)

    trace = ppl.simulate(outer())
    assert set(trace.sites) == {"a", "g/mu"}
    assert_close(trace.value[1], trace.sites["a"][:, None] + jnp.arange(3.0))
    assert_trace_agrees_with_log_density(outer())
    posterior = ppl.infer(outer(), SMC(16, ess_threshold=1.0))
    assert_close(posterior.value[1], posterior.sites["a"][:, :, None] + jnp.arange(3.0))


def test_random_condition_before_a_generated_loop_follows_its_particle():
    @ppl.model
    def outer():
        a = ppl.sample("a", dist.Normal(0.0, 1.0))

        def step(c, _):
            z = ppl.sample("z", dist.Normal(0.0, 1.0))
            ppl.factor("w", 2 * z)
            return c, None

        ppl.scan(step, 0.0, length=4)
        return a, ppl.generate(ppl.condition(walk(0.0), {"x": a + jnp.arange(3.0)}))

    a, xs = ppl.infer(outer(), SMC(16, ess_threshold=1.0)).value
    assert_close(xs, a[:, None] + jnp.arange(3.0))


def test_condition_reaches_into_generated_programs():
    outer = ppl.model(lambda: ppl.generate(walk(0.0), name="g"))()
    fixed = ppl.condition(outer, {"g/mu": 0.3, "g/x": jnp.ones(3)})
    assert_close(ppl.infer(fixed, SMC(2)).log_evidence, ppl.log_density(walk(0.0), {"mu": 0.3, "x": jnp.ones(3)}))


@pytest.mark.parametrize("process", [Steps(), EndingSteps()], ids=["runs out", "ends"])
def test_process_is_a_program_whose_path_is_kept_only_when_named(process):
    trace = ppl.simulate(process)
    path, scales = trace.sites["path"], 1.0 + jnp.arange(6)
    before = jnp.concatenate([jnp.zeros(1), path[:-1]])
    present = trace.present["path"]
    assert_close(trace.log_density, jnp.sum(jnp.where(present, dist.Normal(before, scales).log_prob(path), 0.0)))
    assert_close(ppl.log_density(process, {"path": path}), trace.log_density)
    assert_close(trace.value["path"], path)
    posterior = ppl.infer(process, SMC(4))
    assert posterior.sites == {}
    assert_equal(ppl.infer(process, SMC(4), keep=["path"]).sites["path"], posterior.value["path"])
    assert float(posterior.log_evidence) == 0.0


def test_process_inside_a_model_is_an_inner_loop_without_stored_path():
    @ppl.model
    def outer():
        value = ppl.generate(EndingSteps(), name="g")
        ppl.observe("y", dist.Normal(value["last"], 1.0), 0.0)
        return value

    posterior = ppl.infer(outer(), SMC(8))
    assert posterior.sites == {} and posterior.diagnostics["ess"].shape == (0,)
    kept = ppl.infer(outer(), SMC(8), keep=["g/path"])
    assert_equal(kept.sites["g/path"], posterior.value["path"])
    assert_equal(kept.present["g/path"].sum(1) < 6, np.abs(np.asarray(posterior.value["path"])[:, :5]).max(1) > 1.5)


def test_value_of_a_condition_may_be_traced_by_the_users_own_grad():
    def density(m):
        outer = ppl.model(lambda: ppl.generate(ppl.condition(walk(0.0), {"mu": m, "x": jnp.ones(3)})))()
        return ppl.log_density(outer, {})

    expected = jax.grad(lambda m: ppl.log_density(walk(0.0), {"mu": m, "x": jnp.ones(3)}))(0.3)
    assert_close(jax.grad(density)(0.3), expected)


def test_keep_selects_among_generated_sites():
    outer = ppl.model(lambda: ppl.generate(walk(0.0), name="g"))()
    assert set(ppl.infer(outer, ImportanceSampling(2), keep=["g/x"]).sites) == {"g/x"}
    assert ppl.infer(outer, ImportanceSampling(2), keep=[]).sites == {}
