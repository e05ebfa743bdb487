"""Powers of a Gaussian mixture in closed form, and distances of samples from them.

With `q = sum_k w_k N(m_k, v I)` in d dimensions and an integer b, the power is again a mixture: over the multisets c of
b components, with multinomial(c) the number of their orders, `m_c` the mean of their means and
`u_c = sum_(k in c) |m_k|^2 - b |m_c|^2`,

    q^b = sum_c multinomial(c) prod_(k in c) w_k (2 pi v)^(-d b / 2) (2 pi v / b)^(d / 2) exp(-u_c / (2 v))
          * N(m_c, v / b I),                                                                                        (1)

so that samples and the integral of `q^b` are exact. 40 components and b = 3 give 40 * 41 * 42 / 6 = 11480.

Distances of two samples of equal size n, sorted by an optimal assignment pi:

    W_p = (1/n sum_i |x_i - y_pi(i)|^p)^(1/p),                                                                      (2)

over subsamples; total variation `1/2 sum |f - g|` between the frequencies of cells of a grid, and of nearest means.
Every one of them is above 0 for two exact samples too: the *floor* is what exact against exact gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

__all__ = ["PowerOfMixture", "distances"]


class PowerOfMixture:
    """An integer power of a mixture of equal isotropic components, equation (1)."""

    def __init__(self, means: np.ndarray, variance: float, power: int):
        """Multiply out the power.

        Args:
            means: `[K, d]`, of K components of equal weight.
            variance: of every component in every dimension.
            power: b, at least 1.
        """
        number, dimension = means.shape
        chosen = np.array(list(itertools.combinations_with_replacement(range(number), power)))
        orders = np.array([_orders(row) for row in chosen])
        picked = np.asarray(means, np.float64)[chosen]  # [C, b, d]
        self.means = picked.mean(axis=1)
        spread = np.sum(picked**2, axis=(1, 2)) - power * np.sum(self.means**2, axis=1)
        self.variance = variance / power
        log_normal = math.log(2 * math.pi * variance)
        masses = np.log(orders) - power * math.log(number) - spread / (2 * variance)
        masses += dimension / 2 * ((1 - power) * log_normal - math.log(power))
        self.log_integral = float(logsumexp(masses))
        self.weights = np.exp(masses - self.log_integral)

    def sample(self, generator: np.random.Generator, num: int) -> np.ndarray:
        """Draw `[num, d]` exact samples."""
        component = generator.choice(len(self.weights), size=num, p=self.weights / self.weights.sum())
        noise = generator.normal(size=(num, self.means.shape[1]))
        return self.means[component] + math.sqrt(self.variance) * noise


def distances(
    samples: np.ndarray,
    exact: np.ndarray,
    means: np.ndarray,
    generator: np.random.Generator,
    subsample: int = 2000,
    cells: int = 200,
    reach: float = 40.0,
) -> Mapping[str, float]:
    """Return W1, W2, the total variation of histograms, and that of the nearest means.

    Args:
        samples: `[n, 2]`, all finite.
        exact: `[m, 2]`, what they are compared with.
        means: `[K, 2]`, the modes.
        generator: draws the subsamples.
        subsample: points of an assignment; W2 of a mode that is lost falls slowly with it.
        cells: cells of the histogram along an axis.
        reach: the histogram covers `[-reach, reach]` in both axes; points outside count as one cell more.
    """
    size = min(subsample, len(samples), len(exact))
    few = samples[generator.choice(len(samples), size, replace=False)].astype(np.float64)
    others = exact[generator.choice(len(exact), size, replace=False)]
    squared = np.sum((few[:, None] - others[None]) ** 2, axis=-1)
    edges = np.linspace(-reach, reach, cells + 1)
    return {
        "W1": _matched(np.sqrt(squared)),
        "W2": math.sqrt(_matched(squared)),
        "TV": _total_variation(*(_cell(points, edges) for points in (samples, exact))),
        "mode TV": _total_variation(*(_nearest(points, means) for points in (samples, exact))),
    }


def _orders(multiset: np.ndarray) -> int:
    counts = np.unique(multiset, return_counts=True)[1]
    return math.factorial(len(multiset)) // math.prod(math.factorial(count) for count in counts)


def _matched(cost: np.ndarray) -> float:
    return float(cost[linear_sum_assignment(cost)].mean())


def _cell(points: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Number the cells that points lie in; 0 is outside."""
    cells = len(edges) - 1
    index = np.searchsorted(edges, points, side="right") - 1
    inside = np.all((index >= 0) & (index < cells), axis=1)
    return np.where(inside, 1 + index[:, 0] * cells + index[:, 1], 0)


def _nearest(points: np.ndarray, means: np.ndarray) -> np.ndarray:
    return np.argmin(np.sum((points[:, None] - means[None]) ** 2, axis=-1), axis=1)


def _total_variation(labels: np.ndarray, others: np.ndarray) -> float:
    size = int(max(labels.max(), others.max())) + 1
    frequencies = [np.bincount(each, minlength=size) / len(each) for each in (labels, others)]
    return float(np.abs(frequencies[0] - frequencies[1]).sum() / 2)
