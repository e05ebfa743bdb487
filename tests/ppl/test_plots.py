"""Pictures: what they show of a posterior, and what they refuse."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling
from ppl.plots import plot_genealogy, plot_trace, plot_weights

NUM = 12


@pytest.fixture(autouse=True)
def _without_a_screen():
    matplotlib.use("Agg")
    yield
    plt.close("all")


@ppl.model
def walk(observed):
    count = ppl.sample("count", dist.Poisson(2.0))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x, 1.0))
        ppl.observe("y", dist.Normal(x + count, 0.5), y)
        return x, x

    return ppl.scan(step, 0.0, observed)[1]


@pytest.fixture(scope="module")
def posterior():
    return ppl.infer(walk(jnp.array([1.0, 2.5, 2.0, 4.0])), SMC(NUM, ess_threshold=0.7))


@pytest.fixture(scope="module")
def chains(posterior):
    return dataclasses.replace(
        posterior,
        log_weights=jnp.full(NUM, -np.log(NUM)),
        diagnostics={"acceptance": jnp.ones((2, NUM // 2))},
        num_chains=2,
        log_evidence=jnp.nan,
    )


def test_importing_ppl_does_not_import_matplotlib():
    code = "import sys, ppl, ppl.plots; assert 'matplotlib' not in sys.modules and 'arviz' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_trace_of_a_population_shows_weighted_marginals(posterior):
    axes = plot_trace(posterior)
    assert axes.shape == (5,) and [a.get_title(loc="left") for a in axes[:2]] == ["count", "x[0]"]
    weights, count = np.asarray(posterior.weights, np.float64), np.asarray(posterior.sites["count"])
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes[0].patches}
    expected = {int(k): weights[count == k].sum() for k in np.unique(count[weights > 0])}
    assert bars.keys() == expected.keys()
    np.testing.assert_allclose([bars[k] for k in expected], list(expected.values()), rtol=1e-5)
    stairs = axes[1].patches[0].get_data()
    mass = stairs.values * np.diff(stairs.edges)
    assert mass.sum() == pytest.approx(1.0, rel=1e-5)
    x = np.asarray(posterior.sites["x"][:, 0], np.float64)
    low, high = stairs.edges[:2]
    assert mass[0] == pytest.approx(weights[(x >= low) & (x < high)].sum(), abs=1e-5)
    assert [a.get_title(loc="left") for a in plot_trace(posterior, "count")] == ["count"]


def test_trace_of_chains_shows_each_chain_and_how_it_mixed(chains):
    import matplotlib.pyplot as plt

    given = plt.subplots(5, 2)[1]
    axes = plot_trace(chains, ax=given)
    assert axes.shape == (5, 2) and axes[1, 1] is given[1, 1]
    lines = axes[1, 1].get_lines()
    np.testing.assert_array_equal([line.get_ydata() for line in lines], chains.sites["x"][:, 0].reshape(2, -1))
    assert "R-hat" in axes[1, 1].get_title(loc="right")
    axes[0, 0].figure.canvas.draw()


def test_weights_show_where_a_population_was_resampled(posterior):
    axes = plot_weights(posterior)
    sizes = axes[0].get_lines()[0].get_ydata()
    np.testing.assert_allclose(sizes, NUM * np.sort(posterior.weights)[::-1], rtol=1e-5)
    resampled = np.asarray(posterior.diagnostics["resampled"])
    assert 0 < resampled.sum() < 4
    for axis, name in ((axes[1], "ess"), (axes[2], "log_evidence")):
        series, marks = axis.get_lines()[-2:]
        np.testing.assert_allclose(series.get_ydata(), posterior.diagnostics[name], rtol=1e-6)
        np.testing.assert_array_equal(marks.get_xdata(), 1 + np.flatnonzero(resampled))
    axes[0].figure.canvas.draw()


def test_weights_of_a_program_without_a_loop_are_one_picture():
    posterior = ppl.infer(ppl.model(lambda: ppl.sample("x", dist.Normal(0.0, 1.0)))(), ImportanceSampling(5))
    axes = plot_weights(posterior)
    assert [axis.axison for axis in axes] == [True, False, False]


def test_genealogy_tells_lines_that_survive_from_those_that_died(posterior):
    axis = plot_genealogy(posterior)
    died, lived = (collection.get_segments() for collection in axis.collections[:2])
    ancestors = np.asarray(posterior.diagnostics["ancestors"])
    living, expected = set(np.flatnonzero(np.asarray(posterior.weights) > 0)), set()
    for t in reversed(range(len(ancestors))):
        expected |= {(t, ancestors[t, n], t + 1, n) for n in living}
        living = {ancestors[t, n] for n in living}
    assert {tuple(np.ravel(s).astype(int)) for s in lived} == expected
    assert len(died) + len(lived) == ancestors.size and len(died) > 0
    assert axis.get_title(loc="left").startswith(f"{len(living)} of {NUM} first particles")
    axis.figure.canvas.draw()


def test_axes_that_are_given_are_used(posterior):
    import matplotlib.pyplot as plt

    axes = plt.subplots(1, 3)[1]
    assert plot_genealogy(posterior, ax=axes[0]) is axes[0]
    assert plot_weights(posterior, ax=axes)[2] is axes[2]
    with pytest.raises(ValueError, match=r"`ax` must hold 5 axes, \[5\]; got 3"):
        plot_trace(posterior, ax=axes)


def test_what_cannot_be_drawn_is_named(posterior, chains, monkeypatch):
    with pytest.raises(KeyError, match="`sites` names 'z', which was not kept; there are .*count"):
        plot_trace(posterior, ["z"])
    with pytest.raises(ValueError, match="keeps no sites to plot"):
        plot_trace(dataclasses.replace(posterior, sites={}))
    for plot in (plot_weights, plot_genealogy):
        with pytest.raises(ValueError, match="chains: see plot_trace"):
            plot(chains)
        with pytest.raises(ValueError, match="several runs"):
            plot(jax.tree.map(lambda a: jnp.stack([a, a]), posterior))
    with pytest.raises(ValueError, match="has no ancestors to draw"):
        plot_genealogy(posterior.resample(n=3))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for plot in (plot_trace, plot_weights, plot_genealogy):
        with pytest.raises(ImportError, match=r'pip install "genppl\[plots\]"'):
            plot(posterior)
