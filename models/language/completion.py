"""Left-to-right text as a process: a prompt, then one token after another until an end token or the budget.

    p(text) = prod_t p(x_t | prompt, x_<t)

over sequences that end in an end token within `max_tokens` tokens, that token counted, or of exactly `max_tokens` other
tokens. These sum to one, so the log-evidence of a completion by itself is 0. The backward kernel of text is certain:
a prefix is found in its text.

The end token is part of a text's probability where the budget has room for it: a text of T words has
p(text) p(end | text) with a budget of more than T tokens, and p(text) with one of exactly T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ppl.models.language.delimiter import delimiter_of
from ppl.process import NoDelimiter, Process

if TYPE_CHECKING:
    from jaxtyping import Array, Int

    from ppl.models.language.language_model import LanguageModel

__all__ = ["Completion"]

_SHOWN = 40  # characters of a long prompt


class Completion(Process):
    """What a language model writes after a prompt. Its value is `{"tokens": int32[max_tokens], "length": int32}`.

    `length` counts text tokens; the end token and what follows it in `tokens` is padding.
    """

    def __init__(
        self, lm: LanguageModel, prompt: Sequence[int] | Int[Array, " T"], max_tokens: int, *, continues: bool = True
    ):
        """Build the process; `LanguageModel.complete` and `.chat` do it from texts.

        Args:
            lm: the language model.
            prompt: its tokens, a sequence of ints or, inside of models, a traced array.
            max_tokens: the budget, at least 1, the end token counted.
            continues: the texts go on from the prompt; False for those that begin anew, as a chat's answers do.

        Raises:
            ValueError: prompt and budget do not fit the model's context.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
            raise TypeError(f"`max_tokens` must be an int, got {max_tokens!r} ({type(max_tokens).__name__}).")
        if max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1, got {max_tokens}.")
        if len(prompt) + max_tokens > lm.context_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and `max_tokens` = {max_tokens} do not fit the model's context of "
                f"{lm.context_length} tokens."
            )
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(prompt))
        self.prompt = jnp.asarray(prompt) if traced else tuple(prompt)
        self.lm, self.num_steps, self.continues = lm, max_tokens, continues

    def start(self) -> dict[str, Any]:
        """Read the prompt."""
        text = self.lm.prefill(self.prompt, max_tokens=self.num_steps)
        return {"text": text, "length": jnp.int32(0), "ended": jnp.array(False)}

    def forward(self, state, step):
        """Return the distribution of the next token."""
        del step
        return self.lm.next_token(state["text"])

    def advance(self, state, drawn, step) -> dict[str, Any]:
        """Read the token."""
        del step
        ended = self.lm.is_end(drawn)
        length = state["length"] + jnp.where(ended, 0, 1)
        return {"text": self.lm.extend(state["text"], drawn), "length": length, "ended": ended}

    def ended(self, state):
        """Return whether an end token was drawn."""
        return state["ended"]

    def finish(self, state, path) -> dict[str, Any]:
        """Return the tokens, padded with an end token, and how many of them are text."""
        is_text = jnp.arange(self.num_steps) < state["length"]
        return {"tokens": jnp.where(is_text, path, self.lm.padding_token), "length": state["length"]}

    @property
    def texts(self):
        """The function that reads values with a leading particle axis; the same for all prompts."""
        return self.lm.continuing_reader if self.continues else self.lm.reader

    def running(self, state, path, step) -> dict[str, Any]:
        """Return the text so far like a value, and the network's last hidden state, `(width,)`."""
        del step
        return self.finish(state, path) | {"hidden": state["text"].hidden}

    def unfolds_like(self) -> dict[str, Any]:
        """Return what must be equal in completions that are multiplied; their prompts and models may differ."""
        return {
            "process": "tokens",
            "vocabulary": _Vocabulary(self.lm),
            "end tokens": self.lm.end_tokens,
            "max_tokens": self.num_steps,
        }

    def delimit(self, delimiter: str | None):
        """Return what finds a string in the text that is written."""
        if delimiter is None:
            return NoDelimiter()
        if not isinstance(delimiter, str) or not delimiter:
            raise ValueError(f"`delimiter` must be a string that is not empty, or None, got {delimiter!r}.")
        return delimiter_of(delimiter.encode(), self.lm.byte_vocabulary)

    def bind(self, constraint, require_end: bool):
        """Return a constraint compiled for the vocabulary, and check that some completion can satisfy it."""
        from ppl.models.constraints.bound import bind_constraint

        vocabulary = self.lm.continuing_vocabulary if self.continues else self.lm.byte_vocabulary
        return bind_constraint(constraint, vocabulary, self.num_steps, require_end)

    def __repr__(self) -> str:
        if not isinstance(self.prompt, tuple):
            return f"<Completion of {len(self.prompt)} traced tokens, at most {self.num_steps} tokens>"
        prompt = self.lm.tokenizer.decode(self.prompt)
        shown = prompt if len(prompt) <= _SHOWN else "..." + prompt[-_SHOWN:]
        return f"<Completion of {shown!r}, at most {self.num_steps} tokens>"


class _Vocabulary:
    """A model's tokens, compared by their texts and printed in a few words."""

    def __init__(self, lm: LanguageModel):
        self.lm = lm

    def __eq__(self, other):
        if not isinstance(other, _Vocabulary):
            return False
        return self.lm is other.lm or self.lm.vocabulary == other.lm.vocabulary

    def __str__(self) -> str:
        return f"{self.lm.vocab_size} tokens of {self.lm!r}"
