"""Look-ahead: particles are chosen by what the next iteration would make of them.

Before resampling at the end of iteration t every particle n tries iteration t + 1, with randomness of its own, and sees
its log-weight grow by a_n. Ancestors are drawn by first-stage weights, and their children pay them back:

    (1)  v_n = (1 - d) exp(a_n - max_m a_m) + d
    (2)  ancestors ~ w_n v_n,   children start with 1 / v_n,   log Z += log (1/N) sum_n w_n v_n.

The trial is thrown away; it is an auxiliary variable, so that (2) preserves the measure whatever a_n is, as long as
v_n > 0: hence the share d, without which a particle whose trial happened to die would leave no child and take its mass
along. Every iteration is run twice, less what its weight does not depend on.

Source: Pitt and Shephard (1999), "Filtering via simulation: auxiliary particle filters", with a draw in the place of
their likely value; as "look-ahead modulation" of reasoning by steps in arXiv 2510.05825, whose formula is not public.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from ppl.guarantees import Promising

__all__ = ["Lookahead"]


@dataclasses.dataclass(frozen=True)
class Lookahead(Promising):
    """Look one iteration ahead.

    Attributes:
        defensive: the share d of (1), in (0, 1]: children start with a weight of at most 1 / d. 1 does not look.
    """

    defensive: float = 0.1
    guarantee: ClassVar[str] = "unbiased"

    def __post_init__(self):
        if isinstance(self.defensive, bool) or not isinstance(self.defensive, numbers.Real):
            raise TypeError(f"`defensive` must be a number, got {self.defensive!r}.")
        if not 0 < self.defensive <= 1:
            raise ValueError(f"`defensive` must be in (0, 1], got {self.defensive}.")

    def first_stage(self, increments: Float[Array, " N"]) -> Float[Array, " N"]:
        """Compute log v_n of (1).

        Args:
            increments: shape (N,), a_n; -inf where the trial died.

        Returns:
            Shape (N,), in [log d, 0]; zeros if no trial lived.
        """
        if self.defensive == 1:
            return jnp.zeros_like(increments)
        largest = jnp.max(increments)
        relative = increments - jnp.where(jnp.isfinite(largest), largest, 0.0)
        hopeful = relative + math.log1p(-self.defensive)
        log_v = jnp.logaddexp(jnp.where(jnp.isnan(hopeful), -jnp.inf, hopeful), math.log(self.defensive))
        return jnp.where(jnp.isfinite(largest), log_v, 0.0)
