"""Resampling schemes: one a file, all ``(key, log_weights, num) -> ancestors``.

Contract for every scheme, in float32 and up to 2^20 particles: the expected number of draws of a particle is
``num`` times its normalised weight; ancestors are in range; a particle of weight zero is never drawn while
another lives; equal weights never collapse; the same key gives the same ancestors.
"""

from collections.abc import Callable

import jax

from ppl.kernels.resampling.birth_death import birth_death
from ppl.kernels.resampling.conditional import CONDITIONAL, ConditionalResampler, resolve_conditional
from ppl.kernels.resampling.killing import killing
from ppl.kernels.resampling.multinomial import multinomial
from ppl.kernels.resampling.residual import residual
from ppl.kernels.resampling.ssp import ssp
from ppl.kernels.resampling.stratified import stratified
from ppl.kernels.resampling.systematic import systematic

__all__ = [
    "CONDITIONAL",
    "ConditionalResampler",
    "RESAMPLERS",
    "Resampler",
    "birth_death",
    "killing",
    "multinomial",
    "residual",
    "resolve",
    "resolve_conditional",
    "ssp",
    "stratified",
    "systematic",
]

Resampler = Callable[..., jax.Array]
"""``(key, log_weights[n], num=n) -> int32[num]``, ancestors."""

RESAMPLERS: dict[str, Resampler] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "ssp": ssp,
    "killing": killing,
}
"""The schemes by name, all with a conditional form."""


def resolve(resampler: str | Resampler) -> Resampler:
    """Find a resampling scheme by its name; a callable is passed through.

    Args:
        resampler: a key of `RESAMPLERS`, "birth_death", which has no conditional form, or a function
            ``(key, log_weights[n], num=n) -> int32[num]``.

    Returns:
        The function.

    Raises:
        ValueError: no scheme has this name.
        TypeError: neither a name nor a callable.
    """
    if isinstance(resampler, str):
        schemes = {**RESAMPLERS, "birth_death": birth_death}
        if resampler not in schemes:
            known = ", ".join(repr(name) for name in sorted(schemes))
            raise ValueError(f"`resampler` {resampler!r} is not known. Known are: {known}.")
        return schemes[resampler]
    if not callable(resampler):
        raise TypeError(f"`resampler` must be a name or a function (key, log_weights, num), got {resampler!r}.")
    return resampler
