"""Deterministic finite automata as tables, over any symbols: the smallest one of a language, products, distances.

An automaton is complete: every state has a successor for every symbol, and one state, the last, is dead: nothing is
accepted from there. Two states are equivalent if the same texts are accepted from both,

    (1)  s ~ t   iff   accepting(s) = accepting(t)  and  next(s, b) ~ next(t, b) for all b,

and the smallest automaton has one state for each class of (1) that the start reaches. Its partition is refined from
the shortest accepted length, which equivalent states share, until (1) holds: a few rounds over all states (Moore,
1956, "Gedanken-experiments on sequential machines"), and where those do not suffice, as for long counted repetitions
that may end anywhere, part by part (Hopcroft, 1971, "An n log n algorithm for minimizing states in a finite
automaton"). Rows are compared by random 64-bit sums, and the result is checked against (1) exactly.
"""

import numpy as np
from jaxtyping import Bool, Int

__all__ = ["MOST_STATES", "UNREACHABLE", "TooLarge", "distances", "distinct_rows", "minimise", "product"]

UNREACHABLE = 1 << 30  # the distance from which no accepting state is reached
MOST_STATES = 30_000  # of an automaton over characters; in bytes there may be ten times as many
_MOST_PAIRS = 300_000  # of a product, before it is made small
_MOST_ROUNDS = 20  # over all states
_ROWS = 512  # states looked at together


class TooLarge(ValueError):
    """An automaton has too many states."""


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


def distinct_rows(rows: Int[np.ndarray, "N M"]) -> tuple[np.ndarray, np.ndarray]:
    """Find equal rows.

    Args:
        rows: a table.

    Returns:
        The place of one of each of the distinct rows, and for every row which of these it is.
    """
    rng = np.random.default_rng(0)
    while True:  # once, but for a collision
        weights = rng.integers(1 << 63, size=rows.shape[1], dtype=np.uint64)
        sums = np.zeros(len(rows), np.uint64)
        for low in range(0, rows.shape[1], 8 * _ROWS):
            sums += rows[:, low : low + 8 * _ROWS].astype(np.uint64) @ weights[low : low + 8 * _ROWS]
        _, chosen, kind = np.unique(sums, return_index=True, return_inverse=True)
        kind = kind.reshape(-1)
        if np.array_equal(rows[chosen][kind], rows):
            return chosen, kind


def product(
    first: tuple[np.ndarray, np.ndarray, int], second: tuple[np.ndarray, np.ndarray, int], *, union: bool
) -> tuple[Int[np.ndarray, "M C"], Bool[np.ndarray, " M"], int]:
    """The texts of both languages, or of either.

    Args:
        first: `(next_state, accepting, start)` of a language.
        second: of another, over the same symbols.
        union: accept where one of the two does, and not only where both do.

    Returns:
        The same of the smallest automaton; only pairs of states that a text leads to are ever formed.

    Raises:
        TooLarge: more than 300,000 such pairs.
    """
    (left, left_accepting, left_start), (right, right_accepting, right_start) = first, second
    width = len(right_accepting)
    left = left.astype(np.int64)
    dead = (len(left_accepting) - 1) * width + width - 1

    def closed(pairs: np.ndarray) -> np.ndarray:
        if union:
            return pairs
        lost = (pairs // width == len(left_accepting) - 1) | (pairs % width == width - 1)
        return np.where(lost, dead, pairs)

    frontier = np.array([left_start * width + right_start], np.int64)
    seen = {int(frontier[0]), dead}
    while frontier.size:
        reached = np.unique(closed(left[frontier // width] * width + right[frontier % width])).tolist()
        frontier = np.array([pair for pair in reached if pair not in seen], np.int64)
        seen.update(reached)
        if len(seen) > _MOST_PAIRS:
            raise TooLarge(f"an automaton of more than {len(seen)} states is needed; at most {_MOST_PAIRS} are built")
    pairs = np.array(sorted(seen), np.int64)
    one, two = pairs // width, pairs % width
    table = np.searchsorted(pairs, closed(left[one] * width + right[two])).astype(np.int32)
    combine = np.logical_or if union else np.logical_and
    start = int(np.searchsorted(pairs, left_start * width + right_start))
    return minimise(table, combine(left_accepting[one], right_accepting[two]), start)


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
    """Split the parts until nothing splits one any more. The last state is dead."""
    weights = rng.integers(1 << 63, size=table.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    count = part.max() + 1
    for _ in range(_MOST_ROUNDS):
        values = rng.integers(1 << 63, size=count, dtype=np.uint64)
        row = values[part] * np.uint64(0x9E3779B97F4A7C15)
        for low in range(0, len(table), _ROWS):
            row[low : low + _ROWS] += values[part[table[low : low + _ROWS]]] @ weights
        _, finer = np.unique(row, return_inverse=True)
        finer = finer.reshape(-1)
        if finer.max() + 1 <= count:
            return part
        part, count = finer, finer.max() + 1
    return _refine_by_parts(table, part, weights)


def _refine_by_parts(table: np.ndarray, part: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Split parts by which symbols lead into one of them, the smaller ones only where a part has been split."""
    dead = len(table) - 1
    incoming: list[list[tuple[int, int]]] = [[] for _ in table]  # states before, and the sum of their symbols' weights
    for state, row in enumerate(table[:-1]):
        targets, symbol = np.unique(row, return_inverse=True)
        sums = np.zeros(len(targets), np.uint64)
        np.add.at(sums, symbol.reshape(-1), weights)
        for target, total in zip(targets.tolist(), sums.tolist(), strict=True):
            incoming[target].append((state, total))
    members: dict[int, set[int]] = {}
    owner = part.tolist()
    for state, one in enumerate(owner):
        members.setdefault(one, set()).add(state)
    queue = set(members) - {owner[dead]}  # what does not lead into another part leads into the dead one
    while queue:
        entering: dict[int, int] = {}
        for target in members[queue.pop()]:
            for state, total in incoming[target]:
                entering[state] = entering.get(state, 0) + total
        split: dict[int, dict[int, list[int]]] = {}
        for state, total in entering.items():
            split.setdefault(owner[state], {}).setdefault(total % 2**64, []).append(state)
        for one, groups in split.items():
            left = len(members[one]) - sum(map(len, groups.values()))
            found = list(groups.values()) if left else sorted(groups.values(), key=len)[:-1]
            numbers = [one]
            for states in found:
                numbers.append(len(members))
                members[numbers[-1]] = set(states)
                members[one].difference_update(states)
                for state in states:
                    owner[state] = numbers[-1]
            largest = max(numbers, key=lambda number: len(members[number]))
            is_due = one in queue
            queue.update(number for number in numbers if is_due or number != largest)
    return np.array(owner)


def _ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """All integers of `[starts[i], stops[i])`, for one i after the other."""
    lengths = stops - starts
    return np.arange(lengths.sum()) + np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
