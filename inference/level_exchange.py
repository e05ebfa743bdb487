"""Replica exchange over noise levels: a chain that holds one replica at every level of a diffusion target.

A target has K + 1 levels, steps x -> x' from level k to k + 1 with the locally optimal proposal F and the noising
kernel k(x|x'), and the weight w(x, x') of a step (`ppl.targets`, equation 2). Replica x_k stands at level k. A sweep

    redraws x_0 from the start's law
    for even k, then for odd k, all at once:
        x'_(k+1) ~ F(.|x_k),   x'_k ~ k(.|x_(k+1))
        takes both where u < exp(w(x_k, x'_(k+1)) - w(x'_k, x_(k+1)))                                              (1)

The replicas are independent under prod_k pi_k(x_k), with pi_0 the start's law. Writing out the Metropolis-Hastings
ratio, (1) leaves it as it is, at any number of steps, with the weight

    w(x, x') = log pi_(k+1)(x') + log k(x|x') - log pi_k(x) - log F(x'|x)                                          (2)

which is taken where the levels' log-densities are known: pi_k = prod_i q_(i,k)^(b_i), times exp psi_k. Elsewhere the
ratio of kernels stands for the ratio of densities (Radon-Nikodym estimator), which it equals where the steps invert the
noising: then the chain is "discretised", as the weights of continuous time are.

`paths=True` is exact for every model. Replica k holds a path x_0 .. x_k, with the target's measure on paths up to level
k,

    Pi_k(x_0 .. x_k) = start(x_0) prod_(j<k) G_j(x_j, x_(j+1)),   log G_j(x, x') = w(x, x') + log F(x'|x),          (3)

and prod_k Pi_k is left as it is by exchanges in which the upper path grows by x'_(k+1) ~ F and the lower one, y, loses
its end: u < exp(w(x_k, x'_(k+1)) - w(y_k, y_(k+1))). The last path's end has then the law that `SMC` with the kernel
ratio weighs for. It takes memory for (K + 1)^2 states and half of the network's calls.

psi is the twist on the way and the reward at the last level. Where powers sum to more than 1, few steps give the
measure (3) heavy tails, which neither chains nor `SMC` find: take more.

Source: CREPE (arXiv 2509.23265) for (1) with the ratio of kernels; Syed et al. (2022, JRSS B 84) for even and odd
exchanges.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax

from ppl.gaussian import Gaussian
from ppl.guarantees import Promising, promised
from ppl.host import Host
from ppl.inference.hamiltonian import HMC
from ppl.inference.langevin import MALA, Langevin
from ppl.inference.level_moves import Levelled, LevelMoves, knows_density, level_log_density
from ppl.products import product_law

__all__ = ["Ladder", "LevelExchange"]


@dataclasses.dataclass(frozen=True)
class LevelExchange(Promising):
    """Exchanges of replicas between neighbouring noise levels.

    Attributes:
        paths: whether replicas are paths (3): exact for every model.
        exploration: `Langevin(...)`, `MALA(...)` or `HMC(...)`, which moves the replicas of the levels between the
            first and the last one after each sweep; None for none.
    """

    paths: bool = False
    exploration: Langevin | MALA | HMC | None = None
    guarantee: ClassVar[str] = "invariant"

    def __post_init__(self):
        if not isinstance(self.paths, bool):
            raise TypeError(f"`paths` must be True or False, got {self.paths!r}.")
        if self.exploration is not None and not isinstance(self.exploration, Langevin | MALA | HMC):
            raise TypeError(f"`exploration` must be Langevin(), MALA(...) or HMC(...), got {self.exploration!r}.")
        if self.paths and self.exploration is not None:
            raise ValueError("`exploration` moves a level's density, which paths do not have: take paths=False.")

    def guarantee_on(self, ladder: Ladder) -> str:
        """Return what the chain promises for a target: "discretised" where (1) is only nearly exact."""
        own = "invariant" if self.paths or ladder.knows_densities else "discretised"
        return promised(own, self, self.exploration, ladder.target, chain=True)

    def check(self, ladder: Ladder) -> None:
        """Raise if the replicas of a target cannot be explored."""
        if self.exploration is None:
            return
        if self.exploration.needs_density and not ladder.knows_densities:
            raise TypeError(
                f"`exploration` {self.exploration!r} needs the log-density of every level, which not all of "
                f"{ladder.processes!r} know: take Langevin()."
            )
        if ladder.twists:
            raise ValueError("`exploration` does not see the twist that the target has on its way: leave one of them.")

    def start_randomness(self, ladder: Ladder) -> dict[str, dist.Distribution]:
        """Return the distributions of what the first replicas need, by name."""
        return {"start": ladder.normal(), "down": ladder.normal(ladder.num_steps)}

    def randomness(self, ladder: Ladder) -> dict[str, dist.Distribution]:
        """Return the distributions of what a sweep needs, by name."""
        laws = {
            "start": ladder.normal(),
            "down": ladder.normal(ladder.num_steps),
            "up": ladder.normal(ladder.num_steps),
            "uniform": dist.Uniform(jnp.zeros(ladder.num_steps, ladder.dtype), 1.0).to_event(1),
        }
        if self.paths:
            del laws["up"]
        if self.exploration is not None and ladder.num_steps > 1:
            shape = (ladder.num_steps - 1, *ladder.shape)
            explored = self.exploration.randomness(shape, ladder.dtype)
            if "uniform" in explored:
                count = self.exploration.num_steps
                zeros = jnp.zeros((count, ladder.num_steps - 1), ladder.dtype)
                explored["uniform"] = dist.Uniform(zeros, 1.0).to_event(2)
            laws |= {f"explore_{name}": law for name, law in explored.items()}
        return laws

    def start(self, ladder: Ladder, random: dict[str, Any]) -> list[Any]:
        """Return replicas on one path drawn by F: for each process its states at levels 0 .. K, leading axis.

        With `paths` each replica is that whole path: leading axes [replica, level].
        """

        def step(states, inputs):
            states = ladder.down(*inputs, states)
            return states, states

        first = ladder.first(random["start"])
        _, rest = lax.scan(step, first, (jnp.arange(ladder.num_steps), random["down"]))
        states = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)
        if not self.paths:
            return states
        count = ladder.num_steps + 1
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), states)

    def step(self, ladder: Ladder, replicas: list[Any], random: dict[str, Any]) -> tuple[list[Any], Any]:
        """Return the replicas after a sweep, and which exchanges were taken, `[K]` 0 or 1; NaN for broken weights."""
        first = ladder.first(random["start"])
        top = (0, 0) if self.paths else (0,)
        replicas = jax.tree.map(lambda a, new: a.at[top].set(new), replicas, first)
        taken = jnp.zeros(ladder.num_steps, ladder.dtype)
        for parity in (0, 1):
            pairs = np.arange(parity, ladder.num_steps, 2)
            if not len(pairs):
                continue
            upper, lower = (jax.tree.map(lambda a, at=at: a[at], replicas) for at in (pairs, pairs + 1))
            ups = random["down" if self.paths else "up"][pairs]  # paths do not go up by noise
            exchange = jax.vmap(lambda *args: self._exchange(ladder, *args))
            new_upper, new_lower, exchanged = exchange(
                jnp.asarray(pairs), upper, lower, random["down"][pairs], ups, random["uniform"][pairs]
            )
            replicas = jax.tree.map(lambda a, up, low: a.at[pairs].set(up).at[pairs + 1].set(low),  # noqa: B023
                                    replicas, new_upper, new_lower)  # fmt: skip
            taken = taken.at[pairs].set(exchanged)
        if self.exploration is not None and ladder.num_steps > 1:
            replicas = self._explored(ladder, replicas, random)
        return replicas, taken

    def value(self, ladder: Ladder, replicas: list[Any]) -> Any:
        """Return the value of the last level's replica."""
        last = (-1, -1) if self.paths else (-1,)
        return ladder.process.finish(jax.tree.map(lambda a: a[last], replicas[0]), None)

    def network_calls(self, ladder: Ladder, num_sweeps: int) -> int:
        """Return how often a chain calls networks."""
        each = 1 + ladder.num_steps * (1 if self.paths else 2)
        if self.exploration is not None:
            per_move = LevelMoves(self.exploration).network_calls(ladder.processes) // len(ladder.processes)
            each += per_move
        return (ladder.num_steps + num_sweeps * each) * len(ladder.processes)

    def _exchange(self, ladder: Ladder, k, upper, lower, noise_down, noise_up, uniform):
        """Return the pair of replicas at levels k and k + 1 after (1), and whether they were exchanged; see `step`."""
        if self.paths:
            at = lambda path, level: jax.tree.map(lambda a: a[level], path)  # noqa: E731
            high, low, back = at(upper, k), at(lower, k + 1), at(lower, k)
        else:
            high, low = upper, lower
            back = ladder.up(k, noise_up, low)
        down = ladder.down(k, noise_down, high)
        use_densities = not self.paths
        forth = ladder.log_weight(k, high, down, use_densities)
        returned = ladder.log_weight(k, back, low, use_densities)
        accepted = jnp.log(uniform) < forth - returned
        invalid = jnp.isnan(forth) | jnp.isposinf(forth) | jnp.isnan(returned)
        if self.paths:
            new_upper, new_lower = lower, jax.tree.map(lambda a, new: a.at[k + 1].set(new), upper, down)
        else:
            new_upper, new_lower = back, down
        pick = lambda new, old: jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)  # noqa: E731
        taken = jnp.where(invalid, jnp.nan, accepted.astype(ladder.dtype))
        return pick(new_upper, upper), pick(new_lower, lower), taken

    def _explored(self, ladder: Ladder, replicas, random):
        """Return replicas moved at the levels between the first and the last."""
        moves = LevelMoves(self.exploration)
        inner = np.arange(1, ladder.num_steps)
        drawn = {name.removeprefix("explore_"): a for name, a in random.items() if name.startswith("explore_")}
        drawn = {name: jnp.moveaxis(a, 1, 0) for name, a in drawn.items()}  # levels first, then the move's steps
        move = jax.vmap(lambda k, states, drawn: moves.move(ladder.processes, states, ladder.powers, k, drawn)[0])
        moved = move(jnp.asarray(inner), jax.tree.map(lambda a: a[inner], replicas), drawn)
        return jax.tree.map(lambda a, new: a.at[inner].set(new), replicas, moved)


class Ladder:
    """The levels of a target, and what an exchange needs to know between two of them."""

    def __init__(self, target: Any):
        _check(target)
        self.target = target
        self.processes = target.process.together(target)
        self.process = self.processes[0]
        self.num_steps: int = self.process.num_steps
        self.signs = [power for _, power in target.factors]
        self.powers = jnp.asarray(self.signs, jnp.float32)
        self.shape, self.dtype = self.process.model.shape, self.process.model.mean.dtype
        self.knows_densities = all(map(knows_density, self.processes)) and self.process.levels.sigma[-1] > 0
        self.rewards = [(tilt.log_reward, tilt.power) for tilt in target.tilts]
        self.twists = [(tilt.twist, tilt.power) for tilt in target.tilts if tilt.twist is not None]

    def normal(self, *batch: int) -> Gaussian:
        """Return the law of standard noise, `[*batch, *shape]`."""
        return Gaussian(jnp.zeros((*batch, *self.shape), self.dtype), 1.0)

    def first(self, noise) -> list[Any]:
        """Return the states of a start."""
        x = _placed_noise(self._origin(), noise)
        return [process.start(x) for process in self.processes]

    def down(self, k, noise, states: list[Any]) -> list[Any]:
        """Return the states at level k + 1 of a draw from F."""
        law, _ = product_law(self._laws(k, states), self.powers, self.signs)
        x = _placed_noise(law, noise)
        return [process.advance(state, x, k) for process, state in zip(self.processes, states, strict=True)]

    def up(self, k, noise, states: list[Any]) -> list[Any]:
        """Return the states at level k of a draw from the noising kernel."""
        levels = self.process.levels
        rate, variance = (jnp.asarray(column, self.dtype)[k] for column in (levels.rate, levels.variance))
        x = rate * states[0]["x"] + jnp.sqrt(variance) * noise
        return [process.placed(x, k) for process in self.processes]

    def log_weight(self, k, high: list[Any], low: list[Any], use_densities: bool) -> Any:
        """Return w of a step from level k to k + 1: (2), or the ratio of kernels."""
        x, x_next = high[0]["x"], low[0]["x"]
        laws = self._laws(k, high)
        law, ratio = product_law(laws, self.powers, self.signs)
        change = self._psi(k + 1, low) - self._psi(k, high)
        if use_densities and self.knows_densities:
            _, rate, variance = laws[0].noising
            above = jnp.where(k == 0, self._origin().log_prob(x), self._log_density(x, k))
            below = self._log_density(x_next, k + 1)
            return change + below - above + Gaussian(rate * x_next, variance).log_prob(x) - law.log_prob(x_next)
        return change if ratio is None else change + ratio(x_next)

    def _origin(self) -> Gaussian:
        return product_law([process.origin() for process in self.processes], self.powers, self.signs)[0]

    def _laws(self, k, states):
        return [process.forward(state, k) for process, state in zip(self.processes, states, strict=True)]

    def _log_density(self, x, k):
        return level_log_density(self.processes, x, self.powers, k)

    def _psi(self, k, states):
        """Return the reward at the last level, the twist between it and the first, 0 there."""
        reward = sum(power * fn(self.process.finish(states[0], None)) for fn, power in self.rewards)
        view = self.process.running(states[0], None, k)
        twist = sum(power * fn(view) for fn, power in self.twists)
        return jnp.where(k == self.num_steps, reward, jnp.where(k > 0, twist, 0.0))


def _placed_noise(law: Gaussian, noise):
    return law.loc + jnp.sqrt(law.squared_scale) * noise


def _check(target) -> None:
    for process, _ in target.factors:
        if not isinstance(process, Levelled):
            raise TypeError(f"replicas live on the noise levels of diffusion models, which {process!r} does not have.")
        if process.churn != 1:
            raise ValueError(f"{process!r} has churn {process.churn:g}: its steps do not go with the noising kernel.")
    given = {
        "constraint": target.constraint,
        "proposal": target.proposal,
        "by_steps": target.steps,
        "weigh_steps": target.potentials or None,
        "watch": target.watched or None,
    }
    present = [name for name, value in given.items() if value is not None]
    if present:
        raise ValueError(f"replica exchange takes powers, products, tilts and twists; the target has {present}.")
    for tilt in target.tilts:
        for name, function in (("log_reward", tilt.log_reward), ("twist", tilt.twist)):
            if function is not None and (isinstance(function, Host) or not callable(function)):
                raise TypeError(f"`{name}` must be a JAX function to be exchanged between levels, got {function!r}.")
