"""The No-U-Turn sampler on a program's continuous sites: trajectories that end where they would turn back.

See `ppl.inference.hamiltonian_moves` for the energy, and for how step size and mass matrix are found.

Source: Hoffman and Gelman (2014), "The No-U-Turn sampler: adaptively setting path lengths in Hamiltonian Monte Carlo",
as NumPyro implements it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ppl.inference.acceptance import require_step_size
from ppl.inference.hamiltonian_moves import HamiltonianMoves
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.inference.unconstrained import as_selector, require_unit_interval
from ppl.inference.validation import require_count
from ppl.trace_space import Selector, TraceSpace

__all__ = ["NUTS"]


@dataclasses.dataclass(frozen=True)
class NUTS(TraceKernel):
    """The No-U-Turn sampler, by NumPyro's implementation.

    Attributes:
        sites: which sites, see `ppl.trace_space.Selector`; None for all continuous ones.
        step_size: in units of z, the sites unconstrained; the mass matrix is then the identity. None finds both in
            warm-up.
        max_tree_depth: a trajectory has at most `2 ** max_tree_depth` leapfrog steps.
        target_accept: the mean acceptance probability that the step size is adapted to.
        dense_mass: whether correlations are adapted to, or variances only.
    """

    sites: Selector = None
    step_size: float | None = None
    max_tree_depth: int = 10
    target_accept: float = 0.8
    dense_mass: bool = False
    needs_gradient: ClassVar[bool] = True
    guarantee: ClassVar[str] = "invariant"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "sites", as_selector(self.sites))
        require_step_size(self.step_size)
        require_count("max_tree_depth", self.max_tree_depth)
        require_unit_interval("target_accept", self.target_accept)
        if not isinstance(self.dense_mass, bool):
            raise TypeError(f"`dense_mass` must be True or False, got {self.dense_mass!r}.")

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`."""
        return HamiltonianMoves(
            self, space, "NUTS", max_tree_depth=self.max_tree_depth, dense_mass=self.dense_mass, trajectory_length=None
        )
