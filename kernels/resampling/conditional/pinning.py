"""What the conditional schemes share: the retained particle's stretch, the slot it is pinned to, the shuffle.

A scheme's ancestors in uniformly random order are exchangeable, so that P(A_j = i) = W_i in every slot j. The
conditional scheme draws them given A_0 = r:

    (1)  P(A_0 = r, A_1 = a_1, ..) = W_r P(A_1 = a_1, .. | A_0 = r).

A point-placing scheme (systematic, stratified) gives r a draw for each of its points in the stretch [P_(r-1), P_r).
A slot picked at random among the `num` is a point picked at random, uniform in [0, num); given its ancestor r it is
uniform in the stretch. The stretch and the point are exact, in fixed point (see `inverse_cdf`).

The order is the one thing here that takes a sort: `jax.random.permutation` sorts by random bits. The schemes
return their ancestors in increasing order; with r in slot 0 and the rest in that order, the free slots have the
law of order statistics and a particle Gibbs sampler built on them has another stationary law.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, PRNGKeyArray, UInt32

from ppl.kernels.prefix import FixedPoint, multiply

__all__ = ["check_retained", "element", "pin", "point_in_stretch"]


def check_retained(retained: int | Int32[Array, ""], n: int) -> Int32[Array, ""]:
    """Check the index of the retained particle.

    Args:
        retained: what should be a single whole number, traced or not.
        n: number of particles.

    Returns:
        The index, int32, moved to the nearest of 0 .. n - 1 if it is out of range.

    Raises:
        TypeError: `retained` is not a whole number.
        ValueError: `retained` is not a scalar.
    """
    retained = jnp.asarray(retained)
    if not jnp.issubdtype(retained.dtype, jnp.integer):
        raise TypeError(f"`retained` must be the index of a particle, an integer, got dtype {retained.dtype}.")
    if retained.ndim:
        raise ValueError(
            f"`retained` must be one index, of shape (), got shape {retained.shape}. Map over several with jax.vmap."
        )
    return jnp.clip(retained, 0, n - 1).astype(jnp.int32)


def element(values: Array, index: Int32[Array, ""]) -> Array:
    """Look up one element of a vector; a zero stands at index -1."""
    value = values[jnp.maximum(index, 0)]
    return jnp.where(index < 0, jnp.zeros_like(value), value)


def point_in_stretch(bits: UInt32[Array, "2"], sums: FixedPoint, retained: Int32[Array, ""]) -> FixedPoint:
    """Draw a uniform point of [P_(r-1), P_r).

    Args:
        bits: random bits, read as a number in [0, 1) with 64 of them.
        sums: P_i, shape (n,), as of `ppl.kernels.resampling.inverse_cdf.scaled_prefix_sum`.
        retained: r, in range.

    Returns:
        The point, scalars. It is P_r where the stretch is empty.
    """
    from_whole, from_part = (element(x, retained - 1) for x in sums)
    to_whole, to_part = (element(x, retained) for x in sums)
    length = ((to_whole - from_whole - (to_part < from_part)).astype(jnp.uint32), to_part - from_part)
    whole, part = multiply(length[0], bits[0])
    for more in (multiply(length[0], bits[1])[0], multiply(length[1], bits[0])[0], from_part):
        part = part + more
        whole = whole + (part < more).astype(jnp.uint32)
    return from_whole + whole.astype(jnp.int32), part


def pin(
    key: PRNGKeyArray | UInt32[Array, "2"],
    ancestors: Int32[Array, " num"],
    place: int | Int32[Array, ""],
    retained: Int32[Array, ""],
) -> Int32[Array, " num"]:
    """Put the retained particle in slot 0 and the other draws behind it in uniformly random order.

    Args:
        key: random key, consumed once.
        ancestors: shape (num,), in any order.
        place: which of them is the retained particle's; whatever stands there is dropped.
        retained: its index.

    Returns:
        Shape (num,).
    """
    others = jnp.where(jnp.arange(ancestors.shape[0] - 1) < place, ancestors[:-1], ancestors[1:])
    others = jax.random.permutation(key, others) if others.shape[0] > 1 else others
    return jnp.concatenate([retained[None], others])
