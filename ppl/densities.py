"""The density of a distribution at a value, as a program's weights need it.

A NumPyro distribution gives a number for any value and any parameters. A weight needs more, entry by entry of the
distribution's batch:

    0           (the log of 1)  where an observation is masked, whatever value or parameters stand there            (1)
    NaN         where a parameter lies outside its constraint, or the value is NaN: an error, not an event          (2)
    -inf        where the value lies outside the support (law L1), or no value is possible: all logits are -inf     (3)
    log p(x)    elsewhere

`numpyro.distributions` builds distributions out of others: `mask`, `expand`, `to_event`, transforms, mixtures. The
rules hold for the parts, wherever they stand, so this module walks through all of them.

A mask takes entries out of an observation. A *latent* site keeps the density of its masked entries: they are drawn like
the others, and padding would wander freely without their density; see `latent`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

__all__ = ["innermost", "is_possible", "latent", "log_density", "parameters_valid"]

_SMALL = 65_536  # parameters that staging knows are checked at once, up to this size; larger ones in the run


def log_density(distribution: dist.Distribution, value: Any, *, known_inside: bool = False) -> Any:
    """Return the log-density of a value, summed over the batch: a scalar, by the rules (1) to (3).

    Args:
        distribution: any NumPyro distribution.
        value: an array of shape `batch_shape + event_shape`.
        known_inside: the value was drawn from a distribution of the same support. Then (3) holds at rounding errors
            only, and a derivative need not mind it.
    """
    verdict = _judge(distribution, jax.lax.stop_gradient(value) if known_inside else value)
    entries = distribution.log_prob(value)
    if verdict.inside is not None:
        entries = jnp.where(verdict.inside, entries, -jnp.inf)
    if verdict.sound is not None:
        entries = jnp.where(verdict.sound, entries, jnp.nan)
    if verdict.counts is not None:
        entries = jnp.where(verdict.counts, entries, 0.0)
    return jnp.sum(jnp.asarray(entries))


def parameters_valid(distribution: dist.Distribution) -> Any:
    """Return whether all parameters satisfy their constraints, a bool scalar; None where staging knows that they do."""
    valid = _valid(distribution)
    return None if valid is None else jnp.all(valid)


def is_possible(distribution: dist.Distribution) -> Any:
    """Return whether some value is possible, a bool scalar: not where all logits are -inf. None where that is known."""
    possible = _possible(innermost(distribution))
    return None if possible is None else jnp.all(possible)


def latent(distribution: dist.Distribution) -> dist.Distribution:
    """Return the distribution of a latent site: without the masks, at whatever depth they stand."""
    while isinstance(distribution, dist.MaskedDistribution):
        distribution = distribution.base_dist
    parts = {name: part for name, part in vars(distribution).items() if isinstance(part, dist.Distribution)}
    unmasked = {name: latent(part) for name, part in parts.items()}
    if all(unmasked[name] is part for name, part in parts.items()):
        return distribution
    changed = copy.copy(distribution)
    for name, part in unmasked.items():
        setattr(changed, name, part)
    return changed


def innermost(distribution: dist.Distribution) -> dist.Distribution:
    """Return what `expand`, `mask` and `to_event` were applied to."""
    while isinstance(distribution, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        distribution = distribution.base_dist
    return distribution


# One distribution after another --------------------------------------------------------------------------------------


class _Verdict(NamedTuple):
    """Bools that broadcast to the batch shape; None stands for True everywhere.

    Attributes:
        inside: the value lies in the support.
        sound: neither the value nor a parameter is wrong.
        counts: the entry is not masked.
    """

    inside: Any
    sound: Any
    counts: Any


def _judge(distribution: dist.Distribution, value: Any) -> _Verdict:
    if isinstance(distribution, dist.MaskedDistribution):
        inside, sound, counts = _judge(distribution.base_dist, value)
        mask = distribution._mask
        return _Verdict(inside, sound, counts if mask is True else _both(counts, jnp.asarray(mask)))
    if isinstance(distribution, dist.ExpandedDistribution):
        return _judge(distribution.base_dist, value)
    if isinstance(distribution, dist.Independent):
        inside, sound, counts = _judge(distribution.base_dist, value)
        if counts is not None:  # what is masked inside an event is neither outside of it nor unsound
            inside, sound = (None if flag is None else flag | ~counts for flag in (inside, sound))
        base = distribution.base_dist.batch_shape
        inside, sound = (_all_but(flag, base, distribution.batch_shape) for flag in (inside, sound))
        return _Verdict(inside, sound, None)
    batch = distribution.batch_shape
    inside, sound = _both(_inside(distribution, value), _possible(distribution)), _valid(distribution)
    if isinstance(distribution, dist.TransformedDistribution) and not isinstance(distribution, dist.FoldedDistribution):
        inside = _both(inside, _base_inside(distribution, value))
    if jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        event = tuple(range(jnp.ndim(value) - len(distribution.event_shape), jnp.ndim(value)))
        sound = _both(sound, ~jnp.any(jnp.isnan(value), axis=event))
    # Under `expand` the value has the batch of the expanded distribution: flags may have more axes than `batch`.
    return _Verdict(inside, sound if sound is None or jnp.ndim(sound) else jnp.broadcast_to(sound, batch), None)


def _both(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a & b


def _all_but(flags: Any, base_shape: tuple[int, ...], batch_shape: tuple[int, ...]) -> Any:
    """Return whether flags hold on all axes of `base_shape` beyond those of `batch_shape`."""
    if flags is None:
        return None
    flags = jnp.broadcast_to(flags, jnp.broadcast_shapes(jnp.shape(flags), base_shape))
    taken = len(base_shape) - len(batch_shape)
    return jnp.all(flags, axis=tuple(range(jnp.ndim(flags) - taken, jnp.ndim(flags)))) if taken else flags


def _support(distribution: dist.Distribution) -> Any:
    """Return the support, or None where every number lies in it or nothing is said of it."""
    try:
        support = distribution.support
    except NotImplementedError:
        return None
    base = support
    while hasattr(base, "base_constraint"):
        base = base.base_constraint
    everything = support is None or base in (constraints.real, constraints.real_vector)
    return None if everything or isinstance(base, type(constraints.dependent)) else support


def _inside(distribution: dist.Distribution, value: Any) -> Any:
    support = _support(distribution)
    if support is None:
        return None
    inside = jnp.asarray(support(value))
    extra = jnp.ndim(inside) - (jnp.ndim(value) - len(distribution.event_shape))
    return jnp.all(inside, axis=tuple(range(jnp.ndim(inside) - extra, jnp.ndim(inside)))) if extra > 0 else inside


def _base_inside(distribution: dist.TransformedDistribution, value: Any) -> Any:
    """Return whether what a value was transformed from lies in the support of the base: codomains may be too wide."""
    base = distribution.base_dist
    if _support(base) is None and not isinstance(base, dist.TransformedDistribution):
        return None
    if all(_covers(transform) for transform in distribution.transforms):
        return None
    for transform in reversed(distribution.transforms):
        value = transform._inverse(value)
    inside = _judge(base, value).inside
    if inside is None:
        return None
    extra = jnp.ndim(inside) - (jnp.ndim(value) - len(base.event_shape)) + len(base.batch_shape)
    extra -= len(distribution.batch_shape)
    return jnp.all(inside, axis=tuple(range(jnp.ndim(inside) - extra, jnp.ndim(inside)))) if extra > 0 else inside


def _covers(transform: Any) -> bool:
    """Whether a transform's codomain is the image of its domain, which it states exactly: none of an affine map."""
    return not isinstance(transform, dist.transforms.AffineTransform | dist.transforms.ComposeTransform)


# Parameters ----------------------------------------------------------------------------------------------------------


def _valid(distribution: dist.Distribution) -> Any:
    """Return where the parameters are valid, bools that broadcast to the batch shape; None where that is known."""
    own = getattr(distribution, "parameters_valid", None)
    if own is not None:  # a distribution that knows a cheaper test
        return own()
    valid, batch = None, distribution.batch_shape
    for name, constraint in distribution.arg_constraints.items():
        parameter = vars(distribution).get(name)  # those that are derived from others are not computed for this
        if parameter is not None:
            valid = _both(valid, _satisfied(name, constraint, parameter))
    valid = _both(valid, _ordered(distribution))
    if isinstance(distribution, dist.TransformedDistribution):
        for transform in distribution.transforms:
            if isinstance(transform, dist.transforms.AffineTransform):
                scale = transform.scale
                stretches = _checked(lambda x: (x != 0) & (abs(x) < np.inf), scale)
                valid = _both(valid, None if stretches is None else jnp.all(stretches))
    if valid is not None and not _broadcasts(jnp.shape(valid), batch):
        valid = jnp.all(valid)
    for part in _parts(distribution):
        inner = _valid(part)
        if inner is None:
            continue
        if isinstance(distribution, dist.MaskedDistribution) and distribution._mask is not True:
            inner = inner | ~jnp.asarray(distribution._mask)
        if not isinstance(distribution, dist.ExpandedDistribution):
            # The parts of a distribution have its batch axes first, then those that it sums or transforms.
            inner = jnp.broadcast_to(inner, jnp.broadcast_shapes(jnp.shape(inner), part.batch_shape))
            extra = tuple(range(len(batch), jnp.ndim(inner)))
            inner = jnp.all(inner, axis=extra) if extra else inner
        valid = _both(valid, inner if _broadcasts(jnp.shape(inner), batch) else jnp.all(inner))
    return valid


def _possible(distribution: dist.Distribution) -> Any:
    logits = vars(distribution).get("logits")
    if logits is None or not isinstance(distribution, dist.CategoricalLogits | dist.MultinomialLogits):
        return None
    return _checked(lambda x: x.max(-1) > -np.inf, logits)


def _parts(distribution: dist.Distribution) -> Iterator[dist.Distribution]:
    """Yield the distributions that one is built of."""
    for part in vars(distribution).values():
        for item in part if isinstance(part, list | tuple) else [part]:
            if isinstance(item, dist.Distribution):
                yield item


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _checked(test: Any, *parameters: Any) -> Any:
    """Return a test of parameters; None where staging knows them and they pass.

    The gradient of a parameter is none of its test's business: `stop_gradient` says so to whoever asks what a
    derivative meets.
    """
    if all(_is_known(parameter) for parameter in parameters):
        passed = np.asarray(test(*map(np.asarray, parameters)))
        return None if passed.all() else jnp.asarray(passed)
    return test(*(jax.lax.stop_gradient(jnp.asarray(parameter)) for parameter in parameters))


def _is_known(parameter: Any) -> bool:
    if isinstance(parameter, bool | int | float | np.ndarray | np.generic):
        return True
    return isinstance(parameter, jax.Array) and not isinstance(parameter, jax.core.Tracer) and parameter.size <= _SMALL


def _satisfied(name: str, constraint: Any, parameter: Any) -> Any:
    """Return whether a parameter satisfies its constraint, over the constraint's event axes; None where known to."""
    base = constraint
    while hasattr(base, "base_constraint"):
        base = base.base_constraint
    if isinstance(base, type(constraints.dependent) | type(constraints.boolean)):
        return None
    numeric = isinstance(parameter, bool | int | float | np.ndarray | np.generic | jax.Array)
    if not numeric or jnp.issubdtype(jnp.result_type(parameter), jnp.complexfloating):
        return None
    if name.endswith("logits"):  # -inf is a probability of 0
        if constraint.event_dim == 0:
            return _checked(lambda x: x == x, parameter)
        return _checked(lambda x: x.max(-1) < np.inf, parameter)  # the largest is NaN where any is
    if name in ("low", "high"):
        return _checked(lambda x: x == x, parameter)
    if base is constraints.simplex:
        return _checked(_is_simplex, parameter)
    if isinstance(base, type(constraints.corr_cholesky) | type(constraints.positive_definite)) or base in (
        constraints.corr_matrix,
        constraints.positive_semidefinite,
    ):  # to be sure would take a decomposition; what is not definite has none, and is NaN further on
        return _checked(lambda x: _is_finite(x).all((-2, -1)), parameter)
    return _checked(constraint, parameter)


def _is_finite(x: Any) -> Any:
    return np.isfinite(x) if isinstance(x, np.ndarray | np.generic) else jnp.isfinite(x)


def _is_simplex(probs: Any) -> Any:
    """Return whether probabilities are at least 0 and sum to 1 up to the rounding of as many numbers."""
    dtype = probs.dtype if jnp.issubdtype(probs.dtype, jnp.floating) else np.dtype(np.float32)
    rounding = 8 * float(jnp.finfo(dtype).eps) * np.sqrt(probs.shape[-1])
    return (probs >= 0).all(-1) & (abs(probs.sum(-1) - 1) <= rounding)


def _ordered(distribution: dist.Distribution) -> Any:
    """Return whether an interval's bounds are in order."""
    bounds = vars(distribution).get("low"), vars(distribution).get("high")
    if any(bound is None for bound in bounds):
        return None
    if isinstance(distribution, dist.DiscreteUniform):
        return _checked(lambda low, high: low <= high, *bounds)
    return _checked(lambda low, high: low < high, *bounds)
