"""The denoising networks: shapes, classes, and the parts that can be checked against another form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppl.models.diffusion import networks
from ppl.models.diffusion.networks import ConvolutionalDenoiser, TransformerDenoiser
from ppl.models.diffusion.schedules import VarianceExploding

BUILDS = {
    "convolutional": lambda shape, **more: ConvolutionalDenoiser(shape, channels=(4, 8), **more),
    "transformer": lambda shape, **more: TransformerDenoiser(shape, width=8, num_layers=1, num_heads=2, **more),
}
build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())


def awake(build, shape=(4, 4), **more):
    """A network with random weights in all maps, those that start at 0 as well."""
    graph, weights = nnx.split(nnx.eval_shape(lambda: build(shape, **more)))
    rng = np.random.default_rng(5)
    weights = jax.tree.map(lambda w: jnp.asarray(0.5 * rng.normal(size=w.shape), jnp.float32), weights)
    return nnx.merge(graph, weights)


def image(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@nnx.jit
def call(network, x, t, label=None):
    return network(x, t, label=label)


@build
@pytest.mark.parametrize("shape", [(4, 4), (4, 8, 3)])
def test_a_network_returns_the_shape_of_its_input_and_starts_at_zero(build, shape):
    fresh = jax.jit(lambda x: build(shape)(x, 0.3))
    assert np.array_equal(fresh(image(shape)), np.zeros(shape))
    output = call(awake(build, shape), image(shape), 0.3)
    assert output.shape == shape and output.dtype == jnp.float32
    assert np.all(np.isfinite(output)) and np.std(output) > 0.01


@build
def test_no_label_is_the_class_after_the_last_and_every_label_is_another(build):
    network, x = awake(build, num_classes=3), image((4, 4))
    outputs = [np.asarray(call(network, x, 0.3, label)) for label in range(4)]
    np.testing.assert_array_equal(outputs[3], call(network, x, 0.3))
    for i in range(4):
        for j in range(i):
            assert np.max(np.abs(outputs[i] - outputs[j])) > 1e-3


@build
def test_a_batch_by_vmap_is_one_by_one(build):
    network = awake(build, num_classes=3)
    x, t, labels = image((5, 4, 4)), jnp.linspace(0.0, 1.0, 5), jnp.array([0, 2, 1, 3, 0])
    together = jax.jit(jax.vmap(lambda x, t, label: network(x, t, label=label)))(x, t, labels)
    for i in range(5):
        np.testing.assert_allclose(together[i], call(network, x[i], t[i], labels[i]), rtol=2e-5, atol=2e-5)


@build
def test_time_matters_at_both_ends(build):
    network, x = awake(build), image((4, 4))
    for t, later in ((0.0, 0.005), (0.5, 0.55), (0.995, 1.0)):
        assert np.max(np.abs(call(network, x, t) - call(network, x, later))) > 1e-4


@build
def test_a_schedule_scales_the_input(build):
    schedule = VarianceExploding(0.01, 100.0)
    plain, scaled = awake(build), awake(build, schedule=schedule)
    x = 100.0 * image((4, 4))
    np.testing.assert_allclose(
        call(scaled, x, 1.0), call(plain, x / np.sqrt(1.0 + 100.0**2), 1.0), rtol=1e-4, atol=1e-5
    )


def test_a_convolution_is_that_of_xla():
    ours = networks._Convolution(3, 5, nnx.Rngs(0))
    x = image((6, 4, 3))
    kernel = ours.linear.kernel[...].reshape(3, 3, 3, 5)
    dimensions = ("NHWC", "HWIO", "NHWC")
    theirs = jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=dimensions)[0]
    np.testing.assert_allclose(ours(x), theirs, rtol=1e-5, atol=1e-5)


def test_patches_hold_neighbours_and_go_back():
    x = jnp.arange(4 * 6 * 2).reshape(4, 6, 2)
    patches = networks._to_patches(x, 2)
    np.testing.assert_array_equal(patches[1, 2], x[2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(networks._from_patches(patches, 2), x)


@build
def test_a_traced_label_that_is_no_class_gives_nan(build):
    network, x = awake(build, num_classes=3), image((4, 4))
    assert np.all(np.isfinite(call(network, x, 0.3, 3))) and np.all(np.isnan(call(network, x, 0.3, 4)))


@build
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=np.zeros((4, 5)), t=0.1), r"`x` must be one image of shape \(4, 4\), got shape \(4, 5\)"),
        (dict(x=np.zeros((2, 4, 4)), t=0.1), "map over more by vmap"),
        (dict(x=np.zeros((4, 4)), t=0.1, label=4), r"`label` must be in \[0, 3\), or 3 or None for no class, got 4"),
        (dict(x=np.zeros((4, 4)), t=0.1, label=-1), "`label` must be in"),
        (dict(x=np.zeros((4, 4)), t=0.1, label=1.0), "`label` must be one whole number"),
        (dict(x=np.zeros((4, 4)), t=0.1, label=np.zeros(2, int)), "`label` must be one whole number"),
    ],
)
def test_a_bad_input_is_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        awake(build, num_classes=3)(**arguments)


@build
def test_a_label_without_classes_is_refused(build):
    with pytest.raises(ValueError, match="built without classes"):
        awake(build)(np.zeros((4, 4)), 0.1, label=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvolutionalDenoiser((6, 6), channels=(4, 4, 4)), "`shape` must be a multiple of 4"),
        (lambda: ConvolutionalDenoiser((8,)), r"`shape` must be \(height, width\)"),
        (lambda: ConvolutionalDenoiser(8), r"`shape` must be \(height, width\)"),
        (lambda: ConvolutionalDenoiser((8, 0)), r"`shape` must be \(height, width\)"),
        (lambda: ConvolutionalDenoiser((8, 8), channels=()), "`channels` must name at least one level"),
        (lambda: ConvolutionalDenoiser((8, 8), channels=(0,)), "`channels` must be a whole number of at least 1"),
        (lambda: ConvolutionalDenoiser((8, 8), num_blocks=0), "`num_blocks` must be a whole number"),
        (lambda: ConvolutionalDenoiser((8, 8), num_classes=2.5), "`num_classes` must be a whole number"),
        (lambda: TransformerDenoiser((8, 8), patch_size=3), "`shape` must be a multiple of 3"),
        (lambda: TransformerDenoiser((8, 8), width=10, num_heads=4), "`width` must be a multiple of 4"),
        (lambda: TransformerDenoiser((8, 8), num_layers=0), "`num_layers` must be a whole number"),
    ],
)
def test_a_bad_size_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
