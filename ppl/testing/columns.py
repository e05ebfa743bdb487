"""Results of functions as columns of numbers with names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_columns", "named_functions"]


def as_columns(results: Mapping[str, Any], count: int) -> tuple[list[str], np.ndarray]:
    """Return pytrees of arrays `[count, ...]` as columns: a name for each, and `float64[count, D]`."""
    labels, columns = [], [np.zeros((count, 0))]
    for name, result in results.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(result):
            leaf, label = np.asarray(leaf, np.float64), name + jax.tree_util.keystr(path)
            labels += [f"{label}{list(index) if index else ''}" for index in np.ndindex(*leaf.shape[1:])]
            columns.append(leaf.reshape(count, -1))
    return labels, np.concatenate(columns, axis=1)


def named_functions(functions: Callable | Mapping[str, Callable]) -> dict[str, Callable]:
    """Return one function, or several by name, as functions of a batch that return pytrees of arrays.

    Raises:
        TypeError: one is no function.
    """
    functions = functions if isinstance(functions, Mapping) else {"f": functions}
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"`functions` must be a function, or functions by name; {name!r} is {function!r}.")
    return {n: jax.vmap(lambda v, f=f: jax.tree.map(jnp.asarray, f(v))) for n, f in functions.items()}
