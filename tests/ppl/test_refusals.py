"""Programs that are refused while they are staged: names, places and branches; the site, the line, what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx

import ppl
from tests.ppl.checks import assert_equal, line_of, refusal, run

NORMAL = dist.Normal(0.0, 1.0)
HERE = "test_refusals.py"


# Names -------------------------------------------


def _twice():
    ppl.sample("a", NORMAL)
    ppl.sample("b", NORMAL)
    ppl.sample("a", dist.Normal(1.0, 1.0))


def test_duplicate_site_names_both_lines_and_the_remedy():
    message = refusal(ppl.DuplicateSite, _twice)
    assert "'a'" in message and "ppl.scope" in message
    assert line_of(_twice, '"a", NORMAL') in message and line_of(_twice, "dist.Normal(1.0") in message


@pytest.mark.parametrize(
    "second",
    [
        lambda: ppl.observe("a", NORMAL, 0.0),
        lambda: ppl.factor("a", 0.0),
        lambda: ppl.deterministic("a", 0.0),
        lambda: numpyro.sample("a", NORMAL),
        lambda: ppl.scan(lambda c, _: (c, ppl.sample("a", NORMAL)), 0.0, length=2),
        lambda: jax.jit(lambda: ppl.sample("a", NORMAL))(),
    ],
    ids=["observe", "factor", "deterministic", "numpyro", "in a loop", "in a jitted helper"],
)
def test_duplicate_is_found_between_statements_of_all_kinds(second):
    assert "'a'" in refusal(ppl.DuplicateSite, lambda: (ppl.sample("a", NORMAL), second()))


def test_duplicate_is_found_in_generated_programs_and_cured_by_a_name():
    inner = ppl.model(lambda: ppl.sample("x", NORMAL))
    refusal(ppl.DuplicateSite, lambda: (ppl.generate(inner()), ppl.generate(inner())))
    trace = run(lambda: (ppl.generate(inner(), name="a"), ppl.generate(inner(), name="b")))
    assert set(trace.sites) == {"a/x", "b/x"}


def test_helper_called_twice_in_one_model_is_a_duplicate_though_jit_caches_it():
    @jax.jit
    def helper(x):
        return ppl.sample("h", dist.Normal(x, 1.0))

    assert "'h'" in refusal(ppl.DuplicateSite, lambda: helper(0.0) + helper(1.0))


@pytest.mark.parametrize("name", [3, None, ("a",)])
def test_name_that_is_no_string_is_refused(name):
    assert repr(name) in refusal(ppl.SiteTypeError, lambda: ppl.sample(name, NORMAL))


# Transformations of the user's own -------------------------------------------


def in_scan():
    return jax.lax.scan(lambda c, _: (ppl.sample("a", dist.Normal(c, 1.0)), None), 0.0, None, length=3)[0]


def in_scan_independent():
    return jax.lax.scan(lambda c, _: (c + ppl.sample("a", NORMAL), None), 0.0, None, length=3)[0]


def in_cond():
    z = ppl.sample("z", NORMAL)
    return jax.lax.cond(z > 0, lambda: ppl.sample("a", NORMAL), lambda: 0.0)


def in_switch():
    return jax.lax.switch(1, [lambda: 0.0, lambda: ppl.sample("a", NORMAL)])


def in_while_loop():
    return jax.lax.while_loop(lambda c: c < 3, lambda c: c + ppl.sample("a", NORMAL), 0.0)


def in_map():
    return jax.lax.map(lambda m: ppl.sample("a", dist.Normal(m, 1.0)), jnp.arange(3.0))


def in_vmap():
    return jax.vmap(lambda m: ppl.sample("a", dist.Normal(m, 1.0)))(jnp.arange(3.0))


def in_vmap_independent():
    return jax.vmap(lambda m: ppl.sample("a", NORMAL) + m)(jnp.arange(3.0))


def in_vmap_of_jit_independent():
    return jax.vmap(jax.jit(lambda m: ppl.sample("a", NORMAL) + m))(jnp.arange(3.0))


def in_grad():
    return jax.grad(lambda m: ppl.sample("a", dist.Normal(m, 1.0)))(2.0)


def in_grad_independent():
    return jax.grad(lambda m: ppl.sample("a", NORMAL) * m)(2.0)


def in_grad_of_jit_independent():
    return jax.grad(jax.jit(lambda m: ppl.sample("a", NORMAL) * m))(2.0)


def in_jvp():
    return jax.jvp(lambda m: ppl.sample("a", NORMAL) * m, (2.0,), (1.0,))


def in_vjp():
    return jax.vjp(lambda m: ppl.sample("a", NORMAL) * m, 2.0)[0]


def in_checkpoint():
    return jax.checkpoint(lambda m: ppl.sample("a", dist.Normal(m, 1.0)))(2.0)


MISPLACED = {
    in_scan: ("jax.lax.scan", "ppl.scan"),
    in_scan_independent: ("jax.lax.scan", "ppl.scan"),
    in_cond: ("jax.lax.cond", "jnp.where"),
    in_switch: ("jax.lax.cond", "jnp.where"),
    in_while_loop: ("jax.lax.while_loop", "ppl.scan"),
    in_map: ("jax.lax.scan", "ppl.scan"),
    in_vmap: ("jax.vmap", "plate"),
    in_vmap_independent: ("jax.vmap", "plate"),
    in_vmap_of_jit_independent: ("jax.vmap", "plate"),
    in_grad: ("jax.grad", "ppl.log_density"),
    in_grad_independent: ("jax.grad", "ppl.log_density"),
    in_grad_of_jit_independent: ("jax.grad", "ppl.log_density"),
    in_jvp: ("jax.grad", "ppl.log_density"),
    in_vjp: ("jax.grad", "ppl.log_density"),
    in_checkpoint: ("jax.checkpoint", ""),
}


@pytest.mark.parametrize("function", MISPLACED, ids=lambda f: f.__name__)
def test_site_inside_a_transformation_of_the_users_own_is_refused(function):
    message = refusal(ppl.MisplacedSite, function)
    transformation, remedy = MISPLACED[function]
    assert "'a'" in message and transformation in message and remedy in message
    assert line_of(function, '"a"') in message


@pytest.mark.parametrize(
    "statement",
    [
        lambda m: ppl.factor("a", m),
        lambda m: ppl.observe("a", NORMAL, m),
        lambda m: ppl.deterministic("a", m),
        lambda m: numpyro.sample("a", dist.Normal(m, 1.0)),
        lambda m: ppl.scan(lambda c, _: (c, None), m, length=2)[0],
        lambda m: ppl.generate(ppl.model(lambda: ppl.sample("a", NORMAL))()),
    ],
    ids=["factor", "observe", "deterministic", "numpyro", "scan", "generate"],
)
def test_every_statement_is_refused_inside_vmap(statement):
    message = refusal(ppl.MisplacedSite, lambda: jax.vmap(lambda m: (statement(m), m)[1])(jnp.arange(3.0)))
    assert "jax.vmap" in message and HERE in message


def test_transformations_around_computations_without_sites_are_welcome():
    def program():
        x = ppl.sample("x", NORMAL)
        y = jax.vmap(lambda m: m * x)(jnp.arange(3.0))
        z = jax.grad(lambda m: m**2 * x)(2.0)
        w = jax.lax.cond(x > 0, lambda: x, lambda: -x)
        return ppl.observe("y", dist.Normal(y.sum() + z + w, 1.0), 0.5)

    assert np.isfinite(run(program).log_density)


def test_statement_outside_of_a_model_is_refused():
    for statement in (
        lambda: ppl.sample("a", NORMAL),
        lambda: ppl.observe("a", NORMAL, 0.0),
        lambda: ppl.factor("a", 0.0),
        lambda: ppl.deterministic("a", 0.0),
        lambda: ppl.scan(lambda c, _: (c, None), 0.0, length=1),
        lambda: ppl.generate(ppl.model(lambda: 1)()),
    ):
        with pytest.raises(ppl.MisplacedSite, match=rf"{HERE}:\d+.*outside of a model.*@ppl\.model"):
            statement()


def test_site_in_the_predicate_of_a_loop_is_refused():
    def program():
        stop = lambda c: ppl.sample("stop", dist.Bernoulli(0.5)) > 0  # noqa: E731
        return ppl.scan(lambda c, _: (c, None), 0.0, length=3, until=stop)[0]

    message = refusal(ppl.MisplacedSite, program)
    assert "'stop'" in message and "until" in message


class Network(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


@pytest.mark.parametrize("transformation", [nnx.jit, nnx.remat], ids=["nnx.jit", "nnx.remat"])
def test_flax_transformation_inside_a_model_is_refused_and_leaves_the_network_usable(transformation):
    network = Network()
    before = np.asarray(network(jnp.ones(3)))

    def program():
        x = ppl.sample("x", NORMAL.expand([3]))
        return transformation(lambda net, x: net(x))(network, x)

    message = refusal(ppl.MisplacedSite, program)
    assert "nnx.split" in message and HERE in message
    assert_equal(network(jnp.ones(3)), before)
    assert run(lambda: network(ppl.sample("x", NORMAL.expand([3])))).value.shape == (2,)


# Values that are known only when the program runs -------------------------------------------


def branch_on_site():
    z = ppl.sample("z", NORMAL)
    if z > 0:
        return z
    return -z


def branch_on_argument(scale=None):
    if scale > 0:
        return ppl.sample("x", NORMAL)


def loop_over_argument(count=None):
    for _ in range(count):
        ppl.sample("x", NORMAL)


def float_of_site():
    z = ppl.sample("z", NORMAL)
    return float(z)


def int_of_site():
    z = ppl.sample("z", dist.Bernoulli(0.5))
    return [1, 2][int(z)]


def index_of_a_list():
    z = ppl.sample("z", dist.Bernoulli(0.5))
    return [1, 2][z]


def array_of_site():
    z = ppl.sample("z", NORMAL)
    return np.asarray(z)


def boolean_mask():
    z = ppl.sample("z", NORMAL)
    return jnp.arange(3)[jnp.arange(3) > z]


def shape_of_site():
    z = ppl.sample("z", dist.Bernoulli(0.5))
    return jnp.zeros(z)


BRANCHES = {
    branch_on_site: ("if z > 0", "the site 'z'", ()),
    branch_on_argument: ("if scale > 0", "the argument 'scale'", (1.5,)),
    loop_over_argument: ("range(count)", "the argument 'count'", (jnp.int32(3),)),
    float_of_site: ("float(z)", "the site 'z'", ()),
    int_of_site: ("int(z)", "the site 'z'", ()),
    index_of_a_list: ("[z]", "the site 'z'", ()),
    array_of_site: ("np.asarray(z)", "the site 'z'", ()),
    boolean_mask: ("jnp.arange(3) > z", "the site 'z'", ()),
    shape_of_site: ("jnp.zeros(z)", "the site 'z'", ()),
}


@pytest.mark.parametrize("function", BRANCHES, ids=lambda f: f.__name__)
def test_python_that_needs_a_value_of_the_run_is_refused(function):
    text, culprit, args = BRANCHES[function]
    message = refusal(ppl.BranchError, function, *args)
    assert culprit in message and text in message and "jnp.where" in message and "ppl.static" in message
    assert line_of(function, text) in message


def test_branch_inside_a_loop_names_the_line():
    def step(c, _):
        z = ppl.sample("z", NORMAL)
        return (c + 1 if z > 0 else c), None

    message = refusal(ppl.BranchError, lambda: ppl.scan(step, 0, length=2))
    assert line_of(step, "z > 0") in message and "'z'" in message


def test_branch_on_an_int_or_a_static_argument_is_python():
    assert set(run(loop_over_argument, 1).sites) == {"x"}
    assert set(run(branch_on_argument, ppl.static(1.5)).sites) == {"x"}
    assert set(run(branch_on_argument, 2).sites) == {"x"}
    assert set(run(lambda options: branch_on_argument(**options), {"scale": ppl.static(0.5)}).sites) == {"x"}
