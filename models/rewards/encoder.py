"""A BERT encoder in flax nnx: from the pieces of one text to a unit vector.

Symbols: T pieces (word pieces and the two markers around them), n of them real and the rest padding, E hidden width,
H heads of width E / H, F feed-forward width, V vocabulary. The pieces' embeddings enter as

    x_t = norm(word[token_t] + position[t] + kind[0])                                                           (1)

and every layer, its norms after each half, maps

    x <- norm(x + output(attention(x))),      x <- norm(x + down(gelu(up(x))))                                  (2)

(Devlin et al. 2019, arXiv 1810.04805, sec. 3; the layers of Vaswani et al. 2017, arXiv 1706.03762, sec. 3.1), every
piece attending to all n real ones. The text's vector is the mean over them, scaled to length 1,

    e = m / |m|,    m = 1/n sum_(t < n) x_t                                                                     (3)

(Reimers and Gurevych 2019, arXiv 1908.10084, sec. 3), so that the dot product of two vectors is their cosine.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ppl.models.language.checkpoints import Tensors
from ppl.models.language.decoder import Linear, Norm
from ppl.models.language.settings import NEUTRAL_HF, Settings, refuse_what_is_not_carried_out
from ppl.models.layers import over_layers, stack

__all__ = ["Encoder", "EncoderConfig", "build_encoder"]

_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The shape of a BERT encoder.

    Attributes:
        vocab_size: number of pieces, V.
        hidden_size: width of the residual stream and of the text's vector, E.
        num_layers: number of layers.
        num_heads: attention heads, H; divides `hidden_size`.
        intermediate_size: width of the feed-forward layer, F.
        context_length: largest number of pieces, the two markers counted.
        num_kinds: rows of the table of segment kinds; the first is used.
        norm_eps: added to the variance.
        activation: a name of Hugging Face's: "gelu", "gelu_new", "gelu_pytorch_tanh" or "relu".
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    context_length: int
    num_kinds: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "config.json") -> "EncoderConfig":
        """Read the contents of a Hugging Face `config.json`.

        Args:
            config: the parsed file.
            source: what to call the file in messages.

        Returns:
            The description of the same network.

        Raises:
            ValueError: an architecture, activation or kind of positions that is not supported, a number of heads that
                does not divide the width, an entry that is missing or cannot be, or a setting that is not carried out.
        """
        file = Settings(config, source)
        for key, default, accepted in (
            ("model_type", None, ("bert",)),
            ("position_embedding_type", "absolute", ("absolute",)),
            ("hidden_act", "gelu", tuple(_ACTIVATIONS)),
            ("is_decoder", False, (False,)),
        ):
            if config.get(key, default) not in accepted:
                raise ValueError(
                    f"unknown architecture: `{key}` in {source} is {config.get(key, default)!r}; accepted for a "
                    f"sentence encoder: {', '.join(map(str, accepted))}."
                )
        refuse_what_is_not_carried_out(file, NEUTRAL_HF, ("is_causal", "causal"))
        hidden, heads = file.whole("hidden_size"), file.whole("num_attention_heads")
        if hidden % heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, got {hidden} and {heads} in {source}."
            )
        return cls(
            vocab_size=file.whole("vocab_size"),
            hidden_size=hidden,
            num_layers=file.whole("num_hidden_layers"),
            num_heads=heads,
            intermediate_size=file.whole("intermediate_size"),
            context_length=file.whole("max_position_embeddings"),
            num_kinds=file.whole("type_vocab_size", 2),
            norm_eps=file.number("layer_norm_eps", 1e-12, least=0),
            activation=config.get("hidden_act", "gelu"),
        )


class EncoderLayer(nnx.Module):
    """One layer, equation (2)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: Any):
        """Draw random weights of the shapes that `config` gives."""
        hidden, inner = config.hidden_size, config.intermediate_size
        linear, norm = dict(bias=True, rngs=rngs, dtype=dtype), dict(kind="layer", eps=config.norm_eps, dtype=dtype)
        self.num_heads, self.activation = config.num_heads, config.activation
        self.qkv = Linear(hidden, 3 * hidden, **linear)
        self.output = Linear(hidden, hidden, **linear)
        self.attention_norm = Norm(hidden, **norm)
        self.up = Linear(hidden, inner, **linear)
        self.down = Linear(inner, hidden, **linear)
        self.mlp_norm = Norm(hidden, **norm)

    def __call__(self, x: Float[Array, "T E"], length: Int[Array, ""]) -> Float[Array, "T E"]:
        """Apply the layer; what stands at `length` and after is attended to by nobody."""
        queries, keys, values = jnp.split(self.qkv(x).reshape(x.shape[0], 3 * self.num_heads, -1), 3, axis=1)
        scores = jnp.einsum("thd,shd->hts", queries * queries.shape[-1] ** -0.5, keys)
        scores = jnp.where(jnp.arange(x.shape[0]) < length, scores.astype(jnp.float32), -jnp.inf)
        attended = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, axis=-1).astype(x.dtype), values)
        x = self.attention_norm(x + self.output(attended.reshape(x.shape)))  # (2)
        return self.mlp_norm(x + self.down(_ACTIVATIONS[self.activation](self.up(x))))  # (2)


class Encoder(nnx.Module):
    """The network from pieces to a unit vector, for one text at a time; `jax.vmap` makes the batch."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        """Build the network with random weights.

        Args:
            config: the shape.
            rngs: nnx random streams; `params` is used.
            dtype: of the weights and hidden states.
        """
        c = config
        self.config = c

        def table(rows: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), (rows, c.hidden_size), dtype) * 0.02)

        self.words, self.positions, self.kinds = table(c.vocab_size), table(c.context_length), table(c.num_kinds)
        self.embedding_norm = Norm(c.hidden_size, kind="layer", eps=c.norm_eps, dtype=dtype)
        self.layers = nnx.List([EncoderLayer(c, rngs=rngs, dtype=dtype) for _ in range(c.num_layers)])

    def __call__(self, tokens: Int[Array, "T"], length: Int[Array, ""]) -> Float[Array, "E"]:
        """Embed one text.

        Args:
            tokens: its pieces, the markers included, and padding of any content; T at most the context.
            length: how many of them are real, in [1, T].

        Returns:
            A float32 vector of length 1.
        """
        x = jnp.take(self.words[...], tokens, axis=0, mode="clip")
        x = self.embedding_norm(x + self.positions[...][: tokens.shape[0]] + self.kinds[...][0])  # (1)
        x, _ = over_layers(self.layers, lambda layer, index, x, _: (layer(x, length), None), x)
        real = jnp.arange(tokens.shape[0]) < length
        mean = jnp.sum(jnp.where(real[:, None], x.astype(jnp.float32), 0.0), axis=0) / length
        return mean / jnp.linalg.norm(mean)  # (3)

    def stacked(self) -> "Encoder":
        """The same network with its layers' parameters in one array each; see `ppl.models.layers`."""
        network = nnx.merge(*nnx.split(self))
        network.layers = stack(self.layers)
        return network


def build_encoder(config: EncoderConfig, tensors: Tensors, *, dtype: Any) -> Encoder:
    """Make a network of a checkpoint's tensors, with the names of `transformers.BertModel`.

    Args:
        config: the shape.
        tensors: the checkpoint; the pooler that some carry is not used.
        dtype: of the weights on the device.

    Returns:
        The network, on the default device.

    Raises:
        ValueError: a tensor is missing, left over, or of a wrong shape; the message names it.
    """
    c, hidden = config, config.hidden_size

    def place(array: np.ndarray) -> jax.Array:
        return jnp.asarray(np.ascontiguousarray(array), dtype=dtype)

    def linear(names: tuple[str, ...], width_in: int, width_out: int) -> dict[str, Any]:
        kernels = [tensors.take(f"{name}.weight", (width_out, width_in)) for name in names]
        biases = [tensors.take(f"{name}.bias", (width_out,)) for name in names]
        return {"kernel": place(np.concatenate(kernels).T), "bias": place(np.concatenate(biases))}

    def norm(name: str) -> dict[str, Any]:
        return {part: place(tensors.take(f"{name}.{stored}", (hidden,))) for part, stored in _NORM.items()}

    def layer(name: str) -> dict[str, Any]:
        attention = f"{name}.attention.self"
        return {
            "qkv": linear((f"{attention}.query", f"{attention}.key", f"{attention}.value"), hidden, hidden),
            "output": linear((f"{name}.attention.output.dense",), hidden, hidden),
            "attention_norm": norm(f"{name}.attention.output.LayerNorm"),
            "up": linear((f"{name}.intermediate.dense",), hidden, c.intermediate_size),
            "down": linear((f"{name}.output.dense",), c.intermediate_size, hidden),
            "mlp_norm": norm(f"{name}.output.LayerNorm"),
        }

    weights = {
        "words": place(tensors.take("embeddings.word_embeddings.weight", (c.vocab_size, hidden))),
        "positions": place(tensors.take("embeddings.position_embeddings.weight", (c.context_length, hidden))),
        "kinds": place(tensors.take("embeddings.token_type_embeddings.weight", (c.num_kinds, hidden))),
        "embedding_norm": norm("embeddings.LayerNorm"),
        "layers": {index: layer(f"encoder.layer.{index}") for index in range(c.num_layers)},
    }
    tensors.finish(lambda name: name.startswith("pooler.") or name == "embeddings.position_ids")
    abstract = nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)


_NORM = {"scale": "weight", "bias": "bias"}
