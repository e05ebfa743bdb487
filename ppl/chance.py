"""Choices that an algorithm makes: which of finitely many, whether to accept, whom to resample.

They stand in one place so that another source of randomness can take them over: exact enumeration makes each choice in
turn (see `ppl.testing`). Draws of sample sites are choices too, where the site's law has finitely many values. Kernels
of your own that choose through these functions can be enumerated; random numbers taken from `jax.random` cannot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from ppl.densities import innermost
from ppl.errors import SiteTypeError, user_line
from ppl.kernels import resampling

__all__ = [
    "Source",
    "accept",
    "categorical",
    "conditional_resampler",
    "index",
    "is_replaced",
    "random_bits_in",
    "replaced_by",
    "resampler",
    "sample",
    "sampler",
]


class Source(Protocol):
    """Where choices come from in place of `jax.random`. Equal sources trace to the same programs."""

    def choose(self, kind: str, key, weights) -> Any:
        """Return indices int32 `[*batch]`, independent, with probabilities proportional to weights `[*batch, K]`."""

    def index(self, key, num) -> Any:
        """Return one of `0..num-1`, int32."""

    def resampler(self, name: str) -> Callable:
        """Return the scheme of a name, `(key, log_weights, num) -> ancestors`."""

    def conditional_resampler(self, name: str) -> Callable:
        """Return the conditional scheme of a name, `(key, log_weights, retained, num) -> ancestors`."""


_SOURCE: Source | None = None
# JAX caches the trace of a jitted function by its arguments: under a token of its own none is used that was traced with
# another source.
_JIT_CACHE_TOKEN = jax.make_user_context(None)


@contextlib.contextmanager
def replaced_by(source: Source) -> Iterator[None]:
    """Let a source make the choices of all that is traced meanwhile."""
    global _SOURCE
    before = _SOURCE
    _SOURCE = source
    try:
        with _JIT_CACHE_TOKEN(source):
            yield
    finally:
        _SOURCE = before


def is_replaced() -> bool:
    """Whether a source other than `jax.random` makes the choices."""
    return _SOURCE is not None


def categorical(key, logits) -> Any:
    """Return one index, int32, drawn with probabilities proportional to `exp(logits)`, logits `[K]`."""
    if _SOURCE is not None:
        return _SOURCE.choose("categorical", key, _relative(logits))
    return jax.random.categorical(key, logits).astype(jnp.int32)


def index(key, num) -> Any:
    """Return one of `0..num-1`, int32, each with equal probability; `num` may be traced."""
    if _SOURCE is not None:
        return _SOURCE.index(key, num)
    return jax.random.randint(key, (), 0, num, jnp.int32)


def accept(key, log_ratio) -> Any:
    """Return True with probability `min(1, exp(log_ratio))`, False where that is NaN."""
    if _SOURCE is not None:
        probability = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))
        return _SOURCE.choose("accept", key, jnp.stack([1 - probability, probability])) == 1
    return jnp.log(jax.random.uniform(key)) < log_ratio


def sample(key, distribution) -> Any:
    """Return a draw from a NumPyro distribution."""
    return sampler(distribution, f"chance.sample at {user_line()}")(key)


def resampler(scheme: str | Callable) -> Callable:
    """Return a resampling scheme, see `ppl.kernels.resampling.resolve`; functions of the user's own as they are."""
    resolved = resampling.resolve(scheme)
    return _SOURCE.resampler(scheme) if _SOURCE is not None and isinstance(scheme, str) else resolved


def conditional_resampler(scheme: str | Callable) -> Callable:
    """Return a conditional scheme, see `ppl.kernels.resampling.resolve_conditional`."""
    resolved = resampling.resolve_conditional(scheme)
    return _SOURCE.conditional_resampler(scheme) if _SOURCE is not None and isinstance(scheme, str) else resolved


def sampler(law: Any, site: str) -> Callable:
    """Return the function from a key to a draw of a law.

    Raises:
        SiteTypeError: another source makes the choices, and the law has not finitely many values; names the site.
    """
    if _SOURCE is None:
        return law.sample
    source = _SOURCE
    values, weights = _options(law)
    if values is None:
        if random_bits_in(jax.make_jaxpr(lambda key: law.sample(key))(jax.random.key(0))):
            raise SiteTypeError(
                f"{site!r} at {user_line()}: {type(innermost(law)).__name__} cannot be enumerated; the exact checker "
                "needs finite sites, whose values are known while the program is staged, such as dist.Categorical or "
                "dist.Bernoulli. For other programs there is ppl.testing.assert_joint."
            )
        return law.sample
    values = values.astype(jax.eval_shape(law.sample, jax.random.key(0)).dtype)
    return lambda key: values[source.choose(site, key, weights)]


def random_bits_in(program: Any) -> bool:
    """Whether a jaxpr asks `jax.random` for bits."""
    return any(
        eqn.primitive.name == "random_bits" or any(map(random_bits_in, jex.jaxprs_in_params(eqn.params)))
        for eqn in getattr(program, "jaxpr", program).eqns
    )


def _options(law) -> tuple[Any, Any]:
    """Return a law's values `[K, *event]` and their weights `[*batch, K]`, or (None, None) where they are not finite.

    The batch is all that is drawn independently: plates, and what `to_event` made part of an event.
    """
    inner = innermost(law)
    if not inner.has_enumerate_support:
        return None, None
    try:
        values = jnp.asarray(inner.enumerate_support(expand=False))
    except NotImplementedError:  # its values differ along the batch, or depend on traced values
        return None, None
    shape = law.batch_shape + law.event_shape
    batch = shape[: len(shape) - len(inner.event_shape)]
    log_probs = jnp.moveaxis(jnp.asarray(inner.log_prob(values)), 0, -1)
    log_probs = jnp.broadcast_to(log_probs, (*batch, values.shape[0]))
    return values.reshape(values.shape[:1] + inner.event_shape), _relative(log_probs)


def _relative(logits):
    """Return weights in proportion to `exp(logits)`, the largest 1; NaN stays."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0.0, largest))
