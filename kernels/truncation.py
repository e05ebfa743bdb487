"""Truncation of a next-token law: the sets of its most probable tokens, without a sort.

For a row of logits l_1 .. l_V with probabilities p_i = exp(l_i) / sum_j exp(l_j), every set has the form

    (1)  A(t) = {i : l_i >= t, l_i > -inf}

and so takes in all tokens that tie at its threshold:

    (2)  top_k:  the largest t with  |A(t)| >= k
    (3)  top_p:  the largest t with  sum_{i in A(t)} p_i >= p
    (4)  min_p:  t = max_j l_j + log p, that is  p_i >= p max_j p_j

Sources: Fan, Lewis and Dauphin (2018), "Hierarchical neural story generation", section 5.2 (top k); Holtzman, Buys, Du,
Forbes and Choi (2020), "The curious case of neural text degeneration", section 3.1 (top p); Nguyen, Baker, Neo, Roush,
Kirsch and Shwartz-Ziv (2024), "Turning up the heat: min-p sampling for creative and coherent LLM outputs" (min p).

How: the order of float32 numbers is that of integers,

    (5)  n(x) = bits(x) if x has no sign, else bits(x) with all but the sign flipped,

so the largest t of (2) and (3) is found exactly by bisection between two such integers. Every other step halves the
interval of values instead, which is faster where the logits are of one size, and a row is done as soon as nothing is
left to choose. A step is one comparison and one sum over the row; sorting it costs many times as much.

A truncated law is another target, not a proposal for the full one: what lies outside of the set would get no weight.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Int32

from ppl.kernels.tokens import block_width

__all__ = ["min_p", "top_k", "top_p"]

_Measure = Callable[[Float[Array, "*batch 1"]], tuple[Int32[Array, "*batch"], Array]]
_LOWEST = -(2**31) + 2**23 - 1  # (5) of -inf


def top_k(logits: Float[Array, "*batch V"], k: Int[ArrayLike, "*#batch"] | int) -> Bool[Array, "*batch V"]:
    """Find the k most probable tokens, (2), and those that tie with the last of them.

    Args:
        logits: shape (*batch, V), unnormalised log-probabilities.
        k: how many, at least 1; a scalar or one number a row.

    Returns:
        Shape (*batch, V). Tokens of probability zero are never in the set, even if fewer than k are left. All tokens
        are in it if a logit of the row is NaN or +inf, so that a mask does not hide that.

    Raises:
        ValueError: `logits` has no vocabulary, or `k` is a number below 1.
        TypeError: `k` is not an integer.

    Example:
        >>> top_k(jnp.array([0.0, 2.0, 1.0, 1.0]), 2).tolist()
        [False, True, True, True]
    """
    logits = _as_float32(logits)
    if isinstance(k, bool) or not jnp.issubdtype(jnp.result_type(k), jnp.integer):
        raise TypeError(f"`k` must be an integer, got {k!r}.")
    if isinstance(k, int) and k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    k = _per_row(jnp.asarray(min(k, logits.shape[-1]) if isinstance(k, int) else k, jnp.int32), logits, "k")

    def measure(threshold: Array) -> tuple[Array, Array]:
        count = jnp.sum(logits >= threshold, axis=-1, dtype=jnp.int32)
        return count, count

    return _above(logits, _bisect(logits, measure, k, enough=k))


def top_p(logits: Float[Array, "*batch V"], p: Float[ArrayLike, "*#batch"] | float) -> Bool[Array, "*batch V"]:
    """Find the smallest set of most probable tokens whose probability reaches p, (3), ties at its end included.

    Args:
        logits: shape (*batch, V), unnormalised log-probabilities.
        p: in (0, 1]; a scalar or one number a row. 1 leaves every token of positive probability.

    Returns:
        Shape (*batch, V). The sums are float32: that the set reaches p holds up to a few units of 1e-7. All tokens are
        in it if a logit of the row is NaN or +inf.

    Raises:
        ValueError: `logits` has no vocabulary, or `p` is a number outside of (0, 1].

    Example:
        >>> top_p(jnp.log(jnp.array([0.1, 0.6, 0.3])), 0.8).tolist()
        [False, True, True]
    """
    logits = _as_float32(logits)
    p = _per_row(jnp.asarray(_probability(p), jnp.float32), logits, "p")
    weights = jnp.exp(logits - _top(logits))
    target = p * _sum(weights)

    def measure(threshold: Array) -> tuple[Array, Array]:
        inside = logits >= threshold
        return jnp.sum(inside, axis=-1, dtype=jnp.int32), _sum(jnp.where(inside, weights, 0))

    threshold = _bisect(logits, measure, target, enough=jnp.ones_like(target, jnp.int32))
    return _above(logits, jnp.where(p < 1, threshold, -jnp.inf))


def min_p(logits: Float[Array, "*batch V"], p: Float[ArrayLike, "*#batch"] | float) -> Bool[Array, "*batch V"]:
    """Find the tokens whose probability is at least p times the largest, (4).

    Args:
        logits: shape (*batch, V), unnormalised log-probabilities.
        p: in (0, 1]; a scalar or one number a row. 1 leaves the most probable token and those that tie with it.

    Returns:
        Shape (*batch, V). All tokens are in it if a logit of the row is NaN or +inf.

    Raises:
        ValueError: `logits` has no vocabulary, or `p` is a number outside of (0, 1].

    Example:
        >>> min_p(jnp.log(jnp.array([0.1, 0.6, 0.3])), 0.4).tolist()
        [False, True, True]
    """
    logits = _as_float32(logits)
    p = _per_row(jnp.asarray(_probability(p), jnp.float32), logits, "p")
    return _above(logits, _top(logits)[..., 0] + jnp.log(p))


def _above(logits: Float[Array, "*batch V"], threshold: Float[Array, "*batch"]) -> Bool[Array, "*batch V"]:
    """The set A(t), (1); every token of a row with NaN or +inf."""
    broken = ~jnp.all(logits < jnp.inf, axis=-1, keepdims=True)
    return broken | ((logits >= threshold[..., None]) & (logits > -jnp.inf))


def _bisect(
    logits: Float[Array, "*batch V"], measure: _Measure, target: Array, enough: Int32[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """The largest t of each row with ``measure(t) >= target``; `enough` is the size below which no set is looked for.

    `low` reaches the target and `high` does not, and how many tokens are at or above each is kept.
    """
    batch = logits.shape[:-1]
    highest = _to_integer(_top(logits)[..., 0]) + 1
    low = jnp.full(batch, _LOWEST, jnp.int32)
    start = (jnp.int32(0), low, highest, jnp.full(batch, logits.shape[-1], jnp.int32), jnp.zeros(batch, jnp.int32))

    def unfinished(state: tuple[Array, ...]) -> Bool[Array, "*batch"]:
        _, low, high, above_low, above_high = state
        return (above_low > jnp.maximum(enough, above_high + 1)) & (_middle(low, high) > low)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        turn, low, high, above_low, above_high = state
        by_value = _to_integer(0.5 * _to_float(low) + 0.5 * _to_float(high))
        use_value = (turn % 2 == 0) & (by_value > low) & (by_value < high)
        middle = jnp.where(use_value, by_value, _middle(low, high))
        above, reached = measure(_to_float(middle)[..., None])
        up = unfinished(state) & (reached >= target)
        down = unfinished(state) & ~(reached >= target)
        return (
            turn + 1,
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, above, above_low),
            jnp.where(down, above, above_high),
        )

    return _to_float(lax.while_loop(lambda state: jnp.any(unfinished(state)), step, start)[1])


def _to_integer(values: Float[Array, "*n"]) -> Int32[Array, "*n"]:
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # (5)


def _to_float(integers: Int32[Array, "*n"]) -> Float[Array, "*n"]:
    return lax.bitcast_convert_type(jnp.where(integers < 0, integers ^ 0x7FFFFFFF, integers), jnp.float32)


def _middle(low: Int32[Array, "*n"], high: Int32[Array, "*n"]) -> Int32[Array, "*n"]:
    return (low >> 1) + (high >> 1) + (low & high & 1)


def _top(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch 1"]:
    """The row's largest logit, 0 if that is not finite."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.isfinite(top), top, 0)


def _sum(values: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Sum in two levels, so that the rounding stays that of a few hundred additions."""
    size = values.shape[-1]
    width = block_width(size)
    if size % width:
        return jnp.sum(values, axis=-1)
    return jnp.sum(jnp.sum(values.reshape(*values.shape[:-1], size // width, width), axis=-1), axis=-1)


def _as_float32(logits: ArrayLike) -> Float[Array, "*batch V"]:
    logits = jnp.asarray(logits)
    if logits.ndim == 0 or logits.shape[-1] == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"`logits` must be floats of shape (*batch, V) with V >= 1, got {logits.dtype}{logits.shape}.")
    return logits.astype(jnp.float32)


def _probability(p: ArrayLike) -> ArrayLike:
    if isinstance(p, int | float) and not (0 < p <= 1 and math.isfinite(p)):
        raise ValueError(f"`p` must be in (0, 1], got {p}.")
    return p


def _per_row(values: Array, logits: Array, name: str) -> Array:
    batch = logits.shape[:-1]
    if values.ndim and values.shape != batch:
        raise ValueError(
            f"`{name}` must be a scalar or have shape {batch} as the rows of `logits`, got {values.shape}."
        )
    return jnp.broadcast_to(values, batch)
