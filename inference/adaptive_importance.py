"""Adaptive importance sampling: a Gaussian proposal fitted to what several functions need, then a fresh sample.

For functions f_1..f_J of one posterior p the proposal that serves all of them, counted in units of their standard
deviations sigma_j under p, is

    q*(z)  proportional to  p(z) sqrt( sum_j (f_j(z) - m_j)^2 / sigma_j^2 ),                                       (1)

for it minimises the sum of the variances of self-normalised estimates. It holds what is to be estimated, so that q, a
Gaussian on the continuous sites on R^d, is fitted in rounds: of each round's draws, weighted by p / q times the root in
(1), mean and covariance make the next q, mixed with the last one's by lambda = ESS / (ESS + d + 1), ESS of these
weights, so that few good draws move it little. Round 0 draws from the program itself.

A round of B draws of the n that are left costs the final sample a share B / n. With v the variance for one draw, after
control variates, summed in units of sigma_j^2, rounds go on while

    v_r / v_(r-1)  <  1 - B / n,                                                                                   (2)

that is, while another gain like the last one would pay, and at most half of the budget is spent on them. Then
n fresh draws are made from q and weighted by gamma / q. Given q they are plain importance sampling: E[Z_hat] = Z and
law L2 holds. The draws of the rounds are thrown away, as they decided about q. Self-normalised estimates, such
as `posterior.expectation`, and `ppl.inference.control_variates.expectations`, which makes use of

    u = L^-1 (z - mu),      E_q[u_i] = 0,      E_q[u_i u_j - 1{i = j}] = 0,      q = N(mu, L L^T),                 (3)

are consistent, with a bias of order 1/n. Weights are bounded only where q's tails are no lighter than p's: for
posteriors with heavy tails on R^d errors are not to be trusted, which a small `posterior.ess` shows.

Source: after Demange-Chryst, Bachoc and Morio (2022), arXiv 2212.00568: one shared proposal adapted for several
expectations, control variates, a stopping rule against the budget that is left, a fresh last sample. (1) is the sum
over j of the optimum for one ratio (Owen, Monte Carlo theory, methods and examples, 2013, section 9.2); (2) and the fit
are ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from ppl import runners
from ppl.guarantees import Promising, promised
from ppl.inference.control_variates import regress
from ppl.inference.population import OnlyWeigh
from ppl.inference.unconstrained import UnconstrainedSites
from ppl.inference.validation import refuse_state, require_count
from ppl.posterior import Posterior, population_posterior
from ppl.program import Staged, as_program, kept_sites
from ppl.trace_space import TraceSpace

__all__ = ["AdaptiveImportanceSampling", "GaussianProposal", "fit_proposal"]

_AT_ONCE = 1024  # traces whose density and value are computed at once


class GaussianProposal(NamedTuple):
    """N(mean, scale_tril scale_tril^T) on R^d: `mean` is `[d]`, `scale_tril` lower triangular `[d, d]`."""

    mean: Any
    scale_tril: Any

    def sample(self, key, num: int) -> Any:
        """Return draws `[num, d]`."""
        noise = jax.random.normal(key, (num, self.mean.shape[0]))
        return self.mean + noise @ self.scale_tril.T

    def standardise(self, z) -> Any:
        """Return u of (3) for z `[N, d]`."""
        return solve_triangular(self.scale_tril, (z - self.mean).T, lower=True).T

    def log_density(self, z) -> Any:
        """Return log q of z `[N, d]`, in nats, `[N]`."""
        log_det = jnp.sum(jnp.log(jnp.diagonal(self.scale_tril)))
        return jnp.sum(jax.scipy.stats.norm.logpdf(self.standardise(z)), axis=1) - log_det

    def controls(self, z, degree: int) -> Any:
        """Return (3) up to a degree of 0, 1 or 2 for z `[N, d]`: `[N, K]`."""
        u = self.standardise(z)
        rows, columns = jnp.triu_indices(u.shape[1])
        second = u[:, rows] * u[:, columns] - (rows == columns)
        return jnp.concatenate([u[:, :0], u, second][: degree + 1], axis=1)


def fit_proposal(z, log_weights, values, last: GaussianProposal) -> GaussianProposal:
    """Return the Gaussian fitted to (1), mixed with the last one.

    Args:
        z: draws, `[N, d]`.
        log_weights: log p / q, up to a constant, `[N]`; NaN and +inf count as -inf.
        values: of the functions, `[N, J]`.
        last: the proposal to mix with.
    """
    weights, means, scales = _posterior_moments(log_weights, values)
    reach = jnp.sqrt(1e-6 + jnp.sum(jnp.where(scales > 0, (values - means) / scales, 0.0) ** 2, axis=1))
    chosen = jnp.where(weights > 0, weights * reach, 0.0)
    chosen = chosen / jnp.sum(chosen)
    ess = 1 / jnp.sum(chosen**2)
    share = ess / (ess + z.shape[1] + 1)
    mean = chosen @ z
    covariance = (chosen[:, None] * (z - mean)).T @ (z - mean)
    gap = mean - last.mean
    mixed = (
        share * covariance
        + (1 - share) * last.scale_tril @ last.scale_tril.T
        + share * (1 - share) * jnp.outer(gap, gap)
    )
    return _gaussian(last.mean + share * gap, mixed)


@dataclasses.dataclass(frozen=True)
class AdaptiveImportanceSampling(Promising):
    """Importance sampling of continuous sites from a Gaussian that is fitted to the functions of interest.

    Attributes:
        num_samples: how many traces are drawn in all, rounds included. The posterior has those of the last sample, at
            least half of them.
        functions: what is to be estimated: a function of one particle's value, returning a pytree of arrays.
        num_round: how many of them a round draws; None is a twentieth, at least 32.
        control_degree: the degree of the controls (3): 0 for none, 1, or 2, of which there are d (d + 3) / 2.
    """

    num_samples: int
    functions: Callable[[Any], Any]
    num_round: int | None = None
    control_degree: int = 2
    guarantee: ClassVar[str] = "unbiased"

    def __post_init__(self):
        require_count("num_samples", self.num_samples)
        if not callable(self.functions):
            raise TypeError(f"`functions` must be a function of one particle's value, got {self.functions!r}.")
        if self.num_round is not None:
            require_count("num_round", self.num_round)
        if self.control_degree not in (0, 1, 2):
            raise ValueError(f"`control_degree` must be 0, 1 or 2, got {self.control_degree!r}.")
        if self._round > self.num_samples // 2:
            raise ValueError(
                f"`num_samples` must be at least twice the {self._round} draws of a round, got {self.num_samples}."
            )

    def __repr__(self) -> str:
        return f"AdaptiveImportanceSampling(num_samples={self.num_samples})"

    @property
    def _round(self) -> int:
        return max(self.num_samples // 20, 32) if self.num_round is None else self.num_round

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments.

        Raises:
            TypeError: it is called under a `jit`: how many rounds there are is decided on the way.
            SiteTypeError: a free site is not continuous, or there is none.
        """
        refuse_state(self, state)
        program = as_program(program)
        staged = program.stage(keep_rules=False)
        if runners.is_traced((staged.inputs, staged.given, key)):
            raise TypeError(
                f"{self!r} decides on the way how many rounds it makes, which a jit cannot. Call it outside."
            )
        keep = kept_sites(staged, keep)
        start_key, round_key, final_key = jax.random.split(key, 3)
        proposal = runners.run(staged, (self, "start"), self._start, start_key)
        left, before, gain = self.num_samples - self._round, math.inf, 0.0
        num_rounds = 1
        while gain < 1 - self._round / left and left - self._round >= self.num_samples / 2:  # (2)
            fold = jax.random.fold_in(round_key, num_rounds)
            proposal, variance = runners.run(staged, (self, "round"), self._adapt, fold, proposal)
            left, num_rounds = left - self._round, num_rounds + 1
            gain, before = float(variance) / before, float(variance)
        run = self._final(left, keep)
        posterior = runners.run(staged, (self, "final", left, keep), run, final_key, proposal)
        return dataclasses.replace(
            posterior, decode=program.decode, diagnostics=posterior.diagnostics | {"num_rounds": num_rounds}
        )

    def _start(self, staged: Staged, inputs, given, key) -> GaussianProposal:
        """Round 0: draws from the program."""
        target = _Target(self, TraceSpace(staged, inputs, given))
        z, log_weights = target.from_program(key, self._round)
        values = target.evaluate(z, self.functions)[1]
        centred = z - z.mean(axis=0)
        prior = _gaussian(z.mean(axis=0), centred.T @ centred / self._round)
        return fit_proposal(z, log_weights, values, prior)

    def _adapt(self, staged: Staged, inputs, given, key, proposal: GaussianProposal):
        """One round: returns the next proposal, and v of the one that drew."""
        target = _Target(self, TraceSpace(staged, inputs, given))
        z = proposal.sample(key, self._round)
        log_density, values = target.evaluate(z, self.functions)
        log_weights = log_density - proposal.log_density(z)
        weights, means, scales = _posterior_moments(log_weights, values)
        spread = self._round * jnp.where(weights[:, None] > 0, weights[:, None] * (values - means), 0.0)
        controls = proposal.controls(z, self.control_degree)
        if controls.shape[1] > self._round // 2:  # too few draws to tell what they will be worth
            controls = controls[:, :0]
        _, error = regress(spread, controls)
        variance = self._round * jnp.sum(jnp.where(scales > 0, error / scales, 0.0) ** 2)
        return fit_proposal(z, log_weights, values, proposal), variance

    def _final(self, num: int, keep: frozenset[str]):
        def run(staged: Staged, inputs, given, key, proposal: GaussianProposal) -> Posterior:
            target = _Target(self, TraceSpace(staged, inputs, given))
            z = proposal.sample(key, num)
            log_density, (value, sites, present) = target.evaluate(z, None, keep)
            posterior = population_posterior(
                log_density - proposal.log_density(z),
                jnp.zeros(()),
                [],
                value=value,
                sites=sites,
                present=present,
                guarantee=promised(staged, self),
                algorithm=repr(self),
            )
            extra = {"controls": proposal.controls(z, self.control_degree), "proposal": proposal}
            return dataclasses.replace(posterior, diagnostics=posterior.diagnostics | extra)

        return run


class _Target:
    """gamma of a program on R^d. Coordinates of absent entries, which no density is about, get a standard normal."""

    def __init__(self, algorithm: AdaptiveImportanceSampling, space: TraceSpace):
        self.space, self.sites = space, UnconstrainedSites(algorithm, space, tuple(space.sites))
        self.zeros = {name: jnp.zeros(t.shape, t.dtype) for name, t in space.site_types.items()}
        self.present = self.sites.present(self.zeros)
        self.mask = self.sites.mask(self.present)

    def from_program(self, key, num: int) -> tuple[Any, Any]:
        """Return draws z `[N, d]` of the program's laws, or proposals, and their log-weights `[N]`."""
        run_key, absent_key = jax.random.split(key)
        result = self.space.population(run_key, num, OnlyWeigh())
        traces = {
            name: lane.array if lane.random else jnp.broadcast_to(lane.array, (num, *lane.array.shape))
            for name, lane in result.sites.items()
        }
        z = jax.vmap(lambda trace: self.sites.vector(trace, self.mask))(traces)
        if self.mask is not None:
            z = jnp.where(self.mask, z, jax.random.normal(absent_key, z.shape))
        return z, result.log_weights

    def evaluate(self, z, functions: Callable | None, keep: frozenset[str] = frozenset()) -> tuple[Any, Any]:
        """Return log gamma `[N]` of z `[N, d]`, and the functions' values `[N, J]`, or without any what runs give."""
        potential = self.sites.potential(self.zeros)

        def one(z):
            log_density = -potential(z)
            if self.mask is not None:
                log_density += jnp.sum(jnp.where(self.mask, 0.0, jax.scipy.stats.norm.logpdf(z)))
            outcome = self.space.outcome(self.sites.replaced(z, self.zeros, self.present), keep)
            if functions is None:
                return log_density, outcome
            leaves = jax.tree.leaves(functions(outcome[0]))
            return log_density, jnp.concatenate([jnp.ravel(jnp.asarray(leaf, jnp.float32)) for leaf in leaves])

        return jax.lax.map(one, z, batch_size=min(_AT_ONCE, len(z)))


def _posterior_moments(log_weights, values) -> tuple[Any, Any, Any]:
    """Return normalised weights `[N]`, and the functions' means and standard deviations `[J]` under them."""
    finite = jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf)
    living = jnp.any(finite > -jnp.inf)
    weights = jax.nn.softmax(jnp.where(living, finite, 0.0))
    values = jnp.where(weights[:, None] > 0, values, 0.0)
    means = weights @ values
    return weights, means, jnp.sqrt(weights @ (values - means) ** 2)


def _gaussian(mean, covariance) -> GaussianProposal:
    """Return the Gaussian, its variances kept away from 0 by what float32 can tell of them."""
    variances = jnp.diagonal(covariance)
    floor = 1e-6 * jnp.maximum(variances, jnp.max(variances) * 1e-6) + 1e-30
    return GaussianProposal(mean, jnp.linalg.cholesky(covariance + jnp.diag(floor)))
