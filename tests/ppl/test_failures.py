"""What is refused, and what the messages say: the site, the line, what was given, and what to do."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx

import ppl
from ppl.inference import SMC, ImportanceSampling
from tests.ppl.checks import assert_equal

NORMAL = dist.Normal(0.0, 1.0)
HERE = "test_failures.py"


def line_of(function, text):
    """Return `file:line` of the first line of a function that holds a text."""
    lines, first = inspect.getsourcelines(function)
    return f"{HERE}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def run(function, *args, **kwargs):
    return ppl.simulate(ppl.model(function)(*args, **kwargs))


def refusal(error, function, *args):
    """Return the message with which staging a program is refused."""
    with pytest.raises(error) as caught:
        run(function, *args)
    assert isinstance(caught.value, ppl.ProgramError)
    return str(caught.value)


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


# Values and types -------------------------------------------


@pytest.mark.parametrize(
    "law, value",
    [
        (dist.Normal(0.0, 1.0), jnp.zeros(3)),
        (dist.Normal(jnp.zeros(3), 1.0), 0.0),
        (dist.Normal(jnp.zeros(3), 1.0), jnp.zeros(2)),
        (dist.Normal(jnp.zeros(3), 1.0), jnp.zeros((1, 3))),
        (dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)), jnp.zeros(3)),
    ],
    ids=["number, vector", "vector, number", "vector, shorter", "vector, row", "multivariate, longer"],
)
def test_observation_of_another_shape_is_refused_with_both_shapes(law, value):
    def program(y):
        ppl.observe("y", law, y)

    message = refusal(ppl.SiteValueError, program, value)
    shape = law.batch_shape + law.event_shape
    assert "'y'" in message and str(shape) in message and str(jnp.shape(value)) in message
    assert line_of(program, "ppl.observe") in message


@pytest.mark.parametrize("value", ["abc", None, object(), [1.0, "a"]], ids=["text", "None", "object", "list"])
def test_observation_that_is_no_number_is_refused(value):
    message = refusal(ppl.SiteTypeError, lambda: ppl.observe("y", NORMAL, value))
    assert "'y'" in message and HERE in message


def test_observation_of_a_discrete_distribution_must_be_whole():
    message = refusal(ppl.SiteTypeError, lambda: ppl.observe("y", dist.Poisson(2.0), 1.5))
    assert "'y'" in message and "Poisson" in message and "whole" in message
    run(lambda: ppl.observe("y", dist.Bernoulli(0.5), jnp.array(True)))


def test_site_without_a_distribution_is_refused():
    for function in (
        lambda: ppl.sample("x", 3.0),
        lambda: ppl.observe("x", "normal", 3.0),
        lambda: ppl.sample("x", dist.Normal),
        lambda: ppl.sample("x", NORMAL, proposal=1.0),
    ):
        message = refusal(ppl.SiteTypeError, function)
        assert "'x'" in message and HERE in message and "dist" in message


@pytest.mark.parametrize(
    "proposal, error",
    [
        (dist.Normal(jnp.zeros(3), 1.0), ppl.SiteValueError),
        (dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)), ppl.SiteValueError),
        (dist.Bernoulli(0.5), ppl.SiteTypeError),
    ],
    ids=lambda p: type(p).__name__,
)
def test_proposal_over_other_values_is_refused(proposal, error):
    message = refusal(error, lambda: ppl.sample("x", NORMAL, proposal=proposal))
    assert "'x'" in message and "proposal" in message and HERE in message


def test_factor_must_be_one_real_number():
    for value, error in ((jnp.ones(3), ppl.SiteValueError), ("a", ppl.SiteTypeError), (1j, ppl.SiteTypeError)):
        message = refusal(error, lambda value=value: ppl.factor("f", value))
        assert "'f'" in message and HERE in message


def test_plate_that_subsamples_at_random_is_refused():
    def program():
        with numpyro.plate("n", 10, subsample_size=3):
            ppl.sample("x", NORMAL)

    assert "'n'" in refusal(ppl.SiteTypeError, program)


def test_numpyro_statements_without_a_meaning_here_are_refused():
    from numpyro.contrib.control_flow import scan as numpyro_scan

    def stepping():
        return numpyro_scan(lambda c, _: (numpyro.sample("a", dist.Normal(c, 1.0)), None), 0.0, None, length=3)[0]

    assert "ppl.scan" in refusal(ppl.MisplacedSite, stepping)
    assert "'p'" in refusal(ppl.SiteTypeError, lambda: numpyro.param("p", 1.0))
    refusal(ppl.SiteTypeError, numpyro.prng_key)


@pytest.mark.parametrize(
    "loop, words",
    [
        (lambda: ppl.scan(lambda c, x: (c, x), 0.0), "neither"),
        (lambda: ppl.scan(lambda c, x: (c, x), 0.0, jnp.ones(3), length=2), r"\[2, 3\]"),
        (lambda: ppl.scan(lambda c, x: (c, x), 0.0, 3.0), "leading axis"),
        (lambda: ppl.scan(lambda c, x: (c, x), 0.0, length=-1), "-1"),
        (lambda: ppl.scan(lambda c, x: c, 0.0, length=3), r"\(carry, y\)"),
        (lambda: ppl.scan(lambda c, x: ((c, c), 0.0), 0.0, length=3), "structure"),
        (
            lambda: ppl.scan(lambda c, x: ({"a": jnp.stack([c["a"]] * 2)}, 0.0), {"a": 0.0}, length=3),
            r"'a'.*float32\[\]",
        ),
        (lambda: ppl.scan(lambda c, x: (c + 0.5, 0.0), jnp.int32(0), length=3), r"int32\[\].*float32\[\]"),
        (lambda: ppl.scan(lambda c, x: (c, "a"), 0.0, length=3), "str"),
        (lambda: ppl.scan(lambda c, x: ("a", 0.0), 0.0, length=3), "str"),
        (lambda: ppl.scan(lambda c, x: (c, 0.0), "a", length=3), "str"),
        (lambda: ppl.scan(lambda c, x: (c, 0.0), 0.0, length=3, until=lambda c: c), r"one bool, got float32\[\]"),
        (
            lambda: ppl.scan(lambda c, x: (c, 0.0), 0.0, length=3, until=lambda c: jnp.zeros(2) > 0),
            r"one bool, got bool\[2\]",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_loop_that_does_not_fit_together_is_refused_with_its_line(loop, words):
    with pytest.raises(ppl.ProgramError, match=rf"ppl\.scan at {HERE}:\d+") as caught:
        run(loop)
    assert re.search(words, str(caught.value))


@pytest.mark.parametrize(
    "value", ["abc", len, (ppl.sample(f"x{i}", NORMAL) for i in range(3))], ids=["str", "function", "generator"]
)
def test_return_value_that_is_no_pytree_of_arrays_is_refused(value):
    message = refusal(ppl.SiteTypeError, lambda: value)
    assert type(value).__name__ in message and "pytree of arrays" in message


def _walk():
    mu = ppl.sample("mu", NORMAL)
    n = ppl.sample("n", dist.Poisson(2.0))
    ppl.observe("y", NORMAL, mu)
    ppl.deterministic("d", mu)
    ppl.scan(lambda c, _: (c, ppl.sample("z", NORMAL)), 0.0, length=3)
    return n


WALK = ppl.model(_walk)


@pytest.mark.parametrize(
    "sites, error, words",
    [
        ({"mux": 1.0}, ppl.SiteValueError, "'mux'.*'mu'.*'n'.*'z'"),
        ({"y": 1.0}, ppl.SiteValueError, "'y'.*observation"),
        ({"z": 1.0}, ppl.SiteValueError, r"'z'.*\(\).*test_failures.py:\d+.*\(3,\)"),
        ({"n": 1.5}, ppl.SiteTypeError, "'n'.*float32.*int32"),
        ({"mu": "a"}, ppl.SiteTypeError, "'mu'.*str"),
        ({"mu": None}, ppl.SiteTypeError, "'mu'.*None"),
        ({"mu": 1j}, ppl.SiteTypeError, "'mu'.*complex"),
    ],
)
def test_values_that_do_not_fit_the_sites_are_refused(sites, error, words):
    with pytest.raises(error, match=words):
        ppl.simulate(ppl.condition(WALK(), sites))
    complete = {"mu": 0.0, "n": 1, "z": jnp.zeros(3)}
    with pytest.raises(error, match=words):
        ppl.log_density(WALK(), {**complete, **sites})


def test_deterministic_site_cannot_be_conditioned():
    with pytest.raises(ppl.SiteValueError, match="'d'.*deterministic"):
        ppl.simulate(ppl.condition(WALK(), {"d": 1.0}))


def test_log_density_of_an_incomplete_assignment_names_what_is_missing():
    with pytest.raises(ppl.SiteValueError, match=r"\['n', 'z'\]"):
        ppl.log_density(WALK(), {"mu": 0.0})


# Arguments of infer -------------------------------------------


def test_algorithm_class_instead_of_an_object_is_refused():
    with pytest.raises(TypeError, match=r"the class SMC.*|SMC\(num_particles=100\)"):
        ppl.infer(WALK(), SMC)
    with pytest.raises(TypeError, match="str"):
        ppl.infer(WALK(), "SMC")


def test_model_that_was_not_called_is_refused_everywhere():
    for use in (
        lambda: ppl.infer(WALK, SMC(2)),
        lambda: ppl.simulate(WALK),
        lambda: ppl.log_density(WALK, {}),
        lambda: ppl.condition(WALK, {}),
        lambda: run(lambda: ppl.generate(WALK)),
    ):
        with pytest.raises(TypeError, match="_walk.*call it"):
            use()
    with pytest.raises(TypeError, match="program or a process"):
        ppl.infer(_walk, SMC(2))


def test_model_called_with_wrong_arguments_says_so_when_it_is_called():
    with pytest.raises(TypeError, match="branch_on_argument.*unexpected|too many"):
        ppl.model(branch_on_argument)(1.0, 2.0)
    with pytest.raises(TypeError, match="missing.*'y'"):
        ppl.model(lambda y: y)()


def test_keep_must_name_sites():
    with pytest.raises(ppl.SiteValueError, match=r"\['nope'\].*\['d', 'mu', 'n', 'z'\]"):
        ppl.infer(WALK(), SMC(2), keep=["mu", "nope"])
    with pytest.raises(TypeError, match=r"keep=\['mu'\]"):
        ppl.infer(WALK(), SMC(2), keep="mu")


@pytest.mark.parametrize("algorithm", [SMC(2), ImportanceSampling(2)], ids=lambda a: type(a).__name__)
def test_state_is_refused_by_algorithms_that_cannot_continue(algorithm):
    with pytest.raises(ValueError, match=f"`state`.*{type(algorithm).__name__}"):
        ppl.infer(WALK(), algorithm, state=3)


@pytest.mark.parametrize(
    "build, error, words",
    [
        (lambda: SMC(0), ValueError, "`num_particles`.*at least 1.*0"),
        (lambda: SMC(2.0), TypeError, "`num_particles`.*2.0"),
        (lambda: SMC(True), TypeError, "`num_particles`.*True"),
        (lambda: SMC(2, ess_threshold=-0.1), ValueError, "`ess_threshold`.*-0.1"),
        (lambda: SMC(2, ess_threshold=float("nan")), ValueError, "`ess_threshold`.*nan"),
        (lambda: SMC(2, ess_threshold="half"), TypeError, "`ess_threshold`.*'half'"),
        (lambda: SMC(2, resampler="sorted"), ValueError, "'sorted'.*systematic"),
        (lambda: SMC(2, resampler=3), TypeError, "`resampler`.*3"),
        (lambda: ImportanceSampling(-1), ValueError, "`num_particles`.*-1"),
        (lambda: ImportanceSampling("3"), TypeError, "`num_particles`.*'3'"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_settings_are_checked_when_an_algorithm_is_built(build, error, words):
    with pytest.raises(error, match=words):
        build()


# Weights -------------------------------------------

ALGORITHMS = [SMC(8), SMC(8, ess_threshold=1.0), ImportanceSampling(8)]


def weighted(where, value):
    """A program with a factor before, inside of, or after its two loops."""

    @ppl.model
    def program(value):
        a = ppl.sample("a", NORMAL)
        if where == "before":
            ppl.factor("bad", value)

        def step(c, t):
            ppl.sample("x", dist.Normal(a, 1.0))
            if where == "in":
                ppl.factor("bad", jnp.where(t == 2, value, 0.0))
            return c, None

        ppl.scan(step, 0.0, jnp.arange(4))
        ppl.scan(lambda c, _: (c, ppl.sample("y", NORMAL)), 0.0, length=3)
        if where == "after":
            ppl.factor("bad", value)

    return program(value)


PLACES = {"before": "", "in": "at step 2", "after": "outside of the loops"}


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
@pytest.mark.parametrize("where", PLACES)
def test_death_of_all_particles_names_the_step_and_the_sites(where, algorithm):
    with pytest.raises(ppl.AllParticlesDied, match=rf"all 8 particles.*{PLACES[where]}.*'bad' \({HERE}:\d+.*8 times"):
        ppl.infer(weighted(where, -jnp.inf), algorithm)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", PLACES)
def test_nan_and_infinity_on_the_living_name_the_step_and_the_site(where, value):
    with pytest.raises(ppl.InvalidWeight, match=rf"NaN or \+inf.*{PLACES[where]}.*'bad' \({HERE}:\d+"):
        ppl.infer(weighted(where, value), SMC(8))


@pytest.mark.parametrize("loop", ["first", "second"])
def test_message_counts_steps_through_all_loops_in_both_places(loop):
    @ppl.model
    def program():
        for name, length in (("first", 3), ("second", 4)):

            def step(c, t, name=name):
                ppl.sample(f"x {name}", NORMAL)
                ppl.factor(f"f {name}", jnp.where((t == 1) & (name == loop), -jnp.inf, 0.0))
                return c, None

            ppl.scan(step, 0.0, jnp.arange(length))

    step = 1 if loop == "first" else 4
    with pytest.raises(ppl.AllParticlesDied, match=rf"zero at step {step}\..*'f {loop}' \(.*first at step {step};"):
        ppl.infer(program(), SMC(4))


def test_several_killers_are_named_with_their_shares():
    @ppl.model
    def program():
        b = ppl.sample("b", dist.Bernoulli(0.5))
        ppl.factor("zeros", jnp.where(b == 0, -jnp.inf, 0.0))
        ppl.factor("ones", jnp.where(b == 1, -jnp.inf, 0.0))

    with pytest.raises(ppl.AllParticlesDied) as caught:
        ppl.infer(program(), SMC(50))
    counts = [int(n) for n in re.findall(r"(\d+) times", str(caught.value))]
    assert sum(counts) == 50 and min(counts) > 10
    assert "'zeros'" in str(caught.value) and "'ones'" in str(caught.value)


def test_observation_that_no_particle_can_explain_names_its_site():
    with pytest.raises(ppl.AllParticlesDied, match="'y'"):
        ppl.infer(ppl.model(lambda: ppl.observe("y", dist.Exponential(1.0), -1.0))(), SMC(4))


@pytest.mark.parametrize(
    "algorithm", [SMC(64, ess_threshold=0.3), SMC(64, ess_threshold=1.0), ImportanceSampling(64)], ids=repr
)
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_nan_that_a_dead_particle_meets_changes_nothing(algorithm, value):
    def make(later):
        @ppl.model
        def program(later):
            def step(c, _):
                b = ppl.sample("b", dist.Bernoulli(0.8))
                ppl.factor("w", jnp.where(b == 1, 0.25, -jnp.inf))
                ppl.factor("n", jnp.where(b == 1, 0.5, later))
                return c & (b == 1), b

            return ppl.scan(step, True, length=4)

        return program(later)

    ours, clean = (ppl.infer(make(v), algorithm, seed=3) for v in (value, 0.0))
    assert_equal(ours, clean)
    alive = np.asarray(ours.value[0])
    assert_equal(np.isfinite(np.asarray(ours.log_weights)), alive)
    assert 0 < alive.sum() or algorithm.num_particles == 0


def test_dead_particle_is_never_an_ancestor_while_another_lives():
    @ppl.model
    def program():
        def step(c, _):
            b = ppl.sample("b", dist.Bernoulli(0.1))
            ppl.factor("w", jnp.where(b == 1, 0.0, -jnp.inf))
            return c, b

        return ppl.scan(step, 0, length=5)[1]

    for resampler in ("systematic", lambda key, w, num: jax.random.categorical(key, w, shape=(num,))):
        posterior = ppl.infer(program(), SMC(256, resampler=resampler, ess_threshold=1.0))
        assert np.all(np.asarray(posterior.value)[:, :-1] == 1)


def test_failures_under_the_users_own_jit_and_vmap_are_told_by_the_status():
    def run(value):
        posterior = ppl.infer(weighted("in", value), SMC(4))
        return posterior.status, posterior.log_evidence

    status, log_evidence = jax.vmap(run)(jnp.array([0.0, jnp.nan, jnp.inf, -jnp.inf]))
    assert_equal(status.code, [0, 1, 1, 2])
    assert_equal(status.step, [-1, 2, 2, 2])
    assert_equal(status.ok, [True, False, False, False])
    assert float(log_evidence[3]) == -np.inf
    status, _ = jax.jit(run)(-jnp.inf)
    assert "all particles died at step 2" in repr(status)
