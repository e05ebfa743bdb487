"""Equal layers one after another, compiled once.

    carry, y_i = layer_i(carry, x_i),    i = 0 .. L - 1                                                             (1)

As a Python loop (1) is L copies of a layer to the compiler, and a deep network takes it seconds. Here it is one
`lax.scan` whose body holds everything once. What differs between the layers is their parameters. Norms and biases are
small: they are stacked, and the scan slices them. Matrices are not moved, in one of two ways:

    one array a layer      lax.switch(i, [x @ W_0, ..., x @ W_(L-1)])                                                (2)
    one array for all      x @ W[i]                                                                                 (3)

A product wants its operand in one piece. On a CPU (3) copies a layer's weights in every step, and (2) copies nothing: a
branch costs a jump. On an accelerator (3) is a slice that the product reads through, and (2) may cost a round trip to
the host. So networks are kept as (2) on CPUs and as (3) elsewhere, see `for_device`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

__all__ = ["for_device", "over_layers", "product", "stack"]


@dataclasses.dataclass(frozen=True)
class _OneOf:
    """The matrix of layer `index`, among those of all layers: what (2) chooses from."""

    index: Int[Array, ""]
    matrices: tuple[Float[Array, "in out"], ...]


def product(x: Float[Array, "*T in"], matrix: Any) -> Float[Array, "*T out"]:
    """Multiply by a layer's matrix: an array, or one of many inside of `over_layers`."""
    if not isinstance(matrix, _OneOf):
        return x @ matrix
    return jax.lax.switch(matrix.index, [lambda x, each=each: x @ each for each in matrix.matrices], x)


def over_layers(layers: nnx.List | nnx.Module, body: Callable[..., tuple[Any, Any]], carry: Any, xs: Any = None) -> Any:
    """Run a body over equal layers, (1).

    Args:
        layers: a list of layers of one shape, or the one layer that `stack` makes of it.
        body: maps `(layer, index, carry, x)` to `(carry, y)`; the layer's matrices are for `product` alone.
        carry: what goes from layer to layer, a pytree of arrays.
        xs: what each layer is given, a pytree of arrays with a leading axis L.

    Returns:
        The last carry, and the layers' y with a leading axis L.
    """
    if isinstance(layers, nnx.List):
        graph = nnx.graphdef(layers[0])
        states = [nnx.state(layer) for layer in layers]
        tree = jax.tree.structure(states[0])
        columns = list(zip(*(jax.tree.leaves(state) for state in states), strict=True))
        length = len(states)
    else:
        graph, state = nnx.split(layers)
        leaves, tree = jax.tree.flatten(state)
        columns, length = leaves, leaves[0].shape[0]
    apart = [isinstance(column, tuple) and column[0].ndim > 1 for column in columns]
    sliced = [
        None if alone else jnp.stack(column) if isinstance(column, tuple) else column
        for column, alone in zip(columns, apart, strict=True)
    ]

    def step(carry, given):
        index, slices, x = given
        leaves = [
            _OneOf(index, column) if alone else part for column, alone, part in zip(columns, apart, slices, strict=True)
        ]
        return body(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), index, carry, x)

    return jax.lax.scan(step, carry, (jnp.arange(length, dtype=jnp.int32), sliced, xs), length=length)


def stack(layers: nnx.List) -> nnx.Module:
    """Make one layer of a list: each of its parameters has a leading axis L, (3)."""
    graph, first = nnx.split(layers[0])
    columns = zip(*(jax.tree.leaves(nnx.state(layer)) for layer in layers), strict=True)
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(first), [jnp.stack(column) for column in columns]))


def for_device(network: Any) -> Any:
    """Return a network whose layers are kept as the default device wants them; see above.

    Args:
        network: a module with a method `stacked()`, which returns it as (3).
    """
    return network if jax.default_backend() == "cpu" else network.stacked()
