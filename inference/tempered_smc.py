"""Tempered SMC: a population led from the prior to the posterior through measures in between.

With gamma_beta = gamma_0 L^beta of `ppl.inference.tempering` and 0 = beta_0 < beta_1 < .. < beta_K = 1:

    x_n ~ the program's laws or proposals,  w_n = gamma_0(x_n) / q(x_n)                                           (1)
    for k = 1 .. K:   w_n *= L(x_n)^(beta_k - beta_(k-1))                                                         (2)
                      Z_hat *= mean w,   resample,   w_n = 1                                                      (3)
                      move each particle by a kernel that leaves gamma_(beta_k) as it is                          (4)

Every line preserves the measure for which the population stands (law L2), so that E[Z_hat] = Z where the beta_k are
fixed beforehand. (1) is resampled on the spot where its weights differ.

Chosen by the run itself, beta_k is the largest at which the weights (2) have an effective sample size of `ess` N, by
`ppl.kernels.annealing.temperature`: the evidence is then consistent as N grows, not unbiased, for the same particles
choose the step and are weighted by it. `pilot` makes such a run and fixes what it chose for later ones.

Waste-free: (3) draws only M = N / P particles, and (4) keeps all P states of each one's chain, which are N particles
again. Each state of a chain stands for gamma_(beta_k) as its start does, so law L2 holds as before.

Sources: Del Moral, Doucet and Jasra (2006), "Sequential Monte Carlo samplers", section 2.3.3; Jasra, Stephens, Doucet
and Tsagaris (2011), "Inference for Levy-driven stochastic volatility models via adaptive sequential Monte Carlo"; Dau
and Chopin (2022), "Waste-free sequential Monte Carlo".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppl import chance, runners
from ppl import progress as progress_bar
from ppl.draws import as_key
from ppl.guarantees import Promising, promised
from ppl.inference.importance import ImportanceSampling
from ppl.inference.population import OnlyWeigh, blame_sites
from ppl.inference.schemes import resampler_guarantee
from ppl.inference.tempering import each_number, scored, split_log_density, tempered
from ppl.inference.trace_kernel import TraceKernel, only_in_chains
from ppl.inference.validation import refuse_state, require_count
from ppl.kernels import annealing, resampling
from ppl.kernels.weights import summarize
from ppl.lanes import take
from ppl.posterior import Posterior, population_posterior
from ppl.program import Program, Staged, as_program, kept_sites
from ppl.trace_space import Selector, TraceSpace

__all__ = ["TemperedSMC"]

_ROWS = 128  # particles whose values are computed at once


@dataclasses.dataclass(frozen=True)
class TemperedSMC(Promising):
    """Sequential Monte Carlo over tempered measures.

    Attributes:
        num_particles: how many particles, N.
        kernel: a kernel on traces that moves the particles, as it is: it has no warm-up.
        temperatures: 1 / beta_1 .. 1 / beta_K: decreasing, the last 1.0; infinity, the prior, comes before them. None
            chooses them in the run.
        ess: the effective sample size, as a fraction in (0, 1) of N, that is asked of each step where the run chooses.
        num_moves: how many steps of the kernel each particle makes at each temperature.
        waste_free: keep all num_moves + 1 states of a chain, P of the docstring, which must divide N.
        resampler: as for `SMC`.
        sites: the names of the observations and factors that are tempered, None for all; see
            `ppl.inference.tempering.scored`.
        max_steps: the most temperatures that a run chooses; the last of so many is 1.0 whatever it costs.

    The posterior's diagnostics are those of `SMC`, one for each temperature, with `temperature` and the rate of
    `acceptance` of the moves.
    """

    num_particles: int
    kernel: TraceKernel
    temperatures: tuple[float, ...] | None = None
    ess: float = 0.5
    num_moves: int = 1
    waste_free: bool = False
    resampler: str | Callable = "systematic"
    sites: Selector = None
    max_steps: int = 100
    blamed: ClassVar[str] = "the draws that it starts from"

    def __post_init__(self):
        for name in ("num_particles", "num_moves", "max_steps"):
            require_count(name, getattr(self, name))
        if not isinstance(self.kernel, TraceKernel):
            raise TypeError(f"`kernel` must be a kernel on traces, such as HMC(0.1) or MH(..), got {self.kernel!r}.")
        if only_in_chains(self.kernel):
            raise ValueError(
                f"`kernel` {self.kernel!r} carries replicas along, which particles cannot: give its own kernel."
            )
        if self.temperatures is not None:
            temperatures = each_number("temperatures", self.temperatures)
            decreasing = all(a > b for a, b in zip(temperatures, temperatures[1:], strict=False))
            if temperatures[-1] != 1.0 or not decreasing:
                raise ValueError(
                    "`temperatures` must decrease and end with 1.0, such as (16.0, 4.0, 1.0), got "
                    f"{self.temperatures!r}."
                )
            object.__setattr__(self, "temperatures", temperatures)
        (ess,) = each_number("ess", (self.ess,))
        if not 0.0 < ess < 1.0:
            raise ValueError(f"`ess` must be a fraction of the particles between 0 and 1, got {self.ess!r}.")
        if self.waste_free and self.num_particles % (self.num_moves + 1):
            raise ValueError(
                f"`num_moves` + 1 = {self.num_moves + 1} states of each chain are kept, which must divide "
                f"`num_particles`, got {self.num_particles}."
            )
        resampling.resolve(self.resampler)
        if isinstance(self.sites, list):
            object.__setattr__(self, "sites", tuple(self.sites))

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        shown = [f for f in fields if f.name in ("num_particles", "kernel") or getattr(self, f.name) != f.default]
        return f"TemperedSMC({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def guarantee(self) -> str:
        """What the weights stand for: "unbiased" at given temperatures, else "consistent"; or what the kernel does."""
        own = "consistent" if self.temperatures is None else "unbiased"
        return promised(own, self.kernel, resampler_guarantee(self.resampler))

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments."""
        refuse_state(self, state)
        program, staged = self._staged(program)
        keep = kept_sites(staged, keep)
        show = progress_bar.wanted(progress) and not runners.is_traced((staged.inputs, staged.given, key))
        with progress_bar.showing(show):
            posterior = runners.run(staged, (self, "run", keep, show), self._runner(keep, show), key)
            if show:
                jax.block_until_ready(posterior.log_weights)
        if self.temperatures is None and not runners.is_traced(posterior.log_weights):
            num_steps = int(np.argmax(np.asarray(posterior.diagnostics["temperature"]) == 1.0)) + 1
            diagnostics = {name: figure[:num_steps] for name, figure in posterior.diagnostics.items()}
            posterior = dataclasses.replace(posterior, diagnostics=diagnostics)
        return dataclasses.replace(posterior, decode=program.decode)

    def pilot(self, program, seed: int = 0) -> TemperedSMC:
        """Return this algorithm with the temperatures fixed that a run of it chooses.

        Args:
            program: the program, or one like it.
            seed: an int, or a PRNG key. The run's randomness is not that of later runs with this seed.
        """
        if self.temperatures is not None:
            raise ValueError(f"`temperatures` are given already: {self.temperatures}.")
        posterior = self(program, jax.random.fold_in(as_key(seed), 0x9107), progress=False)
        chosen = np.asarray(posterior.diagnostics["temperature"], np.float64)
        return dataclasses.replace(self, temperatures=tuple(sorted(set(chosen.tolist()), reverse=True)))

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Repeat the draws that a run starts from and count what each site did to them."""
        start_key, _ = jax.random.split(key)
        draw_key, _ = jax.random.split(start_key)
        start = ImportanceSampling(self.num_particles)
        return blame_sites(self.kernel.prepare(as_program(program)), start, draw_key)

    def _staged(self, program) -> tuple[Program, Staged]:
        program = self.kernel.prepare(as_program(program))
        staged = program.stage(keep_rules=self.kernel.needs_gradient)
        space = TraceSpace(staged, differentiable=self.kernel.needs_gradient)
        self.kernel.bind(space)  # say early what does not fit
        scored(space, self.sites)
        return program, staged

    def _runner(self, keep: frozenset[str], show: bool):
        def run(staged: Staged, inputs, given, key) -> Posterior:
            space = TraceSpace(staged, inputs, given, differentiable=self.kernel.needs_gradient)
            population = _Population(self, space)
            start_key, step_key = jax.random.split(key)
            particles = population.start(start_key)
            if self.temperatures is None:
                particles, diagnostics = _chosen(population, particles, step_key, show)
            else:
                particles, diagnostics = _given(population, particles, step_key, show)
            value, sites, present = jax.lax.map(
                lambda x: space.outcome(x, keep), particles.sites, batch_size=min(_ROWS, self.num_particles)
            )
            posterior = population_posterior(
                particles.log_weights,
                particles.log_mass,
                [diagnostics],
                value=value,
                sites=sites,
                present=present,
                guarantee=promised(staged, self),
                algorithm=repr(self),
            )
            shown = posterior.diagnostics | {"acceptance": diagnostics["acceptance"]}
            return dataclasses.replace(posterior, diagnostics=shown)

        return run


class _Particles(NamedTuple):
    """A population: traces `[N, ...]`, log L of each, log-weights `[N]`, all equal, and the log-mass taken out.

    `origins` tells which of the first draws each one was, before (1) was resampled; beta is the present one.
    """

    sites: dict[str, Any]
    log_likelihoods: Any
    log_weights: Any
    log_mass: Any
    beta: Any
    origins: Any


class _Population:
    """The lines (1) to (4)."""

    def __init__(self, settings: TemperedSMC, space: TraceSpace):
        self.settings, self.space = settings, space
        self.names = scored(space, settings.sites)
        self.num = settings.num_particles
        self.num_chains = self.num // (settings.num_moves + 1) if settings.waste_free else self.num
        self.resampler = chance.resampler(settings.resampler)

    def start(self, key) -> _Particles:
        """Draw (1); weights that differ are resampled."""
        draw_key, resample_key = jax.random.split(key)
        result = tempered(self.space, 0.0, self.names).population(draw_key, self.num, OnlyWeigh())
        sites = {
            name: lane.array if lane.random else jnp.broadcast_to(lane.array, (self.num, *lane.array.shape))
            for name, lane in result.sites.items()
        }
        even = jnp.all(result.log_weights == result.log_weights[0])
        log_sum, _, _ = summarize(result.log_weights)
        stay = jnp.arange(self.num, dtype=jnp.int32)
        ancestors = jax.lax.cond(
            even | jnp.isneginf(log_sum),
            lambda: stay,
            lambda: jnp.asarray(self.resampler(resample_key, result.log_weights, self.num), jnp.int32),
        )
        sites = jax.tree.map(lambda a: take(a, ancestors), sites)
        return self.evenly(sites, log_sum - jnp.log(float(self.num)), jnp.zeros(()))._replace(origins=ancestors)

    def evenly(self, sites, log_mass, beta) -> _Particles:
        """Return particles of equal weight; dead ones where no mass is left."""
        log_weights = jnp.where(jnp.isneginf(log_mass), -jnp.inf, jnp.zeros(self.num))
        split = jax.vmap(lambda x: split_log_density(self.space, x, self.names))(sites)
        log_mass = jnp.where(jnp.isneginf(log_mass), 0.0, log_mass)
        stay = jnp.arange(self.num, dtype=jnp.int32)
        return _Particles(sites, split.log_likelihood, log_weights, log_mass, beta, stay)

    def step(self, key, particles: _Particles, beta) -> tuple[_Particles, dict[str, Any]]:
        """Make (2), (3) and (4) at the next beta; also returns the figures of this step."""
        resample_key, move_key = jax.random.split(key)
        gain = jnp.where(jnp.isneginf(particles.log_weights), 0.0, particles.log_likelihoods)
        log_weights = particles.log_weights + (beta - particles.beta) * gain
        log_sum, ess, _ = summarize(log_weights)
        log_evidence = particles.log_mass + log_sum - jnp.log(float(self.num))
        ancestors = jnp.where(
            jnp.isneginf(log_sum),
            jnp.arange(self.num_chains, dtype=jnp.int32),
            jnp.asarray(self.resampler(resample_key, log_weights, self.num_chains), jnp.int32),
        )
        sites = jax.tree.map(lambda a: take(a, ancestors), particles.sites)
        sites, acceptance = self.moved(move_key, sites, beta)
        figures = {
            "ess": ess,
            "resampled": jnp.ones((), bool),
            "log_evidence": log_evidence,
            "ancestors": take(particles.origins, ancestors),
            "temperature": 1.0 / beta,
            "acceptance": acceptance,
        }
        return self.evenly(sites, log_evidence, beta), figures

    def moved(self, key, sites, beta) -> tuple[dict[str, Any], Any]:
        """Move particles `[M, ...]`; returns the last states, or all `[M * P, ...]`, and the rate of acceptance."""
        moves = self.settings.kernel.bind(tempered(self.space, beta, self.names))

        def one(state, key):
            x, memory, info = moves.step(key, *state)
            return (x, memory), (x, info["acceptance"])

        def chain(key, x):
            init_key, *keys = jax.random.split(key, self.settings.num_moves + 1)
            start = x, moves.init(init_key, x, 0)
            (last, _), (states, acceptance) = jax.lax.scan(one, start, jnp.stack(keys))
            if self.settings.waste_free:
                last = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), x, states)
            return last, jnp.mean(acceptance)

        sites, acceptance = moves.over(chain, jax.random.split(key, self.num_chains), sites)
        if self.settings.waste_free:
            sites = jax.tree.map(lambda a: a.reshape(self.num, *a.shape[2:]), sites)
        return sites, jnp.mean(acceptance)


def _given(population: _Population, particles: _Particles, key, show: bool):
    """Go through the given temperatures; returns the particles and each step's figures, stacked."""
    betas = 1.0 / jnp.asarray(population.settings.temperatures, float)
    num = betas.shape[0]

    def step(particles, x):
        k, beta = x
        particles, figures = population.step(jax.random.fold_in(key, k), particles, beta)
        if show:
            progress_bar.report(k, num, figures["ess"])
        return particles, figures

    return jax.lax.scan(step, particles, (jnp.arange(num), betas))


def _chosen(population: _Population, particles: _Particles, key, show: bool):
    """Choose temperatures on the way; what follows the last of them repeats it, for `max_steps` steps in all."""
    max_steps, ess = population.settings.max_steps, population.settings.ess
    figures = jax.eval_shape(lambda: population.step(key, particles, jnp.ones(()))[1])
    stacks = jax.tree.map(lambda s: jnp.zeros((max_steps, *s.shape), s.dtype), figures)

    def running(state):
        k, particles, _ = state
        return (particles.beta < 1.0) & (k < max_steps)

    def step(state):
        k, particles, stacks = state
        gap = 1.0 - particles.beta
        alive = particles.log_weights > -jnp.inf
        temperature = annealing.temperature(jnp.where(alive, gap * particles.log_likelihoods, -jnp.inf), ess=ess)
        goes_on = (temperature > 1.0) & (k < max_steps - 1)
        beta = particles.beta + gap / temperature
        beta = jnp.where(goes_on & (beta < 1.0 - 1e-6), beta, 1.0)
        particles, figures = population.step(jax.random.fold_in(key, k), particles, beta)
        if show:
            progress_bar.report(jnp.int32(100 * particles.beta) - 1, 100, figures["ess"])
        stacks = jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, k, 0), stacks, figures)
        return k + 1, particles, stacks

    num_steps, particles, stacks = jax.lax.while_loop(running, step, (jnp.int32(0), particles, stacks))
    ran = jnp.arange(max_steps) < num_steps
    last = jnp.minimum(jnp.arange(max_steps), num_steps - 1)
    stacks = {name: stack[last] for name, stack in stacks.items()}
    stay = jnp.arange(population.num_chains, dtype=jnp.int32)
    stacks["resampled"] &= ran
    stacks["ancestors"] = jnp.where(ran[:, None], stacks["ancestors"], stay)
    return particles, stacks
