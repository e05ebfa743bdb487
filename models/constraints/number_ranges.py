r"""The decimal numerals between two numbers, as patterns.

Numerals of one length are ordered like the numbers they write. Those between two of that length split at the first
digit where the two differ:

    (1)  [a x, b y] = a [x, 9..9]  |  [a + 1, b - 1] any  |  b [0..0, y].

A numeral with k decimals is the integer 10^k x with a point in it, so that (1) serves numbers too: bounds of any number
of decimals become bounds on integers, for each k.

Numbers have at most 15 significant digits. Two different numerals of so few digits are two different binary doubles, in
the same order, so that a reader who compares doubles sees what is meant here.
"""

import math
from fractions import Fraction

__all__ = ["MOST_SIGNIFICANT", "decimals_between", "decimals_of", "integers_between"]

MOST_DIGITS = 19  # of an integer without a bound
MOST_DECIMALS = 6
MOST_SIGNIFICANT = 15


def integers_between(low: int | None, high: int | None) -> str | None:
    """The pattern of the integers of an interval.

    Args:
        low: the smallest; None is no bound.
        high: the largest; None is no bound.

    Returns:
        The pattern of their numerals, without leading zeros or "-0", with at most 19 digits, or one more than a bound
        has; None if there is none.
    """
    digits = max(MOST_DIGITS, *(len(str(abs(bound))) + 1 for bound in (low, high) if bound is not None), 0)
    digits = MOST_DIGITS if digits <= MOST_DIGITS + 1 else digits
    largest = 10**digits - 1
    low = -largest if low is None else max(low, -largest)
    high = largest if high is None else min(high, largest)
    return _signed(low, high, 0)


def decimals_of(number: Fraction) -> int | None:
    """How many decimals a number has, None where they never end."""
    twos = fives = 0
    rest = number.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    return max(twos, fives) if rest == 1 else None


def decimals_between(
    low: Fraction | int | None, high: Fraction | int | None, *, open_below: bool = False, open_above: bool = False
) -> str | None:
    """The pattern of the decimal numbers of an interval.

    Args:
        low: the lower bound, with decimals that end; None is none.
        high: the upper bound; None is none.
        open_below: the lower bound itself is left out.
        open_above: the upper bound itself is left out.

    Returns:
        The pattern of their numerals, without an exponent, of at most 15 digits and of 6 decimals, or one more than a
        bound has; None if there is none.
    """
    largest = 10**MOST_SIGNIFICANT - 1
    bounds = [Fraction(bound) for bound in (low, high) if bound is not None]
    parts = []
    for decimals in range(max([MOST_DECIMALS, *((decimals_of(bound) or -1) + 1 for bound in bounds)]) + 1):
        first, last = -largest, largest
        if low is not None:
            scaled = Fraction(low) * 10**decimals
            first = max(first, math.floor(scaled) + 1 if open_below else math.ceil(scaled))
        if high is not None:
            scaled = Fraction(high) * 10**decimals
            last = min(last, math.ceil(scaled) - 1 if open_above else math.floor(scaled))
        found = _signed(first, last, decimals)
        parts += [found] if found else []
    return "|".join(parts) if parts else None


def _signed(low: int, high: int, decimals: int) -> str | None:
    parts = []
    if low < 0:
        below = _natural(max(1, -high), -low, decimals)
        parts += [f"-(?:{below})"] if below else []
    if high >= 0:
        above = _natural(max(low, 0), high, decimals)
        parts += [above] if above else []
    return "|".join(parts) if parts else None


def _natural(low: int, high: int, decimals: int) -> str | None:
    """The numerals of low, .., high by their length, with a point before the last so many digits."""
    parts = []
    shortest = decimals + 1  # "0.05" is "005" with a point
    for digits in range(max(shortest, len(str(low))), max(shortest, len(str(high))) + 1):
        least = max(low, 10 ** (digits - 1) if digits > shortest else 0)
        most = min(high, 10**digits - 1)
        if least <= most:
            parts.append(_same_length(str(least).zfill(digits), str(most).zfill(digits), decimals))
    return "|".join(parts) if parts else None


def _same_length(low: str, high: str, decimals: int) -> str:
    """The numerals between two of one length, by (1)."""
    if not low:
        return ""
    if set(low) == {"0"} and set(high) == {"9"}:
        return _any(len(low), decimals)
    point = r"\." if len(low) == decimals else ""
    if low[0] == high[0]:
        return point + low[0] + _same_length(low[1:], high[1:], decimals)
    rest = len(low) - 1
    first, last, parts = int(low[0]), int(high[0]), []
    if rest and set(low[1:]) != {"0"}:
        parts.append(low[0] + _same_length(low[1:], "9" * rest, decimals))
        first += 1
    if rest and set(high[1:]) != {"9"}:
        parts.append(high[0] + _same_length("0" * rest, high[1:], decimals))
        last -= 1
    if first <= last:
        parts.append(f"[{first}-{last}]" + _any(rest, decimals))
    return point + "(?:" + "|".join(parts) + ")"


def _any(digits: int, decimals: int) -> str:
    before = digits - decimals if digits >= decimals else digits
    written = f"[0-9]{{{before}}}" if before else ""
    return written + (rf"\.[0-9]{{{decimals}}}" if decimals and digits >= decimals else "")
