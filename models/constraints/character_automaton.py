"""Languages of texts, as automata that read a text character by character, and what they are over the bytes of UTF-8.

Characters are gathered into classes, so that the table has a column for each class. Over bytes, the characters of a
state are a tree of depth four, by UTF-8: its inner nodes are shared wherever the same states follow.
"""

import bisect
import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int

from ppl.models.constraints import tables
from ppl.models.constraints.byte_automaton import ByteAutomaton
from ppl.models.constraints.code_points import CodePoints, code_points, partition
from ppl.models.constraints.tables import distinct_rows, minimise

__all__ = ["CharacterAutomaton"]


@dataclasses.dataclass(frozen=True, eq=False)
class CharacterAutomaton:
    """A language of texts.

    Attributes:
        classes: C sets of characters, disjoint, all characters together.
        next_state: shape (S, C), the successor of every state by the characters of every class.
        accepting: shape (S,), whether the text read so far belongs to the language.
        start: the state before the first character.

    The last state is dead.
    """

    classes: tuple[CodePoints, ...]
    next_state: Int[np.ndarray, "S C"]
    accepting: Bool[np.ndarray, " S"]
    start: int

    @property
    def num_states(self) -> int:
        """How many states there are, the dead one counted."""
        return len(self.accepting)

    @property
    def is_empty(self) -> bool:
        """Whether no text belongs to the language; needs the smallest automaton."""
        return not self.accepting.any()

    @functools.cached_property
    def _ranges(self) -> tuple[list[int], list[int]]:
        """Where ranges of one class begin, increasing, and the class; surrogates belong to none."""
        parts = [(low, number) for number, points in enumerate(self.classes) for low, _ in points]
        low, number = zip(*sorted([*parts, (0xD800, -1)]), strict=True)
        return list(low), list(number)

    @property
    def _class_of(self) -> np.ndarray:
        """The class of every code point, -1 for surrogates."""
        found = np.full(0x110000, -1, np.int32)
        for number, points in enumerate(self.classes):
            for low, high in points:
                found[low : high + 1] = number
        return found

    def accepts(self, text: str) -> bool:
        """Whether a text belongs to the language."""
        state = self.start
        for character in text:
            low, number = self._ranges
            symbol = number[bisect.bisect_right(low, ord(character)) - 1]
            if symbol < 0:
                return False
            state = self.next_state[state, symbol]
        return bool(self.accepting[state])

    def moves(self, state: int) -> list[tuple[CodePoints, int]]:
        """Where a state leads: sets of characters and their successors, without the dead state."""
        row = self.next_state[state]
        targets = [int(one) for one in np.unique(row) if one != self.num_states - 1]
        return [
            (code_points(part for one in np.flatnonzero(row == target) for part in self.classes[one]), target)
            for target in targets
        ]

    def minimal(self) -> "CharacterAutomaton":
        """The smallest automaton of the same language, with the fewest classes."""
        table, accepting, start = minimise(self.next_state, self.accepting, self.start)
        chosen, merged = distinct_rows(table.T)
        ranges: list[list[tuple[int, int]]] = [[] for _ in chosen]
        for one, points in zip(merged, self.classes, strict=True):
            ranges[one].extend(points)
        return CharacterAutomaton(tuple(map(code_points, ranges)), table[:, chosen], accepting, start)

    def complement(self) -> "CharacterAutomaton":
        """The texts that are not in the language."""
        dead = len(self.accepting)  # the former dead state accepts now
        table = np.vstack([self.next_state, np.full((1, len(self.classes)), dead, self.next_state.dtype)])
        return CharacterAutomaton(self.classes, table, np.append(~self.accepting, False), self.start).minimal()

    def __and__(self, other: "CharacterAutomaton") -> "CharacterAutomaton":
        return self._product(other, union=False)

    def __or__(self, other: "CharacterAutomaton") -> "CharacterAutomaton":
        return self._product(other, union=True)

    def _product(self, other: "CharacterAutomaton", *, union: bool) -> "CharacterAutomaton":
        classes, bits = partition([*self.classes, *other.classes])
        own, others = np.zeros(len(classes), int), np.zeros(len(classes), int)
        for place, members in enumerate(bits):
            column, number = (own, place) if place < len(self.classes) else (others, place - len(self.classes))
            for one in range(len(classes)):
                if members >> one & 1:
                    column[one] = number
        table, accepting, start = tables.product(
            (self.next_state[:, own], self.accepting, self.start),
            (other.next_state[:, others], other.accepting, other.start),
            union=union,
        )
        return CharacterAutomaton(tuple(classes), table, accepting, start).minimal()

    def to_bytes(self) -> ByteAutomaton:
        """The same texts in UTF-8, as the smallest automaton over bytes; of the smallest automaton alone."""
        tree = _Utf8(self.classes, self._class_of)
        dead = self.num_states - 1
        # States whose classes are grouped alike share the shape of their trees: a group is one successor.
        shapes: dict[bytes, tuple[tuple[np.ndarray, np.ndarray], list[int], list[np.ndarray]]] = {}
        for state, row in enumerate(self.next_state):
            targets, group = np.unique(row, return_inverse=True)
            group = group.reshape(-1).astype(np.int32)
            alive = targets != dead
            group = np.where(alive, np.cumsum(alive) - 1, -1)[group].astype(np.int32)
            if group.tobytes() not in shapes:
                shapes[group.tobytes()] = (tree.shape(group), [], [])
            shapes[group.tobytes()][1].append(state)
            shapes[group.tobytes()][2].append(targets[alive])
        total = self.num_states + sum(len(states) * (len(shape[0]) - 1) for shape, states, _ in shapes.values())
        table = np.full((total + 1, tree.num_bytes), total, np.int32)
        of_level: list[list[np.ndarray]] = [[], [], []]
        used = self.num_states
        for (template, level), states, targets in shapes.values():
            successors = np.array(targets).reshape(len(states), -1)
            place = np.empty((len(states), len(template)), np.int64)  # the row of every node of every state
            place[:, 0] = states
            place[:, 1:] = used + np.arange(len(states) * (len(template) - 1)).reshape(len(states), -1)
            used += len(states) * (len(template) - 1)
            for node, row in enumerate(template):
                columns = np.flatnonzero(row >= 0)
                table[place[:, node, None], columns] = place[:, row[columns]]
                columns = np.flatnonzero(row <= -2)
                table[place[:, node, None], columns] = successors[:, -2 - row[columns]]
            for one in range(3):
                of_level[one].append(place[:, level == one].reshape(-1))
        table[table == dead] = total
        # The states differ by assumption; nodes within characters are joined from the last byte upwards.
        same = np.arange(total + 1)
        for rows in map(np.concatenate, of_level):
            chosen, kind = distinct_rows(same[table[rows]])
            same[rows] = rows[chosen][kind]
        kept = np.flatnonzero((same == np.arange(total + 1)) & (np.arange(total + 1) != dead))
        number = np.zeros(total + 1, np.int32)
        number[kept] = np.arange(len(kept))
        accepting = np.zeros(total + 1, bool)
        accepting[: self.num_states] = self.accepting
        start = total if self.start == dead else self.start
        table = number[same[table[kept]]]
        return ByteAutomaton(table[:, tree.byte_class], accepting[kept], int(number[start]))


class _Utf8:
    """The tree of all characters by their bytes in UTF-8, with classes at its leaves.

    `levels[k]` has the distinct nodes from which k + 1 bytes follow, with 64 entries each: classes in level 0, nodes of
    the level below in the others, -1 where nothing follows. `root` has an entry for each first byte.
    """

    def __init__(self, classes: tuple[CodePoints, ...], class_of: np.ndarray):
        # The class of every 64 characters in a row, -1 for surrogates, -2 where there are several.
        block = np.full(0x110000 // 64, -2)
        block[0xD800 // 64 : 0xE000 // 64] = -1
        for number, points in enumerate(classes):
            for low, high in points:
                block[-(-low // 64) : (high + 1) // 64] = number
        block[:2] = -1  # two bytes begin at U+0080
        mixed = np.flatnonzero(block == -2)
        rows = class_of.reshape(-1, 64)[mixed]
        chosen, kind = distinct_rows(rows)
        last = np.concatenate([np.repeat(np.arange(-1, len(classes))[:, None], 64, axis=1), rows[chosen]])
        block += 1  # the first rows of `last` have one class each
        block[mixed] = len(classes) + 1 + kind
        used, block = np.unique(block, return_inverse=True)
        last, block = last[used], block.reshape(-1)
        rows = block.reshape(-1, 64).copy()
        rows[0, :32] = -1  # three bytes begin at U+0800
        chosen, group = distinct_rows(rows)
        middle = rows[chosen]
        rows = np.full((5, 64), -1)
        rows.reshape(-1)[16 : len(group)] = group[16:]  # four bytes begin at U+10000
        chosen, lead = distinct_rows(rows)
        self.levels = (last, middle, rows[chosen])
        self.root = ((slice(0xC2, 0xE0), block[2:32]), (slice(0xE0, 0xF0), group[:16]), (slice(0xF0, 0xF5), lead))
        self.ascii = class_of[:128]
        # Bytes that do the same everywhere are one column.
        kind = np.full(256, -1, np.int64)
        kind[:128] = self.ascii
        offset = int(class_of.max()) + 1
        for (where, nodes), level in zip(self.root, self.levels, strict=True):
            kind[where] = offset + nodes
            offset += len(level)
        kind[0x80:0xC0] = offset + distinct_rows(np.concatenate(self.levels).T)[1]
        _, self.columns, byte_class = np.unique(kind, return_index=True, return_inverse=True)
        self.byte_class = byte_class.reshape(-1)
        self.num_bytes = len(self.columns)

    def shape(self, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tree of a state, given the group of every class, -1 for the dead one.

        Returns:
            Shape (nodes, columns): a node, -1 for the dead state, -2 - g for the successor of group g. Node 0 is the
            first; and shape (nodes,), the level of every node, 3 for the first.
        """
        entries = np.where(group < 0, -1, -2 - group)
        root = np.full(256, -1)
        root[:128] = entries[self.ascii]
        nodes, levels, used = [root], [3], 1
        for level, ((where, children), rows) in enumerate(zip(self.root, self.levels, strict=True)):
            rows = np.append(entries, -1)[rows]
            chosen, kind = distinct_rows(rows)
            alive = (rows[chosen] != -1).any(axis=1)
            for row in rows[chosen][alive]:
                nodes.append(np.full(256, -1))
                nodes[-1][0x80:0xC0] = row
                levels.append(level)
            entries = np.where(alive, used + np.cumsum(alive) - 1, -1)[kind]
            used = len(nodes)
            root[where] = entries[children]
        return np.array(nodes)[:, self.columns], np.array(levels)
