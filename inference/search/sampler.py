"""What a search needs of a diffusion target: its run as a function of noise, its reward, and what each step costs.

    y = origin's mean + sd z_0,    x' = step's mean + sd z_(k+1)      z standard normal, one array for each step    (1)

A target is sampled without weights: one process as it is, several as `SMC(corrector="none")` draws them, which for
guidance is the guided sampler. On the way the reward is guessed at the denoised value,

    r(D),    D = sum_i b_i D_i / sum_i b_i                                                                        (2)

and an x at level j is taken back to a noisier level i < j by the noising of the model,

    x_i = a x_j + sqrt(sigma_i^2 - a^2 sigma_j^2) z,    a = alpha_i / alpha_j                                      (3)

A walk is the states that a run has reached, with what it has drawn where the caller wants that kept: `origin`, the
noisiest x, and `path`, the x after each step, those of (3) in the place of the ones that they replace.

Functions of the process are traced once and made flat, so that the arrays they close over, network weights above all,
are inputs of whatever loop they are called in, and never constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ppl import ir
from ppl.gaussian import Gaussian
from ppl.inference.correctors import Uncorrected
from ppl.log_weights import log_weight_of
from ppl.products import product_law
from ppl.targets import Combination

__all__ = ["SITES", "Generation", "Sampler", "Walk", "log_reward", "step_calls", "unweighted"]

SITES = ("origin", "path")


class Walk(NamedTuple):
    """A run under way.

    Attributes:
        states: one for each process.
        drawn: the kept sites so far, by name.
    """

    states: list[Any]
    drawn: dict[str, Any]


class Generation(NamedTuple):
    """A finished value, and the kept sites that led to it."""

    value: Any
    sites: dict[str, Any]


class Sampler:
    """A diffusion target as functions of one particle's noise.

    Attributes:
        target: the target.
        keep: which of the sites `origin` and `path` are kept.
        num_steps: K.
        shape: of the start's noise.
        step_shape: of a step's noise; () where steps draw nothing.
        calls: network calls of one particle at the start and at each step, int `[K + 1]`, see `step_calls`.
    """

    def __init__(self, target: Combination, keep: frozenset[str] = frozenset()):
        """Take a target apart.

        Raises:
            TypeError: its process is no diffusion: its start is not Gaussian, or it has no noise levels.
        """
        self.target, self.keep, process = target, keep, target.process
        base = unweighted(target)
        for factor, _ in target.factors:
            if not _has_levels(factor):
                raise TypeError(f"the search needs processes with noise levels, those of diffusions; got {factor!r}.")
        self.processes = process.together(base)
        self._signs = [power for _, power in target.factors]
        self._powers = jnp.asarray(self._signs, jnp.float32)
        origin = self._origin()
        if not isinstance(origin, Gaussian):
            raise TypeError(f"the search needs a process that starts with Gaussian noise, got {process!r}.")
        self.shape, self.dtype = origin.event_shape, origin.loc.dtype
        self.num_steps = self.processes[0].num_steps
        self.draws_steps = process.churn != 0
        self.step_shape = self.shape if self.draws_steps else ()
        self.calls = step_calls(target)
        self._started = Hoisted(self._start)
        self._stepped = Hoisted(self._step)
        self.reward = Hoisted(log_reward(target))
        self._placed = Hoisted(lambda x, step: [p.placed(x, step) for p in self.processes])

    # Noise.

    def start_noise(self, key, num: int) -> Any:
        """Draw the starts' noise, `[num, *shape]`."""
        return jax.random.normal(key, (num, *self.shape), self.dtype)

    def step_noise(self, key, num: int) -> Any:
        """Draw noise of `num` steps, or of one step of `num` particles, `[num, *step_shape]`."""
        return jax.random.normal(key, (num, *self.step_shape), self.dtype)

    # Runs.

    def start(self, noise) -> Walk:
        """Begin a run at a start's noise, `shape`."""
        states = self._started(noise)
        x, drawn = states[0]["x"], {}
        if "origin" in self.keep:
            drawn["origin"] = x
        if "path" in self.keep:
            drawn["path"] = jnp.zeros((self.num_steps, *x.shape), x.dtype)
        return Walk(states, drawn)

    def step(self, walk: Walk, z, k) -> Walk:
        """Make step k with noise `step_shape`."""
        states = self._stepped(walk.states, z, k)
        drawn = dict(walk.drawn)
        if "path" in drawn:
            drawn["path"] = drawn["path"].at[k].set(states[0]["x"])
        return Walk(states, drawn)

    def run(self, noise, step_noise, *, rematerialise: bool = False) -> Generation:
        """Return what one particle generates.

        Args:
            noise: the start's, `shape`.
            step_noise: `[K, *step_shape]`.
            rematerialise: keep only the steps' states for a gradient, and make each step again on the way back.
        """
        step = jax.checkpoint(self._stepped, prevent_cse=False) if rematerialise else self._stepped

        def body(states, inputs):
            z, k = inputs
            states = step(states, z, k)
            return states, states[0]["x"] if "path" in self.keep else None

        ks = jnp.arange(self.num_steps, dtype=jnp.int32)
        start = self.start(noise)
        states, path = jax.lax.scan(body, start.states, (step_noise, ks))
        return self.generation(Walk(states, start.drawn | ({} if path is None else {"path": path})))

    def advance(self, walks: Walk, first, count: int, key) -> Walk:
        """Make `count` steps from step `first` on with fresh noise; walks have a leading particle axis."""

        def body(walks, inputs):
            k, key = inputs
            z = self.step_noise(key, jax.tree.leaves(walks)[0].shape[0])
            return jax.vmap(self.step, (0, 0, None))(walks, z, first + k), None

        ks = jnp.arange(count, dtype=jnp.int32)
        return jax.lax.scan(body, walks, (ks, jax.random.split(key, count)))[0]

    def generation(self, walk: Walk) -> Generation:
        """Return the finished value of a walk after the last step, with its sites."""
        return Generation(self.processes[0].finish(walk.states[0], None), walk.drawn)

    def guess(self, walk: Walk) -> Any:
        """Return the reward at the denoised value, (2)."""
        states = walk.states
        total = sum(power * state["denoised"] for power, state in zip(self._powers, states, strict=True))
        return self.reward(states[0]["denoised"] if len(states) == 1 else total / jnp.sum(self._powers))

    def renoise(self, walk: Walk, z, level, noisier) -> Walk:
        """Return a walk whose x was taken from one level back to another by (3)."""
        x, here, there = walk.states[0]["x"], self.processes[0].level(level), self.processes[0].level(noisier)
        rate = there.alpha / here.alpha
        variance = jnp.maximum(there.sigma**2 - (rate * here.sigma) ** 2, 0.0)
        x, drawn = rate * x + jnp.sqrt(variance) * z, dict(walk.drawn)
        if "origin" in drawn:
            drawn["origin"] = jnp.where(noisier == 0, x, drawn["origin"])
        if "path" in drawn:
            before = jnp.where(noisier == 0, self.num_steps, noisier - 1)  # out of range: nothing is written
            drawn["path"] = drawn["path"].at[before].set(x, mode="drop")
        return Walk(self._placed(x, noisier), drawn)

    # What these are made of.

    def _origin(self):
        laws = [process.origin() for process in self.processes]
        return None if laws[0] is None else product_law(laws, self._powers, self._signs)[0]

    def _start(self, z):
        drawn = _placed_in(self._origin(), z)
        return [process.start(drawn) for process in self.processes]

    def _step(self, states, z, k):
        if len(states) == 1 and self._signs[0] == 1:
            law = self.processes[0].forward(states[0], k)
        else:
            law, _ = Uncorrected()(self.processes, states, self._powers, self._signs, k, None)
        drawn = _placed_in(law, z)
        return [process.advance(state, drawn, k) for process, state in zip(self.processes, states, strict=True)]


class Hoisted:
    """A function traced once, flat, its closed-over arrays at hand as arrays; see `ppl.ir.flatten`."""

    def __init__(self, function: Callable):
        self.function, self._traced = function, {}

    def __call__(self, *args) -> Any:
        """Evaluate the function, under whatever transformation this stands in."""
        leaves, tree = jax.tree.flatten(args)
        types = tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)
        if (tree, types) not in self._traced:
            closed, out = jax.make_jaxpr(self.function, return_shape=True)(*jax.tree.unflatten(tree, types))
            block, constants = ir.flatten(closed.jaxpr, closed.consts)
            self._traced[tree, types] = block, constants, jax.tree.structure(out)
        block, constants, out_tree = self._traced[tree, types]
        return jax.tree.unflatten(out_tree, block.evaluate(*constants, *leaves))


def unweighted(target: Combination) -> Combination:
    """Return the target that samples as this one proposes, rewards left out; see `SMC(corrector="none")`."""
    base = Combination(
        target.factors, constraint=target.constraint, require_end=target.require_end, proposal=target.proposal,
        steps=target.steps,
    )  # fmt: skip
    alone = len(target.factors) == 1 and target.factors[0][1] == 1
    return base if alone else Uncorrected().apply(base)


def log_reward(target: Combination) -> Callable[[Any], Any]:
    """Return the target's log-reward as a function of one finished value; -inf stays -inf whatever its power."""
    powers = jnp.asarray([tilt.power for tilt in target.tilts], jnp.float32)
    read = target.process.texts if target.process.writes_text else None

    def reward(value):
        total = jnp.float32(0.0)
        for tilt, power in zip(target.tilts, powers, strict=True):
            nats = log_weight_of("reward", tilt.log_reward, read, value)
            total = total + jnp.where(nats == -jnp.inf, -jnp.inf, power * nats)
        return total

    return reward


def step_calls(target: Combination) -> np.ndarray:
    """Return the network calls of one particle at the start and at each step, int `[K + 1]`.

    A process that is no diffusion and does not say how often it calls its network counts one call a step.
    """
    process, num_factors = target.process, len(target.factors)
    calls = np.zeros(process.num_steps + 1, np.int64)
    if not all(_has_levels(factor) for factor, _ in target.factors):
        total = target.network_calls()
        if total is None:
            total = sum(factor.num_steps for factor, _ in target.factors)
        calls[0] = total
        return calls
    calls[:-1] = num_factors
    calls[0] += getattr(target.proposal, "network_calls", 0)
    if process.churn == 0 and num_factors == 1 and target.factors[0][1] == 1:  # Heun's method looks ahead
        with jax.ensure_compile_time_eval():
            first = int(process.level(0).alpha > 0)
        calls[1:-1] += 1
        calls[1:-1][: 1 - first] -= 1
    return calls


def _has_levels(process: Any) -> bool:
    return all(hasattr(process, name) for name in ("churn", "level", "placed"))


def _placed_in(law: dist.Distribution, z) -> Any:
    """Return (1): the draw of a law that standard noise stands for."""
    if isinstance(law, Gaussian):
        return law.loc + jnp.sqrt(law.squared_scale) * z
    if isinstance(law, dist.Delta):
        return law.v
    raise TypeError(f"the search needs Gaussian steps, got one drawn from {type(law).__name__}.")
