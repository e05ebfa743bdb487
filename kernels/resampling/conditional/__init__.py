"""Conditional resampling, for particle Gibbs: ``(key, log_weights[n], retained, num) -> ancestors``.

A conditional scheme draws what its unconditional one draws, put in uniformly random order and conditioned on
ancestor ``retained`` in slot 0: ``ancestors[0] == retained``, the others are exchangeable. Drawing ``retained`` from
the normalised weights W and then conditionally gives the unconditional scheme's ancestors in random order.

A retained particle of weight zero has no such law: it is pinned all the same, and the others are alive. An index out
of range is moved to the nearest one in range. If all weights are zero, the others are any particles.

Source: Andrieu, Doucet and Holenstein (2010), "Particle Markov chain Monte Carlo methods", for the multinomial scheme
and the idea; the derivations for the others are in their modules.
"""

from collections.abc import Callable

import jax

from ppl.kernels.resampling.conditional.killing import conditional_killing
from ppl.kernels.resampling.conditional.multinomial import conditional_multinomial
from ppl.kernels.resampling.conditional.residual import conditional_residual
from ppl.kernels.resampling.conditional.ssp import conditional_ssp
from ppl.kernels.resampling.conditional.stratified import conditional_stratified
from ppl.kernels.resampling.conditional.systematic import conditional_systematic

__all__ = [
    "CONDITIONAL",
    "ConditionalResampler",
    "conditional_killing",
    "conditional_multinomial",
    "conditional_residual",
    "conditional_ssp",
    "conditional_stratified",
    "conditional_systematic",
    "resolve_conditional",
]

ConditionalResampler = Callable[..., jax.Array]
"""``(key, log_weights[n], retained, num=n) -> int32[num]``, ancestors."""

CONDITIONAL: dict[str, ConditionalResampler] = {
    "multinomial": conditional_multinomial,
    "stratified": conditional_stratified,
    "systematic": conditional_systematic,
    "residual": conditional_residual,
    "ssp": conditional_ssp,
    "killing": conditional_killing,
}
"""The conditional schemes, by the names of the unconditional ones."""


def resolve_conditional(resampler: str | ConditionalResampler) -> ConditionalResampler:
    """Find a conditional scheme by its name; a callable is passed through.

    Args:
        resampler: a key of `CONDITIONAL`, or a function ``(key, log_weights[n], retained, num=n) -> int32[num]``.

    Returns:
        The function.

    Raises:
        ValueError: no scheme has this name.
        TypeError: neither a name nor a callable.
    """
    if isinstance(resampler, str):
        if resampler not in CONDITIONAL:
            known = ", ".join(repr(name) for name in sorted(CONDITIONAL))
            raise ValueError(f"`resampler` {resampler!r} has no conditional form. Known are: {known}.")
        return CONDITIONAL[resampler]
    if not callable(resampler):
        raise TypeError(
            f"`resampler` must be a name or a function (key, log_weights, retained, num), got {resampler!r}."
        )
    return resampler
