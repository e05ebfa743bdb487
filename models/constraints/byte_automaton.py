"""Deterministic finite automata over bytes: products, complements and the smallest automaton of a language.

An automaton reads a text byte by byte. It is complete: every state has a successor for every byte, and one state, the
last, is dead: nothing is accepted from there. Two states are equivalent if the same texts are accepted from both,

    (1)  s ~ t   iff   accepting(s) = accepting(t)  and  next(s, b) ~ next(t, b) for all b,

and the smallest automaton has one state for each class of (1) that the start reaches. Its partition is refined from
the shortest accepted length, which equivalent states share, until (1) holds (Moore, 1956, "Gedanken-experiments on
sequential machines"); with the lengths to begin with, chains of counted repetitions take one round and not one for
each link. Rows are compared by random 64-bit sums, and the result is checked against (1) exactly.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int

__all__ = ["UNREACHABLE", "ByteAutomaton", "distances", "from_strings", "minimise", "product"]

UNREACHABLE = 1 << 30  # the distance from which no accepting state is reached
_ROWS = 512  # states looked at together


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
        columns, byte_class = np.unique(self.next_state, axis=1, return_inverse=True)
        table, accepting, start = minimise(columns, self.accepting, self.start)
        return ByteAutomaton(table[:, byte_class.reshape(-1)], accepting, start)

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
        The smallest automaton; only pairs of states that a text leads to are ever formed.
    """
    width = len(second.accepting)
    joint = np.vstack([first.next_state, second.next_state])
    columns, byte_class = np.unique(joint, axis=1, return_inverse=True)
    left, right = columns[: len(first.accepting)].astype(np.int64), columns[len(first.accepting) :]
    pairs = frontier = np.array([first.start * width + second.start], np.int64)
    while frontier.size:
        reached = np.unique(left[frontier // width] * width + right[frontier % width])
        frontier = np.setdiff1d(reached, pairs, assume_unique=True)
        pairs = np.union1d(pairs, frontier)
    one, two = pairs // width, pairs % width
    table = np.searchsorted(pairs, left[one] * width + right[two]).astype(np.int32)
    combine = np.logical_or if union else np.logical_and
    accepting = combine(first.accepting[one], second.accepting[two])
    start = int(np.searchsorted(pairs, first.start * width + second.start))
    table, accepting, start = minimise(table, accepting, start)
    return ByteAutomaton(table[:, byte_class.reshape(-1)], accepting, start)


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


def distances(next_state: Int[np.ndarray, "S C"], accepting: Bool[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """The fewest symbols from every state to an accepting one; `UNREACHABLE` where there is no way."""
    num_states = len(accepting)
    sources, targets = [], []
    for low in range(0, num_states, _ROWS):
        rows = next_state[low : low + _ROWS]
        linked = np.zeros((len(rows), num_states), bool)
        linked[np.arange(len(rows))[:, None], rows] = True
        source, target = np.nonzero(linked)
        sources.append(source + low)
        targets.append(target)
    source, target = np.concatenate(sources), np.concatenate(targets)
    source = source[np.argsort(target, kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(target, minlength=num_states))])
    distance = np.where(accepting, 0, UNREACHABLE).astype(np.int32)
    frontier, steps = np.flatnonzero(accepting), 0
    while frontier.size:
        steps += 1
        before = np.unique(source[_ranges(bounds[frontier], bounds[frontier + 1])])
        frontier = before[distance[before] == UNREACHABLE]
        distance[frontier] = steps
    return distance


def minimise(
    next_state: Int[np.ndarray, "S C"], accepting: Bool[np.ndarray, " S"], start: int
) -> tuple[Int[np.ndarray, "M C"], Bool[np.ndarray, " M"], int]:
    """The smallest automaton over any symbols, by (1).

    Args:
        next_state: the successor of every state by every symbol.
        accepting: which states accept.
        start: the first state.

    Returns:
        `(next_state, accepting, start)` of the smallest automaton, its dead state last; where nothing is accepted, the
        dead state is the only one.
    """
    distance = distances(next_state, accepting)
    alive = distance < UNREACHABLE
    reached = np.zeros(len(accepting), bool)
    reached[start] = True
    frontier = np.array([start])
    while frontier.size:
        following = np.unique(next_state[frontier])
        frontier = following[~reached[following] & alive[following]]
        reached[frontier] = True
    kept = np.flatnonzero(reached & alive)
    number = np.full(len(accepting), len(kept))
    number[kept] = np.arange(len(kept))
    table = np.vstack([number[next_state[kept]], np.full((1, next_state.shape[1]), len(kept))])
    shortest = np.append(distance[kept], UNREACHABLE)

    part = np.unique(shortest, return_inverse=True)[1].reshape(-1)
    seed = 0
    while True:  # until (1) holds exactly: once, but for a collision
        part = _refine(table, part, np.random.default_rng(seed))
        _, chosen = np.unique(part, return_index=True)
        if np.array_equal(shortest[chosen][part], shortest) and np.array_equal(part[table[chosen]][part], part[table]):
            break
        seed += 1
    order = np.argsort(part[len(kept)] == np.arange(len(chosen)), kind="stable")  # the dead state becomes the last
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    chosen = chosen[order]
    return rank[part[table[chosen]]].astype(np.int32), shortest[chosen] == 0, int(rank[part[number[start]]])


def _refine(table: np.ndarray, part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Split the parts until another round splits none."""
    weights = rng.integers(1 << 63, size=table.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    count = part.max() + 1
    while True:
        values = rng.integers(1 << 63, size=count, dtype=np.uint64)
        row = values[part] * np.uint64(0x9E3779B97F4A7C15)
        for low in range(0, len(table), _ROWS):
            row[low : low + _ROWS] += values[part[table[low : low + _ROWS]]] @ weights
        _, finer = np.unique(row, return_inverse=True)
        finer = finer.reshape(-1)
        if finer.max() + 1 <= count:
            return part
        part, count = finer, finer.max() + 1


def _ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """All integers of `[starts[i], stops[i])`, for one i after the other."""
    lengths = stops - starts
    return np.arange(lengths.sum()) + np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
