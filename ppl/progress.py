"""A progress bar for runs inside one `jit`.

The compiled loop calls back about a hundred times a run, whatever its length; the host shows a bar only once the
loop has run for a few seconds. The callback is one function for all runs, so that a cached runner serves any of them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets a notebook shows the terminal's bar
    from tqdm.auto import tqdm

__all__ = ["report", "showing", "wanted"]

PATIENCE = 2.0  # seconds that a loop runs before a bar appears
_CALLS = 100
_LOCK = threading.Lock()


class _Display:
    """The bar of the run that is under way, if one is to be shown."""

    active = False
    started: float | None = None
    bar: tqdm | None = None


def wanted(progress: bool | None) -> bool:
    """Whether to show progress: as told, else where somebody can see it."""
    if progress is not None:
        return bool(progress)
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextlib.contextmanager
def showing(active: bool) -> Iterator[None]:
    """Show the progress that compiled loops report meanwhile."""
    with _LOCK:
        _Display.active, _Display.started, _Display.bar = active, None, None
    try:
        yield
    finally:
        with _LOCK:
            if _Display.bar is not None:
                _Display.bar.close()
            _Display.active, _Display.bar = False, None


def report(iteration, length: int, figure, name: str = "ess") -> None:
    """Report an iteration, and a figure that tells how it goes, from inside a compiled loop."""
    every = max(length // _CALLS, 1)
    jax.lax.cond(
        iteration % every == 0,
        lambda: jax.debug.callback(_UPDATES[name], iteration, jnp.int32(length), figure),
        lambda: None,
    )


def _update(iteration, length, figure, name: str) -> None:
    with _LOCK:
        if not _Display.active:
            return
        now = time.monotonic()
        if _Display.started is None:  # the clock starts with the loop: compilation does not count
            _Display.started = now
        if now - _Display.started < PATIENCE:
            return
        if _Display.bar is None:
            _Display.bar = tqdm(total=int(length), desc="steps", leave=False)
        _Display.bar.set_postfix({name: f"{float(figure):.3g}"}, refresh=False)
        _Display.bar.update(int(iteration) + 1 - _Display.bar.n)


# One function for each figure, so that runs of one kind are compiled once.
_UPDATES = {name: functools.partial(_update, name=name) for name in ("ess", "acceptance")}
