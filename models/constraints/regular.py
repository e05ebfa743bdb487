r"""Constraints on a text as a whole, closed under and, or, not: `Regex`, `Choice` and their combinations.

A constraint is a set of texts. `a & b` is the intersection, `a | b` the union, `~a` the complement among all texts.
Tokens play no part in it: a text is a string of characters, and every sequence of tokens whose bytes spell it counts.
Bytes that are not UTF-8, a character that is cut off at the end included, are no text and satisfy nothing, `~a`
neither.

For the 49,152 tokens of SmolLM2, each built in less than a second of one core of a CPU:

    constraint                                          states  classes  memory
    Regex(r"(Apples|Pears)\.")                              12       28   50 kB
    Regex("[0-9]{4}-[0-9]{2}-[0-9]{2}")                     12        4   49 kB
    Regex(r"(\w+[ ,])*\w+\.")                             312      159  150 kB
    Choice of 20 strings                                    30       65   51 kB
    ~Regex("(?s).*the.*")                                   11       25   49 kB
    JsonSchema: 3 fields, one of them a list                56       91   55 kB
    JsonSchema: 8 fields on two levels                     664      304  505 kB

The masks of 32 particles take 1.3 ms there.
"""

import abc
import dataclasses
import functools

from ppl.models.constraints.automaton import Automaton, over_tokens
from ppl.models.constraints.byte_automaton import ByteAutomaton, from_strings, product
from ppl.models.constraints.expressions import anything, automaton_of
from ppl.models.constraints.patterns import parse
from ppl.models.constraints.tables import TooLarge
from ppl.models.constraints.vocabulary import Vocabulary

__all__ = ["Choice", "Constraint", "Regex"]


class Constraint(abc.ABC):
    """A set of texts. Constraints are equal, and hashed, by what they were built from."""

    @property
    @abc.abstractmethod
    def language(self) -> ByteAutomaton:
        """The automaton over bytes, the smallest there is."""

    def compile(self, vocabulary: Vocabulary) -> Automaton:
        """The constraint over the tokens of a vocabulary.

        Args:
            vocabulary: what the tokens write.

        Returns:
            The automaton, on JAX's default device; kept for the next call with an equal constraint and vocabulary.
        """
        return _compile(self, vocabulary)

    def matches(self, text: str) -> bool:
        """Whether a text satisfies the constraint."""
        return self.language.accepts(text.encode(errors="surrogatepass"))

    def __and__(self, other: "Constraint") -> "Constraint":
        return _Both(self, other) if isinstance(other, Constraint) else NotImplemented

    def __or__(self, other: "Constraint") -> "Constraint":
        return _Either(self, other) if isinstance(other, Constraint) else NotImplemented

    def __invert__(self) -> "Constraint":
        return _Not(self)


@functools.lru_cache(maxsize=64)
def _compile(constraint: Constraint, vocabulary: Vocabulary) -> Automaton:
    return over_tokens(constraint.language, vocabulary)


@functools.lru_cache(maxsize=256)
def _language_of(pattern: str) -> ByteAutomaton:
    return automaton_of(parse(pattern)).to_bytes()


@functools.cache
def _every_text() -> ByteAutomaton:
    return automaton_of(anything()).to_bytes()


@dataclasses.dataclass(frozen=True)
class Regex(Constraint):
    r"""The texts that a regular expression matches as a whole, as `re.fullmatch` has it.

    Attributes:
        pattern: in the syntax of Python's `re`, with all flags; anchors and word boundaries may stand anywhere.
            Look-around, back-references, conditional groups, possessive and atomic groups are refused, and so are
            patterns such as `[ab]*a[ab]{20}`, which must remember every place where a part may have begun: it would
            take 2^20 states.

    Raises:
        ValueError: a pattern that Python refuses, that is not regular or takes too many states; the message says what
            to write instead.

    Example:
        >>> Regex(r"(Apples|Pears)\.").matches("Pears.")
        True
    """

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"`pattern` must be a string, got {type(self.pattern).__name__}.")
        _ = self.language

    @functools.cached_property
    def language(self) -> ByteAutomaton:
        """The automaton over bytes."""
        try:
            return _language_of(self.pattern)
        except RecursionError as error:
            raise ValueError(f"`pattern` {self.pattern!r} nests too deep to be compiled. Nest fewer groups.") from error
        except TooLarge as error:
            raise ValueError(
                f"`pattern` {self.pattern!r} cannot be compiled: {error}. Lower its counts; what must remember every "
                "place where a part may have begun, as `.*a.{20}` must, doubles with each."
            ) from error


@dataclasses.dataclass(frozen=True)
class Choice(Constraint):
    """One of some strings.

    Attributes:
        strings: the texts, at least one; a tuple after construction.

    Raises:
        ValueError: no string, or one that cannot be written in UTF-8.

    Example:
        >>> (Choice(["yes", "no"]) & ~Choice(["no"])).matches("no")
        False
    """

    strings: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.strings, str):
            raise TypeError(f"`strings` must be a sequence of strings, got the string {self.strings!r}.")
        object.__setattr__(self, "strings", tuple(self.strings))
        if not self.strings:
            raise ValueError("`strings` is empty: give at least one string to choose.")
        for string in self.strings:
            if not isinstance(string, str):
                raise TypeError(f"`strings` must hold strings, got {string!r}.")
            if any(0xD800 <= ord(one) < 0xE000 for one in string):
                raise ValueError(f"`strings` holds {string!r}, which has a surrogate: no text has one.")

    @functools.cached_property
    def language(self) -> ByteAutomaton:
        """The automaton over bytes."""
        return from_strings(string.encode() for string in self.strings)


@dataclasses.dataclass(frozen=True, repr=False)
class _Both(Constraint):
    first: Constraint
    second: Constraint

    def __repr__(self) -> str:
        return f"({self.first!r} & {self.second!r})"

    @functools.cached_property
    def language(self) -> ByteAutomaton:
        return product(self.first.language, self.second.language, union=False)


@dataclasses.dataclass(frozen=True, repr=False)
class _Either(Constraint):
    first: Constraint
    second: Constraint

    def __repr__(self) -> str:
        return f"({self.first!r} | {self.second!r})"

    @functools.cached_property
    def language(self) -> ByteAutomaton:
        return product(self.first.language, self.second.language, union=True)


@dataclasses.dataclass(frozen=True, repr=False)
class _Not(Constraint):
    constraint: Constraint

    def __repr__(self) -> str:
        return f"~{self.constraint!r}"

    @functools.cached_property
    def language(self) -> ByteAutomaton:
        return product(self.constraint.language.complement(), _every_text(), union=False)
