"""What an algorithm promises of its weights, from the strongest promise to none.

| guarantee | the weighted population stands for the program's measure |
|---|---|
| unbiased | in the mean, at any number of particles (law L2) |
| consistent | as particles grow in number |
| discretised | as steps in time grow in number |
| invariant | chains: as they grow in length; no log-evidence |
| heuristic | not at all; no log-evidence |
"""

from __future__ import annotations

__all__ = ["GUARANTEES", "weakest"]

GUARANTEES = ("unbiased", "consistent", "discretised", "invariant", "heuristic")


def weakest(*promises: str) -> str:
    """Return the weakest of several promises: what their combination promises."""
    return max(promises, key=GUARANTEES.index)
