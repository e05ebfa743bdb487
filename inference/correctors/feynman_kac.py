"""Feynman-Kac correctors: weights of continuous time for the reverse diffusions of a target.

Noising in time tau is dx = f dtau + g dW, with densities q_i and scores s_i = grad log q_i; generation runs the other
way. For the target prod_i q_i^{b_i} exp(b r), with S = sum_i b_i s_i, B = sum_i b_i and churn c, particles move by

    dx = [-f + (1 + c)/2 g^2 S + g^2 b/2 grad r] dt + sqrt(c) g dW                                                 (1)

and their log-weights by

    dw = [g^2/2 (|S|^2 - sum_i b_i |s_i|^2) + (B - 1) div f] dt                                                    (2)
       + [b' r - b <grad r, f> + g^2/2 b <grad r, S>] dt                                                           (3)

(3) belongs to a reward and to c = 1 in (1). (2) is the same for every c: the differential equation (c = 0), the
reverse diffusion with the target's score (1), more noise, and the tempered noise of the annealed case, c = 1/b.

In y = x / alpha noise has the variance T = sigma^2 / alpha^2, f is 0, and a step is

    y' = y + (1 + c)/2 dT S + sqrt(c dT) z,   dw = dT/2 (|S|^2 - sum_i b_i |s_i|^2),   s_i = (D_i - y) / T          (4)

where dT is how much T falls. Densities of x and y differ by alpha^d: each step adds d (B - 1) log(alpha / alpha'), so
that log Z is that of x. The weights are exact as steps grow in number. At c = 1 the step (4) is that of the kernel
ratio with the noising variance.

A power that changes in time adds b_i' log q_i dt. With a schedule h, b_i = h(u_k) beta_i at level k, where u runs like
the time from 1 at the start to 0 at the last level, step k is that of the powers at level k and adds

    (h(u_{k+1}) - h(u_k)) sum_i beta_i log q_i(x')        with the density at level k + 1                          (5)

so that the law of level k is prod_i q_i^{h(u_k) beta_i}, and the last one that of the target.

A step is too coarse where (B - 1) dT >= T + s^2, with s the scale of the data's own Gaussian tails, 0 where they have
none: from far away weights would grow faster than the density falls, and their mean would be infinite.

Source: Feynman-Kac correctors (arXiv 2503.02819), Props. 3.1 to 3.4, C.6 and D.5.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ppl.gaussian import Gaussian
from ppl.guarantees import Promising
from ppl.inference.correctors.active import check_active
from ppl.inference.correctors.estimated_density import EstimatedDensity

__all__ = ["FeynmanKac", "drift", "log_weight_rate"]


@dataclasses.dataclass(frozen=True)
class FeynmanKac(Promising):
    """Weigh steps by the increments (4) of continuous time.

    Attributes:
        churn: c; None for that of the target's processes. At 0 particles never part again, so that nothing may be
            resampled.
        schedule: h of (5), a Python function of a number in [0, 1] that returns a positive one, 1 at 0; None for 1
            everywhere. All powers are multiplied by it.
        log_density: where (5) takes log q_i from: "known", the models' own, with the constants of each level, without
            which log Z is another; "estimated" along the path by Ito's formula, which makes the run heuristic; or
            "auto", known where all models know it, constants too.
        active: as in `KernelRatio`.
    """

    churn: float | None = None
    schedule: Callable[[float], float] | None = None
    log_density: str = "auto"
    active: tuple[float, float] | None = None

    def __post_init__(self):
        check_active(self.active)
        if self.churn is not None and not (isinstance(self.churn, numbers.Real) and 0 <= self.churn < math.inf):
            raise ValueError(f"`churn` must be a number of at least 0 or None, got {self.churn!r}.")
        if self.schedule is not None and not callable(self.schedule):
            raise TypeError(f"`schedule` must be a function of a number in [0, 1] or None, got {self.schedule!r}.")
        if self.log_density not in ("auto", "known", "estimated"):
            raise ValueError(f"`log_density` must be 'auto', 'known' or 'estimated', got {self.log_density!r}.")

    @property
    def guarantee(self) -> str:
        """What the weights stand for: "heuristic" where they need estimated log-densities."""
        return "heuristic" if self.schedule is not None and self.log_density == "estimated" else "discretised"

    def apply(self, target: Any) -> Any:
        """Return the target with this corrector, whose guarantee is that for this target.

        Raises:
            TypeError: the target's processes are not diffusions.
            ValueError: their churn is another, a step of theirs is too coarse, or the schedule does not end at 1.
        """
        process = target.process
        if not hasattr(process, "churn"):
            raise TypeError(f"`corrector` FeynmanKac is for diffusion processes, got {process!r}.")
        if self.churn is not None and self.churn != process.churn:
            raise ValueError(
                f"`churn` must be that of the process, {process.churn:g}, got {self.churn:g}: "
                f"model.reverse(..., churn={self.churn:g})."
            )
        levels = process.aligned_with([process for process, _ in target.factors])[0].levels
        if not np.all(np.isfinite(levels.log_ratio[:-1])):
            raise ValueError("`corrector` FeynmanKac needs data at every level: start the grid later, at t < 1.")
        scales = np.ones(levels.num_steps + 1) if self.schedule is None else _tabulated(self.schedule, levels.times)
        own = min(getattr(getattr(p, "model", None), "tail_scale", 0.0) for p, _ in target.factors)
        _check_falls(levels, scales[:-1] * sum(power for _, power in target.factors), own)
        if self.schedule is None:
            return dataclasses.replace(target, corrector=self)
        return self._scheduled(target, scales)

    def _scheduled(self, target: Any, scales: np.ndarray) -> Any:
        """Return the target with the powers of the start, and the corrector that changes them."""
        processes = [process for process, _ in target.factors]
        source = self.log_density
        if source == "auto":
            known = all(getattr(process.model, "normalised", False) for process in processes)
            source = "known" if known else "estimated"
        if source == "estimated":
            processes = [EstimatedDensity(process) for process in processes]
        elif not all(getattr(process.model, "knows_density", False) for process in processes):
            raise ValueError(f"`log_density` 'known' needs models that know it, got {target!r}; take 'estimated'.")
        dtype = target.process.model.mean.dtype
        return dataclasses.replace(
            target,
            factors=tuple(
                (p, float(scales[0]) * power) for p, (_, power) in zip(processes, target.factors, strict=True)
            ),
            corrector=_Scheduled(dataclasses.replace(self, log_density=source), jnp.asarray(scales / scales[0], dtype)),
        )

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


@dataclasses.dataclass(frozen=True, eq=False)
class _Scheduled:
    """The corrector of a target with a schedule.

    Attributes:
        settings: what was asked for, with `log_density` decided.
        scales: `[K + 1]`, h at each level over that at the first, whose powers the target has.
    """

    settings: FeynmanKac
    scales: Any

    def __call__(self, processes, states, powers, signs, step, allowed):
        """Return the law and the weight of a step, (5) included; see `ppl.targets.Corrector`."""
        law, log_weight = self.settings(processes, states, self.powers_at(powers, step), signs, step, allowed)
        rise = powers * (self.scales[step + 1] - self.scales[step])

        def weigh(drawn):
            if self.settings.log_density == "estimated":
                logs = [
                    process.log_density(state, drawn, step) for process, state in zip(processes, states, strict=True)
                ]
            else:
                logs = [process.model.log_density_at(drawn, process.level(step + 1)) for process in processes]
            return log_weight(drawn) + jnp.sum(rise * jnp.stack(logs))

        return law, weigh

    def powers_at(self, powers, step):
        """Return the powers of a level, given the target's."""
        return powers * self.scales[step]


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


def _tabulated(schedule: Callable[[float], float], times: np.ndarray) -> np.ndarray:
    """Return the schedule at each level.

    Raises:
        ValueError: it is not positive and finite there, or not 1 at the end.
    """
    shares = (times - times[-1]) / (times[0] - times[-1])
    values = np.array([float(schedule(float(share))) for share in shares])
    if not np.all((values > 0) & np.isfinite(values)):
        worst = int(np.argmin(np.where(np.isfinite(values), values, -np.inf)))
        raise ValueError(f"`schedule` must be positive and finite, got {values[worst]} at {shares[worst]:.3g}.")
    if abs(values[-1] - 1) > 1e-6:
        raise ValueError(f"`schedule` must be 1 at 0, where the target has its own powers, got {values[-1]}.")
    values[-1] = 1.0
    return values


def _check_falls(levels: Any, totals: np.ndarray, tail_scale: float) -> None:
    """Raise if sigma^2 / alpha^2 falls by too much of itself for the sum of the powers at some step, `[K]`.

    Where the data themselves have Gaussian tails, their variance counts with the noise's.
    """
    squared = np.exp(2 * levels.log_ratio)
    fall = (squared[:-1] - squared[1:]) / (squared[:-1] + tail_scale**2)
    bad = (totals > 1) & (fall * (totals - 1) >= 1)
    if np.any(bad):
        worst = int(np.argmax(np.where(bad, fall * (totals - 1), -np.inf)))
        raise ValueError(
            f"step {worst} is too coarse for FeynmanKac: sigma^2/alpha^2 falls by {fall[worst]:.3g} of itself, and "
            f"powers that sum to {totals[worst]:g} allow less than {1 / (totals[worst] - 1):.3g}. Take more steps."
        )
