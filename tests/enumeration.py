"""Exact expectations of randomised algorithms, by running every choice that they could make.

A source of randomness here is a host callback that asks a `Tape`. The tape answers with a recorded choice, or, for a
draw that it has not met, with the first option, and notes the options' probabilities. Running an algorithm again and
again while the tape counts through all choices, and weighting each run by its probability, gives exact expectations: no
tolerance to tune, no seed to be lucky with.

Draws are known by their PRNG key, so the order in which a compiled program happens to ask does not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist


class Tape:
    """The choices of one run."""

    def __init__(self):
        self.choices: dict[bytes, list] = {}  # draw -> [choice, probabilities]

    def choose(self, draw: bytes, probabilities: np.ndarray) -> int:
        """Return the choice of a draw, among options of positive probability."""
        if draw not in self.choices:
            self.choices[draw] = [int(np.flatnonzero(probabilities > 0)[0]), probabilities]
        return self.choices[draw][0]

    def probability(self) -> float:
        """Return the probability of this run."""
        return float(np.prod([p[c] for c, p in self.choices.values()]))

    def advance(self) -> bool:
        """Move on to the next run; returns False after the last."""
        while self.choices:
            draw, (choice, probabilities) = self.choices.popitem()
            options = np.flatnonzero(probabilities > 0)
            later = options[options > choice]
            if later.size:
                self.choices[draw] = [int(later[0]), probabilities]
                return True
        return False


_TAPE = Tape()


def runs(run: Callable) -> Iterator[tuple[float, object]]:
    """Yield (probability, result) for every way that `run()` can go."""
    while True:
        result = jax.tree.map(np.asarray, run())
        yield _TAPE.probability(), result
        if not _TAPE.advance():
            return


class Finite(dist.CategoricalProbs):
    """A categorical distribution whose draws come from the tape."""

    def sample(self, key, sample_shape=()):
        assert sample_shape == () and self.batch_shape == ()
        shape = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.pure_callback(
            _choose_category, shape, jax.random.key_data(key), self.probs, vmap_method="expand_dims"
        )


def _choose_category(key_data, probs):
    key_data, probs = np.asarray(key_data), np.asarray(probs, np.float64)
    batch = np.broadcast_shapes(key_data.shape[:-1], probs.shape[:-1])
    key_data = np.broadcast_to(key_data, (*batch, key_data.shape[-1]))
    probs = np.broadcast_to(probs, (*batch, probs.shape[-1]))
    out = np.zeros(batch, np.int32)
    for place in np.ndindex(*batch):
        out[place] = _TAPE.choose(key_data[place].tobytes(), probs[place] / probs[place].sum())
    return out


def systematic(key, log_weights, num):
    """Systematic resampling with its uniform taken from the tape: one option for each interval between breakpoints."""
    return _resample(_systematic_law, key, log_weights, num)


def multinomial(key, log_weights, num):
    """Multinomial resampling with every ancestor vector an option."""
    return _resample(_multinomial_law, key, log_weights, num)


def _resample(law, key, log_weights, num):
    def choose(key_data, log_weights):
        log_weights = np.asarray(log_weights, np.float64)
        if not np.isfinite(log_weights).any():
            return np.arange(num, dtype=np.int32)
        weights = np.exp(log_weights - log_weights.max())
        ancestors, probabilities = law(weights / weights.sum(), num)
        return np.asarray(ancestors[_TAPE.choose(np.asarray(key_data).tobytes(), probabilities)], np.int32)

    shape = jax.ShapeDtypeStruct((num,), jnp.int32)
    return jax.pure_callback(choose, shape, jax.random.key_data(key), log_weights, vmap_method="sequential")


def _systematic_law(weights, num):
    edges = np.concatenate([[0.0], np.cumsum(weights)]) * num
    edges[-1] = num
    cuts = np.unique(np.concatenate([[0.0, 1.0], edges % 1.0]))
    middles, lengths = (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts)
    points = middles[:, None] + np.arange(num)
    return np.searchsorted(edges[1:], points, side="right"), lengths


def _multinomial_law(weights, num):
    ancestors = np.array(list(itertools.product(range(len(weights)), repeat=num)))
    return ancestors, weights[ancestors].prod(axis=1)
