"""Position policies: which masked positions a step unmasks.

A policy is a law pi(S | x) of sets of positions given the present state x alone: its tokens and the probabilities of
tokens there. It belongs to the target and not to the target's factors: in a product all factors follow the one policy,
which looks at the target's own law of tokens, the locally optimal one (`ppl.models.masked.step`, equation 2). Then pi
cancels from every weight.

    random            each position by itself (MDLM), or a uniform set of fixed size
    left_to_right     the leftmost
    most_confident    those whose likeliest token is likeliest:           score_l = max_v log F_l(v)
    least_entropy     those whose token is least uncertain:               score_l = sum_v F_l(v) log F_l(v)
    blocks            any of them within blocks that are finished one after the other

At temperature 0 the scored policies take the positions of highest score, a function of the state (log pi = 0); at
temperature T they draw a set of fixed size with probability proportional to prod_{l in S} exp(score_l / T).

`sampled_confidence` is LLaDA's "low confidence" rule: draw tokens everywhere, keep those that came out likeliest. It
looks at what was drawn, so that neither it nor a weight has a density: runs with it are heuristic.

Source: Chang et al. (2022), "MaskGIT", arXiv 2202.04200; Nie et al. (2025), arXiv 2502.09992; Kim et al. (2025), "Train
for the worst, plan for the best", arXiv 2502.06768.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import numbers
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from ppl.models.masked.schedule import Due
from ppl.models.masked.subsets import Certain, Independent, Subsets, TopOffered, Uniform, Weighted, first_ones

__all__ = [
    "Blocks",
    "LeastEntropy",
    "LeftToRight",
    "MostConfident",
    "Policy",
    "Random",
    "SampledConfidence",
    "resolve",
]

_LOWEST = -1e6  # of scores, so that sums of them stay finite


class Policy(abc.ABC):
    """Which positions a step unmasks. Policies are frozen dataclasses, compared by their settings."""

    looks: ClassVar[bool] = False  # at probabilities; else only at which positions are masked
    guarantee: ClassVar[str] = "unbiased"

    @abc.abstractmethod
    def positions(self, due: Due, log_probs: Float[Array, "L V"]) -> Subsets:
        """Return the law of the positions.

        Args:
            due: which positions are eligible, and how many or how likely.
            log_probs: the target's log-probabilities of tokens at the present state.
        """

    def blocks(self, size: int) -> Blocks:
        """Return the policy within blocks of `size` positions, from left to right."""
        return Blocks(self, size)


@dataclasses.dataclass(frozen=True)
class Random(Policy):
    """Positions at random.

    Attributes:
        fixed: a uniform set of the number that the schedule gives; else each position by itself.
    """

    fixed: bool = False

    def positions(self, due, log_probs) -> Subsets:
        """Return the law of the positions."""
        del log_probs
        return Uniform(due.eligible, due.count) if self.fixed else Independent(due.eligible, due.probability)


@dataclasses.dataclass(frozen=True)
class LeftToRight(Policy):
    """The leftmost masked positions."""

    def positions(self, due, log_probs) -> Subsets:
        """Return the law of the positions."""
        del log_probs
        return Certain(due.eligible & (jnp.cumsum(due.eligible) <= due.count))


@dataclasses.dataclass(frozen=True)
class _Scored(Policy):
    """Positions of high score.

    Attributes:
        temperature: 0 takes the highest, ties going to the left; higher ones are drawn.
    """

    temperature: float = 0.0
    looks: ClassVar[bool] = True

    def __post_init__(self):
        t = self.temperature
        if isinstance(t, bool) or not isinstance(t, numbers.Real) or not 0 <= t < math.inf:
            raise ValueError(f"`temperature` must be a finite number of at least 0, got {t!r}.")

    @abc.abstractmethod
    def score(self, log_probs: Float[Array, "L V"]) -> Float[Array, " L"]:
        """Return each position's score."""

    def positions(self, due, log_probs) -> Subsets:
        """Return the law of the positions."""
        score = jnp.maximum(jnp.nan_to_num(self.score(log_probs), nan=_LOWEST), _LOWEST)
        if self.temperature == 0:
            return Certain(first_ones(due.eligible, -score, due.count))
        return Weighted(due.eligible, due.count, score / self.temperature, due.most)


@dataclasses.dataclass(frozen=True)
class MostConfident(_Scored):
    """Positions whose likeliest token is likeliest."""

    def score(self, log_probs):
        """Return the largest log-probability."""
        return jnp.max(log_probs, axis=-1)


@dataclasses.dataclass(frozen=True)
class LeastEntropy(_Scored):
    """Positions whose token is least uncertain."""

    def score(self, log_probs):
        """Return the negative entropy."""
        return jnp.sum(jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * log_probs, 0.0), axis=-1)


@dataclasses.dataclass(frozen=True)
class SampledConfidence(Policy):
    """Positions whose drawn tokens are likeliest. It looks at what was drawn: heuristic."""

    looks: ClassVar[bool] = True
    guarantee: ClassVar[str] = "heuristic"

    def positions(self, due, log_probs) -> Subsets:
        """Return the rule, which has no density."""
        return TopOffered(due.eligible, due.count, log_probs)


@dataclasses.dataclass(frozen=True)
class Blocks(Policy):
    """A policy within blocks, which are finished from left to right.

    Attributes:
        policy: which positions of the current block.
        size: how many positions a block has; the last one may have fewer.
    """

    policy: Policy
    size: int

    def __post_init__(self):
        if isinstance(self.policy, Blocks) or not isinstance(self.policy, Policy):
            raise TypeError(f"`policy` must be a policy without blocks, got {self.policy!r}.")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"`size` must be an int of at least 1, got {self.size!r}.")

    @property
    def looks(self) -> bool:
        """Whether the policy looks at probabilities."""
        return self.policy.looks

    @property
    def guarantee(self) -> str:
        """What runs with the policy can promise."""
        return self.policy.guarantee

    def positions(self, due, log_probs) -> Subsets:
        """Return the law of the positions; `due` knows the block."""
        return self.policy.positions(due, log_probs)


_NAMED: dict[str, Policy] = {
    "random": Random(),
    "left_to_right": LeftToRight(),
    "most_confident": MostConfident(),
    "least_entropy": LeastEntropy(),
    "sampled_confidence": SampledConfidence(),
}


def resolve(policy: str | Policy) -> Policy:
    """Return a policy from its name.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a policy.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"`policy` must be a name or a policy, got {policy!r} ({type(policy).__name__}).")
    if policy not in _NAMED:
        raise ValueError(f"`policy` must be one of {', '.join(map(repr, _NAMED))} or a policy, got {policy!r}.")
    return _NAMED[policy]
