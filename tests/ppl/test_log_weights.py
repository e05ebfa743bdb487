"""Rewards, twists and potentials that cannot be meant are refused while the program is staged; nothing is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling, RandomSearch, ZeroOrderSearch
from ppl.models import GaussianMixture, MarkovChain, VarianceExploding

CHAIN = MarkovChain(jnp.zeros(3), jnp.zeros((3, 3)), 4)
IMAGE = GaussianMixture(np.array([[0.0, 1.0]]), 0.5).diffuse(VarianceExploding(0.01, 4.0)).reverse(3)

PLACES = {
    "log_reward": lambda f: CHAIN.tilt(f),
    "twist": lambda f: CHAIN.tilt(lambda value: 0.0, twist=f),
    "steered twist": lambda f: CHAIN.tilt(lambda value: 0.0, twist=ppl.steering(f, "max")),
    "log_weight": lambda f: CHAIN.weigh_steps(f),
}


def ones(value):
    return jnp.sum(value["tokens"] == 1)


FAULTS = {
    "a truth value": (lambda v: jnp.all(v["tokens"] == 1), ppl.SiteTypeError, r"truth.*where\(ok, 0.0, -jnp.inf\)"),
    "a comparison": (lambda v: v["tokens"][0] > 0, ppl.SiteTypeError, "truth value"),
    "a plain truth value": (lambda v: True, ppl.SiteTypeError, "truth value"),
    "many truth values": (lambda v: v["tokens"] > 0, ppl.SiteTypeError, "truth value"),
    "the count of entries": (lambda v: len(v), ppl.SiteValueError, "returned [0-9] whatever it was given"),
    "a shape": (lambda v: v["tokens"].shape[0] * 1.5, ppl.SiteValueError, "returned 6 whatever it was given"),
    "an array of the count": (lambda v: jnp.log(jnp.float32(len(v["tokens"]))), ppl.SiteValueError, "whatever it was"),
    "a constant": (lambda v: -2.5, ppl.SiteValueError, "returned -2.5 whatever .* ppl.factor"),
    "minus infinity": (lambda v: -jnp.inf, ppl.SiteValueError, "returned -inf whatever"),
    "a vector": (lambda v: v["tokens"] * 1.0, ppl.SiteValueError, r"returned shape \(4,\); it must return one real"),
    "a column": (lambda v: ones(v)[None], ppl.SiteValueError, r"returned shape \(1,\)"),
    "a complex number": (lambda v: ones(v) * 1j, ppl.SiteTypeError, "returned complex64"),
    "a string": (lambda v: "good", ppl.SiteTypeError, "returned str; it must return one real number"),
    "nothing": (lambda v: None, ppl.SiteTypeError, "returned NoneType"),
    "a pair": (lambda v: (ones(v), ones(v)), ppl.SiteTypeError, "returned tuple"),
    "the value": (lambda v: v, ppl.SiteTypeError, "returned dict"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_log_weight_that_cannot_be_meant_is_refused_with_what_the_function_sees(place, fault):
    function, error, words = FAULTS[fault]
    sees = {"log_reward": "the finished value", "log_weight": "the running state"}.get(place, "the running state")
    name = place.split()[-1]
    message = rf"the function given as `{name}`, which sees {sees} \{{.*'tokens': int32\[4\].*\}}, .*{words}"
    with pytest.raises(error, match=message):
        PLACES[place](function).program().stage()


GOOD = {
    "a whole number": ones,
    "a small whole number": lambda v: ones(v).astype(jnp.int8),
    "half precision": lambda v: ones(v).astype(jnp.bfloat16),
    "a choice": lambda v: jnp.where(v["tokens"][0] == 1, 0.0, -jnp.inf),
    "jitted": jax.jit(ones),
    "no reward": lambda v: 0.0,
    "no reward, whole": lambda v: 0,
    "no reward, as an array": lambda v: jnp.zeros(()),
    "a table": lambda v: jnp.array([0.0, 1.0, 2.0])[v["tokens"][1]],
    "a loop": lambda v: jax.lax.fori_loop(0, 3, lambda i, x: x + v["tokens"][i], 0),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", GOOD)
def test_real_numbers_of_every_type_are_log_weights(place, kind):
    PLACES[place](GOOD[kind]).program().stage()


@pytest.mark.parametrize("search", [RandomSearch(60), ZeroOrderSearch(60)], ids=lambda s: type(s).__name__)
def test_searches_and_twists_of_algorithms_refuse_the_same(search):
    with pytest.raises(ppl.SiteTypeError, match=r"`log_reward`, which sees the finished value float32\[2\], .*truth"):
        ppl.infer(IMAGE.tilt(lambda x: jnp.all(x > 0)), search)
    with pytest.raises(ppl.SiteValueError, match="`log_reward`.* returned 2 whatever it was given"):
        ppl.infer(IMAGE.tilt(len), search)
    with pytest.raises(ppl.SiteTypeError, match=r"`twist`, which sees the running state .*'denoised': float32\[2\]"):
        ppl.infer(IMAGE, SMC(4, twist=lambda state: state["x"][0] > 0))


def test_a_reward_may_depend_on_arguments_of_a_model_beside_its_value():
    @ppl.model
    def program(strength):
        return ppl.generate(CHAIN.tilt(lambda value: strength * ones(value)))["tokens"]

    @ppl.model
    def constant(strength):
        return ppl.generate(CHAIN.tilt(lambda value: strength))["tokens"]

    program(0.5).stage()
    with pytest.raises(ppl.SiteValueError, match="returned a number whatever it was given"):
        constant(0.5).stage()


def test_values_of_integer_rewards_are_exact():
    found = ppl.infer(CHAIN.tilt(ones), ImportanceSampling(16), seed=2)
    counts = np.sum(np.asarray(found.value["tokens"]) == 1, axis=1)
    np.testing.assert_allclose(found.log_evidence, np.log(np.mean(np.exp(counts))), rtol=1e-5)


@pytest.mark.parametrize("factor", [ppl.factor, numpyro.factor])
@pytest.mark.parametrize("value", [True, np.bool_(False), "traced"])
def test_truth_value_as_a_factor_is_refused(factor, value):
    @ppl.model
    def program():
        x = ppl.sample("x", dist.Normal(0.0, 1.0))
        factor("positive", x > 0 if isinstance(value, str) else value)

    with pytest.raises(ppl.SiteTypeError, match=r"factor\('positive'\) .* truth value, .*where\(ok, 0.0, -jnp.inf\)"):
        program().stage()


@pytest.mark.parametrize("law", [dist.Normal(0.0, 1.0), dist.Beta(1.0, 2.0), dist.Gamma(1.0, 2.0)])
def test_truth_value_observed_of_a_continuous_law_is_refused(law):
    @ppl.model
    def program(value):
        ppl.observe("y", law, value)

    with pytest.raises(ppl.SiteTypeError, match=r"observe\('y'\) .* is continuous, the value is bool"):
        program(jnp.array(True)).stage()
    program(1).stage()  # whole numbers are real ones


def test_truth_values_are_data_of_discrete_laws():
    @ppl.model
    def program(value):
        ppl.observe("y", dist.Bernoulli(0.25), value)

    assert float(ppl.log_density(program(jnp.array(True)), {})) == pytest.approx(np.log(0.25))
