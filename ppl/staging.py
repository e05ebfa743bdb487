"""The run of a model's Python under `jax.make_jaxpr`: what its statements need to know about where they stand."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core as jex

from ppl.errors import MisplacedSite, SiteTypeError, user_line

__all__ = ["Staging", "current_staging", "scope", "staging_context", "staging_options", "transformed"]


class Owner:
    """The mark of one staging on its statements, told apart by identity.

    Marks are equal to each other: JAX caches equations' types by their parameters, and would keep every one.
    """

    def __eq__(self, other):
        return isinstance(other, Owner)

    def __hash__(self):
        return hash(Owner)


@dataclasses.dataclass
class Staging:
    """One run of a model under `make_jaxpr`: what its statements need to know about where they stand."""

    arguments: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    values: list[tuple[str, Any]] = dataclasses.field(default_factory=list)  # (description, tracer), for messages
    prefix: str = ""
    inner: bool = False  # loops do not resample: inside `ppl.generate` or another loop
    internal: bool = False  # sites are kept only when named: the path of a process
    promises: list[str] = dataclasses.field(default_factory=list)  # of the processes that have unfolded
    trace: Any = None
    token: Any = "ppl"  # part of the key of JAX's trace caches
    owner: Any = dataclasses.field(default_factory=lambda: Owner())  # marks this staging's statements


_STAGING: contextvars.ContextVar[Staging | None] = contextvars.ContextVar("ppl_staging", default=None)
# JAX caches the trace of a jitted helper by its arguments, and a helper may hold statements: under a token of the
# language's own no trace from outside of a model is used, and under one for each scope none of another scope. A trace
# that another staging left behind (with its plates) is known by its statements' `owner`; see `ppl.program`.
_JIT_CACHE_TOKEN = jax.make_user_context(None)


@contextlib.contextmanager
def staging_context(staging: Staging) -> Iterator[Staging]:
    """Make `staging` the current one."""
    reset = _STAGING.set(staging)
    try:
        with _JIT_CACHE_TOKEN((staging.token, staging.prefix)):
            staging.trace = _trace_identity()
            yield staging
    finally:
        staging.trace = None
        _STAGING.reset(reset)


def check_name(statement: str, name: Any) -> None:
    """Raise unless a statement's name is a string."""
    if not isinstance(name, str):
        raise SiteTypeError(f"{statement} at {user_line()}: the name {name!r} is not a string.")


def current_staging(statement: str) -> Staging:
    """Return the staging in force, or say that the statement stands outside of a model."""
    staging = _STAGING.get()
    if staging is None:
        raise MisplacedSite(
            f"{statement} at {user_line()} stands outside of a model. Put it in a function decorated with @ppl.model "
            "and "
            "run that with ppl.infer or ppl.simulate."
        )
    _refuse_transformations(staging, statement)
    return staging


@contextlib.contextmanager
def staging_options(**changes) -> Iterator[None]:
    """Change fields of the current staging for a while."""
    staging = _STAGING.get()
    saved = {name: getattr(staging, name) for name in changes}
    for name, value in changes.items():
        setattr(staging, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(staging, name, value)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Prefix the names of the statements inside with `name/`."""
    staging = current_staging(f"ppl.scope({name!r})")
    check_name("ppl.scope", name)
    outer = staging.prefix
    staging.prefix = f"{outer}{name}/"
    try:
        with _JIT_CACHE_TOKEN((staging.token, staging.prefix)):
            yield
    finally:
        staging.prefix = outer


def _trace_identity():
    reference = getattr(jex.get_opaque_trace_state(), "_trace_ref", None)
    return None if reference is None else reference()


def _refuse_transformations(staging: Staging, statement: str) -> None:
    """Raise if a `vmap` or `grad` of the user's own lies between the model and this statement."""
    trace = _trace_identity()
    while trace is not None and trace is not staging.trace:
        kind = type(trace).__name__
        if "Batch" in kind:
            raise transformed(statement, "jax.vmap", "use a distribution with a batch shape, numpyro.plate or ppl.scan")
        if "JVP" in kind or "Linearize" in kind:
            raise transformed(statement, "jax.grad", "differentiate ppl.log_density(program, sites) instead")
        trace = getattr(trace, "parent_trace", None)


def transformed(statement: str, transformation: str, remedy: str) -> MisplacedSite:
    """Return the error for a statement inside a transformation of the user's own."""
    return MisplacedSite(
        f"{statement} at {user_line()} stands inside a {transformation} of your own, where no inference algorithm can "
        f"see it: {remedy}."
    )
