"""Languages of byte strings, as automata that read a text byte by byte: complements, products, lists of strings."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int

from ppl.models.constraints import tables
from ppl.models.constraints.tables import distinct_rows, minimise

__all__ = ["ByteAutomaton", "from_strings", "product"]


@dataclasses.dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """A language of byte strings.

    Attributes:
        next_state: shape (S, 256), the successor of every state by every byte.
        accepting: shape (S,), whether the text read so far belongs to the language.
        start: the state before the first byte.

    The last state is dead.
    """

    next_state: Int[np.ndarray, "S 256"]
    accepting: Bool[np.ndarray, " S"]
    start: int

    def accepts(self, text: bytes) -> bool:
        """Whether a text belongs to the language."""
        state = self.start
        for byte in text:
            state = self.next_state[state, byte]
        return bool(self.accepting[state])

    @property
    def is_empty(self) -> bool:
        """Whether no text belongs to the language; needs the smallest automaton."""
        return not self.accepting.any()

    def minimal(self) -> "ByteAutomaton":
        """The smallest automaton of the same language."""
        chosen, byte_class = distinct_rows(self.next_state.T)
        table, accepting, start = minimise(self.next_state[:, chosen], self.accepting, self.start)
        return ByteAutomaton(table[:, byte_class], accepting, start)

    def complement(self) -> "ByteAutomaton":
        """The byte strings that are not in the language."""
        dead = len(self.accepting)  # the former dead state accepts now
        table = np.vstack([self.next_state, np.full((1, 256), dead, self.next_state.dtype)])
        return ByteAutomaton(table, np.append(~self.accepting, False), self.start)

    def after_optional_space(self) -> "ByteAutomaton":
        """The texts that belong to the language once one space at their beginning, if there is one, is dropped."""
        first = self.next_state[self.start].copy()
        first[ord(" ")] = self.start
        table = np.vstack([first[None], self.next_state + 1]).astype(np.int32)
        table[0] += 1
        return ByteAutomaton(table, np.append(self.accepting[self.start], self.accepting), 0)


def product(first: ByteAutomaton, second: ByteAutomaton, *, union: bool) -> ByteAutomaton:
    """The texts of both languages, or of either.

    Args:
        first: a language.
        second: another.
        union: accept where one of the two does, and not only where both do.

    Returns:
        The smallest automaton.

    Raises:
        TooLarge: too many pairs of states would have to be formed.
    """
    chosen, byte_class = distinct_rows(np.vstack([first.next_state, second.next_state]).T)
    table, accepting, start = tables.product(
        (first.next_state[:, chosen], first.accepting, first.start),
        (second.next_state[:, chosen], second.accepting, second.start),
        union=union,
    )
    return ByteAutomaton(table[:, byte_class], accepting, start)


def from_strings(strings: Iterable[bytes]) -> ByteAutomaton:
    """The language of finitely many strings."""
    rows: list[dict[int, int]] = [{}]
    ends = set()
    for string in strings:
        state = 0
        for byte in string:
            if byte not in rows[state]:
                rows[state][byte] = len(rows)
                rows.append({})
            state = rows[state][byte]
        ends.add(state)
    table = np.full((len(rows) + 1, 256), len(rows), np.int32)
    for state, row in enumerate(rows):
        table[state, list(row)] = list(row.values())
    accepting = np.isin(np.arange(len(rows) + 1), list(ends))
    return ByteAutomaton(table, accepting, 0).minimal()
