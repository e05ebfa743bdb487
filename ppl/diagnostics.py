"""How well chains have mixed: rank-normalised split R-hat, bulk and tail effective sample sizes.

For chains x[m, s], m = 1..M, s = 1..S, each cut into two halves, so that M doubles and S halves:

    ranks            z = Phi^-1((r - 3/8) / (M S + 1/4)),  r the rank of a draw among all, ties averaged         (1)
    W, B             mean of the chains' variances; S times the variance of their means
    R-hat            sqrt(((S - 1)/S W + B/S) / W)                                                               (2)
    rank R-hat       the larger of (2) for z of x and for z of |x - median|: location and scale                  (3)
    rho_t            1 - (W - mean over chains of autocovariance at lag t) / ((S - 1)/S W + B/S)                 (4)
    tau              -1 + 2 sum of pairs P_k = rho_2k + rho_(2k+1), while they are positive, made to decrease    (5)
    ESS              M S / max(tau, 1 / log10(M S))                                                              (6)
    bulk ESS         (6) of z
    tail ESS         the smaller of (6) for the indicators x <= 5% quantile and x <= 95% quantile

Where (2) or (6) is 0/0 the answer is NaN: for what never varied, for what is not finite, and for fewer than 4 draws a
chain. Chains that stand still at different values have R-hat = inf. An indicator that never varies, as for a
site of two values, leaves the tail ESS undefined. Ranks of a category's codes see its labels' order; what a table shows
of such a site depends on it.

Source: Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), "Rank-normalization, folding, and localization: an
improved R-hat for assessing convergence of MCMC", sections 3 and 4; (5) is Geyer (1992), "Practical Markov chain Monte
Carlo", section 3.3. Autocovariances and (2) are NumPyro's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import autocovariance, gelman_rubin
from scipy.special import ndtri

from ppl.runners import is_traced

__all__ = ["ChainSummary", "bulk_ess", "rank_rhat", "smallest_bulk_ess", "summarize_chains", "tail_ess"]

_TAILS = (0.05, 0.95)
_ENTRIES_AT_ONCE = 4096  # bounds the memory that autocovariances of large sites take


class ChainSummary(NamedTuple):
    """The worst of a site's entries, each figure by itself; entries where it is undefined do not count.

    Attributes:
        rhat: the largest rank-normalised split R-hat.
        bulk_ess: the smallest bulk effective sample size, in draws.
        tail_ess: the smallest tail effective sample size, in draws.
    """

    rhat: float
    bulk_ess: float
    tail_ess: float


def rank_rhat(draws) -> np.ndarray:
    """Return the rank-normalised split R-hat (3) of draws `[chains, draws, ...]`, for each entry.

    Where every draw is equally far from the median there is no scale to compare, and (3) is its first part alone.

    Raises:
        ValueError: `draws` has fewer than two axes.
    """

    def rhat(x):
        halves = _split(x)
        folded = np.abs(halves - np.median(halves, axis=(0, 1)))
        return np.fmax(_rhat(halves), _rhat(folded))

    return _by_entry(rhat, draws)


def bulk_ess(draws) -> np.ndarray:
    """Return the bulk effective sample size of draws `[chains, draws, ...]`, for each entry, in draws.

    Raises:
        ValueError: `draws` has fewer than two axes.
    """
    return _by_entry(lambda x: _ess(_normal_scores(_split(x))), draws)


def tail_ess(draws) -> np.ndarray:
    """Return the tail effective sample size of draws `[chains, draws, ...]`, for each entry, in draws.

    Raises:
        ValueError: `draws` has fewer than two axes.
    """

    def smaller(x):
        below = [(x <= np.quantile(x, q, axis=(0, 1))).astype(np.float64) for q in _TAILS]
        return np.minimum(*(_ess(_split(b)) for b in below))

    return _by_entry(smaller, draws)


def summarize_chains(sites: Mapping[str, Any], num_chains: int) -> dict[str, ChainSummary]:
    """Return what a posterior's table tells of each site.

    Args:
        sites: draws chain by chain, `[num_chains * num_samples, ...]` each.
        num_chains: how many chains.

    Raises:
        ValueError: the draws of a site are not that many chains of equal length.
    """
    summaries = {}
    for name, values in sites.items():
        draws = _by_chain(values, num_chains)
        summaries[name] = ChainSummary(
            _worst(np.fmax, rank_rhat(draws)), _worst(np.fmin, bulk_ess(draws)), _worst(np.fmin, tail_ess(draws))
        )
    return summaries


def smallest_bulk_ess(tree: Any, num_chains: int) -> Any:
    """Return the smallest bulk effective sample size in a pytree of draws, a float32 scalar; NaN where none is defined.

    Under a `jit` it is worked out on the host.

    Args:
        tree: arrays `[num_chains * num_samples, ...]`, chain by chain.
        num_chains: how many chains.

    Raises:
        ValueError: an array is not that many chains of equal length.
    """

    def smallest(leaves) -> np.ndarray:
        found = [_worst(np.fmin, bulk_ess(_by_chain(leaf, num_chains))) for leaf in leaves]
        return np.asarray(_worst(np.fmin, np.array(found)), np.float32)

    leaves = jax.tree.leaves(tree)
    if is_traced(leaves):
        return jax.pure_callback(smallest, jax.ShapeDtypeStruct((), jnp.float32), leaves, vmap_method="sequential")
    return jnp.asarray(smallest(leaves))


def _by_chain(values, num_chains: int) -> np.ndarray:
    values = np.asarray(values)
    if num_chains < 1 or values.ndim < 1 or len(values) % num_chains:
        raise ValueError(f"draws of shape {values.shape} are not {num_chains} chains of equal length.")
    return values.reshape(num_chains, len(values) // num_chains, *values.shape[1:])


def _worst(worse: Callable, figures: np.ndarray) -> float:
    return float(worse.reduce(figures, axis=None, initial=np.nan))


def _by_entry(figure: Callable[[np.ndarray], np.ndarray], draws) -> np.ndarray:
    """Apply a figure of draws `[M, S, K]` to the entries that vary and are finite; NaN for the others."""
    draws = np.asarray(draws)
    if draws.ndim < 2:
        raise ValueError(f"`draws` must have axes [chains, draws, ...], got shape {draws.shape}.")
    flat = draws.reshape(*draws.shape[:2], -1).astype(np.float64)
    result = np.full(flat.shape[2], np.nan)
    if draws.shape[0] and draws.shape[1] >= 4:
        defined = np.flatnonzero(np.isfinite(flat).all((0, 1)) & (flat != flat[:1, :1]).any((0, 1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            for start in range(0, len(defined), _ENTRIES_AT_ONCE):
                chosen = defined[start : start + _ENTRIES_AT_ONCE]
                result[chosen] = figure(flat[:, :, chosen])
    return result.reshape(draws.shape[2:])


def _split(x: np.ndarray) -> np.ndarray:
    """Cut each chain into its first and its last half; an odd draw in the middle is left out."""
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, -half:]])


def _normal_scores(x: np.ndarray) -> np.ndarray:
    """Return (1)."""
    flat = x.reshape(-1, x.shape[2])
    return ndtri((_average_ranks(flat) - 0.375) / (len(flat) + 0.25)).reshape(x.shape)


def _average_ranks(x: np.ndarray) -> np.ndarray:
    """Return ranks 1..n along the first axis of `[n, K]`; ties share the mean of theirs."""
    order = np.argsort(x, axis=0)
    ordered = np.take_along_axis(x, order, axis=0)
    place, edge = np.arange(len(x))[:, None], np.ones((1, x.shape[1]), bool)
    differs = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(np.concatenate([edge, differs]), place, 0), axis=0)
    last = np.where(np.concatenate([differs, edge]), place, len(x) - 1)
    last = np.minimum.accumulate(last[::-1], axis=0)[::-1]
    ranks = np.empty(x.shape)
    np.put_along_axis(ranks, order, 1 + (first + last) / 2, axis=0)
    return ranks


def _rhat(x: np.ndarray) -> np.ndarray:
    """Return (2) of the normal scores of draws `[M, S, K]`."""
    still = (x == x[:, :1]).all((0, 1))  # rounding in means would make a large number of it
    alike = (x == x[:1, :1]).all((0, 1))
    return np.where(still, np.where(alike, np.nan, np.inf), gelman_rubin(_normal_scores(x)))


def _ess(x: np.ndarray) -> np.ndarray:
    """Return (6) of draws `[M, S, K]`."""
    num_chains, num_draws, _ = x.shape
    covariance = autocovariance(x, axis=1).mean(axis=0)  # [S, K], divided by S
    within = covariance[0] * num_draws / (num_draws - 1)
    total = covariance[0] + (x.mean(axis=1).var(axis=0, ddof=1) if num_chains > 1 else 0.0)
    rho = 1 - (within - covariance) / total  # (4)
    rho[0] = 1.0
    num_pairs = max((num_draws - 1) // 2, 1)
    even, odd = rho[0 : 2 * num_pairs : 2], rho[1 : 2 * num_pairs : 2]
    pairs = even + odd
    kept = np.logical_and.accumulate(pairs > 0, axis=0)
    kept[-1] = False  # the last pair, or the first that is not positive, counts with its even part alone
    last = np.take_along_axis(even, kept.sum(axis=0)[None], axis=0)[0]
    decreasing = np.minimum.accumulate(pairs, axis=0)
    tau = -1 + 2 * np.where(kept, decreasing, 0.0).sum(axis=0) + np.maximum(last, 0.0)  # (5)
    size = num_chains * num_draws
    ess = size / np.maximum(tau, 1 / np.log10(size))
    return np.where(total > 0, ess, np.nan)
