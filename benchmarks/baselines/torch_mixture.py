"""Feynman-Kac corrected annealing of a Gaussian mixture in torch: a loop in Python, with the score in two forms.

Target: `q^b` of a mixture q of K equal components in d dimensions, by the reversed diffusion with noise of variance

    h(tau) = s_min^2 (R^(2 tau) - 1),   R = s_max / s_min,   g^2 = dh/dtau = 2 s_min^2 R^(2 tau) log R              (1)

at noising time tau in [0, 1], from tau = 1 in equal Euler-Maruyama steps of length dt:

    x <- x + g^2 b score(x, tau) dt + g dW,        log w = 1/2 g^2 b (b - 1) |score(x, tau)|^2 dt                  (2)

started at N(0, h(1) / b), with systematic resampling after every step. The sum of the steps' log mean weights
estimates `log int q^b - log int q_1^b`, where `q_1` is the mixture with h(1) added to its variances.

Source: Skreta et al. 2025 (arXiv 2503.02819), proposition 3.2 with the target score, in their setting of 40 modes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch

__all__ = ["Annealing", "by_autograd", "by_matrix_products"]

Score = Callable[[torch.Tensor, float], torch.Tensor]
"""``(x[n, d], variance) -> score[n, d]`` of the mixture with components of this variance."""


@dataclasses.dataclass(frozen=True)
class Annealing:
    """The loop (2).

    Attributes:
        score: the score of the mixture at a level.
        variance: of a component without noise.
        power: b, above 1.
        sigma_min: s_min in (1).
        sigma_max: s_max.
        num_steps: Euler-Maruyama steps.
        num_particles: n.
        dimension: d.
        corrected: whether particles are weighted and resampled.
    """

    score: Score
    variance: float
    power: float
    sigma_min: float
    sigma_max: float
    num_steps: int
    num_particles: int
    dimension: int = 2
    corrected: bool = True

    def __call__(self, seed: int) -> tuple[np.ndarray, float]:
        """Run the loop once, in float32.

        Returns:
            Samples `[num_particles, dimension]`, and the estimate of the log-ratio of integrals (nan uncorrected).
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (self.num_particles, self.dimension)
        log_range = math.log(self.sigma_max / self.sigma_min)
        dt = 1 / self.num_steps
        start = self._noise(1.0, log_range)
        x = torch.randn(shape, generator=generator) * math.sqrt(start / self.power)
        log_ratio = 0.0
        for step in range(self.num_steps):
            tau = 1 - step * dt
            score = self.score(x, self.variance + self._noise(tau, log_range))
            spread = 2 * self.sigma_min**2 * math.exp(2 * log_range * tau) * log_range * dt
            noise = torch.randn(shape, generator=generator)
            x = torch.add(x, score, alpha=spread * self.power).add_(noise, alpha=math.sqrt(spread))
            if self.corrected:
                log_weights = score.square().sum(-1).mul_(0.5 * spread * self.power * (self.power - 1))
                log_sum = torch.logsumexp(log_weights, 0)
                log_ratio += log_sum.item() - math.log(self.num_particles)
                x = x[_systematic(torch.exp(log_weights - log_sum), generator)]
        return x.numpy(), log_ratio if self.corrected else math.nan

    def _noise(self, tau: float, log_range: float) -> float:
        """Return h(tau)."""
        return self.sigma_min**2 * math.expm1(2 * log_range * tau)


def by_autograd(means: np.ndarray) -> Score:
    """Return the score as the gradient of the mixture's log-density: the published form."""
    locs = torch.as_tensor(means, dtype=torch.float32)
    number, dimension = locs.shape
    mixture = torch.distributions.Categorical(torch.ones(number))
    identity = torch.eye(dimension).expand(number, dimension, dimension)

    def score(x: torch.Tensor, variance: float) -> torch.Tensor:
        components = torch.distributions.MultivariateNormal(
            locs, scale_tril=math.sqrt(variance) * identity, validate_args=False
        )
        law = torch.distributions.MixtureSameFamily(mixture, components, validate_args=False)
        x = x.detach().requires_grad_()
        return torch.autograd.grad(law.log_prob(x).sum(), x)[0]

    return score


def by_matrix_products(means: np.ndarray) -> Score:
    """Return the score as `(softmax(x m^T / v - |m|^2 / 2 v) m - x) / v`: two matrix products, no gradient."""
    locs = torch.as_tensor(means, dtype=torch.float32)
    transposed = locs.T.contiguous()
    bias = -locs.square().sum(-1) / 2

    @torch.inference_mode()
    def score(x: torch.Tensor, variance: float) -> torch.Tensor:
        shares = torch.softmax(torch.addmm(bias, x, transposed, beta=1 / variance, alpha=1 / variance), dim=-1)
        return torch.addmm(x, shares, locs, beta=-1 / variance, alpha=1 / variance)

    return score


def _systematic(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw ancestors from normalised weights; float32 sums that fall short of 1 are scaled."""
    number = len(weights)
    sums = torch.cumsum(weights, 0)
    points = (torch.arange(number) + torch.rand((), generator=generator)) * (sums[-1] / number)
    return torch.searchsorted(sums, points).clamp_(max=number - 1)
