"""The next token's distribution: a categorical law over the vocabulary that is sampled by inverting its CDF.

With weights `w_i = exp(logit_i - max)`, cut into blocks of equal size with sums `s_b`, one draw is

    block  b = first with  s_0 + ... + s_b > u_0 * sum(s)                                                       (1)
    token  i = first of b with  w_(first of b) + ... + w_i > u_1 * s_b                                          (2)

for two uniforms on the multiples of 2^-24 in [0, 1). Two levels for two reasons. Speed: the weights are summed in one
pass and only one block is looked at again, where the Gumbel method draws a random number for every token. And
accuracy: one uniform decides with a step of 6e-8 whatever the token's probability, which is a tenth of a typical one at
a vocabulary of 262,144; two decide with that step relative to a block.

Sums of float32 may fail to increase where a weight is added, or end below their own last entry; a block or token is
therefore taken only where its own weight is positive, and the last such one where rounding leaves none.
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

__all__ = ["NextToken", "invert_cdf"]

_BLOCK = 256


class NextToken(dist.CategoricalLogits):
    """A NumPyro categorical distribution with a fast sampler and a density that reads the logits once.

    It is `numpyro.distributions.CategoricalLogits` in every other respect, except that logits may be -inf.
    """

    arg_constraints = {"logits": constraints.independent(constraints.less_than(jnp.inf), 1)}

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Int[Array, "..."]:
        """Draw tokens.

        Args:
            key: a JAX random key, consumed once.
            sample_shape: leading shape of the draws.

        Returns:
            int32 tokens of shape `sample_shape + batch_shape`, none of probability 0.
        """
        shape = tuple(sample_shape) + self.batch_shape
        bits = jax.random.bits(key, (*shape, 2), "uint32")
        uniforms = (bits >> 8).astype(jnp.float32) * 2.0**-24
        rows = jnp.reshape(self.logits, (-1, self.logits.shape[-1]))
        flat = uniforms.reshape(*sample_shape, rows.shape[0], 2)
        tokens = jax.vmap(invert_cdf, in_axes=(0, -2), out_axes=-1)(rows, flat)
        return tokens.reshape(shape)

    def restrict(self, allowed: Bool[Array, "V"]) -> "NextToken":
        """The distribution given that the token is one of those allowed; as a proposal it forbids the others.

        Args:
            allowed: which tokens may be drawn, at least one that has positive probability.
        """
        return NextToken(logits=jnp.where(allowed, self.logits, -jnp.inf))

    @validate_sample
    def log_prob(self, value: Int[Array, "..."]) -> Float[Array, "..."]:
        """Log-probability of tokens, `logit - logsumexp(logits)`.

        Args:
            value: tokens, broadcast against the batch shape.

        Returns:
            Natural logarithms, float32; -inf for a token whose logit is -inf.
        """
        value = jnp.asarray(value)
        shape = jnp.broadcast_shapes(value.shape, self.batch_shape)
        logits = jnp.broadcast_to(self.logits, (*shape, self.logits.shape[-1]))
        index = jnp.broadcast_to(value, shape)[..., None].astype(jnp.int32)
        chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(self.logits, axis=-1)


@jax.jit
def invert_cdf(logits: Float[Array, "V"], uniforms: Float[Array, "*n 2"]) -> Int[Array, "*n"]:
    """The tokens at which the two-level CDF passes the uniforms, equations (1) and (2).

    Args:
        logits: unnormalised log-probabilities, -inf for what cannot be drawn; at least one finite.
        uniforms: pairs in [0, 1).

    Returns:
        int32 tokens of positive weight.
    """
    size = logits.shape[-1]
    blocks = -(-size // _BLOCK)
    table = jnp.pad(logits, (0, blocks * _BLOCK - size), constant_values=-jnp.inf).reshape(blocks, _BLOCK)
    top = jnp.max(logits)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    sums = jnp.sum(jnp.exp(table - top), axis=-1)
    block = _first_beyond(sums, uniforms[..., 0])  # (1)
    inside = _first_beyond(jnp.exp(table[block] - top), uniforms[..., 1])  # (2)
    return jnp.minimum(block * _BLOCK + inside, size - 1)


def _first_beyond(weights: Float[Array, "*#n K"], uniforms: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """The first index of positive weight whose cumulative weight exceeds `uniform * total`."""
    cumulative = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    beyond = positive & (cumulative > uniforms[..., None] * cumulative[..., -1:])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[..., ::-1], axis=-1)
    return jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), last).astype(jnp.int32)
