"""Drawing one value for each particle from one key.

A sampler is a program from (parameters, key) to a value. Giving each particle a key of its own costs more than the
draws do: at 16,384 particles twice the time of the random bits. The sampler is instead run once for the population, on
a shared key, and each request for random bits is answered with bits for all particles:

    bits = random_bits(key, shape)    becomes    bits = random_bits(key, (num_particles, *shape))

Bits of one key are independent, so the particles' values are. That reading needs every random bit to come from a key
that is the same for all particles. Samplers where it does not (rejection loops, keys derived from data, callbacks) get
a key for each particle.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from ppl.dataflow import stretch_flags
from ppl.ir import Apply, Block, Literal, Stretch

__all__ = ["as_key", "draw", "draw_population"]

# What may be done with a key, or with an array of keys, and still leave it the same for all particles.
_KEY_OPERATIONS = {
    "random_wrap", "random_unwrap", "random_split", "random_fold_in", "random_clone", "random_bits",
    "slice", "squeeze", "reshape", "dynamic_slice", "broadcast_in_dim", "gather", "transpose", "concatenate",
}  # fmt: skip


def as_key(seed):
    """Return the PRNG key of a seed: an int, a typed key, or the raw data of one (`uint32[..., 2]`).

    Raises:
        TypeError: it is neither.
        ValueError: an int that a key has no room for, which would be another seed's.
    """
    dtype, shape = getattr(seed, "dtype", None), getattr(seed, "shape", ())
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return seed
    if dtype is not None and shape:
        if dtype == jnp.uint32 and shape[-1] == 2:
            return jax.random.wrap_key_data(seed)
        raise TypeError(f"a seed is an int or a PRNG key, got {dtype}[{','.join(map(str, shape))}].")
    whole = isinstance(seed, numbers.Integral) if dtype is None else jnp.issubdtype(dtype, jnp.integer)
    if not whole or isinstance(seed, bool):
        shown = f"a value of type {dtype}" if isinstance(seed, jax.core.Tracer) else repr(seed)
        raise TypeError(f"a seed is an int or a PRNG key such as jax.random.key(0), got {shown}.")
    if not isinstance(seed, jax.Array):
        bits = 63 if jax.config.jax_enable_x64 else 32
        low, high = -(2**31), 2**bits - 1
        if not low <= int(seed) <= high:
            raise ValueError(f"a seed is an int from {low} to {high}, got {seed}; take seed % 2**{bits}.")
        return jax.random.key(int(seed))
    return jax.random.key(seed)


def draw(sampler: Block, parameters, key):
    """Draw one value."""
    return _run(sampler, [*parameters, key])


def draw_population(sampler: Block, parameters, random: tuple[bool, ...], key, num_particles: int):
    """Draw one value for each particle.

    Args:
        sampler: maps (parameters..., key) to a value.
        parameters: its parameters; those that differ between particles have a leading particle axis.
        random: which ones do.
        key: one key.
        num_particles: how many values.

    Returns:
        Values, `[num_particles, ...]`, independent given the parameters.
    """
    if not _shares_key(sampler):
        keys = jax.random.split(key, num_particles)
        in_axes = tuple(0 if flag else None for flag in (*random, True))
        return jax.vmap(lambda *args: _run(sampler, args), in_axes, axis_size=num_particles)(*parameters, keys)
    values = dict(zip(sampler.inputs, [*parameters, key], strict=True))
    flags = dict(zip(sampler.inputs, [*random, False], strict=True))
    for stretch in _between_bits(sampler):
        if stretch.nodes[0].primitive.name == "random_bits":
            (node,) = stretch.nodes
            (keys,) = (values[a] for a in node.inputs)
            params = node.params | {"shape": (num_particles, *node.params["shape"])}
            bits = node.primitive.bind(keys, **node.primitive.get_bind_params(params))
            values[node.outputs[0]], flags[node.outputs[0]] = jnp.moveaxis(bits, keys.ndim, 0), True
            continue
        operands, in_flags = [values[v] for v in stretch.inputs], [flags[v] for v in stretch.inputs]
        out_flags = stretch_flags(stretch, dict(zip(stretch.inputs, in_flags, strict=True)))
        if any(in_flags):
            axes = [[0 if flag else None for flag in group] for group in (in_flags, out_flags)]
            results = jax.vmap(stretch, tuple(axes[0]), axes[1], axis_size=num_particles)(*operands)
        else:
            results = stretch(*operands)
        values.update(zip(stretch.outputs, results, strict=True))
        flags.update(zip(stretch.outputs, out_flags, strict=True))
    (out,) = sampler.outputs
    value, flag = (out.value, False) if isinstance(out, Literal) else (values[out], flags[out])
    return value if flag else jnp.broadcast_to(value, (num_particles, *jnp.shape(value)))


def _run(block: Block, args):
    values = dict(zip(block.inputs, args, strict=True))
    for stretch in block.segments:
        values.update(zip(stretch.outputs, stretch(*(values[v] for v in stretch.inputs)), strict=True))
    (out,) = block.outputs
    return jnp.asarray(out.value) if isinstance(out, Literal) else values[out]


def _once(function: Callable) -> Callable:
    """Keep what a function finds out about a block with the block."""

    def kept(block: Block):
        if function.__name__ not in vars(block):
            vars(block)[function.__name__] = function(block)
        return vars(block)[function.__name__]

    return kept


@_once
def _shares_key(block: Block) -> bool:
    """Whether every random bit comes from the shared key through operations that keep it shared."""
    keyed = {block.inputs[-1]}
    for node in block.nodes:
        if not isinstance(node, Apply):
            return False
        name, touches = node.primitive.name, keyed.intersection(a for a in node.inputs if isinstance(a, int))
        if touches:
            others = [a for a in node.inputs if isinstance(a, int) and a not in keyed]
            if name not in _KEY_OPERATIONS or others:
                return False
            if name != "random_bits":
                keyed.update(node.outputs)
        elif name.startswith(("random_", "threefry")) or _draws_inside(node):
            return False
    return True


def _draws_inside(node: Apply) -> bool:
    return any(
        eqn.primitive.name.startswith(("random_", "threefry")) or _draws_inside(eqn)
        for inner in jex.jaxprs_in_params(node.params)
        for eqn in getattr(inner, "jaxpr", inner).eqns
    )


@_once
def _between_bits(block: Block) -> tuple[Stretch, ...]:
    """Cut a sampler at its requests for bits."""
    runs: list[list[Apply]] = []
    for node in block.nodes:
        if node.primitive.name == "random_bits" or not runs or runs[-1][0].primitive.name == "random_bits":
            runs.append([node])
        else:
            runs[-1].append(node)
    stretches, needed = [], {a for a in block.outputs if isinstance(a, int)}
    for run in reversed(runs):
        defined = [v for node in run for v in node.outputs]
        inputs = dict.fromkeys(a for node in run for a in node.inputs if isinstance(a, int) and a not in defined)
        outputs = tuple(v for v in defined if v in needed)
        if outputs:
            stretches.append(Stretch(tuple(run), tuple(inputs), outputs))
            needed.update(inputs)
    return tuple(reversed(stretches))
