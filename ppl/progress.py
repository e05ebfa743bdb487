"""A progress bar for runs inside one `jit`.

The compiled loop calls back about a hundred times a run, whatever its length; the host shows a bar only once the
loop has run for a few seconds. The callback is one function for all runs, so that a cached runner serves any of them.
Of runs side by side, or one inside of another, the first one shows its bar.

A bar leaves nothing behind. In a terminal it is tqdm's; in a notebook a widget, or without ipywidgets one line of text
that is replaced in its place.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import TqdmWarning
from tqdm.std import tqdm

with warnings.catch_warnings():  # NumPyro imports this too, and without ipywidgets it warns in notebooks
    warnings.simplefilter("ignore", TqdmWarning)
    importlib.import_module("tqdm.auto")

__all__ = ["report", "showing", "wanted"]

PATIENCE = 2.0  # seconds that a loop runs before a bar appears
_CALLS = 100
_LOCK = threading.Lock()


class _Display:
    """The bar of the run that is under way, if one is to be shown."""

    active = False
    started: float | None = None
    bar: Any = None


def wanted(progress: bool | None) -> bool:
    """Whether to show progress: as told, else where somebody can see it."""
    if progress is not None:
        return bool(progress)
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextlib.contextmanager
def showing(active: bool) -> Iterator[None]:
    """Show the progress that compiled loops report meanwhile."""
    with _LOCK:
        first = active and not _Display.active
        if first:
            _Display.active, _Display.started, _Display.bar = True, None, None
    try:
        yield
    finally:
        with _LOCK:
            if first:
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
            _Display.bar = _bar(int(length))
        if _Display.bar.total != int(length):
            return  # another loop's
        _Display.bar.set_postfix({name: f"{float(figure):.3g}"}, refresh=False)
        _Display.bar.update(int(iteration) + 1 - _Display.bar.n)


# One function for each figure, so that runs of one kind are compiled once.
_UPDATES = {name: functools.partial(_update, name=name) for name in ("ess", "acceptance")}


def _bar(total: int) -> Any:
    """Return a new bar."""
    settings = {"total": total, "desc": "steps", "leave": False}
    if not _in_notebook():
        return tqdm(**settings)
    if importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm_notebook

        return tqdm_notebook(**settings)
    return tqdm(**settings, file=_Line(), ncols=80)


def _in_notebook() -> bool:
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class _Line:
    """A file whose last line stands in one place of a notebook's output: each write replaces it."""

    def __init__(self):
        self.handle: Any = None

    def write(self, text: str) -> None:
        """Show a line; an empty one takes it away."""
        from IPython.display import display

        line = text.strip("\r\n")
        if not line and self.handle is None:
            return
        data = {"text/plain": line.rstrip()}
        if self.handle is None:
            self.handle = display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)

    def flush(self) -> None:
        """Every line is shown at once."""
