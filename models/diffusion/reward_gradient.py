"""Steps that lean along a reward's gradient: the proposal of the twisted diffusion sampler.

With psi(x) = r(D(x, t)), the reward at the denoised value, and F = N(m, u I) the proposal of a target's step,

    F'(x'|x) = N(m + c u grad psi(x), u I)                                                                         (1)

is, to first order and at c = 1, F tilted by exp(psi). The weights correct for it whatever the reward and c; together
with psi as the twist the increments nearly cancel.

Source: twisted diffusion sampler (arXiv 2306.17775), eqs. 10 and 11, with the variance of F left as it is.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ppl.gaussian import Gaussian
from ppl.host import Host

if TYPE_CHECKING:
    from ppl.models.diffusion.reverse import Reverse

__all__ = ["RewardGradient"]


@dataclasses.dataclass(frozen=True, eq=False)
class RewardGradient:
    """The proposal (1); see `Reverse.toward`."""

    process: Reverse
    log_reward: Callable
    scale: float = 1.0

    def __post_init__(self):
        if isinstance(self.log_reward, Host) or not callable(self.log_reward):
            raise TypeError(
                f"`log_reward` must be a JAX function, which has a gradient, got {type(self.log_reward).__name__}; a "
                "black-box reward can only be a twist."
            )
        if not isinstance(self.scale, numbers.Real) or not math.isfinite(self.scale):
            raise ValueError(f"`scale` must be a finite number, got {self.scale!r}.")

    @property
    def network_calls(self) -> int:
        """How often one particle calls the network for gradients in a run."""
        return self.process.num_steps

    def __call__(self, law: Gaussian, state: dict[str, Any]) -> Gaussian:
        """Return (1) for the target's own proposal and the running state."""
        gradient = jax.grad(lambda x: jnp.asarray(self.log_reward(self.process.denoise(x, state["step"]))))(state["x"])
        return law.shifted(self.scale * law.squared_scale * gradient)
