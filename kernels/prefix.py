"""Exact prefix sums and running maxima, fast at every size.

A prefix sum of float32 weights is neither associative nor monotone: its rounding depends on the order in
which a backend adds, and a later sum can be smaller than an earlier one. The sums here are taken in fixed
point, with x_i >= 0 and

    (1)  x_i = whole_i + part_i / 2^32,   whole_i an int32, part_i a uint32,
    (2)  x + y:  part = part_x + part_y mod 2^32,   whole = whole_x + whole_y + [part < part_y],

the bracket being the carry. Integer addition is associative, so every backend, order of summation and number
of devices gives the same bits, and the sums of non-negative numbers never decrease.

How: on a CPU a plain loop. Its body is so small that XLA compiles the whole of it into one function, in which an
element takes a few instructions. Other backends get the logarithmic tree of `jax.lax.associative_scan`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt32

__all__ = [
    "FixedPoint",
    "multiply",
    "prefix_sum",
    "prefix_sum_whole",
    "running_max",
    "to_fixed_point",
    "to_fraction",
]

FixedPoint = tuple[Int32[Array, "*shape"], UInt32[Array, "*shape"]]
"""Non-negative numbers below 2^31 as whole parts and 2^-32ths, as in (1)."""

_Leaves = tuple[jax.Array, ...]
_Combine = Callable[[_Leaves, _Leaves], _Leaves]


def to_fixed_point(values: Float[Array, "*shape"]) -> FixedPoint:
    """Round float32 numbers down to multiples of 2^-31; from 2^-8 on nothing is lost.

    One bit is given away so that the conversion is to signed integers, the one that processors have.

    Args:
        values: any shape, float32, in [0, 2^31).

    Returns:
        Whole parts and 2^-32ths, of the same shape.
    """
    floor = jnp.floor(values)
    return floor.astype(jnp.int32), ((values - floor) * 2.0**31).astype(jnp.int32).astype(jnp.uint32) << 1


def to_fraction(part: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Convert 2^-32ths to a float32 in [0, 1), rounding down to a multiple of 2^-24."""
    return (part >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24


def multiply(x: UInt32[Array, "*shape"], y: UInt32[Array, "*shape"]) -> tuple[Array, Array]:
    """Multiply 32-bit numbers without loss, on backends without 64-bit integers.

    Args:
        x: any shape, uint32.
        y: the same shape, uint32.

    Returns:
        The high and the low 32 bits of the product, uint32.
    """
    x_low, x_high, y_low, y_high = x & 0xFFFF, x >> 16, y & 0xFFFF, y >> 16
    middle = x_high * y_low + (x_low * y_low >> 16)
    other = x_low * y_high + (middle & 0xFFFF)
    return x_high * y_high + (middle >> 16) + (other >> 16), x * y


def prefix_sum(values: FixedPoint) -> FixedPoint:
    """Add up numbers in fixed point, exactly.

    Args:
        values: whole parts and 2^-32ths, each of shape (n,).

    Returns:
        The inclusive prefix sums. They must stay below 2^31.
    """
    return _accumulate(_add, (0, 0), values)


def prefix_sum_whole(values: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """Add up integers: inclusive prefix sums, shape (n,)."""
    return _accumulate(_plus, (0,), (values,))[0]


def running_max(values: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """Take inclusive running maxima of integers >= 0, shape (n,)."""
    return _accumulate(_max, (0,), (values,))[0]


def _add(x: _Leaves, y: _Leaves) -> _Leaves:
    part = x[1] + y[1]
    return x[0] + y[0] + (part < y[1]).astype(jnp.int32), part  # (2)


def _plus(x: _Leaves, y: _Leaves) -> _Leaves:
    return (x[0] + y[0],)


def _max(x: _Leaves, y: _Leaves) -> _Leaves:
    return (jnp.maximum(x[0], y[0]),)


def _accumulate(combine: _Combine, identity: tuple[int, ...], values: _Leaves) -> _Leaves:
    """Accumulate vectors by an associative operation, as suits the backend."""

    def loop(*values: jax.Array) -> _Leaves:
        def step(total: _Leaves, value: _Leaves) -> tuple[_Leaves, _Leaves]:
            total = combine(total, value)
            return total, total

        start = tuple(jnp.asarray(e, x.dtype) for e, x in zip(identity, values, strict=True))
        return lax.scan(step, start, values)[1]

    tree = functools.partial(lax.associative_scan, combine)
    return lax.platform_dependent(*values, cpu=loop, default=lambda *values: tree(values))
