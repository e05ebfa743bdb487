"""Weighing steps by the ratio of their kernels: the default, and what is left without it.

    log w = sum_i b_i [log p_i(x'|x) - log k(x|x')] + log k(x|x') - log F(x'|x)                                    (1)

with F the locally optimal proposal, for which (1) does not depend on x' (`ppl.gaussian`). It holds at any number of
steps: the run's measure is that of the target on paths (`ppl.targets`), and E[Z_hat] = Z.

Source: Radon-Nikodym estimator (arXiv 2506.05668); twisted diffusion sampler (arXiv 2306.17775) for one factor.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from ppl.guarantees import Promising
from ppl.inference.correctors.active import check_active
from ppl.inference.correctors.feynman_kac import FeynmanKac
from ppl.products import product_law

__all__ = ["KernelRatio", "Uncorrected"]


@dataclasses.dataclass(frozen=True)
class KernelRatio(Promising):
    """Weigh each step by (1). Steps must have densities: `churn` 1.

    Attributes:
        active: the times (low, high), 1 = noise, between which particles may be resampled; None for all. Outside of
            them weights are carried on: nothing is lost.
    """

    active: tuple[float, float] | None = None
    guarantee: ClassVar[str] = "unbiased"

    def __post_init__(self):
        check_active(self.active)

    def apply(self, target: Any) -> Any:
        """Return the target with this corrector: itself."""
        return target


@dataclasses.dataclass(frozen=True)
class Uncorrected(Promising):
    """Draw from F and weigh nothing, rewards included: what guidance and annealing by the score alone give."""

    guarantee: ClassVar[str] = "heuristic"
    weighs: ClassVar[bool] = False

    def apply(self, target: Any) -> Any:
        """Return the target with this corrector; a process that stands alone keeps its own steps.

        Raises:
            ValueError: at another churn than 1, a level has no data.
        """
        bare = dataclasses.replace(target, tilts=(), potentials=())
        if len(target.factors) == 1 and target.factors[0][1] == 1 and target.proposal is None:
            return bare
        if getattr(target.process, "churn", 1) != 1 and not np.all(target.process.levels.alpha[:-1] > 0):
            raise ValueError(
                f"`corrector` 'none' at churn {target.process.churn:g} needs data at every level: start the grid "
                "later, at t < 1."
            )
        return dataclasses.replace(bare, corrector=self)

    def __call__(self, processes, states, powers, signs, step, allowed):
        """Return F; see `ppl.targets.Corrector`. Where steps have no backward kernel it is the Feynman-Kac one."""
        if getattr(processes[0], "churn", 1) != 1:
            return FeynmanKac()(processes, states, powers, signs, step, allowed)[0], None
        laws = [process.forward(state, step) for process, state in zip(processes, states, strict=True)]
        return product_law(laws, powers, signs, allowed)[0], None
