"""Law L4: one compilation per program shape, arrays passed and never compiled in, equal numbers for equal seeds."""

import gc
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import nnx

import ppl
from ppl import runners
from ppl.inference import SMC
from tests.ppl.checks import assert_close, assert_equal, compilations, finished

ALGORITHM = SMC(8, ess_threshold=0.7)

SOURCE = textwrap.dedent(
    """
    import jax, jax.numpy as jnp, numpyro.distributions as dist, ppl

    @ppl.model
    def walk(observations, scale=1.0, power=2):
        drift = ppl.sample("drift", dist.Normal(0.0, scale))
        def step(x, y):
            x = ppl.sample("x", dist.Normal(x + drift, 1.0))
            ppl.factor("y", -jax.nn.relu(jnp.abs(x - y)) ** power)
            return x, x
        return ppl.scan(step, 0.0, observations)[1]
    """
)


def defined():
    namespace = {}
    exec(SOURCE, namespace)
    return namespace["walk"]


walk = defined()
YS, OTHER_YS = jnp.array([0.5, 1.0, 0.2]), jnp.array([1.5, 2.0, 1.2])


def everything(program, seed=0):
    """Run, simulate and score a program."""
    trace = ppl.simulate(program, seed=seed)
    return finished((ppl.infer(program, ALGORITHM, seed=seed), trace, ppl.log_density(program, trace.sites)))


@pytest.mark.parametrize(
    "again",
    {
        "another seed": lambda: everything(walk(YS, 1.0), seed=11),
        "other array values": lambda: everything(walk(OTHER_YS, 1.0)),
        "another float": lambda: everything(walk(YS, 3.5)),
        "a numpy array": lambda: everything(walk(np.asarray(YS), 1.0)),
        "the same model defined again": lambda: everything(defined()(YS, 1.0)),
        "the same int": lambda: everything(walk(YS, 1.0, power=2)),
    }.items(),
    ids=lambda item: item[0],
)
def test_second_run_compiles_nothing_with(again):
    everything(walk(YS, 1.0))
    with compilations() as compiled:
        again[1]()
    assert len(compiled) == 0


@pytest.mark.parametrize(
    "again",
    {
        "another int": lambda: walk(YS, power=3),
        "another length": lambda: walk(jnp.ones(4)),
    }.items(),
    ids=lambda item: item[0],
)
def test_second_run_compiles_again_with(again):
    runners.clear_cache()
    everything(walk(YS))
    with compilations() as compiled:
        everything(again[1]())
    assert len(compiled) > 0


def test_default_of_an_argument_is_traced_as_the_argument_is():
    everything(walk(YS))
    with compilations() as compiled:
        everything(walk(YS, 3.5))
    assert len(compiled) == 0


def test_condition_with_other_values_compiles_nothing():
    def run(x):
        return finished(ppl.infer(ppl.condition(walk(YS), {"drift": x}), ALGORITHM).log_weights)

    run(0.5)
    with compilations() as compiled:
        run(1.5)
    assert len(compiled) == 0


BIG = 100


def _closing_over(body):
    """Make a family of programs that close over an array and differ in its values only."""

    def make(i):
        array = jnp.arange(float(BIG)) + i

        @ppl.model
        def program(y):
            z = ppl.sample("z", dist.Normal(0.0, 1.0))
            ppl.factor("f", -jnp.sum(jnp.asarray(body(array, z, y)) ** 2) * 1e-6)
            return z

        return program(jnp.ones(3) * i)

    return make


@jax.custom_vjp
def _scaled(array, z):
    return (array * z).sum()


_scaled.defvjp(lambda a, z: (_scaled(a, z), (a, z)), lambda r, g: (g * r[1] * jnp.ones_like(r[0]), (g * r[0]).sum()))


def _closure_with_rule(array):
    @jax.custom_jvp
    def f(z):
        return (array * z).sum()

    f.defjvp(lambda primals, tangents: (f(*primals), array.sum() * tangents[0]))
    return f


CLOSURES = {
    "plainly": lambda a, z, y: a * z,
    "in a jitted helper": lambda a, z, y: jax.jit(lambda q: a * q)(z),
    "in a jitted helper of a jitted helper": lambda a, z, y: jax.jit(lambda q: jax.jit(lambda r: a * r)(q))(z),
    "as a distribution's parameter": lambda a, z, y: ppl.sample("q", dist.Normal(a, 1.0)),
    "as a distribution's parameter in a jitted helper": lambda a, z, y: jax.jit(
        lambda: ppl.sample("q", dist.Normal(a, 1.0))
    )(),
    "in lax.cond": lambda a, z, y: jax.lax.cond(z > 0, lambda: a, lambda: -a),
    "in lax.scan": lambda a, z, y: jax.lax.scan(lambda c, _: (c + a.sum(), None), z, None, length=3)[0],
    "in lax.while_loop": lambda a, z, y: jax.lax.while_loop(lambda c: c < 3, lambda c: c + 1 + a.sum(), z),
    "in a jitted helper in lax.cond": lambda a, z, y: jax.lax.cond(z > 0, jax.jit(lambda q: q * a), lambda q: q - a, z),
    "in a jitted helper in lax.switch": lambda a, z, y: jax.lax.switch(
        jnp.int32(z), [jax.jit(lambda q: q + a.sum()), lambda q: q, jax.jit(lambda q: q * a[1])], z
    ),
    "in a jitted helper in lax.scan": lambda a, z, y: jnp.concatenate(
        jax.lax.scan(lambda c, x: (jax.jit(lambda q: q + a)(c), x * c), z * a, jnp.arange(3.0), reverse=True)[1]
    ),
    "in a jitted helper in lax.while_loop": lambda a, z, y: jax.lax.while_loop(
        jax.jit(lambda c: c < a.sum()), lambda c: jax.jit(lambda q: q + 1 + a[1] ** 2)(c), z
    ),
    "in a jitted helper in a loop in a branch": lambda a, z, y: jax.lax.cond(
        z > 0,
        lambda q: jax.lax.fori_loop(0, 3, lambda i, c: jax.nn.relu(jax.jit(lambda r: r + a)(c)), q + 0 * a),
        lambda q: jnp.zeros_like(a),
        z,
    ),
    "in jax.vmap": lambda a, z, y: jax.vmap(jax.jit(lambda q: q * z + a.sum()))(a),
    "in jax.checkpoint": lambda a, z, y: jax.checkpoint(lambda q: a * q)(z),
    "in jax.grad": lambda a, z, y: jax.grad(lambda q: (a * q**2).sum())(z),
    "in a function with a derivative rule": lambda a, z, y: _closure_with_rule(a)(z) + _scaled(a, z),
    "in ppl.scan": lambda a, z, y: ppl.scan(lambda c, x: (c + ppl.sample("q", dist.Normal(a.sum(), 1.0)), None), z, y)[
        0
    ],
    "in a jitted helper in ppl.scan": lambda a, z, y: ppl.scan(
        lambda c, x: (jax.jit(lambda q: q + a.sum())(c), ppl.sample("q", dist.Normal(c, 1.0))), z, y
    )[0],
    "in until": lambda a, z, y: ppl.scan(
        lambda c, x: (c + ppl.sample("q", dist.Normal(0.0, 1.0)), None), z, y, until=lambda c: c > a.sum()
    )[0],
    "in ppl.generate": lambda a, z, y: ppl.generate(ppl.model(lambda b: ppl.sample("q", dist.Normal(a * b, 1.0)))(z)),
    "through jax.nn": lambda a, z, y: jax.nn.softmax(jax.nn.relu(a * z)),
    "as a numpy array": lambda a, z, y: z * np.arange(BIG, dtype=np.float32),
}


def held_arrays(obj, seen=None, depth=0):
    """Count the arrays of more than 16 elements that an object holds, through containers, closures and jaxprs."""
    seen = set() if seen is None else seen
    if id(obj) in seen or depth > 40:
        return 0
    seen.add(id(obj))
    if isinstance(obj, jax.Array | np.ndarray):
        return int(obj.size > 16)
    inside = []
    if isinstance(obj, dict):
        inside = [*obj.keys(), *obj.values()]
    elif isinstance(obj, tuple | list | set | frozenset):
        inside = list(obj)
    elif hasattr(obj, "__dataclass_fields__"):
        inside = [getattr(obj, f, None) for f in obj.__dataclass_fields__]
    elif type(obj).__name__ in ("ClosedJaxpr", "Jaxpr", "JaxprEqn"):
        inside = [getattr(obj, a, None) for a in ("consts", "eqns", "params", "jaxpr")]
    elif getattr(obj, "__closure__", None):
        inside = [c.cell_contents for c in obj.__closure__]
    elif hasattr(obj, "__wrapped__"):
        inside = [obj.__wrapped__]
    return sum(held_arrays(x, seen, depth + 1) for x in inside)


def dense_constants(text):
    """Return the sizes of the array constants with more than 16 elements in a lowered program, splats left out."""
    literal = r'stablehlo\.constant dense<(?:"0x[0-9A-Fa-f]*"|\[.*?\])> : tensor<([0-9x]*)x[a-z0-9]+>'
    sizes = [int(np.prod([int(n) for n in m.group(1).split("x")])) for m in re.finditer(literal, text)]
    return [n for n in sizes if n > 16]


def lowered_text(program, algorithm):
    """Lower the runner that `ppl.infer` has just cached for a program."""
    ppl.infer(program, algorithm)
    staged = program.stage(keep_rules=False)
    runner = next(reversed(runners._RUNNERS.values()))
    return runner.lower(staged.inputs, staged.given, jax.random.key(0)).as_text()


def test_the_search_for_constants_finds_one():
    array = jnp.arange(100.0) ** 2
    text = jax.jit(lambda x: x + np.asarray(array)).lower(1.0).as_text()
    assert dense_constants(text) == [100]
    assert held_arrays((1, [{"a": lambda: array}])) == 1


@pytest.mark.parametrize("name", CLOSURES)
def test_array_that_a_model_closes_over_is_no_constant_and_other_values_compile_nothing(name):
    make = _closing_over(CLOSURES[name])
    runners.clear_cache()
    text = lowered_text(make(0), ALGORITHM)
    assert dense_constants(text) == [], "compiled in"
    assert sum(held_arrays(entry) for entry in runners._RUNNERS.items()) == 0, "held by the cache"
    with compilations() as compiled:
        finished(ppl.infer(make(1), ALGORITHM, seed=1).log_weights)
    assert len(compiled) == 0


@pytest.mark.parametrize("name", [name for name in CLOSURES if "lax" in name or "branch" in name])
def test_loops_and_branches_give_what_jax_gives(name):
    """The helpers' arrays are lifted out of them (see `ppl.lifting`); the values are those of the plain function."""
    z, y = jnp.float32(0.7), jnp.arange(3.0)
    for value in (0.5, 1.5):
        array = jnp.linspace(0.1, value, BIG)
        program = ppl.model(lambda z, array=array: CLOSURES[name](array, z, y))(z)
        found, expected = (jax.tree.leaves(v) for v in (ppl.simulate(program).value, CLOSURES[name](array, z, y)))
        assert all(np.allclose(*pair, rtol=1e-5) for pair in zip(found, expected, strict=True))


def test_simulate_and_log_density_lower_without_constants():
    make = _closing_over(CLOSURES["in a jitted helper"])
    staged = make(0).stage(keep_rules=False)
    from ppl.trace import _simulate

    text = runners.lower(staged, "simulate", _simulate, jax.random.key(0)).as_text()
    assert dense_constants(text) == []


class Network(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.first, self.second = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


@pytest.mark.parametrize("through_jit", [False, True], ids=["plain call", "in a jitted helper"])
def test_network_that_a_model_closes_over_is_an_argument(through_jit):
    def make(seed):
        network = Network(seed)
        call = jax.jit(lambda x: network(x)) if through_jit else network

        @ppl.model
        def program():
            def step(x, _):
                x = ppl.sample("x", dist.Normal(call(x), 1.0))
                ppl.factor("f", -jnp.sum(x**2))
                return x, None

            return ppl.scan(step, jnp.zeros(8), length=3)[0]

        return program()

    runners.clear_cache()
    text = lowered_text(make(0), ALGORITHM)
    assert dense_constants(text) == []
    assert sum(held_arrays(entry) for entry in runners._RUNNERS.items()) == 0
    first = ppl.infer(make(0), ALGORITHM)
    with compilations() as compiled:
        second = finished(ppl.infer(make(1), ALGORITHM))
    assert len(compiled) == 0
    assert float(first.log_evidence) != float(second.log_evidence)


def test_programs_that_differ_in_an_operation_only_are_not_confused():
    def make(f):
        return ppl.model(lambda: f(ppl.sample("x", dist.Normal(0.0, 1.0))))()

    functions = [
        jnp.sin,
        jnp.cos,
        jnp.exp,
        jax.nn.relu,
        lambda x: x + 1.0,
        lambda x: x + 2.0,
        lambda x: x**2,
        lambda x: x**3,
    ]
    x = float(ppl.simulate(make(lambda x: x)).value)
    for f in functions:
        assert_close(ppl.simulate(make(f)).value, f(jnp.float32(x)))


def test_same_seed_gives_the_same_numbers_and_another_seed_others():
    first, second, other = (ppl.infer(walk(YS), ALGORITHM, seed=s) for s in (5, 5, 6))
    assert_equal(first, second)
    assert not np.array_equal(first.value, other.value)
    assert_equal(ppl.infer(walk(YS), ALGORITHM, key=jax.random.key(5)), first)
    assert_equal(ppl.simulate(walk(YS), seed=5), ppl.simulate(walk(YS), seed=5))


def test_infer_inside_of_the_users_jit_and_vmap_gives_the_same_numbers():
    def run(ys, scale, seed):
        return ppl.infer(walk(ys, scale), ALGORITHM, key=jax.random.key(seed))

    def parts(p):
        return p.value, p.sites, p.present, p.log_weights, p.log_evidence, p.diagnostics, p.status

    scales, seeds = jnp.array([0.5, 1.0, 2.0]), jnp.arange(3)
    plain = [run(YS, float(s), int(k)) for s, k in zip(scales, seeds, strict=True)]
    jitted = jax.jit(run)
    mapped = jax.vmap(lambda s, k: run(YS, s, k))(scales, seeds)
    for i in range(3):
        assert_close(parts(jitted(YS, scales[i], seeds[i])), parts(plain[i]))
        assert_close(jax.tree.map(lambda a, i=i: a[i], parts(mapped)), parts(plain[i]))


def test_infer_inside_of_a_jit_without_arguments_gives_the_same_numbers():
    assert_close(
        jax.jit(lambda: ppl.infer(walk(YS), ALGORITHM).log_evidence)(), ppl.infer(walk(YS), ALGORITHM).log_evidence
    )


def test_simulate_takes_traced_and_numpy_seeds():
    expected = ppl.simulate(walk(YS), seed=3).value
    assert_equal(ppl.simulate(walk(YS), seed=np.int32(3)).value, expected)
    assert_equal(ppl.simulate(walk(YS), seed=jax.random.key(3)).value, expected)
    assert_close(jax.vmap(lambda s: ppl.simulate(walk(YS), seed=s).value)(jnp.arange(4))[3], expected)


def test_turning_jit_off_gives_the_same_numbers():
    def run():
        program = walk(YS[:2])
        trace = ppl.simulate(program, seed=2)
        return trace.value, ppl.log_density(program, trace.sites)

    expected = run()
    with jax.disable_jit():
        assert_close(run(), expected)


def _retained():
    gc.collect()
    jaxprs = sum(type(obj).__name__ in ("Jaxpr", "JaxprEqn") for obj in gc.get_objects())
    return jaxprs, len(jax.live_arrays())


def test_repeated_runs_leave_neither_arrays_nor_programs_behind():
    program = ppl.model(lambda ys: ppl.sample("x", dist.Normal(jnp.where(ys > 0, ys, 0.0), 1.0)))
    for seed in range(3):
        finished(ppl.infer(program(YS), ALGORITHM, seed=seed).log_weights)
    before = _retained()
    for seed in range(10):
        finished(ppl.infer(program(YS), ALGORITHM, seed=seed).log_weights)
    assert _retained() == before


SHARDED = """
import jax, numpy as np
from ppl.inference import SMC
from tests.ppl.test_compilation import SOURCE, YS, walk
import ppl
posterior = ppl.infer(walk(YS), SMC(64, ess_threshold=0.7), seed=3)
print(jax.device_count(), *np.asarray(posterior.diagnostics["ancestors"]).ravel(), sep=",")
print(*[float(x).hex() for x in (posterior.log_evidence, *posterior.value.ravel())], sep=",")
"""


def test_run_in_a_process_with_four_devices_gives_the_same_numbers():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    finished_process = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    ancestors, numbers = (line.split(",") for line in finished_process.stdout.strip().splitlines()[-2:])
    assert ancestors[0] == "4"
    posterior = ppl.infer(walk(YS), SMC(64, ess_threshold=0.7), seed=3)
    assert_equal(np.array(ancestors[1:], int), np.asarray(posterior.diagnostics["ancestors"]).ravel())
    assert_close(
        np.array([float.fromhex(x) for x in numbers]), np.array([posterior.log_evidence, *posterior.value.ravel()])
    )
