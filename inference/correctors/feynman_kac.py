"""Feynman-Kac correctors: weights of continuous time for the reverse diffusions of a target.

Noising in time tau is dx = f dtau + g dW, with densities q_i and scores s_i = grad log q_i; generation runs the other
way. For the target prod_i q_i^{b_i} exp(b r), with S = sum_i b_i s_i, B = sum_i b_i and churn c, particles move by

    dx = [-f + (1 + c)/2 g^2 S + g^2 b/2 grad r] dt + sqrt(c) g dW                                                 (1)

and their log-weights by

    dw = [g^2/2 (|S|^2 - sum_i b_i |s_i|^2) + (B - 1) div f] dt                                                    (2)
       + [b' r - b <grad r, f> + g^2/2 b <grad r, S>] dt                                                           (3)

(3) belongs to a reward and to c = 1 in (1). (2) is the same for every c: the differential equation (c = 0), the
reverse diffusion with the target's score (1), more noise, and the tempered noise of the annealed case, c = 1/b. A
power b_i(t) that changes in time adds b_i' log q_i dt.

In y = x / alpha noise has the variance T = sigma^2 / alpha^2, f is 0, and a step is

    y' = y + (1 + c)/2 dT S + sqrt(c dT) z,   dw = dT/2 (|S|^2 - sum_i b_i |s_i|^2),   s_i = (D_i - y) / T          (4)

where dT is how much T falls. Densities of x and y differ by alpha^d: each step adds d (B - 1) log(alpha / alpha'), so
that log Z is that of x. The weights are exact as steps grow in number. At c = 1 the step (4) is that of the kernel
ratio with the noising variance.

A step is too coarse where (B - 1) dT >= T: from far away weights would grow faster than the density falls, and their
mean would be infinite.

Source: Feynman-Kac correctors (arXiv 2503.02819), Props. 3.1 to 3.4 and D.5.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ppl.gaussian import Gaussian

__all__ = ["FeynmanKac", "drift", "log_weight_rate"]


@dataclasses.dataclass(frozen=True)
class FeynmanKac:
    """Weigh steps by the increments (4) of continuous time.

    Attributes:
        churn: c; None for that of the target's processes. At 0 particles never part again, so that nothing may be
            resampled.
    """

    churn: float | None = None
    guarantee: ClassVar[str] = "discretised"

    def __post_init__(self):
        if self.churn is not None and not (isinstance(self.churn, numbers.Real) and 0 <= self.churn < math.inf):
            raise ValueError(f"`churn` must be a number of at least 0 or None, got {self.churn!r}.")

    def apply(self, target: Any) -> Any:
        """Return the target with this corrector.

        Raises:
            TypeError: the target's processes are not diffusions.
            ValueError: their churn is another, or a step of theirs is too coarse.
        """
        process = target.process
        if not hasattr(process, "churn"):
            raise TypeError(f"`corrector` FeynmanKac is for diffusion processes, got {process!r}.")
        if self.churn is not None and self.churn != process.churn:
            raise ValueError(
                f"`churn` must be that of the process, {process.churn:g}, got {self.churn:g}: "
                f"model.reverse(..., churn={self.churn:g})."
            )
        fall, excess = _relative_fall(process.levels), sum(power for _, power in target.factors) - 1
        if not np.all(np.isfinite(process.levels.log_ratio[:-1])):
            raise ValueError("`corrector` FeynmanKac needs data at every level: start the grid later, at t < 1.")
        if excess > 0 and np.any(fall * excess >= 1):
            worst = int(np.argmax(fall))
            raise ValueError(
                f"step {worst} is too coarse for FeynmanKac: sigma^2/alpha^2 falls by {fall[worst]:.3g} of itself, and "
                f"powers that sum to {excess + 1:g} allow less than {1 / excess:.3g}. Take more steps."
            )
        return dataclasses.replace(target, corrector=self)

    def __call__(self, processes, states, powers, signs, step, allowed):
        """Return the law and the weight (4) of a step; see `ppl.targets.Corrector`."""
        del signs, allowed
        process, x = processes[0], states[0]["x"]
        before, after = process.level(step), process.level(step + 1)
        squared = (before.sigma / before.alpha) ** 2
        fall = squared - (after.sigma / after.alpha) ** 2
        y = x / before.alpha
        pulls = [(state["denoised"] - y) / squared for state in states]
        total = sum(power * pull for power, pull in zip(powers, pulls, strict=True))
        loc = after.alpha * (y + 0.5 * (1 + process.churn) * fall * total)
        own = sum(power * jnp.sum(pull**2) for power, pull in zip(powers, pulls, strict=True))
        volume = math.prod(process.model.shape) * (jnp.sum(powers) - 1) * jnp.log(before.alpha / after.alpha)
        log_weight = 0.5 * fall * (jnp.sum(total**2) - own) + volume
        if process.churn == 0:
            law = dist.Delta(loc, event_dim=jnp.ndim(loc))
        else:
            law = Gaussian(loc, process.churn * fall * after.alpha**2)
        return law, lambda drawn: log_weight


def drift(scores, powers, f, squared_noise, churn=1.0, reward_gradient=None, reward_power=0.0):
    """Return the drift of (1).

    Args:
        scores: s_i at x, a list of arrays.
        powers: b_i.
        f: the noising's drift at x.
        squared_noise: g^2.
        churn: c.
        reward_gradient: grad r at x, or None.
        reward_power: b of the reward.
    """
    total = sum(power * score for power, score in zip(powers, scores, strict=True))
    result = -f + 0.5 * (1 + churn) * squared_noise * total
    if reward_gradient is None:
        return result
    return result + 0.5 * squared_noise * reward_power * reward_gradient


def log_weight_rate(
    scores,
    powers,
    f,
    divergence,
    squared_noise,
    *,
    power_rates=None,
    log_densities=None,
    reward=0.0,
    reward_gradient=None,
    reward_power=0.0,
    reward_power_rate=0.0,
):
    """Return dw/dt of (2) and (3), a scalar.

    Args:
        scores: s_i at x, a list of arrays.
        powers: b_i.
        f: the noising's drift at x.
        divergence: div f.
        squared_noise: g^2.
        power_rates: b_i', for powers that change in time; needs `log_densities`.
        log_densities: log q_i(x).
        reward: r(x).
        reward_gradient: its gradient, or None without a reward.
        reward_power: b of the reward.
        reward_power_rate: b'.
    """
    total = sum(power * score for power, score in zip(powers, scores, strict=True))
    own = sum(power * jnp.sum(score**2) for power, score in zip(powers, scores, strict=True))
    rate = 0.5 * squared_noise * (jnp.sum(total**2) - own) + (sum(powers) - 1) * divergence
    if power_rates is not None:
        rate = rate + sum(change * log for change, log in zip(power_rates, log_densities, strict=True))
    if reward_gradient is None:
        return rate
    slope = -jnp.sum(reward_gradient * f) + 0.5 * squared_noise * jnp.sum(reward_gradient * total)
    return rate + reward_power_rate * reward + reward_power * slope


def _relative_fall(levels) -> np.ndarray:
    """Return by how much of itself sigma^2 / alpha^2 falls at each step."""
    squared = np.exp(2 * levels.log_ratio)
    return 1 - squared[1:] / squared[:-1]
