"""How far an estimate of log Z can be off, where one exact sample of the target is known.

    (1)  E[log Z_hat] <= log Z                      for SMC,                    as E[Z_hat] = Z,
    (2)  E[log Z_hat(x)] >= log Z                   for conditional SMC on x,   x ~ target, as E[1 / Z_hat(x)] = 1 / Z.

The mean of (2) less that of (1) bounds the symmetrised Kullback-Leibler divergence between SMC's law of a weighted path
and the target's.

Source: Grosse, Ghahramani and Adams (2015), "Sandwiching the marginal likelihood using bidirectional Monte Carlo"; for
text, Zhao, Brekelmans, Makhzani and Grosse (2024), "Probabilistic inference in language models via twisted sequential
Monte Carlo", section 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ppl.guarantees import require_unbiased
from ppl.inference.smc import SMC

__all__ = ["Sandwich", "sandwich"]


@dataclasses.dataclass(frozen=True)
class Sandwich:
    """Bounds of log Z in expectation, in nats.

    Attributes:
        lower: mean of SMC's log-evidence over runs.
        upper: mean of conditional SMC's.
        lower_error: standard error of `lower`.
        upper_error: standard error of `upper` over runs. With one exact sample it leaves out how the bound varies
            between samples.
    """

    lower: float
    upper: float
    lower_error: float
    upper_error: float

    @property
    def gap(self) -> float:
        """The upper bound less the lower one."""
        return self.upper - self.lower


def sandwich(program: Any, algorithm: SMC, exact: Mapping[str, Any], *, num_runs: int = 10, seed: int = 0) -> Sandwich:
    """Bound log Z from below by SMC and from above by conditional SMC.

    Args:
        program: a program, a process or a target.
        algorithm: an SMC with an unbiased guarantee, on this program too, and a resampler that has a conditional form.
        exact: samples of the program's posterior: values of all sample sites with a leading axis, `[K, ...]`. For a
            process the site is `path`. Run i takes sample i modulo K.
        num_runs: how many runs of each kind, at least 2.
        seed: the seed of all of them.

    Raises:
        ValueError: `algorithm` is not unbiased, or `num_runs` is below 2.
        SiteValueError: `exact` leaves out a site, or has a value of another shape.
    """
    what = "`algorithm` must be an SMC whose guarantee is unbiased"
    if not isinstance(algorithm, SMC):
        raise ValueError(f"{what}, got {algorithm!r}.")
    prepared, fitted = algorithm.prepared(program)
    fitted.conditional_selection()
    require_unbiased(what, prepared.stage(keep_rules=False), fitted)
    if num_runs < 2:
        raise ValueError(f"`num_runs` must be at least 2, for a standard error; got {num_runs}.")
    free, pinned = [], []
    for run, key in enumerate(jax.random.split(jax.random.key(seed), num_runs)):
        free_key, pinned_key = jax.random.split(key)
        path = {name: np.asarray(values)[run % len(values)] for name, values in exact.items()}
        free.append(float(algorithm(program, free_key).log_evidence))
        pinned.append(float(algorithm.conditional_run(program, pinned_key, path).log_evidence))
    lower, upper = np.array(free), np.array(pinned)
    errors = (x.std(ddof=1) / np.sqrt(num_runs) for x in (lower, upper))
    return Sandwich(float(lower.mean()), float(upper.mean()), *(float(e) for e in errors))
