"""Kernels on traces: what all of them offer, and what runs them may rely on.

A kernel K(x, dx') leaves the program's posterior pi as it is: pi K = pi. It is a small frozen description; bound to the
space of a program's traces it gives the `Moves` that chains and populations make. Moves are written for one trace:

    memory = moves.init(key, x, num_warmup)       what the kernel remembers of x, and its tuning
    x, memory, info = moves.step(key, x, memory)  the first `num_warmup` steps tune, the later ones do not
    memory = moves.refresh(key, x, memory)        after somebody else has changed x
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ppl.guarantees import Promising
from ppl.trace_space import TraceSpace

__all__ = ["Moves", "TraceKernel", "only_in_chains"]


class Moves(abc.ABC):
    """A kernel bound to the traces of a program.

    Attributes:
        sites: the names of the sites that it may change.
        sequential: whether a step runs a population; see `over`.
    """

    sites: tuple[str, ...]
    sequential: bool = False

    def init(self, key, sites: dict[str, Any], num_warmup: int) -> Any:
        """Return the memory at a trace: a pytree of arrays.

        Args:
            key: a PRNG key.
            sites: the trace.
            num_warmup: how many steps will tune.
        """
        del key, sites, num_warmup
        return ()

    @abc.abstractmethod
    def step(self, key, sites: dict[str, Any], memory: Any) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """Return the next trace, the memory at it, and `info`: at least `acceptance`, in [0, 1]."""

    def refresh(self, key, sites: dict[str, Any], memory: Any) -> Any:
        """Return the memory at a trace that was changed by somebody else; the tuning is kept."""
        del key, sites
        return memory

    def log_weight(self, memory: Any) -> Any:
        """Return by what log-weight a memory knows its trace, a scalar: where it is NaN or +inf no step moves it."""
        del memory
        return jnp.zeros(())

    def over(self, function: Callable, *arguments: Any) -> Any:
        """Map a function that makes moves over the leading axes of its arguments, pytrees of arrays.

        Moves are made side by side; those that run populations one after another, for under `jax.vmap` each would pay
        for every branch.
        """
        if self.sequential:
            return jax.lax.map(lambda row: function(*row), arguments)
        return jax.vmap(function)(*arguments)


def only_in_chains(kernel: Any) -> bool:
    """Whether a kernel, or a part of it, leaves the measure as it is only together with what a chain carries along."""
    parts = getattr(kernel, "kernels", ())
    return getattr(kernel, "only_in_chains", False) or any(map(only_in_chains, parts))


class TraceKernel(Promising, abc.ABC):
    """A kernel on traces. Subclasses are frozen dataclasses, hashable: a list among their settings becomes a tuple.

    Attributes:
        guarantee: "invariant", or less; see `ppl.guarantees`. Nothing is known of a kernel of your own until its class
            declares it: `guarantee = "invariant"`, which `ppl.testing.assert_invariant` checks.
        needs_gradient: whether densities are differentiated.
        only_in_chains: see the function of that name.
    """

    guarantee: ClassVar[str] = "assumed"
    needs_gradient: ClassVar[bool] = False
    only_in_chains: ClassVar[bool] = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))

    def prepare(self, program: Any) -> Any:
        """Return the program that chains run: the same measure on traces, as this kernel's parts want it."""
        return program

    @abc.abstractmethod
    def bind(self, space: TraceSpace) -> Moves:
        """Return the moves on a program's traces.

        Raises:
            SiteValueError: the kernel's sites are none of the program's.
            SiteTypeError: they are of a kind that it cannot move.
        """
