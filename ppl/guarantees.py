"""What a run promises of its weights or draws: one rule for populations and chains.

| promise | the run stands for the program's measure | log-evidence |
|---|---|---|
| unbiased | populations: in the mean, at any number of particles (law L2) | yes |
| invariant | chains: their kernel leaves it as it is; they reach it as they grow in length | NaN |
| consistent | as particles grow in number | populations |
| discretised | as steps in time grow in number | populations |
| assumed | if a part of the user's own keeps a promise that the library cannot know | populations |
| heuristic | not at all | NaN |

A run promises the weakest of what its parts do, from the top of this table to its foot; "unbiased" and "invariant" are
one rank, which a population calls the one and a chain the other. Parts have an attribute `guarantee`. What counts as
one, and what the library knows of it:

| part | what it promises |
|---|---|
| laws, rewards, constraints, host functions, what a model computes | nothing less: they say what the measure is |
| `Process` of the user's own | nothing less, unless it declares it: its kernels are the program |
| proposals of sites, targets and `MH`; twists of algorithms | nothing less: the weights pay for them |
| schemes of `ppl.kernels.resampling` | nothing less |
| a function as `resampler=` | assumed, until `ppl.inference.resampler(fn, guarantee=...)` declares it |
| temperatures, schedules, thresholds, step sizes | what the algorithm says that takes them |
| subclasses of the library's kernels, correctors, algorithms | assumed, unless their class declares `guarantee` |
| other callables as algorithms | what the posterior that they return says; assumed where it says nothing |

A process that stands inside of a model, by `ppl.generate`, counts like one that is run itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = ["GUARANTEES", "Promising", "has_evidence", "promised", "require_unbiased"]

GUARANTEES = ("unbiased", "invariant", "consistent", "discretised", "assumed", "heuristic")
"""The promises, from the strongest to none."""

_EXACT = ("unbiased", "invariant")


def promised(*parts: Any, chain: bool = False) -> str:
    """Return what a run promises that is made of several parts: the weakest of their promises.

    Args:
        parts: promises, or objects with the attribute `guarantee`: staged programs, targets, processes, algorithms,
            kernels. None is no part. Anything else is a part of which nothing is known.
        chain: whether the run is a chain, whose exact promise is "invariant" and not "unbiased".

    Raises:
        ValueError: a part's `guarantee` is none of the promises.
    """
    weakest = max((_promise(part) for part in parts if part is not None), key=GUARANTEES.index, default="unbiased")
    if weakest in _EXACT:
        return "invariant" if chain else "unbiased"
    return weakest


def has_evidence(promise: str) -> bool:
    """Whether runs of a promise estimate log Z, as far as they are populations."""
    return promise not in ("invariant", "heuristic")


def require_unbiased(what: str, *parts: Any) -> None:
    """Raise unless parts promise unbiased estimates together.

    Args:
        what: what needs them, for the error: "`smc` must be unbiased".
        parts: as for `promised`.

    Raises:
        ValueError: they promise less; says which part does, and the way out where there is one.
    """
    promise = promised(*parts)
    if promise == "unbiased":
        return
    part = next(part for part in parts if part is not None and promised(part) == promise)
    shown = "" if isinstance(part, str) else f"{part!r}, whose guarantee is "
    raise ValueError(f"{what}, got {shown}{promise!r}. {_WAYS_OUT[promise]}")


_WAYS_OUT = {
    "consistent": "Fix beforehand what it chooses from its particles.",
    "discretised": "Take corrector='auto', and no moves at noise levels.",
    "assumed": (
        "A part of it is of your own. If it keeps the promise, declare it: "
        'SMC(.., resampler=ppl.inference.resampler(fn, guarantee="unbiased")) where `fn` draws `num * W_n` children of '
        'particle n in the mean; `guarantee = "unbiased"`, or "invariant" for kernels, in a class of your own.'
    ),
    "heuristic": "Take corrector='auto', exact annealing, and a process whose own guarantee is \"unbiased\".",
}


class Promising:
    """What states a promise: the base of algorithms, kernels, correctors and of what else takes part in a run.

    A subclass of the user's own that inherits the library's promise may do something else than its base does, so that
    it promises "assumed" at best, until it, or a class of the user's own above it, declares `guarantee`.

    Attributes:
        guarantee: see `ppl.guarantees`.
    """

    guarantee: ClassVar[str] = "assumed"

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        declares = next(base for base in cls.__mro__ if _declares(base))
        if _is_library(cls) or not _is_library(declares):
            return
        inherited = vars(declares)["guarantee"]
        if isinstance(inherited, str):
            cls.guarantee = promised(inherited, "assumed")
        else:
            cls.guarantee = property(lambda self: promised(super(cls, self).guarantee, "assumed"))


def _declares(cls: type) -> bool:
    """Return whether a class states a guarantee itself, as an attribute or as a dataclass's field."""
    return "guarantee" in vars(cls) or "guarantee" in vars(cls).get("__annotations__", {})


def _is_library(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "ppl"


def _promise(part: Any) -> str:
    promise = part if isinstance(part, str) else getattr(part, "guarantee", "assumed")
    if promise not in GUARANTEES:
        raise ValueError(f"`guarantee` must be one of {', '.join(map(repr, GUARANTEES))}, got {promise!r} of {part!r}.")
    return promise
