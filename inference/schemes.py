"""Resampling schemes of the user's own, and what they promise.

A scheme maps a key and log-weights `[N]` to ancestors `int32[num]`. Weights stay proper (law L2) where

    E[offspring of n] = num * W_n,      W_n = exp(w_n) / sum_m exp(w_m)                                           (1)

which no look at a function can tell: a scheme that keeps the best k particles looks the same. So a function as
`resampler=` makes a run "assumed", until `resampler(fn, guarantee=...)` declares what it promises. The schemes of
`ppl.kernels.resampling` are known, by name and as functions. `ppl.testing.assert_properly_weighted` tells by
enumeration whether (1) holds for a scheme that takes its choices from `ppl.chance`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ppl import chance
from ppl.display import brief
from ppl.guarantees import promised
from ppl.kernels import resampling

__all__ = ["Resampler", "conditional_scheme", "resampler", "resampler_guarantee"]

_PROMISES = ("unbiased", "consistent", "assumed", "heuristic")
_KNOWN = {"birth_death": resampling.birth_death, **resampling.RESAMPLERS}


@dataclasses.dataclass(frozen=True)
class Resampler:
    """A declared scheme; see `resampler`, which makes it. It is called like its function.

    Attributes:
        function: the scheme, `(key, log_weights[N], num) -> int32[num]`.
        guarantee: what it promises.
        conditional: its conditional form, or None.
    """

    function: Callable
    guarantee: str
    conditional: Callable | None = None

    def __post_init__(self):
        if isinstance(self.function, str):
            raise TypeError(f"`fn` must be a function; {self.function!r} is a name, whose scheme the library knows.")
        for name, function in (("fn", self.function), ("conditional", self.conditional)):
            optional = name == "conditional" and function is None
            if not optional and (not callable(function) or isinstance(function, type)):
                raise TypeError(f"`{name}` must be a function (key, log_weights, ...) -> ancestors, got {function!r}.")
        if self.guarantee not in _PROMISES:
            raise ValueError(
                f"`guarantee` must be one of {', '.join(map(repr, _PROMISES))}, got {self.guarantee!r}: 'unbiased' "
                "where a particle has num * W_n children in the mean, 'consistent' where that holds as particles grow "
                "in number, 'heuristic' where it does not."
            )
        hash(self)  # an algorithm is a key of compiled runs

    def __call__(self, key: Any, log_weights: Any, num: int) -> Any:
        """Return ancestors."""
        return self.function(key, log_weights, num)

    def __repr__(self) -> str:
        conditional = "" if self.conditional is None else f", conditional={brief(self.conditional)}"
        return f"resampler({brief(self.function)}, guarantee={self.guarantee!r}{conditional})"


def resampler(fn: Callable, guarantee: str = "unbiased", conditional: Callable | None = None) -> Resampler:
    """Declare what a resampling function of your own promises.

    Args:
        fn: a function `(key, log_weights[N], num) -> int32[num]` of ancestors.
        guarantee: "unbiased", where `E[offspring of n] = num * W_n` at any number of particles; "consistent", where
            that holds as they grow in number; "heuristic", where it does not, which leaves a run without log-evidence;
            "assumed", which is what an undeclared function is.
        conditional: its conditional form, for particle Gibbs and PMMH: a function `(key, log_weights[N], retained,
            num) -> int32[num]` in which slot 0 has the ancestor `retained`; see `ppl.kernels.resampling.conditional`.

    Returns:
        What algorithms take as `resampler=`.

    Raises:
        TypeError: `fn` or `conditional` is no function.
        ValueError: `guarantee` is none of these.
    """
    return Resampler(fn, guarantee, conditional)


def resampler_guarantee(scheme: str | Callable) -> str:
    """Return what a setting `resampler=` promises."""
    if isinstance(scheme, str) or str(getattr(scheme, "__module__", None)).startswith("ppl.kernels."):
        return "unbiased"
    return promised(scheme)


def conditional_scheme(scheme: str | Callable) -> Callable:
    """Return the conditional form of a setting `resampler=`, `(key, log_weights, retained, num) -> ancestors`.

    Raises:
        ValueError: it has none.
    """
    if isinstance(scheme, str):
        return chance.conditional_resampler(scheme)
    name = next((name for name, known in _KNOWN.items() if scheme is known), None)
    if name is not None:
        return chance.conditional_resampler(name)
    if getattr(scheme, "conditional", None) is None:
        raise ValueError(
            "`resampler` must be the name of a scheme with a conditional form, such as 'systematic', or "
            f'ppl.inference.resampler(fn, guarantee="unbiased", conditional=...), got {scheme!r}.'
        )
    return scheme.conditional
