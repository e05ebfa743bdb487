"""Suffixes of a trace drawn anew: Metropolis-Hastings for texts, and for whatever else is written in a loop.

    t ~ uniform on the iterations S(x) that are present in x,   L(x) = |S(x)|                                      (1)
    x' = x before t, and from t on drawn from the program's laws, or the proposals of its `ppl.sample` statements
    accept with  min(1, w(x') / w(x) * L(x) / L(x')),   w = gamma / q of the entries from t on                     (2)

L(x) / L(x') is the ratio of the probabilities of choosing t, which is exact where a loop's `until` makes lengths vary.
All that (2) needs of the old trace is the sum W of `ppl.resume`. Iteration t is present in x' if it is in x, as far as
the loops themselves decide; where inner loops decide, a move that could not be undone is refused.

Power sampling of text: on `lm.complete(prompt, max_tokens=T) ** alpha` (2) draws each token from the model's law to the
power alpha, made to sum to one, constraints included, which is the proposal of least variance of one step. As published
the text is written in blocks of B tokens, each followed by n moves that leave `p(prefix) ** alpha` as it is; here

    SMC(num_particles=1, rejuvenation=Repeat(SuffixMH(), n), rejuvenate_every=B)

does the same, with the weights that make any number of particles stand for the whole text's `p ** alpha`.

Sources: Karan and Du (2025), "Reasoning with Sampling: Your Base Model is Smarter Than You Think", arXiv 2510.14901;
Faria et al. (2024), "QUEST: Quality-Aware Metropolis-Hastings Sampling for Machine Translation", arXiv 2406.00049. Both
have fixed lengths in mind; (2) has the factor for others, and sums of log-probabilities, not means.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ppl import chance
from ppl.errors import SiteTypeError
from ppl.inference.metropolis_hastings import acceptance
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.inference.validation import require_count
from ppl.ir import Draw, Loop
from ppl.resume import Checkpoint, ResumableInterpreter
from ppl.trace_space import TraceSpace

__all__ = ["SuffixMH"]


@dataclasses.dataclass(frozen=True)
class SuffixMH(TraceKernel):
    """Draw a trace anew from a random iteration of its loops on.

    Iterations are those of the outermost loops that hold free sample sites, one after another. What stands before them
    stays; what comes after the chosen iteration, later loops and sites included, is drawn anew.

    Attributes:
        block: only every so many iterations of each loop may be chosen; None for all. Larger blocks draw more in a
            step.

    For instance `MCMC(SuffixMH(), num_samples=100, num_chains=4)` on `lm.complete("Once", max_tokens=24) ** 4.0`.
    """

    block: int | None = None
    guarantee: ClassVar[str] = "invariant"

    def __post_init__(self):
        super().__post_init__()
        if self.block is not None:
            require_count("block", self.block)

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`.

        Raises:
            SiteTypeError: no loop of the program holds a free sample site.
        """
        return _Suffixes(self, space)


class _Memory(NamedTuple):
    """What is known of the present trace: W, which iterations may be chosen, and how they began."""

    log_weight: Any
    choices: Any
    checkpoint: Checkpoint | None


class _Segment(NamedTuple):
    """An outermost loop with sites: its first iteration counted through, and whether a prefix holds any of it."""

    loop: Loop
    start: int
    names: frozenset[str]
    active: Any


class _Suffixes(Moves):
    def __init__(self, kernel: SuffixMH, space: TraceSpace):
        self.space = space
        self.segments: list[_Segment] = []
        self.after: dict[str, tuple[int, Any]] = {}  # sites outside of loops: iterations before, whether they count
        self._read_program()
        if not self.segments:
            raise SiteTypeError(
                f"SuffixMH needs a ppl.scan with free sample sites in it; the free sites are {sorted(space.sites)}, "
                "none of them in a loop. Draw them anew with Regenerate(sites)."
            )
        first = self.segments[0]
        self.length = sum(segment.loop.length for segment in self.segments)
        every = kernel.block or 1
        offsets = [jnp.arange(segment.loop.length) % every == 0 for segment in self.segments]
        self.eligible = jnp.concatenate(offsets)
        in_loops = frozenset().union(*(segment.names for segment in self.segments))
        later = {name for name, (before, _) in self.after.items() if before > 0}
        self.sites = tuple(name for name in space.sites if name in in_loops or name in later)
        self.resumable = first.loop if len(self.segments) == 1 else None

    def _read_program(self) -> None:
        """Find the outermost loops with sites, and the sites outside of them."""
        before, steps, stop = 0, 0, self.space.stop  # `steps` counts as `stop` does
        for node in self.space.staged.block.nodes:
            active = True if stop is None or steps == 0 else stop > steps
            if isinstance(node, Draw) and node.name in self.space.sites:
                self.after[node.name] = before, active
            if not isinstance(node, Loop):
                continue
            names = node.body.names & self.space.sites.keys()
            if names and node.length:
                self.segments.append(_Segment(node, before, names, active))
                before += node.length
            if node.resamples:
                steps += node.length

    def init(self, key, sites, num_warmup):
        """Return what is known of a trace; see `_Memory`."""
        return self._run(sites)[1]

    def refresh(self, key, sites, memory):
        """Return what is known of a trace; see `_Memory`."""
        return self._run(sites)[1]

    def log_weight(self, memory):
        """Return W."""
        return memory.log_weight

    def step(self, key, sites, memory):
        """Choose an iteration, draw anew from there, and accept by (2)."""
        index_key, draw_key, accept_key = jax.random.split(key, 3)
        count = jnp.sum(memory.choices)
        place = chance.index(index_key, jnp.maximum(count, 1))
        time = jnp.searchsorted(jnp.cumsum(memory.choices), place + 1)  # `self.length` where nothing is present
        proposed, new = self._run(sites, draw_key, time, memory.checkpoint)
        log_ratio = new.log_weight - memory.log_weight
        log_ratio += jnp.log(count / jnp.maximum(jnp.sum(new.choices), 1))
        returns = new.choices[jnp.minimum(time, self.length - 1)]
        log_ratio = jnp.where(returns, log_ratio, -jnp.inf)
        accepted = chance.accept(accept_key, log_ratio)
        after = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), (proposed, new), (dict(sites), memory))
        return *after, {"acceptance": acceptance(log_ratio)}

    def _run(self, sites, key=None, time=None, checkpoint: Checkpoint | None = None):
        """Run a trace as it is, or drawn anew from an iteration on; returns its sites and what is known of it."""
        space, left = self.space, {}
        interpreter = ResumableInterpreter(
            keep=frozenset(space.sites),
            as_drawn=frozenset(self.sites),
            loop=self.resumable,
            first=time,
            checkpoint=checkpoint,
            left=left,
            power=space.power,
            powered=space.powered,
        )
        redrawn = {} if time is None else self._masks(time)
        given = {**space.given, **sites}
        result = interpreter.run(space.staged.block, space.inputs, key, given, redrawn=redrawn, stop=space.stop)
        new = {name: lane.array for name, lane in result.sites.items()}
        return new, _Memory(result.log_weights, self._choices(result), left.get("checkpoint"))

    def _masks(self, time) -> dict[str, Any]:
        """Return which entries of each site are drawn anew from an iteration on."""
        masks = {}
        for segment in self.segments:
            later = segment.start + jnp.arange(segment.loop.length) >= time
            for name in segment.names:
                shape = self.space.sites[name].time_shape
                masks[name] = jnp.broadcast_to(later.reshape(-1, *(1,) * (len(shape) - 1)), shape)
        for name, (before, active) in self.after.items():
            if before > 0:
                masks[name] = (before > time) & active
        return masks

    def _choices(self, result) -> Any:
        """Return which iterations may be chosen: those of S(x) that the blocks allow, `bool[length]`."""
        flags = []
        for segment in self.segments:
            masks = [result.present[name] for name in segment.names]
            here = jnp.zeros(segment.loop.length, bool)
            for mask in masks:
                here |= True if mask is None else jnp.any(mask.array.reshape(segment.loop.length, -1), axis=1)
            flags.append(here & segment.active)
        return jnp.concatenate(flags) & self.eligible
