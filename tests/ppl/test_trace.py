"""`simulate` and `log_density` are two views of one measure; models, arguments and values of every kind."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx

import ppl
from ppl.inference import SMC, ImportanceSampling
from tests.ppl.checks import assert_close, assert_equal, assert_trace_agrees_with_log_density

NORMAL, ONES = dist.Normal(0.0, 1.0), np.ones(3)


class Pair(NamedTuple):
    a: Any
    b: Any


class Callable:
    def __init__(self):
        self.network = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return ppl.sample("x", dist.Normal(self.network(jnp.ones(3))[0] + x, 1.0))


def _walk(ys):
    mu = ppl.sample("mu", NORMAL)

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + mu, 1.0))
        ppl.observe("y", dist.Normal(x, 0.5), y)
        return x, x

    return ppl.scan(step, 0.0, ys)


def _until():
    step = lambda c, _: (c + ppl.sample("x", NORMAL), c)  # noqa: E731
    return ppl.scan(step, 0.0, length=8, until=lambda c: c > 1.0)


def _discrete():
    k = ppl.sample("k", dist.Categorical(probs=jnp.array([0.2, 0.3, 0.5])))
    b = ppl.sample("b", dist.Bernoulli(0.3))
    return ppl.sample("n", dist.Poisson(1.0 + k + b)), ppl.sample("m", dist.Binomial(5, 0.2))


def _plates():
    with numpyro.plate("n", 3):
        z = numpyro.sample("z", NORMAL)
        return numpyro.sample("x", dist.Gamma(jnp.exp(z), 2.0))


def _recursion(n):
    return ppl.sample(f"x{n}", NORMAL) + (_recursion(n - 1) if n else 0)


def _rules():
    x = ppl.sample("x", NORMAL.expand([3]))
    ppl.factor("f", jax.nn.logsumexp(jax.nn.log_softmax(x) * jax.nn.relu(x)))
    return jax.nn.softmax(x), jax.nn.gelu(x)


def _callbacks():
    x = ppl.sample("x", NORMAL)
    jax.debug.print("", ordered=False)
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.pure_callback(lambda v: np.float32(2) * v, shape, x, vmap_method="expand_dims")


def _callback_in_a_loop():
    def step(c, _):
        c = c + ppl.sample("x", NORMAL)
        jax.debug.callback(lambda v: None, c)
        return c, None

    return ppl.scan(step, 0.0, length=3, until=lambda c: c > 2.0)[0]


def _bfloat16():
    x = ppl.sample("x", dist.Normal(jnp.bfloat16(0), jnp.bfloat16(1)))
    step = lambda c, a: (c * jnp.bfloat16(0.5) + a + 1.0, c)  # noqa: E731
    return x, ppl.scan(step, jnp.bfloat16(0), jnp.ones(4, jnp.bfloat16))


def _own_randomness():
    key = jax.random.key(3)
    return ppl.sample("x", dist.Normal(jax.random.normal(key), 1.0))


def _pytrees(tree, *rest, scale=2.0, **more):
    loc = tree["a"] + tree["b"][0] + rest[0] + more["shift"]
    x = ppl.sample("x", dist.Normal(loc, scale))
    return {"x": x, "y": Pair(x, (None, [x, 2]))}


PROGRAMS = {
    "walk": (_walk, (jnp.array([0.3, -0.2, 1.0]),)),
    "until": (_until,),
    "discrete": (_discrete,),
    "plates": (_plates,),
    "recursion": (_recursion, (4,)),
    "derivative rules": (_rules,),
    "callbacks": (_callbacks,),
    "callback in a loop": (_callback_in_a_loop,),
    "bfloat16": (_bfloat16,),
    "randomness of the model's own": (_own_randomness,),
    "pytrees": (_pytrees, ({"a": 1.0, "b": (np.float32(2.0), None, "text")}, jnp.float32(3.0)), {"shift": 1.0}),
    "no sites": (lambda: 3,),
    "nothing": (lambda: None,),
    "Python numbers": (lambda: {"a": 1, "b": 2.5, "c": True, "d": 1j},),
    "size zero": (lambda: ppl.sample("x", dist.Normal(jnp.zeros((0, 3)), 1.0)),),
    "key as an argument": (lambda k: ppl.sample("x", dist.Normal(jax.random.normal(k), 1.0)), (jax.random.key(1),)),
    "array as a default": (lambda a=ONES: ppl.sample("x", dist.Normal(a, 1.0)),),
    "static": (lambda a: ppl.sample("x", dist.Normal(a if a > 1 else 0.0, 1.0)), (ppl.static(1.5),)),
    "string": (lambda s: ppl.sample(s, NORMAL.expand([len(s)])), ("abc",)),
    "object": (Callable(), (1.0,)),
    "partial": (functools.partial(lambda a, b: ppl.sample("x", dist.Normal(a + b, 1.0)), 3.0), (1.0,)),
    "list of sites": (lambda: [ppl.sample(f"x{i}", NORMAL) for i in range(3)],),
}


def program_of(name):
    function, args, kwargs = (*PROGRAMS[name], *((), {})[len(PROGRAMS[name]) - 1 :])
    return ppl.model(function)(*args, **kwargs)


@pytest.mark.parametrize("name", PROGRAMS)
def test_simulate_and_log_density_agree(name):
    assert_trace_agrees_with_log_density(program_of(name), seeds=(1,))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_runs_as_a_population_and_prints(name):
    program = program_of(name)
    posterior = ppl.infer(program, SMC(3, ess_threshold=1.0))
    assert jax.tree.structure(posterior.value) == jax.tree.structure(ppl.simulate(program).value)
    assert all(jnp.shape(leaf)[0] == 3 for leaf in jax.tree.leaves(posterior.value))
    for text in (repr(posterior), posterior._repr_html_(), repr(ppl.simulate(program)), repr(program)):
        assert text


def test_program_under_double_precision_and_back():
    @ppl.model
    def program(x):
        step = lambda c, _: (c + 1, ppl.sample("y", dist.Normal(x, 1.0)))  # noqa: E731
        g = ppl.sample("g", dist.Gamma(2.0, 1.0))
        return ppl.scan(step, 0, length=3, until=lambda c: c > 1), g

    for wide in (True, False, True):
        with jax.enable_x64(wide):
            float_type, int_type = (jnp.float64, jnp.int64) if wide else (jnp.float32, jnp.int32)
            trace = ppl.simulate(program(1.0))
            (count, ys), g = trace.value
            assert (count.dtype, ys.dtype, g.dtype, trace.log_density.dtype) == (int_type, *[float_type] * 3)
            assert_close(ppl.log_density(program(1.0), trace.sites), trace.log_density)
            assert ppl.infer(program(1.0), SMC(2)).log_weights.dtype == float_type


def test_log_density_has_gradients_of_arguments_sites_and_captured_arrays():
    ys = jnp.array([0.3, -0.2, 1.0])
    program = ppl.model(_walk)
    sites = {"mu": jnp.float32(0.4), "x": jnp.array([0.1, 0.9, 1.5])}

    def by_hand(ys, sites):
        before = jnp.concatenate([jnp.zeros(1), sites["x"][:-1]])
        return (
            NORMAL.log_prob(sites["mu"])
            + dist.Normal(before + sites["mu"], 1.0).log_prob(sites["x"]).sum()
            + dist.Normal(sites["x"], 0.5).log_prob(ys).sum()
        )

    ours = jax.value_and_grad(lambda ys, s: ppl.log_density(program(ys), s), argnums=(0, 1))
    expected = jax.value_and_grad(by_hand, argnums=(0, 1))(ys, sites)
    assert_close(ours(ys, sites), expected)
    assert_close(jax.jit(ours)(ys, sites), expected)
    hessian = jax.hessian(lambda mu: ppl.log_density(program(ys), {**sites, "mu": mu}))(0.4)
    assert_close(hessian, -4.0)
    captured = jax.grad(lambda w: ppl.log_density(ppl.model(lambda: ppl.observe("y", dist.Normal(w, 1.0), 2.0))(), {}))(
        0.5
    )
    assert_close(captured, 1.5)


def test_log_density_maps_over_sites_and_arguments():
    program = ppl.model(_walk)
    ys = jax.random.normal(jax.random.key(0), (5, 3))
    sites = jax.vmap(lambda seed: ppl.simulate(program(jnp.zeros(3)), seed=jax.random.key(seed)).sites)(jnp.arange(5))
    mapped = jax.vmap(lambda ys, s: ppl.log_density(program(ys), s))(ys, sites)
    single = [ppl.log_density(program(ys[i]), jax.tree.map(lambda a, i=i: a[i], sites)) for i in range(5)]
    assert_close(mapped, jnp.stack(single))


@pytest.mark.parametrize("at", [0.0, 1.0, -1.0])
def test_derivative_rules_of_the_users_functions_are_kept(at):
    @jax.custom_jvp
    def f(x):
        return x**2

    f.defjvp(lambda primals, tangents: (f(*primals), 10.0 * tangents[0]))

    def program():
        ppl.factor("f", f(ppl.sample("x", dist.Uniform(-2.0, 2.0))) + jax.nn.relu(0.0 * at))

    assert_close(jax.grad(lambda x: ppl.log_density(ppl.model(program)(), {"x": x}))(at), 10.0)


def test_deterministic_sites_are_accepted_and_ignored_by_log_density():
    program = ppl.model(lambda: ppl.deterministic("d", ppl.sample("x", NORMAL)))()
    assert_equal(ppl.log_density(program, {"x": 1.0, "d": 99.0}), ppl.log_density(program, {"x": 1.0}))


def test_simulate_draws_from_the_distributions_and_depends_on_the_seed_only():
    program = ppl.model(lambda: ppl.sample("x", NORMAL))()
    values = np.array([float(ppl.simulate(program, seed=s).value) for s in range(5)])
    assert len(set(values.tolist())) == 5
    assert float(ppl.simulate(program, seed=3).value) == values[3]


def test_same_object_serves_both_algorithms_and_keeps_no_state():
    program = ppl.model(_walk)(jnp.ones(3))
    before = ppl.infer(program, SMC(4))
    ppl.infer(program, ImportanceSampling(4))
    ppl.log_density(program, ppl.simulate(program).sites)
    assert_equal(ppl.infer(program, SMC(4)), before)


def test_jitted_helper_of_two_programs_brings_no_plate_or_scope_along():
    @jax.jit
    def helper(x):
        step = lambda c, _: (c + ppl.sample("h", dist.Normal(x, 1.0)).sum(), None)  # noqa: E731
        return ppl.scan(step, 0.0, length=2)[0]

    def plated(size):
        with numpyro.plate("n", size):
            return helper(0.0)

    def scoped():
        with ppl.scope("one"):
            a = helper(0.0)
        with ppl.scope("two"):
            return a + helper(0.0)

    assert ppl.simulate(ppl.model(plated)(3)).sites["h"].shape == (2, 3)
    assert ppl.simulate(ppl.model(plated)(5)).sites["h"].shape == (2, 5)
    assert ppl.simulate(ppl.model(lambda: helper(0.0))()).sites["h"].shape == (2,)
    assert set(ppl.simulate(ppl.model(scoped)()).sites) == {"one/h", "two/h"}
    assert_trace_agrees_with_log_density(ppl.model(scoped)())


def test_method_can_be_a_model():
    class Owner:
        shift = 2.0

        @ppl.model
        def program(self, x):
            return ppl.sample("x", dist.Normal(x + self.shift, 1.0))

    assert ppl.simulate(Owner().program(1.0)).sites["x"].shape == ()
