"""Small networks that denoise: a convolutional one with levels, and a transformer.

Each sees one image x at one time t in [0, 1], and where it was built with classes the label of one, or None for no
class. Whatever it predicts has the shape of x. Level and class enter as one vector e, by which each block modulates
what it has normalised:

    (1)  e = W_2 silu(W_1 [cos w t, sin w t]) + E[label],    w = 1000 * 10^(-4 i / n) for i = 0 .. n - 1
    (2)  modulate(h) = (1 + a(e)) * normalise(h) + b(e),     a and b linear maps of silu(e), one pair for each block

The last maps of each block and of the network start at 0: a block starts as the identity, and the network as 0.

A convolution is written as a product of the 3 by 3 neighbourhoods with a matrix. That is the fast form on a CPU, where
XLA's own convolution is about thirty times slower inside a loop, which is where every sampler calls the network.

Source: Ronneberger, Fischer and Brox 2015 (arXiv 1505.04597) and Ho, Jain and Abbeel 2020 (arXiv 2006.11239), appendix
B, for the levels; (2) is that of Peebles and Xie 2023 (arXiv 2212.09748), section 3.2, where each block ends in a gate
as well.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

__all__ = ["ConvolutionalDenoiser", "TransformerDenoiser"]

_ZEROS = nnx.initializers.zeros


class _Denoiser(nnx.Module):
    """What the networks share: the shape of an image, the classes, and the vector of level and class."""

    def __init__(self, shape, num_classes, schedule, width: int, rngs: nnx.Rngs):
        self.shape = _require_shape(shape)
        self.num_classes = None if num_classes is None else _require_count("num_classes", num_classes)
        self.schedule = schedule
        self.embedding = _Embedding(width, self.num_classes, rngs)

    def _enter(self, x, t, label) -> tuple[Array, Array]:
        """Return the image as `[H, W, C]`, scaled, and silu of the vector of (1)."""
        x = jnp.asarray(x)
        if x.shape != self.shape:
            raise ValueError(
                f"`x` must be one image of shape {self.shape}, got shape {x.shape}; map over more by vmap."
            )
        if self.schedule is not None:
            x = x * jax.lax.rsqrt(self.schedule.alpha(t) ** 2 + self.schedule.sigma(t) ** 2)
        return x.reshape(*x.shape[:2], -1), nnx.silu(self.embedding(t, self._index(label)))

    def _index(self, label):
        """Return the row of the table of classes; the one after the last is that of no class."""
        if self.num_classes is None:
            if label is not None:
                raise ValueError(f"`label` is {label!r}, but the network was built without classes (`num_classes`).")
            return None
        label = self.num_classes if label is None else label
        if jnp.ndim(label) != 0 or not jnp.issubdtype(jnp.result_type(label), jnp.integer):
            raise ValueError(f"`label` must be one whole number or None, got {label!r}.")
        known = isinstance(label, numbers.Integral | np.generic)
        if known and not 0 <= label <= self.num_classes:
            raise ValueError(
                f"`label` must be in [0, {self.num_classes}), or {self.num_classes} or None for no class, got {label}."
            )
        return label


class ConvolutionalDenoiser(_Denoiser):
    """A convolutional network that goes down to smaller images and up again, with connections across."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        num_classes: int | None = None,
        channels: tuple[int, ...] = (32, 64),
        num_blocks: int = 1,
        schedule: Any = None,
        seed: int = 0,
    ):
        """Build the network.

        Args:
            shape: of an image, `(H, W)` or `(H, W, C)`.
            num_classes: how many classes there are; None for a network that takes no label.
            channels: at each level; each level after the first has half the height and half the width.
            num_blocks: residual blocks of two convolutions at each level, on the way down and on the way up.
            schedule: where given, x is divided by sqrt(alpha^2 + sigma^2). Needed where sigma grows far above 1.
            seed: of the weights.

        Raises:
            ValueError: a size is not positive, or height or width cannot be halved that often.
        """
        channels = tuple(_require_count("channels", c) for c in channels)
        _require_count("num_blocks", num_blocks)
        if not channels:
            raise ValueError("`channels` must name at least one level.")
        rngs, width = nnx.Rngs(seed), 4 * channels[0]
        _require_multiple(
            "shape", _require_shape(shape), 2 ** (len(channels) - 1), "to be halved at each level of `channels`"
        )
        super().__init__(shape, num_classes, schedule, width, rngs)
        depth = math.prod(self.shape[2:])

        def blocks(size: int) -> nnx.List:
            return nnx.List([_Block(size, width, rngs) for _ in range(num_blocks)])

        upper = list(zip(channels[:-1], channels[1:], strict=True))
        self.inlet = _Convolution(depth, channels[0], rngs)
        self.down = nnx.List([blocks(c) for c in channels[:-1]])
        self.merge = nnx.List([nnx.Linear(4 * fine, coarse, rngs=rngs) for fine, coarse in upper])
        self.bottom = nnx.List([*blocks(channels[-1]), *blocks(channels[-1])])
        self.split = nnx.List([nnx.Linear(coarse, 4 * fine, rngs=rngs) for fine, coarse in upper])
        self.up = nnx.List([blocks(c) for c in channels[:-1]])
        self.norm = nnx.RMSNorm(channels[0], rngs=rngs)
        self.outlet = _Convolution(channels[0], depth, rngs, zero=True)

    def __call__(
        self, x: Float[ArrayLike, "*shape"], t: Float[ArrayLike, ""], label: Int[ArrayLike, ""] | None = None
    ) -> Float[Array, "*shape"]:
        """Return the prediction for one image.

        Args:
            x: one noisy image, of the network's shape.
            t: its time, in [0, 1], 1 = noise.
            label: its class, in [0, num_classes); num_classes or None for no class.

        Raises:
            ValueError: `x` has another shape, or `label` is not one of the classes. A traced label that is none of them
                gives NaN.
        """
        h, e = self._enter(x, t, label)
        h, across = self.inlet(h), []
        for blocks, merge in zip(self.down, self.merge, strict=True):
            h = _apply(blocks, h, e)
            across.append(h)
            h = merge(_to_patches(h, 2))
        h = _apply(self.bottom, h, e)
        for blocks, split in reversed(list(zip(self.up, self.split, strict=True))):
            h = _apply(blocks, across.pop() + _from_patches(split(h), 2), e)
        return self.outlet(nnx.silu(self.norm(h))).reshape(self.shape)


class TransformerDenoiser(_Denoiser):
    """A transformer over the patches of an image."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        num_classes: int | None = None,
        patch_size: int = 2,
        width: int = 96,
        num_layers: int = 4,
        num_heads: int = 4,
        schedule: Any = None,
        seed: int = 0,
    ):
        """Build the network.

        Args:
            shape: of an image, `(H, W)` or `(H, W, C)`.
            num_classes: how many classes there are; None for a network that takes no label.
            patch_size: height and width of a patch, pixels.
            width: of the vector that stands for a patch.
            num_layers: each of attention between all patches and a map of each patch on its own.
            num_heads: of attention; must divide `width`.
            schedule: where given, x is divided by sqrt(alpha^2 + sigma^2). Needed where sigma grows far above 1.
            seed: of the weights.

        Raises:
            ValueError: a size is not positive, or does not divide what it must.
        """
        sizes = {"patch_size": patch_size, "width": width, "num_layers": num_layers, "num_heads": num_heads}
        for name, value in sizes.items():
            _require_count(name, value)
        _require_multiple("width", (width,), num_heads, "`num_heads`")
        _require_multiple("shape", _require_shape(shape), patch_size, "`patch_size`")
        rngs = nnx.Rngs(seed)
        super().__init__(shape, num_classes, schedule, width, rngs)
        self.patch_size = patch_size
        pixels = patch_size**2 * math.prod(self.shape[2:])
        patches = math.prod(side // patch_size for side in self.shape[:2])
        self.inlet = nnx.Linear(pixels, width, rngs=rngs)
        self.positions = nnx.Param(0.5 * jax.random.normal(rngs.params(), (patches, width)))
        self.layers = nnx.List([_Layer(width, num_heads, rngs) for _ in range(num_layers)])
        self.norm = _Modulation(width, width, rngs)
        self.outlet = nnx.Linear(width, pixels, kernel_init=_ZEROS, rngs=rngs)

    def __call__(
        self, x: Float[ArrayLike, "*shape"], t: Float[ArrayLike, ""], label: Int[ArrayLike, ""] | None = None
    ) -> Float[Array, "*shape"]:
        """Return the prediction for one image.

        Args:
            x: one noisy image, of the network's shape.
            t: its time, in [0, 1], 1 = noise.
            label: its class, in [0, num_classes); num_classes or None for no class.

        Raises:
            ValueError: `x` has another shape, or `label` is not one of the classes. A traced label that is none of them
                gives NaN.
        """
        h, e = self._enter(x, t, label)
        patches = _to_patches(h, self.patch_size)
        h = self.inlet(patches.reshape(-1, patches.shape[-1])) + self.positions[...]
        h = self.outlet(self.norm(_apply(self.layers, h, e), e))
        return _from_patches(h.reshape(patches.shape), self.patch_size).reshape(self.shape)


class _Embedding(nnx.Module):
    """The vector of (1)."""

    def __init__(self, width: int, num_classes: int | None, rngs: nnx.Rngs):
        self.frequencies = tuple(float(w) for w in 1000.0 * 10.0 ** (-4.0 * np.arange(16) / 16))
        self.first = nnx.Linear(2 * len(self.frequencies), width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        if num_classes is not None:
            self.classes = nnx.Param(jax.random.normal(rngs.params(), (num_classes + 1, width)))

    def __call__(self, t, index) -> Array:
        angles = jnp.asarray(t, jnp.float32) * jnp.asarray(self.frequencies, jnp.float32)
        e = self.second(nnx.silu(self.first(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]))))
        return e if index is None else e + self.classes[...].at[index].get(mode="fill", fill_value=jnp.nan)


class _Modulation(nnx.Module):
    """The map (2)."""

    def __init__(self, size: int, width: int, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(size, use_scale=False, rngs=rngs)
        self.linear = nnx.Linear(width, 2 * size, kernel_init=_ZEROS, rngs=rngs)

    def __call__(self, h, e) -> Array:
        a, b = jnp.split(self.linear(e), 2)
        return self.norm(h) * (1.0 + a) + b


class _Convolution(nnx.Module):
    """A 3 by 3 convolution with zeros around the image."""

    def __init__(self, size: int, size_out: int, rngs: nnx.Rngs, *, zero: bool = False):
        options = {"kernel_init": _ZEROS} if zero else {}
        self.linear = nnx.Linear(9 * size, size_out, rngs=rngs, **options)

    def __call__(self, h) -> Array:
        height, width, _ = h.shape
        h = jnp.pad(h, ((1, 1), (1, 1), (0, 0)))
        return self.linear(jnp.concatenate([h[i : i + height, j : j + width] for i in range(3) for j in range(3)], -1))


class _Block(nnx.Module):
    """Two convolutions, added to what came in."""

    def __init__(self, size: int, width: int, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(size, rngs=rngs)
        self.first = _Convolution(size, size, rngs)
        self.modulation = _Modulation(size, width, rngs)
        self.second = _Convolution(size, size, rngs, zero=True)

    def __call__(self, h, e) -> Array:
        return h + self.second(nnx.silu(self.modulation(self.first(nnx.silu(self.norm(h))), e)))


class _Layer(nnx.Module):
    """Attention between all patches, then a map of each, both added to what came in."""

    def __init__(self, width: int, num_heads: int, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.before, self.between = _Modulation(width, width, rngs), _Modulation(width, width, rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.mix = nnx.Linear(width, width, kernel_init=_ZEROS, rngs=rngs)
        self.widen = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, kernel_init=_ZEROS, rngs=rngs)

    def __call__(self, h, e) -> Array:
        q, k, v = (part.reshape(len(h), self.num_heads, -1) for part in jnp.split(self.qkv(self.before(h, e)), 3, -1))
        h = h + self.mix(jax.nn.dot_product_attention(q, k, v).reshape(h.shape))
        return h + self.narrow(nnx.silu(self.widen(self.between(h, e))))


def _apply(blocks, h, e) -> Array:
    for block in blocks:
        h = block(h, e)
    return h


def _to_patches(h, size: int) -> Array:
    """Return `[H / size, W / size, size * size * C]`."""
    height, width, depth = h.shape
    h = h.reshape(height // size, size, width // size, size, depth)
    return h.transpose(0, 2, 1, 3, 4).reshape(height // size, width // size, -1)


def _from_patches(h, size: int) -> Array:
    """Return `[H, W, C]`: the inverse of `_to_patches`."""
    height, width, _ = h.shape
    return h.reshape(height, width, size, size, -1).transpose(0, 2, 1, 3, 4).reshape(height * size, width * size, -1)


def _require_shape(shape) -> tuple[int, ...]:
    shape = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    whole = all(isinstance(side, numbers.Integral) and not isinstance(side, bool) and side >= 1 for side in shape)
    if len(shape) not in (2, 3) or not whole:
        raise ValueError(f"`shape` must be (height, width) or (height, width, channels), got {shape}.")
    return tuple(int(side) for side in shape)


def _require_count(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
    return int(value)


def _require_multiple(name: str, sizes: tuple[int, ...], divisor: int, why: str) -> None:
    if any(size % divisor for size in sizes[:2]):
        raise ValueError(f"`{name}` must be a multiple of {divisor} ({why}), got {sizes}.")
