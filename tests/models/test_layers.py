"""Layers as one loop: the two ways to keep their matrices, and a Python loop, compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppl.models.language.config import DecoderConfig
from ppl.models.language.decoder import Decoder
from ppl.models.layers import over_layers, stack
from ppl.models.rewards.encoder import Encoder, EncoderConfig

SHAPE = dict(vocab_size=32, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, context_length=64)
FAMILIES = {
    "Llama": {},
    "Qwen2": dict(qkv_bias=True),
    "Qwen3": dict(qk_norm=True, tied_embeddings=True),
    "GPT-2": dict(norm="layer", gated=False, activation="gelu_tanh", positions="learned", mlp_bias=True, qkv_bias=True),
    "LLaDA": dict(causal=False),
}


def decoder(family):
    config = DecoderConfig(architecture=family, intermediate_size=24, **SHAPE, **FAMILIES[family])
    network = Decoder(config, rngs=nnx.Rngs(0))
    for index, block in enumerate(network.blocks):  # parameters that start alike must differ to be told apart
        block.mlp_norm.scale[...] *= 1.0 + 0.1 * index
    return network


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_matrices_and_separate_ones_read_alike(family):
    network, tokens = decoder(family), jnp.arange(10) % 7
    apart, together = (each.forward(tokens) for each in (network, network.stacked()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), apart, together)
    assert apart[1].shape == (3, 10, 2, 4)


def test_layers_run_in_order_each_with_its_own_parameters():
    network = decoder("Llama")
    x = jax.random.normal(jax.random.key(0), (5, 16))
    by_hand = x
    for block in network.blocks:
        by_hand = block.finish(by_hand, jnp.zeros((5, 2, 2, 4)))

    def body(block, index, x, given):
        return block.finish(x, jnp.zeros((5, 2, 2, 4))), (index, given)

    for layers in (network.blocks, stack(network.blocks)):
        found, (indices, given) = over_layers(layers, body, x, jnp.arange(3.0))
        np.testing.assert_allclose(found, by_hand, rtol=1e-6)
        np.testing.assert_array_equal(indices, given)


def test_a_population_and_its_derivatives_go_through_the_layers():
    network = decoder("Qwen3")
    x = jax.random.normal(jax.random.key(0), (4, 16))

    def norm(layers, x):
        return jnp.sum(over_layers(layers, lambda b, i, x, _: (b.finish(x, jnp.zeros((2, 2, 4))), None), x)[0] ** 2)

    gradients = [
        jax.vmap(jax.grad(lambda x, layers=layers: norm(layers, x)))(x)
        for layers in (network.blocks, stack(network.blocks))
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-4)


def test_a_sentence_encoder_reads_alike():
    config = EncoderConfig(
        vocab_size=32, hidden_size=16, num_layers=3, num_heads=4, intermediate_size=24, context_length=16
    )
    encoder, tokens = Encoder(config, rngs=nnx.Rngs(0)), jnp.arange(8)
    np.testing.assert_allclose(encoder(tokens, 6), encoder.stacked()(tokens, 6), rtol=1e-5, atol=1e-6)


def test_a_deep_network_is_as_much_to_compile_as_a_shallow_one():
    """The loop's body counts once; only the products to choose from grow with the layers."""

    def equations(num_layers):
        config = DecoderConfig(architecture="Llama", intermediate_size=24, **(SHAPE | dict(num_layers=num_layers)))
        jaxpr = jax.make_jaxpr(Decoder(config, rngs=nnx.Rngs(0)).stacked().forward)(jnp.arange(8)).jaxpr
        return count(jaxpr)

    def count(jaxpr):
        inner = [getattr(p, "jaxpr", p) for eqn in jaxpr.eqns for p in eqn.params.values()]
        return len(jaxpr.eqns) + sum(count(each) for each in inner if hasattr(each, "eqns"))

    assert equations(2) == equations(12)
