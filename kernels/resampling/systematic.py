"""Systematic resampling: one uniform number places every draw.

With W_i = w_i / sum_j w_j, C_i = W_1 + ... + W_i and u ~ U[0, 1), ancestor i gets as many of the ``num``
draws as there are points (k + u) / num, k = 0 .. num - 1, in [C_(i-1), C_i):

    (1)  o_i = N_i - N_(i-1),   N_i = ceil(num C_i - u),   E[o_i] = num W_i,   |o_i - num W_i| < 1.

Source: Carpenter, Clifford and Fearnhead (1999), "Improved particle filter for nonlinear problems", section
3.2; Kitagawa (1996), "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models",
appendix. The ancestors come in increasing order.

Deviations from the textbook, all for the sake of single precision up to 2^20 particles, where the 24 bits of
a float32 cannot hold num C_i (20 bits before the point leave 4 after it):

    (2)  x_i = num w_i / S, S the float32 sum of the weights, is written in fixed point: 31 bits before the
         point and 31 after it. Its prefix sums P_i are exact, so they never decrease, and P_i = P_(i-1) for
         a weight of zero.
    (3)  P_n differs from num by the rounding of S. It is scaled back: N_i = ceil(P_i - delta P_i - u), with
         delta = (P_n - num) / P_n. For equal weights and num = n, x_i = 1 and delta = 0 exactly.
    (4)  N_i = num as soon as P_i = P_n: the last point belongs to the last living particle, and nothing
         after it.
    (5)  Ancestor i is written at position N_(i-1) if o_i > 0; a running maximum fills the gaps. No search,
         no sort.

What remains is the rounding of the weights themselves: w_i = exp(l_i - max l) has in float32 a relative error
of about e_i = (2 + |l_i - max l|) 2^-24; a particle that expects fewer than 2^-31 draws gets none; (3) is
rounded to about 2^-23 draws. So |o_i - num W_i| < 1 + e_i num W_i + 1e-6.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from ppl.kernels.prefix import (
    from_columns,
    num_columns,
    prefix_sum,
    running_max,
    to_columns,
    to_fixed_point,
    to_fraction,
)

__all__ = ["systematic"]

_MAX_DRAWS = 1 << 30  # prefix sums and indices are int32
_LARGEST = 3.4028235e38  # of the finite float32


def systematic(
    key: PRNGKeyArray | UInt32[Array, "2"], log_weights: Float[Array, " n"], num: int | None = None
) -> Int32[Array, " num"]:
    """Draw ancestors by systematic resampling.

    Args:
        key: random key, consumed once.
        log_weights: shape (n,), nats, unnormalised. -inf means weight zero, and so does NaN: whoever must
            know of a NaN asks `ppl.kernels.weights.summarize`. Particles at +inf share the whole mass
            equally.
        num: number of draws, static; n if not given.

    Returns:
        Ancestors, shape (num,), int32 in [0, n), nondecreasing. Equal weights and ``num == n`` give every
        particle itself. No particle of weight zero is an ancestor, unless all are: then the ancestors are 0,
        1, .. n - 1, 0, 1, ..

    Raises:
        ValueError: `log_weights` is not of rank 1 or is empty, or `num` is not between 1 and 2^30.

    Example:
        >>> systematic(jax.random.key(0), jnp.zeros(4)).tolist()
        [0, 1, 2, 3]
    """
    log_weights = jnp.asarray(log_weights)
    if log_weights.ndim != 1 or log_weights.shape[0] == 0:
        raise ValueError(
            f"`log_weights` must have shape (n,) with n >= 1, got shape {log_weights.shape}. "
            "Map over further axes with jax.vmap."
        )
    num = log_weights.shape[0] if num is None else num
    if not 1 <= num <= _MAX_DRAWS:
        raise ValueError(
            f"`num` must be between 1 and 2^30, got {num}. It is the number of ancestors to draw."
        )
    return _ancestors(jax.random.uniform(key, dtype=jnp.float32), log_weights.astype(jnp.float32), num)


def _ancestors(u: Float[Array, ""], log_weights: Float[Array, " n"], num: int) -> Int32[Array, " num"]:
    """The ancestors that the number u in [0, 1) leads to."""
    n = log_weights.shape[0]
    bounded = jnp.where(jnp.isnan(log_weights), -jnp.inf, jnp.minimum(log_weights, _LARGEST))
    log_weights = to_columns(bounded, -jnp.inf)
    maximum = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.maximum(maximum, -_LARGEST))
    scale = num / jnp.maximum(jnp.sum(weights), 1)  # the sum is at least 1 while one lives
    whole, part = prefix_sum(to_fixed_point(weights * scale))  # (2)
    fraction = to_fraction(part)

    total = whole[-1, -1].astype(jnp.float32) + fraction[-1, -1]
    excess = (whole[-1, -1] - num).astype(jnp.float32) + fraction[-1, -1]
    scaled_back = (excess / jnp.maximum(total, 1e-6)) * (whole.astype(jnp.float32) + fraction)  # (3)
    count = whole + jnp.ceil(fraction - (scaled_back + u)).astype(jnp.int32)
    is_last = (whole == whole[-1, -1]) & (part == part[-1, -1])
    end = jnp.where(is_last, num, jnp.clip(count, 0, num))  # (4)
    ancestors = _fill(end, num)
    return jnp.where(maximum == -jnp.inf, jnp.arange(num, dtype=jnp.int32) % n, ancestors)


def _fill(end: Int32[Array, "columns rows"], num: int) -> Int32[Array, " num"]:
    """Write the particles one after the other, each up to its own end, (5); both are laid out in columns."""
    columns, rows = end.shape
    row_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), end[-1, :-1]])
    start = jnp.concatenate([row_starts[None], end[:-1]])
    index = jnp.arange(rows * columns, dtype=jnp.int32).reshape(rows, columns).T
    out_columns = num_columns(num)
    out_rows = -(-num // out_columns)
    size = out_columns * out_rows
    slot = jnp.where(start == num, size, start % out_columns * out_rows + start // out_columns)
    heads = (
        jnp.zeros(size + 1, jnp.int32)
        .at[slot]
        .max(jnp.where(end > start, index, 0), mode="promise_in_bounds")
    )
    return from_columns(running_max(heads[:-1].reshape(out_columns, out_rows)), num)
