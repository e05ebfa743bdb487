"""The process that turns noise into data, step by step.

    x at level 0 ~ N(alpha m, (sigma^2 + alpha^2 c^2) I)            m, c: the data's mean and scale                (1)
    x' | x ~ N((r sigma'^2 x + alpha' v D(x)) / sigma^2, u I)       see `levels` for r, v and the variance u       (2)

The state holds x and its denoised value, so that twists, moves and correctors need no call of the network of their
own: a run of K steps calls it K times.

`churn` c multiplies the noise of the reverse diffusion. In y = x / alpha, whose noise has the variance
tau^2 = sigma^2 / alpha^2, the marginals are those of

    dy = (1 + c) / 2 (D - y) / tau^2 d(tau^2) + sqrt(c) dW,     tau^2 falling                                      (3)

for every c (Karras et al. 2022, arXiv 2206.00364, eq. 6). A step of (2) is exact in x_0 = D where c = 1. Elsewhere x'
is drawn by its generalisation (Song, Meng and Ermon 2021, arXiv 2010.02502, eq. 12)

    x' | x ~ N(alpha' D + sqrt(sigma'^2 - c u_0) (x - alpha D) / sigma, u I),    u_0 = v sigma'^2 / sigma^2         (4)

with c u_0 at most sigma'^2, and u = c u_0, c v / r^2 or c u_0 + w^2 e by the kind of variance, where w is D's factor
in the mean and e its mean squared error; and at c = 0 by Heun's method on (3), with two calls a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax

from ppl.gaussian import Gaussian, Noising
from ppl.models.diffusion.levels import Level, Levels
from ppl.models.diffusion.reward_gradient import RewardGradient
from ppl.process import Process

if TYPE_CHECKING:
    from ppl.models.diffusion.model import Diffusion
    from ppl.targets import Combination

__all__ = ["Reverse"]


class Reverse(Process):
    """A diffusion model run backwards; see `Diffusion.reverse`. Its value is the array x at the last level."""

    keeps_path = False
    resamples_every_step = True

    def __init__(
        self,
        model: Diffusion,
        levels: Levels,
        variance: str,
        churn: float,
        error: np.ndarray | None = None,
        *,
        own_grid: bool = False,
    ):
        self.model, self.levels, self.variance, self.churn = model, levels, variance, churn
        self.num_steps = levels.num_steps
        self.own_grid = own_grid  # whether the levels are the default for this data, which may give way to a factor's
        self.error = error  # of the denoised value at levels 0 .. K - 1, for the matched variance
        if variance == "matched" and churn > 0 and error is None:
            self.error = model.denoising_error(levels.log_ratio[:-1])
        self._columns = self._make_columns()

    # The process.

    def origin(self) -> Gaussian:
        """Return the law (1) of the noisiest x."""
        model = self.model
        loc = jnp.broadcast_to(self.level(0).alpha * model.mean, model.shape)
        return Gaussian(loc, jnp.asarray([self.start_variance], model.mean.dtype)[0])

    def start(self, drawn) -> dict[str, Any]:
        """Return the noise with its denoised value."""
        return {"x": drawn, "denoised": self.denoise(drawn, jnp.int32(0))}

    def forward(self, state, step) -> dist.Distribution:
        """Return the law (2), or (4), of the next x; a certainty at churn 0."""
        x, denoised = state["x"], state["denoised"]
        if self.churn == 0:
            return dist.Delta(self._heun(x, denoised, step), event_dim=len(self.model.shape))
        table = {name: jnp.asarray(values, self.model.mean.dtype)[step] for name, values in self._columns.items()}
        loc = table["from_x"] * x + table["from_denoised"] * denoised
        return Gaussian(loc, table["variance"], Noising(x, table["rate"], table["noise"]))

    def advance(self, state, drawn, step) -> dict[str, Any]:
        """Return the next x with its denoised value; after the last step x / alpha stands for that."""
        del state
        denoised = lax.cond(
            step + 1 < self.num_steps,
            lambda x: self.denoise(x, step + 1),
            lambda x: x / self.level(step + 1).alpha,
            drawn,
        )
        return {"x": drawn, "denoised": denoised}

    def finish(self, state, path) -> Any:
        """Return x."""
        del path
        return state["x"]

    def running(self, state, path, step) -> dict[str, Any]:
        """Return what twists see: `x`, `denoised`, the time `t`, and the number of steps made, `step`."""
        del path
        return {**state, "t": self.level(step).t, "step": jnp.asarray(step, jnp.int32)}

    def unfolds_like(self) -> dict[str, Any]:
        """Return what must be equal in processes that are multiplied."""
        return {
            "shape": self.model.shape,
            "schedule": self.model.schedule,
            "grid": f"{self.num_steps} steps, the default" if self.own_grid else _Grid(self.levels),
            "variance": self.variance,
            "churn": self.churn,
        }

    def network_calls(self, corrected: bool = False) -> int:
        """Return how often one particle calls the network in a run; a corrector's steps at churn 0 are Euler's."""
        if self.churn > 0 or corrected:
            return self.num_steps
        levels = self.levels
        twice = (levels.alpha[:-2] > 0) & (levels.sigma[1:-1] > 0)  # the last step is Euler's, see `_heun`
        return self.num_steps + int(twice.sum())

    def together(self, target: Combination) -> list[Process]:
        """Return the factors on one grid, and with one variance for all, the mean of theirs.

        Default grids end where the data of the smallest scale want it.

        Raises:
            ValueError: the steps have no density, or the proposal of the target no positive precision.
        """
        processes = self.aligned_with([process for process, _ in target.factors])
        if target.corrector is not None or (len(processes) == 1 and target.factors[0][1] == 1):
            return processes
        if self.churn != 1:
            raise ValueError(
                f"{self!r} has churn {self.churn:g}: its steps have no backward kernel to be weighed by. Take "
                "churn=1, or SMC(corrector=FeynmanKac())."
            )
        models = [process for process in processes if isinstance(process, Reverse)]
        if self.variance == "matched" and len(processes) > 1 and len(models) == len(processes):
            error = np.mean([process.error for process in models], axis=0)
            processes = [Reverse(p.model, p.levels, p.variance, p.churn, error) for p in models]
        if len(models) == len(processes):
            self._check_precision(target.factors, processes)
        return processes

    def aligned_with(self, processes: Sequence[Any]) -> list[Any]:
        """Return processes on one grid: where each has the default one of its data, that of the smallest scale."""
        if len(processes) == 1 or not self.own_grid:
            return list(processes)
        levels = min((process.steps for process in processes), key=lambda levels: levels.log_ratio[-1])
        return [p if p.steps.equal(levels) else p.with_steps(levels) for p in processes]

    @property
    def steps(self) -> Levels:
        """The levels."""
        return self.levels

    def with_steps(self, levels: Levels) -> Reverse:
        """Return the process on other levels."""
        return Reverse(self.model, levels, self.variance, self.churn, own_grid=self.own_grid)

    def toward(self, log_reward: Callable, scale: float = 1.0) -> RewardGradient:
        """Return a proposal that leans along a reward's gradient, for `target.propose`; see `reward_gradient`.

        Args:
            log_reward: a differentiable JAX function of a finished value, in nats.
            scale: multiplies the shift.
        """
        return RewardGradient(self, log_reward, scale)

    # What correctors and moves ask for.

    @property
    def start_variance(self) -> float:
        """The variance in (1)."""
        return float(self.levels.sigma[0] ** 2 + (self.levels.alpha[0] * self.model.scale) ** 2)

    def level(self, step) -> Level:
        """Return the level before step `step`, its last one after all of them."""
        table = self.levels
        columns = (table.times, table.alpha, table.sigma, table.alpha_rate, table.sigma_rate)
        return Level(*(jnp.asarray(column, self.model.mean.dtype)[step] for column in columns))

    def denoise(self, x, step) -> Any:
        """Return the denoised value of x at the level before step `step`."""
        return self.model.denoise_at(x, self.level(step))

    def placed(self, x, step) -> dict[str, Any]:
        """Return the state of another x at the level before step `step`."""
        return {"x": x, "denoised": self.denoise(x, step)}

    def _make_columns(self) -> dict[str, np.ndarray]:
        levels, churn = self.levels, self.churn
        if churn == 0:
            return {}
        alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
        alpha_next, sigma_next = levels.alpha[1:], levels.sigma[1:]
        if churn == 1:
            from_x = levels.rate * (sigma_next / sigma) ** 2
            from_denoised = alpha_next * levels.variance / sigma**2
        else:
            fresh = np.minimum(churn * levels.variance * (sigma_next / sigma) ** 2, sigma_next**2)
            from_x = np.sqrt(sigma_next**2 - fresh) / sigma
            from_denoised = alpha_next - alpha * from_x
        variance = churn * levels.reverse_variance("noising" if self.variance == "noising" else "posterior")
        if self.variance == "matched":
            variance = variance + from_denoised**2 * self.error
        if np.any(variance <= 0):
            raise ValueError(
                f"`variance` {self.variance!r} is 0 at the last step, which ends without noise: take 'matched'."
            )
        return {
            "from_x": from_x,
            "from_denoised": from_denoised,
            "variance": variance,
            "rate": levels.rate,
            "noise": levels.variance,
        }

    def _heun(self, x, denoised, step):
        """Return x' by Heun's method on (3) at c = 0, in tau; by Euler's where it ends without noise."""
        before, after = self.level(step), self.level(step + 1)
        ratio = after.sigma / before.sigma
        euler = after.alpha * denoised + ratio * (x - before.alpha * denoised)

        def corrected(guess):
            noise = (x - before.alpha * denoised) / before.sigma
            noise_next = (guess - after.alpha * self.denoise(guess, step + 1)) / after.sigma
            mean = (noise + noise_next) / 2  # y' = y + (tau' - tau) mean
            scale = after.alpha / jnp.where(before.alpha > 0, before.alpha, 1.0)
            return scale * (x - before.sigma * mean) + after.sigma * mean

        use = (before.alpha > 0) & (after.sigma > 0) & (step + 1 < self.num_steps)
        return lax.cond(use, corrected, lambda guess: guess, euler)

    def _check_precision(self, factors, processes) -> None:
        powers = np.array([power for _, power in factors])
        variance = np.stack([process._columns["variance"] for process in processes])
        levels = processes[0].levels
        steps = powers @ (1 / variance) + (1 - powers.sum()) * levels.rate**2 / levels.variance
        start = powers @ np.array([1 / process.start_variance for process in processes])
        bad = [f"step {k}" for k in np.flatnonzero(~(steps > 0))[:1]] or (["the start"] if not start > 0 else [])
        if bad:
            named = ", ".join(f"{process!r} ** {power:g}" for process, power in factors if power < 0) or repr(factors)
            raise ValueError(f"the target has no positive precision at {bad[0]}: the power of {named} is too negative.")

    def __repr__(self) -> str:
        churn = "" if self.churn == 1 else f", churn {self.churn:g}"
        return f"<Reverse of {self.model!r}, {self.levels!r}, {self.variance} variance{churn}>"


class _Grid:
    """Levels that compare and print as one thing."""

    def __init__(self, levels: Levels):
        self.levels = levels

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Grid) and self.levels.equal(other.levels)

    def __repr__(self) -> str:
        return repr(self.levels)
