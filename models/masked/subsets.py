"""Laws of sets of positions: which of a sequence's positions are unmasked in a step.

    Independent       each eligible position with probability u:   P(S) = u^|S| (1 - u)^(m - |S|)                (1)
    Uniform           n of the m eligible ones, all sets alike:    P(S) = 1 / C(m, n)                            (2)
    Weighted          n of them, by weights w_l > 0:               P(S) = prod_{l in S} w_l / e_n(w)             (3)
    Certain           one set

In (3) e_n is the elementary symmetric polynomial, the sum over all sets of n. With the suffix sums
E_l(j) = e_j(w_l, .., w_L) = E_(l+1)(j) + w_l E_(l+1)(j - 1) a draw goes through the positions once and takes position l
with probability w_l E_(l+1)(j - 1) / E_l(j), j being how many are still to take.

Source: (3) is the conditional Bernoulli law, Chen, Dempster and Liu (1994), "Weighted finite population sampling to
maximize entropy", Biometrika 81.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Certain", "Independent", "Subsets", "TopOffered", "Uniform", "Weighted", "first_ones"]


class Subsets(Protocol):
    """A law of sets of positions, each set a bool `[L]`."""

    def sample(self, key: Array, offered: Int[Array, " L"]) -> Bool[Array, " L"]:
        """Draw a set. `offered` holds the tokens that the positions would get; laws with a density do not read it."""

    def log_prob(self, chosen: Bool[Array, " L"]) -> Float[Array, ""]:
        """Return the log-probability of a set; NaN where the law has no density."""


class Independent(NamedTuple):
    """The law (1).

    Attributes:
        eligible: which positions may be taken.
        probability: u, in [0, 1].
    """

    eligible: Bool[Array, " L"]
    probability: Float[Array, ""]

    def sample(self, key, offered):
        """Draw a set."""
        del offered
        return self.eligible & (jax.random.uniform(key, self.eligible.shape) < self.probability)

    def log_prob(self, chosen):
        """Return the log-probability of a set."""
        terms = jnp.where(chosen, jnp.log(self.probability), jnp.log1p(-self.probability))
        return _within(chosen, self.eligible, jnp.sum(jnp.where(self.eligible, terms, 0.0)))


class Uniform(NamedTuple):
    """The law (2).

    Attributes:
        eligible: which positions may be taken.
        count: n, at most the number of them.
    """

    eligible: Bool[Array, " L"]
    count: Int[Array, ""]

    def sample(self, key, offered):
        """Draw a set."""
        del offered
        return first_ones(self.eligible, jax.random.uniform(key, self.eligible.shape), self.count)

    def log_prob(self, chosen):
        """Return the log-probability of a set."""
        j = jnp.arange(1, self.eligible.shape[0] + 1)
        left = jnp.sum(self.eligible) - self.count
        choices = jnp.sum(jnp.where(j <= self.count, jnp.log((left + j) / j), 0.0))
        return _within(chosen, self.eligible, jnp.where(jnp.sum(chosen) == self.count, -choices, -jnp.inf))


class Weighted(NamedTuple):
    """The law (3).

    Attributes:
        eligible: which positions may be taken.
        count: n, at most the number of them.
        log_weights: log w, finite where a position is eligible.
        most: a bound of n, static.
    """

    eligible: Bool[Array, " L"]
    count: Int[Array, ""]
    log_weights: Float[Array, " L"]
    most: int

    def sample(self, key, offered):
        """Draw a set."""
        del offered
        log_weights, (whole, sums) = self._log_weights(), self._log_sums()
        sizes = jnp.arange(self.most + 1)

        def take(left, at):
            log_weight, before, after, uniform = at
            pick = lambda row, j: jnp.sum(jnp.where(sizes == j, row, 0.0))  # noqa: E731
            chosen = (left > 0) & (uniform < jnp.exp(log_weight + pick(after, left - 1) - pick(before, left)))
            return left - chosen, chosen

        before = jnp.concatenate([whole[None], sums[:-1]])
        uniforms = jax.random.uniform(key, self.eligible.shape)
        return jax.lax.scan(take, jnp.int32(self.count), (log_weights, before, sums, uniforms))[1]

    def log_prob(self, chosen):
        """Return the log-probability of a set."""
        total = jnp.sum(jnp.where(chosen, self._log_weights(), 0.0))
        whole, _ = self._log_sums()
        log_prob = total - whole[jnp.clip(self.count, 0, self.most)]
        return _within(chosen, self.eligible, jnp.where(jnp.sum(chosen) == self.count, log_prob, -jnp.inf))

    def _log_weights(self):
        return jnp.where(self.eligible, self.log_weights, -jnp.inf)

    def _log_sums(self):
        """Return log E_1(j), `[most + 1]`, and log E_(l+1)(j) for all l, `[L, most + 1]`."""
        nothing = jnp.where(jnp.arange(self.most + 1) == 0, 0.0, -jnp.inf)

        def add(sums, log_weight):
            with_it = jnp.concatenate([jnp.full(1, -jnp.inf), log_weight + sums[:-1]])
            return jnp.logaddexp(sums, with_it), sums

        return jax.lax.scan(add, nothing, self._log_weights(), reverse=True)


class Certain(NamedTuple):
    """The law that always gives one set."""

    chosen: Bool[Array, " L"]

    def sample(self, key, offered):
        """Return the set."""
        del key, offered
        return self.chosen

    def log_prob(self, chosen):
        """Return 0 for the set, -inf for all others."""
        return jnp.where(jnp.all(chosen == self.chosen), 0.0, -jnp.inf)


class TopOffered(NamedTuple):
    """The n positions whose offered tokens are the most probable. It has no density.

    Attributes:
        eligible: which positions may be taken.
        count: n, at most the number of them.
        log_probs: log-probabilities of all tokens.
    """

    eligible: Bool[Array, " L"]
    count: Int[Array, ""]
    log_probs: Float[Array, "L V"]

    def sample(self, key, offered):
        """Return the set that goes with the offered tokens."""
        del key
        confidence = jnp.take_along_axis(self.log_probs, offered[:, None], axis=-1)[:, 0]
        return first_ones(self.eligible, -confidence, self.count)

    def log_prob(self, chosen):
        """Return NaN: the set's law given the present state is a sum over all offers."""
        del chosen
        return jnp.full((), jnp.nan)


def first_ones(eligible: Bool[Array, " L"], order: Float[Array, " L"], count: Any) -> Bool[Array, " L"]:
    """Return the `count` eligible positions that come first in an order; of equal ones the leftmost."""
    rank = jnp.argsort(jnp.argsort(jnp.where(eligible, order, jnp.inf), stable=True))
    return eligible & (rank < count)


def _within(chosen, eligible, log_prob):
    return jnp.where(jnp.any(chosen & ~eligible), -jnp.inf, log_prob)
