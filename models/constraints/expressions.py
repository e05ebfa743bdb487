r"""Regular expressions over characters, and the automaton of one.

An expression is a set of texts, built from sets of characters by sequence, choice and repetition, with assertions in
between, and with small automata whose edges are expressions (`Graph`). It becomes a nondeterministic automaton
(Thompson, 1968, "Regular expression search algorithm"), and that a deterministic one by the construction of subsets.

Assertions look at most one character back, which is known when a state is entered, and at what follows. The latter
becomes an obligation that a thread carries on,

    (1)  (which characters may follow, whether the text may end here, whether something may follow after the next),

so that no assertion needs a second pass: `$` of Python, true at the end and before a line feed that ends the text, is
the obligation (line feed, yes, no), a word boundary after a letter is (no letter, yes, yes). Obligations of one thread
are joined by "and".

The size of an automaton can grow exponentially with that of the expression, as in `[ab]*a[ab]{20}`: both the states and
the work are bounded, and what exceeds them is refused with the number of states.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from ppl.models.constraints.character_automaton import CharacterAutomaton
from ppl.models.constraints.code_points import ANY, CodePoints, of, partition
from ppl.models.constraints.tables import MOST_STATES, TooLarge

__all__ = [
    "EMPTY",
    "NOTHING",
    "Assertion",
    "Characters",
    "Either",
    "Expression",
    "Graph",
    "Repeat",
    "Concatenation",
    "anything",
    "automaton_of",
    "either",
    "embed",
    "optional",
    "repeat",
    "sequence",
    "size",
    "text",
]

MOST_PARTS = 100_000  # states of the nondeterministic automaton
_MOST_WORK = 6_000_000  # threads followed, which take about ten seconds
_ACCEPT = 0  # the number of the state in which a text is complete


class Expression:
    """A set of texts."""


@dataclasses.dataclass(frozen=True, eq=False)
class Characters(Expression):
    """The texts of one character of a set."""

    points: CodePoints


@dataclasses.dataclass(frozen=True, eq=False)
class Concatenation(Expression):
    """A text of each part, one after the other."""

    parts: tuple[Expression, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Either(Expression):
    """A text of any part."""

    parts: tuple[Expression, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Repeat(Expression):
    """Several texts of one expression: at least `least`, at most `most`, without a bound where that is None."""

    inner: Expression
    least: int
    most: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Assertion(Expression):
    """The empty text, where something holds.

    Attributes:
        kind: "start" and "end" of the text, "end or last newline", "line start" and "line end", which are next to a
            line feed too, "boundary" and "inside", between characters of which exactly one is of a word, or not so.
        word: the characters of words, for the last two.
        inside_nothing: whether the empty text counts as "inside".
    """

    kind: str
    word: CodePoints = ()
    inside_nothing: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Graph(Expression):
    """The texts along the paths from node 0 to an accepting node.

    Attributes:
        edges: for every node what may be written from there, and where that leads.
        accepting: the nodes in which a text may end.
    """

    edges: Sequence[Sequence[tuple[Expression, int]]]
    accepting: frozenset[int]


EMPTY = Concatenation(())
NOTHING = Either(())


def text(written: str) -> Expression:
    """One text alone."""
    return Concatenation(tuple(_character(one) for one in written))


@functools.lru_cache(maxsize=4096)
def _character(one: str) -> Characters:
    return Characters(of(one))


def sequence(*parts: Expression) -> Expression:
    """A text of each part, one after the other."""
    return parts[0] if len(parts) == 1 else Concatenation(parts)


def either(parts: Iterable[Expression]) -> Expression:
    """A text of any part."""
    parts = tuple(parts)
    return parts[0] if len(parts) == 1 else Either(parts)


def repeat(inner: Expression, least: int, most: int | None) -> Expression:
    """From `least` to `most` texts of one expression."""
    return NOTHING if most is not None and most < least else Repeat(inner, least, most)


def optional(inner: Expression) -> Expression:
    """A text of the expression, or nothing."""
    return Repeat(inner, 0, 1)


def anything() -> Expression:
    """All texts."""
    return Repeat(Characters(ANY), 0, None)


def embed(automaton: CharacterAutomaton) -> Graph:
    """The texts of an automaton."""
    order = [automaton.start, *(s for s in range(automaton.num_states - 1) if s != automaton.start)]
    number = {state: position for position, state in enumerate(order)}
    edges = [
        [(Characters(points), number[target]) for points, target in automaton.moves(state) if target in number]
        for state in order
    ]
    return Graph(edges, frozenset(number[s] for s in order if automaton.accepting[s]))


def size(expression: Expression) -> int:
    """How many states the nondeterministic automaton takes."""
    match expression:
        case Concatenation(parts):
            return sum(map(size, parts))
        case Either(parts):
            return 1 + sum(map(size, parts))
        case Repeat(inner, least, most):
            return (
                1 + max(least, 1) * size(inner)
                if most is None
                else least * size(inner) + (most - least) * (1 + size(inner))
            )
        case Graph(edges, _):
            inner = (size(one) for row in edges for one, _ in row if not isinstance(one, Characters))
            return len(edges) + sum(inner)
    return 1


def automaton_of(expression: Expression) -> CharacterAutomaton:
    """The smallest automaton of an expression.

    Args:
        expression: the texts.

    Returns:
        The automaton over characters.

    Raises:
        TooLarge: it would have too many states; the message says how many.
    """
    parts = size(expression)
    if parts > MOST_PARTS:
        raise TooLarge(f"an automaton of about {parts} states is needed; at most {MOST_PARTS} are built")
    return _Subsets(_Threads(expression)).automaton()


class _Threads:
    """The nondeterministic automaton: for every state what it reads, and where it goes without reading."""

    def __init__(self, expression: Expression):
        sets: dict[CodePoints, int] = {}
        self.assertions = False
        self._collect(expression, sets)
        self.classes, bits = partition(list(sets))
        self.bits = dict(zip(sets, bits, strict=True))
        self.every = (1 << len(self.classes)) - 1
        self.moves: list[list[tuple[int, int]]] = []  # bits of the classes, the next state
        self.jumps: list[list[int]] = []
        self.guards: list[tuple[Assertion, int] | None] = []
        self.new()
        self.start = self._build(expression, _ACCEPT)

    def _collect(self, expression: Expression, sets: dict[CodePoints, int]) -> None:
        match expression:
            case Characters(points):
                sets.setdefault(points, len(sets))
            case Concatenation(parts) | Either(parts):
                for part in parts:
                    self._collect(part, sets)
            case Repeat(inner, _, _):
                self._collect(inner, sets)
            case Assertion(_, word, _):
                self.assertions = True
                for points in (word, of("\n")):
                    sets.setdefault(points, len(sets))
            case Graph(edges, _):
                for row in edges:
                    for one, _ in row:
                        self._collect(one, sets)

    def new(self) -> int:
        self.moves.append([])
        self.jumps.append([])
        self.guards.append(None)
        return len(self.moves) - 1

    def _build(self, expression: Expression, following: int) -> int:
        """Add what reads an expression and goes on in a state; gives the state before."""
        match expression:
            case Characters(points):
                state = self.new()
                if points:
                    self.moves[state].append((self.bits[points], following))
                return state
            case Concatenation(parts):
                for part in reversed(parts):
                    following = self._build(part, following)
                return following
            case Either(parts):
                state = self.new()
                self.jumps[state] = [self._build(part, following) for part in parts]
                return state
            case Repeat(inner, least, most):
                if most is None:
                    state = self.new()
                    self.jumps[state] = [self._build(inner, state), following]
                    following = state
                else:
                    after = following
                    for _ in range(most - least):
                        state = self.new()
                        self.jumps[state] = [self._build(inner, following), after]
                        following = state
                for _ in range(least):
                    following = self._build(inner, following)
                return following
            case Assertion():
                state = self.new()
                self.guards[state] = (expression, following)
                return state
            case Graph(edges, accepting):
                states = [self.new() for _ in edges]
                for node, row in enumerate(edges):
                    if node in accepting:
                        self.jumps[states[node]].append(following)
                    for one, target in row:
                        if isinstance(one, Characters):
                            if one.points:
                                self.moves[states[node]].append((self.bits[one.points], states[target]))
                        else:
                            self.jumps[states[node]].append(self._build(one, states[target]))
                return states[0]
        raise TypeError(f"{expression!r} is no expression.")


_Obligation = tuple[int, bool, int]  # (1): classes as bits, may end, and the number of the obligation after that
_FREE, _DONE = 0, 1


class _Subsets:
    """The construction of subsets: a state of the deterministic automaton is a set of threads.

    A thread is a state and an obligation, written as one number, `obligation * num_states + state`.
    """

    def __init__(self, threads: _Threads):
        self.threads = threads
        self.width = len(threads.moves)
        self.obligations: list[_Obligation] = [(threads.every, True, _FREE), (0, True, _FREE)]
        self.number = {one: place for place, one in enumerate(self.obligations)}
        self.closures: dict[tuple[int, int], tuple[int, ...]] = {}
        self.before = self._characters_before()
        self.work = 0

    def automaton(self) -> CharacterAutomaton:
        threads = self.threads
        first = frozenset(self._closure(threads.start, -1))
        number, queue, rows = {first: 0}, [first], []
        entered: dict[tuple[frozenset[int], int], int] = {}
        while len(rows) < len(queue):
            row = []
            for bits, targets, previous in self._steps(queue[len(rows)]):
                entry = (frozenset(targets), previous)
                if entry not in entered:
                    subset = frozenset(one for target in entry[0] for one in self._closure(target, previous))
                    if subset not in number:
                        number[subset] = len(queue)
                        queue.append(subset)
                    entered[entry] = number[subset]
                row.append((bits, entered[entry]))
            rows.append(row)
            if len(queue) > MOST_STATES or self.work > _MOST_WORK:
                raise TooLarge(
                    f"an automaton of more than {len(queue)} states is needed; at most {MOST_STATES} are built"
                )
        return self._table(rows, [self._accepts(subset) for subset in queue])

    def _table(self, rows: list[list[tuple[int, int]]], accepting: list[bool]) -> CharacterAutomaton:
        count = len(self.threads.classes)
        table = np.full((len(rows) + 1, count), len(rows), np.int32)

        @functools.cache
        def columns(bits: int) -> np.ndarray:
            packed = np.frombuffer(bits.to_bytes(-(-count // 8), "little"), np.uint8)
            return np.flatnonzero(np.unpackbits(packed, bitorder="little"))

        for state, row in enumerate(rows):
            for bits, target in row:
                table[state, columns(bits)] = target
        return CharacterAutomaton(tuple(self.threads.classes), table, np.array([*accepting, False]), 0).minimal()

    def _characters_before(self) -> list[int]:
        """The classes, as bits, that assertions tell apart when they look back."""
        pieces = [self.threads.every]
        words = {guard[0].word for guard in self.threads.guards if guard} | {of("\n")}
        for points in words if self.threads.assertions else ():
            bits = self.threads.bits[points]
            pieces = [piece for one in pieces for piece in (one & bits, one & ~bits) if piece]
        return pieces

    def _steps(self, subset: frozenset[int]) -> Iterable[tuple[int, tuple[int, ...], int]]:
        """What each class of characters leads to: the classes as bits, threads, and what they have read."""
        reads: dict[int, list[int]] = {}
        for thread in subset:
            obligation, state = divmod(thread, self.width)
            permitted, _, after = self.obligations[obligation]
            for bits, target in self.threads.moves[state]:
                bits &= permitted
                if bits:
                    reads.setdefault(bits, []).append(after * self.width + target)
        self.work += len(subset) + sum(map(len, reads.values()))
        joint = functools.reduce(int.__or__, reads, 0)
        if len(self.before) == 1 and sum(map(int.bit_count, reads)) == joint.bit_count():
            return [(bits, tuple(targets), 0) for bits, targets in reads.items()]
        pieces = [(bits, (), previous) for previous, bits in enumerate(self.before)]
        for bits, targets in reads.items():
            split = []
            for piece, found, previous in pieces:
                inside, outside = piece & bits, piece & ~bits
                if inside:
                    split.append((inside, (*found, *targets), previous))
                if outside:
                    split.append((outside, found, previous))
            pieces = split
            self.work += len(pieces)
        return [piece for piece in pieces if piece[1]]

    def _closure(self, thread: int, previous: int) -> tuple[int, ...]:
        """The threads that one becomes without reading, after a character of a class; -1 is the start of the text."""
        key = (thread, previous if self.threads.assertions else 0)
        if key not in self.closures:
            seen, queue, kept = {thread}, [thread], []
            while queue:
                obligation, state = divmod(queue.pop(), self.width)
                if state == _ACCEPT or self.threads.moves[state]:
                    kept.append(obligation * self.width + state)
                reached = [obligation * self.width + target for target in self.threads.jumps[state]]
                guard = self.threads.guards[state]
                if guard:
                    more = self._obligation(guard[0], obligation, previous)
                    reached += [] if more is None else [more * self.width + guard[1]]
                for one in reached:
                    if one not in seen:
                        seen.add(one)
                        queue.append(one)
            self.work += len(seen)
            self.closures[key] = tuple(kept)
        return self.closures[key]

    def _obligation(self, assertion: Assertion, obligation: int, previous: int) -> int | None:
        """The obligation once an assertion holds too, None where it cannot hold."""
        every, newline = self.threads.every, self.threads.bits[of("\n")]
        read = 0 if previous < 0 else self.before[previous]
        word = self.threads.bits[assertion.word]
        match assertion.kind:
            case "start":
                return obligation if previous < 0 else None
            case "line start":
                return obligation if previous < 0 or read & newline else None
            case "end":
                more = self.obligations[_DONE]
            case "end or last newline":
                more = (newline, True, _DONE)
            case "line end":
                more = (newline, True, _FREE)
            case "boundary":
                more = (every & ~word, True, _FREE) if read & word else (word, False, _FREE)
            case "inside":
                ends = previous >= 0 or assertion.inside_nothing
                more = (word, False, _FREE) if read & word else (every & ~word, ends, _FREE)
            case _:
                raise ValueError(f"{assertion.kind!r} is no assertion.")
        one = self.obligations[obligation]
        joint = (one[0] & more[0], one[1] and more[1], max(one[2], more[2]))
        if not joint[0]:
            if not joint[1]:
                return None
            joint = self.obligations[_DONE]
        if joint not in self.number:
            self.number[joint] = len(self.obligations)
            self.obligations.append(joint)
        return self.number[joint]

    def _accepts(self, subset: frozenset[int]) -> bool:
        return any(thread % self.width == _ACCEPT and self.obligations[thread // self.width][1] for thread in subset)
