"""How much a run's estimates vary between runs, told from the genealogy of that run alone.

N particles with final weights W_n, resampled R times; E_n is particle n's Eve, its ancestor at the start. Lines of
different Eves are as good as independent, so that pairs of them stand for pairs of runs:

    Z_hat^2 c sum_{n, m: E_n != E_m} W_n W_m f_n f_m      has the expectation      (Z E[f])^2,
    c = (N / (N - 1))^(R + 1).                                                                                     (1)

With S_k = sum of W_n over the particles of Eve k this gives, for f = 1,

    V = 1 - c (1 - sum_k S_k^2)  =  c sum_k (S_k - 1/N)^2 - ((N / (N - 1))^R - 1),      E[Z_hat^2 V] = Var[Z_hat], (2)
    standard error of log Z_hat = sqrt(V),                                                                         (3)

and for the self-normalised estimate m = sum_n W_n f_n

    standard error of m = sqrt( c sum_k ( sum_{n: E_n = k} W_n (f_n - m) )^2 ).                                    (4)

Without resampling, as in importance sampling, every particle is its own Eve: (2) is the sample variance of the weights
over N times their squared mean, and (4) the usual delta-method error.

**What holds.** (1) and (2) are exact, at any N, where ancestors are drawn independently given the past, that is for
`resampler="multinomial"`: the parents of two slots are then a pair of independent draws, which are different particles
with probability (N - 1)/N of what independent runs would give, whence c. When to resample may be chosen from the past,
as by an ESS threshold, and ancestors may be drawn at a temperature or looking ahead: R is then random, and (1) holds
still. (3) and (4) are consistent as N grows with R fixed.

For all other schemes c is taken with R = 0: the numbers of offspring are treated as if independent between families.
That is not unbiased. It overstates the variance of Z_hat, as what is random about offspring cancels between families
but is counted in each. N V is too large by about 1/6 for each resampling by `systematic`, `stratified` and `ssp`, whose
offspring differ from N W_n by rounding alone, and by at most 1 for `residual` and `killing` (0.5 and 0.6 in the tests'
model). Each resampling that an ESS threshold of one half triggers adds 1 or more to N Var[Z_hat] / Z^2, so that there
the excess is small. In (4) it is of no account, as f is centred.

Where all particles have one Eve the run tells nothing of its own variance: NaN. It is unreliable where few Eves are
left; `lag` then helps expectations of what the last iterations decide: ancestors `lag` iterations ago take the place of
Eves. That leaves out what earlier iterations contribute, a bias that fades with the lag as a model forgets; log Z_hat
never forgets, so that it has no lag.

Sources: Chan and Lai (2013), "A general theory of particle filters in hidden Markov models and some applications";
Lee and Whiteley (2018), "Variance estimation in the particle filter", equation (8); Olsson and Douc (2019),
"Numerically stable online estimation of variance in particle filters". That (1) survives resampling on a trigger
follows from its proof, step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ppl import genealogy
from ppl.posterior import Posterior

__all__ = ["eve_indices", "evidence_variance", "expectation_error"]


def eve_indices(posterior: Posterior, lag: int | None = None) -> Any:
    """Return the index `int32[N]` that each particle's line had at the start, or `lag` iterations before the end.

    Args:
        posterior: of a population.
        lag: a number of iterations of the outermost loops, at least 0; None goes back to the start.

    Raises:
        ValueError: the posterior keeps no genealogy, or `lag` is negative.
    """
    return genealogy.origins(_generations(posterior, lag)[0])


def evidence_variance(posterior: Posterior, *, resampler: str | None = None) -> Any:
    """Return the estimate (2) of the relative variance of Z_hat, a scalar.

    It may be negative for multinomial resampling, as an unbiased estimate of a small number must. Its square root is
    `posterior.log_evidence_error`.

    Args:
        posterior: of a population.
        resampler: the name of the scheme; None reads it from `posterior.algorithm`.

    Raises:
        ValueError: the posterior keeps no genealogy, or its scheme is of the user's own and not declared.
    """
    independent = _independent(posterior, resampler)
    ancestors, count = _generations(posterior, None)
    variance = genealogy.relative_variance(posterior.log_weights, genealogy.origins(ancestors), count, independent)
    return jnp.where(jnp.isnan(posterior.log_evidence), jnp.nan, variance)


def expectation_error(
    posterior: Posterior, fn: Callable[[Any], Any], *, lag: int | None = None, resampler: str | None = None
) -> Any:
    """Return the standard error (4) of `posterior.expectation(fn)`, in the same form.

    Args:
        posterior: of a population.
        fn: a function of one particle's value, returning any pytree.
        lag: how many iterations back the ancestors that count as Eves lie, for functions of what the last
            iterations decide; None goes back to the start.
        resampler: the name of the scheme; None reads it from `posterior.algorithm`.

    Returns:
        For each leaf its standard error; NaN where all living particles have one Eve.

    Raises:
        ValueError: the posterior keeps no genealogy, its scheme is of the user's own and not declared, or `lag` is
            negative.
    """
    independent = _independent(posterior, resampler)
    ancestors, count = _generations(posterior, lag)
    families, weights = genealogy.origins(ancestors), posterior.weights
    factor, _ = genealogy.correction(count, posterior.num_particles, independent)
    several = jnp.sum(genealogy.family_sums(weights, families) > 0) > 1

    def error(values, mean):
        w = weights.reshape((-1,) + (1,) * (values.ndim - 1))
        sums = genealogy.family_sums(jnp.where(w > 0, w * (values - mean), 0.0), families)
        return jnp.where(several, jnp.sqrt(factor * jnp.sum(sums**2, axis=0)), jnp.nan)

    return jax.tree.map(error, jax.vmap(fn)(posterior.value), posterior.expectation(fn))


def _generations(posterior: Posterior, lag: int | None) -> tuple[Any, Any]:
    """Return the ancestors `[T, N]` of the last `lag` iterations, and how often these resampled."""
    diagnostics = posterior.diagnostics
    ancestors = diagnostics.get("ancestors")
    if ancestors is None or ancestors.shape[1:] != (posterior.num_particles,):
        raise ValueError(
            f"`posterior` must be that of a population, with its genealogy; got one by {posterior.algorithm} of "
            f"{posterior.num_particles} draws, whose diagnostics are {sorted(diagnostics)}."
        )
    if lag is not None and lag < 0:
        raise ValueError(f"`lag` must be at least 0 iterations, or None for all of them; got {lag}.")
    start = 0 if lag is None else max(len(ancestors) - lag, 0)
    return ancestors[start:], jnp.sum(diagnostics["resampled"][start:])


def _independent(posterior: Posterior, resampler: str | None) -> bool:
    if resampler is not None:
        return resampler == "multinomial"
    if posterior.guarantee == "assumed":
        raise ValueError(
            f'`posterior` by {posterior.algorithm} is "assumed": nothing is known of how its ancestors were drawn. '
            'Declare the scheme, ppl.inference.resampler(fn, guarantee="unbiased"), or name the one that it is like, '
            "`resampler='systematic'`."
        )
    return posterior.independent_ancestors
