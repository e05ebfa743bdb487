"""What a denoising network predicts, and the denoised value that it stands for.

A network sees x = alpha x_0 + sigma eps and is trained to predict one of five things. All are linear in the *denoised
value* D = E[x_0 | x] and the noise e = E[eps | x], which x ties together by x = alpha D + sigma e:

    x0        D                                                                                                  (1)
    epsilon   e                               D = (x - sigma e) / alpha                                          (2)
    v         alpha e - sigma D               D = (alpha x - sigma v) / (alpha^2 + sigma^2)                      (3)
    velocity  alpha' D + sigma' e = dx/dt     D = (sigma' x - sigma u) / (alpha sigma' - alpha' sigma)           (4)
    score     -e / sigma = grad log q_t(x)    D = (x + sigma^2 s) / alpha                                        (5)

with alpha', sigma' the rates in time, which runs towards noise. At the two ends of time:

- without noise (sigma = 0) D = x / alpha, whatever is predicted; from D, e is taken as 0, which is its limit under a
  smooth density, and so are the score (which D does not determine) and sigma' e (sigma' may be infinite there);
- without data (alpha = 0) epsilon and score say nothing of D, which is the data's mean; nor does a velocity where the
  denominator of (4) is 0. From D, e = x / sigma.

Both directions are finite at the ends, and so are their gradients.

Source: (2) and (5) Tweedie's formula, Efron 2011; (3) Salimans and Ho 2022 (arXiv 2202.00512), with alpha^2 + sigma^2
of any value; (4) Lipman et al. 2023 (arXiv 2210.02747), solved for D.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

__all__ = ["PREDICTIONS", "check_prediction", "from_denoised", "to_denoised"]

PREDICTIONS = ("epsilon", "x0", "v", "velocity", "score")


def check_prediction(predicts: str) -> str:
    """Return the name of a prediction.

    Raises:
        ValueError: it is none of `PREDICTIONS`.
    """
    if predicts not in PREDICTIONS:
        raise ValueError(f"`predicts` must be one of {', '.join(map(repr, PREDICTIONS))}, got {predicts!r}.")
    return predicts


def to_denoised(
    predicts: str,
    output: ArrayLike,
    x: ArrayLike,
    alpha: ArrayLike,
    sigma: ArrayLike,
    alpha_rate: ArrayLike = 0.0,
    sigma_rate: ArrayLike = 0.0,
    mean: ArrayLike = 0.0,
) -> Any:
    """Return the denoised value that a network's output stands for.

    Args:
        predicts: one of `PREDICTIONS`.
        output: what the network gave, of x's shape.
        x: the noisy value.
        alpha: data's factor at its level; a scalar or an array that broadcasts against x, like the next three.
        sigma: noise's standard deviation.
        alpha_rate: d alpha / dt, which only "velocity" needs.
        sigma_rate: d sigma / dt, which only "velocity" needs.
        mean: of the data, taken where the output says nothing of it.

    Returns:
        D, of x's shape, in the units of the data. Finite wherever the arguments are (`sigma_rate` may be infinite where
        sigma is 0).

    Raises:
        ValueError: `predicts` is unknown.
    """
    check_prediction(predicts)
    xp = _library(output, x, alpha, sigma, alpha_rate, sigma_rate, mean)
    without_noise = xp.equal(sigma, 0)
    if predicts == "x0":
        denoised, known = output, True
    elif predicts == "v":
        denoised, known = (alpha * x - sigma * output) / (xp.square(alpha) + xp.square(sigma)), True
    elif predicts == "velocity":
        rate = xp.where(without_noise, 1.0, sigma_rate)  # may be infinite there
        determinant = alpha * rate - alpha_rate * sigma
        denoised, known = _divide(xp, rate * x - sigma * output, determinant)
    else:
        noise = sigma * output if predicts == "epsilon" else -xp.square(sigma) * output
        denoised, known = _divide(xp, x - noise, alpha)
    denoised = xp.where(known, denoised, mean)
    return xp.where(without_noise, _divide(xp, x, alpha)[0], denoised)


def from_denoised(
    predicts: str,
    denoised: ArrayLike,
    x: ArrayLike,
    alpha: ArrayLike,
    sigma: ArrayLike,
    alpha_rate: ArrayLike = 0.0,
    sigma_rate: ArrayLike = 0.0,
) -> Any:
    """Return what a network of this prediction would have given.

    Args:
        predicts: one of `PREDICTIONS`.
        denoised: D, of x's shape.
        x: the noisy value.
        alpha: data's factor at its level; a scalar or an array that broadcasts against x, like the next three.
        sigma: noise's standard deviation.
        alpha_rate: d alpha / dt, which only "velocity" needs.
        sigma_rate: d sigma / dt, which only "velocity" needs.

    Returns:
        The prediction, of x's shape; finite as in `to_denoised`.

    Raises:
        ValueError: `predicts` is unknown.
    """
    check_prediction(predicts)
    xp = _library(denoised, x, alpha, sigma, alpha_rate, sigma_rate)
    if predicts == "x0":
        return denoised + xp.zeros_like(x)
    noise, noisy = _divide(xp, x - alpha * denoised, sigma)
    noise = xp.where(noisy, noise, 0.0)
    if predicts == "epsilon":
        return noise
    if predicts == "v":
        return alpha * noise - sigma * denoised
    if predicts == "velocity":
        return alpha_rate * denoised + xp.where(noisy, sigma_rate, 0.0) * noise
    return -_divide(xp, noise, sigma)[0]


def _library(*arrays: Any) -> Any:
    """Return the array library of the arguments: jax where one is a jax array."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _divide(xp, numerator, denominator):
    """Return the quotient, 1 times the numerator where the denominator is 0, and whether it is not."""
    nonzero = xp.not_equal(denominator, 0)
    return numerator / xp.where(nonzero, denominator, 1.0), nonzero
