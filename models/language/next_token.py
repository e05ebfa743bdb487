"""The next token's distribution: a categorical law over the vocabulary, sampled by inverting its CDF in two levels.

Sampler and density are those of `ppl.kernels.tokens`; in one compiled program they share their sweep over the logits.

Truncation as a proposal. A law p cut down to a set A of probable tokens never draws the others: weighted by p / q it
would silently stand for p given A. What `top_k`, `top_p` and `min_p` return is therefore mixed with p itself
(Hesterberg 1995, "Weighted average importance sampling and defensive mixture distributions"), for 0 < d <= 1:

    (1)  q_i = (1 - d) p_i [i in A] / p(A) + d p_i,   p_i / q_i <= 1 / d
    (2)  log q_i = log p_i + log d + [i in A] log(1 + (1 - d) / (d p(A)))

By (2) q is a categorical law again, with the logits of p raised on A by one number a row. Over T tokens the weights
multiply and are bounded by d^-T only: few particles leave A, and what they stand for shows in rare, large weights.
Resample on the way, or take a larger d, and do not read a large effective sample size as proof.
"""

import math

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Bool, Float, Int
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from ppl.kernels.tokens import invert_cdf, token_log_prob
from ppl.kernels.truncation import min_p, top_k, top_p

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

    def top_k(self, k: Int[ArrayLike, "*#batch"] | int, defensive: float = 0.1) -> "NextToken":
        """A proposal that prefers the k most probable tokens, (1).

        Args:
            k: how many, at least 1; tokens that tie with the last of them belong to them.
            defensive: the share d that is drawn from this distribution itself, in (0, 1]; weights are at most 1 / d.

        Returns:
            A distribution over the same tokens, for `ppl.sample(name, law, proposal=law.top_k(50))`.

        Raises:
            ValueError: `defensive` is not in (0, 1], or `k` is below 1.
        """
        _check_defensive(defensive, f"top_k(law.logits, {k})")
        return self._prefer(top_k(self.logits, k), defensive)

    def top_p(self, p: Float[ArrayLike, "*#batch"] | float, defensive: float = 0.1) -> "NextToken":
        """A proposal that prefers the smallest set of most probable tokens whose probability reaches p, (1).

        Args:
            p: in (0, 1].
            defensive: the share d that is drawn from this distribution itself, in (0, 1]; weights are at most 1 / d.

        Returns:
            A distribution over the same tokens, for `ppl.sample(name, law, proposal=law.top_p(0.9))`.

        Raises:
            ValueError: `defensive` or `p` is not in (0, 1].
        """
        _check_defensive(defensive, f"top_p(law.logits, {p})")
        return self._prefer(top_p(self.logits, p), defensive)

    def min_p(self, p: Float[ArrayLike, "*#batch"] | float, defensive: float = 0.1) -> "NextToken":
        """A proposal that prefers the tokens whose probability is at least p times the largest, (1).

        Args:
            p: in (0, 1].
            defensive: the share d that is drawn from this distribution itself, in (0, 1]; weights are at most 1 / d.

        Returns:
            A distribution over the same tokens, for `ppl.sample(name, law, proposal=law.min_p(0.05))`.

        Raises:
            ValueError: `defensive` or `p` is not in (0, 1].
        """
        _check_defensive(defensive, f"min_p(law.logits, {p})")
        return self._prefer(min_p(self.logits, p), defensive)

    def temper(self, temperature: Float[ArrayLike, "*#batch"] | float) -> "NextToken":
        """The distribution with logits divided by a temperature.

        As a proposal it reaches every token; its weights are bounded only by the vocabulary, and far from evenly spread
        at low temperatures.

        Args:
            temperature: positive; a scalar or of the batch shape. Above 1 flattens.

        Raises:
            ValueError: `temperature` is a number that is not positive and finite.
        """
        if isinstance(temperature, int | float) and not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be positive and finite, got {temperature}. 1 changes nothing.")
        logits = self.logits.astype(jnp.promote_types(self.logits.dtype, jnp.float32))
        top = jnp.max(logits, axis=-1, keepdims=True)
        shifted = logits - jnp.where(jnp.isfinite(top), top, 0)  # so that no quotient overflows
        return NextToken(logits=shifted / jnp.asarray(temperature, logits.dtype)[..., None])

    def _prefer(self, inside: Bool[Array, "*batch V"], defensive: float) -> "NextToken":
        """The mixture (1) of this distribution given a set, and of itself, by (2)."""
        logits = self.logits.astype(jnp.promote_types(self.logits.dtype, jnp.float32))
        log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        log_inside = jax.nn.logsumexp(jnp.where(inside, logits, -jnp.inf), axis=-1, keepdims=True)
        log_odds = math.log((1 - defensive) / defensive) if defensive < 1 else -math.inf
        return NextToken(logits=logits + jnp.where(inside, jax.nn.softplus(log_odds + log_total - log_inside), 0))

    @validate_sample
    def log_prob(self, value: Int[Array, "..."]) -> Float[Array, "..."]:
        """Log-probability of tokens, `logit - logsumexp(logits)`.

        Args:
            value: tokens, broadcast against the batch shape.

        Returns:
            Natural logarithms, float32; -inf for a token whose logit is -inf.
        """
        return token_log_prob(self.logits, jnp.asarray(value))


def _check_defensive(defensive: float, allowed: str) -> None:
    if isinstance(defensive, int | float) and not 0 < defensive <= 1:
        raise ValueError(
            f"`defensive` must be in (0, 1], got {defensive}: a truncated distribution is no proposal for the full "
            f"one. If the truncated distribution is what is meant, sample from `law.restrict({allowed})` itself."
        )
