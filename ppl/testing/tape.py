"""Every way that a randomised function can go, with its probability.

The choices that a function makes through `ppl.chance` are asked, by a callback, of a `Tape`. It answers with a recorded
choice or, for one that it has not met, with the first option of positive probability. Running the function again and
again while the tape counts through all options visits each leaf of the tree of choices once:

    sum over runs of  prod over choices of P(option)  =  1,                                                       (1)
    E[f] = sum over runs of  P(run) f(run).                                                                       (2)

Choices are known by their PRNG key and their odds, so that the order in which a compiled function happens to ask does
not matter. Two choices of one key with other odds depend on each other, which is an error. Under a `jax.vmap`, where
both sides of a branch are evaluated, that cannot be told: there they count as independent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl import chance
from ppl.draws import as_key
from ppl.testing.resampling_laws import conditional_law, law_of

__all__ = ["MAX_RUNS", "Enumerated", "Tape", "enumerate_runs", "enumerating"]

MAX_RUNS = 100_000  # a run takes about a millisecond
_MOST_CHOICES = 100_000  # of one run: more are a loop that waits for a choice that the tape does not make


class Tape:
    """The choices of one run."""

    def __init__(self):
        self.choices: dict[tuple, list] = {}  # draw -> [option, probabilities]
        self.uses: dict[bytes, tuple] = {}  # key -> the choice it is for
        self.failure: Exception | None = None

    def choose(self, draw: tuple, weights: np.ndarray) -> int:
        """Return the option that is taken for a draw, among those of positive weight.

        Where no weight is positive, or one is NaN, the draw is one of a dead particle: it is option 0 for certain.
        """
        known = self.choices.get(draw)
        if known is not None:
            return known[0]
        total = weights.sum()
        if not total > 0:
            return 0
        if len(self.choices) >= _MOST_CHOICES:
            raise RuntimeError(f"one run makes more than {_MOST_CHOICES} choices; does a loop wait for one of them?")
        option = int(np.flatnonzero(weights > 0)[0])
        self.choices[draw] = [option, weights / total]
        return option

    def claim(self, key: bytes, use: tuple) -> None:
        """Note what a key is used for; two uses are a failure."""
        other = self.uses.setdefault(key, use)
        if other != use and self.failure is None:
            kinds = " and ".join(sorted({repr(other[0]), repr(use[0])}))
            self.failure = AssertionError(
                f"one PRNG key makes two different choices ({kinds}): they depend on each other. Split the key."
            )

    def probability(self) -> float:
        """Return the probability of this run."""
        return float(np.prod([probabilities[option] for option, probabilities in self.choices.values()]))

    def advance(self) -> bool:
        """Move on to the next run; returns False after the last."""
        self.uses.clear()
        while self.choices:
            draw, (option, probabilities) = self.choices.popitem()
            later = option + 1 + np.flatnonzero(probabilities[option + 1 :] > 0)
            if later.size:
                self.choices[draw] = [int(later[0]), probabilities]
                return True
        return False


_TAPE: Tape | None = None


def _tape() -> Tape:
    if _TAPE is None:
        raise RuntimeError("a function that was compiled for enumeration runs outside of `enumerate_runs`.")
    return _TAPE


@dataclasses.dataclass(frozen=True)
class Enumerated:
    """The source of choices that asks the tape."""

    def choose(self, kind: str, key, weights) -> Any:
        """See `ppl.chance.Source`."""
        weights = jnp.asarray(weights, jnp.float32)
        return _ask(_Choice(kind, weights.ndim - 1), weights.shape[:-1], key, weights)

    def index(self, key, num) -> Any:
        """See `ppl.chance.Source`."""
        return _ask(_Index(), (), key, jnp.asarray(num, jnp.int32))

    def resampler(self, name: str) -> Callable:
        """See `ppl.chance.Source`."""
        return _Scheme(name)

    def conditional_resampler(self, name: str) -> Callable:
        """See `ppl.chance.Source`."""
        return _ConditionalScheme(name)


@contextlib.contextmanager
def enumerating() -> Iterator[None]:
    """Let all that is traced meanwhile make its choices by the tape of `enumerate_runs`.

    Sample sites whose laws are not finite raise a `TypeError` that names them.
    """
    with chance.replaced_by(Enumerated()):
        yield


class enumerate_runs:  # noqa: N801  it is called like a function
    """All runs of a function, compiled once.

    Example:
        >>> runs = enumerate_runs(lambda key: ppl.chance.index(key, 3), jax.random.key(0))
        >>> [(round(probability, 3), int(result)) for probability, result in runs(jax.random.key(0))]
        [(0.333, 0), (0.333, 1), (0.333, 2)]
    """

    def __init__(self, function: Callable, *args: Any):
        """Compile a function for arguments of these types.

        Raises:
            TypeError: it takes random numbers that are not choices of `ppl.chance`.
        """
        with enumerating():
            traced = jax.jit(lambda *args: function(*args)).trace(*args)
            if chance.random_bits_in(traced.jaxpr):
                raise TypeError(
                    f"{getattr(function, '__name__', function)!r} takes random numbers from jax.random, which cannot "
                    "be enumerated. Make its choices by ppl.chance.categorical, index, accept or sample, and name the "
                    "resampling scheme."
                )
            self._compiled = traced.lower().compile()

    def __call__(self, *args: Any, max_runs: int = MAX_RUNS) -> Iterator[tuple[float, Any]]:
        """Yield (probability, result) for each run, results with NumPy arrays.

        Raises:
            ValueError: there are more than `max_runs`.
            AssertionError: a PRNG key makes two different choices.
        """
        tape, covered, count = Tape(), 0.0, 0
        while True:
            result = self._run(tape, args)
            covered, count = covered + tape.probability(), count + 1
            yield tape.probability(), result
            if not tape.advance():
                return
            if count >= max_runs:
                raise ValueError(
                    f"more than `max_runs` = {max_runs} runs: these cover {covered:.3g} of the probability. Make the "
                    "program or the algorithm smaller, for instance two particles, two iterations, two values."
                )

    def _run(self, tape: Tape, args):
        global _TAPE
        before, _TAPE = _TAPE, tape
        try:
            result = jax.tree.map(np.asarray, self._compiled(*args))
        finally:
            _TAPE = before
        if tape.failure is not None:
            raise tape.failure
        return result


# The callbacks -------------------------------------------------------------------------------------------------------


def _ask(question: Callable, shape: tuple[int, ...], key, *operands):
    key_data = jax.random.key_data(as_key(key))
    answer = jax.ShapeDtypeStruct(shape, jnp.int32)
    return jax.pure_callback(question, answer, key_data, *operands, vmap_method="expand_dims")


@dataclasses.dataclass(frozen=True)
class _Choice:
    """One of finitely many, for each place of a batch of `rank` axes."""

    kind: str
    rank: int

    def __call__(self, key_data, weights) -> np.ndarray:
        weights = np.asarray(weights, np.float64)
        cut = weights.ndim - 1 - self.rank
        return _each_lane(self._answers, self.kind, weights.shape[cut:-1], key_data, (weights, cut))

    def _answers(self, draw: tuple, weights: np.ndarray) -> np.ndarray:
        out = np.zeros(weights.shape[:-1], np.int32)
        for place in np.ndindex(*out.shape):
            out[place] = _tape().choose((*draw, place, weights[place].tobytes()), weights[place])
        return out


@dataclasses.dataclass(frozen=True)
class _Index:
    """One of `0..num-1`."""

    def __call__(self, key_data, num) -> np.ndarray:
        num = np.asarray(num)
        return _each_lane(self._answers, "index", (), key_data, (num, num.ndim))

    def _answers(self, draw: tuple, num: np.ndarray) -> np.ndarray:
        return np.int32(_tape().choose((*draw, int(num)), np.ones(max(int(num), 0))))


@dataclasses.dataclass(frozen=True)
class _Scheme:
    """A resampling scheme by name: a function `(key, log_weights, num) -> ancestors`."""

    name: str
    num: int | None = None

    def __post_init__(self):
        law_of(self.name)

    def __call__(self, key, log_weights, num=None):
        num = jnp.shape(log_weights)[0] if num is None else num
        return _ask(dataclasses.replace(self, num=num)._ancestors, (num,), key, log_weights)

    def _ancestors(self, key_data, log_weights) -> np.ndarray:
        log_weights = np.asarray(log_weights, np.float64)
        return _each_lane(self._answers, self.name, (self.num,), key_data, (log_weights, log_weights.ndim - 1))

    def _answers(self, draw: tuple, log_weights: np.ndarray) -> np.ndarray:
        weights = _normalised(log_weights)
        if weights is None:
            return np.arange(self.num, dtype=np.int32) % len(log_weights)
        ancestors, probabilities = _law(self.name, weights, self.num)
        return ancestors[_tape().choose((*draw, log_weights.tobytes()), probabilities)]


@dataclasses.dataclass(frozen=True)
class _ConditionalScheme:
    """A conditional scheme by name: a function `(key, log_weights, retained, num) -> ancestors`."""

    name: str
    num: int | None = None

    def __post_init__(self):
        law_of(self.name)

    def __call__(self, key, log_weights, retained, num=None):
        num = jnp.shape(log_weights)[0] if num is None else num
        question = dataclasses.replace(self, num=num)._ancestors
        return _ask(question, (num,), key, log_weights, jnp.asarray(retained, jnp.int32))

    def _ancestors(self, key_data, log_weights, retained) -> np.ndarray:
        log_weights, retained = np.asarray(log_weights, np.float64), np.asarray(retained)
        operands = (log_weights, log_weights.ndim - 1), (retained, retained.ndim)
        return _each_lane(self._answers, f"conditional {self.name}", (self.num,), key_data, *operands)

    def _answers(self, draw: tuple, log_weights: np.ndarray, retained: np.ndarray) -> np.ndarray:
        weights, retained = _normalised(log_weights), int(np.clip(retained, 0, len(log_weights) - 1))
        if weights is None:
            return np.concatenate([[retained], np.arange(self.num - 1) % len(log_weights)]).astype(np.int32)
        ancestors, probabilities = _conditional_law(self.name, weights, retained, self.num)
        return ancestors[_tape().choose((*draw, retained, log_weights.tobytes()), probabilities)]


@functools.lru_cache(4096)
def _law(name: str, weights: tuple[float, ...], num: int):
    return law_of(name)(np.array(weights), num)


@functools.lru_cache(4096)
def _conditional_law(name: str, weights: tuple[float, ...], retained: int, num: int):
    return conditional_law(law_of(name), np.array(weights), retained, num)


def _normalised(log_weights: np.ndarray) -> tuple[float, ...] | None:
    """Return weights that sum to 1, NaN as zero; None where all are dead."""
    weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    if weights.max() == -np.inf:
        return None
    weights = np.exp(weights - weights.max())
    return tuple((weights / weights.sum()).tolist())


def _each_lane(answers: Callable, kind: str, shape: tuple[int, ...], key_data, *operands) -> np.ndarray:
    """Answer for each of the particles or chains of vmaps around a question.

    Args:
        answers: `(draw, *values) -> int32[shape]` for one lane; a draw is known by its kind and key.
        kind: what the choice is for.
        shape: the shape of an answer.
        key_data: raw keys, `[*lanes, words]`.
        operands: pairs of an array and how many of its leading axes are lanes.
    """
    key_data = np.asarray(key_data)
    lanes = np.broadcast_shapes(key_data.shape[:-1], *(array.shape[:cut] for array, cut in operands))
    key_data = np.broadcast_to(key_data, (*lanes, key_data.shape[-1]))
    operands = [np.broadcast_to(array, (*lanes, *array.shape[cut:])) for array, cut in operands]
    out = np.zeros((*lanes, *shape), np.int32)
    for lane in np.ndindex(*lanes):
        key, values = key_data[lane].tobytes(), [array[lane] for array in operands]
        if not lanes:
            _tape().claim(key, (kind, *(value.tobytes() for value in values)))
        out[lane] = answers((kind, key), *values)
    return out
