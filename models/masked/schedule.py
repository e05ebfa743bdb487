"""How fast a sequence is unmasked, and how much of it is masked again.

At level t of [0, 1] (1 is noise) a share m(t) of the positions is masked, alpha = 1 - m:

    linear   m(t) = t                    cosine   m(t) = sin(pi t / 2)

Of K steps, step k goes from t = 1 - k / K to s = 1 - (k + 1) / K. Positions that act alone (MDLM; ReMDM with sigma > 0)
do so with the probabilities

    a masked one is unmasked       (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)                                 (1)
    an unmasked one is masked      sigma <= (1 - alpha_s) / alpha_t                                                (2)

which keep the share at m(s); the last step unmasks everything and masks nothing. Policies that count unmask as many as
leave `masked_after` positions masked: for the linear schedule the steps' numbers differ by at most one, the larger
ones first (LLaDA's rule); else `ceil(size m(s))` are left.

With blocks the positions are cut into stretches of one size, finished one after the other, each by the whole schedule
in its share of the steps (semi-autoregressive generation).

Source: Sahoo et al. (2024), "Simple and effective masked diffusion language models", arXiv 2406.07524; (1), (2) and the
loop: Wang et al. (2025), "Remasking discrete diffusion models with inference-time scaling", arXiv 2503.00307; the rule:
Nie et al. (2025), "Large language diffusion models", arXiv 2502.09992.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Due", "Plan", "Remasking", "plan"]

_SHARES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda t: t,
    "cosine": lambda t: np.sin(0.5 * np.pi * t),
}


@dataclasses.dataclass(frozen=True)
class Remasking:
    """Masking tokens again on the way, so that later steps may correct them.

    Attributes:
        cap: sigma is the smaller of this, in (0, 1], and the bound (2).
        window: (on, off) with 0 < off < on < 1: the loop. From t = on to t = off the share of masks stays at m(on) and
            positions are masked again; before and after none is. None remasks in all steps.
    """

    cap: float
    window: tuple[float, float] | None = None

    def __post_init__(self):
        if isinstance(self.cap, bool) or not isinstance(self.cap, numbers.Real) or not 0 < self.cap <= 1:
            raise ValueError(f"`cap` must be a number in (0, 1], got {self.cap!r}.")
        if self.window is not None:
            on, off = self.window
            if not 0 < off < on < 1:
                raise ValueError(f"`window` must be (on, off) with 0 < off < on < 1, got {self.window!r}.")


class Due(NamedTuple):
    """What a step is to unmask.

    Attributes:
        eligible: the masked positions of the current block.
        probability: (1), for positions that act alone.
        count: how many, for policies that count.
        most: a bound of `count`, static.
    """

    eligible: Bool[Array, " L"]
    probability: Float[Array, ""]
    count: Int[Array, ""]
    most: int


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The schedule of a process.

    Attributes:
        length: L.
        block_size: how many positions a block has.
        block: the block of each step, `[K]`.
        unmask: the probability (1) of each step, `[K]`.
        remask: sigma of each step, `[K]`.
        masked_after: how many positions of its block a step leaves masked, `[K]`, for policies that count.
        most: how many positions one step unmasks at most, for policies that count.
    """

    length: int
    block_size: int
    block: np.ndarray
    unmask: np.ndarray
    remask: np.ndarray
    masked_after: np.ndarray
    most: int

    @property
    def remasks(self) -> bool:
        """Whether any step masks positions again."""
        return bool(self.remask.any())

    def in_block(self, step: Any) -> Bool[Array, " L"]:
        """Return which positions belong to a step's block."""
        return np.arange(self.length) // self.block_size == jnp.asarray(self.block)[step]

    def due(self, step: Any, masked: Bool[Array, " L"], num_remasked: Any = 0) -> Due:
        """Return what a step is to unmask.

        Args:
            step: its number, int32.
            masked: which positions are masked.
            num_remasked: how many others this step masks again.
        """
        eligible = masked & self.in_block(step)
        present = jnp.sum(eligible)
        count = jnp.clip(present - jnp.asarray(self.masked_after)[step] + num_remasked, 0, present)
        return Due(eligible, jnp.asarray(self.unmask)[step], count.astype(jnp.int32), self.most)


def plan(
    length: int,
    num_steps: int,
    *,
    schedule: str | Sequence[int] = "linear",
    block_size: int | None = None,
    remasking: Remasking | None = None,
) -> Plan:
    """Lay out the steps of a process.

    Args:
        length: how many positions.
        num_steps: K.
        schedule: "linear", "cosine", or how many positions each step of a block unmasks (for policies that count).
        block_size: of blocks; None is one block of all positions.
        remasking: whether positions are masked again.

    Raises:
        ValueError: an unknown schedule, numbers that do not add up to the block's size, a number of steps that is no
            multiple of the number of blocks, or a window of remasking without a step in it.
    """
    size = length if block_size is None else min(block_size, length)
    num_blocks = -(-length // size)
    if num_steps % num_blocks:
        raise ValueError(
            f"`num_steps` must be a multiple of the number of blocks: {length} positions in blocks of {size} make "
            f"{num_blocks} blocks, got {num_steps} steps."
        )
    steps = num_steps // num_blocks
    given = None if isinstance(schedule, str) else tuple(schedule)
    if given is None and schedule not in _SHARES:
        raise ValueError(
            f"`schedule` must be {', '.join(map(repr, _SHARES))} or a sequence of numbers, got {schedule!r}."
        )
    if given is not None:
        whole = all(isinstance(n, numbers.Integral) and n >= 0 for n in given)
        if not whole or len(given) != steps or sum(given) != size or length % size:
            raise ValueError(
                f"`schedule` as numbers must hold {steps} whole numbers that sum to the block's size {size}, and "
                f"blocks must divide the length {length}, got {given}."
            )
        if remasking is not None:
            raise ValueError('`schedule` as numbers leaves nothing to mask again; take "linear" or "cosine".')
    unmask, remask = _probabilities("linear" if given is not None else schedule, steps, remasking)
    sizes = [min(size, length - block * size) for block in range(num_blocks)]
    after = [_masked_after(n, steps, schedule if given is None else given, remasking) for n in sizes]
    return Plan(
        length=length,
        block_size=size,
        block=np.repeat(np.arange(num_blocks, dtype=np.int32), steps),
        unmask=np.tile(unmask, num_blocks),
        remask=np.tile(remask, num_blocks),
        masked_after=np.concatenate(after).astype(np.int32),
        most=max(int(np.max(-np.diff(np.concatenate([[n], left])))) for n, left in zip(sizes, after, strict=True)),
    )


def _levels(schedule: str, steps: int, remasking: Remasking | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of masks at the K + 1 levels, and which of the K steps may mask again."""
    t = 1.0 - np.arange(steps + 1) / steps
    remasks = np.full(steps, remasking is not None)
    if remasking is not None and remasking.window is not None:
        on, off = remasking.window
        remasks = (t[:-1] <= on) & (t[1:] >= off)
        if not remasks.any():
            raise ValueError(f"`window` = {remasking.window} holds none of {steps} steps; take more steps.")
        t = np.where(t >= on, t, np.where(t >= off, on, t * on / off))
    return _SHARES[schedule](t), remasks


def _probabilities(schedule: str, steps: int, remasking: Remasking | None) -> tuple[np.ndarray, np.ndarray]:
    """Return (1) and sigma for each step, float32."""
    share, remasks = _levels(schedule, steps, remasking)
    now, then = share[:-1], share[1:]  # of masks, so that alpha = 1 - share
    sigma = np.zeros(steps)
    if remasking is not None:
        bound = then / np.where(now < 1, 1 - now, 1.0)  # (2)
        sigma = np.where(remasks & (now < 1), np.minimum(remasking.cap, bound), 0.0)
    unmask = (now - then + sigma * (1 - now)) / now  # (1)
    unmask[-1], sigma[-1] = 1.0, 0.0
    return np.clip(unmask, 0.0, 1.0).astype(np.float32), sigma.astype(np.float32)


def _masked_after(size: int, steps: int, schedule: Any, remasking: Remasking | None) -> np.ndarray:
    """Return how many positions of a block of this size each step leaves masked."""
    if not isinstance(schedule, str):
        return size - np.cumsum(schedule)
    if schedule == "linear" and (remasking is None or remasking.window is None):
        k = np.arange(1, steps + 1)
        return size - (size // steps) * k - np.minimum(k, size % steps)
    share, _ = _levels(schedule, steps, remasking)
    return np.ceil(np.round(size * share[1:], 9)).astype(int)
