"""Kernels for GPUs: interpreted on a CPU against the plain forms, and lowered for CUDA. Neither shows them at work."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from ppl.kernels import pallas
from ppl.kernels.moves import gather, survivors_stay
from ppl.kernels.moves import move as plain_move
from ppl.kernels.resampling import RESAMPLERS, systematic
from ppl.kernels.tokens import block_width, sample_tokens

interpreted = jax.jit(functools.partial(pallas.systematic, interpret=True), static_argnums=2)
plain = jax.jit(systematic, static_argnums=2)
move = jax.jit(functools.partial(pallas.move, interpret=True), static_argnums=2)
sample = jax.jit(functools.partial(pallas.sample_tokens, interpret=True))
sample_plainly = jax.jit(sample_tokens)
INF = np.inf


def lower_for_cuda(function, *arguments):
    """Pallas translates every kernel to Triton; what Triton and a GPU make of that is not seen here."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def count_kernels(text):
    return text.count("custom_call @__gpu$xla.gpu.triton(")


class Block:
    """A part of the memory, in which a kernel may read and write; what lies beyond is an error, as it is on a GPU."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __getitem__(self, index):
        return jnp.asarray(self.values[index])

    def __setitem__(self, index, values):
        self.values[index] = values

    @property
    def at(self):
        return At(self)

    def place(self, index, mask):
        *index, mask = np.broadcast_arrays(*(index if isinstance(index, tuple) else (index,)), mask)
        index = tuple(i[mask] for i in index)
        assert all((i >= 0).all() and (i < size).all() for i, size in zip(index, self.shape, strict=True))
        return index, mask


class At:
    def __init__(self, block):
        self.block = block

    def __getitem__(self, index):
        return self.block, index


def load(where, *, mask, other=0):
    index, mask = where[0].place(where[1], mask)
    values = np.full(mask.shape, other, where[0].dtype)
    values[mask] = where[0].values[index]
    return jnp.asarray(values)


def store(where, values, *, mask):
    index, mask = where[0].place(where[1], mask)
    where[0].values[index] = np.asarray(values)[mask]


@pytest.fixture
def checked_memory(monkeypatch):
    """Runs kernels in NumPy, one program after another in a random order; the memory that they write is returned.

    In interpret mode what is written beyond an array is dropped, and every program sees the arrays as they were.
    """

    def pallas_call(kernel, *, grid, in_specs, out_specs, out_shape, input_output_aliases=None, **_):
        def cut(values, spec, program):
            starts = zip(spec.block_shape, spec.index_map(*program), strict=True)
            part = values[tuple(i if size is None else slice(i * size, (i + 1) * size) for size, i in starts)]
            assert part.shape == tuple(size for size in spec.block_shape if size is not None)
            return Block(part)

        def call(*arguments):
            is_one = not isinstance(out_shape, tuple)
            inputs, shapes = [np.array(x) for x in arguments], (out_shape,) if is_one else out_shape
            outputs = [np.full(x.shape, 77, x.dtype) for x in shapes]
            for given, taken in (input_output_aliases or {}).items():
                outputs[taken] = inputs[given]
            specs = [*in_specs, *((out_specs,) if is_one else out_specs)]
            for program in np.random.default_rng(0).permutation(list(np.ndindex(*grid))).tolist():
                monkeypatch.setattr(pl, "program_id", program.__getitem__)
                kernel(*(cut(x, spec, program) for x, spec in zip(inputs + outputs, specs, strict=True)))
            outputs = [jnp.asarray(x) for x in outputs]
            return outputs[0] if is_one else outputs

        return call

    monkeypatch.setattr(pl, "pallas_call", pallas_call)
    monkeypatch.setattr(pl, "when", lambda condition: lambda function: function() if condition else None)
    monkeypatch.setattr(triton, "load", load)
    monkeypatch.setattr(triton, "store", store)


def assert_same(key, log_weights, num=None):
    log_weights = jnp.asarray(log_weights, jnp.float32)
    num = log_weights.shape[0] if num is None else num
    np.testing.assert_array_equal(interpreted(key, log_weights, num), plain(key, log_weights, num))


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 30.0])
@pytest.mark.parametrize("n", [1, 7, 1023, 1024, 5000])
def test_pallas_systematic_draws_the_same_ancestors(n, spread):
    log_weights = np.random.default_rng(n).normal(size=n) * spread
    for seed in range(2):
        assert_same(jax.random.key(seed), log_weights)


def test_pallas_systematic_draws_the_same_ancestors_at_2_20():
    assert_same(jax.random.key(0), np.random.default_rng(0).normal(size=2**20) * 2)


@pytest.mark.parametrize("n, num", [(1, 50), (50, 1), (10, 3000), (3000, 10), (2500, 2499)])
def test_pallas_systematic_draws_another_number_than_there_are_particles(n, num):
    assert_same(jax.random.key(1), np.random.default_rng(n).normal(size=n), num)


@pytest.mark.parametrize("where", ["head", "tail", "last only", "first only", "all dead", "nan", "positive infinity"])
def test_pallas_systematic_treats_special_weights_alike(where):
    n = 3000
    log_weights = np.random.default_rng(2).normal(size=n)
    if where == "head":
        log_weights[:1500] = -INF
    elif where == "tail":
        log_weights[-1500:] = -INF
    elif where == "nan":
        log_weights[::2] = np.nan
    elif where == "positive infinity":
        log_weights[[5, 2900]] = INF
    else:
        keep = {"last only": [n - 1], "first only": [0], "all dead": []}[where]
        log_weights[np.setdiff1d(np.arange(n), keep)] = -INF
    for seed in range(3):
        assert_same(jax.random.key(seed), log_weights)


def test_pallas_systematic_carries_between_parts_within_and_across_blocks():
    """Weights whose fixed-point parts are near 2^32 wrap at nearly every particle."""
    n = 4096
    values = np.where(np.arange(n) % 2 == 0, 1.0, 1.0 - 2.0**-20)
    for seed in range(3):
        assert_same(jax.random.key(seed), np.log(values))


def test_pallas_systematic_refuses_more_particles_than_it_can_take():
    with pytest.raises(ValueError, match=r"`log_weights` must have at most 2\^20 elements here, got 1048577"):
        pallas.systematic(jax.random.key(0), jnp.zeros(2**20 + 1), interpret=True)


@pytest.mark.parametrize("bad", [np.float32(0), np.zeros((2, 2), np.float32), np.zeros(0, np.float32)])
def test_pallas_systematic_refuses_other_shapes(bad):
    with pytest.raises(ValueError, match="`log_weights` must have shape"):
        pallas.systematic(jax.random.key(0), bad, interpret=True)


@pytest.mark.parametrize("n", [1, 1024, 2**20])
def test_pallas_systematic_lowers_for_cuda(n):
    text = lower_for_cuda(pallas.systematic, jax.random.key(0), jax.ShapeDtypeStruct((n,), jnp.float32))
    assert count_kernels(text) == 3


def make_ancestors(n, which):
    if which == "random":
        return survivors_stay(np.random.default_rng(n).integers(n, size=n).astype(np.int32))
    ancestors = np.arange(n, dtype=np.int32)
    if which == "one survives":
        ancestors[:] = n // 2
    elif which == "one dies":
        ancestors[n // 2] = n - 1
    return jnp.asarray(ancestors)


def make_values(shape, dtype):
    """Random bits, NaNs among them; of bfloat16 only quiet ones, as XLA widens it on a CPU and makes others quiet."""
    bits = np.random.default_rng(0).integers(256, size=(*shape, 4), dtype=np.uint8)
    if dtype is bool:
        return jnp.asarray(bits[..., 0] > 127)
    values = jax.lax.bitcast_convert_type(bits[..., : jnp.dtype(dtype).itemsize].squeeze(), dtype).reshape(shape)
    return jnp.where(jnp.isnan(values), jnp.nan, values) if dtype == jnp.bfloat16 else values


def assert_same_bits(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def assert_moves(tree, n, axis=0):
    for which in ["nobody dies", "one dies", "one survives", "random"]:
        ancestors = make_ancestors(n, which)
        assert_same_bits(move(tree, ancestors, axis), jax.tree.map(lambda x: jnp.take(x, ancestors, axis), tree))  # noqa: B023


def test_pallas_move_copies_the_bits_of_every_type():
    """1030 elements of a row end within its second tile."""
    types = [bool, jnp.int8, jnp.uint16, jnp.int32, jnp.float16, jnp.bfloat16, jnp.float32]
    assert_moves({str(i): make_values((37, 1030), dtype) for i, dtype in enumerate(types)}, 37)


def test_pallas_move_takes_any_shape_and_axis():
    """1029 particles end within a tile of the list of the dead, whatever the row's length."""
    for axis, shapes in [(0, [(1029,), (1029, 3), (1029, 0)]), (1, [(2, 1029, 3, 1), (0, 1029)]), (-1, [(3, 1029)])]:
        assert_moves([make_values(shape, jnp.float32) for shape in shapes], 1029, axis)


def test_pallas_move_keeps_to_its_rows_in_any_order(checked_memory):
    overwrite = importlib.import_module("ppl.kernels.pallas.move")._overwrite_in_place  # the rest traces
    for axis, shapes in [(0, [(5,), (5, 1030)]), (1, [(2, 1029, 3)])]:
        leaves = [make_values(shape, jnp.float32) for shape in shapes]
        for which in ["one survives", "random"]:
            ancestors = make_ancestors(shapes[0][axis], which)
            moved = overwrite(axis, False, leaves, ancestors)
            assert_same_bits(moved, [jnp.take(x, ancestors, axis) for x in leaves])


def test_pallas_move_takes_one_particle_and_types_that_triton_has_not():
    keys = jax.random.split(jax.random.key(0), 3)
    tree = {"complex": jnp.arange(3) * 1j, "int4": jnp.arange(3, dtype=jnp.int4)}
    moved = move({"keys": keys, **tree}, jnp.array([2, 1, 2]))
    np.testing.assert_array_equal(
        jax.random.key_data(moved.pop("keys")), jax.random.key_data(keys[np.array([2, 1, 2])])
    )
    assert_same_bits(moved, jax.tree.map(lambda x: x[np.array([2, 1, 2])], tree))
    one = jnp.ones((1, 5))
    assert_same_bits(move(one, jnp.zeros(1, jnp.int32)), one)
    assert pallas.move({}, jnp.zeros(1, jnp.int32), interpret=True) == {}


def test_pallas_move_has_the_derivatives_and_the_map_of_a_gather():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)), jnp.float32)
    ancestors = jnp.stack([make_ancestors(5, which) for which in ["random", "one dies", "one survives"]])
    mapped = jax.vmap(functools.partial(pallas.move, interpret=True))(x, ancestors)
    np.testing.assert_array_equal(mapped, jax.vmap(gather)(x, ancestors))
    cost = lambda move, x: jnp.sum(move(x, ancestors[0]) ** 3)  # noqa: E731
    slope = jax.grad(functools.partial(cost, functools.partial(pallas.move, interpret=True)))(x[0])
    np.testing.assert_array_equal(slope, jax.grad(functools.partial(cost, gather))(x[0]))


@pytest.mark.parametrize("bad", [np.int32(0), np.zeros((2, 2), np.int32), np.zeros(0, np.int32)])
def test_pallas_move_refuses_ancestors_of_other_shapes(bad):
    with pytest.raises(ValueError, match=r"`ancestors` must have shape \(n,\) with n >= 1"):
        pallas.move(jnp.zeros(2), bad)


def test_pallas_move_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match="`ancestors` must be int32 indices of particles, got float32"):
        pallas.move(jnp.zeros(2), jnp.zeros(2))
    with pytest.raises(ValueError, match="`ancestors` must be in the form that `survivors_stay` gives"):
        pallas.move(jnp.zeros(3), jnp.array([1, 2, 2]))
    with pytest.raises(
        ValueError, match="`tree` must have 3 particles along axis 1, as many as `ancestors`; got shape"
    ):
        pallas.move({"x": jnp.zeros((3, 2))}, jnp.arange(3), axis=1)


def test_pallas_move_lowers_for_cuda():
    ancestors = jax.ShapeDtypeStruct((2000,), jnp.int32)
    shapes = [((2000,), bool), ((2000, 3), jnp.int8), ((2000, 70, 3), jnp.bfloat16), ((2000, 5000), jnp.float32)]
    tree = [jax.ShapeDtypeStruct(*x) for x in shapes]
    text = lower_for_cuda(pallas.move, tree, ancestors)
    assert count_kernels(text) == len(tree)
    assert text.count("stablehlo.output_operand_alias<") == len(tree)
    second = jax.ShapeDtypeStruct((7, 2000, 33), jnp.float16)
    assert "stablehlo.transpose" not in lower_for_cuda(lambda x, a: pallas.move(x, a, 1), second, ancestors)


def make_logits(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape) * 3, dtype)


def assert_same_draws(logits, keys=20, **options):
    """Tokens are equal. A sum of `width` positive numbers is off by up to width 2^-24 of itself, in any order and in
    both forms, and so is its logarithm; what follows rounds numbers of the size of the results."""
    atol = 2 * block_width(logits.shape[-1]) * 2.0**-24
    for seed in range(keys):
        draw, expected = (f(jax.random.key(seed), logits, **options) for f in (sample, sample_plainly))
        np.testing.assert_array_equal(draw.token, expected.token)
        for x, y in zip(draw[1:], expected[1:], strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_allclose(x, y, rtol=2.0**-21, atol=atol)


@pytest.mark.parametrize("shape", [(1,), (2, 2, 1009), (1, 262144)])
def test_pallas_sample_tokens_draws_the_same(shape):
    assert_same_draws(make_logits(shape))


def test_pallas_sample_tokens_draws_the_same_from_bfloat16():
    assert_same_draws(make_logits((4, 700), jnp.bfloat16))


@pytest.mark.parametrize("shape, is_shared", [((3, 700), True), ((2, 50257), False)])
def test_pallas_sample_tokens_draws_the_same_with_mask_and_temperature(shape, is_shared):
    mask = jnp.asarray(np.random.default_rng(1).random(shape[1:] if is_shared else shape) < 0.3)
    temperature = 0.7 if is_shared else jnp.linspace(0.3, 2.0, shape[0])
    assert_same_draws(make_logits(shape), mask=mask, temperature=temperature)


def test_pallas_sample_tokens_draws_the_same_with_a_mask():
    assert_same_draws(make_logits((2, 1009)), mask=jnp.arange(1009) % 3 == 0)


@pytest.mark.parametrize("shape", [(2, 5001), (1, 7 * 368)])
def test_pallas_sample_tokens_reads_nothing_beyond_a_row(checked_memory, shape):
    """Blocks of 256 and 368; the last tile of a row is not full, and in the first case nor is the last block."""
    tokens = importlib.import_module("ppl.kernels.pallas.tokens")
    mask = jnp.asarray(np.random.default_rng(0).random((1, shape[1])) < 0.5)
    arguments = make_logits(shape), mask, jnp.full(shape[:1], 0.5)
    expected = jax.jit(tokens._sum_rows_plainly)(*arguments)
    for x, y in zip(tokens._sum_rows(False, *arguments), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2 * 368 * 2.0**-24)


def test_pallas_sample_tokens_treats_special_rows_alike():
    logits = np.array(make_logits((8, 700)))
    logits[0] = -INF
    logits[1, 3] = INF
    logits[2, 5] = np.nan
    logits[3, 1:] = -INF
    logits[4] += 3e38
    logits[5, :512] = -INF
    mask = np.ones((8, 700), bool)
    mask[6] = False
    temperature = np.ones(8, np.float32)
    temperature[7] = -1
    assert_same_draws(jnp.asarray(logits), keys=3, mask=mask, temperature=temperature)


def test_pallas_sample_tokens_takes_no_rows():
    assert sample(jax.random.key(0), jnp.zeros((0, 5))).token.shape == (0,)


def test_pallas_sample_tokens_has_the_derivatives_of_the_plain_form():
    logits, mask = make_logits((2, 300)), jnp.arange(300) % 2 == 0

    def weight(sample, logits, temperature):
        draw = sample(jax.random.key(0), logits, mask=mask, temperature=temperature)
        return jnp.sum(2 * draw.log_prob - draw.log_proposal)

    slopes, expected = (
        jax.jit(jax.grad(functools.partial(weight, f), (0, 1)))(logits, 0.7) for f in (sample, sample_plainly)
    )
    # Both derive the same sums; only the values by which these are divided are rounded in another order.
    for x, y in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2 * 300 * 2.0**-24, atol=2.0**-22)


def test_pallas_sample_tokens_maps_with_a_temperature():
    logits, keys = make_logits((3, 2, 700)), jax.random.split(jax.random.key(0), 3)
    temperature = jnp.array([0.5, 1.0, 3.0])
    call = lambda sample: jax.vmap(lambda key, x, t: sample(key, x, temperature=t).token)  # noqa: E731
    np.testing.assert_array_equal(
        call(sample)(keys, logits, temperature), call(sample_plainly)(keys, logits, temperature)
    )


def test_pallas_sample_tokens_refuses_what_does_not_fit():
    key, logits = jax.random.key(0), jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"`logits` must be floats of shape \(\*batch, V\) with V >= 1"):
        pallas.sample_tokens(key, jnp.zeros((2, 0)))
    with pytest.raises(TypeError, match="`mask` must be boolean"):
        pallas.sample_tokens(key, logits, mask=jnp.ones(3))
    with pytest.raises(ValueError, match=r"`mask` must have shape \(3,\) or \(2, 3\)"):
        pallas.sample_tokens(key, logits, mask=jnp.ones((3, 2), bool))
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got 0"):
        pallas.sample_tokens(key, logits, temperature=0)
    large = [jax.ShapeDtypeStruct((2**13 + 1, 2**18), dtype) for dtype in (jnp.bfloat16, bool)]
    with pytest.raises(ValueError, match=r"`mask` must have at most 2\^31 elements here, got 2147745792"):
        jax.eval_shape(lambda x, mask: pallas.sample_tokens(key, x, mask=mask), *large)


@pytest.mark.parametrize("shape", [(3,), (70000, 3), (3, 50257), (2, 2, 262144), (9000, 262144)])
@pytest.mark.parametrize("has_proposal", [False, True])
def test_pallas_sample_tokens_lowers_for_cuda_in_one_read_of_bfloat16(shape, has_proposal):
    def draw(logits, mask):
        options = {"mask": mask, "temperature": 0.7} if has_proposal else {}
        return pallas.sample_tokens(jax.random.key(0), logits, **options)

    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(shape[-1:], bool)]
    text = lower_for_cuda(draw, *arguments)
    assert count_kernels(text) == 1
    rows = f"{int(np.prod(shape[:-1]))}x{shape[-1]}x"
    assert f"tensor<{rows}bf16>" in text and f"tensor<{rows}f32>" not in text


def test_pallas_kernels_are_not_chosen_by_default():
    assert pallas.systematic not in RESAMPLERS.values()
    text = lower_for_cuda(sample_tokens, jax.random.key(0), jax.ShapeDtypeStruct((3, 700), jnp.float32))
    assert count_kernels(text) == 0
    text = lower_for_cuda(
        plain_move, jax.ShapeDtypeStruct((8, 5000), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    )
    assert count_kernels(text) == 0
