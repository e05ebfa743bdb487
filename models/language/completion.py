"""Left-to-right text as a process: a prompt, then one token after another until an end token or the budget.

    p(text) = prod_t p(x_t | prompt, x_<t)

over sequences that end in an end token within `max_tokens` tokens, that token counted, or of exactly `max_tokens` other
tokens. These sum to one, so the log-evidence of a completion by itself is 0. The backward kernel of text is certain:
a prefix is found in its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from ppl.process import Process

if TYPE_CHECKING:
    from ppl.models.language.language_model import LanguageModel

__all__ = ["Completion"]


class Completion(Process):
    """What a language model writes after a prompt. Its value is `{"tokens": int32[max_tokens], "length": int32}`.

    `length` counts text tokens; the end token and what follows it in `tokens` is padding.
    """

    def __init__(self, lm: LanguageModel, prompt: Sequence[int], max_tokens: int):
        """Build the process; `LanguageModel.complete` and `.chat` do it from texts.

        Args:
            lm: the language model.
            prompt: its tokens.
            max_tokens: the budget, at least 1, the end token counted.

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
        self.lm, self.prompt, self.num_steps = lm, tuple(prompt), max_tokens

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

    def texts(self, value) -> list[str]:
        """Return the texts of a value with a leading particle axis."""
        return self.lm.decode(value["tokens"], length=value["length"])

    def __repr__(self) -> str:
        return f"<Completion of {self.lm.tokenizer.decode(self.prompt)!r}, at most {self.num_steps} tokens>"
