"""Parallel tempering: chains at several temperatures that exchange their traces.

Replicas x_0 .. x_(R-1) stand at the temperatures 1 = T_0 < T_1 < .. with beta_r = 1 / T_r. Their joint measure

    prod_r gamma_(beta_r)(x_r),      gamma_beta(x) = gamma_0(x) L(x)^beta,                                        (1)

see `ppl.inference.tempering`, is left as it is by a kernel at each temperature, which leaves gamma_(beta_r), and by
swaps of neighbours: x_r and x_(r+1) change places with probability

    min(1, exp((beta_r - beta_(r+1)) (log L(x_(r+1)) - log L(x_r)))).                                             (2)

Pairs (0, 1), (2, 3), .. are tried in even iterations, (1, 2), (3, 4), .. in odd ones, alternately and not at random:
traces then travel through the temperatures like particles with momentum, and a trip from the hottest to the coldest
takes O(R) iterations instead of O(R^2). The draw is the replica at T = 1.

What a kernel has learned (step sizes) belongs to its temperature and stays there; what it remembers of its trace is
refreshed after a swap.

Sources: Geyer (1991), "Markov chain Monte Carlo maximum likelihood"; Okabe, Kawata, Okamoto and Mikami (2001),
"Replica-exchange Monte Carlo method for the isobaric-isothermal ensemble"; Syed, Bouchard-Cote, Deligiannidis and
Doucet (2022), "Non-reversible parallel tempering: a scalable highly parallel MCMC scheme".
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ppl import chance
from ppl.guarantees import promised
from ppl.inference.metropolis_hastings import acceptance
from ppl.inference.tempering import each_number, scored, split_log_density, tempered
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.trace_space import Selector, TraceSpace

__all__ = ["ParallelTempering", "Replicas"]


@dataclasses.dataclass(frozen=True)
class ParallelTempering(TraceKernel):
    """Run a kernel at several temperatures and swap traces between them.

    Attributes:
        kernel: a kernel on traces; together with the swaps it should move all sites, as `Sequence(..)` does: the
            replicas at higher temperatures are moved by it alone.
        temperatures: 1.0 and higher ones, increasing. Swaps between neighbours should be accepted at similar rates, of
            about a half: see `posterior.diagnostics["swap_acceptance"]`, `[num_chains, num_samples, R - 1]`.
        sites: the names of the observations and factors that are tempered, None for all; see
            `ppl.inference.tempering.scored`.

    The other replicas are part of the chain's state and start as copies of its trace. Only a chain can carry them:
    moves within populations, which start anew at each particle, would not leave the measure as it is.
    """

    kernel: TraceKernel
    temperatures: tuple[float, ...]
    sites: Selector = None
    only_in_chains: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.kernel, TraceKernel):
            raise TypeError(f"`kernel` must be a kernel on traces, such as NUTS() or MH(..), got {self.kernel!r}.")
        temperatures = each_number("temperatures", self.temperatures)
        increasing = all(a < b for a, b in zip(temperatures, temperatures[1:], strict=False))
        if len(temperatures) < 2 or temperatures[0] != 1.0 or not increasing:
            raise ValueError(
                f"`temperatures` must start with 1.0 and increase, such as (1.0, 2.0, 4.0), got {self.temperatures!r}."
            )
        object.__setattr__(self, "temperatures", temperatures)
        if isinstance(self.sites, list):
            object.__setattr__(self, "sites", tuple(self.sites))

    @property
    def guarantee(self) -> str:
        """What the draws stand for: what those of the kernel do."""
        return promised(self.kernel, chain=True)

    @property
    def needs_gradient(self) -> bool:
        """Whether the kernel differentiates the density."""
        return self.kernel.needs_gradient

    def prepare(self, program: Any) -> Any:
        """Return the program as the kernel wants it."""
        return self.kernel.prepare(program)

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`.

        Raises:
            SiteValueError: the program has no observations or factors, or none of these names.
        """
        return _Replicated(self, space)


class Replicas(NamedTuple):
    """What a chain carries beside its trace.

    Attributes:
        hot: the traces at T_1 .. T_(R-1), `[R - 1, ...]` by name.
        memory: what the kernel remembers at each temperature, `[R, ...]`.
        iteration: how many steps were made.
    """

    hot: dict[str, Any]
    memory: Any
    iteration: Any


class _Replicated(Moves):
    def __init__(self, kernel: ParallelTempering, space: TraceSpace):
        self.kernel, self.space = kernel, space
        self.names = scored(space, kernel.sites)
        self.betas = 1.0 / jnp.asarray(kernel.temperatures, float)
        inner = kernel.kernel.bind(space)
        self.sites = inner.sites  # swaps exchange whole traces, of which all replicas start with the same
        self.sequential = inner.sequential

    def at(self, beta) -> Moves:
        """Return the kernel's moves at an inverse temperature."""
        return self.kernel.kernel.bind(tempered(self.space, beta, self.names))

    def init(self, key, sites, num_warmup):
        """Start all replicas at the present trace, which every temperature allows."""
        num = len(self.kernel.temperatures)
        replicas = jax.tree.map(lambda a: jnp.broadcast_to(a, (num, *jnp.shape(a))), dict(sites))
        memory = self.over(
            lambda beta, key, x: self.at(beta).init(key, x, num_warmup),
            self.betas,
            jax.random.split(key, num),
            replicas,
        )
        return Replicas(jax.tree.map(lambda a: a[1:], replicas), memory, jnp.int32(0))

    def refresh(self, key, sites, memory):
        """Refresh what the kernel remembers at T = 1."""
        cold = self.at(self.betas[0]).refresh(key, sites, jax.tree.map(lambda a: a[0], memory.memory))
        new = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b[1:]]), cold, memory.memory)
        return memory._replace(memory=new)

    def log_weight(self, memory):
        """Return the kernel's at T = 1."""
        return self.at(self.betas[0]).log_weight(jax.tree.map(lambda a: a[0], memory.memory))

    def step(self, key, sites, memory):
        """Move each replica, then try to swap neighbours."""
        num = len(self.kernel.temperatures)
        move_key, swap_key, refresh_key = jax.random.split(key, 3)
        replicas = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), dict(sites), memory.hot)
        replicas, kernel_memory, info = self.over(
            lambda beta, key, x, memory: self.at(beta).step(key, x, memory),
            self.betas,
            jax.random.split(move_key, num),
            replicas,
            memory.memory,
        )
        log_likelihoods = self.over(lambda x: split_log_density(self.space, x, self.names).log_likelihood, replicas)
        log_ratios = (self.betas[:-1] - self.betas[1:]) * jnp.diff(log_likelihoods)  # (2)
        tried = (jnp.arange(num - 1) + memory.iteration) % 2 == 0
        swaps = jax.vmap(chance.accept)(jax.random.split(swap_key, num - 1), jnp.where(tried, log_ratios, -jnp.inf))
        none = jnp.zeros(1, bool)
        up, down = jnp.append(swaps, none), jnp.append(none, swaps)
        source = jnp.arange(num) + up - down
        replicas = jax.tree.map(lambda a: a[source], replicas)
        kernel_memory = self.over(
            lambda beta, key, moved, x, memory: jax.lax.cond(
                moved, lambda: self.at(beta).refresh(key, x, memory), lambda: memory
            ),
            self.betas,
            jax.random.split(refresh_key, num),
            up | down,
            replicas,
            kernel_memory,
        )
        cold, hot = jax.tree.map(lambda a: a[0], replicas), jax.tree.map(lambda a: a[1:], replicas)
        info = jax.tree.map(lambda a: a[0], info) | {"swap_acceptance": jax.vmap(acceptance)(log_ratios)}
        return cold, Replicas(hot, kernel_memory, memory.iteration + 1), info
