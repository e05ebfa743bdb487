"""Derivatives through resampling: equal weights that remember how they came about.

Ancestors are piecewise constant in the weights, so differentiating a particle filter as it stands loses the derivative
of the law by which they are drawn. After resampling at the weights w, give the child of particle a the weight

    (1)  w_a / stop_gradient(w_a)  =  1,   whose log has the derivative of log w_a,

and take the factor `stop_gradient(sum_i w_i) / num` out of the weights. Then, with `E[offspring of i] = num W_i`,

    (2)  E[ sum over children  stop_gradient(sum w) / num * w_a / stop_gradient(w_a) * g_a ]  =  sum_i w_i g_i

holds for the values and for their derivatives, and so `E[grad Z_hat] = grad Z`; the gradient of log Z_hat is the
estimate of the score by Fisher's identity. The forward pass does not change.

Where slot 0 keeps particle 0 (conditional resampling) and the others draw their ancestors independently,

    (3)  E[ sum over children g_a ] = g_0 + (num - 1) sum_i W_i g_i,

so that the child in slot 0 has the derivative of log sum_i w_i, and the others that of (1).

Source: Ścibior and Wood (2021), "Differentiable particle filtering without modifying the forward pass", section 3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

__all__ = ["children_log_weights"]


def children_log_weights(
    log_weights: Float[Array, " n"], ancestors: Int32[Array, " num"], pinned: bool = False
) -> Float[Array, " num"]:
    """Give the children of a resampling step log-weights of 0 that carry their ancestors' derivative, the log of (1).

    Args:
        log_weights: shape (n,), nats, the weights by which the ancestors were drawn.
        ancestors: shape (num,), int32 in [0, n), none of weight zero.
        pinned: slot 0 keeps particle 0, and the others are drawn independently: (3).

    Returns:
        Shape (num,): zeros. Their derivative is that of ``log_weights[ancestors]``. Take the mass
        ``stop_gradient(logsumexp(log_weights)) - log(num)`` with them, as in (2).
    """
    children = _remembering(log_weights, ancestors)
    if not pinned:
        return children
    total = _remembering(jax.nn.logsumexp(log_weights)[None], jnp.zeros(1, jnp.int32))
    return children.at[0].set(total[0])


@jax.custom_jvp
def _remembering(log_weights, ancestors):
    # Zeros that `vmap` batches as its inputs are.
    return jnp.where(jnp.isnan(log_weights[ancestors]), 0.0, jnp.zeros((), log_weights.dtype))


@_remembering.defjvp
def _children_log_weights_jvp(primals, tangents):
    log_weights, ancestors = primals
    # A particle of weight zero has children only where all are dead: then nothing has a derivative.
    tangent = jnp.where(log_weights > -jnp.inf, tangents[0], 0.0)
    return _remembering(log_weights, ancestors), tangent[ancestors]
