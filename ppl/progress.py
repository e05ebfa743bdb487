"""A progress bar for runs inside one `jit`.

The compiled loop calls back about a hundred times a run, whatever its length; the host shows a bar only once a
run has taken a few seconds. The callback is one function for all runs, told apart by a number, so a cached runner
can serve any of them.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

__all__ = ["report", "showing", "wanted"]

PATIENCE = 2.0  # seconds before a bar appears
_CALLS = 100
_LOCK = threading.Lock()
_STARTED: float | None = None
_BAR: tqdm | None = None
_RUNS = itertools.count()


def wanted(progress: bool | None) -> bool:
    """Whether to show progress: as told, else where somebody can see it."""
    if progress is not None:
        return bool(progress)
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextlib.contextmanager
def showing(active: bool) -> Iterator[None]:
    """Show the progress that compiled loops report meanwhile."""
    global _STARTED, _BAR
    if not active:
        yield
        return
    with _LOCK:
        _STARTED, _BAR = time.monotonic(), None
    try:
        yield
    finally:
        with _LOCK:
            if _BAR is not None:
                _BAR.close()
            _STARTED, _BAR = None, None


def report(iteration, length: int, ess) -> None:
    """Report an iteration from inside a compiled loop."""
    every = max(length // _CALLS, 1)
    jax.lax.cond(
        iteration % every == 0,
        lambda: jax.debug.callback(_update, iteration, jnp.int32(length), ess),
        lambda: None,
    )


def _update(iteration, length, ess) -> None:
    global _BAR
    with _LOCK:
        if _STARTED is None or time.monotonic() - _STARTED < PATIENCE:
            return
        if _BAR is None:
            _BAR = tqdm(total=int(length), desc="steps", leave=False)
        _BAR.update(int(iteration) + 1 - _BAR.n)
        _BAR.set_postfix(ess=f"{float(ess):.1f}")
