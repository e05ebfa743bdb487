"""The next token's distribution: a categorical law over the vocabulary, sampled by inverting its CDF in two levels.

Sampler and density are those of `ppl.kernels.tokens`; in one compiled program they share their sweep over the logits.
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from ppl.kernels.tokens import invert_cdf, token_log_prob

__all__ = ["NextToken"]


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
        return invert_cdf(self.logits, uniforms)

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
        return token_log_prob(self.logits, jnp.asarray(value))
