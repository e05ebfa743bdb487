"""Python functions inside a run: called once for all particles.

A host function sees the whole population at once: for text the list of texts, one per particle, else the values with a
leading particle axis. The compiled run waits for it, so that its cost is the function's own and one round trip a call.

What goes wrong in it cannot be raised inside a compiled run: the exception is kept, the weight becomes NaN, and
`ppl.infer` raises the exception with the site's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Host", "HostError", "host", "population", "record_failure"]


class HostError(RuntimeError):
    """A host function raised, or returned what is no vector of log-weights."""


@dataclasses.dataclass(frozen=True)
class Host:
    """A Python function of all particles; see `host`."""

    function: Callable

    def __call__(self, site: str, read: Callable | None, value: Any):
        """Apply the function to one particle's value inside a program; returns a scalar float32.

        Args:
            site: what to name in errors.
            read: turns values with a leading particle axis into texts; None hands the values on.
            value: a pytree of arrays.
        """
        leaves, tree = jax.tree.flatten(value)
        call = _Call(self.function, site, read, tree, tuple(jnp.ndim(leaf) for leaf in leaves))
        return jax.pure_callback(call, jax.ShapeDtypeStruct((), jnp.float32), *leaves, vmap_method="expand_dims")


def host(function: Callable) -> Host:
    """Let a Python function be a log-reward or a twist: it is called once for all particles.

    Args:
        function: maps the list of all particles' texts to as many numbers, in nats; for a process that writes no text
            it is given the values, NumPy arrays with a leading particle axis. -inf forbids; NaN and +inf are errors.
    """
    if not callable(function):
        raise TypeError(f"ppl.host takes a function, got {type(function).__name__}.")
    return Host(function)


_FAILURES: list[tuple[str, BaseException]] = []


def reporting(run: Callable[[], Any]) -> Any:
    """Call a function that runs programs, and raise what their host functions raised meanwhile.

    Raises:
        HostError: the first of them, with the site's name; never under a `jit` or `vmap` of the user's own.
    """
    _FAILURES.clear()
    result = run()
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(result)):
        return result
    jax.block_until_ready(result)
    for site, error in _FAILURES:
        _FAILURES.clear()
        raise HostError(f"the host function of {site!r} failed: {type(error).__name__}: {error}") from error
    return result


def record_failure(site: str, error: BaseException) -> None:
    """Keep what a function raised inside a compiled run, for `reporting` to raise it."""
    _FAILURES.append((site, error))


def population(leaves: Sequence[Any], ranks: Sequence[int]) -> tuple[tuple[int, ...], list[np.ndarray]]:
    """Return the batch of a callback's arguments under any number of vmaps, and each with one leading particle axis.

    Args:
        leaves: the arguments, with leading axes of size 1 where a vmap did not batch them.
        ranks: how many axes each has for one particle.
    """
    pairs = list(zip(leaves, ranks, strict=True))
    batch = np.broadcast_shapes(*(np.shape(leaf)[: np.ndim(leaf) - rank] for leaf, rank in pairs))
    size = int(np.prod(batch))
    flat = []
    for leaf, rank in pairs:
        own = np.shape(leaf)[np.ndim(leaf) - rank :]
        flat.append(np.broadcast_to(np.asarray(leaf), (*batch, *own)).reshape(size, *own))
    return batch, flat


@dataclasses.dataclass(frozen=True)
class _Call:
    """The callback. Equal ones make equal programs."""

    function: Callable
    site: str
    read: Callable | None
    tree: Any
    ranks: tuple[int, ...]

    def __call__(self, *leaves) -> np.ndarray:
        batch, flat = population(leaves, self.ranks)
        size = int(np.prod(batch))
        try:
            values = jax.tree.unflatten(self.tree, flat)
            seen = values if self.read is None else self.read(values)
            return self._checked(self.function(seen), seen, size).reshape(batch)
        except BaseException as error:  # noqa: BLE001  an exception here would lose its cause in the runtime
            record_failure(self.site, error)
            return np.full(batch, np.nan, np.float32)

    def _checked(self, result: Any, seen: Any, size: int) -> np.ndarray:
        array = np.asarray(result, np.float32)
        if array.shape != (size,):
            raise HostError(f"it must return {size} numbers, one for each particle; got shape {array.shape}.")
        bad = np.flatnonzero(np.isnan(array) | (array == np.inf))
        if bad.size:
            example = f" for {seen[bad[0]]!r}" if isinstance(seen, list) else ""
            raise HostError(f"it returned {array[bad[0]]}{example}; a log-weight is a number or -inf.")
        return array
