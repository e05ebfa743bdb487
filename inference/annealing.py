"""Entropic annealing: resampling at a temperature, so that a population does not collapse on its early favourites.

At a resampling step with log-weights l_n of N particles, log-sum L and `c_n = l_n - L`, ancestors are drawn at a
temperature T >= 1 instead of from the weights themselves:

    a_n ~ resampler(c / T),   E[offspring of n] = N exp(c_n / T) / S,   S = sum_n exp(c_n / T).               (1)

**Exact** (`EntropicAnnealing(ess=...)` or `(entropy=...)`). What tempering took from a child's weight is given back:

    l'_n = (1 - 1/T) c_(a_n),   log Z += L + log S - log N,                                                  (2)

so that `E[sum over children of exp(l')] * S/N exp(L) = exp(l)` for each particle: the measure is preserved and log
Z_hat unbiased on the Z scale, whatever rule chose T from the present particles. The rule: the smallest T at which the
weights (1) reach the asked fraction of the maximal ESS or entropy (`ppl.kernels.annealing.temperature`).

**Published** (`EntropicAnnealing(mode=...)`): the entropic particle filter. With the ESS fraction rho = ESS / N, the
normalised entropy h = H / log N, and s = t / (number of steps) after t steps,

    "ess"       T = max(1, (1 - s) / rho)
    "entropy"   T = max(1, 1 / (h + (1 - h) s))                                                              (3)
    "base"      T = max(1, 2 - s)

where rho < ess_threshold and s < early_phase; elsewhere T = 1. Children start at weight 1: nothing is given back, so
the population follows no stated distribution and has no evidence; `guarantee` is "heuristic".

Source: (1) and (2) are importance sampling of the ancestors; (3) Entropic particle filtering, arXiv 2510.05825, in the
form of its authors' released code. There h of two particles is not divided by log 2; here it is.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ppl.kernels import annealing
from ppl.kernels.weights import summarize
from ppl.selection import Weighing

__all__ = ["EntropicAnnealing", "temper"]

_MODES = ("ess", "entropy", "base")
_DEFAULT_ESS = 0.5


@dataclasses.dataclass(frozen=True)
class EntropicAnnealing:
    """At which temperature `SMC` resamples: `SMC(num_particles, annealing=EntropicAnnealing(ess=0.5))`.

    Attributes:
        ess: exact form: the fraction, in (0, 1], of the living particles' number that the ESS of the resampling weights
            reaches. 0.5 if nothing is given.
        entropy: exact form: the fraction of the maximal entropy that they reach.
        mode: published form: "ess", "entropy" or "base". Excludes the two above.
        ess_threshold: published form: it anneals only where the ESS is below this fraction of the particles.
        early_phase: published form: it anneals only in this first fraction of the loop's steps.
    """

    ess: float | None = None
    entropy: float | None = None
    mode: str | None = None
    ess_threshold: float = 0.5
    early_phase: float = 0.5

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("ess", "entropy", "mode") if getattr(self, name) is not None}
        if len(given) > 1:
            raise ValueError(f"Give one of `ess`, `entropy` (exact) and `mode` (published), got {given}.")
        if self.mode is not None and self.mode not in _MODES:
            raise ValueError(f"`mode` must be one of {', '.join(map(repr, _MODES))}, got {self.mode!r}.")
        for name in ("ess", "entropy"):
            value = getattr(self, name)
            if value is not None:
                _require_number(name, value)
                if not 0.0 < value <= 1.0:
                    raise ValueError(f"`{name}` is a fraction in (0, 1], got {value}.")
        for name in ("ess_threshold", "early_phase"):
            value = getattr(self, name)
            _require_number(name, value)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"`{name}` is a fraction in [0, 1], got {value}.")

    def __repr__(self) -> str:
        if self.mode is None:
            return (
                f"EntropicAnnealing({f'entropy={self.entropy}' if self.entropy else f'ess={self.ess or _DEFAULT_ESS}'})"
            )
        gate = f"ess_threshold={self.ess_threshold}, early_phase={self.early_phase}"
        return f"EntropicAnnealing(mode={self.mode!r}, {gate})"

    @property
    def guarantee(self) -> str:
        """What runs that resample at this temperature promise."""
        return "unbiased" if self.exact else "heuristic"

    @property
    def exact(self) -> bool:
        """Whether the weights are given back what tempering took, (2)."""
        return self.mode is None

    def temperature(self, log_weights, weighing: Weighing, progress) -> Any:
        """Return the temperature of a resampling step.

        Args:
            log_weights: `[N]`, nats.
            weighing: their summary.
            progress: the share of the loop's iterations that are done, in (0, 1].
        """
        num = float(log_weights.shape[0])
        if self.exact:
            fractions = {"ess": _DEFAULT_ESS} if self.entropy is None else {"entropy": self.entropy}
            if self.ess is not None:
                fractions = {"ess": self.ess}
            return annealing.temperature(log_weights, **fractions)
        share = weighing.ess / num
        entropy = weighing.entropy / jnp.log(jnp.maximum(num, 2.0))
        value = {
            "ess": (1 - progress) / share,
            "entropy": 1 / (entropy + (1 - entropy) * progress),
            "base": 2 - progress,
        }[self.mode]
        anneals = (share < self.ess_threshold) & (progress < self.early_phase) & (num > 1)
        return jnp.where(anneals, jnp.maximum(value, 1.0), 1.0)  # (3)


class Tempered(NamedTuple):
    """Weights for resampling at a temperature.

    Attributes:
        log_weights: `[N]`, those that ancestors are drawn from, (1).
        kept: `[N]`, the log-weights that the children of each particle start with, (2); None in the published form.
        log_mass: what resampling takes out of the weights.
        temperature: T.
    """

    log_weights: Any
    kept: Any
    log_mass: Any
    temperature: Any


def temper(annealing: EntropicAnnealing, log_weights, weighing: Weighing, progress) -> Tempered:
    """Temper log-weights `[N]`, of which one lives, by equations (1) and (2)."""
    temperature = lax.stop_gradient(annealing.temperature(log_weights, weighing, progress))
    temperature = jnp.where(jnp.isnan(temperature), 1.0, temperature)  # of broken weights: the status tells
    centred = jnp.where(jnp.isneginf(log_weights), 0.0, lax.stop_gradient(log_weights - weighing.log_sum))
    cooled = jnp.where(jnp.isneginf(log_weights), -jnp.inf, centred / temperature)
    log_num = jnp.log(float(log_weights.shape[0]))
    if not annealing.exact:
        return Tempered(cooled, None, weighing.log_sum - log_num, temperature)
    log_mass = weighing.log_sum + summarize(cooled).log_sum - log_num
    return Tempered(cooled, centred * (1 - 1 / temperature), log_mass, temperature)


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r} ({type(value).__name__}).")
