"""Gaussian laws of one step, and their products.

A factor's step from x to x' is p_i(x'|x) = N(x'; m_i, u_i I) in d dimensions. All factors share the backward kernel
k(x|x') = N(x; r x', v I). With powers b_i, B = sum_i b_i, the locally optimal proposal of a target is Gaussian,

    F(x') proportional to prod_i p_i(x'|x)^{b_i} k(x|x')^{1 - B} = N(x'; m, I / L)                                 (1)
    L = sum_i b_i / u_i + (1 - B) r^2 / v,     m = [sum_i b_i m_i / u_i + (1 - B) r x / v] / L

and the weight of a draw is the normaliser, the same for every x':

    log w = - d/2 [sum_i b_i log u_i + (1 - B) log v + log L]
            - 1/2 [sum_i b_i |m_i - m|^2 / u_i + (1 - B) |x - r m|^2 / v]                                          (2)

(the powers of 2 pi cancel). At a start there is no k: L = sum_i b_i / u_i, and (2) has B - 1 logarithms of 2 pi left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

__all__ = ["Gaussian", "Noising"]


class Noising(NamedTuple):
    """The backward kernel k(x|x') = N(x; rate x', variance I) of a step that starts at x."""

    x: Any
    rate: Any
    variance: Any


class Gaussian(dist.Distribution):
    """A Gaussian with the same variance in all directions: the law of a start or of a step.

    Attributes:
        loc: the mean, an array of any shape, which is the event.
        squared_scale: the variance, a scalar.
        noising: the step's backward kernel; None at a start.
    """

    reparametrized_params = ["loc", "squared_scale"]

    def __init__(self, loc, squared_scale, noising: Noising | None = None):
        self.loc, self.squared_scale, self.noising = jnp.asarray(loc), squared_scale, noising
        super().__init__(batch_shape=(), event_shape=self.loc.shape, validate_args=False)

    @property
    def support(self):
        """All arrays of the event's shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def size(self) -> int:
        """The number of dimensions."""
        return math.prod(self.event_shape)

    @property
    def mean(self):
        """The mean."""
        return self.loc

    @property
    def variance(self):
        """The variance of each dimension, in the event's shape."""
        return jnp.broadcast_to(self.squared_scale, self.event_shape)

    def sample(self, key, sample_shape=()):
        """Draw values, `sample_shape + event_shape`."""
        noise = jax.random.normal(key, (*sample_shape, *self.event_shape), self.loc.dtype)
        return self.loc + jnp.sqrt(self.squared_scale) * noise

    def log_prob(self, value):
        """Return the log-density, without the event's axes."""
        axes = tuple(range(-len(self.event_shape), 0))
        squares = jnp.sum((value - self.loc) ** 2, axes)
        return -0.5 * (squares / self.squared_scale + self.size * jnp.log(2 * jnp.pi * self.squared_scale))

    def shifted(self, change) -> Gaussian:
        """Return the law with another mean, `loc + change`."""
        return Gaussian(self.loc + change, self.squared_scale, self.noising)

    def multiply(self, laws: Sequence[Gaussian], powers: Sequence[Any], signs: Sequence[float]):
        """Return (1) and (2); see `ppl.products.Multipliable`."""
        del signs
        unit = self.squared_scale  # logarithms of ratios to it are of moderate size at every level
        total = sum(powers[1:], powers[0])
        precisions = [power * unit / law.squared_scale for law, power in zip(laws, powers, strict=True)]
        logs = sum(power * jnp.log(law.squared_scale / unit) for law, power in zip(laws, powers, strict=True))
        pull = sum(q * (law.loc - self.loc) for law, q in zip(laws[1:], precisions[1:], strict=True))
        precision = sum(precisions[1:], precisions[0])
        if self.noising is None:
            logs = logs + (total - 1) * jnp.log(2 * jnp.pi * unit)
        else:
            x, rate, variance = self.noising
            back = (1 - total) * unit / variance
            precision = precision + back * rate**2
            pull = pull + back * rate * (x - rate * self.loc)
            logs = logs + (1 - total) * jnp.log(variance / unit)
        loc = self.loc + pull / precision
        squares = sum(q * jnp.sum((law.loc - loc) ** 2) for law, q in zip(laws, precisions, strict=True))
        if self.noising is not None:
            squares = squares + back * jnp.sum((x - rate * loc) ** 2)
        log_weight = -0.5 * (self.size * (logs + jnp.log(precision)) + squares / unit)
        return Gaussian(loc, unit / precision, self.noising), lambda drawn: log_weight
