"""What ArviZ is given: groups, dimensions, weights, and what was absent."""

import dataclasses
import sys

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling

OBSERVED = np.array([0.3, 1.0, 2.0, 1.5], np.float32)


@ppl.model
def walk(observed):
    drift = ppl.sample("prior/drift", dist.Normal(0.0, 1.0))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + drift * jnp.ones(2), 1.0))
        ppl.observe("y", dist.Normal(x.sum(), 0.5), y)
        ppl.deterministic("large", x.sum() > 1.0)
        return x, x

    def stopping(count, _):
        return count + 1, ppl.sample("z", dist.Normal(0.0, 1.0))

    _, path = ppl.scan(step, jnp.zeros(2), observed)
    ppl.scan(stopping, jnp.int32(0), length=3, until=lambda count: count >= 2)
    return path


@pytest.fixture(scope="module")
def posterior():
    return ppl.infer(walk(jnp.asarray(OBSERVED)), SMC(8))


def as_chains(posterior):
    """Return the same draws as if two chains of four had made them."""
    size = posterior.num_particles
    return dataclasses.replace(
        posterior,
        log_weights=jnp.full(size, -jnp.log(float(size))),
        log_evidence=jnp.nan,
        diagnostics={"acceptance": jnp.arange(8.0).reshape(2, 4) / 8},
        guarantee="invariant",
        num_chains=2,
    )


def test_population_is_one_chain_with_its_weights(posterior):
    tree = posterior.to_arviz({"y": OBSERVED})
    draws = tree["posterior"]
    assert draws["x"].dims == ("chain", "draw", "time_4", "x_dim_0")
    assert draws["large"].dims == ("chain", "draw", "time_4") and draws["large"].dtype == np.int8
    assert draws["prior.drift"].dims == ("chain", "draw")
    assert draws["z"].dims == ("chain", "draw", "time_3")
    np.testing.assert_array_equal(draws["x"].values, np.asarray(posterior.sites["x"])[None])
    np.testing.assert_array_equal(tree["sample_stats"]["log_weight"].values, posterior.log_weights[None])
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, OBSERVED)
    assert "acceptance" not in tree["sample_stats"]


def test_absent_entries_are_not_draws(posterior):
    tree = posterior.to_arviz()
    z, present = tree["posterior"]["z"].values[0], tree["sample_stats"]["present.z"].values[0]
    np.testing.assert_array_equal(present, np.asarray(posterior.present["z"]))
    np.testing.assert_array_equal(present, [[True, True, False]] * 8)
    np.testing.assert_array_equal(np.isnan(z), ~present)
    np.testing.assert_array_equal(z[present], np.asarray(posterior.sites["z"])[present])
    assert "present.x" not in tree["sample_stats"]


def test_attributes_and_steps_tell_of_the_run(posterior):
    tree = posterior.to_arviz()
    for attributes in (tree.attrs, tree["posterior"].attrs):
        assert attributes["guarantee"] == "unbiased" and attributes["algorithm"] == "SMC(num_particles=8)"
        assert attributes["log_evidence"] == float(posterior.log_evidence)
        np.testing.assert_equal(attributes["log_evidence_error"], float(posterior.log_evidence_error))
    steps = tree["population"]
    assert steps["ancestors"].dims == ("step", "draw") and steps["ess"].dims == ("step",)
    for name in ("ess", "resampled", "log_evidence", "ancestors"):
        np.testing.assert_array_equal(steps[name].values, posterior.diagnostics[name])


def test_chains_stand_side_by_side(posterior):
    chains = as_chains(posterior)
    tree = chains.to_arviz()
    assert dict(tree["posterior"]["x"].sizes) == {"chain": 2, "draw": 4, "time_4": 4, "x_dim_0": 2}
    np.testing.assert_array_equal(tree["posterior"]["prior.drift"].values[1], posterior.sites["prior/drift"][4:])
    np.testing.assert_array_equal(tree["sample_stats"]["acceptance"].values, chains.diagnostics["acceptance"])
    assert np.isnan(tree.attrs["log_evidence"]) and np.isnan(tree.attrs["log_evidence_error"])
    assert "population" not in getattr(tree, "children", tree)


def test_arviz_reads_it(posterior):
    table = arviz.summary(as_chains(posterior).to_arviz(), kind="stats", round_to="none")
    assert float(table.loc["prior.drift", "mean"]) == pytest.approx(
        float(np.mean(posterior.sites["prior/drift"])), rel=1e-5
    )


def test_value_stands_in_for_sites_that_were_not_kept():
    program = ppl.model(lambda: {"a": ppl.sample("x", dist.Normal(0.0, 1.0)), "b": [jnp.zeros(3)]})
    posterior = ppl.infer(program(), ImportanceSampling(5), keep=[])
    draws = posterior.to_arviz()["posterior"]
    np.testing.assert_array_equal(draws["a"].values[0], posterior.value["a"])
    assert draws["b.0"].dims == ("chain", "draw", "b.0_dim_0")


def test_time_axes_of_inner_loops_have_names_of_their_own():

    def outer(carry, _):
        ys = ppl.scan(lambda c, _: (c, ppl.sample("x", dist.Normal(0.0, 1.0))), carry, length=2)[1]
        return carry, ys

    program = ppl.model(lambda: ppl.scan(outer, 0.0, length=2)[1])
    draws = ppl.infer(program(), ImportanceSampling(4)).to_arviz()["posterior"]
    assert draws["x"].dims == ("chain", "draw", "time", "inner_time")


def test_several_runs_are_refused(posterior):
    with pytest.raises(ValueError, match=r"must be of one run, got log-weights of shape \(2, 8\)"):
        jax.tree.map(lambda a: jnp.stack([a, a]), posterior).to_arviz()


@pytest.mark.parametrize("missing", ["arviz", "xarray"])
def test_missing_extra_says_what_to_install(posterior, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "genppl\[arviz\]"'):
        posterior.to_arviz()
