"""Kernels out of kernels: one after another, one again and again, one of several by chance.

    Sequence(K1, K2)        K1 K2                                                                                 (1)
    Repeat(K, n)            K^n                                                                                   (2)
    Mixture(K1, K2)         p1 K1 + p2 K2                                                                         (3)

Each leaves pi as it is if its parts do (Tierney 1994, "Markov chains for exploring posterior distributions", section
2.4). Every part has a memory of its own, which holds for the trace that it saw last: a part whose trace others have
changed is refreshed before its next step, and only then.

In warm-up a `Mixture` takes its parts in a fixed order, each as often as its probability says, so that every part has
tuned for as many steps as it was told when warm-up ends.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl import chance
from ppl.guarantees import promised
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.inference.validation import require_count
from ppl.trace_space import TraceSpace

__all__ = ["Mixture", "Repeat", "Sequence"]


class _Composition(TraceKernel):
    """What compositions have of their parts."""

    kernels: tuple[TraceKernel, ...]

    @property
    def guarantee(self) -> str:
        """The weakest promise of the parts."""
        return promised(*self.kernels, chain=True)

    @property
    def needs_gradient(self) -> bool:
        """Whether a part differentiates the density."""
        return any(kernel.needs_gradient for kernel in self.kernels)

    def prepare(self, program: Any) -> Any:
        """Return the program as all parts want it."""
        return functools.reduce(lambda program, kernel: kernel.prepare(program), self.kernels, program)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Sequence(_Composition):
    """Take steps of several kernels, one after another: (1).

    Attributes:
        kernels: the kernels, in order, given as `Sequence(k1, k2, ..)`.
    """

    kernels: tuple[TraceKernel, ...]

    def __init__(self, *kernels: TraceKernel):
        object.__setattr__(self, "kernels", _checked("Sequence", kernels))

    def __repr__(self) -> str:
        return f"Sequence({', '.join(map(repr, self.kernels))})"

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`."""
        return _SequenceMoves(self, space)


@dataclasses.dataclass(frozen=True)
class Repeat(_Composition):
    """Take several steps of a kernel: (2).

    Attributes:
        kernel: the kernel.
        num_steps: n, how many steps.
    """

    kernel: TraceKernel
    num_steps: int

    def __post_init__(self):
        _checked("Repeat", (self.kernel,))
        require_count("num_steps", self.num_steps)

    @property
    def kernels(self) -> tuple[TraceKernel, ...]:
        """The one part."""
        return (self.kernel,)

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`."""
        return _RepeatMoves(self.kernel.bind(space), self.num_steps)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Mixture(_Composition):
    """Take a step of one of several kernels, chosen by chance: (3).

    Attributes:
        kernels: the kernels, given as `Mixture(k1, k2, ..)`.
        probabilities: p, as many, positive; they are normalised. None for equal ones.
    """

    kernels: tuple[TraceKernel, ...]
    probabilities: tuple[float, ...] | None

    def __init__(self, *kernels: TraceKernel, probabilities: Any = None):
        if len(kernels) == 1 and isinstance(kernels[0], list | tuple):
            kernels = tuple(kernels[0])
        object.__setattr__(self, "kernels", _checked("Mixture", kernels))
        object.__setattr__(self, "probabilities", _checked_probabilities(probabilities, len(kernels)))

    def __repr__(self) -> str:
        chances = "" if self.probabilities is None else f", probabilities={self.probabilities}"
        return f"Mixture({', '.join(map(repr, self.kernels))}{chances})"

    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves; see `TraceKernel.bind`."""
        return _MixtureMoves(self, space)


class _SequenceMoves(Moves):
    def __init__(self, kernel: Sequence, space: TraceSpace):
        self.parts = tuple(part.bind(space) for part in kernel.kernels)
        self.sites, self.sequential = _shared(self.parts, space)

    def init(self, key, sites, num_warmup):
        """Return the parts' memories."""
        keys = jax.random.split(key, len(self.parts))
        return tuple(part.init(k, sites, num_warmup) for k, part in zip(keys, self.parts, strict=True))

    def step(self, key, sites, memory):
        """Take a step of each part; those that others have left behind look at the trace anew before it."""
        memories, infos = [], []
        keys = jax.random.split(key, (len(self.parts), 2))
        for i, (part, (refresh_key, step_key), part_memory) in enumerate(zip(self.parts, keys, memory, strict=True)):
            if any(other.sites for j, other in enumerate(self.parts) if j != i):
                part_memory = part.refresh(refresh_key, sites, part_memory)
            sites, part_memory, info = part.step(step_key, sites, part_memory)
            memories.append(part_memory)
            infos.append(info)
        figures = {f"{name}/{i}": figure for i, info in enumerate(infos) for name, figure in info.items()}
        acceptance = jnp.mean(jnp.stack([info["acceptance"] for info in infos]))
        return sites, tuple(memories), {"acceptance": acceptance} | figures

    def log_weight(self, memory):
        """Return the sum of the parts', which all look at the trace."""
        return sum(p.log_weight(m) for p, m in zip(self.parts, memory, strict=True))

    def refresh(self, key, sites, memory):
        """Look at the trace anew, where a step would not do so."""
        if len(self.parts) > 1 and all(part.sites for part in self.parts):
            return memory
        keys = jax.random.split(key, len(self.parts))
        return tuple(part.refresh(k, sites, m) for k, part, m in zip(keys, self.parts, memory, strict=True))


class _RepeatMoves(Moves):
    def __init__(self, part: Moves, num_steps: int):
        self.part, self.num_steps = part, num_steps
        self.sites, self.sequential = part.sites, part.sequential

    def init(self, key, sites, num_warmup):
        """Return the part's memory; it tunes in every one of the steps of warm-up."""
        return self.part.init(key, sites, num_warmup * self.num_steps)

    def step(self, key, sites, memory):
        """Take the steps; figures are their means."""

        def one(carry, key):
            sites, memory, info = self.part.step(key, *carry)
            return (sites, memory), info

        (sites, memory), infos = jax.lax.scan(one, (dict(sites), memory), jax.random.split(key, self.num_steps))
        return sites, memory, jax.tree.map(lambda a: jnp.mean(a, axis=0, dtype=jnp.float32), infos)

    def log_weight(self, memory):
        """Return the part's."""
        return self.part.log_weight(memory)

    def refresh(self, key, sites, memory):
        """Refresh the part."""
        return self.part.refresh(key, sites, memory)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _MixtureMemory:
    """The parts' memories; `fresh`: which one has seen the trace, -1 for all, -2 for none; steps made, and to tune."""

    parts: tuple[Any, ...]
    fresh: Any
    iteration: Any
    num_warmup: int = dataclasses.field(metadata={"static": True})


class _MixtureMoves(Moves):
    def __init__(self, kernel: Mixture, space: TraceSpace):
        self.parts = tuple(part.bind(space) for part in kernel.kernels)
        self.sites, self.sequential = _shared(self.parts, space)
        weights = np.asarray(kernel.probabilities or [1.0] * len(self.parts))
        self.probabilities = weights / weights.sum()

    def order(self, num_warmup: int) -> np.ndarray:
        """Return which part takes each step of warm-up, `int32[num_warmup]`: always the one most behind its share."""
        counts, order = np.zeros(len(self.parts)), np.zeros(num_warmup, np.int32)
        for i in range(num_warmup):
            order[i] = np.argmax(self.probabilities * (i + 1) - counts)
            counts[order[i]] += 1
        return order

    def init(self, key, sites, num_warmup):
        """Return the parts' memories."""
        keys = jax.random.split(key, len(self.parts))
        counts = np.bincount(self.order(num_warmup), minlength=len(self.parts))
        parts = [part.init(k, sites, int(count)) for k, part, count in zip(keys, self.parts, counts, strict=True)]
        return _MixtureMemory(tuple(parts), jnp.int32(-1), jnp.int32(0), num_warmup)

    def step(self, key, sites, memory):
        """Choose a part and take a step of it."""
        choice_key, refresh_key, step_key = jax.random.split(key, 3)
        chosen = chance.categorical(choice_key, jnp.log(jnp.asarray(self.probabilities, jnp.float32)))
        if memory.num_warmup > 0:
            order = jnp.asarray(self.order(memory.num_warmup))
            in_order = order[jnp.minimum(memory.iteration, memory.num_warmup - 1)]
            chosen = jnp.where(memory.iteration < memory.num_warmup, in_order, chosen)
        stale = (memory.fresh != chosen) & (memory.fresh != -1)

        def taken(i, part):
            def take(sites, parts):
                old = parts[i]
                part_memory = jax.lax.cond(stale, lambda: part.refresh(refresh_key, sites, old), lambda: old)
                sites, part_memory, info = part.step(step_key, sites, part_memory)
                return sites, (*parts[:i], part_memory, *parts[i + 1 :]), info["acceptance"]

            return take

        branches = [taken(i, part) for i, part in enumerate(self.parts)]
        sites, parts, acceptance = jax.lax.switch(chosen, branches, dict(sites), memory.parts)
        memory = dataclasses.replace(memory, parts=parts, fresh=chosen, iteration=memory.iteration + 1)
        return sites, memory, {"acceptance": acceptance}

    def log_weight(self, memory):
        """Return the sum of the parts', which all look at the trace."""
        return sum(p.log_weight(m) for p, m in zip(self.parts, memory.parts, strict=True))

    def refresh(self, key, sites, memory):
        """Mark all parts as left behind."""
        return dataclasses.replace(memory, fresh=jnp.full_like(memory.fresh, -2))


def _shared(parts: tuple[Moves, ...], space: TraceSpace) -> tuple[tuple[str, ...], bool]:
    """Return all sites that parts move, and whether chains must go one after another."""
    sites = {name for part in parts for name in part.sites}
    return tuple(name for name in space.sites if name in sites), any(part.sequential for part in parts)


def _checked(title: str, kernels: tuple) -> tuple[TraceKernel, ...]:
    if not kernels:
        raise ValueError(f"`{title}` needs at least one kernel.")
    for kernel in kernels:
        if not isinstance(kernel, TraceKernel):
            raise TypeError(f"`{title}` composes kernels on traces, such as MH(..) or NUTS(), got {kernel!r}.")
    return tuple(kernels)


def _checked_probabilities(probabilities: Any, count: int) -> tuple[float, ...] | None:
    if probabilities is None:
        return None
    if isinstance(probabilities, numbers.Number) or len(probabilities) != count:
        raise ValueError(f"`probabilities` must be {count} numbers, one for each kernel, got {probabilities!r}.")
    values = tuple(float(p) for p in probabilities)
    if not all(0 < p < math.inf for p in values):
        raise ValueError(f"`probabilities` must be positive and finite, got {probabilities!r}.")
    return values
