"""Sets of characters as ranges of code points. Surrogates are no characters and belong to no set."""

import sys
from collections.abc import Iterable, Sequence

__all__ = [
    "ANY",
    "CodePoints",
    "code_points",
    "complement",
    "contains",
    "difference",
    "intersection",
    "of",
    "partition",
]

CodePoints = tuple[tuple[int, int], ...]  # disjoint inclusive ranges, increasing

ANY: CodePoints = ((0, 0xD7FF), (0xE000, sys.maxunicode))


def code_points(ranges: Iterable[tuple[int, int]]) -> CodePoints:
    """Ranges in any order as a set: merged, without surrogates."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    if all(high < 0xD800 or low > 0xDFFF for low, high in merged):
        return tuple(merged)
    return intersection(tuple(merged), ANY)


def of(characters: Iterable[str]) -> CodePoints:
    """The set of some characters."""
    return code_points((ord(one), ord(one)) for one in characters)


def contains(points: CodePoints, character: str) -> bool:
    """Whether a character belongs to a set."""
    return any(low <= ord(character) <= high for low, high in points)


def intersection(first: CodePoints, second: CodePoints) -> CodePoints:
    """The characters of both sets."""
    found, left, right = [], 0, 0
    while left < len(first) and right < len(second):
        low = max(first[left][0], second[right][0])
        high = min(first[left][1], second[right][1])
        if low <= high:
            found.append((low, high))
        if first[left][1] < second[right][1]:
            left += 1
        else:
            right += 1
    return tuple(found)


def complement(points: CodePoints) -> CodePoints:
    """The characters that a set has not."""
    gaps, low = [], 0
    for first, last in points:
        gaps.append((low, first - 1))
        low = last + 1
    gaps.append((low, sys.maxunicode))
    return intersection(tuple((low, high) for low, high in gaps if low <= high), ANY)


def difference(first: CodePoints, second: CodePoints) -> CodePoints:
    """The characters of one set that are not in another."""
    return intersection(first, complement(second))


def partition(sets: Sequence[CodePoints]) -> tuple[list[CodePoints], list[int]]:
    """The coarsest classes of characters that make up each of some sets.

    Args:
        sets: the sets.

    Returns:
        The classes, which are disjoint and cover all characters, and for every set the bits of its classes.
    """
    changes: dict[int, int] = {}  # where sets begin or end, and which, as bits
    for number, points in enumerate(sets):
        for low, high in points:
            changes[low] = changes.get(low, 0) ^ (1 << number)
            changes[high + 1] = changes.get(high + 1, 0) ^ (1 << number)
    places = sorted({0, *changes, sys.maxunicode + 1})
    ranges: dict[int, list[tuple[int, int]]] = {}
    members = 0
    for low, stop in zip(places, places[1:], strict=False):
        members ^= changes.get(low, 0)
        ranges.setdefault(members, []).append((low, stop - 1))
    classes, bits = [], [0] * len(sets)
    for members, parts in ranges.items():
        points = code_points(parts)
        if not points:
            continue
        while members:
            lowest = members & -members
            bits[lowest.bit_length() - 1] |= 1 << len(classes)
            members ^= lowest
        classes.append(points)
    return classes, bits
