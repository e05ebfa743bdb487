"""One step of masked diffusion, and products of such steps.

A state x holds tokens and masks. A step masks a set R of positions again, unmasks a set S, and draws the tokens of S
from the denoiser's law mu_l(v | x) at each position on its own:

    p(x'|x) = rho(R | x) pi(S | x, R) prod_{l in S} mu_l(x'_l | x)                                                (1)

rho and pi, the schedule and the position policy, belong to the target: they are the same for all factors. With factors
mu_i and powers b_i the locally optimal proposal has the same sets and at each position

    F_l(v) = prod_i mu_{i,l}(v | x)^{b_i} / Z_l(x),       Z_l(x) = sum_v prod_i mu_{i,l}(v | x)^{b_i}             (2)

**Without masking again** a path is an order and the finished tokens x_0. Given x_0, k(path | x_0) = prod_t
pi(S_t | x_t) is a law of orders: it reveals x_0 by the policy, which sees no more than was revealed. It cancels in
sum_i b_i (log p_i - log k) + log k - log F, and leaves the weight

    log w = sum_{l in S} log Z_l(x)                                                                               (3)

of the target prod_t pi(S_t | x_t) prod_{l in S_t} prod_i mu_{i,l}^{b_i}. Where each step unmasks one position and the
denoisers are conditionals of joint laws p_i, its marginal is prod_i p_i(x_0)^{b_i}, whatever the policy.

**With masking again** a path has tokens that are overwritten, too. Where rho and pi see only which positions are
masked, the sets have a law of their own, and given them and x_0 the overwritten tokens can be filled in backwards: a
position in R gets its token back from a law g_l(v | x'). Factor i's own law of the past, k_i, fills from its denoiser,
g = mu_i(. | x'): this is p_i(path | x_0) itself where steps unmask one position and the denoiser is consistent. So the
factors enter as p_i(path) / k_i(path | x_0), which is p_i(x_0) then, and the target is completed by one law of the
past, k, that fills from the product law (2) at x':

    prod_i [p_i(path) / k_i(path | x_0)]^{b_i} k(path | x_0)                                                      (4)
    log w = sum_{l in S} log Z_l(x) - sum_{l in R} log Z_l(x')                                                    (5)

One factor to the power 1 has weight 0. (5) does not depend on the tokens that are overwritten. With one k for all
factors each of them would add (1 - sum_i b_i) log g, a weight whose second moment is of the order of the vocabulary
already at b = 2, or a marginal that is not prod_i p_i(x_0)^{b_i}. What masking again costs is log Z_l(x) - log Z_l(x')
at each position and pass: a random walk as long as the number of passes, its steps as large as the context's effect on
log Z. The sum over R is taken in the next step, where the denoisers are called at x'.

Support: a token that a factor forbids has log-weight -inf, also at powers of 0 and below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int
from numpyro.distributions import constraints

from ppl.models.language.next_token import NextToken
from ppl.models.masked.policies import Policy
from ppl.models.masked.schedule import Plan

__all__ = ["UnmaskingStep"]


class UnmaskingStep(dist.Distribution):
    """The law (1) of the next state, int32 `[L]`.

    Attributes:
        tokens: the present state, `[L]`.
        log_probs: log mu, `[L, V]`, normalised.
        mask_token: what stands for a mask.
        policy: pi.
        plan: the schedule, rho included.
        step: the step's number.
        remasked: which positions the last step masked again, `[L]`; None where none ever are.
    """

    def __init__(
        self,
        tokens: Int[Array, " L"],
        log_probs: Float[Array, "L V"],
        *,
        mask_token: int,
        policy: Policy,
        plan: Plan,
        step: Any,
        remasked: Bool[Array, " L"] | None = None,
    ):
        """Hold the step's parts; see the class's attributes."""
        self.tokens, self.log_probs, self.mask_token = tokens, log_probs, mask_token
        self.policy, self.plan, self.step, self.remasked = policy, plan, step, remasked
        super().__init__(batch_shape=(), event_shape=tokens.shape, validate_args=False)

    @property
    def support(self):
        """Tokens and masks."""
        largest = max(self.log_probs.shape[-1] - 1, self.mask_token)
        return constraints.independent(constraints.integer_interval(0, largest), 1)

    @property
    def masked(self) -> Bool[Array, " L"]:
        """Which positions of the present state are masked."""
        return self.tokens == self.mask_token

    def sample(self, key, sample_shape=()):
        """Draw next states, `sample_shape + (L,)`."""
        if sample_shape:
            keys = jax.random.split(key, sample_shape)
            draw = self.sample
            for _ in sample_shape:
                draw = jax.vmap(draw)
            return draw(keys)
        token_key, position_key, remask_key = jax.random.split(key, 3)
        offered = NextToken(logits=self.log_probs).sample(token_key)
        kept = self.tokens
        again = jnp.zeros_like(self.masked)
        if self.plan.remasks:
            uniforms = jax.random.uniform(remask_key, self.tokens.shape)
            again = ~self.masked & self.plan.in_block(self.step) & (uniforms < self._sigma())
            kept = jnp.where(again, self.mask_token, kept)
        chosen = self._positions(jnp.sum(again)).sample(position_key, offered)
        return jnp.where(chosen, offered, kept).astype(self.tokens.dtype)

    def log_prob(self, value):
        """Return the log-probability of a next state; NaN where the policy has no density."""
        if jnp.ndim(value) > 1:
            return jax.vmap(self.log_prob)(value)
        chosen, again = self.masked & (value != self.mask_token), ~self.masked & (value == self.mask_token)
        drawn = self._at(self.log_probs, value)
        log_prob = self._positions(jnp.sum(again)).log_prob(chosen) + jnp.sum(jnp.where(chosen, drawn, 0.0))
        allowed = jnp.all(self.masked | again | (value == self.tokens))
        if self.plan.remasks:
            sigma, exposed = self._sigma(), ~self.masked & self.plan.in_block(self.step)
            log_prob += jnp.sum(jnp.where(exposed, jnp.where(again, jnp.log(sigma), jnp.log1p(-sigma)), 0.0))
            allowed &= ~jnp.any(again & ~exposed)
        else:
            allowed &= ~jnp.any(again)
        return jnp.where(allowed, log_prob, -jnp.inf)

    def multiply(self, laws: Sequence[UnmaskingStep], powers: Sequence[Any], signs: Sequence[float]):
        """Return F of (2) and the weight (5); see `ppl.products.Multipliable`."""
        terms = [_raised(law.log_probs, *rest) for law, *rest in zip(laws, powers, signs, strict=True)]
        total = sum(terms[1:], terms[0])
        log_z = jax.nn.logsumexp(total, axis=-1)
        possible = log_z > -jnp.inf
        # Where no token is possible any may be drawn: the weight is -inf.
        tokens = np.arange(total.shape[-1]) != self.mask_token
        anything = np.where(tokens, np.float32(-np.log(tokens.sum())), -np.inf).astype(np.float32)
        normalised = jnp.where(possible[:, None], total - jnp.where(possible, log_z, 0.0)[:, None], anything)
        law = UnmaskingStep(
            self.tokens,
            normalised,
            mask_token=self.mask_token,
            policy=self.policy,
            plan=self.plan,
            step=self.step,
            remasked=self.remasked,
        )

        def log_weight(drawn):
            chosen = self.masked & (drawn != self.mask_token)
            gained = jnp.where(chosen, log_z, 0.0)
            refused = chosen & (~possible | jnp.isneginf(self._at(total, drawn)))
            if self.remasked is not None:
                gained -= jnp.where(self.remasked & possible, log_z, 0.0)
                refused |= self.remasked & ~possible
            return jnp.where(jnp.any(refused), -jnp.inf, jnp.sum(jnp.where(refused, 0.0, gained)))

        return law, log_weight

    def _positions(self, num_remasked):
        return self.policy.positions(self.plan.due(self.step, self.masked, num_remasked), self.log_probs)

    def _sigma(self):
        return jnp.asarray(self.plan.remask)[self.step]

    def _at(self, table, value):
        """Return the entries of a `[L, V]` table at the tokens of a state; those at masks mean nothing."""
        index = jnp.where(value == self.mask_token, 0, value)
        return jnp.take_along_axis(table, index[:, None], axis=-1, mode="clip")[:, 0]


def _raised(log_probs, power, sign: float):
    """Return `power * log_probs`, -inf where the probability is 0, whatever the power."""
    if sign == 1:
        return log_probs
    return jnp.where(jnp.isneginf(log_probs), -jnp.inf, 0.0 if sign == 0 else power * log_probs)
