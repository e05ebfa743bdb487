"""Values, arguments and weights that are refused, and what the messages say: the site, the line, what to do."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import MCMC, MH, SMC, ImportanceSampling, PaRIS, Regenerate, TemperedSMC
from ppl.models import MarkovChain
from tests.ppl.checks import assert_equal, line_of, refusal, run

NORMAL = dist.Normal(0.0, 1.0)
HERE = "test_failures.py"


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
        ppl.condition(WALK(), sites)  # at once: nothing is run
    with pytest.raises(error, match=words):
        ppl.condition(ppl.condition(WALK(), {"mu": 0.0, "z": jnp.ones(3)}), sites)
    complete = {"mu": 0.0, "n": 1, "z": jnp.zeros(3)}
    with pytest.raises(error, match=words):
        ppl.log_density(WALK(), {**complete, **sites})


def test_deterministic_site_cannot_be_conditioned():
    with pytest.raises(ppl.SiteValueError, match="'d'.*deterministic"):
        ppl.condition(WALK(), {"d": 1.0})


@pytest.mark.parametrize("sites", [[("mu", 1.0)], "mu", None, 1.0])
def test_conditions_are_a_dictionary(sites):
    with pytest.raises(ppl.SiteTypeError, match="`sites` must be a dictionary of values by name, got"):
        ppl.condition(WALK(), sites)


def test_conditions_on_a_generated_program_are_checked_where_they_stand():
    @ppl.model
    def outer():
        return ppl.generate(ppl.condition(WALK(), {"mux": 1.0}), name="inner")

    with pytest.raises(ppl.SiteValueError, match="condition: 'mux' is not a site"):
        outer().stage()


def test_a_later_condition_replaces_an_earlier_one():
    program = ppl.condition(ppl.condition(WALK(), {"mu": 0.0}), {"mu": 2.0})
    assert float(ppl.simulate(program).sites["d"]) == 2.0


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
    def scaled(scale=None):
        return scale

    with pytest.raises(TypeError, match="scaled.*unexpected|too many"):
        ppl.model(scaled)(1.0, 2.0)
    with pytest.raises(TypeError, match="missing.*'y'"):
        ppl.model(lambda y: y)()


def test_keep_must_name_sites():
    with pytest.raises(ppl.SiteValueError, match=r"\['nope'\].*\['d', 'mu', 'n', 'z'\]"):
        ppl.infer(WALK(), SMC(2), keep=["mu", "nope"])
    with pytest.raises(TypeError, match=r"keep=\['mu'\]"):
        ppl.infer(WALK(), SMC(2), keep="mu")
    for keep in (5, ["mu", 1], [None]):
        with pytest.raises(TypeError, match=f"`keep` must be a list of site names, got {re.escape(repr(keep))}"):
            ppl.infer(WALK(), SMC(2), keep=keep)


SEEDS = [
    (1.5, "an int or a PRNG key such as .* got 1.5"),
    ("a", "got 'a'"),
    (None, "got None"),
    (True, "got True"),
    (1j, "got 1j"),
    (np.float32(2.0), "got .*2.0"),
    (jnp.float32(2.0), "got .*2."),
    ([1, 2], r"got \[1, 2\]"),
    (np.zeros(3, np.uint32), r"got uint32\[3\]"),
    (2**32, f"from {-(2**31)} to {2**32 - 1}, got {2**32}; take seed % 2\\*\\*32"),
    (2**70, f"got {2**70}"),
    (-(2**31) - 1, f"got {-(2**31) - 1}"),
    (np.uint64(2**63 + 5), f"got {2**63 + 5}"),
    (jax.random.split(jax.random.key(0), 3), r"holds 3 PRNG keys, of shape \(3,\)"),
]


@pytest.mark.parametrize("seed, words", SEEDS, ids=lambda s: str(s)[:12])
def test_seed_that_is_none_is_refused(seed, words):
    """A seed beyond 32 bits would be another's: JAX drops the higher bits."""
    with pytest.raises((TypeError, ValueError), match=rf"^`seed`.* {words}"):
        ppl.infer(WALK(), SMC(2), seed=seed)
    if not isinstance(seed, jax.Array):
        with pytest.raises((TypeError, ValueError), match=words):
            ppl.simulate(WALK(), seed=seed)
    if seed is not None:
        with pytest.raises((TypeError, ValueError), match=rf"^`key`.* {words}"):
            ppl.infer(WALK(), SMC(2), key=seed)


def test_seeds_of_every_integer_type_are_the_same_seed():
    expected = ppl.simulate(WALK(), seed=3).sites["mu"]
    keys = jax.random.key(3), jax.random.PRNGKey(3), np.asarray(jax.random.key_data(jax.random.key(3)))
    for seed in (np.int8(3), np.uint64(3), jnp.int32(3), np.array(3), *keys):
        assert_equal(ppl.simulate(WALK(), seed=seed).sites["mu"], expected)
    values = [float(ppl.simulate(WALK(), seed=seed).sites["mu"]) for seed in (-1, 0, -(2**31), 2**32 - 2)]
    assert len(set(values)) == 4


@pytest.mark.parametrize("algorithm", [SMC(2), ImportanceSampling(2)], ids=lambda a: type(a).__name__)
def test_state_is_refused_by_algorithms_that_cannot_continue(algorithm):
    with pytest.raises(ValueError, match=f"`state`.*{type(algorithm).__name__}"):
        ppl.infer(WALK(), algorithm, state=3)


@pytest.fixture(scope="module")
def chain_state():
    return ppl.infer(_normals(2), CHAINS).state


def _normals(num, name="x", more=False):
    @ppl.model
    def program():
        x = ppl.sample(name, dist.Normal(jnp.zeros(num), 1.0).to_event(1))
        if more:
            ppl.sample("more", dist.Bernoulli(0.5))
        ppl.observe("y", dist.Normal(x.sum(), 1.0), 0.3)

    return program()


CHAINS = MCMC(Regenerate(), num_samples=2, num_chains=2)


@pytest.mark.parametrize(
    "program, algorithm, words",
    [
        (_normals(3), CHAINS, r"another program: 'x' float32\[2\] there, float32\[3\] here"),
        (_normals(2, "z"), CHAINS, r"'x' float32\[2\] there, missing here, 'z' missing there, float32\[2\] here"),
        (_normals(2, more=True), CHAINS, r"'more' missing there, int32\[\] here"),
        (_normals(2), MCMC(Regenerate("x"), 2, num_chains=2), "belongs to chains of Regenerate.*this is Regenerate"),
        (_normals(2), MCMC(Regenerate(), 2, num_chains=3), "holds 2 chains, `num_chains` is 3"),
    ],
    ids=["another shape", "another name", "one more site", "another kernel", "more chains"],
)
def test_state_of_other_chains_says_what_differs(chain_state, program, algorithm, words):
    with pytest.raises(ValueError, match=f"`state` .*{words}"):
        ppl.infer(program, algorithm, state=chain_state)


def test_state_must_be_one_and_its_own_continues(chain_state):
    with pytest.raises(TypeError, match="`state` must be `posterior.state` of an earlier chain, got Posterior"):
        ppl.infer(_normals(2), CHAINS, state=ppl.infer(_normals(2), CHAINS))
    again = pickle.loads(pickle.dumps(chain_state))
    found, other = (ppl.infer(_normals(2), CHAINS, state=state) for state in (chain_state, again))
    assert_equal(found.sites["x"], other.sites["x"])


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


@ppl.model
def _two_culprits(reads_outside):
    d = ppl.sample("d", NORMAL) if reads_outside else 0.0

    def step(x, t):
        x = ppl.sample("x", dist.Normal(0.5 * x + d, 1.0))
        ppl.factor("high", jnp.where((t == 3) & (x > 0.5), jnp.nan, 0.0))
        ppl.factor("low", jnp.where((t == 3) & (x < -0.5), jnp.nan, 0.0))
        return x, None

    ppl.scan(step, 0.0, jnp.arange(5))


PLAIN = SMC(6, ess_threshold=0.0)
MOVES = MH(lambda sites: {"d": dist.Normal(sites["d"], 1.0)})
REPEATED = {
    "plain": (True, PLAIN),
    "moves": (True, SMC(6, ess_threshold=0.0, rejuvenation=MOVES)),
    "PaRIS": (False, PaRIS(PLAIN, lambda before, now, t: now["x"])),
}


@pytest.mark.parametrize("how", REPEATED)
def test_blame_repeats_the_very_run(how):
    """Nobody is resampled: the particles of a run under `jit`, where nothing is raised, are those to be blamed."""
    program, algorithm = _two_culprits(REPEATED[how][0]), REPEATED[how][1]
    drawn = jax.jit(lambda key: ppl.infer(program, algorithm, key=key, keep=["x"]).sites["x"])
    for seed in range(4):
        x = np.asarray(drawn(jax.random.key(seed)))[:, 3]
        with pytest.raises(ppl.InvalidWeight, match=r"\+inf at step 3\.") as caught:
            ppl.infer(program, algorithm, seed=seed)
        named = re.findall(r"'(high|low)' \([^)]*first at step 3; (\d+) times\)", str(caught.value))
        counts = {"high": int(np.sum(x > 0.5)), "low": int(np.sum(x < -0.5))}
        assert {name: int(count) for name, count in named} == {name: n for name, n in counts.items() if n}


def test_blame_that_repeats_something_else_says_so():
    words = "'(high|low)' .*, as the draws that it starts from tell: the run itself was not repeated"
    with pytest.raises(ppl.InvalidWeight, match=words):
        ppl.infer(_two_culprits(True), TemperedSMC(6, MOVES, temperatures=(2.0, 1.0)))


def test_a_twist_of_the_algorithm_is_blamed():
    chain = MarkovChain(jnp.zeros(2), jnp.zeros((2, 2)), 3)
    with pytest.raises(ppl.InvalidWeight, match=r"came from 'twist' \(\d+ times\)"):
        ppl.infer(chain, SMC(4, twist=lambda state: jnp.where(state["length"] == 2, jnp.nan, 0.0)))


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
