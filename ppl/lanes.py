"""Values of a population: shared by all particles or one for each, the frame they live in, and how they are moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppl.ir import Literal
from ppl.kernels import moves

__all__ = ["Frame", "Lane", "has_long_rows", "move", "read", "take", "time_first", "trace_back"]


class Lane(NamedTuple):
    """A value: shared by all particles, or one for each along a leading axis."""

    array: Any
    random: bool = False


@dataclasses.dataclass
class Frame:
    """The state of a walk through one block."""

    log_weights: Any
    given: Mapping[str, Lane]
    active: Lane | None = None
    depth: int = 0
    log_mass: Any = 0.0
    env: dict[int, Lane] = dataclasses.field(default_factory=dict)
    records: dict[str, tuple[int, int | None]] = dataclasses.field(default_factory=dict)
    blame: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    diagnostics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    retained: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # values that particle 0 has for certain
    redrawn: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # which entries of given sites are drawn
    stop: Any = None  # how many iterations of outermost loops the prefix has
    steps: int = 0  # iterations of the outermost loops so far
    block: Any = None  # the whole program, and its inputs
    inputs: Any = None
    genealogy: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def new_variable(self, lane: Lane) -> int:
        """Put a value beside the block's own variables."""
        variable = -len(self.env) - 1
        self.env[variable] = lane
        return variable


def read(frame: Frame, atom) -> Lane:
    """Return the value of a variable or constant."""
    return Lane(jnp.asarray(atom.value)) if isinstance(atom, Literal) else frame.env[atom]


def take(array, index):
    """Return rows by an index that is known to be in range."""
    return array.at[index].get(mode="promise_in_bounds")


def time_first(lane: Lane):
    """Return the array of a history with its time axis leading, `[T, N, ...]` or `[T, ...]`."""
    return jnp.moveaxis(lane.array, 1, 0) if lane.random else lane.array


def has_long_rows(tree: Any) -> bool:
    """Return whether `move` overwrites the dead instead of gathering everything."""
    return any(moves.has_long_rows(leaf) for leaf in jax.tree.leaves(tree))


def move(tree: Any, ancestors, any_order: bool = True) -> tuple[Any, Any]:
    """Replace every particle's arrays by its ancestor's.

    Long rows, such as caches, are overwritten where a particle died and stay elsewhere. That needs ancestors in an
    order in which survivors keep their slot, so the children are numbered anew, if they may be in `any_order`.

    Returns:
        The tree after the move, and the ancestors `int32[N]` in the order that was used.
    """
    if any_order and has_long_rows(tree):
        ancestors = moves.survivors_stay(ancestors)
        return moves.move(tree, ancestors), ancestors
    return moves.gather(tree, ancestors), ancestors


def trace_back(ancestors, resampled, histories: list[Any]) -> list[Any]:
    """Return histories `[T, N, ...]` along the ancestral lines of the last particles."""
    if not histories:
        return []

    def step(index, x):
        parents, moved, rows = x
        index = jax.lax.cond(moved, lambda: take(parents, index), lambda: index)
        return index, [take(row, index) for row in rows]

    last = jnp.arange(ancestors.shape[1], dtype=jnp.int32)
    return jax.lax.scan(step, last, (ancestors, resampled, histories), reverse=True)[1]
