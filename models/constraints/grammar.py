r"""Context-free constraints, parsed on the host by llguidance: what no automaton can say, such as nested brackets.

While a run waits, one call a step gives the tokens that may follow the texts of all particles, as bits. A token may
follow if the grammar has any way to go on after it; on the last token of the budget, if it completes a text; end
tokens, if the text is complete. How many tokens a text still needs is not known for a context-free grammar: a particle
that has opened too many brackets for its budget finds out on its last token, and dies there. The law is exact all the
same, since what remains satisfies the grammar and the weights carry the masses of the masks.

A state is the tokens themselves, in the particle's carry; see `parser_states`.

For a grammar of JSON, 32 particles with texts of their own and the 49,152 tokens of SmolLM2, on two cores of a CPU: 0.6
ms a step on the host, 1.6 ms as a compiled run sees it, the bits unpacked; the last token of the budget takes 43 ms.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from ppl.models.constraints.parser_states import llguidance, nested, parser_states
from ppl.models.constraints.regular import Constraint
from ppl.models.constraints.vocabulary import Vocabulary

__all__ = ["Grammar", "Intersection"]

_BYTES = Vocabulary(tuple(bytes([byte]) for byte in range(256)))
_COUNTS_TOKENS = re.compile(r"^\s*\w+\s*\[[^\]\"/]*\bmax_tokens\s*=", re.MULTILINE)
_POSSIBLE = (
    "a grammar combines by `&` only, with grammars, Regex, Choice, JsonSchema and their combinations; write "
    "alternatives inside the grammar, as in `start: a | b`."
)


class _ContextFree:
    """What grammars and their intersections share: the operators."""

    grammars: tuple[Grammar, ...]
    regular: Constraint | None

    def __and__(self, other: Any) -> _ContextFree:
        if isinstance(other, Constraint):
            other = Intersection((), other)
        elif not isinstance(other, _ContextFree):
            return NotImplemented
        regular = [c.regular for c in (self, other) if c.regular is not None]
        if len(regular) == 2:
            regular = regular[:1] if regular[0] == regular[1] else [regular[0] & regular[1]]
        grammars = tuple(dict.fromkeys((*self.grammars, *other.grammars)))
        if len(grammars) == 1 and not regular:
            return grammars[0]
        return Intersection(grammars, regular[0] if regular else None)

    __rand__ = __and__

    def __or__(self, other: Any) -> _ContextFree:
        raise TypeError(f"`|` is not defined for {self!r}: {_POSSIBLE}")

    __ror__ = __or__

    def __invert__(self) -> _ContextFree:
        raise TypeError(f"`~` is not defined for {self!r}: {_POSSIBLE}")

    def matches(self, text: str) -> bool:
        """Whether a text satisfies the constraint."""
        tokens = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8).astype(np.int32)[None]
        read = all(parser_states(g.lark, _BYTES).accepts(tokens, [tokens.size])[0] for g in self.grammars)
        return read and (self.regular is None or self.regular.matches(text))


@dataclasses.dataclass(frozen=True)
class Grammar(_ContextFree):
    r"""The texts of a context-free grammar. Equal, and hashed, by the grammar's text.

    Attributes:
        lark: the grammar in llguidance's dialect of Lark, with a rule `start`. Its lexer reads all terminals that can
            stand at a place side by side, each as long as it goes.

    Raises:
        ImportError: llguidance is not installed: `pip install 'genppl[grammar]'`.
        ValueError: the grammar is invalid; the message shows the line.

    Example:
        >>> Grammar('start: "(" start ")" | "x"').matches("((x))")
        True
    """

    lark: str

    def __post_init__(self) -> None:
        if not isinstance(self.lark, str):
            raise TypeError(f"`lark` must be a string, got {type(self.lark).__name__}.")
        if counted := _COUNTS_TOKENS.search(self.lark):
            line = self.lark.count("\n", 0, counted.end()) + 1
            raise ValueError(f"`lark`, line {line}: `max_tokens` counts tokens, but a text is what a grammar accepts.")
        message = llguidance().LLMatcher.validate_grammar(nested(self.lark))
        if message and not message.startswith("WARNING"):
            raise ValueError(f"`lark` is no valid grammar (line and column first): {message.strip()}")

    @property
    def grammars(self) -> tuple[Grammar, ...]:
        """Itself alone."""
        return (self,)

    @property
    def regular(self) -> None:
        """No regular constraint."""
        return None


@dataclasses.dataclass(frozen=True)
class Intersection(_ContextFree):
    """Grammars and at most one regular constraint, all of which a text must satisfy; `&` makes it."""

    grammars: tuple[Grammar, ...]
    regular: Constraint | None
