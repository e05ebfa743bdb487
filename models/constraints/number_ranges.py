"""The decimal numerals between two whole numbers, as patterns.

Numerals of one length are ordered like the numbers they write. Those between two of that length split at the first
digit where the two differ:

    (1)  [a x, b y] = a [x, 9..9]  |  [a + 1, b - 1] any  |  b [0..0, y].
"""

__all__ = ["decimals_between", "integers_between"]

MOST_DIGITS = 19
MOST_DECIMALS = 6


def integers_between(low: int | None, high: int | None) -> str | None:
    """The pattern of the integers of an interval.

    Args:
        low: the smallest; None is no bound.
        high: the largest; None is no bound.

    Returns:
        The pattern of their numerals, without leading zeros or "-0", with at most 19 digits; None if there is none.
    """
    largest = 10**MOST_DIGITS - 1
    low = -largest if low is None else max(low, -largest)
    high = largest if high is None else min(high, largest)
    parts = []
    if low < 0:
        below = _natural(max(1, -high), -low)
        parts += [f"-(?:{below})"] if below else []
    if high >= 0:
        above = _natural(max(low, 0), high)
        parts += [above] if above else []
    return "|".join(parts) if parts else None


def decimals_between(
    low: int | None, high: int | None, *, open_below: bool = False, open_above: bool = False
) -> str | None:
    """The pattern of the decimal numbers of an interval with whole bounds.

    Args:
        low: the lower bound; None is none.
        high: the upper bound; None is none.
        open_below: the lower bound itself is left out.
        open_above: the upper bound itself is left out.

    Returns:
        The pattern of their numerals, with at most 6 decimals and no exponent; None if there is none.
    """
    parts = []
    for sign, start, stop, open_start, open_stop in (
        ("", low, high, open_below, open_above),
        ("-", None if high is None else -high, None if low is None else -low, open_above, open_below),
    ):
        # The numbers x of one sign by their size, start <= x <= stop.
        if stop is not None and stop < 0 or (stop == 0 and (open_stop or sign)):
            continue
        if start is None or start < 0 or (start == 0 and sign and not open_start):
            start, open_start = 0, bool(sign)  # 0 itself is written without a sign
        if stop is not None and start > stop:
            continue
        size = _sizes(start, stop, open_start, open_stop)
        parts += [f"{sign}(?:{size})"] if size else []
    return "|".join(parts) if parts else None


def _sizes(start: int, stop: int | None, open_start: bool, open_stop: bool) -> str | None:
    any_decimals = rf"(?:\.[0-9]{{1,{MOST_DECIMALS}}})?"
    zero_decimals = rf"(?:\.0{{1,{MOST_DECIMALS}}})?"
    # Decimals that are not all zero, by the place of the first one that is not.
    some = "|".join(f"0{{{zeros}}}[1-9][0-9]{{0,{MOST_DECIMALS - zeros - 1}}}" for zeros in range(MOST_DECIMALS))
    parts = []
    if start != stop:
        parts.append(rf"{start}\.(?:{some})" if open_start else f"{start}{any_decimals}")
    elif not open_start and not open_stop:
        return f"{start}{zero_decimals}"
    between = integers_between(start + 1, None if stop is None else stop - 1)
    if between is not None:
        parts.append(f"(?:{between}){any_decimals}")
    if stop is not None and start != stop and not open_stop:
        parts.append(f"{stop}{zero_decimals}")
    return "|".join(parts) if parts else None


def _natural(low: int, high: int) -> str | None:
    """The numerals of low, .., high, by their length."""
    parts = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        least = max(low, 10 ** (digits - 1) if digits > 1 else 0)
        most = min(high, 10**digits - 1)
        if least <= most:
            parts.append(_same_length(str(least), str(most)))
    return "|".join(parts) if parts else None


def _same_length(low: str, high: str) -> str:
    """The numerals between two of one length, by (1)."""
    if not low:
        return ""
    if set(low) == {"0"} and set(high) == {"9"}:
        return f"[0-9]{{{len(low)}}}"
    if low[0] == high[0]:
        return low[0] + _same_length(low[1:], high[1:])
    rest = len(low) - 1
    first, last, parts = int(low[0]), int(high[0]), []
    if rest and set(low[1:]) != {"0"}:
        parts.append(low[0] + _same_length(low[1:], "9" * rest))
        first += 1
    if rest and set(high[1:]) != {"9"}:
        parts.append(high[0] + _same_length("0" * rest, high[1:]))
        last -= 1
    if first <= last:
        parts.append(f"[{first}-{last}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return "(?:" + "|".join(parts) + ")"
