"""Products of the laws of one step: the locally optimal proposal of a target.

Categorical laws, with log-probabilities l_i over the same V values and powers b_i:

    F(x) proportional to exp(L(x)),   L(x) = sum_i b_i l_i(x) on the allowed values, -inf elsewhere,            (1)

so that the weight of a draw, sum_i b_i l_i(x) - log F(x) = log sum_y exp L(y), is the same for every x: no proposal
of one step has less variance. Where a probability is 0, L is -inf, whatever the power: a power of 0 keeps a factor's
support, and a negative one gives no mass to what the factor forbids.

Other laws bring this algebra with them: see `Multipliable`. A law whose process has a backward kernel k(x|x') knows it,
so that its weights are those of the target (`ppl.targets`, equation 2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpyro.distributions as dist

__all__ = ["LogWeight", "Multipliable", "product_law", "weighted_log_prob"]

LogWeight = Callable[[Any], Any]  # of what was drawn; a scalar, in nats


@runtime_checkable
class Multipliable(Protocol):
    """A law of one step that knows how to be multiplied with others.

    Where laws of several types meet, the one with the largest attribute `generality` (0 if it has none) multiplies.
    """

    def multiply(self, laws: Sequence[Any], powers: Sequence[Any], signs: Sequence[float]) -> tuple[Any, LogWeight]:
        """Return the locally optimal proposal F and the weight of what is drawn from it.

        Args:
            laws: the factors' laws of this step, this one among them.
            powers: one for each, scalars, traced or not.
            signs: the powers as Python numbers.

        Returns:
            F, and sum_i b_i [log p_i(x'|x) - log k(x|x')] + log k(x|x') - log F(x'|x) as a function of x'.
        """


def product_law(
    laws: Sequence[Any], powers: Sequence[Any], signs: Sequence[float], allowed: Any = None
) -> tuple[Any, LogWeight | None]:
    """Return the law F of a step and the weight of what is drawn from it.

    Args:
        laws: the processes' distributions, of one type.
        powers: one for each, scalars, traced or not.
        signs: the powers as Python numbers; 1 and the sign of others decide what is computed.
        allowed: bool `[V]`, which values may be drawn; None for all.

    Returns:
        F, (1) for categorical laws: `laws[0]` itself where it stands alone, to the power 1. The weight, None where it
        is 0 for all.

    Raises:
        TypeError: laws that cannot be multiplied.
    """
    if len(laws) == 1 and signs[0] == 1 and allowed is None:
        return laws[0], None
    if not all(isinstance(law, dist.CategoricalLogits | dist.CategoricalProbs) for law in laws):
        if allowed is None and all(isinstance(law, Multipliable) for law in laws):
            return max(laws, key=lambda law: getattr(law, "generality", 0)).multiply(laws, powers, signs)
        kinds = sorted({type(law).__name__ for law in laws})
        raise TypeError(f"steps drawn from {', '.join(kinds)} cannot be multiplied, raised to a power or constrained.")
    total = None
    for law, power, sign in zip(laws, powers, signs, strict=True):
        term = _weigh(law.logits, power, sign)
        total = term if total is None else total + term
    if allowed is not None:
        total = jnp.where(allowed, total, -jnp.inf)
    law = type(laws[0])(logits=total)
    return law, functools.partial(_increment, laws, powers, signs, law)


def weighted_log_prob(laws: Sequence[Any], powers: Sequence[Any], signs: Sequence[float], value: Any) -> Any:
    """Return `sum_i b_i log p_i(value)`, -inf where a factor forbids the value."""
    terms = [_weigh(law.log_prob(value), *rest) for law, *rest in zip(laws, powers, signs, strict=True)]
    return sum(terms[1:], terms[0])


def _increment(laws, powers, signs, law, drawn):
    """The weight of one draw; -inf where nothing could be drawn."""
    log_drawn = law.log_prob(drawn)
    weighted = weighted_log_prob(laws, powers, signs, drawn)
    possible = (log_drawn > -jnp.inf) & (weighted > -jnp.inf)
    return jnp.where(possible, weighted - jnp.where(possible, log_drawn, 0.0), -jnp.inf)


def _weigh(log_prob: Any, power: Any, sign: float) -> Any:
    if sign == 1:
        return log_prob
    return jnp.where(log_prob == -jnp.inf, -jnp.inf, 0.0 if sign == 0 else power * log_prob)
