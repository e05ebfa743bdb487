"""Importance sampling: independent runs of the program, weighted.

Each particle runs the program alone and ends with the weight

    w_n = prod over proposed sites of p(x)/q(x)  *  prod over observations and factors,           (1)

    Z_hat = (1/N) sum_n w_n,    E[Z_hat] = Z.                                                     (2)

Its variance grows exponentially with the length of a program; `SMC` resamples on the way.

Source: Owen, Monte Carlo theory, methods and examples (2013), ch. 9.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ppl.guarantees import Promising
from ppl.inference.population import OnlyWeigh, blame_sites, run_population
from ppl.inference.validation import refuse_state, require_count
from ppl.posterior import Posterior

__all__ = ["ImportanceSampling"]


@dataclasses.dataclass(frozen=True)
class ImportanceSampling(Promising):
    """Run the program independently for each particle.

    Attributes:
        num_particles: how many particles, at least 1.
    """

    num_particles: int
    guarantee: ClassVar[str] = "unbiased"

    def __post_init__(self):
        require_count("num_particles", self.num_particles)

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments."""
        refuse_state(self, state)
        return run_population(program, self, key, keep=keep, progress=progress)

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Repeat a run and count what each site did to the particles."""
        return blame_sites(program, self, key)

    def selection(self) -> OnlyWeigh:
        """Return what happens at the end of an outermost iteration: nothing is resampled."""
        return OnlyWeigh()
