"""The statements of the language: what a model says.

Each is a NumPyro message (`ppl.numpyro_bridge`), bound as an equation of the program that is being staged.
"""

from __future__ import annotations

import jax
import numpyro
import numpyro.distributions as dist

from ppl.numpyro_bridge import Options, as_array, require_distribution
from ppl.staging import check_name, current_staging

__all__ = ["deterministic", "factor", "observe", "sample"]


def sample(name: str, distribution: dist.Distribution, *, proposal: dist.Distribution | None = None):
    """Draw a value from a distribution.

    Args:
        name: the site's name, unique in the program.
        distribution: any NumPyro distribution. Its density counts 0 outside its support.
        proposal: a distribution over the same values to draw from instead. The particle's log-weight gains
            `log distribution(value) - log proposal(value)`, so the program still means `distribution`.

    Returns:
        The value, of shape `distribution.batch_shape + distribution.event_shape`.

    Raises:
        SiteTypeError: `distribution` or `proposal` is not a distribution.
        SiteValueError: `proposal` draws values of another shape.
        MisplacedSite: outside a model, or inside `jax.vmap`, `jax.grad` or control flow of the user's own.
    """
    staging = current_staging(f"ppl.sample({name!r})")
    check_name("ppl.sample", name)
    require_distribution(staging, name, "distribution", distribution)
    if proposal is not None:
        require_distribution(staging, name, "proposal", proposal)
    return numpyro.sample(name, distribution, infer={"ppl": Options(proposal)})


def observe(name: str, distribution: dist.Distribution, value):
    """Condition on a value: the log-density of `value` is added to the particle's log-weight.

    Args:
        name: the site's name, unique in the program.
        distribution: any NumPyro distribution.
        value: an array of the distribution's shape.

    Returns:
        The value, as an array.

    Raises:
        SiteValueError: `value` has another shape than the distribution.
        SiteTypeError: `value` is not numeric, or not whole-numbered where the distribution is discrete.
    """
    staging = current_staging(f"ppl.observe({name!r})")
    check_name("ppl.observe", name)
    require_distribution(staging, name, "distribution", distribution)
    return numpyro.sample(name, distribution, obs=as_array(name, value))


def factor(name: str, log_weight) -> None:
    """Multiply the particle's weight by `exp(log_weight)`, a scalar in nats; -inf kills the particle."""
    current_staging(f"ppl.factor({name!r})")
    check_name("ppl.factor", name)
    numpyro.factor(name, as_array(name, log_weight))


def deterministic(name: str, value):
    """Keep a computed value under a name; returns it."""
    current_staging(f"ppl.deterministic({name!r})")
    check_name("ppl.deterministic", name)
    return numpyro.deterministic(name, jax.tree.map(lambda leaf: as_array(name, leaf), value))
