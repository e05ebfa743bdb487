"""Particle marginal Metropolis-Hastings: parameters moved by the evidence that SMC estimates for them.

A program has parameters theta and the rest x of its trace, with density gamma(theta, x). SMC with theta given draws a
population u and estimates Z_hat(theta, u), with E_u[Z_hat] = integral of gamma(theta, x) dx, which is theta's density
under the posterior up to a constant; x is one path k of the population, drawn by its last weights. The chain is
Metropolis-Hastings on (theta, u, k) for

    pi(theta, u, k)  proportional to  Z_hat(theta, u) m(u | theta) W_k(u),                                        (1)

in which (theta, x_k) has exactly the law of the program's posterior, however few particles there are. A step proposes
theta' ~ q, u' ~ m(. | theta'), k' ~ W(u'), and accepts with

    min(1, Z_hat(theta', u') q(theta | theta', x') / (Z_hat(theta, u) q(theta' | theta, x))).                     (2)

Z_hat(theta, u) belongs to the state: it is stored, and never estimated anew while PMMH moves alone, which would change
what the chain converges to. theta's prior density is in Z_hat, for a given site is weighed.

The chain keeps (theta, x, Z_hat) only. Under (1) the law of u, with k in slot 0, given (theta, x) is that of
*conditional* SMC, in which particle 0 follows x. So a trace whose population is not known, at the start or because
another kernel has changed it, is given one by a conditional run: a Gibbs step under (1).

Z_hat is worth what its variance is: the spread of log Z_hat at one theta should be about 1 to 1.5.

Source: Andrieu, Doucet and Holenstein (2010), "Particle Markov chain Monte Carlo methods", sections 2.4.2 and 4.4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree

from ppl import chance
from ppl.guarantees import require_unbiased
from ppl.inference.genealogy import traced_line
from ppl.inference.metropolis_hastings import acceptance
from ppl.inference.parameter_walk import Learned, Walk, check_scale, proposing
from ppl.inference.particle_gibbs import require_conditional
from ppl.inference.smc import SMC
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.kernels.weights import summarize
from ppl.program import Program, as_program
from ppl.selection import Selection
from ppl.trace_space import Selector, TraceSpace

__all__ = ["ESTIMATES", "PMMH", "Estimated", "estimate", "prepared_unbiased"]


@dataclasses.dataclass(frozen=True)
class PMMH(TraceKernel):
    """Move parameters by SMC's estimate of their evidence, and draw the rest of the trace with them.

    Attributes:
        parameters: which sites are proposed, see `ppl.trace_space.Selector`: as a rule those before the loop.
        smc: the algorithm that estimates, unbiased and with a conditional form.
        proposal: a function of a trace, sites by name, that returns a NumPyro distribution for each parameter, as for
            `MH`. None is a Gaussian random walk in the unconstrained space, which learns its covariance while the chain
            warms up, see `ppl.inference.parameter_walk`.
        scale: the standard deviation of the walk's steps in the unconstrained space, one number or a tuple of one for
            each entry of the parameters: where it starts to learn, and where it stays if there is no warm-up. None
            needs a warm-up.
    """

    parameters: Selector
    smc: SMC
    proposal: Callable[[dict[str, Any]], Mapping[str, dist.Distribution]] | None = None
    scale: float | tuple[float, ...] | None = None
    guarantee: ClassVar[str] = "invariant"

    def __post_init__(self):
        super().__post_init__()
        require_conditional(self.smc)
        check_scale(self)

    def prepare(self, program: Any) -> Program:
        """Return the program with the twist of `smc` in it.

        Raises:
            ValueError: the program's estimates are not unbiased.
        """
        return prepared_unbiased(self.smc, program)[0]

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`.

        Raises:
            ValueError: a process that unfolds in the program gives no unbiased estimates.
        """
        require_unbiased(ESTIMATES, space.staged, self.smc)
        return _Marginal(self, space)


def prepared_unbiased(smc: SMC, program: Any) -> tuple[Program, SMC]:
    """Return what `SMC.prepared` does; refuse what gives no unbiased estimate of the evidence."""
    program, algorithm = smc.prepared(as_program(program))
    require_unbiased(ESTIMATES, program.target, algorithm)
    return program, algorithm


ESTIMATES = 'estimates of the evidence must be "unbiased"'
"""What is asked of populations inside of a chain, for errors."""


class Estimated(NamedTuple):
    """A trace that a population gave, and what it estimates.

    Attributes:
        sites: the trace, parameters included.
        log_evidence: log Z_hat of (1), for a walk with the Jacobian of the map to the unconstrained space.
        steps: the estimates after each iteration of the outermost loops, `[T]`.
    """

    sites: dict[str, Any]
    log_evidence: Any
    steps: Any


def estimate(
    space: TraceSpace, smc: SMC, selection: Selection, constrained: frozenset[str], key, point, rest=None
) -> Estimated:
    """Run a population with parameters given, and choose a path by the last weights.

    Args:
        space: the measure on (theta, x).
        smc: says how many particles there are.
        selection: what happens at the end of an outermost iteration.
        constrained: which parameters are given unconstrained.
        key: a PRNG key.
        point: the parameters.
        rest: x, which particle 0 then follows, and which is the path.
    """
    run_key, choice_key = jax.random.split(key)
    result = space.condition(point).population(
        run_key,
        smc.num_particles,
        selection,
        retained=rest,
        keep=frozenset(space.sites),
        constrain=constrained,
        genealogy="sites",
    )
    log_num = jnp.log(float(smc.num_particles))
    log_evidence = result.log_mass + summarize(result.log_weights).log_sum - log_num
    steps = [d["log_evidence"] for d in result.diagnostics]
    if rest is None:
        sites = traced_line(result, chance.categorical(choice_key, result.log_weights))
    else:
        sites = traced_line(result, jnp.int32(0))
    return Estimated(sites, log_evidence, jnp.concatenate([jnp.zeros(0), *steps]))


class _Memory(NamedTuple):
    """What a chain knows of its trace: log Z_hat, the parameters as they are proposed, what the walk has learned."""

    log_evidence: Any
    point: dict[str, Any]
    learned: Any


class _Marginal(Moves):
    sequential = True

    def __init__(self, kernel: PMMH, space: TraceSpace):
        self.kernel, self.space = kernel, space
        self.parameters = space.select(kernel.parameters, "parameters")
        self.sites = tuple(space.sites)
        self.proposing = proposing(kernel, space, self.parameters)

    def estimate(self, key, point, rest=None) -> Estimated:
        """Run SMC, or conditional SMC around the rest of a trace."""
        smc = self.kernel.smc
        selection = smc.selection() if rest is None else smc.conditional_selection()
        return estimate(self.space, smc, selection, self.proposing.constrained, key, point, rest)

    def init(self, key, sites, num_warmup):
        """Draw the population of a trace by conditional SMC.

        Raises:
            ValueError: the walk has neither a warm-up nor a scale.
        """
        learned = None
        if isinstance(self.proposing, Walk):
            if num_warmup == 0 and self.kernel.scale is None:
                raise ValueError(
                    f"{self.kernel!r} learns its random walk in the warm-up: give `num_warmup` of at least a few "
                    "hundred steps, or `scale`, or `proposal`."
                )
            covariance = self.proposing.first_covariance(self.kernel.scale)
            mean = ravel_pytree(self.proposing.point(sites))[0]
            learned = Learned(mean, covariance, jnp.int32(0), jnp.int32(num_warmup))
        return self.refresh(key, sites, _Memory(None, None, learned))

    def refresh(self, key, sites, memory):
        """Draw the population of a trace by conditional SMC; see the module's docstring."""
        point = self.proposing.point(sites)
        rest = {name: sites[name] for name in self.space.sites if name not in self.parameters}
        return _Memory(self.estimate(key, point, rest).log_evidence, point, memory.learned)

    def log_weight(self, memory):
        """Return log Z_hat."""
        return memory.log_evidence

    def step(self, key, sites, memory):
        """Propose and accept by (2)."""
        propose_key, run_key, accept_key = jax.random.split(key, 3)
        covariance = None if memory.learned is None else memory.learned.covariance
        point = self.proposing.propose(propose_key, sites, memory.point, covariance)
        new = self.estimate(run_key, point)
        log_ratio = new.log_evidence - memory.log_evidence + self.proposing.log_ratio(sites, new.sites)
        accepted = chance.accept(accept_key, log_ratio)
        proposed, present = (new.sites, new.log_evidence, point), (dict(sites), memory.log_evidence, memory.point)
        sites, log_evidence, point = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), proposed, present)
        learned = None if memory.learned is None else memory.learned.after(point)
        return sites, _Memory(log_evidence, point, learned), {"acceptance": acceptance(log_ratio)}
