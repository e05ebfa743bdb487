"""A decoder-only transformer in flax nnx, for one text at a time.

Symbols: T tokens, E hidden width, H query heads in Hkv groups of G, D head width, F feed-forward width, V vocabulary,
S prompt slots, C slots after the prompt. A block is

    x <- x + output(attention(norm(x)))                                                                         (1)
    x <- x + down(act(gate(norm(x))) * up(norm(x)))              or  down(act(up(norm(x))))                     (2)

(Vaswani et al. 2017, arXiv 1706.03762, with the norm before each half; gated: Shazeer 2020, arXiv 2002.05202; shared
key heads: Ainslie et al. 2023, arXiv 2305.13245; RMS norm: Zhang and Sennrich 2019, arXiv 1910.07467; rotary
positions: Su et al. 2021, arXiv 2104.09864.)

`forward` reads a whole text in parallel, `extend` one token against a `TextState`. Both are written for one text and
are pure; `jax.vmap` makes the population. Under it the weights and the prompt's cache have no particle axis, so that
every projection is one matrix product for all particles, and so are the scores against the prompt.

The blocks run as one loop that is compiled once (`ppl.models.layers`). Kernels are stored `[in, out]` and the embedding
table `[E, V]`: with their transposes products were a quarter slower. Queries, keys and values are one product, gate and
up another.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ppl.models.language.cache import TextState, write_slot
from ppl.models.language.config import DecoderConfig
from ppl.models.layers import over_layers, product, stack

__all__ = ["Block", "Decoder"]

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Linear(nnx.Module):
    """`x @ kernel + bias`, the kernel stored `[in, out]`."""

    def __init__(self, width_in: int, width_out: int, *, bias: bool, rngs: nnx.Rngs, dtype: Any):
        """Draw a kernel of standard deviation `width_in ** -0.5`; the bias starts at 0."""
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (width_in, width_out), dtype) * width_in**-0.5)
        self.bias = nnx.Param(jnp.zeros(width_out, dtype)) if bias else None

    def __call__(self, x: Float[Array, "*T in"]) -> Float[Array, "*T out"]:
        """Apply the map to the last axis."""
        y = product(x, self.kernel.get_value())
        return y if self.bias is None else y + self.bias[...]


class Norm(nnx.Module):
    """RMS norm `x / rms(x) * scale`, or layer norm with a bias; computed in float32."""

    def __init__(self, width: int, *, kind: str, eps: float, dtype: Any):
        """Start at scale 1 and bias 0."""
        self.kind, self.eps = kind, eps
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype)) if kind == "layer" else None

    def __call__(self, x: Float[Array, "*T E"]) -> Float[Array, "*T E"]:
        """Normalise the last axis."""
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y.astype(x.dtype) * self.scale[...]
        return y if self.bias is None else y + self.bias[...]


class Block(nnx.Module):
    """One layer: attention and feed-forward, equations (1) and (2)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any):
        """Draw random weights of the shapes that `config` gives."""
        c, hidden = config, config.hidden_size
        norm = dict(kind=c.norm, eps=c.norm_eps, dtype=dtype)
        heads = dict(kind="rms", eps=c.norm_eps, dtype=dtype)
        self.config = c
        self.attention_norm = Norm(hidden, **norm)
        width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self.qkv = Linear(hidden, width, bias=c.qkv_bias, rngs=rngs, dtype=dtype)
        self.query_norm = Norm(c.head_dim, **heads) if c.qk_norm else None
        self.key_norm = Norm(c.head_dim, **heads) if c.qk_norm else None
        self.output = Linear(c.num_heads * c.head_dim, hidden, bias=c.output_bias, rngs=rngs, dtype=dtype)
        self.mlp_norm = Norm(hidden, **norm)
        wide = c.intermediate_size * (2 if c.gated else 1)
        self.up = Linear(hidden, wide, bias=c.mlp_bias, rngs=rngs, dtype=dtype)
        self.down = Linear(c.intermediate_size, hidden, bias=c.mlp_bias, rngs=rngs, dtype=dtype)

    def project(
        self, x: Float[Array, "*T E"], rotation: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "*T Hkv G D"], Float[Array, "*T Hkv D"], Float[Array, "*T Hkv D"]]:
        """Queries (scaled by `D ** -0.5`), keys and values of the tokens, rotated to their positions."""
        c = self.config
        heads = self.qkv(self.attention_norm(x)).reshape(*x.shape[:-1], -1, c.head_dim)
        queries, keys, values = jnp.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads], axis=-2)
        if self.query_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if rotation is not None:
            queries, keys = _rotate(queries, rotation), _rotate(keys, rotation)
        queries = queries * c.head_dim**-0.5
        return queries.reshape(*x.shape[:-1], c.num_kv_heads, c.groups, c.head_dim), keys, values

    def finish(self, x: Float[Array, "*T E"], attended: Float[Array, "*T Hkv G D"]) -> Float[Array, "*T E"]:
        """Add the attention's output and the feed-forward half to the residual stream."""
        x = x + self.output(attended.reshape(*x.shape[:-1], -1))  # (1)
        wide = self.up(self.mlp_norm(x))
        activation = _ACTIVATIONS[self.config.activation]
        if self.config.gated:
            gate, up = jnp.split(wide, 2, axis=-1)
            return x + self.down(activation(gate) * up)  # (2)
        return x + self.down(activation(wide))


class Decoder(nnx.Module):
    """The network from tokens to the last hidden state, and the head from there to logits."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        """Build the network with random weights.

        Args:
            config: the shape.
            rngs: nnx random streams; `params` is used.
            dtype: of the weights, the hidden states and the caches.
        """
        c = config
        self.config = c

        def table(rows: int, columns: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), (rows, columns), dtype) * 0.02)

        self.embedding = table(c.hidden_size, c.vocab_size)
        self.positions = table(c.context_length, c.hidden_size) if c.positions == "learned" else None
        self.blocks = nnx.List([Block(c, rngs=rngs, dtype=dtype) for _ in range(c.num_layers)])
        self.final_norm = Norm(c.hidden_size, kind=c.norm, eps=c.norm_eps, dtype=dtype)
        self.head = None if c.tied_embeddings else table(c.hidden_size, c.vocab_size)

    def forward(
        self, tokens: Int[Array, "T"]
    ) -> tuple[Float[Array, "T E"], Float[Array, "L T Hkv D"], Float[Array, "L T Hkv D"]]:
        """Read a text in parallel, each token attending to itself and what is before it, or to all (`config.causal`).

        Args:
            tokens: the text, at positions 0 to T - 1; in a causal network what is padded at the end does not change
                what is before it.

        Returns:
            Hidden states after the final norm, and the keys and values of all layers.
        """
        positions = jnp.arange(tokens.shape[0])
        x, rotation = self._embed(tokens, positions)
        seen = (positions[:, None] >= positions) | (not self.config.causal)

        def read(block, layer, x, _):
            del layer
            queries, keys, values = block.project(x, rotation)
            scores = jnp.einsum("thgd,shd->hgts", queries, keys, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(x.dtype)
            return block.finish(x, jnp.einsum("hgts,shd->thgd", weights, values)), (keys, values)

        x, (keys, values) = over_layers(self.blocks, read, x)
        return self.final_norm(x), keys, values

    def extend(
        self, state: TextState, token: Int[Array, ""]
    ) -> tuple[Float[Array, "L C Hkv D"], Float[Array, "L C Hkv D"], Bool[Array, "C"], Float[Array, "E"]]:
        """Read one more token.

        Args:
            state: the text so far, with at least one free slot at `cursor`.
            token: the token, in [0, V).

        Returns:
            The state's new `keys`, `values`, `valid` and `hidden`. Beyond the slots or the context `hidden` is NaN:
            programs are refused before (`ppl.models.language.cache`), as far as what is traced lets it be known.

        Raises:
            ValueError: the network is not causal: another token changes what all others are read as.
        """
        if not self.config.causal:
            raise ValueError(
                f"a {self.config.architecture} network reads whole texts; it cannot be extended by a token."
            )
        x, rotation = self._embed(token, state.position)
        prompt_slots = state.prompt_keys.shape[1]
        slots = jnp.arange(state.slots)
        valid = state.valid | (slots == state.cursor)
        counts = jnp.concatenate([jnp.arange(prompt_slots) < state.prompt_length, valid])

        def read(block, layer, carry, prompt):
            x, keys, values = carry
            queries, key, value = block.project(x, rotation)
            # The write comes first and the read from what was written: in this order, layer after layer, the compiler
            # writes in place. Reading first needs a copy of the whole cache.
            keys = write_slot(keys, key, layer, state.cursor)
            values = write_slot(values, value, layer, state.cursor)
            own = (jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False) for cache in (keys, values))
            return (block.finish(x, _attend(queries, *prompt, *own, counts)), keys, values), None

        carry = x, state.keys, state.values
        (x, keys, values), _ = over_layers(self.blocks, read, carry, (state.prompt_keys, state.prompt_values))
        inside = (state.cursor < state.slots) & (state.position < self.config.context_length)
        hidden = jnp.where(inside, self.final_norm(x), jnp.nan)
        return keys, values, valid, hidden

    def stacked(self) -> "Decoder":
        """The same network with its blocks' parameters in one array each; see `ppl.models.layers`."""
        network = nnx.merge(*nnx.split(self))
        network.blocks = stack(self.blocks)
        return network

    def logits(self, hidden: Float[Array, "*T E"]) -> Float[Array, "*T V"]:
        """The next token's logits, float32, from hidden states after the final norm."""
        table = self.embedding if self.head is None else self.head
        return jnp.matmul(hidden, table[...], preferred_element_type=jnp.float32)

    def _embed(self, tokens: Int[Array, "*T"], positions: Int[Array, "*T"]) -> tuple[Array, tuple | None]:
        """The tokens' embeddings, and the rotation at their positions (None where positions are learned)."""
        x = jnp.moveaxis(jnp.take(self.embedding[...], tokens, axis=1, mode="clip"), 0, -1)
        if self.positions is not None:
            return x + jnp.take(self.positions[...], positions, axis=0, mode="clip"), None
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-np.arange(half) / half)
        if self.config.rope_divisors:
            frequencies = frequencies / np.array(self.config.rope_divisors)
        angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        # The product with the identity changes nothing but the schedule: XLA stores its operand, where it would
        # otherwise compute the cosines again in every head of every layer.
        waves = jnp.matmul(waves, jnp.eye(2 * half, dtype=jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return x, (waves[..., :half], waves[..., half:])


def _rotate(heads: Float[Array, "*T n D"], rotation: tuple[Array, Array]) -> Float[Array, "*T n D"]:
    """Turn the pairs `(i, i + D / 2)` of each head by the position's angles."""
    cosines, sines = (part[..., None, :] for part in rotation)
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    return turned.astype(heads.dtype)


def _attend(
    queries: Float[Array, "Hkv G D"],
    prompt_keys: Float[Array, "S Hkv D"],
    prompt_values: Float[Array, "S Hkv D"],
    keys: Float[Array, "C Hkv D"],
    values: Float[Array, "C Hkv D"],
    counts: Bool[Array, "S+C"],
) -> Float[Array, "Hkv G D"]:
    """One softmax over the shared prompt and one's own tokens; slots that do not count have weight 0."""
    to_prompt = jnp.einsum("hgd,shd->hgs", queries, prompt_keys, preferred_element_type=jnp.float32)
    to_own = jnp.einsum("hgd,chd->hgc", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(counts, jnp.concatenate([to_prompt, to_own], axis=-1), -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    on_prompt, on_own = jnp.split(weights.astype(values.dtype), [prompt_keys.shape[0]], axis=-1)
    mixed = jnp.einsum("hgs,shd->hgd", on_prompt, prompt_values, preferred_element_type=jnp.float32)
    mixed += jnp.einsum("hgc,chd->hgd", on_own, values, preferred_element_type=jnp.float32)
    return (mixed / total).astype(values.dtype)
