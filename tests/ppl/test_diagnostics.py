"""R-hat and effective sample sizes against ArviZ's figures, closed forms and their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl import Posterior
from ppl.diagnostics import ChainSummary, bulk_ess, rank_rhat, smallest_bulk_ess, summarize_chains, tail_ess
from ppl.posterior import Outcome, Status

# Made by ArviZ 0.23.4 from x = CASES[name](); ArviZ 1.3 gives the same digits, with x wrapped by its from_dict:
#     az.rhat({"x": x}), az.ess({"x": x}, method="bulk"), az.ess({"x": x}, method="tail", prob=(0.05, 0.95))
ARVIZ = {
    "independent": (0.99780496, 847.54956, 726.65902),
    "slow, an odd number of draws": (1.0321413, 105.96563, 276.31799),
    "antithetic": (1.022973, 743.13638, 161.42747),
    "chains at different places": (1.0410036, 138.24681, 328.22076),
    "chains of different widths": (1.0684253, 264.21602, 272.04175),
    "few draws": (1.0235788, 12.950175, 12.950175),
    "as few draws as can be": (1.1624668, 7.2247199, 7.2247199),
    "slow and short": (2.1798367, 33.12507, 33.12507),
    "counts, with ties": (1.0114251, 211.06655, 203.05674),
    "heavy tails": (0.99799633, 607.31413, 701.68585),
}


def autoregression(coefficient, chains, draws, shift=0.0, scale=1.0):
    """A stationary chain of unit variance; chain m is shifted by `m * shift` and scaled by `1 + m * (scale - 1)`."""
    noise = np.random.RandomState(7).normal(size=(chains, draws))  # a legacy stream, which NumPy keeps as it is
    x = np.zeros((chains, draws))
    x[:, 0] = noise[:, 0]
    for s in range(1, draws):
        x[:, s] = coefficient * x[:, s - 1] + np.sqrt(1 - coefficient**2) * noise[:, s]
    place = np.arange(chains)[:, None]
    return x * (1 + place * (scale - 1)) + place * shift


CASES = {
    "independent": lambda: autoregression(0.0, 4, 200),
    "slow, an odd number of draws": lambda: autoregression(0.9, 4, 501),
    "antithetic": lambda: autoregression(-0.7, 3, 100),
    "chains at different places": lambda: autoregression(0.3, 4, 100, shift=0.3),
    "chains of different widths": lambda: autoregression(0.3, 4, 100, scale=1.5),
    "few draws": lambda: autoregression(0.2, 2, 7),
    "as few draws as can be": lambda: autoregression(0.2, 2, 4),
    "slow and short": lambda: autoregression(0.99, 3, 9),
    "counts, with ties": lambda: np.floor(3 * np.exp(autoregression(0.5, 4, 150) / 2)),
    "heavy tails": lambda: np.tan(1.5 * np.tanh(autoregression(0.2, 4, 200))),
}


@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_of_arviz(name):
    draws = CASES[name]()
    ours = [float(figure(draws)) for figure in (rank_rhat, bulk_ess, tail_ess)]
    np.testing.assert_allclose(ours, ARVIZ[name], rtol=1e-7)


def test_each_entry_is_judged_by_itself():
    first, second = autoregression(0.5, 4, 60), autoregression(0.1, 4, 60, shift=0.5)
    draws = np.stack([np.stack([first, second], -1), np.stack([second, np.ones_like(first)], -1)], -2)
    for figure in (rank_rhat, bulk_ess, tail_ess):
        found = figure(draws)
        assert found.shape == (2, 2)
        expected = [[figure(first), figure(second)], [figure(second), np.nan]]
        np.testing.assert_allclose(found, np.array(expected, float), rtol=1e-12)


@pytest.mark.parametrize("figure", [rank_rhat, bulk_ess, tail_ess])
def test_what_is_not_defined_is_nan(figure):
    varied = autoregression(0.3, 2, 20)
    assert np.isnan(figure(np.full((4, 50), 2.5)))  # never varied
    assert np.isnan(figure(varied[:, :3]))  # too few draws
    for bad in (np.nan, np.inf):
        spoilt = varied.copy()
        spoilt[1, 3] = bad
        assert np.isnan(figure(spoilt))
    with pytest.raises(ValueError, match=r"axes \[chains, draws, \.\.\.\], got shape \(20,\)"):
        figure(varied[0])


def test_chains_that_stand_still_at_different_values_disagree_for_ever():
    stuck = np.repeat([[0.0], [1.0], [2.0]], 40, axis=1)
    assert rank_rhat(stuck) == np.inf
    assert bulk_ess(stuck) < 4  # about one draw a chain


def test_site_of_two_values_has_no_tails():
    coin = (autoregression(0.4, 4, 101) > 0.1).astype(np.int32)
    assert np.isnan(tail_ess(coin))
    assert np.isfinite(bulk_ess(coin)) and np.isfinite(rank_rhat(coin))
    np.testing.assert_allclose(bulk_ess(coin), bulk_ess(coin > 0), rtol=1e-12)


def test_figures_do_not_see_a_monotone_change_of_scale():
    draws = autoregression(0.6, 3, 80)
    for figure in (bulk_ess, tail_ess):
        np.testing.assert_allclose(figure(np.exp(draws)), figure(draws), rtol=1e-12)


def test_summary_is_the_worst_entry_and_skips_constant_ones():
    good, bad = autoregression(0.0, 4, 100), autoregression(0.8, 4, 100, shift=0.4)
    flat = lambda *columns: np.stack([c.reshape(-1) for c in columns], -1)  # noqa: E731
    summary = summarize_chains({"x": flat(good, bad, np.ones_like(good)), "constant": flat(np.ones_like(good))}, 4)
    assert summary["x"] == ChainSummary(float(rank_rhat(bad)), float(bulk_ess(bad)), float(tail_ess(bad)))
    assert np.isnan(summary["constant"]).all()
    with pytest.raises(ValueError, match="not 3 chains of equal length"):
        summarize_chains({"x": flat(good)}, 3)


def test_smallest_bulk_ess_is_that_of_the_slowest_entry_also_under_jit():
    good, bad = autoregression(0.0, 4, 50), autoregression(0.8, 4, 50)
    tree = {"a": jnp.asarray(good.reshape(-1), jnp.float32), "b": [jnp.asarray(bad.reshape(-1, 1), jnp.float32)]}
    expected = float(bulk_ess(bad.astype(np.float32)))
    assert float(smallest_bulk_ess(tree, 4)) == pytest.approx(expected, rel=1e-6)
    assert float(jax.jit(lambda t: smallest_bulk_ess(t, 4))(tree)) == pytest.approx(expected, rel=1e-6)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), tree)
    np.testing.assert_allclose(jax.vmap(lambda t: smallest_bulk_ess(t, 4))(stacked), [expected] * 2, rtol=1e-6)
    assert np.isnan(smallest_bulk_ess({"constant": jnp.ones(20)}, 4)) and np.isnan(smallest_bulk_ess({}, 4))


def test_posterior_of_chains_prints_how_they_mixed():
    draws = autoregression(0.5, 2, 50)
    posterior = Posterior(
        value=draws.reshape(-1),
        sites={"x": draws.reshape(-1), "grid": np.ones((100, 2))},
        present={},
        log_weights=jnp.full(100, -np.log(100.0)),
        log_evidence=jnp.nan,
        ess=jnp.float32(bulk_ess(draws)),
        diagnostics={"acceptance": jnp.full((2, 50), 0.25)},
        status=Status(Outcome.OK, -1),
        guarantee="invariant",
        num_chains=2,
    )
    text = repr(posterior)
    assert f"2 chains of 50 draws   smallest bulk ESS {float(bulk_ess(draws)):.1f}   acceptance 0.250" in text
    assert "log-evidence" not in text and np.isnan(posterior.log_evidence_error)
    heading, _, x, grid = text.splitlines()[2:]
    assert heading.split()[-5:] == ["R-hat", "bulk", "ESS", "tail", "ESS"]
    figures = [f"{float(rank_rhat(draws)):.3f}", *(f"{float(f(draws)):.1f}" for f in (bulk_ess, tail_ess))]
    assert x.split()[-3:] == figures and grid.split()[-3:] == ["nan"] * 3
    assert "R-hat" in posterior._repr_html_()
    assert posterior.resample(n=5).num_chains == 0
