"""The laws of the resampling schemes: every vector of ancestors that one can draw, with its probability.

Written from the schemes' definitions, in float64, apart from their implementations in `ppl.kernels.resampling`: with
W the normalised weights, P_i = num (W_1 + .. + W_i), and a law a pair (ancestors `[O, num]`, probabilities `[O]`):

    systematic    the points are k + u, u ~ U[0, 1): one option for each interval of u between breakpoints P_i mod 1
    stratified    point k is uniform in [k, k + 1): ancestors are independent, by the overlaps with the [P_(i-1), P_i)
    multinomial   num independent draws from W, in increasing order
    residual      floor(num W_i) copies of each i, and independent draws from what remains, in increasing order
    ssp           a walk that keeps one expected number unrounded and rounds another, up or down (Srinivasan)
    killing       slot i keeps i with probability W_i / max W, else it draws from W
    birth_death   slot i keeps i with probability min(1, n W_i), else it draws from (n W - 1)^+

A conditional scheme puts the ancestors in uniformly random order and asks that slot 0 holds r:

    P(r, b_1, .., b_(num-1))  =  sum over options with that multiset of  P(option) / (number of its orders).     (1)

Sums P_i are rounded to multiples of 2^-31, as in the schemes, so that equal weights meet their breakpoints.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

__all__ = ["LAWS", "Law", "conditional_law", "law_of"]

Law = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""`(weights[N] that sum to 1, num) -> (ancestors int32[O, num], probabilities[O])`."""


def _edges(weights: np.ndarray, num: int) -> np.ndarray:
    """Return P_0 = 0, P_1, .., P_n = num."""
    grid = 2.0**31
    edges = np.concatenate([[0.0], np.rint(np.cumsum(weights) * num * grid) / grid])
    edges[edges >= edges[-1]] = num
    return np.minimum(edges, num)


def _systematic(weights: np.ndarray, num: int):
    edges = _edges(weights, num)
    cuts = np.unique(np.concatenate([[0.0, 1.0], edges % 1.0]))
    middles, lengths = (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts)
    points = middles[:, None] + np.arange(num)
    return _merged(np.searchsorted(edges[1:], points, side="right"), lengths)


def _stratified(weights: np.ndarray, num: int):
    edges = _edges(weights, num)
    strata = np.arange(num)[:, None]
    overlaps = np.minimum(edges[1:], strata + 1) - np.maximum(edges[:-1], strata)
    return _independent(np.maximum(overlaps, 0.0))


def _multinomial(weights: np.ndarray, num: int):
    return _merged(*_independent(np.tile(weights, (num, 1))), sort=True)


def _residual(weights: np.ndarray, num: int):
    expected = weights * num
    whole = np.rint(expected)
    expected = np.where(np.abs(expected - whole) < 1e-6, whole, expected)
    copies = np.floor(expected).astype(int)
    fixed = np.repeat(np.arange(len(weights)), copies)
    if len(fixed) == num:
        return fixed[None].astype(np.int32), np.ones(1)
    remainders = expected - copies
    drawn, probabilities = _independent(np.tile(remainders / remainders.sum(), (num - len(fixed), 1)))
    ancestors = np.concatenate([np.tile(fixed, (len(drawn), 1)), drawn], axis=1)
    return _merged(ancestors, probabilities, sort=True)


def _ssp(weights: np.ndarray, num: int):
    edges = _edges(weights, num)
    expected = np.diff(edges)
    walks = {(tuple(np.floor(expected).astype(int)), None): 1.0}  # (numbers of draws so far, who is pending) -> odds
    for i, x in enumerate(expected):
        p, q = edges[i] % 1.0, x % 1.0  # the fractions of the pending one and of i
        if q == 0:
            continue
        before, walks = walks, {}
        for (counts, pending), odds in before.items():
            crosses = p + q >= 1
            stays = (1 - q) / (2 - p - q) if crosses else q / (p + q)
            for new, rounded, probability in ((i, pending, stays), (pending, i, 1 - stays)):
                if probability <= 0:
                    continue
                up = tuple(c + (crosses and j == rounded) for j, c in enumerate(counts))
                walks[up, new] = walks.get((up, new), 0.0) + odds * probability
    ancestors = [np.repeat(np.arange(len(weights)), counts) for counts, _ in walks]
    return _merged(np.array(ancestors), np.array(list(walks.values())))


def _require_as_many(name: str, weights: np.ndarray, num: int) -> None:
    if num != len(weights):
        raise ValueError(f"`num` must be the number of particles, {len(weights)}, for {name}, got {num}.")


def _killing(weights: np.ndarray, num: int):
    _require_as_many("killing", weights, num)
    survival = weights / weights.max()
    return _independent(np.diag(survival) + (1 - survival)[:, None] * weights)


def _birth_death(weights: np.ndarray, num: int):
    _require_as_many("birth_death", weights, num)
    fitness = weights * num
    excess = np.maximum(fitness - 1, 0.0)
    survival = np.where(fitness >= 1 - 1e-6, 1.0, fitness)
    born = excess / excess.sum() if excess.sum() > 0 else weights
    return _independent(np.diag(survival) + (1 - survival)[:, None] * born)


LAWS: dict[str, Law] = {
    "systematic": _systematic,
    "stratified": _stratified,
    "multinomial": _multinomial,
    "residual": _residual,
    "ssp": _ssp,
    "killing": _killing,
    "birth_death": _birth_death,
}


def law_of(name: str) -> Law:
    """Return the law of a scheme.

    Raises:
        ValueError: the scheme's law is not written down.
    """
    if name not in LAWS:
        known = ", ".join(repr(scheme) for scheme in LAWS)
        raise ValueError(f"`resampler` {name!r} cannot be enumerated. The schemes that can are {known}.")
    return LAWS[name]


def conditional_law(law: Law, weights: np.ndarray, retained: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the law of a scheme's ancestors in random order, given that slot 0 holds `retained`; see (1).

    A retained particle of weight zero has no such law: it is pinned, and the others are independent draws.
    """
    if weights[retained] == 0:
        others, probabilities = _independent(np.tile(weights, (num - 1, 1)))
        return np.concatenate([np.full((len(others), 1), retained), others], axis=1).astype(np.int32), probabilities
    ancestors, probabilities = _merged(*law(weights, num), sort=True)
    options: list[tuple[int, ...]] = []
    odds: list[float] = []
    for option, probability in zip(ancestors.tolist(), probabilities, strict=True):
        count = option.count(retained)
        if not count:
            continue
        option.remove(retained)
        orders = sorted(set(itertools.permutations(option)))
        options += [(retained, *order) for order in orders]
        odds += [probability * count / num / len(orders)] * len(orders)
    odds_array = np.asarray(odds)
    return np.asarray(options, np.int32).reshape(-1, num), odds_array / odds_array.sum()


def _independent(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the law of slots that are filled independently, slot k with i by `probabilities[k, i]`."""
    possible = [np.flatnonzero(row > 0) for row in probabilities]
    size = math.prod(map(len, possible))
    if size > 100_000:
        raise ValueError(f"a resampling step has {size} outcomes, too many to enumerate: take fewer particles.")
    ancestors = np.array(list(itertools.product(*possible)), np.int32).reshape(size, len(probabilities))
    return ancestors, probabilities[np.arange(len(probabilities)), ancestors].prod(axis=1)


def _merged(ancestors: np.ndarray, probabilities: np.ndarray, *, sort: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return a law with equal options made one; `sort` puts each one's ancestors in increasing order first."""
    ancestors = np.sort(ancestors, axis=1) if sort else ancestors
    options, which = np.unique(ancestors, axis=0, return_inverse=True)
    return options.astype(np.int32), np.bincount(which.reshape(-1), probabilities, len(options))
