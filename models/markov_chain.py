"""Markov chains over a few symbols: the process whose every path can be summed.

    p(x_1 .. x_T) = p_0(x_1) prod_t p(x_t | x_(t-1))

It stands in for a language model where an answer must be known exactly. To constraints its tokens are the letters a, b,
c, ..
"""

from __future__ import annotations

import string
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import ArrayLike, Float

from ppl.models.constraints.bound import bind_constraint
from ppl.models.constraints.vocabulary import Vocabulary
from ppl.models.language.delimiter import Delimiter
from ppl.models.language.next_token import NextToken
from ppl.process import NoDelimiter, Process

__all__ = ["MarkovChain"]


class MarkovChain(Process):
    """A Markov chain of fixed length. Its value is `{"tokens": int32[length]}`."""

    def __init__(self, initial_logits: Float[ArrayLike, " V"], transition_logits: Float[ArrayLike, "V V"], length: int):
        """Build the chain.

        Args:
            initial_logits: unnormalised log-probabilities of the first token; -inf is probability zero.
            transition_logits: row i holds those of the token after token i.
            length: how many tokens, at least 1.

        Raises:
            ValueError: the shapes do not fit, or `length` is below 1.
        """
        self.initial_logits = jnp.asarray(initial_logits, jnp.float32)
        self.transition_logits = jnp.asarray(transition_logits, jnp.float32)
        size = self.initial_logits.shape
        if len(size) != 1 or size[0] == 0 or self.transition_logits.shape != size * 2:
            raise ValueError(
                "`initial_logits` and `transition_logits` must have shapes (V,) and (V, V), got "
                f"{size} and {self.transition_logits.shape}."
            )
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"`length` must be an int of at least 1, got {length!r}.")
        self.num_steps = length

    def law(self, logits) -> dist.Distribution:
        """Return the distribution of a token with these logits."""
        return NextToken(logits=logits)

    def start(self) -> dict[str, Any]:
        """Return the state before the first token."""
        return {"last": jnp.int32(0)}

    def forward(self, state, step) -> dist.Distribution:
        """Return the distribution of the next token."""
        return self.law(jnp.where(step == 0, self.initial_logits, self.transition_logits[state["last"]]))

    def advance(self, state, drawn, step) -> dict[str, Any]:
        """Remember the token."""
        del state, step
        return {"last": drawn}

    def finish(self, state, path) -> dict[str, Any]:
        """Return the tokens."""
        del state
        return {"tokens": path}

    def running(self, state, path, step) -> dict[str, Any]:
        """Return the tokens so far, zeros after them, and how many there are."""
        del state
        return {"tokens": jnp.where(jnp.arange(self.num_steps) < step, path, 0), "length": jnp.int32(step)}

    def unfolds_like(self) -> dict[str, Any]:
        """Return what must be equal in chains that are multiplied."""
        return {"process": "tokens", "vocabulary": f"{self.initial_logits.shape[0]} symbols", "steps": self.num_steps}

    def delimit(self, delimiter: int | None):
        """Return what finds a token that ends a stretch."""
        if delimiter is None:
            return NoDelimiter()
        if not 0 <= delimiter < self.initial_logits.shape[0]:
            raise ValueError(f"`delimiter` must be a token in [0, {self.initial_logits.shape[0]}), got {delimiter}.")
        return Delimiter(np.arange(self.initial_logits.shape[0])[None] == np.full((1, 1), delimiter))

    def bind(self, constraint, require_end: bool):
        """Return a constraint on the letters that the tokens stand for: a, b, c, ..

        Raises:
            ValueError: there are more tokens than letters, or no path is as the constraint wants it.
        """
        del require_end  # a chain always has its full length
        size = self.initial_logits.shape[0]
        if size > len(string.ascii_lowercase):
            raise ValueError(f"{self!r} has more symbols than there are letters to constrain.")
        letters = tuple(letter.encode() for letter in string.ascii_lowercase[:size])
        return bind_constraint(constraint, Vocabulary(letters), self.num_steps, False)

    def __repr__(self) -> str:
        return f"<MarkovChain of {self.num_steps} tokens over {self.initial_logits.shape[0]}>"
