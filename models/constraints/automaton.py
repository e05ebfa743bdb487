"""Automata over tokens on the device: which tokens may follow, and the state after each.

With n(s, v) the state after token v in state s and d(s) the fewest tokens from s to an accepting state, the tokens
that may be drawn while b more remain after this one are

    (1)  A(s, b) = {v : d(n(s, v)) <= b}  and, where s accepts, the end tokens.

A prefix that can be finished within its budget stays so under (1). Most columns of n are equal: tokens are gathered
into classes, so that the table has a column for each class and not for each of the V tokens, and a mask is formed for
the classes and copied out to their tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ppl.models.constraints.byte_automaton import ByteAutomaton
from ppl.models.constraints.tables import UNREACHABLE, distances, distinct_rows, minimise
from ppl.models.constraints.vocabulary import Vocabulary

__all__ = ["Automaton", "accepts", "advance", "allowed", "check_reachable", "over_tokens"]

_ROWS = 64  # states that are walked through the tokens together


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["token_class", "next_state", "distance", "accepting", "start"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
    """A constraint over the tokens of one vocabulary; a pytree of arrays, S states and C classes of tokens.

    Attributes:
        token_class: shape (V,), the class of every token. Class C - 1 holds the end tokens.
        next_state: shape (S, C), the state after a token of each class. Tokens that may never be drawn lead to the
            dead state, which is the last; end tokens leave the state as it is.
        distance: shape (S,), the fewest text tokens to an accepting state; 2^30 where there is no way.
        accepting: shape (S,), whether the text so far satisfies the constraint.
        start: shape (), the state before the first token.
    """

    token_class: Int[Array, " V"]
    next_state: Int[Array, "S C"]
    distance: Int[Array, " S"]
    accepting: Bool[Array, " S"]
    start: Int[Array, ""]

    @property
    def num_bytes(self) -> int:
        """Memory of all arrays, in bytes."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        states, classes = self.next_state.shape
        return (
            f"Automaton({states} states, {classes} classes of {self.token_class.size} tokens, {self.num_bytes} bytes)"
        )


def allowed(automaton: Automaton, state: Int[Array, ""], budget: Int[Array, ""] | int) -> Bool[Array, " V"]:
    """The tokens that may follow, (1).

    Args:
        automaton: the constraint.
        state: shape (), the state of one particle.
        budget: shape (), how many more text tokens there is room for after this one.

    Returns:
        Shape (V,). In the dead state no token may follow.
    """
    row = automaton.next_state[state].astype(jnp.int32)
    classes = automaton.distance[row] <= budget
    classes = classes.at[-1].set(automaton.accepting[state])
    return classes[automaton.token_class]


def advance(automaton: Automaton, state: Int[Array, ""], token: Int[Array, ""]) -> Int[Array, ""]:
    """The state after one more token.

    Args:
        automaton: the constraint.
        state: shape (), the state of one particle.
        token: shape (), in [0, V).

    Returns:
        Shape (), int32. End tokens leave the state as it is.
    """
    return automaton.next_state[state, automaton.token_class[token]].astype(jnp.int32)


def accepts(automaton: Automaton, state: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the text so far satisfies the constraint."""
    return automaton.accepting[state]


def check_reachable(automaton: Automaton, max_tokens: int) -> None:
    """Make sure that some text fits the budget.

    Args:
        automaton: a constraint, outside of jit.
        max_tokens: the largest number of text tokens.

    Raises:
        ValueError: every text that satisfies the constraint needs more tokens, or there is none.
    """
    with jax.ensure_compile_time_eval():  # a model may be staged meanwhile
        needed = int(automaton.distance[int(automaton.start)])
    if needed == UNREACHABLE:
        raise ValueError(
            f"no text that this vocabulary can write satisfies the constraint, with `max_tokens` = {max_tokens} or any."
        )
    if needed > max_tokens:
        raise ValueError(
            f"the constraint cannot be satisfied within `max_tokens` = {max_tokens}: its shortest text takes {needed} "
            "tokens."
        )


def over_tokens(language: ByteAutomaton, vocabulary: Vocabulary) -> Automaton:
    """Compile a language of bytes for the tokens of a vocabulary.

    Args:
        language: the texts that satisfy the constraint.
        vocabulary: what the tokens write; every sequence of tokens that writes such a text is accepted.

    Returns:
        The smallest automaton over classes of tokens, on JAX's default device.
    """
    if vocabulary.strips_space:
        language = language.after_optional_space().minimal()
    trie = _trie(vocabulary)
    text_class, chosen = _classes(language, trie)
    table, accepting, start = minimise(_walk(language, trie, chosen), language.accepting, language.start)
    chosen, merged = distinct_rows(table.T)  # states have gone: more columns are equal
    table = table[:, chosen]
    distance = distances(table, accepting)

    end_class = table.shape[1]
    table = np.concatenate([table, np.arange(len(table))[:, None]], axis=1)
    token_class = merged[text_class][trie.text_of_token]
    token_class[list(vocabulary.end_tokens)] = end_class
    with jax.ensure_compile_time_eval():
        return Automaton(
            token_class=jnp.asarray(token_class.astype(_smallest(end_class))),
            next_state=jnp.asarray(table.astype(_smallest(len(table) - 1))),
            distance=jnp.asarray(distance, jnp.int32),
            accepting=jnp.asarray(accepting),
            start=jnp.asarray(start, jnp.int32),
        )


def _smallest(largest: int) -> type:
    return next(kind for kind in (np.uint8, np.uint16, np.int32) if largest <= np.iinfo(kind).max)


@dataclasses.dataclass(frozen=True)
class _Trie:
    """The distinct texts of a vocabulary as a tree of bytes; the children of a node are neighbours.

    Attributes:
        byte: shape (M,), the byte that leads to each node.
        parent: shape (M,), the node before.
        first_child: shape (M,).
        num_children: shape (M,).
        text: shape (M,), the number of the text that ends here, -1 where none does.
        text_of_token: shape (V,), the number of every token's text; the last number is that of no text.
        node_of_text: shape (U,), where every text ends.
    """

    byte: np.ndarray
    parent: np.ndarray
    first_child: np.ndarray
    num_children: np.ndarray
    text: np.ndarray
    text_of_token: np.ndarray
    node_of_text: np.ndarray


@functools.lru_cache(maxsize=8)
def _trie(vocabulary: Vocabulary) -> _Trie:
    ends = set(vocabulary.end_tokens)
    texts = [None if token in ends else text for token, text in enumerate(vocabulary.tokens)]
    distinct = sorted({text for text in texts if text is not None})
    number = {text: position for position, text in enumerate(distinct)}
    byte, parent, first_child, num_children, ending = [0], [-1], [], [], []
    groups = [(0, len(distinct), 0)]  # texts of one prefix, and its length: breadth first
    position = 0
    while position < len(groups):
        low, high, depth = groups[position]
        ends_here = low < high and len(distinct[low]) == depth
        ending.append(low if ends_here else -1)
        low += ends_here
        first_child.append(len(groups))
        while low < high:
            following = distinct[low][depth]
            stop = low + 1
            while stop < high and distinct[stop][depth] == following:
                stop += 1
            groups.append((low, stop, depth + 1))
            byte.append(following)
            parent.append(position)
            low = stop
        num_children.append(len(groups) - first_child[-1])
        position += 1
    text = np.array(ending)
    node_of_text = np.zeros(len(distinct), np.int64)
    node_of_text[text[text >= 0]] = np.flatnonzero(text >= 0)
    return _Trie(
        byte=np.array(byte),
        parent=np.array(parent),
        first_child=np.array(first_child),
        num_children=np.array(num_children),
        text=text,
        text_of_token=np.array([len(distinct) if one is None else number[one] for one in texts]),
        node_of_text=node_of_text,
    )


def _classes(language: ByteAutomaton, trie: _Trie) -> tuple[np.ndarray, np.ndarray]:
    """Gather the texts with equal columns, by two random 64-bit sums over the states.

    Two of 50,000 columns that differ are taken for equal with a probability below 1e-28.

    Returns:
        The class of every text and of no text, and one text for each class, -1 for the class of no text.
    """
    num_states, dead = len(language.accepting), len(language.accepting) - 1
    no_text = len(trie.node_of_text)
    rng = np.random.default_rng(0)
    sums = np.zeros((2, no_text + 1), np.uint64)
    scale = rng.integers(1 << 63, size=(2, num_states), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    value = rng.integers(1 << 63, size=(2, num_states), dtype=np.uint64)
    value -= value[:, -1:]  # the dead state counts nothing, so that only what is alive is summed
    for low in range(0, dead, _ROWS):
        origin = np.arange(low, min(low + _ROWS, dead))
        state, node = origin, np.zeros_like(origin)
        while origin.size:
            text = trie.text[node]
            here = text >= 0
            for total, a, b in zip(sums, scale, value, strict=True):
                np.add.at(total, text[here], a[origin[here]] * b[state[here]])
            count = trie.num_children[node]
            pair = np.repeat(np.arange(node.size), count)
            child = np.arange(pair.size) + np.repeat(trie.first_child[node] - (np.cumsum(count) - count), count)
            following = language.next_state[state[pair], trie.byte[child]]
            alive = following != dead
            origin, state, node = origin[pair[alive]], following[alive], child[alive]
    _, chosen, text_class = np.unique(sums, axis=1, return_index=True, return_inverse=True)
    return text_class.reshape(-1), np.where(chosen == no_text, -1, chosen)


def _walk(language: ByteAutomaton, trie: _Trie, texts: np.ndarray) -> np.ndarray:
    """The state after each of some texts from every state, shape (S, number of texts); dead for the text -1."""
    num_states = len(language.accepting)
    table = np.empty((num_states, len(texts)), np.int32)
    for column, text in enumerate(texts):
        node, read = trie.node_of_text[text] if text >= 0 else 0, []
        while node:
            read.append(trie.byte[node])
            node = trie.parent[node]
        state = np.arange(num_states) if text >= 0 else np.full(num_states, num_states - 1)
        for byte in reversed(read):
            state = language.next_state[state, byte]
        table[:, column] = state
    return table
