"""Pictures of a posterior, on matplotlib.

`plot_trace` shows what sites are like, and how chains went; `plot_weights` where a population lost its diversity;
`plot_genealogy` whose lines survived. matplotlib is imported when one of them is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppl.diagnostics import summarize_chains
from ppl.posterior import Posterior

__all__ = ["plot_genealogy", "plot_trace", "plot_weights"]

_COLOURS = ("#2f5d8a", "#d9772b", "#4a8f5c", "#a8476b", "#7a6fb0", "#8a6d3b")
_INK, _SOFT, _LIVE = "#333333", "#c9ced6", "#2f5d8a"
_MOST_ENTRIES, _MOST_CHAINS_SEEN, _MOST_LINES = 8, 6, 200


def plot_trace(posterior: Posterior, sites: Sequence[str] | None = None, *, ax: Any = None) -> Any:
    """Plot each entry's distribution, and for chains its draws one after another.

    Args:
        posterior: of one run. Draws of a population are weighted.
        sites: names of sites; None for all that were kept. The first 8 entries of them are shown.
        ax: matplotlib axes `[entries, 2]` for chains, `[entries]` for a population; None makes a figure.

    Returns:
        The axes, in that shape.

    Raises:
        ImportError: matplotlib is not installed.
        KeyError: a name is not that of a kept site.
        ValueError: there is nothing to plot, or `ax` has another number of axes.
    """
    entries = _entries(posterior, sites)
    chains = posterior.num_chains
    axes = _axes(ax, (len(entries), 2) if chains else (len(entries),))
    weights = np.asarray(posterior.weights, np.float64)
    for row, (label, name, values, present) in zip(axes, entries, strict=True):
        marginal = row[0] if chains else row
        groups = np.split(np.arange(len(values)), max(chains, 1))
        for number, group in enumerate(groups[:_MOST_CHAINS_SEEN]):
            colour = _COLOURS[number % len(_COLOURS)]
            beside = number, min(len(groups), _MOST_CHAINS_SEEN)
            _marginal(marginal, values[group], (weights * present)[group], colour, beside)
            if chains:
                row[1].plot(values[group], color=colour, linewidth=0.6, alpha=0.85)
        _tidy(marginal, label)
        marginal.set_yticks([])
        marginal.spines["left"].set_visible(False)
        if chains:
            figures = summarize_chains({name: values}, chains)[name]
            row[1].set_title(
                f"R-hat {figures.rhat:.3f}   ESS {figures.bulk_ess:.0f} bulk, {figures.tail_ess:.0f} tail",
                loc="right", fontsize=8, color=_INK,
            )  # fmt: skip
            _tidy(row[1])
            row[1].margins(x=0.01)
    if chains:
        axes[-1][1].set_xlabel("draw", fontsize=9)
    return axes


def plot_weights(posterior: Posterior, *, ax: Any = None) -> Any:
    """Plot the sorted weights, and for each step the effective sample size and the log-evidence so far.

    Args:
        posterior: of a population.
        ax: three matplotlib axes; None makes a figure. Programs without a loop use the first.

    Returns:
        The axes, `[3]`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the posterior is of chains, or `ax` has another number of axes.
    """
    _require_population(posterior)
    axes = _axes(ax, (3,), columns=3)
    num = posterior.num_particles
    weights = np.sort(np.asarray(posterior.weights, np.float64))[::-1]
    place = np.arange(1, num + 1)
    axes[0].fill_between(place, num * weights, step="mid", color=_LIVE, alpha=0.25, linewidth=0)
    axes[0].step(place, num * weights, where="mid", color=_LIVE, linewidth=1.3)
    axes[0].axhline(1.0, color=_INK, linewidth=0.8, linestyle=":")
    axes[0].set_ylim(bottom=0.0)
    axes[0].set_xlabel("particle, by weight", fontsize=9)
    _tidy(axes[0], f"weight × N     ESS {float(posterior.ess):.1f} of {num}")
    steps = len(posterior.diagnostics.get("ess", ()))
    if not steps:
        for axis in axes[1:]:
            axis.set_axis_off()
        return axes
    times = np.arange(1, steps + 1)
    resampled = np.asarray(posterior.diagnostics["resampled"], bool)
    ess = np.asarray(posterior.diagnostics["ess"], np.float64)
    axes[1].set_ylim(0.0, 1.05 * num)
    _tidy(axes[1], f"ESS     resampled {int(resampled.sum())} times")
    log_evidence = np.asarray(posterior.diagnostics["log_evidence"], np.float64)
    error = float(posterior.log_evidence_error)
    known = "" if np.isnan(error) else f" ± {error:.3f}"
    _tidy(axes[2], f"log-evidence     {float(posterior.log_evidence):.3f}{known}")
    if not np.isnan(error):
        axes[2].errorbar(times[-1], float(posterior.log_evidence), error, color=_LIVE, capsize=3, linewidth=1)
    for axis, series in ((axes[1], ess), (axes[2], log_evidence)):
        axis.plot(times, series, color=_LIVE, linewidth=1.3)
        axis.plot(times[resampled], series[resampled], "o", color=_COLOURS[1], markersize=3.5, label="resampled")
        axis.set_xlabel("step", fontsize=9)
    if resampled.any():
        axes[1].legend(frameon=False, fontsize=8, loc="upper right")
    return axes


def plot_genealogy(posterior: Posterior, *, ax: Any = None) -> Any:
    """Plot the lines of a population: dark those that survive to the end, light those that died.

    Args:
        posterior: of a population, with loops. Of more than 200 particles, about 200 lines of each kind are drawn.
        ax: matplotlib axes; None makes a figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the posterior keeps no genealogy.
    """
    _require_population(posterior)
    ancestors = np.asarray(posterior.diagnostics.get("ancestors", np.zeros((0, 0))))
    if not ancestors.size or ancestors.shape[1] != posterior.num_particles:
        raise ValueError(f"`posterior` must keep a genealogy; that of {posterior.algorithm} has no ancestors to draw.")
    (axis,) = _axes(ax, (1,), height=3.6)
    from matplotlib.collections import LineCollection

    steps, num = ancestors.shape
    weights, apart = np.asarray(posterior.weights), -(-num // _MOST_LINES)
    alive = _lines(ancestors, np.flatnonzero(weights > 0))
    seen = _lines(ancestors, np.flatnonzero(weights > 0)[::apart])
    died = ~alive & (np.arange(num) % apart == 0)
    times, slots = np.meshgrid(np.arange(steps), np.arange(num), indexing="ij")
    segments = np.stack([np.stack([times, ancestors], axis=-1), np.stack([times + 1, slots], axis=-1)], axis=2)
    thin = min(1.0, 80 / min(num, _MOST_LINES))
    for kind, colour, width, order in ((died, _SOFT, 0.6, 1), (seen, _LIVE, 0.4 + 0.7 * thin, 2)):
        lines = LineCollection(segments[kind[1:]], colors=colour, linewidths=width, zorder=order)
        axis.add_collection(lines)
    dots = np.arange(num)[::apart]
    axis.scatter(np.full(len(dots), steps), dots, s=8 * num * weights[dots] * thin, color=_COLOURS[1], zorder=3)
    axis.set_xlim(-0.02 * steps, 1.03 * steps)
    axis.set_ylim(-0.03 * num, 1.0 * num)
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel("particle", fontsize=9)
    eves = int(alive[0].sum())
    _tidy(axis, f"{eves} of {num} first particles have descendants     (dots: last weights)")
    return axis


def _lines(ancestors: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return which slots `[T + 1, N]` lie on the lines of some of the last particles."""
    marked = np.zeros((len(ancestors) + 1, ancestors.shape[1]), bool)
    marked[-1, last] = True
    for t in range(len(ancestors) - 1, -1, -1):
        marked[t, ancestors[t, marked[t + 1]]] = True
    return marked


def _marginal(axis: Any, values: np.ndarray, weights: np.ndarray, colour: str, beside: tuple[int, int]) -> None:
    """Draw a weighted histogram; for few whole numbers bars, those of chain i of n beside the others'."""
    kept = (weights > 0) & np.isfinite(values)
    values, weights = values[kept], weights[kept] / max(weights[kept].sum(), 1e-300)
    if not len(values):
        return
    points = np.unique(values)
    if len(points) <= 25 and np.all(points == np.round(points)):
        heights = [weights[values == point].sum() for point in points]
        width = 0.8 / beside[1]
        places = points + (beside[0] - (beside[1] - 1) / 2) * width
        axis.bar(places, heights, width=width, color=colour, alpha=0.6, linewidth=0)
        return
    ess = 1 / np.sum(weights**2)
    bins = int(np.clip(2 * ess ** (1 / 3), 8, 60))
    low, high = points[0], points[-1]
    if low == high:
        low, high = low - 0.5, high + 0.5
    heights, edges = np.histogram(values, bins=bins, range=(low, high), weights=weights, density=True)
    axis.stairs(heights, edges, color=colour, linewidth=1.2)
    axis.stairs(heights, edges, color=colour, alpha=0.18, fill=True)
    axis.set_ylim(bottom=0.0)


def _entries(posterior: Posterior, sites: Sequence[str] | None) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    """Return label, site, values `[N]` and presence `[N]` of the entries to show."""
    if np.ndim(posterior.log_weights) != 1:
        raise ValueError(f"`posterior` must be of one run, got log-weights of shape {np.shape(posterior.log_weights)}.")
    names = list(posterior.sites) if sites is None else [sites] if isinstance(sites, str) else list(sites)
    for name in names:
        if name not in posterior.sites:
            raise KeyError(f"`sites` names {name!r}, which was not kept; there are {sorted(posterior.sites)}.")
    entries = []
    for name in names:
        values = np.asarray(posterior.sites[name], np.float64)
        present = np.asarray(posterior.present.get(name, np.ones(len(values), bool)))
        for index in list(np.ndindex(values.shape[1:]))[:_MOST_ENTRIES]:
            label = name + (f"[{', '.join(map(str, index))}]" if index else "")
            times = index[: present.ndim - 1]
            entries.append((label, name, values[(slice(None), *index)], present[(slice(None), *times)]))
    if not entries:
        raise ValueError(
            f"`posterior` of {posterior.algorithm} keeps no sites to plot; name them in infer(keep=[...])."
        )
    return entries[:_MOST_ENTRIES]


def _axes(given: Any, shape: tuple[int, ...], columns: int = 2, height: float = 1.9) -> np.ndarray:
    """Return the axes that were given, in a shape, or those of a new figure of at most so many columns."""
    count = int(np.prod(shape))
    if given is not None:
        axes = np.array(given, dtype=object)
        if axes.size != count:
            raise ValueError(f"`ax` must hold {count} axes, {list(shape)}; got {axes.size}.")
        return axes.reshape(shape)
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "genppl[plots]".') from error
    columns = min(columns, count)
    rows = -(-count // columns)
    height = 2.8 if columns == 3 else height
    ratios = {"width_ratios": [1, 2]} if len(shape) == 2 else {}
    size = (11.0 if columns == 3 else 9.0, height * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", gridspec_kw=ratios)
    for unused in axes.reshape(-1)[count:]:
        unused.set_axis_off()
    return axes.reshape(-1)[:count].reshape(shape)


def _tidy(axis: Any, title: str | None = None) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_SOFT)
    axis.tick_params(colors=_INK, labelsize=8, length=3)
    if title is not None:
        axis.set_title(title, loc="left", fontsize=9, color=_INK)


def _require_population(posterior: Posterior) -> None:
    if posterior.num_chains or np.ndim(posterior.log_weights) != 1:
        raise ValueError(
            f"`posterior` must be of one run of a population; {posterior.algorithm} gave "
            f"{'chains: see plot_trace' if posterior.num_chains else 'several runs: take one by jax.tree.map'}."
        )
