"""What an algorithm returns: expectations, resampling, printing, and life as a pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling
from tests.ppl.checks import assert_close, assert_equal, assert_mean_within_5_standard_errors


@ppl.model
def program():
    k = ppl.sample("k", dist.Categorical(probs=jnp.array([0.2, 0.3, 0.5])))
    v = ppl.sample("v", dist.Normal(jnp.zeros((2, 3)), 1.0))
    ppl.factor("f", jnp.array([0.0, -1.0, -jnp.inf])[k])
    ppl.deterministic("flag", k > 0)
    return {"k": k, "v": v}


@pytest.fixture(scope="module")
def posterior():
    return ppl.infer(program(), ImportanceSampling(200))


def test_weights_sum_to_one_and_give_the_ess(posterior):
    weights = np.asarray(posterior.weights, np.float64)
    assert weights.sum() == pytest.approx(1.0, abs=1e-5)
    assert_close(jnp.exp(posterior.log_weights), posterior.weights)
    assert float(posterior.ess) == pytest.approx(1 / np.sum(weights**2), rel=1e-5)
    k = np.asarray(posterior.value["k"])
    assert np.all((weights == 0) == (k == 2))
    assert float(posterior.log_evidence) == pytest.approx(
        np.log(np.mean(np.array([1.0, np.exp(-1), 0.0])[k])), abs=1e-5
    )


def test_expectation_is_the_weighted_mean_of_a_function_of_one_particle(posterior):
    weights, value = np.asarray(posterior.weights), jax.tree.map(np.asarray, posterior.value)
    means = posterior.expectation(lambda x: {"v": x["v"], "one": 1.0, "k": x["k"], "is": x["k"] == 1})
    expected = {
        "v": np.tensordot(weights, value["v"], 1),
        "one": 1.0,
        "k": weights @ value["k"],
        "is": weights @ (value["k"] == 1),
    }
    assert_close(means, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_expectation_does_not_see_particles_of_weight_zero(posterior, bad):
    ours = posterior.expectation(lambda x: jnp.where(x["k"] == 2, bad, x["k"] * 1.0))
    assert_equal(ours, posterior.expectation(lambda x: jnp.where(x["k"] == 2, 0.0, x["k"] * 1.0)))


def test_expectation_of_a_model_that_returns_one_array():
    posterior = ppl.infer(ppl.model(lambda: ppl.sample("x", dist.Bernoulli(0.5)))(), ImportanceSampling(10))
    assert_close(posterior.expectation(lambda x: x), np.mean(posterior.value))


def test_resample_gives_equal_weights_and_whole_particles(posterior):
    drawn = posterior.resample(seed=1, n=50)
    assert drawn.num_particles == 50 and float(drawn.ess) == 50.0
    assert_close(drawn.weights, np.full(50, 1 / 50))
    assert_equal(drawn.sites["k"], drawn.value["k"])
    assert_equal(drawn.sites["flag"], np.asarray(drawn.value["k"]) > 0)
    assert np.all(np.asarray(drawn.value["k"]) < 2)
    known = {row.tobytes() for row in np.asarray(posterior.value["v"])}
    assert {row.tobytes() for row in np.asarray(drawn.value["v"])} <= known
    assert_equal(drawn.log_evidence, posterior.log_evidence)
    assert posterior.resample().num_particles == 200
    assert_equal(posterior.resample(seed=jax.random.key(1), n=50).value, drawn.value)


def test_resample_keeps_expectations_on_average(posterior):
    exact = float(posterior.expectation(lambda x: x["k"] * 1.0))
    means = jax.vmap(lambda key: jnp.mean(1.0 * posterior.resample(key, 7).value["k"]))(
        jax.random.split(jax.random.key(0), 400)
    )
    assert_mean_within_5_standard_errors(means, exact)


def test_text_form_is_a_short_table(posterior):
    text = repr(posterior)
    assert len(text.splitlines()) < 12
    for part in (
        "ImportanceSampling(num_particles=200)",
        "guarantee: unbiased",
        "log-evidence",
        "ESS",
        "of 200",
        "k ",
        "(2, 3)",
    ):
        assert part in text
    weights, k = np.asarray(posterior.weights, np.float64), np.asarray(posterior.value["k"])
    assert f"{weights @ k:.4g}" in text


def test_html_form_is_a_table_with_names_escaped():
    html = ppl.infer(ppl.model(lambda: ppl.sample("a<b>", dist.Normal(0.0, 1.0)))(), SMC(3))._repr_html_()
    assert "<table>" in html and "a&lt;b&gt;" in html and "a<b>" not in html


def test_table_of_a_loop_tells_the_steps():
    walk = ppl.model(lambda: ppl.scan(lambda c, _: (c, ppl.sample("x", dist.Normal(c, 1.0))), 0.0, length=4)[1])
    assert "4 steps" in repr(ppl.infer(walk(), SMC(5)))


def test_diagnostics_of_a_loop_that_never_ran_are_no_numbers_of_a_population():
    step = lambda c, _: (c, ppl.sample("x", dist.Normal(c, 1.0)))  # noqa: E731
    idle = ppl.model(lambda: ppl.scan(step, 5.0, length=3, until=lambda c: c > 1.0)[0])
    posterior = ppl.infer(idle(), SMC(4))
    ess = np.asarray(posterior.diagnostics["ess"])
    assert np.all((ess == 4.0) | np.isnan(ess)) and "smallest ESS 0.0" not in repr(posterior)


def test_posterior_is_a_pytree_that_passes_through_jit_and_vmap(posterior):
    same = jax.jit(lambda p: p)(posterior)
    assert isinstance(same, ppl.Posterior)
    assert_equal(same, posterior)
    assert (same.guarantee, same.algorithm) == (posterior.guarantee, posterior.algorithm)
    assert_close(jax.jit(lambda p: p.expectation(lambda x: x["k"]))(posterior), posterior.expectation(lambda x: x["k"]))
    doubled = jax.tree.map(lambda a: jnp.stack([a, a]), posterior)
    assert "Posterior" in repr(doubled) and "Posterior" in doubled._repr_html_()
    assert_close(
        jax.vmap(lambda p: p.expectation(lambda x: x["k"]))(doubled)[0], posterior.expectation(lambda x: x["k"])
    )


def test_posterior_is_frozen_and_has_no_texts_without_a_text_process(posterior):
    with pytest.raises(dataclasses.FrozenInstanceError):
        posterior.log_evidence = 0.0
    with pytest.raises(AttributeError, match="not a text process"):
        posterior.texts  # noqa: B018


def test_texts_of_a_process_that_writes_some_are_decoded_and_ranked():
    class Letters(ppl.Process):
        num_steps = 1

        def start(self):
            return jnp.int32(0)

        def forward(self, state, step):
            return dist.Categorical(probs=jnp.array([0.1, 0.9]))

        def advance(self, state, drawn, step):
            return drawn

        def texts(self, value):
            return ["no" if v == 0 else "yes" for v in np.asarray(value).tolist()]

    posterior = ppl.infer(Letters(), SMC(100))
    assert len(posterior.texts) == 100 and set(posterior.texts) == {"no", "yes"}
    lines = repr(posterior).splitlines()
    assert "'yes'" in lines[-2] and "'no'" in lines[-1]
    assert "yes" in posterior._repr_html_()


def test_site_present_everywhere_says_so_for_every_particle_and_time():
    @ppl.model
    def loops():
        ppl.sample("a", dist.Normal(0.0, 1.0))
        return ppl.scan(lambda c, _: (c, ppl.sample("x", dist.Normal(jnp.zeros(2), 1.0))), 0.0, length=3)[1]

    present = ppl.infer(loops(), SMC(5)).present
    assert_equal(present["a"], np.ones(5, bool))
    assert_equal(present["x"], np.ones((5, 3), bool))
    assert_equal(ppl.simulate(loops()).present["x"], np.ones(3, bool))


def test_progress_bar_changes_no_number():
    walk = ppl.model(lambda: ppl.scan(lambda c, _: (c, ppl.sample("x", dist.Normal(c, 1.0))), 0.0, length=20)[1])
    assert_equal(ppl.infer(walk(), SMC(3), progress=True), ppl.infer(walk(), SMC(3), progress=False))


# Founders ------------------------------------------------------------------------------------------------------------


def by_hand(ancestors, log_weights):
    """Return how many of the first particles have living descendants."""
    living = np.flatnonzero(np.asarray(log_weights) > -np.inf)
    for parents in np.asarray(ancestors)[::-1]:
        living = parents[living]
    return len(set(living.tolist()))


@ppl.model
def choices(length, kept):
    first = ppl.sample("first", dist.Normal(0.0, 1.0))

    def step(x, t):
        x = ppl.sample("x", dist.Bernoulli(0.5))
        ppl.factor("f", jnp.where(t < kept, 0.0, jnp.where(x == 1, 0.0, -jnp.inf)))
        return x, x

    ppl.scan(step, 0, jnp.arange(length))
    return first


@pytest.mark.parametrize(("length", "threshold"), [(1, 0.0), (3, 1.0), (8, 0.6)])
def test_founders_are_the_first_particles_with_living_descendants(length, threshold):
    posterior = ppl.infer(choices(length, 0), SMC(32, ess_threshold=threshold), seed=2)
    expected = by_hand(posterior.diagnostics["ancestors"], posterior.log_weights)
    assert int(posterior.founders) == expected
    assert f"founders {expected}" in repr(posterior) and f"founders {expected}" in posterior._repr_html_()
    first = np.asarray(posterior.value)[np.asarray(posterior.log_weights) > -np.inf]
    assert len(np.unique(first)) == expected
    for n in (1, 7, 200):
        drawn = posterior.resample(seed=1, n=n)
        assert int(drawn.founders) == len(np.unique(np.asarray(drawn.value)))
        assert int(drawn.resample(seed=2).founders) <= int(drawn.founders)


def test_one_founder_is_said_aloud():
    posterior = ppl.infer(choices(12, 0), SMC(4, ess_threshold=1.0), seed=1)
    assert int(posterior.founders) == 1
    assert "warning: all living particles descend from one" in repr(posterior)
    assert "warning: all living particles descend from one" in posterior._repr_html_()
    assert "warning" not in repr(ppl.infer(choices(1, 9), SMC(1)))  # a population of one has no other
    several = ppl.infer(choices(1, 9), ImportanceSampling(8))
    assert int(several.founders) == 8 and "warning" not in repr(several)
