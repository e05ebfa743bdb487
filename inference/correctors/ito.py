"""The log-density of a particle, estimated along its path from scores alone.

In y = x / alpha noise has the variance T = sigma^2 / alpha^2, the density q of y obeys dq/dT = 1/2 Lap q, and its score
is s = grad log q = (D - y) / T. While T falls by dT, Ito's formula gives along any dy, with H the Hessian of log q,

    d log q = <s, dy> - dT/2 (|s|^2 + tr H) + 1/2 dy' H dy                                                         (1)

Noise of the variance dT (churn 1) makes the traces cancel, whatever the drift; no derivative of s is left:

    log q'(y') ~ log q(y) + <s, y' - y> - dT/2 |s|^2                                                               (2)

which is log p(y'|y) - log k(y|y') of the steps with the noising variance. Where a step has no noise along orthonormal
directions v_j, their part of tr H stays, all of it in a differential equation (churn 0), where it is div s:

    log q'(y') ~ log q(y) + <s, y' - y> - dT/2 (|s|^2 + C),     C = sum_j v_j' H v_j                               (3)

The error of a step of (2) is 1/2 (dy' H dy - dT tr H): that of a path falls as 1 / sqrt(steps), its mean as 1 / steps.
A reference Gaussian r = N(m, (c^2 + T) I), whose log-density is known, takes its own part of that error out:

    log q'(y') ~ log q(y) + log r'(y') - log r(y) + [(3) with s] - [(3) with the score of r]                       (4)

(4) is exact where q is that Gaussian, and at high noise, where they agree. Densities of x have -d log alpha on top.

Source: (2) SuperDiff (arXiv 2412.17762), Theorem 1; the reference as in RNE (arXiv 2506.05668); the traces by
Hutchinson's estimate (1989).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Reference", "curvature", "divergence", "log_density_change", "next_log_density"]


class Reference(NamedTuple):
    """Gaussian data N(mean, scale^2 I), whose density is known at every level.

    Attributes:
        mean: a number or an array of the data's shape.
        squared_scale: a number.
    """

    mean: Any
    squared_scale: Any

    def score(self, y, squared):
        """Return the score of y at noise of the variance `squared`."""
        return (self.mean - y) / (self.squared_scale + squared)

    def log_density(self, y, squared):
        """Return the log-density of y without the powers of 2 pi, a scalar."""
        total = self.squared_scale + squared
        return -0.5 * (jnp.sum((y - self.mean) ** 2) / total + jnp.size(y) * jnp.log(total))

    def curvature(self, squared, directions):
        """Return C of (3) for so many directions."""
        return -directions / (self.squared_scale + squared)


def log_density_change(score, change, fall, curvature=0.0):
    """Return the change (3) of log q(y) in a step; (2) where it has noise of the variance dT in every direction.

    Args:
        score: s, an array. At both ends' mean the differential equation's change is of second order.
        change: y' - y.
        fall: dT.
        curvature: C: 0 at churn 1, the divergence of s at churn 0.
    """
    return jnp.sum(score * change) - 0.5 * fall * (jnp.sum(score**2) + curvature)


def next_log_density(log_density, x, denoised, x_next, before, after, reference=None, curvature=0.0, directions=0):
    """Return the estimate (4) of log q'(x'), a scalar in nats; (3) without a reference.

    Args:
        log_density: log q(x).
        x: an array at the level `before`.
        denoised: D(x).
        x_next: x' at the level `after`, drawn at churn 1 but for the directions below.
        before: the level of x, with `alpha` above 0 and `sigma`.
        after: the level of x'.
        reference: a `Reference`, or None.
        curvature: C of q in y, along directions without noise.
        directions: how many they are.
    """
    squared, squared_next = (before.sigma / before.alpha) ** 2, (after.sigma / after.alpha) ** 2
    fall = squared - squared_next
    y, y_next = x / before.alpha, x_next / after.alpha
    change = y_next - y
    volume = math.prod(jnp.shape(x)) * jnp.log(before.alpha / after.alpha)
    result = log_density + volume + log_density_change((denoised - y) / squared, change, fall, curvature)
    if reference is None:
        return result
    known = reference.log_density(y_next, squared_next) - reference.log_density(y, squared)
    own = reference.curvature(squared, directions)
    return result + known - log_density_change(reference.score(y, squared), change, fall, own)


def curvature(denoise: Callable[[Any], Any], x, level, directions) -> Any:
    """Return C of (3), sum_j v_j' H v_j = sum_j (v_j' (dD/dy) v_j - |v_j|^2) / T, by forward derivatives.

    Args:
        denoise: D as a function of x at that level.
        x: an array.
        level: with `alpha` and `sigma`.
        directions: v_j in y, `[num, *x.shape]`, orthogonal and of length 1, or 0 for none.
    """

    def one(v):
        slope = jax.jvp(denoise, (x,), (level.alpha * v,))[1]
        return jnp.sum(v * slope) - jnp.sum(v**2)

    return jnp.sum(jax.vmap(one)(directions)) * (level.alpha / level.sigma) ** 2


def divergence(denoise: Callable[[Any], Any], x, level, key, num_probes: int = 1) -> Any:
    """Return Hutchinson's unbiased estimate of div s = tr H in y, from probes of random signs.

    Args:
        denoise: D as a function of x at that level.
        x: an array.
        level: with `alpha` and `sigma`.
        key: a PRNG key.
        num_probes: how many probes, each a forward derivative of D.
    """
    probes = jax.random.rademacher(key, (num_probes, *jnp.shape(x)), jnp.result_type(x))
    return curvature(denoise, x, level, probes) / num_probes
