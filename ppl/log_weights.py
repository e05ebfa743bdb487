"""The log-weights that users give as functions: rewards, twists and potentials of every step.

A function sees one particle's value, or its running state, and returns one real number in nats. What cannot be meant is
refused while the program is staged: truth values and complex numbers, other shapes than a scalar, and a number that
does not depend on what the function sees, unless it is 0: `lambda value: len(value)` counts a dictionary's entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ppl.errors import SiteTypeError, SiteValueError
from ppl.host import Host

__all__ = ["log_weight_of"]

_SEEN = {"reward": "the finished value", "twist": "the running state", "potential": "the running state"}
_NAMES = {"reward": "log_reward", "twist": "twist", "potential": "log_weight"}


def log_weight_of(site: str, function: Callable | Host, read: Callable | None, value: Any):
    """Return a user's log-weight of one particle's value, a real scalar.

    Args:
        site: "reward", "twist" or "potential".
        function: a JAX function of one particle's value, or a host function.
        read: what turns values into texts for host functions, or None.
        value: what the function sees, a pytree of arrays.

    Raises:
        SiteTypeError: it returns what is no real number.
        SiteValueError: it returns more than one number, or one that does not depend on the value.
    """
    if isinstance(function, Host):
        return function.at(site, read, value)
    leaves, tree = jax.tree.flatten(value)
    types = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    returned: list[Any] = []

    def flat(*arrays):
        returned.append(function(jax.tree.unflatten(tree, arrays)))
        return _as_array(site, returned[0], value)

    closed = jax.make_jaxpr(flat)(*types)
    _check(site, closed, returned[0], value)
    (result,) = jex.jaxpr_as_fun(closed)(*leaves)
    return result


def _as_array(site: str, result: Any, value: Any):
    if result is None or isinstance(result, str | bytes | dict | list | tuple):
        raise SiteTypeError(f"{_label(site, value)} returned {type(result).__name__}; {_wanted()}.")
    try:
        return jnp.asarray(result)
    except (TypeError, ValueError) as error:
        raise SiteTypeError(f"{_label(site, value)} returned {type(result).__name__}; {_wanted()}.") from error


def _check(site: str, closed: jex.ClosedJaxpr, returned: Any, value: Any) -> None:
    (aval,) = closed.out_avals
    if aval.dtype == jnp.bool_:
        raise SiteTypeError(
            f"{_label(site, value)} returned a truth value, which is no log-weight. To forbid what does not satisfy "
            "it, return jnp.where(ok, 0.0, -jnp.inf); to prefer what does, jnp.where(ok, nats, 0.0)."
        )
    if not (jnp.issubdtype(aval.dtype, jnp.floating) or jnp.issubdtype(aval.dtype, jnp.integer)):
        raise SiteTypeError(f"{_label(site, value)} returned {aval.dtype}; {_wanted()}.")
    if aval.shape != ():
        raise SiteValueError(f"{_label(site, value)} returned shape {aval.shape}; {_wanted()}. Sum or index it.")
    if _depends(closed.jaxpr) or _is_zero(closed, returned):
        return
    constant = f"{returned:g}" if isinstance(returned, int | float) else "a number"
    raise SiteValueError(
        f"{_label(site, value)} returned {constant} whatever it was given: it must depend on what it sees. "
        + _advice(value)
    )


def _depends(jaxpr: jex.Jaxpr) -> bool:
    """Return whether the output depends on any input."""
    dependent = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(isinstance(atom, jex.Var) and atom in dependent for atom in equation.invars):
            dependent.update(equation.outvars)
    return any(isinstance(atom, jex.Var) and atom in dependent for atom in jaxpr.outvars)


def _is_zero(closed: jex.ClosedJaxpr, returned: Any) -> bool:
    """Return whether a result that depends on nothing is 0: no reward, as beside a twist."""
    (out,) = closed.jaxpr.outvars
    if isinstance(out, jex.Literal):
        return not np.any(out.val)
    if any(isinstance(constant, jax.core.Tracer) for constant in closed.consts):
        return False
    with jax.ensure_compile_time_eval():
        zeros = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
        (result,) = jex.jaxpr_as_fun(closed)(*zeros)
        return not np.any(result)


def _label(site: str, value: Any) -> str:
    return f"the function given as `{_NAMES[site]}`, which sees {_SEEN[site]} {_shown(value)},"


def _wanted() -> str:
    return "it must return one real number, in nats"


def _shown(value: Any) -> str:
    """Return the types of a pytree of arrays, as one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_shown(part)}" for name, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_shown(part) for part in value) + ")"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return type(value).__name__


def _advice(value: Any) -> str:
    if isinstance(value, dict) and "length" in value:
        return (
            'The number of tokens is value["length"], a Python function of the text ppl.host(function); a constant '
            "belongs in ppl.factor of a model."
        )
    return "A Python function of the values is ppl.host(function); a constant belongs in ppl.factor of a model."
