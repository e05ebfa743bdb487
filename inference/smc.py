"""Sequential Monte Carlo: a population that is resampled at the end of each iteration of an outermost loop.

At the end of iteration t, with log-weights w_n and mean weight W = (1/N) sum_n exp(w_n):

    ESS = (sum_n exp w_n)^2 / sum_n exp(2 w_n)                                                    (1)
    where ESS < ess_threshold * N:  a_n ~ resampler(w),  x_n <- x_(a_n),  w_n <- 0,  log Z += log W (2)
    otherwise the weights are carried on.
    log Z_hat = log Z + log W at the end.                                                         (3)

The resampler draws `E[offspring of n] = N W_n`, so (2) preserves the measure that the weighted population stands for,
and E[Z_hat] = Z however the iterations at which to resample are chosen from the past (Del Moral, Doucet and Jasra, On
adaptive resampling strategies for sequential Monte Carlo methods, Bernoulli 2012). All dead: nothing is resampled.

`annealing` draws the ancestors at a temperature, see `ppl.inference.annealing`; `lookahead` by what they will be worth,
see `ppl.inference.lookahead`; `twist` by a guess of it, psi(state), that counts on the way and is taken out at the end:
the weights at which (2) looks are w_n exp psi_n. `rejuvenation` moves particles between iterations. Derivatives: draws
give theirs by their path or by their score (`ppl.derivatives`), children's weights carry that of the distribution by
which they were drawn (`ppl.kernels.resampling.gradient`), and moved particles that of their whole density
(`ppl.replay`), so that `jax.grad` of `exp(log_evidence)` is an unbiased estimate of Z's gradient, and that of
`log_evidence` the estimate of the score by Fisher's identity: consistent, and not the gradient of E[log_evidence].

Source: Chopin and Papaspiliopoulos, An Introduction to Sequential Monte Carlo (2020), Algorithms 10.1 and 10.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from ppl import chance
from ppl.derivatives import refuse
from ppl.guarantees import Promising, promised
from ppl.host import Host
from ppl.inference.annealing import EntropicAnnealing, temper
from ppl.inference.correctors import FeynmanKac, KernelRatio, Uncorrected, active_shares
from ppl.inference.hamiltonian import HMC
from ppl.inference.langevin import MALA, Langevin
from ppl.inference.level_moves import Levelled, add_level_moves
from ppl.inference.lookahead import Lookahead
from ppl.inference.population import OnlyWeigh, blame_sites, run_population
from ppl.inference.schemes import conditional_scheme, resampler_guarantee
from ppl.inference.trace_kernel import TraceKernel, only_in_chains
from ppl.inference.validation import refuse_state, require_count, require_fraction
from ppl.kernels import resampling
from ppl.kernels.resampling.gradient import children_log_weights
from ppl.lanes import take
from ppl.posterior import Posterior
from ppl.program import Program, as_program
from ppl.replay import Rejuvenation
from ppl.selection import Selected, Weighing
from ppl.steering import Steering
from ppl.trace_space import TraceSpace

__all__ = ["SMC"]

DEFAULT_THRESHOLD = 0.5
_NO_CONDITIONAL_DERIVATIVE = (
    "a run along a given path has a derivative where the other particles draw their ancestors independently, at the "
    'weights: SMC(resampler="multinomial") without annealing and ancestor sampling.'
)


@dataclasses.dataclass(frozen=True)
class SMC(Promising):
    """Sequential Monte Carlo.

    Attributes:
        num_particles: how many particles, at least 1.
        resampler: the name of a scheme in `ppl.kernels.resampling`, or a function
            `(key, log_weights[N], num) -> int32[num]` with `E[offspring of n] = num * W_n`. A function makes the run
            "assumed" until `ppl.inference.resampler(fn, guarantee=...)` declares what it promises.
        ess_threshold: resample when the effective sample size falls below this fraction of the particles: 1.0 or more
            resamples at every iteration, 0.0 never. None is 0.5, and 1.0 for a diffusion target without a reward.
        annealing: an `EntropicAnnealing`: the temperature at which it resamples. Its published form makes the run
            heuristic.
        rejuvenation: a kernel on traces, such as `MH(..)` or `SuffixMH()`: between iterations it moves every particle's
            whole past, under the measure of what has been seen so far; the run stays unbiased. Each move replays the
            program up to its iteration. On a diffusion target `Langevin(..)`, `MALA(..)` and `HMC(..)` explore the
            present noise level instead, see `ppl.inference.level_moves`: the run is then "discretised", for they leave
            each level's density as it is, the marginal of the measure on paths as steps grow in number.
        rejuvenate_every: how many iterations lie between moves. They are made at these iterations however the weights
            look: moves where resampling was triggered would not be unbiased.
        twist: a function of the running state of a process or target, as for `Target.tilt`, in nats: what the
            algorithm expects of a particle. It steers which ones survive; what the run estimates stays the same.
        lookahead: a `Lookahead`: each particle tries the next iteration before it is chosen.
        corrector: how the steps of a diffusion target are weighed: "auto", which is `KernelRatio()`, the unbiased one;
            `FeynmanKac()`, whose increments are those of continuous time; or "none": no weights at all.
    """

    num_particles: int
    resampler: str | Callable = "systematic"
    ess_threshold: float | None = None
    annealing: EntropicAnnealing | None = None
    rejuvenation: TraceKernel | Langevin | MALA | HMC | None = None
    rejuvenate_every: int = 1
    twist: Callable | Host | None = None
    lookahead: Lookahead | None = None
    corrector: str | KernelRatio | FeynmanKac = "auto"
    _active: tuple[float, float] | None = dataclasses.field(default=None, repr=False, kw_only=True)
    _moves_levels: bool | None = dataclasses.field(default=None, repr=False, kw_only=True)  # None: not known yet

    def __post_init__(self):
        require_count("num_particles", self.num_particles)
        resampling.resolve(self.resampler)
        if self.annealing is not None and not isinstance(self.annealing, EntropicAnnealing):
            raise TypeError(f"`annealing` must be an EntropicAnnealing or None, got {self.annealing!r}.")
        if self.rejuvenation is not None and not isinstance(self.rejuvenation, TraceKernel | Langevin | MALA | HMC):
            raise TypeError(
                "`rejuvenation` must be a kernel such as MH(..), SuffixMH() or Langevin(0.1), got "
                f"{self.rejuvenation!r}."
            )
        if only_in_chains(self.rejuvenation):
            raise ValueError(
                f"`rejuvenation` {self.rejuvenation!r} leaves the measure as it is only together with the replicas "
                "that a chain carries along: run it under MCMC."
            )
        if isinstance(self.rejuvenate_every, str) or callable(self.rejuvenate_every):
            raise TypeError(
                "`rejuvenate_every` is a number of iterations, fixed beforehand: moves where resampling was triggered "
                f"bias the estimates. Got {self.rejuvenate_every!r}."
            )
        require_count("rejuvenate_every", self.rejuvenate_every)
        if self.lookahead is not None and not isinstance(self.lookahead, Lookahead):
            raise TypeError(f"`lookahead` must be a Lookahead or None, got {self.lookahead!r}.")
        if self.twist is not None and not callable(self.twist) and not isinstance(self.twist, Host | Steering):
            raise TypeError(f"`twist` must be a function, ppl.host(function) or None, got {self.twist!r}.")
        if self.corrector not in ("auto", "none") and not isinstance(self.corrector, KernelRatio | FeynmanKac):
            raise ValueError(
                f"`corrector` must be 'auto', 'none', KernelRatio() or FeynmanKac(), got {self.corrector!r}."
            )
        if self.ess_threshold is not None:
            require_fraction("ess_threshold", self.ess_threshold)

    def __repr__(self) -> str:
        fields = [f for f in dataclasses.fields(self) if f.repr]
        shown = [f for f in fields if f.name == "num_particles" or getattr(self, f.name) != f.default]
        return f"SMC({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def guarantee(self) -> str:
        """What the weights stand for: "unbiased"; less where one of the settings promises less."""
        parts = [self._corrector, self.rejuvenation]
        if isinstance(self.rejuvenation, Langevin | MALA | HMC) and self._moves_levels is not False:
            parts.append("discretised")
        if self.ess_threshold != 0.0:
            parts += [resampler_guarantee(self.resampler), self.annealing, self.lookahead]
        return promised(*parts)

    @property
    def needs_gradient(self) -> bool:
        """Whether densities are differentiated."""
        return self._moves_levels is not True and getattr(self.rejuvenation, "needs_gradient", False)

    @property
    def _corrector(self) -> KernelRatio | FeynmanKac | Uncorrected:
        if isinstance(self.corrector, str):
            return KernelRatio() if self.corrector == "auto" else Uncorrected()
        return self.corrector

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments."""
        refuse_state(self, state)
        program, algorithm = self.prepared(program)
        return run_population(program, algorithm, key, keep=keep, progress=progress)

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Repeat a run and count what each site did to the particles."""
        return blame_sites(*self.prepared(program), key)

    def prepared(self, program) -> tuple[Program, SMC]:
        """Return the program with this algorithm's twist and corrector in it, and the algorithm's defaults for it."""
        program = as_program(program)
        target = program.target
        if isinstance(self.rejuvenation, TraceKernel):
            program = self.rejuvenation.prepare(program)
        if target is None:
            if self.twist is not None:
                raise TypeError(
                    f"`twist` sees the running state of a process or a target; {program!r} is neither. In a model, add "
                    "ppl.factor(...) of the guess and take it out again."
                )
            if self.corrector != "auto":
                raise TypeError(f"`corrector` is for processes and targets; {program!r} is neither.")
            return program, self if self.rejuvenation is None else dataclasses.replace(self, _moves_levels=False)
        moves_levels = isinstance(self.rejuvenation, Langevin | MALA | HMC) and isinstance(
            getattr(target, "process", target), Levelled
        )
        changed = whole = target.combination()
        if self.twist is not None:
            changed = changed.tilt(lambda value: 0.0, twist=self.twist)
        changed = self._corrector.apply(changed)
        settings = getattr(changed.corrector, "settings", None)  # as they are for this target, its guarantee too
        algorithm = self if settings is None else dataclasses.replace(self, corrector=settings)
        if self.rejuvenation is not None:
            algorithm = dataclasses.replace(algorithm, _moves_levels=moves_levels)
        if moves_levels:
            changed = add_level_moves(self.rejuvenation, changed, self.rejuvenate_every)
        if self.ess_threshold is None and whole.process.resamples_every_step and not whole.tilts:
            algorithm = dataclasses.replace(algorithm, ess_threshold=1.0)
        if getattr(self._corrector, "active", None) is not None:
            algorithm = dataclasses.replace(algorithm, _active=active_shares(self._corrector.active, whole.process))
        self._check_parting(whole)
        if changed is whole:
            return program, algorithm
        return dataclasses.replace(changed.program(), conditions=program.conditions), algorithm

    def _check_parting(self, target) -> None:
        """Refuse to resample particles that never part again."""
        if isinstance(self.corrector, FeynmanKac) and target.process.churn == 0 and self.ess_threshold != 0.0:
            raise ValueError(
                f"at churn 0 the copies of a particle stay equal for ever, got `ess_threshold` {self.ess_threshold}: "
                "take 0.0, or a process with churn."
            )

    def rejuvenation_on(self, space: TraceSpace) -> Rejuvenation | None:
        """Return the moves between iterations on a program's traces; None where there are none."""
        if self.rejuvenation is None or self._moves_levels:
            return None
        self.rejuvenation.bind(space)  # say what does not fit before anything runs

        def move(key, sites, stop):
            moves = self.rejuvenation.bind(space.prefix(stop))

            def one(key, sites):
                init_key, step_key = jax.random.split(key)
                moved, _, info = moves.step(step_key, sites, moves.init(init_key, sites, 0))
                return moved, info["acceptance"]

            moved, acceptance = moves.over(one, jax.random.split(key, self.num_particles), sites)
            return moved, jnp.mean(acceptance)

        return Rejuvenation(move, self.rejuvenate_every)

    def selection(self) -> OnlyWeigh:
        """Return what happens at the end of an outermost iteration."""
        threshold = DEFAULT_THRESHOLD if self.ess_threshold is None else float(self.ess_threshold)
        if threshold == 0.0:
            return OnlyWeigh()
        scheme = chance.resampler(self.resampler)
        return Resampling(scheme, threshold, self.num_particles, self.annealing, self.lookahead, self._active)

    def conditional_selection(self) -> OnlyWeigh:
        """Return what happens at the end of an iteration where particle 0 follows a given path: it keeps its slot.

        Raises:
            ValueError: the resampler has no conditional form.
        """
        free = self.selection()
        if not free.may_resample:
            return free
        return dataclasses.replace(
            free, resampler=_Pinned(conditional_scheme(self.resampler), self.resampler == "multinomial")
        )

    def conditional_run(self, program, key, retained) -> Posterior:
        """Run with a path that particle 0 follows: conditional SMC.

        Source: Andrieu, Doucet and Holenstein (2010), "Particle Markov chain Monte Carlo methods", section 4.3.

        Args:
            program: a program, a process or a target.
            key: a PRNG key.
            retained: values of all its sample sites, loops' time axes leading.

        Returns:
            The posterior; its first particle is that path. If the path is an exact sample, the mean of
            1 / exp(log_evidence) over runs is 1 / Z.
        """
        program, algorithm = self.prepared(program)
        return run_population(program, algorithm, key, keep=None, progress=False, retained=retained)


@dataclasses.dataclass(frozen=True)
class _Pinned:
    """A conditional scheme as a resampler that gives slot 0 a certain ancestor: particle 0, where none is named."""

    scheme: Callable
    independent: bool  # whether the other slots draw their ancestors independently

    def __call__(self, key, log_weights, num, retained=0):
        return self.scheme(key, log_weights, retained, num)


@dataclasses.dataclass(frozen=True)
class Resampling(OnlyWeigh):
    """The selection step (2)."""

    resampler: Callable
    threshold: float
    num_particles: int
    annealing: EntropicAnnealing | None = None
    lookahead: Lookahead | None = None
    active: tuple[float, float] | None = None  # shares of the loop's iterations
    may_resample: ClassVar[bool] = True

    @property
    def anneals(self) -> bool:
        """Whether ancestors are drawn at a temperature."""
        return self.annealing is not None

    @property
    def looks_ahead(self) -> bool:
        """Whether the next iteration is tried before choosing."""
        return self.lookahead is not None

    def foresee(self, increments):
        """Return the log of the first-stage weights `[N]` that a trial's increments give."""
        return self.lookahead.first_stage(increments)

    def due(self, weighing: Weighing, progress):
        """Return whether to resample; at a threshold of 1 or more always, for float32 may round the ESS above N."""
        low = True if self.threshold >= 1.0 else weighing.ess < self.threshold * self.num_particles
        if self.active is None:
            return low
        return (self.active[0] <= progress) & (progress <= self.active[1]) & low

    def select(self, key, log_weights, weighing: Weighing, progress, retained=None) -> Selected:
        """Return ancestors, their children's weights, and the log of the mean weight that is taken out."""
        if self.annealing is None:
            drawn_from, kept, temperature = log_weights, None, 1.0
            log_mass = weighing.log_sum - jnp.log(float(self.num_particles))
        else:
            tempered = temper(self.annealing, log_weights, weighing, progress)
            drawn_from, kept, log_mass, temperature = tempered
        all_dead = jnp.isneginf(weighing.log_sum)
        pinned = {} if retained is None else {"retained": retained}
        ancestors = self.resampler(key, lax.stop_gradient(drawn_from), self.num_particles, **pinned)
        stay = jnp.arange(self.num_particles, dtype=jnp.int32)
        ancestors = jnp.where(all_dead, stay, jnp.asarray(ancestors, jnp.int32))

        is_conditional = isinstance(self.resampler, _Pinned)
        if is_conditional and not (self.resampler.independent and kept is None and retained is None):
            log_weights = refuse(log_weights, _NO_CONDITIONAL_DERIVATIVE)

        def children(ancestors):
            start = children_log_weights(log_weights, ancestors, pinned=is_conditional)
            if kept is not None:
                start = start + take(lax.stop_gradient(kept), ancestors)
            return jnp.where(all_dead, log_weights, start)

        return Selected(ancestors, children, jnp.where(all_dead, 0.0, lax.stop_gradient(log_mass)), temperature)
