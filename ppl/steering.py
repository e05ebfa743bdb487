"""Twists with a memory: the potentials of Feynman-Kac steering.

With r_t the guess of a log-reward after t steps, the potentials of a path and the twist psi that they add up to are

    difference   G_t = exp(r_t - r_(t-1))             psi_t = r_t
    max          G_t = exp(max of r_0 .. r_t)         psi_t = sum over s <= t of max(r_0 .. r_s)                   (1)
    sum          G_t = exp(r_0 + .. + r_t)            psi_t = sum over s <= t of (r_0 + .. + r_s)

The end takes psi out again whatever it was (`ppl.targets`, equation 2), so that all three have the same target; weights
that did not lead to resampling are carried on. "max" and "sum" add their whole history at every step: they choose
early and for good.

Source: FK steering (arXiv 2501.06848), section 3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ppl.host import Host

__all__ = ["Steering", "steering"]

FORMS = ("difference", "max", "sum")


@dataclasses.dataclass(frozen=True)
class Steering:
    """A twist with a memory; see `steering`."""

    function: Callable | Host
    form: str

    def remember(self, memory: Any, guess: Any) -> tuple[Any, Any]:
        """Return the memory after one more guess, and psi.

        Args:
            memory: psi and the max or sum so far; None at the start.
            guess: r_t.
        """
        if self.form == "difference":
            return (guess, guess), guess
        if memory is None:
            return (guess, guess), guess
        psi, history = memory
        history = jnp.maximum(history, guess) if self.form == "max" else history + guess
        return (psi + history, history), psi + history


def steering(function: Callable | Host, form: str = "difference") -> Steering:
    """Return a twist for `Target.tilt(..., twist=)` or `SMC(twist=)` in one of the forms (1).

    Args:
        function: a guess of the log-reward from the running state, as a twist is: for images mostly
            `lambda state: log_reward(state["denoised"])`.
        form: "difference", which is what the function would be without this, "max" or "sum".
    """
    if not callable(function) and not isinstance(function, Host):
        raise TypeError(f"`function` must be a function or ppl.host(function), got {type(function).__name__}.")
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(map(repr, FORMS))}, got {form!r}.")
    return Steering(function, form)
