"""Entropy annealing: the temperature at which log-weights are as even as asked.

With `W_i(T)` proportional to `exp(l_i / T)` over the n living particles (those with `l_i > -inf`), the evenness is

    (1)  e(T) = ESS(W(T)) / n        ESS = 1 / sum_i W_i^2          or
    (2)  e(T) = H(W(T)) / log n      H = -sum_i W_i log W_i,

and the temperature is the smallest T >= 1 with `e(T) >= c`. Both rise with T. With `b = 1 / T`,
`d log ESS / db = 2 (E_b[l] - E_2b[l]) <= 0`, E_b being the mean under W, because E_b[l] rises with b; and
`dH / db = -b Var_b[l] <= 0`. As T grows both tend to 1, which weights that differ never reach.

How it is solved. On `x = log(b R)`, R the range of the living log-weights, for

    (3)  h(x) = log(1 - e) - log e = log(1 - c) - log c,

a function without flat ends, of slope 2 where weights are nearly even. Cancellation is kept out of `1 - e`: with `w_i =
exp(b (l_i - max l))` and `r_i = w_i / mean w - 1`, from `expm1` where the weights are near 1,

    (4)  1 - e = sum_i r_i^2 / sum_i (1 + r_i)^2                             for (1)
    (5)  1 - e = mean_i [(1 + r_i) log(1 + r_i) - r_i] / log n               for (2).

A bracket: b = 1 on one side; on the other, log-weights within a range of `bR` have a variance of at most `(bR)^2 / 4`,
so that `-log e <= (bR)^2 / 4` for (1) and `log n (1 - e) <= (bR)^2 / 8` for (2). Within it a secant whose every third
step bisects; one evaluation is one pass over the log-weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

__all__ = ["temperature"]

_ACCURACY = 2e-5  # of log T
_MAX_STEPS = 100  # a bisection of the widest bracket alone takes fewer than 3 * 24


def temperature(
    log_weights: Float[Array, "*batch n"],
    *,
    ess: float | Float[Array, ""] | None = None,
    entropy: float | Float[Array, ""] | None = None,
) -> Float[Array, "*batch"]:
    """Solve for the smallest temperature at which weights are as even as asked.

    Args:
        log_weights: shape (n,) or (batch, n), nats, unnormalised; each row has a temperature of its own. -inf is a
            particle of weight zero, which does not count.
        ess: the asked effective sample size as a fraction, in (0, 1], of the number of living particles.
        entropy: the asked entropy as a fraction, in (0, 1], of the log of that number. One of the two is given.

    Returns:
        Shape () or (batch,): temperatures >= 1, to a relative 1e-4, at which `log_weights / temperature` reaches the
        fraction. Where the evenness hardly depends on the temperature (weights in groups far apart), a temperature
        at which it is within a rounding of the fraction. 1 where the weights reach it as they are, at most one
        particle lives, or none does; inf where only the limit of equal weights reaches it; NaN if a log-weight is
        NaN or +inf.

    Raises:
        ValueError: `log_weights` is a scalar or has no particles, neither or both of `ess` and `entropy` are given, or
            the fraction is not in (0, 1]. A traced fraction outside of it gives NaN.

    Example:
        >>> bool(temperature(jnp.array([0.0, -10.0]), ess=0.9) > 10.0)
        True
    """
    log_weights = jnp.asarray(log_weights)
    if log_weights.ndim == 0 or log_weights.shape[-1] == 0:
        raise ValueError(
            f"`log_weights` must have shape (n,) or (batch, n) with n >= 1, got shape {log_weights.shape}."
        )
    if (ess is None) == (entropy is None):
        raise ValueError(
            f"Give one of `ess` and `entropy`, the fraction to reach; got ess={ess!r} and entropy={entropy!r}."
        )
    name, fraction = ("ess", ess) if entropy is None else ("entropy", entropy)
    if not isinstance(fraction, jax.core.Tracer) and not 0.0 < float(fraction) <= 1.0:
        raise ValueError(f"`{name}` is a fraction in (0, 1], got {fraction}.")
    log_weights = log_weights.astype(jnp.promote_types(log_weights.dtype, jnp.float32))
    fraction = jnp.asarray(fraction, log_weights.dtype)
    solve = jax.vmap(lambda row: _solve(row, fraction, name == "ess"))
    rows = log_weights.reshape(-1, log_weights.shape[-1])
    return solve(rows).reshape(log_weights.shape[:-1])


def _solve(log_weights: Float[Array, " n"], fraction: Float[Array, ""], of_ess: bool) -> Float[Array, ""]:
    rows = 1 << (log_weights.shape[0].bit_length() // 2)
    padding = -log_weights.shape[0] % rows
    log_weights = jnp.pad(log_weights, (0, padding), constant_values=-jnp.inf).reshape(rows, -1)
    living = log_weights > -jnp.inf
    n = _sum(living).astype(log_weights.dtype)
    maximum = jnp.max(log_weights, where=living, initial=-jnp.inf)
    below = jnp.where(living, log_weights - jnp.where(jnp.isfinite(maximum), maximum, 0), 0)
    below = jnp.maximum(below, -jnp.finfo(below.dtype).max)
    spread = -jnp.min(below)
    shape = below / jnp.maximum(spread, jnp.finfo(below.dtype).tiny)  # in [-1, 0]
    uneven = _uneven_ess if of_ess else _uneven_entropy
    asked = _log_odds(1 - fraction, fraction)

    def excess(x):
        return _log_odds(*uneven(jnp.exp(x) * shape, living, n)) - asked  # (3), positive where too uneven

    high = jnp.log(spread)
    reach = -4 * jnp.log(fraction) if of_ess else 8 * (1 - fraction) * jnp.log(n)
    low = jnp.minimum(0.5 * jnp.log(reach) - 0.01, high)
    at_one = excess(high)
    even = (n <= 1) | (spread == 0) | (at_one <= 0)
    solvable = ~even & (fraction < 1)
    x = _root(excess, low, high, at_one, solvable)
    result = jnp.where(even, 1.0, jnp.where(fraction < 1, jnp.maximum(jnp.exp(high - x), 1.0), jnp.inf))
    broken = jnp.any(jnp.isnan(log_weights) | (log_weights == jnp.inf)) | ~((fraction > 0) & (fraction <= 1))
    return jnp.where(broken, jnp.nan, result)


def _uneven_ess(exponent, living, n):
    """Return 1 - e and e by (1) and (4)."""
    ratio, relative, _ = _relative(exponent, living, n)
    square = _sum(ratio * ratio)
    return _sum(relative * relative) / square, n / square


def _uneven_entropy(exponent, living, n):
    """Return 1 - e and e by (2) and (5)."""
    ratio, relative, log_mean = _relative(exponent, living, n)
    near = relative * relative * (0.5 - relative * (1 / 6 - relative * (1 / 12 - relative / 20)))
    far = ratio * (exponent - log_mean) - relative  # (1 + relative) would round a weight near 0, times a long exponent
    divergence = _sum(jnp.where(living, jnp.where(jnp.abs(relative) < 0.02, near, far), 0)) / n
    weights = jnp.where(living, jnp.exp(exponent), 0)
    total = _sum(weights)
    entropy = jnp.log1p(total - 1) - _sum(weights * exponent) / total
    uneven, even = divergence / jnp.log(n), entropy / jnp.log(n)  # each is exact where it is small
    return jnp.where(uneven < 0.5, uneven, 1 - even), jnp.where(uneven < 0.5, 1 - uneven, even)


def _relative(exponent, living, n):
    """Return 1 + r and r of (5), 0 for the dead, and the log of the mean weight, each exact near 1 and near 0."""
    change = jnp.where(living, jnp.expm1(exponent), 0)
    weights = jnp.where(living, jnp.exp(exponent), 0)
    mean_change, mean = _sum(change) / n, _sum(weights) / n
    near_one = mean > 0.5
    relative = jnp.where(near_one, change - mean_change, weights - mean) / mean
    log_mean = jnp.where(near_one, jnp.log1p(mean_change), jnp.log(mean))
    return weights / mean, jnp.where(living, relative, 0), log_mean


def _sum(table):
    """Sum in two levels, so that the rounding error stays that of about sqrt(n) additions."""
    return jnp.sum(jnp.sum(table, axis=0, dtype=None if table.dtype != bool else jnp.int32))


def _log_odds(p, q):
    return jnp.log(p) - jnp.log(q)


def _root(excess: Callable, low, high, at_high, wanted):
    """Return a point just below the root of a rising function, given a bracket."""

    def open_(state):
        step, low, high, *_ = state
        return wanted & (high - low > _ACCURACY) & (step < _MAX_STEPS)

    def narrow(state):
        step, low, high, at_low, at_high = state
        secant = low - at_low * (high - low) / (at_high - at_low)
        nearer = jnp.where(secant - low < high - secant, 0.4, -0.4) * _ACCURACY  # so that the far end comes close too
        middle = 0.5 * (low + high)
        good = (step % 3 < 2) & (secant > low) & (secant < high)
        x = jnp.where(good, jnp.clip(secant + nearer, low + 0.1 * _ACCURACY, high - 0.1 * _ACCURACY), middle)
        value = excess(x)
        up = value > 0
        return (
            step + 1,
            jnp.where(up, low, x),
            jnp.where(up, x, high),
            jnp.where(up, at_low, value),
            jnp.where(up, value, at_high),
        )

    state = (jnp.int32(0), low, high, excess(low), at_high)
    return lax.while_loop(open_, narrow, state)[1]
