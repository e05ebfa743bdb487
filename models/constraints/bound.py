"""A constraint on one process, as a target asks for it: what may follow, the state after, whether it is satisfied."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from ppl.host import ask
from ppl.models.constraints.automaton import Automaton, accepts, advance, allowed, check_reachable
from ppl.models.constraints.grammar import Grammar, Intersection
from ppl.models.constraints.parser_states import ParserStates, parser_states
from ppl.models.constraints.regular import Constraint
from ppl.models.constraints.vocabulary import Vocabulary

__all__ = ["BoundAll", "BoundAutomaton", "BoundGrammar", "bind_constraint"]

_SITE = "constraint"  # what errors of the parser name


def bind_constraint(constraint: Any, vocabulary: Vocabulary, max_tokens: int, require_end: bool) -> Any:
    """Make a constraint for a vocabulary and a budget.

    Args:
        constraint: regular (`Regex`, `Choice`, `JsonSchema` and combinations), a `Grammar`, or `&` of them.
        vocabulary: what the tokens write.
        max_tokens: how many tokens there may be, an end token counted.
        require_end: whether a text must be followed by an end token.

    Returns:
        An object with `start()`, `allowed(state, budget)`, `advance(state, token)` and `accepts(state)`, all of one
        particle and to be used inside a compiled run.

    Raises:
        TypeError: no constraint.
        ValueError: no text within the budget satisfies it, as far as that can be told for a grammar.
    """
    if not isinstance(constraint, Constraint | Grammar | Intersection):
        raise TypeError(
            f"a constraint must be a Regex, Choice, JsonSchema or Grammar, or made of them, got {constraint!r}."
        )
    if isinstance(constraint, Constraint):
        automaton = constraint.compile(vocabulary)
        check_reachable(automaton, max_tokens - int(require_end))
        return BoundAutomaton(automaton)
    bound: list[Any] = [BoundGrammar(grammar, vocabulary, max_tokens) for grammar in constraint.grammars]
    for one in bound:
        one.check_start(require_end)
    if constraint.regular is not None:
        bound.append(bind_constraint(constraint.regular, vocabulary, max_tokens, require_end))
    return bound[0] if len(bound) == 1 else BoundAll(tuple(bound))


@dataclasses.dataclass(frozen=True, eq=False)
class BoundAutomaton:
    """An automaton over the tokens of a process; its state is one integer a particle."""

    automaton: Automaton

    def start(self) -> Int[Array, ""]:
        """Return the state before the first token."""
        return self.automaton.start

    def allowed(self, state: Int[Array, ""], budget: Int[Array, ""]) -> Bool[Array, " V"]:
        """Return the tokens that may follow, given how many more there is room for after it."""
        return allowed(self.automaton, state, budget)

    def advance(self, state: Int[Array, ""], token: Int[Array, ""]) -> Int[Array, ""]:
        """Return the state after a token."""
        return advance(self.automaton, state, token)

    def accepts(self, state: Int[Array, ""]) -> Bool[Array, ""]:
        """Return whether the text so far satisfies the constraint."""
        return accepts(self.automaton, state)


@dataclasses.dataclass(frozen=True, eq=False)
class BoundGrammar:
    """A grammar over the tokens of a process; its state is the text tokens so far, which the host's parser is asked of.

    `allowed` is one call to the host for all particles, `accepts` another, `advance` none.
    """

    grammar: Grammar
    vocabulary: Vocabulary
    max_tokens: int

    @property
    def _parser(self) -> ParserStates:
        return parser_states(self.grammar.lark, self.vocabulary)

    def check_start(self, require_end: bool) -> None:
        """Make sure that something can be drawn at all.

        Raises:
            ValueError: no token may be the first.
        """
        budget = np.array([self.max_tokens - 1 - int(require_end)])
        if not self._parser.masks(np.zeros((1, 0), np.int32), np.array([0]), budget).any():
            raise ValueError(
                f"{self.grammar!r} cannot be satisfied within `max_tokens` = {self.max_tokens}: there is no token to "
                "begin with."
            )

    def start(self) -> PyTree:
        """Return the state before the first token."""
        return {"tokens": jnp.zeros(self.max_tokens, jnp.int32), "length": jnp.int32(0)}

    def allowed(self, state: PyTree, budget: Int[Array, ""]) -> Bool[Array, " V"]:
        """Return the tokens that may follow, given how many more there is room for after it."""
        question = _Question("masks", self.grammar, self.vocabulary)
        answer = jax.ShapeDtypeStruct((self._parser.num_words,), jnp.uint32)
        words = ask(
            _SITE, question, answer, state["tokens"], state["length"], jnp.asarray(budget, jnp.int32), otherwise=0
        )
        bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return bits.reshape(-1)[: len(self.vocabulary.tokens)] == 1

    def advance(self, state: PyTree, token: Int[Array, ""]) -> PyTree:
        """Return the state after a token; end tokens leave it as it is."""
        ended = functools.reduce(operator.or_, (token == end for end in self.vocabulary.end_tokens), jnp.array(False))
        at = jnp.where(ended, self.max_tokens, state["length"])  # out of range: nothing is written
        tokens = state["tokens"].at[at].set(token, mode="drop")
        return {"tokens": tokens, "length": state["length"] + jnp.where(ended, 0, 1)}

    def accepts(self, state: PyTree) -> Bool[Array, ""]:
        """Return whether the text so far satisfies the grammar."""
        question, answer = _Question("accepts", self.grammar, self.vocabulary), jax.ShapeDtypeStruct((), jnp.bool_)
        return ask(_SITE, question, answer, state["tokens"], state["length"], otherwise=False)


@dataclasses.dataclass(frozen=True, eq=False)
class BoundAll:
    """Several bound constraints, all to be satisfied; its state is the tuple of theirs."""

    parts: tuple[Any, ...]

    def start(self) -> PyTree:
        """Return the state before the first token."""
        return tuple(part.start() for part in self.parts)

    def allowed(self, state: PyTree, budget: Int[Array, ""]) -> Bool[Array, " V"]:
        """Return the tokens that may follow by all of the constraints."""
        pairs = zip(self.parts, state, strict=True)
        return functools.reduce(operator.and_, (part.allowed(one, budget) for part, one in pairs))

    def advance(self, state: PyTree, token: Int[Array, ""]) -> PyTree:
        """Return the state after a token."""
        return tuple(part.advance(one, token) for part, one in zip(self.parts, state, strict=True))

    def accepts(self, state: PyTree) -> Bool[Array, ""]:
        """Return whether the text so far satisfies all of the constraints."""
        return functools.reduce(operator.and_, (p.accepts(one) for p, one in zip(self.parts, state, strict=True)))


@dataclasses.dataclass(frozen=True)
class _Question:
    """A question to the parser, for all particles. Equal ones make equal programs."""

    question: str
    grammar: Grammar
    vocabulary: Vocabulary

    def __call__(self, *arguments) -> np.ndarray:
        *arrays, _ = arguments
        return getattr(parser_states(self.grammar.lark, self.vocabulary), self.question)(*arrays)
