"""When two programs are the same: the key that compiled runs are kept by.

Programs that differ in array values, source lines or object identities only have equal keys. The key is a walk over the
flat program: variables are numbers already, literals go by their bytes, nested jaxprs are walked with variables
renumbered, derivative and batching rules and host callbacks go by identity. It is compared by equality, never by a
printed form: two programs can print alike and differ in their rules.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from ppl.ir import Apply, Block, Literal, Node, open_jaxpr

__all__ = ["structural_key"]

# Parameters that say nothing about what is computed.
_IGNORED_PARAMS = {"name", "debug_info", "where"}


def structural_key(block: Block) -> tuple:
    """Return a hashable value that is equal for blocks that compute the same from the same inputs."""
    types = tuple(_aval_key(block.avals[v]) for v in block.inputs)
    return types, block.inputs, _atoms(block.outputs), tuple(_node_key(node) for node in block.nodes)


def _node_key(node: Node) -> tuple:
    if isinstance(node, Apply):
        params = tuple(
            (name, _freeze(value, name)) for name, value in sorted(node.params.items()) if name not in _IGNORED_PARAMS
        )
        return ("apply", node.primitive, _atoms(node.inputs), node.outputs, params)
    fields = []
    for field in dataclasses.fields(node):
        if field.name == "where":
            continue
        value = getattr(node, field.name)
        if isinstance(value, Block):
            value = structural_key(value)
        elif isinstance(value, Literal):
            value = value.key()
        elif field.name == "aval":
            value = _aval_key(value)
        elif isinstance(value, tuple):
            value = _atoms(value)
        fields.append(value)
    return (type(node).__name__, *fields)


def _atoms(atoms) -> tuple:
    return tuple(a.key() if isinstance(a, Literal) else a for a in atoms)


def _aval_key(aval) -> tuple:
    return getattr(aval, "shape", None), str(getattr(aval, "dtype", aval)), getattr(aval, "weak_type", False)


@dataclasses.dataclass(frozen=True, slots=True)
class _Identity:
    """An object that is equal to itself only. Holding it keeps its identity from being reused."""

    value: Any

    def __eq__(self, other):
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self):
        return id(self.value)


def _freeze(value: Any, name: str = ""):
    """Turn an equation's parameter into something hashable that is equal when the computation is."""
    if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
        return _jaxpr_key(value)
    if isinstance(value, tuple | list):
        return (type(value).__name__, *(_freeze(v) for v in value))
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in sorted(value.items()))
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, jax.Array):
        return _Identity(value)
    if callable(value) and name == "computation":  # lax.reduce: said again by its jaxpr
        return None
    if name == "rule":  # a batching rule: what JAX wraps anew at each call is the user's one function
        value = inspect.unwrap(value)
    try:
        hash(value)
    except TypeError:
        return _Identity(value)
    return type(value), value


def _jaxpr_key(jaxpr) -> tuple:
    """Return the key of a jaxpr inside a control-flow equation, whose closed-over arrays go by identity."""
    inner, consts = open_jaxpr(jaxpr)
    numbers: dict[Any, int] = {}

    def number(var) -> int:
        return numbers.setdefault(var, len(numbers))

    def atom(a):
        return Literal(a.val).key() if isinstance(a, jex.Literal) else number(a)

    inputs = tuple((number(v), _aval_key(v.aval)) for v in (*inner.constvars, *inner.invars))
    equations = tuple(
        (
            eqn.primitive,
            tuple(atom(a) for a in eqn.invars),
            tuple((number(v), _aval_key(v.aval)) for v in eqn.outvars),
            tuple((k, _freeze(v, k)) for k, v in sorted(eqn.params.items()) if k not in _IGNORED_PARAMS),
        )
        for eqn in inner.eqns
    )
    return inputs, tuple(_Identity(c) for c in consts), equations, tuple(atom(a) for a in inner.outvars)
