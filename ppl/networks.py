"""Keeping a user's flax networks whole when staging fails.

A flax transformation (`nnx.jit`, `nnx.remat`, ...) of a network that was made outside of the model raises while a
program is staged, after it has taken the network apart. The networks that a program can see directly are noted before
staging and put together again if it fails.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

__all__ = ["kept_whole"]


@contextlib.contextmanager
def kept_whole(function: Callable, arguments: Any) -> Iterator[None]:
    """Restore the networks that `function` closes over, or is given, if the body raises."""
    parts = (node for network in _networks(function, arguments) for _, node in nnx.iter_graph(network))
    saved = [(node, dict(vars(node))) for node in parts if isinstance(node, nnx.Module | nnx.Variable)]
    try:
        yield
    except BaseException:
        for node, attributes in saved:
            for name in vars(node).keys() - attributes.keys():
                object.__delattr__(node, name)
            for name, value in attributes.items():
                object.__setattr__(node, name, value)
        raise


def _networks(function: Callable, arguments: Any) -> list[nnx.Module]:
    is_network = lambda x: isinstance(x, nnx.Module)  # noqa: E731
    seen = {id(x): x for x in jax.tree.leaves(arguments, is_leaf=is_network) if is_network(x)}
    function = inspect.unwrap(function)
    if inspect.isfunction(function):
        names = _names(function.__code__)
        cells = [c.cell_contents for c in function.__closure__ or () if _is_filled(c)]
        for value in (*cells, *(function.__globals__.get(name) for name in names)):
            if is_network(value):
                seen[id(value)] = value
    return list(seen.values())


def _names(code) -> set[str]:
    """Return the global names that a function and the functions inside it may read."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if inspect.iscode(c)))


def _is_filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
