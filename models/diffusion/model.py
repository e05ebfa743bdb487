"""Diffusion models: a denoiser and its noise schedule.

A model knows the denoised value D(x, t) = E[x_0 | x_t = x] and what the data are like from afar, a mean and a scale;
the score of the noisy data is

    grad log q_t(x) = (alpha D(x, t) - x) / sigma^2                                                                (1)

(Tweedie's formula, Efron 2011). `reverse` gives the process that generates.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl.models.diffusion import pilot
from ppl.models.diffusion.interpolant import converted
from ppl.models.diffusion.levels import VARIANCES, Level, make_levels
from ppl.models.diffusion.predictions import check_prediction, from_denoised, to_denoised
from ppl.models.diffusion.reverse import Reverse
from ppl.models.diffusion.schedules import Schedule

__all__ = ["Diffusion"]


class Diffusion:
    """A denoiser of arrays of one shape.

    Attributes:
        denoiser: `denoiser(x, t, **conditions)` of one array x and a scalar t, without a batch axis: any callable, a
            flax nnx module as well.
        shape: of x.
        schedule: what `alpha` and `sigma` are at a time t in [0, 1], 1 = noise.
        predicts: what it returns: "epsilon", "x0", "v", "velocity" or "score"; see `predictions`.
        conditioning: what it is given for t: "t" itself; "sigma", the noise's standard deviation; "step", the
            step of a schedule that was tabulated.
        mean: of the data, a number or an array of the shape.
        scale: the data's standard deviation over all dimensions.
        error: the denoised value's mean squared error a dimension, which the "matched" variance needs: a pair of
            log(sigma / alpha), rising, and errors there. None: measured by one pilot run when it is needed.
        conditions: what the denoiser is given by name.
        log_density: `log_density(x, t, **conditions)`, log q_t(x) up to a constant of the level, for models that know
            it, such as energies; t as the denoiser is given it. With the denoiser None, its gradient is the score.
    """

    def __init__(
        self,
        denoiser: Callable | None,
        shape: Sequence[int],
        schedule: Schedule,
        predicts: str = "epsilon",
        *,
        conditioning: str = "t",
        mean: Any = 0.0,
        scale: float = 1.0,
        error: tuple[Any, Any] | None = None,
        conditions: Mapping[str, Any] | None = None,
        log_density: Callable | None = None,
    ):
        if log_density is not None and not callable(log_density):
            raise TypeError(f"`log_density` must be a function of (x, t), got {type(log_density).__name__}.")
        if denoiser is None and log_density is not None:
            denoiser, predicts = _Gradient(log_density), "score"
        if not callable(denoiser):
            raise TypeError(f"`denoiser` must be a function of (x, t), got {type(denoiser).__name__}.")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"`schedule` must be a Schedule such as VariancePreserving(), got {schedule!r}.")
        if conditioning not in ("t", "sigma", "step"):
            raise ValueError(f"`conditioning` must be 't', 'sigma' or 'step', got {conditioning!r}.")
        if conditioning == "step" and not hasattr(schedule, "step"):
            raise ValueError(f"`conditioning` 'step' needs a schedule with steps, got {schedule!r}.")
        if not isinstance(scale, numbers.Real) or not 0 < scale < math.inf:
            raise ValueError(f"`scale` must be a positive number, got {scale!r}.")
        self.denoiser = denoiser
        self.shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        self.schedule = schedule
        self.predicts = check_prediction(predicts)
        self.conditioning = conditioning
        self.mean = jnp.asarray(mean, jnp.result_type(float))
        self.scale = float(scale)
        self.error = error
        self.conditions = dict(conditions or {})
        self._numbers = _as_arrays(self.conditions)
        self._log_density = log_density
        if self.mean.shape not in ((), self.shape):
            raise ValueError(f"`mean` must be a number or have the shape {self.shape}, got shape {self.mean.shape}.")
        if error is not None:
            self._error_table = _checked_error(error)

    def given(self, **conditions: Any) -> Diffusion:
        """Return the model under conditions, which its denoiser is given by name: `model.given(label=3)`."""
        return self._copy(conditions=self.conditions | conditions)

    def on(self, schedule: Schedule) -> Diffusion:
        """Return the model run on another schedule's path: a flow model on a variance-preserving one, for instance.

        Levels of one noise-to-data ratio hold the same data but for a factor of x; see `interpolant`.
        """
        denoise = converted(self.denoise, self.schedule, schedule)
        return Diffusion(denoise, self.shape, schedule, "x0", mean=self.mean, scale=self.scale, error=self.error)

    def denoise(self, x, t) -> Any:
        """Return the denoised value D(x, t) of one array x."""
        return self.denoise_at(x, self.level(t))

    def score(self, x, t) -> Any:
        """Return grad log q_t(x), (1)."""
        level = self.level(t)
        return from_denoised("score", self.denoise_at(x, level), x, level.alpha, level.sigma)

    def level(self, t) -> Level:
        """Return what the schedule says of a time."""
        t = jnp.asarray(t, self.mean.dtype)
        s = self.schedule
        return Level(t, s.alpha(t), s.sigma(t), s.alpha_rate(t), s.sigma_rate(t))

    def denoise_at(self, x, level: Level) -> Any:
        """Return the denoised value at a level."""
        output = self.denoiser(x, self._seen(level), **self._seen_conditions())
        return to_denoised(self.predicts, output, x, *level[1:], self.mean)

    @property
    def knows_density(self) -> bool:
        """Whether `log_density` is known."""
        return self._log_density is not None or type(self).log_density_at is not Diffusion.log_density_at

    def log_density(self, x, t) -> Any:
        """Return log q_t(x) up to a constant of the level, a scalar."""
        return self.log_density_at(x, self.level(t))

    def log_density_at(self, x, level: Level) -> Any:
        """Return log q_t(x) at a level, up to a constant.

        Raises:
            TypeError: the model does not know it.
        """
        if self._log_density is None:
            raise TypeError(f"{self!r} does not know its log-density: give Diffusion(..., log_density=...).")
        return self._log_density(x, self._seen(level), **self._seen_conditions())

    def check_denoiser(self) -> None:
        """Raise a `ValueError` if the denoiser does not return what it should, without running it."""
        x = jax.ShapeDtypeStruct(self.shape, self.mean.dtype)
        t = jax.ShapeDtypeStruct((), self.mean.dtype)
        output = jax.eval_shape(lambda x, t: self.denoiser(x, t, **self._seen_conditions()), x, t)
        shape = getattr(output, "shape", None)
        if shape != self.shape:
            raise ValueError(
                f"`denoiser` must return an array of shape {self.shape} for one x of that shape, "
                f"got {type(output).__name__ if shape is None else f'shape {shape}'}."
            )

    def reverse(self, num_steps: int = 100, variance: str = "matched", grid: Any = None, churn: float = 1.0) -> Reverse:
        """Return the process that turns noise into data.

        Args:
            num_steps: how many steps, at least 1.
            variance: of the reverse kernels: "matched", "posterior" or "noising"; see `levels`.
            grid: the levels: None, uniform in log(sigma / alpha) to 0.01 of the data's scale; "time", uniform in t; or
                `num_steps + 1` falling times in [0, 1].
            churn: how much of the noise of the reverse diffusion is drawn: its variance is multiplied by this. 1 is the
                diffusion, 0 the probability-flow differential equation, solved by Heun's method.
        """
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"`num_steps` must be an int of at least 1, got {num_steps!r}.")
        if variance not in VARIANCES:
            raise ValueError(f"`variance` must be one of {', '.join(map(repr, VARIANCES))}, got {variance!r}.")
        if not isinstance(churn, numbers.Real) or not 0 <= churn < math.inf:
            raise ValueError(f"`churn` must be a number of at least 0, got {churn!r}.")
        self.check_denoiser()
        levels = make_levels(self.schedule, num_steps, grid, self.scale)
        return Reverse(self, levels, variance, float(churn), own_grid=grid is None)

    def denoising_error(self, log_ratio: np.ndarray) -> np.ndarray:
        """Return the denoised value's mean squared error a dimension at values of log(sigma / alpha), float64."""
        ratios, errors = self._error_table
        found = np.exp(np.interp(log_ratio, ratios, np.log(np.maximum(errors, 1e-30))))
        with np.errstate(over="ignore"):
            return np.minimum(found, np.exp(2 * np.asarray(log_ratio)))  # x / alpha itself has no larger error

    @functools.cached_property
    def _error_table(self) -> tuple[np.ndarray, np.ndarray]:
        return _checked_error(self.measured_error())

    def measured_error(self) -> tuple[np.ndarray, np.ndarray]:
        """Return log(sigma / alpha), rising, and the mean squared error there, on data from a pilot run."""
        return pilot.error_table(self, pilot.run(self))

    def _seen(self, level: Level) -> Any:
        """Return what the denoiser is given for the time."""
        if self.conditioning == "t":
            return level.t
        if self.conditioning == "sigma":
            return level.sigma
        return self.schedule.step(level.t)

    def _seen_conditions(self) -> dict[str, Any]:
        return self.conditions | {name: array[0] for name, array in self._numbers.items()}

    def _copy(self, **changes: Any) -> Diffusion:
        """Return the model with other attributes, nothing measured."""
        new = object.__new__(type(self))
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k != "_error_table"} | changes)
        new._numbers = _as_arrays(new.conditions)
        if new.error is not None:
            new._error_table = _checked_error(new.error)
        return new

    def __repr__(self) -> str:
        given = "".join(f", {name}={value}" for name, value in self.conditions.items())
        return f"<{type(self).__name__} of {self.shape}{given}>"


@dataclasses.dataclass(frozen=True, eq=False)
class _Gradient:
    """The gradient of a log-density in x."""

    log_density: Callable

    def __call__(self, x, t, **conditions):
        return jax.grad(self.log_density)(x, t, **conditions)


def _as_arrays(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers among conditions as arrays `[1]`, which are no part of a program: others compile nothing."""
    numeric = {n: c for n, c in conditions.items() if isinstance(c, numbers.Number) and not isinstance(c, bool)}
    return {name: jnp.asarray([value]) for name, value in numeric.items()}


def _checked_error(table: tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    ratios, errors = (np.asarray(part, np.float64) for part in table)
    good = ratios.ndim == 1 and ratios.shape == errors.shape and ratios.size and np.all(np.diff(ratios) > 0)
    if not (good and np.all(errors >= 0) and np.all(np.isfinite(errors))):
        raise ValueError(
            "`error` must be a pair of log(sigma / alpha), rising, and finite mean squared errors of the same length; "
            f"got shapes {ratios.shape} and {errors.shape}."
        )
    return ratios, errors
