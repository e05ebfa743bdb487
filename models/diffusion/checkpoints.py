"""Files of networks and of trainings: safetensors with named arrays, and a few words about them.

An array is called by its path in the tree that it belongs to, as in `network.down.0.first.linear.kernel`. What is read
must have exactly the names, shapes and types of the tree it is read into; what does not fit is said by name. A file is
written beside its place and then moved there, so that an interruption leaves the old one whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (its import teaches NumPy the name bfloat16, which safetensors asks for)
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

__all__ = ["load_network", "load_tree", "save_network", "save_tree", "split_network"]

_SHOWN = 8  # differences that a message names


def save_network(path: str | os.PathLike, network: nnx.Module) -> None:
    """Write a network's weights, its `nnx.Param`, to a file."""
    save_tree(path, {"network": split_network(network)[0]})


def load_network(path: str | os.PathLike, network: nnx.Module) -> nnx.Module:
    """Return a copy of a network with the weights of a file.

    Args:
        path: what `save_network` or `Trained.save` wrote.
        network: one of the same build; its own weights do not matter and stay as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or its arrays are not those of `network`: it says which differ.
    """
    weights, build = split_network(network)
    tree, _ = load_tree(path, {"network": weights}, whole=False)
    return build(tree["network"])


def split_network(network: nnx.Module) -> tuple[dict[str, Any], Callable[[dict[str, Any]], nnx.Module]]:
    """Return a network's weights as nested dictionaries of arrays, and what makes a network of such weights."""
    graph, weights, rest = nnx.split(network, nnx.Param, ...)

    def build(values: dict[str, Any]) -> nnx.Module:
        state = jax.tree.map(lambda leaf: leaf, weights)
        nnx.replace_by_pure_dict(state, values)
        return nnx.merge(graph, state, rest)

    return nnx.to_pure_dict(weights), build


def save_tree(path: str | os.PathLike, tree: Any, about: Mapping[str, Any] | None = None) -> None:
    """Write a pytree of arrays.

    Args:
        path: where to; the folder is made if need be, and a file that is there is replaced.
        tree: any pytree whose leaves are arrays or numbers.
        about: what else to remember: values that JSON can hold.
    """
    path = Path(path)
    arrays = {name: np.array(leaf, order="C") for name, leaf in _named(tree).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(arrays, beside, {"about": json.dumps(dict(about or {}))})
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_tree(path: str | os.PathLike, like: Any, *, whole: bool = True) -> tuple[Any, dict[str, Any]]:
    """Read a pytree of arrays.

    Args:
        path: what `save_tree` wrote.
        like: a pytree of the same structure, shapes and types; of abstract arrays (`jax.eval_shape`) if one likes.
        whole: whether the file may hold nothing else.

    Returns:
        The tree, and what else was remembered.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or arrays are missing, too many, or of another shape or type; they are named.
    """
    arrays, about = _read(path)
    wanted = _named(like)
    found = {name: f"{a.dtype}{list(a.shape)}" for name, a in arrays.items()}
    expected = {name: f"{np.dtype(a.dtype)}{list(a.shape)}" for name, a in wanted.items()}
    differences = [
        f"`{name}` is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing of this name')}"
        for name in (*expected, *(found.keys() - expected.keys() if whole else ()))
        if found.get(name) != expected.get(name)
    ]
    if differences:
        more = [f".. and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
        raise ValueError(f"{path} does not fit: " + "; ".join([*sorted(differences)[:_SHOWN], *more]) + ".")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in wanted]), about


def _read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads((file.metadata() or {})["about"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a file that this library wrote: {error}.") from error


def _named(tree: Any) -> dict[str, Any]:
    """Return the leaves by path, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return {name: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for name, leaf in named.items()}
