"""Where a site's values may lie: NumPyro's constraint, its bounds split into what is known and what a run computes.

Bounds may depend on arguments or on other sites, as in `dist.Uniform(0.0, width)`: these are operands of the draw.
For a support S of numbers the map from R^d onto S and its inverse (`numpyro.distributions.biject_to`) give

    p_z(z) = p(T(z)) |det dT/dz|                                                                   (1)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to
from numpyro.distributions.constraints import Constraint

__all__ = ["Support", "split_support"]


@dataclasses.dataclass(frozen=True)
class Support:
    """A constraint without the bounds that are computed.

    Attributes:
        tree: the constraint's structure.
        known: its bounds as staging knows them; None for those that are computed.
    """

    tree: Any
    known: tuple[int | float | bool | None, ...]

    def constraint(self, computed: tuple[Any, ...] = ()) -> Constraint:
        """Return the constraint, given the bounds that are computed."""
        rest = iter(computed)
        return jax.tree.unflatten(self.tree, [next(rest) if bound is None else bound for bound in self.known])

    @property
    def is_discrete(self) -> bool:
        """Whether the values are discrete."""
        return bool(self.constraint((0,) * self.known.count(None)).is_discrete)

    @property
    def values(self) -> np.ndarray | None:
        """The possible values of one entry, `[K]`, where they are finitely many scalars and known; else None."""
        if not self.is_discrete or None in self.known:
            return None
        constraint = self.constraint()
        while hasattr(constraint, "base_constraint"):
            constraint = constraint.base_constraint
        if type(constraint).__name__ == "_Boolean":
            return np.arange(2)
        if hasattr(constraint, "upper_bound") and hasattr(constraint, "lower_bound"):
            return np.arange(int(constraint.lower_bound), int(constraint.upper_bound) + 1)
        return None

    def constrain(self, z, computed: tuple[Any, ...]) -> tuple[Any, Any]:
        """Return x = T(z) and log |det dT/dz|, summed over all entries; see (1)."""
        transform = biject_to(self.constraint(computed))
        x = transform(z)
        return x, jnp.sum(transform.log_abs_det_jacobian(z, x))

    def unconstrain(self, x, computed: tuple[Any, ...]) -> Any:
        """Return z with T(z) = x."""
        return biject_to(self.constraint(computed))._inverse(x)


def split_support(law: Any) -> tuple[Support | None, list[Any]]:
    """Return a law's support and the bounds that a run computes; None where the law states none."""
    try:
        support = law.support
        leaves, tree = jax.tree.flatten(support)
    except NotImplementedError:
        return None, []
    if not isinstance(support, Constraint) or any(isinstance(leaf, Constraint) for leaf in leaves):
        return None, []
    is_known = [isinstance(leaf, bool | int | float | np.number) for leaf in leaves]
    known = tuple(np.asarray(leaf).item() if flag else None for leaf, flag in zip(leaves, is_known, strict=True))
    computed = [jnp.asarray(leaf) for leaf, flag in zip(leaves, is_known, strict=True) if not flag]
    return Support(tree, known), computed
