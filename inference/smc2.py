"""SMC squared: particle filters inside SMC, over parameters, as the data come in.

Parameters theta_1 .. theta_M each carry a run of SMC, whose randomness is u, and its running estimates Z_hat_t(theta,
u) of the evidence of the first t iterations, an unbiased one for each t. The outer population stands in turn for

    pi_t(theta, u)  =  m(u | theta) Z_hat_t(theta, u),      t = 1 .. T,                                           (1)

    w_m *= Z_hat_t(theta_m, u_m) / Z_hat_(t-1)(theta_m, u_m)                                                      (2)
    resample the (theta_m, u_m), where the weights are uneven                                                     (3)
    move each by particle marginal Metropolis-Hastings: theta' ~ q, u' ~ m(. | theta'), accepted with

        min(1, Z_hat_t(theta', u') q(theta | theta') / (Z_hat_t(theta, u) q(theta' | theta))).                    (4)

*u is the randomness of a whole run, over all T iterations.* Each theta runs its filter once and keeps all of Z_hat_1 ..
Z_hat_T; (2) only walks along them. This is a choice of state space: (1) are measures on the one space of pairs (theta,
u), and (2) to (4) an SMC sampler on it. Law L2 asks of (2) that the weights are ratios of these measures, which they
are; of (3) that copies are copies of the whole pair, their future included, which then is the same until one of them
moves; and of (4) that pi_t is left as it is: u' is drawn from m whole, and as Z_hat_t is a function of the first t
iterations, what comes after them has under pi_t the law of m, before and after. Nothing is suspended or drawn twice.
The price is that a move at iteration t runs T iterations, at most twice the work on average, and that copies share
their future as long as none of them has moved.

With moves at iterations fixed beforehand and proposals that do not look at the population, E[Z_hat] = Z; where an
uneven population triggers them or teaches the proposal, the estimate is consistent as M grows.

Source: Chopin, Jacob and Papaspiliopoulos (2013), "SMC^2: an efficient algorithm for sequential analysis of state space
models", whose filters are extended one iteration at a time instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree

from ppl import chance, runners
from ppl import progress as progress_bar
from ppl.errors import SiteValueError
from ppl.guarantees import Promising, promised, require_unbiased
from ppl.inference.importance import ImportanceSampling
from ppl.inference.metropolis_hastings import acceptance
from ppl.inference.parameter_walk import Walk, check_scale, frozen_selector, proposing
from ppl.inference.pmmh import ESTIMATES, estimate, prepared_unbiased
from ppl.inference.population import OnlyWeigh, blame_sites
from ppl.inference.schemes import resampler_guarantee
from ppl.inference.smc import SMC
from ppl.inference.validation import refuse_state, require_count, require_fraction
from ppl.ir import Draw, Loop, Score
from ppl.kernels import resampling
from ppl.kernels.weights import summarize
from ppl.lanes import take
from ppl.posterior import Posterior, population_posterior
from ppl.program import Staged, kept_sites
from ppl.trace_space import Selector, TraceSpace

__all__ = ["SMC2"]

_ROWS = 128  # particles whose values are computed at once
_SIDE_BY_SIDE = 16_384  # particles of populations that run at once


@dataclasses.dataclass(frozen=True)
class SMC2(Promising):
    """Particle filters inside SMC.

    Attributes:
        num_parameters: how many values of the parameters, M, each with a population of its own.
        smc: the algorithm that runs for each of them; unbiased.
        parameters: which sites they are, see `ppl.trace_space.Selector`: before the loop.
        proposal: how (4) proposes them, as for `PMMH`. None is a Gaussian random walk in the unconstrained space.
        scale: the standard deviation of the walk's steps, one number or a tuple of one for each entry of the
            parameters. None takes 2.38^2 / d times the covariance of the population.
        ess_threshold: resample when the effective sample size falls below this fraction of M; 1.0 or more always does.
        move_every: move after every so many iterations. None moves where it resamples.
        num_moves: how many moves are made in a row.
        resampler: as for `SMC`.

    The particles of the posterior are the M values of the parameters, each with one path of its population.
    """

    num_parameters: int
    smc: SMC
    parameters: Selector
    proposal: Callable[[dict[str, Any]], Mapping[str, dist.Distribution]] | None = None
    scale: float | tuple[float, ...] | None = None
    ess_threshold: float = 0.5
    move_every: int | None = None
    num_moves: int = 1
    resampler: str | Callable = "systematic"
    blamed: ClassVar[str] = "fresh draws of the program"

    def __post_init__(self):
        require_count("num_parameters", self.num_parameters)
        require_count("num_moves", self.num_moves)
        if self.move_every is not None:
            require_count("move_every", self.move_every)
        if not isinstance(self.smc, SMC):
            raise TypeError(f"`smc` must be an SMC(..), got {self.smc!r}.")
        require_unbiased("`smc` must be unbiased", self.smc)
        if self.smc.rejuvenation is not None:
            raise ValueError(f"`smc` with `rejuvenation` cannot run inside SMC2, got {self.smc!r}.")
        require_fraction("ess_threshold", self.ess_threshold)
        check_scale(self)
        frozen_selector(self, "parameters")
        resampling.resolve(self.resampler)

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        shown = [f for f in fields if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default]
        return f"SMC2({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def num_particles(self) -> int:
        """How many particles the posterior has."""
        return self.num_parameters

    @property
    def guarantee(self) -> str:
        """What the weights stand for: "unbiased" at moves and with proposals fixed beforehand, else "consistent"."""
        fixed = self.move_every is not None and (self.proposal is not None or self.scale is not None)
        return promised("unbiased" if fixed else "consistent", self.smc, resampler_guarantee(self.resampler))

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments."""
        refuse_state(self, state)
        program, smc = prepared_unbiased(self.smc, program)
        staged = program.stage(keep_rules=False)
        require_unbiased(ESTIMATES, staged)
        keep = kept_sites(staged, keep)
        _Population(self, smc, TraceSpace(staged))  # say early what does not fit
        show = progress_bar.wanted(progress) and not runners.is_traced((staged.inputs, staged.given, key))
        with progress_bar.showing(show):
            run = self._runner(smc, keep, show)
            posterior = runners.run(staged, (self, smc, "run", keep, show), run, key)
            if show:
                jax.block_until_ready(posterior.log_weights)
        return dataclasses.replace(posterior, decode=program.decode)

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Draw from the program and count what each site did to the draws."""
        return blame_sites(self.smc.prepared(program)[0], ImportanceSampling(self.num_parameters), key)

    def _runner(self, smc: SMC, keep: frozenset[str], show: bool):
        def run(staged: Staged, inputs, given, key) -> Posterior:
            space = TraceSpace(staged, inputs, given)
            log_weights, log_mass, particles, diagnostics = _Population(self, smc, space).run(key, show)
            value, sites, present = jax.lax.map(
                lambda x: space.outcome(x, keep), particles.sites, batch_size=min(_ROWS, self.num_parameters)
            )
            posterior = population_posterior(
                log_weights,
                log_mass,
                [diagnostics],
                value=value,
                sites=sites,
                present=present,
                guarantee=promised(staged, self),
                algorithm=repr(self),
            )
            shown = posterior.diagnostics | {name: diagnostics[name] for name in ("moved", "acceptance")}
            return dataclasses.replace(posterior, diagnostics=shown)

        return run


class _Particle(NamedTuple):
    """Parameters and their run.

    Attributes:
        point: the parameters as they are proposed.
        sites: the trace: parameters and one path of their population.
        log_evidences: log Z_hat_1 .. log Z_hat_T, and that of the whole program, `[T + 1]`, of points: with the
            Jacobian of the map to the unconstrained space for a walk.
    """

    point: dict[str, Any]
    sites: dict[str, Any]
    log_evidences: Any


class _Population:
    """The lines (2) to (4)."""

    def __init__(self, settings: SMC2, smc: SMC, space: TraceSpace):
        self.settings, self.smc, self.space, self.num = settings, smc, space, settings.num_parameters
        self.parameters = space.select(settings.parameters, "parameters")
        self.prior = _before_loops(space, self.parameters)
        self.proposing = proposing(settings, self.prior, self.parameters)
        self.resampler = chance.resampler(settings.resampler)

    def run(self, key, show: bool):
        """Return log-weights `[M]`, the log-mass taken out of them, the particles, and the figures of iterations."""
        draw_key, step_key = jax.random.split(key)
        particles, log_proposal = self.drawn(draw_key)
        length = particles.log_evidences.shape[1] - 1

        def step(state, t):
            particles, before, log_weights, log_mass = state
            now = particles.log_evidences[:, t]
            log_weights = _weighed(log_weights, now, before)  # (2)
            log_sum, ess, _ = summarize(log_weights)
            log_evidence = log_mass + log_sum - jnp.log(float(self.num))
            threshold = self.settings.ess_threshold
            uneven = jnp.ones((), bool) if threshold >= 1.0 else ess < threshold * self.num
            uneven &= ~jnp.isneginf(log_sum) & ~jnp.isnan(log_sum)
            keys = jax.random.split(jax.random.fold_in(step_key, t))
            stay = jnp.arange(self.num, dtype=jnp.int32)
            ancestors = jax.lax.cond(
                uneven,
                lambda: jnp.asarray(self.resampler(keys[0], log_weights, self.num), jnp.int32),
                lambda: stay,
            )
            particles = jax.tree.map(lambda a: take(a, ancestors), particles)  # (3)
            log_mass = jnp.where(uneven, log_evidence, log_mass)
            log_weights = jnp.where(uneven, 0.0, log_weights)
            due = uneven if self.settings.move_every is None else (t + 1) % self.settings.move_every == 0
            particles, rate = jax.lax.cond(
                due,
                lambda: self.moved(keys[1], particles, log_weights, t),
                lambda: (particles, jnp.float32(0.0)),
            )
            if show:
                progress_bar.report(t, length, ess)
            figures = {"ess": ess, "resampled": uneven, "log_evidence": log_evidence, "ancestors": ancestors}
            figures |= {"moved": jnp.asarray(due), "acceptance": rate}
            return (particles, particles.log_evidences[:, t], log_weights, log_mass), figures

        state = particles, log_proposal, jnp.zeros(self.num), jnp.zeros(())
        state, diagnostics = jax.lax.scan(step, state, jnp.arange(length))
        particles, before, log_weights, log_mass = state
        return _weighed(log_weights, particles.log_evidences[:, length], before), log_mass, particles, diagnostics

    def drawn(self, key) -> tuple[_Particle, Any]:
        """Draw parameters, and a run for each; also returns the log-densities `[M]` of the points as drawn."""
        draw_key, run_key = jax.random.split(key)
        result = self.prior.population(draw_key, self.num, OnlyWeigh())  # its weights are p / q of the parameters
        sites = {
            name: lane.array if lane.random else jnp.broadcast_to(lane.array, (self.num, *lane.array.shape))
            for name, lane in result.sites.items()
        }
        points = jax.vmap(self.proposing.point)(sites)
        if isinstance(self.proposing, Walk):
            log_law = jax.vmap(self.prior.unconstrained_log_density)(points, sites)
        else:
            log_law = jax.vmap(self.prior.log_density)(sites)
        # Where the law is 0 the run has no evidence, whatever is taken out of it.
        log_proposal = jnp.where(jnp.isneginf(log_law), 0.0, log_law - result.log_weights)
        runs = self.each(lambda xs: self.estimated(*xs), (jax.random.split(run_key, self.num), points))
        return runs, log_proposal

    def estimated(self, key, point) -> _Particle:
        """Run SMC at parameters."""
        smc = self.smc
        run = estimate(self.space, smc, smc.selection(), self.proposing.constrained, key, point)
        return _Particle(point, run.sites, jnp.append(run.steps, run.log_evidence))

    def moved(self, key, particles: _Particle, log_weights, t) -> tuple[_Particle, Any]:
        """Make the moves (4) after iteration t; also returns the rate of acceptance."""
        covariance = self.covariance(particles.point, log_weights)

        def one(particle, key):
            propose_key, run_key, accept_key = jax.random.split(key, 3)
            point = self.proposing.propose(propose_key, particle.sites, particle.point, covariance)
            new = self.estimated(run_key, point)
            log_ratio = new.log_evidences[t] - particle.log_evidences[t]
            log_ratio += self.proposing.log_ratio(particle.sites, new.sites)
            accepted = chance.accept(accept_key, log_ratio)
            return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, particle), acceptance(log_ratio)

        def chain(arguments):
            key, particle = arguments
            particle, rates = jax.lax.scan(one, particle, jax.random.split(key, self.settings.num_moves))
            return particle, jnp.mean(rates)

        particles, rates = self.each(chain, (jax.random.split(key, self.num), particles))
        return particles, jnp.mean(rates)

    def each(self, function: Callable, xs):
        """Apply a function to each of M, as many side by side as there is room for."""
        room = max(_SIDE_BY_SIDE // self.smc.num_particles, 1)
        batch = max(size for size in range(1, min(room, self.num) + 1) if self.num % size == 0)
        return jax.lax.map(function, xs, batch_size=None if batch == 1 else batch)

    def covariance(self, points: dict[str, Any], log_weights) -> Any:
        """Return S of `ppl.inference.parameter_walk`; None where no walk is made."""
        if not isinstance(self.proposing, Walk):
            return None
        if self.settings.scale is not None:
            return self.proposing.first_covariance(self.settings.scale)
        flat = jax.vmap(lambda point: ravel_pytree(point)[0])(points)
        weights = jnp.nan_to_num(jax.nn.softmax(log_weights))
        flat = jnp.where(weights[:, None] > 0, flat, 0.0)
        away = flat - weights @ flat
        return (away * weights[:, None]).T @ away


def _weighed(log_weights, now, before):
    """Return log-weights times the ratio of two estimates; the dead stay dead, and where nothing was, nothing comes."""
    dead = jnp.isneginf(log_weights) | jnp.isneginf(before)
    return jnp.where(dead, -jnp.inf, log_weights + now - jnp.where(dead, 0.0, before))


def _before_loops(space: TraceSpace, parameters: tuple[str, ...]) -> TraceSpace:
    """Return the measure of the statements before the first outermost loop, in which only the parameters weigh.

    Raises:
        SiteValueError: a parameter is not among them.
    """
    nodes = []
    for node in space.staged.block.nodes:
        if isinstance(node, Loop) and node.resamples:
            break
        if not isinstance(node, Score) or node.name in parameters:
            nodes.append(node)
    block = dataclasses.replace(space.staged.block, nodes=tuple(nodes), outputs=())
    drawn = {node.name for node, _ in block.statements() if isinstance(node, Draw)}
    late = sorted(set(parameters) - drawn)
    if late:
        raise SiteValueError(
            f"`parameters` {late} are drawn in the loop or after it; SMC2 runs a population for each value of sites "
            f"that are drawn before the first ppl.scan: {sorted(drawn & set(space.sites))}."
        )
    return TraceSpace(dataclasses.replace(space.staged, block=block), space.inputs, space.given)
