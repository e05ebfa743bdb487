"""Python functions inside a run: called once for all particles.

A host function sees the whole population at once: for text the list of texts, one per particle, else the values with a
leading particle axis. Particles that are still all alike, as at the start of a text, are shown once. The compiled run
waits for the function, so that its cost is the function's own and one round trip a call.

What goes wrong in it ends the run at once: the exception is kept with the run it belongs to, the callback fails, so
that XLA computes nothing more, and `execute` raises the exception with the site's name. A run is known to its callbacks
by a number that is one of its inputs: a compiled run serves many runs, side by side in threads too, and callbacks come
in on XLA's threads. Under a `jit` of the user's own nothing can be raised: the weights become NaN, and a warning tells.

Threads. On a CPU, XLA calls a host function on one of the few threads that it computes with. JAX inside of it, a
program's run or plain `jax.numpy`, may need another one. So one is kept free: at most as many runs with host functions
go on at once as leave one, the others wait; a run inside of a host function for which no thread is left is refused
instead of waiting for ever. Where there is one CPU, XLA is asked for two threads.

Ctrl-C. Python's handler of SIGINT runs on the main thread, which waits inside XLA. A pipe tells the next host call, and
the run ends there with KeyboardInterrupt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl.errors import user_line

__all__ = ["Host", "HostError", "ask", "execute", "host"]


def _cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))


if _cpus() == 1:  # read when JAX starts its CPU client; the user's own setting stays
    os.environ.setdefault("PJRT_NPROC", "2")


class HostError(RuntimeError):
    """A host function raised, or returned what is no vector of log-weights."""


@dataclasses.dataclass(frozen=True)
class Host:
    """A Python function of all particles; see `host`."""

    function: Callable

    def __call__(self, *values: Any):
        """Apply the function to one particle's values inside a model, for `ppl.factor`; returns a scalar float32.

        Args:
            values: pytrees of arrays, as many as the function takes. It is called once for all particles, with NumPy
                arrays that have a leading particle axis.
        """
        name = getattr(self.function, "__name__", type(self.function).__name__)
        where = f"{name}, called at {user_line()}"
        return self.at(where, None, values[0]) if len(values) == 1 else _Spread(self.function).at(where, values)

    def at(self, site: str, read: Callable | None, value: Any):
        """Apply the function to one particle's value at a site of a program; returns a scalar float32.

        Args:
            site: what to name in errors.
            read: turns values with a leading particle axis into texts; None hands the values on.
            value: a pytree of arrays.
        """
        return ask(site, _LogWeights(self.function, read), jax.ShapeDtypeStruct((), jnp.float32), value)


@dataclasses.dataclass(frozen=True)
class _Spread:
    """A function of several values, as one of their tuple."""

    function: Callable

    def __call__(self, values: tuple):
        return self.function(*values)

    def at(self, site: str, values: tuple):
        return Host(self).at(site, None, values)


def host(function: Callable) -> Host:
    """Let a Python function be a log-reward or a twist: it is called once for all particles.

    Args:
        function: maps the list of all particles' texts to as many numbers, in nats; for a process that writes no text
            it is given the values, NumPy arrays with a leading particle axis. -inf forbids; NaN and +inf are errors,
            and so are truth values. It may compute with JAX, and run programs.

    In a model of your own, `ppl.factor("name", ppl.host(function)(value))`.
    """
    if not callable(function):
        raise TypeError(f"ppl.host takes a function, got {type(function).__name__}.")
    return Host(function)


@dataclasses.dataclass(frozen=True)
class _LogWeights:
    """A host function with its result checked."""

    function: Callable
    read: Callable | None

    def __call__(self, values: Any, size: int) -> np.ndarray:
        seen = values if self.read is None else self.read(values)
        what = "value" if self.read is None else "text"
        result = self.function(seen)
        return _checked(result, seen, f"{size} {what}{'' if size == 1 else 's'}", size)


def _checked(result: Any, seen: Any, given: str, size: int) -> np.ndarray:
    """Return a host function's result as log-weights `[size]`."""
    wanted = f"it was given {given} and must return {size} number{'' if size == 1 else 's'}, one for each, in nats"
    try:
        array = np.asarray(result)
    except (TypeError, ValueError) as error:
        raise HostError(f"{wanted}; it returned {type(result).__name__}: {error}") from error
    if array.dtype == bool:
        raise HostError(f"{wanted}; it returned truth values. To forbid some, return np.where(allowed, 0.0, -np.inf).")
    whole_or_real = np.issubdtype(array.dtype, np.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    if not whole_or_real:
        inside = f" of {type(array.flat[0]).__name__}" if array.ndim and array.size else ""
        raise HostError(f"{wanted}; it returned {type(result).__name__}{inside}.")
    if array.shape != (size,):
        alike = " Particles that are still alike are shown once." if size == 1 else ""
        raise HostError(f"{wanted}; got shape {array.shape}.{alike}")
    array = array.astype(np.float32)
    bad = np.flatnonzero(np.isnan(array) | (array == np.inf))
    if bad.size:
        example = f" for {seen[bad[0]]!r}" if isinstance(seen, list) else ""
        raise HostError(f"it returned {array[bad[0]]}{example}; a log-weight is a number or -inf.")
    return array


# Asking from inside a compiled run ---------------------------------------------------------------------------------


@functools.cache
def _no_run() -> jax.Array:
    """Return the number 0, of no run. Programs close over this very array, in whose place `execute` puts the run's."""
    with jax.ensure_compile_time_eval():
        return jnp.zeros(1, jnp.uint32)


def ask(site: str, question: Callable, answer: Any, *arguments: Any, otherwise: Any = np.nan) -> Any:
    """Call a Python function once for all particles, from inside a program.

    Args:
        site: what to name in errors.
        question: hashable; maps the arguments with one leading particle axis, and that axis's size, to the answer with
            the same leading axis.
        answer: shape and type of the answer for one particle.
        arguments: pytrees of arrays.
        otherwise: what the answer is filled with where the function failed and nothing can be raised.
    """
    leaves, tree = jax.tree.flatten(arguments)
    ranks = tuple(jnp.ndim(leaf) for leaf in leaves)
    call = _Call(site, question, tree, ranks, tuple(answer.shape), np.dtype(answer.dtype).name, otherwise)
    return jax.pure_callback(call, answer, _no_run(), *leaves, vmap_method="expand_dims")


@dataclasses.dataclass(frozen=True)
class _Call:
    """The callback. Equal ones make equal programs."""

    site: str
    question: Callable
    tree: Any
    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    otherwise: Any

    def __call__(self, number, *leaves) -> np.ndarray:
        number = int(np.asarray(number).flat[0])
        run = _RUNS.get(number)
        if number and run is None:
            raise _Ended  # a run that nobody waits for any more
        try:
            if run is not None:
                run.check()
            batch, flat = _population(leaves, self.ranks)
            size = int(np.prod(batch))
            with _calling(self.site, run):
                answer = self.question(*jax.tree.unflatten(self.tree, flat), size)
            return np.asarray(answer, self.dtype).reshape((*batch, *self.shape))
        except BaseException as error:  # noqa: BLE001  kept for the thread that waits for the run
            if run is not None:
                run.fail(self.site, error)
                raise _Ended from None
            message = f"{_failure(self.site, error)}. Under a transformation of your own nothing is raised."
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            batch = np.broadcast_shapes(
                *(np.shape(leaf)[: np.ndim(leaf) - rank] for leaf, rank in zip(leaves, self.ranks, strict=True))
            )
            return np.full((*batch, *self.shape), self.otherwise, self.dtype)


def _population(leaves: Sequence[Any], ranks: Sequence[int]) -> tuple[tuple[int, ...], list[np.ndarray]]:
    """Return the batch of a callback's arguments under any number of vmaps, and each with one leading particle axis.

    Args:
        leaves: the arguments, with leading axes of size 1 where a vmap did not batch them.
        ranks: how many axes each has for one particle.
    """
    pairs = list(zip(leaves, ranks, strict=True))
    batch = np.broadcast_shapes(*(np.shape(leaf)[: np.ndim(leaf) - rank] for leaf, rank in pairs))
    size = int(np.prod(batch))
    flat = []
    for leaf, rank in pairs:
        own = np.shape(leaf)[np.ndim(leaf) - rank :]
        flat.append(np.broadcast_to(np.asarray(leaf), (*batch, *own)).reshape(size, *own))
    return batch, flat


def _failure(site: str, error: BaseException) -> str:
    return f"the host function of {site!r} failed: {type(error).__name__}: {error}"


# Runs --------------------------------------------------------------------------------------------------------------


class _Ended(Exception):
    """What a callback raises to end its run: the reason is kept with the run."""


def _is_expected(record) -> bool:
    return record.exc_info is not None and isinstance(record.exc_info[1], _Ended)


class _Run:
    """A run with host functions that is under way."""

    def __init__(self, inside: _Run | None):
        self.inside = inside
        self.thread = threading.get_ident()
        self.failure: tuple[str, BaseException] | None = None
        self.pipe: socket.socket | None = None
        self.pressed = False  # Ctrl-C

    def check(self) -> None:
        """End a run that has failed, or that Ctrl-C shall end."""
        if self.failure is not None:
            raise _Ended
        if self.interrupted():
            raise KeyboardInterrupt

    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed since the run began, or the run that it is inside of."""
        if self.inside is not None and self.inside.interrupted():
            return True
        pipe = self.pipe
        with contextlib.suppress(BlockingIOError):
            while pipe is not None and (signals := pipe.recv(64)):
                self.pressed = self.pressed or signal.SIGINT in signals
        return self.pressed

    def fail(self, site: str, error: BaseException) -> None:
        """Keep the first failure."""
        if self.failure is None and not isinstance(error, _Ended):
            self.failure = site, error

    def raise_failure(self) -> None:
        """Raise what ended the run, if anything did."""
        if self.failure is None:
            if self.interrupted():
                raise KeyboardInterrupt
            return
        site, error = self.failure
        if not isinstance(error, Exception):  # KeyboardInterrupt, SystemExit
            raise error
        raise HostError(_failure(site, error)) from error


# JAX logs what callbacks raise, under the name of the module that runs them.
logging.getLogger(jax.pure_callback.__module__).addFilter(lambda record: not _is_expected(record))

_RUNS: dict[int, _Run] = {}
_NUMBERS = itertools.count(1)
_CALLS = threading.local()  # `site` and `run` of the host function that this thread is in
_STATE = threading.Condition()
_OCCUPIED: list[int] = []  # XLA's threads that are in host functions
_OUTER: list[int] = []  # numbers of the runs under way that are not inside of others


def execute(runner: Callable[[list[Any]], Any], inputs: list[Any]) -> Any:
    """Run a compiled program on its inputs, and raise what its host functions raised.

    Args:
        runner: the compiled program.
        inputs: what `ppl.program.Staged` holds.

    Raises:
        HostError: a host function failed; names its site. The run has ended there.
        KeyboardInterrupt: Ctrl-C was pressed; the run has ended at the next host call.
    """
    calling = getattr(_CALLS, "now", None)
    if calling is not None:
        _require_thread(calling[0])
    asks = any(x is _no_run() for x in inputs if isinstance(x, jax.Array))
    if not asks or isinstance(jnp.zeros(()), jax.core.Tracer):  # the latter under a transformation of the user's own
        return runner(inputs)
    number = next(_NUMBERS)
    run = _Run(None if calling is None else calling[1])
    inputs = [np.full(1, number, np.uint32) if x is _no_run() else x for x in inputs]
    with _under_way(number, run, calling is None), _listening(run):
        try:
            result = jax.block_until_ready(runner(inputs))
        except Exception:  # JaxRuntimeError the first time, ValueError later
            run.raise_failure()
            raise
        run.raise_failure()
    return result


@contextlib.contextmanager
def _under_way(number: int, run: _Run, outer: bool) -> Iterator[None]:
    """Count a run among those under way; outer ones wait until a thread stays free beside it."""
    limit = None
    if jax.default_backend() == "cpu":
        limit = max(_num_threads() - 1, 1)
        _warn_of_one_thread(_num_threads())
    with _STATE:
        while outer and limit is not None and len(_OUTER) >= limit:
            _STATE.wait()
        if outer:
            _OUTER.append(number)
        _RUNS[number] = run
    try:
        yield
    finally:
        with _STATE:
            del _RUNS[number]
            if outer:
                _OUTER.remove(number)
                _STATE.notify_all()


@contextlib.contextmanager
def _calling(site: str, run: _Run | None) -> Iterator[None]:
    """Note that this thread is in a host function."""
    before = getattr(_CALLS, "now", None)
    thread = threading.get_ident()
    own = run is None or run.thread != thread  # else the thread that runs the program calls the function itself
    _CALLS.now = site, run
    if own:
        with _STATE:
            _OCCUPIED.append(thread)
    try:
        yield
    finally:
        _CALLS.now = before
        if own:
            with _STATE:
                _OCCUPIED.remove(thread)


def _require_thread(site: str) -> None:
    """Refuse a run inside of a host function that would wait for ever."""
    if jax.default_backend() != "cpu":
        return
    threads = _num_threads()
    with _STATE:
        taken = len(set(_OCCUPIED))
    if taken >= threads:
        raise HostError(
            f"the host function of {site!r} runs a program, which needs a thread of its own, and JAX computes with "
            f"{threads}, all of which are in host functions: it would wait for ever. Import ppl before JAX is first "
            f"used, or set the environment variable PJRT_NPROC={threads + 1} for more threads; or run the inner "
            "program beforehand."
        )


@functools.cache
def _warn_of_one_thread(threads: int) -> None:
    if threads == 1:
        message = (
            "JAX computes with one thread, and host functions of programs take it: inside of them larger jax.numpy "
            "computations wait for ever. Import ppl before JAX is first used, or set the environment variable "
            "PJRT_NPROC=2."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def _num_threads() -> int:
    """Return how many threads XLA computes with on the CPU."""
    jax.local_devices(backend="cpu")  # starts them
    try:
        names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        counted = names.count("tf_XLAEigen")
    except OSError:
        counted = 0
    asked = os.environ.get("PJRT_NPROC") or os.environ.get("NPROC")
    return counted or (int(asked) if asked and asked.isdigit() else _cpus())


@contextlib.contextmanager
def _listening(run: _Run) -> Iterator[None]:
    """Let the run's host calls see Ctrl-C, where the main thread waits for it and nobody else listens."""
    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    run.pipe, written = socket.socketpair()
    try:
        run.pipe.setblocking(False)
        written.setblocking(False)
        before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        try:
            if before != -1:  # an event loop's, which must go on
                signal.set_wakeup_fd(before)
            yield
        finally:
            signal.set_wakeup_fd(before)
    finally:
        pipe, run.pipe = run.pipe, None
        pipe.close()
        written.close()
