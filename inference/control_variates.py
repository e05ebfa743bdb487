"""Many expectations from one weighted sample, each with its standard error, made sharper by control variates.

Draws x_n ~ q, independent, with weights w_n = gamma(x_n) / q(x_n), gamma = Z p; w_bar is their mean. Controls are
functions whose mean is known: g with E_q[g] = 0, as what the proposal's moments or scores leave of their means; h with
E_p[h] = 0, as the posterior's score, which are weighed: g = (w / w_bar) h.

    m_hat     = sum_n w_n f(x_n) / sum_n w_n,      e_n = (w_n / w_bar) (f(x_n) - m_hat)                            (1)
    (a, beta) = argmin sum_n (e_n - a - beta . g_n)^2                                                              (2)
    m         = m_hat + a  =  m_hat - beta . mean(g)                                                               (3)
    error^2   = sum_n (e_n - a - beta . g_n)^2 / (N (N - 1 - K)),      K controls                                  (4)

The mean of e is 0 and (2) writes a = -beta . mean(g): what the controls' means, which should be 0, tell about that
of e is taken out. Dividing by w_bar is itself a control variate, w / Z - 1 with the coefficient m. Where Z is known,
it enters as one, with the coefficient fitted:

    e_n = (w_n / Z) (f(x_n) - m_hat),      g_n = (w_n / Z - 1, ...),      m = m_hat + a                            (5)

(1) to (3) are gone through twice, with the m of the first pass for m_hat in the second. The estimates are consistent,
with a bias of order 1/N from (1) and from fitting beta on the same draws; their variance is that of the residuals in
(4), never above that of (1) as N grows.

Sources: Hesterberg (1995), "Weighted average importance sampling and defensive mixture distributions"; Owen and Zhou
(2000), "Safe and effective importance sampling"; for many expectations of one sample, Demange-Chryst, Bachoc and Morio
(2022), "Efficient estimation of multiple expectations with the same sample by adaptive importance sampling and control
variates", arXiv 2212.00568, whose adaptation of q is `ppl.inference.adaptive_importance`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppl.posterior import Posterior
from ppl.runners import is_traced

__all__ = ["Expectations", "expectations", "regress"]

_PASSES = 2  # the second is centred at what the first found


class Expectations(NamedTuple):
    """Estimates of several expectations, each a pytree of the form that the functions return.

    Attributes:
        mean: (3).
        standard_error: (4).
        plain_mean: (1), without controls.
        plain_error: its standard error.
    """

    mean: Any
    standard_error: Any
    plain_mean: Any
    plain_error: Any

    @property
    def variance_ratio(self) -> Any:
        """How many times more draws the plain estimates would need for the same errors, as told by them."""
        return jax.tree.map(lambda plain, ours: (plain / ours) ** 2, self.plain_error, self.standard_error)


def expectations(
    posterior: Posterior,
    functions: Callable[[Any], Any],
    controls: Callable[[Any], Any] | None = None,
    *,
    posterior_controls: Callable[[Any], Any] | None = None,
    log_evidence: Any = None,
) -> Expectations:
    """Estimate the expectations of functions of one particle's value.

    Args:
        posterior: of `ImportanceSampling`, `AdaptiveImportanceSampling`, or an SMC that never resampled. Controls that
            the algorithm provides, in `diagnostics["controls"]`, are used too.
        functions: of one particle's value, returning a pytree of arrays.
        controls: of one particle's value, returning a pytree of arrays with mean 0 under what the draws are drawn from:
            for `ImportanceSampling` the program without its observations and factors, with its proposals.
        posterior_controls: the same with mean 0 under the posterior.
        log_evidence: log Z, where it is known: (5) is used.

    Raises:
        ValueError: the draws are not independent, or not more than the controls.
    """
    _check_independent(posterior)
    values = jax.vmap(functions)(posterior.value)
    leaves, tree = jax.tree.flatten(values)
    flat = _columns(leaves, posterior.num_particles)
    given = [posterior.diagnostics.get("controls"), controls and jax.vmap(controls)(posterior.value)]
    columns = _columns(jax.tree.leaves(given), posterior.num_particles)
    under_posterior = jax.tree.leaves(posterior_controls and jax.vmap(posterior_controls)(posterior.value))
    weighed = _columns(under_posterior, posterior.num_particles)
    num_controls = columns.shape[1] + weighed.shape[1] + (log_evidence is not None)
    if posterior.num_particles < num_controls + 2:
        raise ValueError(
            f"`posterior` has {posterior.num_particles} draws, too few to fit {num_controls} controls: at least "
            f"{num_controls + 2} are needed, and errors can be relied on from about ten times as many on."
        )
    scale = None if log_evidence is None else jnp.exp(posterior.log_evidence - log_evidence)
    mean, error, plain, plain_error = _estimates(posterior.weights, flat, columns, weighed, scale)
    split = lambda row: jax.tree.unflatten(tree, _split(row, leaves))  # noqa: E731
    return Expectations(split(mean), split(error), split(plain), split(plain_error))


@jax.jit
def _estimates(weights, values, controls, posterior_controls, scale) -> tuple[Any, Any, Any, Any]:
    """Return (3), (4), (1) and its error, `[J]` each; `scale` is w_bar / Z where Z is known, for (5), else None."""
    ratio = len(weights) * weights[:, None]
    living = ratio > 0
    controls = jnp.concatenate([controls, jnp.where(living, ratio * posterior_controls, 0.0)], axis=1)
    plain = jnp.sum(jnp.where(living, ratio * values, 0.0), axis=0) / len(weights)
    _, plain_error = regress(jnp.where(living, ratio * (values - plain), 0.0), controls[:, :0])
    if scale is not None:
        ratio = scale * ratio
        controls = jnp.concatenate([ratio - 1, controls], axis=1)
    mean = plain
    for _ in range(_PASSES):
        shift, error = regress(jnp.where(living, ratio * (values - mean), 0.0), controls)
        mean = mean + shift
    return mean, error, plain, plain_error


def regress(spread, controls) -> tuple[Any, Any]:
    """Return the intercepts a of (2) and the standard errors (4), `[J]` each.

    Args:
        spread: e, `[N, J]`.
        controls: g, `[N, K]`; columns that depend on others do no harm.
    """
    num, num_controls = controls.shape
    centre, middle = controls.mean(axis=0), spread.mean(axis=0)
    g, e = controls - centre, spread - middle
    if num_controls:
        size = jnp.sqrt(jnp.sum(g**2, axis=0))
        unit = jnp.where(size > 0, size, 1.0)
        left, singular, right = jnp.linalg.svd(g / unit, full_matrices=False)
        kept = singular > 1e-4 * singular[0]
        fitted = right.T @ (jnp.where(kept, 1 / jnp.where(kept, singular, 1.0), 0.0)[:, None] * (left.T @ e))
        beta = fitted / unit[:, None]
        middle, e = middle - centre @ beta, e - g @ beta
    return middle, jnp.sqrt(jnp.sum(e**2, axis=0) / (num * (num - 1 - num_controls)))


def _columns(leaves: list[Any], num: int) -> Any:
    """Return arrays `[N, ...]` side by side, `[N, K]`."""
    flat = [jnp.asarray(leaf, jnp.float32).reshape(num, -1) for leaf in leaves]
    return jnp.concatenate([jnp.zeros((num, 0)), *flat], axis=1)


def _split(row, leaves: list[Any]) -> list[Any]:
    """Return a row `[K]` as one entry of each of the arrays `[N, ...]` that `_columns` put side by side."""
    parts, place = [], 0
    for leaf in leaves:
        size = int(jnp.size(leaf[0]))
        parts.append(row[place : place + size].reshape(leaf.shape[1:]))
        place += size
    return parts


def _check_independent(posterior: Posterior) -> None:
    resampled = posterior.diagnostics.get("resampled", False)
    moved = posterior.drawn_again or (not is_traced(resampled) and bool(jnp.any(resampled)))
    if posterior.num_chains or moved or posterior.guarantee == "heuristic":
        raise ValueError(
            "`posterior` must hold independent weighted draws, as of ImportanceSampling(..), "
            f"AdaptiveImportanceSampling(..) or SMC(.., ess_threshold=0.0); got one by {posterior.algorithm}"
            f"{', resampled' if moved else ''}. For errors after resampling see ppl.inference.variance."
        )
