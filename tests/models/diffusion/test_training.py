"""Training: the loss against its closed form, what is learned against the exact denoiser, checkpoints, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from ppl.models.diffusion import checkpoints, held_out, training
from ppl.models.diffusion.checkpoints import load_network, save_network
from ppl.models.diffusion.model import Diffusion
from ppl.models.diffusion.networks import ConvolutionalDenoiser
from ppl.models.diffusion.predictions import PREDICTIONS, from_denoised
from ppl.models.diffusion.schedules import EDM, RectifiedFlow, VarianceExploding, VariancePreserving
from ppl.models.diffusion.training import Trained, train

POINT = 0.8  # the two points are this, and minus this, in every dimension
NODES, MASSES = np.polynomial.hermite_e.hermegauss(200)


class Perceptron(nnx.Module):
    """A small network of the user's own, over vectors, with classes."""

    def __init__(self, size: int, num_classes: int = 2, width: int = 64):
        rngs = nnx.Rngs(0)
        self.num_classes = num_classes
        self.first = nnx.Linear(size + 2 + num_classes, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.third = nnx.Linear(width, size, rngs=rngs)

    def __call__(self, x, t, label=None):
        classes = jax.nn.one_hot(self.num_classes if label is None else label, self.num_classes)
        h = jnp.concatenate([x, jnp.stack([t, t**2]), classes])
        return self.third(nnx.silu(self.second(nnx.silu(self.first(h)))))


class Fixed(nnx.Module):
    """A function that has one weight, which does nothing."""

    def __init__(self, function):
        self.function = function
        self.weight = nnx.Param(jnp.zeros(()))

    def __call__(self, x, t):
        return self.function(x, t) + 0.0 * self.weight[...]


def exact_two_points(schedule):
    """The denoiser of two equally likely points: POINT tanh(alpha POINT sum x / sigma^2) in every dimension."""

    def denoise(x, t):
        return POINT * jnp.tanh(schedule.alpha(t) * POINT * jnp.sum(x) / schedule.sigma(t) ** 2) * jnp.ones_like(x)

    return denoise


def two_points(count: int, size: int):
    labels = np.arange(count) % 2
    return np.where(labels[:, None] == 1, POINT, -POINT) * np.ones(size), labels


def weights_of(model):
    return jax.tree.leaves(nnx.state(model.denoiser, nnx.Param))


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(weights_of(one), weights_of(other), strict=True))


SCHEDULES = [VariancePreserving(), VariancePreserving("cosine"), RectifiedFlow(), VarianceExploding(0.05, 5.0), EDM()]


@pytest.mark.parametrize(
    ("schedule", "predicts"),
    [
        *((SCHEDULES[0], predicts) for predicts in PREDICTIONS),
        *zip(SCHEDULES[1:], ("v", "velocity", "epsilon", "score"), strict=True),
    ],
    ids=str,
)
def test_the_loss_of_the_exact_denoiser_is_the_bayes_error(schedule, predicts):
    """Given x, y = a x_0 + b eps has variance s^2 (a sigma - b alpha)^2 / (alpha^2 s^2 + sigma^2) under N(0, s^2)."""
    s = 0.7

    def exact(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        denoised = alpha * s**2 * x / (alpha**2 * s**2 + sigma**2)
        return from_denoised(predicts, denoised, x, alpha, sigma, schedule.alpha_rate(t), schedule.sigma_rate(t))

    data = np.random.default_rng(0).normal(0.0, s, (50_000, 1)).astype(np.float32)
    model = Diffusion(Fixed(exact), (1,), schedule, predicts)
    trained = train(model, data, steps=200, batch_size=256, held_out=0.001)
    start = float(schedule.time(np.log(0.01 * np.std(data))))
    t = start + (1 - start) * (np.arange(100_000) + 0.5) / 100_000
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a, b = {
        "x0": (1.0, 0.0),
        "epsilon": (0.0, 1.0),
        "v": (-sigma, alpha),
        "velocity": (schedule.alpha_rate(t), schedule.sigma_rate(t)),
        "score": (0.0, -1.0 / sigma),
    }[predicts]
    least = s**2 * (a * sigma - b * alpha) ** 2 / (alpha**2 * s**2 + sigma**2) / (a**2 * s**2 + b**2)
    error = np.std(trained.losses) / np.sqrt(200) + least.mean() * np.sqrt(2 / 50_000)  # of batches, and of the data
    assert abs(trained.losses.mean() - least.mean()) < 5 * error


def test_a_network_is_given_what_the_model_is_conditioned_on():
    schedule = VarianceExploding(0.05, 5.0)
    by_sigma = Fixed(lambda x, sigma: x / (1.0 + sigma**2))
    by_time = Fixed(lambda x, t: x / (1.0 + schedule.sigma(t) ** 2))
    data = np.random.default_rng(0).normal(size=(100, 2))
    one = train(Diffusion(by_sigma, (2,), schedule, "x0", conditioning="sigma"), data, steps=20)
    two = train(Diffusion(by_time, (2,), schedule, "x0"), data, steps=20)
    np.testing.assert_allclose(one.losses, two.losses, rtol=1e-5)
    np.testing.assert_allclose(one.model.error[1], two.model.error[1], rtol=1e-5)


@pytest.mark.parametrize("schedule", [SCHEDULES[1], SCHEDULES[3]], ids=repr)
@pytest.mark.parametrize("repeated", [1, 3])
def test_the_held_out_error_of_the_exact_denoiser_is_its_closed_form(schedule, repeated, monkeypatch):
    """Of two points it is c^2 E (1 - tanh(s^2 + s n))^2 with s = c sqrt(d) exp(-lambda) and n normal."""
    count = 6000
    monkeypatch.setattr(held_out, "NUM_DRAWS", count)
    data, _ = two_points(count // repeated, 2)
    model = Diffusion(exact_two_points(schedule), (2,), schedule, "x0", scale=POINT)
    ratios, errors = held_out.held_out_error(model, data.astype(np.float32), None, seed=repeated)
    signal = POINT * np.sqrt(2) * np.exp(-ratios)[:, None]
    squares = POINT**2 * (1 - np.tanh(signal**2 + signal * NODES)) ** 2
    exact, second = squares @ MASSES / MASSES.sum(), squares**2 @ MASSES / MASSES.sum()
    common = exact > 1e-3  # below it a few draws make the mean
    assert np.all(np.diff(ratios) > 0) and ratios[0] >= np.log(0.01 * POINT) - 1e-9 and np.sum(common) > 8
    assert np.all(np.abs(errors - exact)[common] < 5 * np.sqrt((second - exact**2)[common] / count))
    assert np.all(errors[~common] < 5e-3)


@pytest.fixture(scope="module")
def learned():
    """A network that has seen two points with their labels, some of them dropped."""
    data, labels = two_points(512, 4)
    model = Diffusion(Perceptron(4), (4,), VariancePreserving(), "v")
    return train(model, data, labels=labels, steps=4000, batch_size=128, drop_label=0.5, learning_rate=1e-2)


@pytest.mark.optimized
def test_the_loss_falls_to_near_the_bayes_error(learned):
    """Half of the labels are dropped: with a label the least loss is 0, without it that of the exact denoiser."""
    t = np.linspace(float(VariancePreserving().time(np.log(0.01 * POINT))), 1.0, 4001)
    alpha, sigma = VariancePreserving().alpha(t), VariancePreserving().sigma(t)
    signal = (2 * POINT * alpha / sigma)[:, None]
    denoising = POINT**2 * (1 - np.tanh(signal**2 + signal * NODES)) @ MASSES / MASSES.sum()
    of_v = denoising / sigma**2 * (alpha**2 + sigma**2) ** 2  # v = (alpha x - (alpha^2 + sigma^2) D) / sigma
    least = 0.5 * np.mean(of_v / (sigma**2 * POINT**2 + alpha**2))
    last = learned.losses[-200:]
    assert learned.losses[:5].mean() > 0.9
    assert last.mean() - least > -5 * last.std() / np.sqrt(200)  # nothing is below it
    assert last.mean() - least < 0.03


def test_without_a_label_the_network_is_the_exact_denoiser(learned):
    exact = exact_two_points(VariancePreserving())
    noise = jax.random.normal(jax.random.key(1), (400, 4))
    clean = jnp.where(jnp.arange(400) % 2 == 1, POINT, -POINT)[:, None]
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        x = VariancePreserving().alpha(t) * clean + VariancePreserving().sigma(t) * noise
        ours = jax.vmap(lambda x, t=t: learned.model.denoise(x, t))(x)
        theirs = jax.vmap(lambda x, t=t: exact(x, t))(x)
        assert np.mean((ours - theirs) ** 2) < 0.01 * POINT**2


def test_with_a_label_the_network_knows_the_point_and_says_so(learned):
    noise = jax.random.normal(jax.random.key(1), (200, 4))
    for label, point in ((0, -POINT), (1, POINT)):
        model = learned.model.given(label=label)
        denoised = jax.vmap(lambda x, model=model: model.denoise(x, 0.9))(noise)  # nearly all noise
        assert np.mean((denoised - point) ** 2) < 0.03 * POINT**2
    ratios, errors = learned.model.error
    assert np.all(np.diff(ratios) > 0) and np.max(errors) < 0.03 * POINT**2


@pytest.mark.optimized
def test_a_convolutional_network_learns_the_same():
    data, labels = two_points(256, 4)
    network = ConvolutionalDenoiser((2, 2), num_classes=2, channels=(16,))
    model = Diffusion(network, (2, 2), VariancePreserving(), "v")
    losses = train(model, data.reshape(-1, 2, 2), labels=labels, steps=300, batch_size=64, learning_rate=5e-3).losses
    assert losses[:5].mean() > 0.9 and losses[-50:].mean() < 0.15


def test_the_model_learns_the_mean_and_the_scale_of_the_data():
    data = np.random.default_rng(0).normal([1.0, -2.0], 0.5, (4000, 2))
    model = Diffusion(Perceptron(2), (2,), RectifiedFlow(), "velocity")
    trained = train(model, data, steps=3, held_out=0.0).model
    np.testing.assert_allclose(trained.mean, data.mean(axis=0), rtol=1e-5)
    assert trained.scale == pytest.approx(np.std(data - data.mean(axis=0)), rel=1e-5)
    assert (trained.schedule, trained.predicts, trained.shape) == (RectifiedFlow(), "velocity", (2,))


def small():
    data, labels = two_points(64, 3)
    data = data + 0.1 * np.random.default_rng(1).normal(size=data.shape)
    return Diffusion(Perceptron(3), (3,), VariancePreserving(), "epsilon"), data, labels


def test_the_same_seed_gives_the_same_weights_and_another_gives_others():
    model, data, labels = small()
    before = [np.array(w) for w in weights_of(model)]
    first, again, other = (train(model, data, labels=labels, steps=30, seed=seed) for seed in (3, 3, 4))
    assert same(first.model, again.model) and np.array_equal(first.losses, again.losses)
    assert np.array_equal(first.model.error, again.model.error)
    assert not same(first.model, other.model)
    assert all(np.array_equal(a, b) for a, b in zip(before, weights_of(model), strict=True))  # left as it was


def test_dropped_labels_and_the_average_matter():
    model, data, labels = small()
    plain = train(model, data, labels=labels, steps=30)
    assert not same(plain.model, train(model, data, labels=labels, steps=30, drop_label=0.9).model)
    last = train(model, data, labels=labels, steps=30, average=0.0)
    assert np.array_equal(last.losses, plain.losses) and not same(plain.model, last.model)


def test_held_out_data_are_not_trained_on():
    model, data, labels = small()
    order = np.random.default_rng(3).permutation(64)[:7]
    again = data.copy()
    again[order] = 5.0
    one, two = (train(model, x, labels=labels, steps=5, seed=3, held_out=0.1) for x in (data, again))
    assert same(one.model, two.model) and np.array_equal(one.losses, two.losses)
    assert not np.array_equal(one.model.error, two.model.error)


class Interrupted(Exception):
    pass


def test_an_interrupted_training_goes_on_to_the_same_weights_bit_for_bit(tmp_path, monkeypatch):
    model, data, labels = small()
    whole = train(model, data, labels=labels, steps=70)
    options = {"steps": 70, "labels": labels, "checkpoint": tmp_path / "new" / "state.safetensors"}
    written = []

    def interrupt(path, tree, about):
        checkpoints.save_tree(path, tree, about)
        written.append(int(tree["step"]))
        if written == [30, 60]:
            raise Interrupted

    monkeypatch.setattr(training, "save_tree", interrupt)
    with pytest.raises(Interrupted):
        train(model, data, checkpoint_every=30, **options)
    resumed = train(model, data, checkpoint_every=40, **options)
    assert written == [30, 60, 70]
    assert same(whole.model, resumed.model) and np.array_equal(whole.losses, resumed.losses)
    assert np.array_equal(whole.model.error, resumed.model.error)
    finished = train(model, data, **options)  # nothing is left to do
    assert written == [30, 60, 70] and same(whole.model, finished.model)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state.safetensors"]


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    model, data, labels = small()
    path = tmp_path / "state"
    train(model, data, labels=labels, steps=2, checkpoint=path)
    with pytest.raises(
        ValueError, match=r"of another training: `steps` was 2 and is 3; `seed` was 0 and is 1\. Remove"
    ):
        train(model, data, labels=labels, steps=3, seed=1, checkpoint=path)
    with pytest.raises(ValueError, match="`data` was"):
        train(model, data + 1e-3, labels=labels, steps=2, checkpoint=path)
    wider = Diffusion(Perceptron(3, width=32), (3,), VariancePreserving())
    with pytest.raises(
        ValueError, match=r"does not fit: `average.first.bias` is float32\[64\], expected float32\[32\]"
    ):
        train(wider, data, labels=labels, steps=2, checkpoint=path)


def test_what_was_trained_is_read_back_bit_for_bit(tmp_path):
    model, data, labels = small()
    trained = train(model, data, labels=labels, steps=5)
    trained.save(tmp_path / "trained.safetensors")
    read = Trained.load(tmp_path / "trained.safetensors", model)
    assert same(read.model, trained.model) and not same(read.model, model)
    assert np.array_equal(read.losses, trained.losses) and np.array_equal(read.model.error, trained.model.error)
    assert np.array_equal(read.model.mean, trained.model.mean) and read.model.scale == trained.model.scale
    alone = load_network(tmp_path / "trained.safetensors", Perceptron(3))
    assert np.array_equal(alone(data[0], 0.5, label=1), trained.model.denoiser(data[0], 0.5, label=1))
    assert "network.first.kernel" in load_file(tmp_path / "trained.safetensors")


def test_a_network_is_read_back_and_another_one_is_refused(tmp_path):
    network = ConvolutionalDenoiser((4, 4), num_classes=3, channels=(4, 8), seed=1)
    path = tmp_path / "network.safetensors"
    save_network(path, network)
    fresh = ConvolutionalDenoiser((4, 4), num_classes=3, channels=(4, 8), seed=2)
    read = load_network(path, fresh)
    leaves = [jax.tree.leaves(nnx.state(n, nnx.Param)) for n in (network, read, fresh)]
    assert all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True))
    with pytest.raises(ValueError, match=r"`network.embedding.classes` is float32\[4, 16\], expected float32\[3, 16\]"):
        load_network(path, ConvolutionalDenoiser((4, 4), num_classes=2, channels=(4, 8)))
    with pytest.raises(ValueError, match="`network.bottom.2.first.linear.bias` is missing, expected"):
        load_network(path, ConvolutionalDenoiser((4, 4), num_classes=3, channels=(4, 8), num_blocks=2))
    with pytest.raises(
        ValueError, match="holds a network but no error, losses, mean, scale: read it by `load_network`"
    ):
        Trained.load(path, Diffusion(fresh, (4, 4), VariancePreserving()))


def test_files_that_are_not_there_or_are_not_ours_are_refused(tmp_path):
    network = Perceptron(3)
    with pytest.raises(FileNotFoundError, match="there is no file .*nowhere"):
        load_network(tmp_path / "nowhere", network)
    (tmp_path / "words").write_text("not arrays")
    with pytest.raises(ValueError, match="words is not a file that this library wrote"):
        load_network(tmp_path / "words", network)


def test_a_training_that_diverges_says_so():
    model = Diffusion(Fixed(lambda x, t: jnp.where(t > 0.5, jnp.nan, 0.0) * x), (3,), VariancePreserving())
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan: lower `learning_rate`"):
        train(model, two_points(8, 3)[0], steps=2)


DATA, LABELS = two_points(8, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(data=DATA[:, :2]), r"`data` must be at least two values of the model's shape, \(N, 3,\)"),
        (dict(data=DATA[:1]), "`data` must be at least two values"),
        (dict(data=np.zeros(3)), "`data` must be at least two values"),
        (dict(data=DATA.astype(complex)), "in real numbers; got complex128"),
        (dict(data=np.where(np.arange(8)[:, None] == 5, np.nan, DATA)), "`data` must be finite: value 5 is not"),
        (dict(data=np.ones((8, 3))), "`data` must differ"),
        (dict(labels=LABELS[:7]), r"`labels` must be 8 whole numbers, got int64 of shape \(7,\)"),
        (dict(labels=LABELS + 0.5), "`labels` must be 8 whole numbers, got float64"),
        (dict(labels=LABELS + 1), r"`labels` must be in \[0, 2\), got 1 to 2"),
        (dict(labels=LABELS - 1), r"`labels` must be in \[0, 2\), got -1 to 0"),
        (dict(steps=0), "`steps` must be a whole number of at least 1, got 0"),
        (dict(steps=2.5), "`steps` must be a whole number"),
        (dict(batch_size=True), "`batch_size` must be a whole number"),
        (dict(checkpoint_every=0), "`checkpoint_every` must be a whole number"),
        (dict(learning_rate=0.0), "`learning_rate` must be positive"),
        (dict(drop_label=1.5), r"`drop_label` must be a probability in \[0, 1\]"),
        (dict(average=1.0), r"`average` must be in \[0, 1\)"),
        (dict(held_out=1.0), "`held_out` must be a share"),
        (dict(held_out=0.95), "`held_out` must be small enough to leave some of 8 values"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message):
    model = Diffusion(Perceptron(3), (3,), VariancePreserving())
    with pytest.raises(ValueError, match=message):
        train(model, **{"data": DATA, "steps": 1, **arguments})


def test_a_model_that_cannot_be_trained_is_refused():
    with pytest.raises(TypeError, match="`model` must be a Diffusion whose denoiser is a flax nnx module"):
        train(Perceptron(3), DATA)
    with pytest.raises(TypeError, match="whose denoiser is a flax nnx module"):
        train(Diffusion(lambda x, t: x, (3,), VariancePreserving()), DATA)
    with pytest.raises(ValueError, match="`predicts` must be one of 'epsilon', 'x0', 'v', 'velocity', 'score'"):
        train(Diffusion(Perceptron(3), (3,), VariancePreserving(), "noise"), DATA)
    with pytest.raises(ValueError, match="`labels` need a network with classes"):
        train(Diffusion(Fixed(lambda x, t: x), (3,), VariancePreserving()), DATA, labels=LABELS)
    with pytest.raises(ValueError, match=r"`denoiser` must return an array of shape \(3,\)"):
        train(Diffusion(Fixed(lambda x, t: x[:2]), (3,), VariancePreserving()), DATA)
