"""Markov chain Monte Carlo: a kernel on traces, again and again.

    x_0 ~ a start of positive density,   x_(i+1) ~ K(x_i, .),   pi K = pi                                          (1)

    E_pi[f] is estimated by the mean of f over the draws after warm-up, of all chains.

Chains start from draws of the program, one of `num_starts` chosen by its importance weight; the kernel must be able to
change every free site. The first `num_warmup`
steps tune the kernel and are not kept. Iteration i of a chain draws from its key folded with i, so that a chain that is
continued from `posterior.state` goes on as if it had never stopped.

All chains run side by side in one compiled loop; kernels that hold populations take them one after another.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ppl import progress as progress_bar
from ppl import runners
from ppl.diagnostics import smallest_bulk_ess
from ppl.display import brief
from ppl.guarantees import Promising, promised
from ppl.inference.population import OnlyWeigh
from ppl.inference.reach import require_reach
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.inference.validation import require_count
from ppl.interpret import Interpreter
from ppl.ir import evaluate_fixed
from ppl.kernels.weights import summarize
from ppl.posterior import Outcome, Posterior, Status
from ppl.program import Program, Staged, as_program, kept_sites
from ppl.trace_space import TraceSpace

__all__ = ["MCMC", "ChainState"]

_ROWS = 128  # draws whose values are computed at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChainState:
    """Where chains stand: what continues them.

    Attributes:
        sites: the traces, `[num_chains, ...]` by name.
        memory: what the kernel remembers of each chain.
        keys: the chains' PRNG keys, `[num_chains]`.
        iteration: how many steps each has made, warm-up included.
        kernel: the kernel as it prints.
    """

    sites: dict[str, Any]
    memory: Any
    keys: Any
    iteration: Any
    kernel: str = dataclasses.field(default="", metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class MCMC(Promising):
    """Run chains of a kernel.

    Attributes:
        kernel: a kernel on traces, such as `NUTS()`, `ParticleGibbs(SMC(100))`, `Sequence(..)`.
        num_samples: how many draws of each chain are kept.
        num_warmup: how many steps come before, in which the kernel tunes itself. Kernels that tune nothing need them
            only to forget the start.
        num_chains: how many chains.
        thinning: how many steps are made for each draw that is kept.
        num_starts: from how many draws of the program the start of each chain is chosen. None is 16, and 1 for
            processes and targets.
    """

    kernel: TraceKernel
    num_samples: int
    num_warmup: int = 0
    num_chains: int = 1
    thinning: int = 1
    num_starts: int | None = None

    def __post_init__(self):
        if not isinstance(self.kernel, TraceKernel):
            raise TypeError(
                "`kernel` must be a kernel on traces, such as MH(..), NUTS() or ParticleGibbs(SMC(100)), got "
                f"{self.kernel!r}."
            )
        for name in ("num_samples", "num_chains", "thinning"):
            require_count(name, getattr(self, name))
        if self.num_warmup != 0 or isinstance(self.num_warmup, bool):
            require_count("num_warmup", self.num_warmup)
        if self.num_starts is not None:
            require_count("num_starts", self.num_starts)

    def __repr__(self) -> str:
        return brief(self)

    @property
    def guarantee(self) -> str:
        """What the draws stand for: "invariant", unless the kernel promises less."""
        return promised(self.kernel, chain=True)

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments. `state` is `posterior.state` of a run of the same kernel."""
        program = self.kernel.prepare(as_program(program))
        staged = program.stage(keep_rules=self.kernel.needs_gradient)
        keep = kept_sites(staged, keep)
        space = TraceSpace(staged, differentiable=self.kernel.needs_gradient)
        moves = self.kernel.bind(space)
        require_reach(self, self.kernel, moves, space)  # say early what does not fit
        more = () if state is None else (self._checked(state, space, moves),)
        show = progress_bar.wanted(progress) and not runners.is_traced((staged.inputs, staged.given, key, more))
        with progress_bar.showing(show):
            num_starts = self._starts(program)
            purpose = (self, "continue" if more else "run", keep, show, num_starts)
            posterior = runners.run(staged, purpose, self._runner(num_starts, keep, show), key, *more)
            if show:
                jax.block_until_ready(posterior.log_weights)
        if not runners.is_traced(posterior.log_weights):
            ess = smallest_bulk_ess(posterior.sites or posterior.value, self.num_chains)
            posterior = dataclasses.replace(posterior, ess=jnp.float32(ess))
        return dataclasses.replace(posterior, decode=program.decode)

    def blame(self, program, key) -> dict[str, dict[str, Any]]:
        """Repeat the draws that chains start from and count what each site did to them."""
        program = self.kernel.prepare(as_program(program))
        num_starts = self._starts(program)
        staged = program.stage(keep_rules=False)

        def run(staged: Staged, inputs, given, key):
            space = TraceSpace(staged, inputs, given)
            return _blame(space, _start_keys(key, self.num_chains), num_starts)

        return runners.run(staged, (self, "blame", num_starts), run, key)

    def _starts(self, program: Program) -> int:
        if self.num_starts is not None:
            return self.num_starts
        return 16 if program.target is None else 1

    def _checked(self, state: Any, space: TraceSpace, moves: Moves) -> ChainState:
        """Return a state that continues chains of this kernel on this program, or say what does not fit."""
        if not isinstance(state, ChainState):
            raise TypeError(f"`state` must be `posterior.state` of an earlier chain, got {type(state).__name__}.")
        if state.kernel != repr(self.kernel):
            raise ValueError(f"`state` belongs to chains of {state.kernel}, this is {self.kernel!r}.")
        if state.keys.shape[0] != self.num_chains:
            raise ValueError(f"`state` holds {state.keys.shape[0]} chains, `num_chains` is {self.num_chains}.")
        theirs = {name: (str(x.dtype), x.shape[1:]) for name, x in state.sites.items()}
        ours = {name: (str(t.dtype), t.shape) for name, t in space.site_types.items()}
        if theirs != ours:
            different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
            shown = ", ".join(
                f"{n!r} {_described(theirs.get(n))} there, {_described(ours.get(n))} here" for n in different
            )
            raise ValueError(f"`state` belongs to chains of another program: {shown}.")
        return dataclasses.replace(state, kernel="")

    def _runner(self, num_starts: int, keep: frozenset[str], show: bool):
        def run(staged: Staged, inputs, given, key, state: ChainState | None = None) -> Posterior:
            block, inputs = evaluate_fixed(staged.block, inputs)  # once, not in every step
            staged = dataclasses.replace(staged, block=block)
            space = TraceSpace(staged, inputs, given, differentiable=self.kernel.needs_gradient)
            moves = self.kernel.bind(space)
            outcome = jnp.int32(Outcome.OK)
            first = self.num_warmup
            if state is None:
                state, outcome = _start(space, moves, key, self.num_chains, num_starts, self.num_warmup)
            else:
                first = 0
            state, (traces, info) = self._iterate(moves, state, first, show)
            total = self.num_chains * self.num_samples
            draws = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(total, *a.shape[2:]), traces)
            value, sites, present = jax.lax.map(lambda x: space.outcome(x, keep), draws, batch_size=_ROWS)
            return Posterior(
                value=value,
                sites=sites,
                present=present,
                log_weights=jnp.full(total, -jnp.log(float(total))),
                log_evidence=jnp.float32(jnp.nan),
                ess=jnp.float32(jnp.nan),
                diagnostics={"ess": jnp.zeros(0), "resampled": jnp.zeros(0, bool)}
                | jax.tree.map(lambda figure: jnp.moveaxis(figure, 0, 1), info),
                status=Status(outcome, jnp.int32(-1)),
                state=dataclasses.replace(state, kernel=repr(self.kernel)),
                guarantee=promised(staged, self, chain=True),
                algorithm=repr(self),
                num_chains=self.num_chains,
            )

        return run

    def _iterate(self, moves: Moves, state: ChainState, num_warmup: int, show: bool):
        """Run all steps; returns the last state and the kept traces and figures, `[num_samples, num_chains, ...]`."""
        total = num_warmup + self.num_samples * self.thinning

        def step(key, iteration, sites, memory):
            return moves.step(jax.random.fold_in(key, iteration), sites, memory)

        def steps(chains, first, last):
            def one(i, carry):
                sites, memory, sums = carry
                iterations = jnp.broadcast_to(state.iteration + i, (self.num_chains,))
                sites, memory, info = moves.over(step, state.keys, iterations, sites, memory)
                if show:
                    progress_bar.report(i, total, jnp.mean(info["acceptance"]), "acceptance")
                return sites, memory, jax.tree.map(jnp.add, sums, info)

            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), info_types)
            return jax.lax.fori_loop(first, last, one, (*chains, zeros))

        chains = state.sites, state.memory
        iterations = jnp.zeros(self.num_chains, jnp.int32)
        info_types = jax.eval_shape(lambda *c: moves.over(step, *c)[2], state.keys, iterations, *chains)

        def row(chains, number):
            # Row 0 is the warm-up; what it leaves is thrown away, and one loop serves both.
            first = jnp.where(number == 0, 0, num_warmup + (number - 1) * self.thinning)
            sites, memory, sums = steps(chains, first, num_warmup + number * self.thinning)
            return (sites, memory), (sites, jax.tree.map(lambda a: a / self.thinning, sums))

        (sites, memory), rows = jax.lax.scan(row, chains, jnp.arange(self.num_samples + 1))
        state = ChainState(sites, memory, state.keys, state.iteration + total)
        return state, jax.tree.map(lambda a: a[1:], rows)


def _start(space: TraceSpace, moves: Moves, key, num_chains: int, num_starts: int, num_warmup: int):
    """Return the state of chains at traces of positive density, and an `Outcome`: whether all have one."""
    _, init_key, chain_key = jax.random.split(key, 3)

    def start(key):
        sites, log_sum, _ = _drawn(space, key, num_starts)
        return sites, _is_invalid(log_sum), jnp.isneginf(log_sum)

    sites, invalid, dead = moves.over(start, _start_keys(key, num_chains))
    keys = jax.random.split(init_key, num_chains)
    memory = moves.over(lambda key, sites: moves.init(key, sites, num_warmup), keys, sites)
    state = ChainState(sites, memory, jax.random.split(chain_key, num_chains), jnp.int32(0))
    # A chain that cannot weigh where it stands refuses every move.
    log_weights = moves.over(lambda key, memory: moves.log_weight(memory), keys, memory)
    invalid |= ~dead & _is_invalid(log_weights)
    outcome = jnp.where(jnp.any(dead), Outcome.ALL_DIED, Outcome.OK)
    return state, jnp.where(jnp.any(invalid), Outcome.INVALID_WEIGHT, outcome).astype(jnp.int32)


def _described(type_: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if type_ is None else f"{type_[0]}[{','.join(map(str, type_[1]))}]"


def _drawn(space: TraceSpace, key, num_starts: int, **options: Any) -> tuple[dict[str, Any], Any, Any]:
    """Return one of several draws of the program, chosen by its weight, their log-sum, and the run."""
    run_key, choice_key = jax.random.split(key)
    result = space.population(run_key, num_starts, OnlyWeigh(), **options)
    chosen = jax.random.categorical(choice_key, result.log_weights)
    sites = {n: lane.array[chosen] if lane.random else lane.array for n, lane in result.sites.items()}
    return sites, summarize(result.log_weights)[0], result


def _blame(space: TraceSpace, keys, num_starts: int) -> dict[str, dict[str, Any]]:
    """Return what each site did to the draws that chains start from, and to the joint density of the chosen ones."""

    def one(key):
        sites, log_sum, result = _drawn(space, key, num_starts, blame=True)
        joint = Interpreter(weigh_draws=True, blame=True).run(
            space.staged.block, space.inputs, None, {**space.given, **sites}
        )
        later = jnp.isfinite(log_sum)

        def total(name, kind, count):
            if kind == "start":
                return jnp.asarray(count)
            return later * count + (result.blame[name][kind] if name in result.blame else 0)

        return {
            name: {kind: total(name, kind, count) for kind, count in counts.items()}
            for name, counts in joint.blame.items()
        }

    total = {}
    for name, counts in jax.lax.map(one, keys).items():
        total[name] = {kind: count[0] if kind == "start" else jnp.sum(count, axis=0) for kind, count in counts.items()}
    return total


def _start_keys(key, num_chains: int) -> Any:
    """Return the keys `[num_chains]` of the draws that chains start from."""
    return jax.random.split(jax.random.split(key, 3)[0], num_chains)


def _is_invalid(log_weight) -> Any:
    return jnp.isnan(log_weight) | jnp.isposinf(log_weight)
