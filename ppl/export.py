"""A posterior as ArviZ reads it: `InferenceData` in ArviZ 0.x, an xarray `DataTree` in 1.x.

| group | variables | dimensions |
|---|---|---|
| `posterior` | the kept sites, deterministic ones too; without any, the returned value | chain, draw, times, entries |
| `sample_stats` | `log_weight`; of chains `acceptance`; `present.<site>` where some are absent | chain, draw, ... |
| `population` | `ess`, `resampled`, `log_evidence`, `ancestors` of each iteration, of populations | step, draw |
| `observed_data` | what the caller hands in | entries |

A population is one chain of its N particles, and its draws are weighted: ArviZ's summaries do not know of `log_weight`
(normalised, nats). Draw with `posterior.resample` before what counts every draw the same. The time axes of loops are
named `time`, or `time_<length>` where there are several lengths, those of inner loops `inner_time`; names of sites have
`.` for `/`, which xarray keeps for groups. Absent entries of floating-point sites are NaN; truth values are 0 and 1,
which ArviZ can summarise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl.posterior import Posterior

__all__ = ["to_arviz"]

_STEPS = ("ess", "resampled", "log_evidence", "temperature")


def to_arviz(posterior: Posterior, observed: Mapping[str, Any] | None = None) -> Any:
    """Return a posterior for ArviZ.

    Args:
        posterior: of one run, not traced.
        observed: data by name, for the group `observed_data`.

    Returns:
        `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (1.x). Attributes of it and of its group `posterior`:
        `guarantee`, `algorithm`, `log_evidence`, `log_evidence_error`, `inference_library`.

    Raises:
        ImportError: ArviZ is not installed.
        ValueError: the posterior holds several runs, as a `vmap` gives.
    """
    try:
        import arviz
        import xarray
    except ImportError as error:
        raise ImportError('to_arviz needs ArviZ: pip install "genppl[arviz]".') from error
    if np.ndim(posterior.log_weights) != 1:
        raise ValueError(
            f"`posterior` must be of one run, got log-weights of shape {np.shape(posterior.log_weights)}; "
            "take one by jax.tree.map(lambda a: a[i], posterior)."
        )
    chains = max(posterior.num_chains, 1)
    attributes = {
        "guarantee": posterior.guarantee,
        "algorithm": posterior.algorithm,
        "log_evidence": float(posterior.log_evidence),
        "log_evidence_error": float(posterior.log_evidence_error),
        "inference_library": "genppl",
    }
    coordinates = {"chain": np.arange(chains), "draw": np.arange(posterior.num_particles // chains)}
    groups = {
        "posterior": xarray.Dataset(_draws(posterior, chains), coordinates, attributes),
        "sample_stats": xarray.Dataset(_statistics(posterior, chains), coordinates),
    }
    if steps := _steps(posterior):
        groups["population"] = xarray.Dataset(steps)
    if observed:
        data = {_name(name): _entries(_name(name), np.asarray(values), 0) for name, values in observed.items()}
        groups["observed_data"] = xarray.Dataset(data)
    if arviz.__version__.startswith("0."):
        return arviz.InferenceData(attrs=attributes, **groups)
    tree = xarray.DataTree.from_dict(groups)
    tree.attrs.update(attributes)
    return tree


def _draws(posterior: Posterior, chains: int) -> dict[str, Any]:
    """Return the variables of the group `posterior`."""
    if not posterior.sites:
        leaves = jax.tree_util.tree_flatten_with_path(posterior.value)[0]
        named = {jax.tree_util.keystr(path, simple=True, separator=".") or "value": leaf for path, leaf in leaves}
        return {name: _variable(name, _array(leaf), (), chains) for name, leaf in named.items()}
    times, variables = _time_names(posterior), {}
    for site, values in posterior.sites.items():
        values, present = _array(values), _present(posterior, site)
        if values.dtype == bool:
            values = values.astype(np.int8)
        if np.issubdtype(values.dtype, np.floating):
            values = np.where(present.reshape(*present.shape, *[1] * (values.ndim - present.ndim)), values, np.nan)
        variables[_name(site)] = _variable(_name(site), values, times[site], chains)
    return variables


def _statistics(posterior: Posterior, chains: int) -> dict[str, Any]:
    """Return the variables of the group `sample_stats`."""
    variables = {"log_weight": _variable("log_weight", _array(posterior.log_weights), (), chains)}
    if posterior.num_chains:
        shape = chains, posterior.num_particles // chains
        figures = {n: _array(f) for n, f in posterior.diagnostics.items() if np.shape(f) == shape}
        variables |= {name: (("chain", "draw"), figure) for name, figure in figures.items()}
    times = _time_names(posterior)
    for site in posterior.sites:
        present = _present(posterior, site)
        if not present.all():
            variables[f"present.{_name(site)}"] = _variable(f"present.{site}", present, times[site], chains)
    return variables


def _steps(posterior: Posterior) -> dict[str, Any]:
    """Return the variables of the group `population`, none for chains and programs without loops."""
    diagnostics = posterior.diagnostics
    if posterior.num_chains or not len(diagnostics.get("ess", ())):
        return {}
    variables = {name: ("step", _array(diagnostics[name])) for name in _STEPS if name in diagnostics}
    if "ancestors" in diagnostics:
        ancestors = _array(diagnostics["ancestors"])
        axis = "draw" if ancestors.shape[1] == posterior.num_particles else "particle"
        variables["ancestors"] = (("step", axis), ancestors)
    return variables


def _time_names(posterior: Posterior) -> dict[str, tuple[str, ...]]:
    """Return the names of each site's time axes: axes of one depth and length share one."""
    shapes = {site: _present(posterior, site).shape[1:] for site in posterior.sites}
    lengths: dict[int, set[int]] = {}
    for shape in shapes.values():
        for depth, length in enumerate(shape):
            lengths.setdefault(depth, set()).add(length)

    def axis(depth: int, length: int) -> str:
        return "inner_" * depth + ("time" if len(lengths[depth]) == 1 else f"time_{length}")

    return {site: tuple(axis(depth, n) for depth, n in enumerate(shape)) for site, shape in shapes.items()}


def _present(posterior: Posterior, site: str) -> np.ndarray:
    if site in posterior.present:
        return np.asarray(posterior.present[site])
    return np.ones(posterior.num_particles, bool)


def _variable(name: str, values: np.ndarray, times: tuple[str, ...], chains: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Return dimensions and values of draws `[chains * draws, times..., entries...]`."""
    by_chain = values.reshape(chains, -1, *values.shape[1:])
    leading = ("chain", "draw", *times)
    return leading + _entries(name, by_chain, len(leading))[0], by_chain


def _entries(name: str, values: np.ndarray, leading: int) -> tuple[tuple[str, ...], np.ndarray]:
    return tuple(f"{name}_dim_{i}" for i in range(values.ndim - leading)), values


def _array(values) -> np.ndarray:
    """Return an array of NumPy's own types."""
    values = jnp.asarray(values)
    return np.asarray(values.astype(jnp.float32) if values.dtype == jnp.bfloat16 else values)


def _name(site: str) -> str:
    return site.replace("/", ".")
