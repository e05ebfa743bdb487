"""Training a network to denoise.

Clean values x_0 of the data are noised to random levels and the network learns what it is to predict:

    x = alpha(t) x_0 + sigma(t) eps,    t uniform between the lowest level that matters and 1                       (1)
    y = a x_0 + b eps,    (a, b) =   x0      epsilon      v               velocity           score                  (2)
                                    (1, 0)   (0, 1)   (-sigma, alpha)   (alpha', sigma')   (0, -1 / sigma)
    loss = E |network(x, t, label) - y|^2 / (d V),    V = a^2 E x_0^2 + b^2                                         (3)

V makes 1 the loss of a network that says 0, at every level and for every prediction. The least loss is not 0 but what
the data's own uncertainty leaves.

- The times of a batch are spread evenly, (u + i) / B mod 1 with one uniform u, which leaves each uniform.
- A label is dropped now and then, so that one network serves with classes and without (classifier-free guidance).
- AdamW; the learning rate rises over the first twentieth of the steps and falls to 0 as a cosine.
- The result is the moving average of the weights, w' <- d w' + (1 - d) w with d = min(average, (1 + n) / (10 + n)).

Randomness depends on the seed and the step's number only, so that a training that was interrupted goes on from its last
checkpoint to the same weights bit for bit.

Source: (2), (3) Ho, Jain and Abbeel 2020 (arXiv 2006.11239), eq. 14, and Salimans and Ho 2022 (arXiv 2202.00512); even
times Kingma et al. 2021 (arXiv 2107.00630), appendix I.1; dropped labels Ho and Salimans 2022 (arXiv 2207.12598).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import ArrayLike, Float, Int

from ppl.models.diffusion.checkpoints import load_tree, save_tree, split_network
from ppl.models.diffusion.held_out import held_out_error
from ppl.models.diffusion.levels import LAST
from ppl.models.diffusion.model import Diffusion
from ppl.progress import PATIENCE, tqdm, wanted

__all__ = ["Trained", "train"]

BLOCK = 25  # steps of one compiled call


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What a training gives.

    Attributes:
        model: the model with the trained network (the averaged weights), with the data's mean and scale, and with the
            error of the denoised value that its "matched" variance needs, measured on data that were held out.
        losses: (3) of each step, before its update, `[steps]`.
    """

    model: Diffusion
    losses: np.ndarray

    def save(self, path: str | os.PathLike) -> None:
        """Write everything but the network's structure to one file."""
        model = self.model
        about = {"losses": self.losses.tolist(), "mean": np.asarray(model.mean).tolist(), "scale": model.scale}
        about["error"] = [part.tolist() for part in model.error]
        save_tree(path, {"network": split_network(model.denoiser)[0]}, about)

    @classmethod
    def load(cls, path: str | os.PathLike, model: Diffusion) -> Trained:
        """Read what `save` wrote.

        Args:
            path: the file.
            model: one of the same build as was trained; its network's own weights do not matter and stay as they are.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a file, or its arrays are not those of the network: it says which differ.
        """
        weights, build = split_network(model.denoiser)
        tree, about = load_tree(path, {"network": weights})
        if missing := sorted({"losses", "mean", "scale", "error"} - about.keys()):
            raise ValueError(f"{path} holds a network but no {', '.join(missing)}: read it by `load_network`.")
        error = tuple(np.asarray(part, np.float64) for part in about["error"])
        mean = np.asarray(about["mean"], np.float32)
        return cls(_rebuilt(model, build(tree["network"]), mean, about["scale"], error), np.float32(about["losses"]))


def train(
    model: Diffusion,
    data: Float[ArrayLike, "N ..."],
    *,
    labels: Int[ArrayLike, " N"] | None = None,
    steps: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    drop_label: float = 0.1,
    average: float = 0.995,
    held_out: float = 0.1,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 500,
) -> Trained:
    """Train a model's network.

    Args:
        model: its denoiser is a flax nnx module; schedule, prediction and conditioning are the model's. It is left as
            it is.
        data: clean values, of about unit variance, or at least of that order.
        labels: classes of the data, in [0, num_classes) of the network, which is called with `label=`, a dropped one
            being `num_classes`. None: the network is called without.
        steps: how many updates of the weights.
        batch_size: noisy values of each.
        learning_rate: the highest, of AdamW.
        drop_label: probability that a label is dropped.
        average: decay d of the moving average of the weights; 0 keeps the last ones.
        held_out: share of the data that is not trained on, and on which the model's error is measured. With 0 it is
            measured on all data, and too small by what the network has learned by heart.
        seed: of what is held out, of batches, levels, noise and dropped labels.
        progress: show a bar; None: where somebody can see it.
        checkpoint: a file in which the state of the training is kept. If it is there, training goes on from it: after
            its last step there is nothing left to do. It must be of the same network, data and settings.
        checkpoint_every: steps between its writings; it is written after the last one as well.

    Returns:
        The model with the trained network, and the losses.

    Raises:
        TypeError: `model` is no Diffusion with an nnx module.
        ValueError: an argument does not fit, or `checkpoint` is a file of another training: it says what differs.
        FloatingPointError: a loss is not finite: the learning rate is too high.
    """
    if not isinstance(model, Diffusion) or not isinstance(model.denoiser, nnx.Module):
        raise TypeError(f"`model` must be a Diffusion whose denoiser is a flax nnx module, got {model!r}.")
    for name, value in {"steps": steps, "batch_size": batch_size, "checkpoint_every": checkpoint_every}.items():
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        _require(name, value, whole and value >= 1, "a whole number of at least 1")
    _require("learning_rate", learning_rate, 0.0 < learning_rate < math.inf, "positive and finite")
    _require("drop_label", drop_label, 0.0 <= drop_label <= 1.0, "a probability in [0, 1]")
    _require("average", average, 0.0 <= average < 1.0, "in [0, 1)")
    _require("held_out", held_out, 0.0 <= held_out < 1.0, "a share of the data in [0, 1)")
    data = _checked_data(model, data)
    labels = None if labels is None else _checked_labels(model.denoiser, labels, len(data))
    (model if labels is None else model.given(label=np.int32(0))).check_denoiser()
    order, kept = np.random.default_rng(seed).permutation(len(data)), math.ceil(len(data) * held_out)
    _require("held_out", held_out, kept < len(data), f"small enough to leave some of {len(data)} values to train on")
    tests, lessons = (order[:kept], order[kept:]) if kept else (order, order)
    pick = lambda rows: (data[rows], None if labels is None else labels[rows])  # noqa: E731

    settings = {
        **{"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "drop_label": drop_label},
        **{"average": average, "held_out": held_out, "seed": seed, "data": _digest(data), "labels": _digest(labels)},
        **{"schedule": repr(model.schedule), "predicts": model.predicts, "conditioning": model.conditioning},
    }
    mean = np.mean(data[lessons], axis=0)
    scale, square = float(np.std(data[lessons] - mean)), float(np.mean(np.square(data[lessons])))
    weights, build = split_network(model.denoiser)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, math.ceil(steps / 20), steps + 1)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    state = {"step": jnp.int32(0), "network": weights, "average": weights, "optimiser": optimiser.init(weights)}
    losses = np.zeros(0, np.float32)
    if checkpoint is not None and Path(checkpoint).exists():
        state, losses = _resumed(checkpoint, state, settings)

    loss = _loss(model, build, math.log(LAST * scale), square)
    update = _updater(loss, optimiser, batch_size, getattr(model.denoiser, "num_classes", None), drop_label, average)
    key, arrays = jax.random.key(seed), jax.tree.map(jnp.asarray, pick(lessons))
    options = {"desc": "training", "leave": False, "delay": PATIENCE, "disable": not wanted(progress)}
    with tqdm(total=steps, initial=len(losses), **options) as bar:
        while len(losses) < steps:
            due = checkpoint_every - len(losses) % checkpoint_every
            count = min(BLOCK, due, steps - len(losses))
            state, fresh = update(state, count, key, *arrays)
            losses = np.concatenate([losses, np.asarray(fresh)[:count]])
            if not np.all(np.isfinite(losses)):
                first = int(np.argmin(np.isfinite(losses)))
                raise FloatingPointError(f"the loss of step {first} is {losses[first]}: lower `learning_rate`.")
            if checkpoint is not None and (count == due or len(losses) == steps):
                save_tree(checkpoint, state, {"settings": settings, "losses": losses.tolist()})
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
            bar.update(count)
    trained = _rebuilt(model, build(state["average"]), mean, scale, None)
    error = held_out_error(trained, *pick(tests), seed)
    return Trained(_rebuilt(model, trained.denoiser, mean, scale, error), losses)


def _loss(model: Diffusion, build: Callable, lowest: float, square: float) -> Callable:
    """Return (3) of one value, given a place in [0, 1] between the lowest level and t = 1."""
    start = float(model.schedule.time(np.float64(lowest)))

    def loss(weights, clean, noise, place, label):
        level = model.level(start + place * (1.0 - start))
        x = level.alpha * clean + level.sigma * noise  # (1)
        conditions = model.conditions if label is None else {**model.conditions, "label": label}
        output = build(weights)(x, model._seen(level), **conditions)
        a, b = _target(model.predicts, level)  # (2)
        return jnp.mean(jnp.square(output - (a * clean + b * noise))) / (a**2 * square + b**2)  # (3)

    return loss


def _target(predicts: str, level) -> tuple[Any, Any]:
    """Return a and b of (2)."""
    return {
        "x0": lambda: (1.0, 0.0),
        "epsilon": lambda: (0.0, 1.0),
        "v": lambda: (-level.sigma, level.alpha),
        "velocity": lambda: (level.alpha_rate, level.sigma_rate),
        "score": lambda: (0.0, -1.0 / level.sigma),
    }[predicts]()


def _updater(loss, optimiser, batch_size: int, num_classes: int | None, drop_label: float, average: float) -> Callable:
    """Return the compiled updates: up to `BLOCK` of them, from a state to the next one and their losses."""

    def step(state, key, data, labels):
        key_rows, key_noise, key_places, key_drop = jax.random.split(jax.random.fold_in(key, state["step"]), 4)
        rows = jax.random.randint(key_rows, (batch_size,), 0, len(data))
        noise = jax.random.normal(key_noise, (batch_size, *data.shape[1:]), data.dtype)
        places = (jax.random.uniform(key_places) + jnp.arange(batch_size) / batch_size) % 1.0
        dropped = jax.random.bernoulli(key_drop, drop_label, (batch_size,))
        classes = None if labels is None else jnp.where(dropped, num_classes, labels[rows])

        def mean_loss(weights):
            each = jax.vmap(lambda *value: loss(weights, *value))
            return jnp.mean(each(data[rows], noise, places, classes))

        value, gradient = jax.value_and_grad(mean_loss)(state["network"])
        change, optimiser_state = optimiser.update(gradient, state["optimiser"], state["network"])
        weights = optax.apply_updates(state["network"], change)
        decay = jnp.minimum(average, (1.0 + state["step"]) / (10.0 + state["step"]))
        averaged = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state["average"], weights)
        return {"step": state["step"] + 1, "network": weights, "average": averaged, "optimiser": optimiser_state}, value

    @jax.jit
    def run(state, count, key, data, labels):
        def body(index, carry):
            state, values = carry
            state, value = step(state, key, data, labels)
            return state, values.at[index].set(value)

        return jax.lax.fori_loop(0, count, body, (state, jnp.zeros(BLOCK)))

    return run


def _rebuilt(model: Diffusion, network: nnx.Module, mean, scale: float, error) -> Diffusion:
    """Return the model with another network and what is known of the data."""
    options = {"conditioning": model.conditioning, "conditions": model.conditions}
    return Diffusion(
        network, model.shape, model.schedule, model.predicts, mean=mean, scale=scale, error=error, **options
    )


def _resumed(path, state, settings) -> tuple[Any, np.ndarray]:
    """Return the state and the losses in a checkpoint of the same training."""
    state, about = load_tree(path, state)
    before = about.get("settings", {})
    pairs = [(name, before.get(name), value) for name, value in settings.items()]
    differ = [f"`{name}` was {old!r} and is {new!r}" for name, old, new in pairs if old != new]
    if differ:
        raise ValueError(f"`checkpoint` {path} is of another training: {'; '.join(differ)}. Remove it to start anew.")
    return state, np.asarray(about["losses"], np.float32)


def _checked_data(model: Diffusion, data) -> np.ndarray:
    data = np.asarray(data)
    real = np.issubdtype(data.dtype, np.floating) or np.issubdtype(data.dtype, np.integer)
    if not real or data.shape[1:] != model.shape or data.ndim == 0 or len(data) < 2:
        raise ValueError(
            f"`data` must be at least two values of the model's shape, (N, {str(model.shape)[1:]}, in real numbers; "
            f"got {data.dtype} of shape {data.shape}."
        )
    finite = np.isfinite(data).reshape(len(data), -1).all(axis=1)
    if not finite.all():
        raise ValueError(f"`data` must be finite: value {int(np.argmin(finite))} is not.")
    if np.all(data == data[0]):
        raise ValueError("`data` must differ: all values are equal.")
    return data.astype(np.float32)


def _checked_labels(network: nnx.Module, labels, count: int) -> np.ndarray:
    labels, num_classes = np.asarray(labels), getattr(network, "num_classes", None)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"`labels` must be {count} whole numbers, got {labels.dtype} of shape {labels.shape}.")
    if num_classes is None:
        raise ValueError("`labels` need a network with classes (its attribute `num_classes`); this one has none.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"`labels` must be in [0, {num_classes}), got {labels.min()} to {labels.max()}.")
    return labels.astype(np.int32)


def _digest(array: np.ndarray | None) -> str | None:
    """Return what tells arrays apart."""
    return array if array is None else f"{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def _require(name: str, value, holds: bool, accepted: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {accepted}, got {value!r}.")
