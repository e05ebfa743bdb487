"""Schedules out of a `scheduler_config.json`, the file that a pretrained diffusion model comes with.

The file names a sampler of diffusers and its settings. Read are those that say what the network was trained on; the
sampler's own (spacing of the steps, clipping, solver order, Karras sigmas of a discrete model, ..) are not, since how
levels are chosen and stepped through is asked of `Diffusion.reverse`.

| classes | schedule | predicts |
|---|---|---|
| DDPM, DDIM, PNDM, Euler, DPM-Solver and their like | `Tabulated`, of the betas | by `prediction_type` |
| the same with `use_flow_sigmas`, and `FlowMatch..` | `RectifiedFlow`, of the shift | "velocity" |
| `EDM..`, and Euler with continuous times | `EDM`, or `VarianceExploding` | "x0", of a preconditioned network |

Of `rescale_betas_zero_snr` some samplers of diffusers leave alpha^2 = 2^-24 in the last step; here it is 0.

The networks of the EDM family do not predict any of our five things but F, with s the noise level and d = `sigma_data`:

    D = d^2 / (s^2 + d^2) x + sign s d / sqrt(s^2 + d^2) F(x / sqrt(s^2 + d^2), log(s) / 4)                       (1)

sign = 1 for `prediction_type` "epsilon" and -1 for "v_prediction". `network_denoiser` puts (1) around a network, and
gives networks of the other classes the time in the unit that they were trained with.

Source: the `schedulers/` of diffusers, and files of models published with its versions 0.2 to 0.36, for the names and
their meaning; (1) Karras et al. 2022 (arXiv 2206.00364), eq. 7.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ppl.models.diffusion.beta_schedules import alphas_cumprod, betas
from ppl.models.diffusion.schedules import EDM, RectifiedFlow, Schedule, VarianceExploding
from ppl.models.diffusion.tabulated_schedule import Tabulated

__all__ = ["SCHEDULER_CLASSES", "network_denoiser", "read_scheduler"]

_DISCRETE = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
_EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
SCHEDULER_CLASSES = (*_DISCRETE, *_EDM, *_FLOW)

_PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
_FILE = "scheduler_config.json"


def read_scheduler(
    config: str | os.PathLike | Mapping[str, Any], *, image_tokens: int | None = None
) -> tuple[Schedule, str]:
    """Return the schedule and the prediction of a pretrained model.

    Args:
        config: path of a `scheduler_config.json`, of the folder that holds it or of the model's folder (the file is
            then in its `scheduler/`), or the file's contents.
        image_tokens: how many tokens the image has (patches of the latent), for a flow model whose shift depends on
            it: `use_dynamic_shifting`.

    Returns:
        `(schedule, predicts)`, as `Diffusion` takes them. A file without `prediction_type` is older than that setting
        and means epsilon.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, its class or one of its settings is unknown, or a setting is missing or out
            of range; the message says which, what was given and what is accepted.
        TypeError: `config` is neither a path nor a mapping.
    """
    settings, name = _load(config)
    if _is_flow(settings, name):
        return RectifiedFlow(_shift(settings, name, image_tokens)), "velocity"
    if _is_preconditioned(settings, name):
        _preconditioning(settings, name)
        return _continuous(settings, name), "x0"
    predicts = _prediction(settings, name, _PREDICTIONS)
    return Tabulated(tuple(_table(settings, name).tolist())), _PREDICTIONS[predicts]


def network_denoiser(
    network: Callable[..., Any], config: str | os.PathLike | Mapping[str, Any], *, image_tokens: int | None = None
) -> Callable[..., Any]:
    """Return a denoiser on times in [0, 1], made of a network that is called as diffusers calls it.

    Args:
        network: `(x, timestep, **conditions) -> output`. What it gets as timestep is the step number (discrete
            classes), `num_train_timesteps` times the noise level (flow classes) or log(sigma) / 4 (EDM classes).
        config: as in `read_scheduler`.
        image_tokens: as in `read_scheduler`.

    Returns:
        `(x, t, **conditions) -> output`, for `Diffusion` with the schedule and the prediction of `read_scheduler`;
        for EDM classes the output is the denoised value, (1).

    Raises:
        FileNotFoundError, ValueError, TypeError: as `read_scheduler`.
    """
    settings, name = _load(config)
    schedule, _ = read_scheduler(settings, image_tokens=image_tokens)
    if _is_flow(settings, name):
        return _ByNoise(network, schedule, _steps(settings, name))
    if isinstance(schedule, Tabulated):
        return _ByStep(network, schedule)
    return _Preconditioned(network, schedule, *_preconditioning(settings, name))


@dataclasses.dataclass(frozen=True, eq=False)
class _ByNoise:
    """A network that is given its steps' number times the noise level."""

    network: Callable[..., Any]
    schedule: Schedule
    steps: float

    def __call__(self, x, t, **conditions):
        return self.network(x, self.steps * self.schedule.sigma(t), **conditions)


@dataclasses.dataclass(frozen=True, eq=False)
class _ByStep:
    """A network that is given the step's number."""

    network: Callable[..., Any]
    schedule: Schedule

    def __call__(self, x, t, **conditions):
        return self.network(x, self.schedule.step(t), **conditions)


@dataclasses.dataclass(frozen=True, eq=False)
class _Preconditioned:
    """The denoised value (1) of a network that is given log(sigma) / 4."""

    network: Callable[..., Any]
    schedule: Schedule
    scale: float
    sign: float

    def __call__(self, x, t, **conditions):
        sigma = jnp.asarray(self.schedule.sigma(t), x.dtype)
        norm = jnp.hypot(sigma, self.scale)
        output = self.network(x / norm, jnp.log(sigma) / 4, **conditions)
        return (self.scale / norm) ** 2 * x + self.sign * sigma * self.scale / norm * output  # (1)


def _load(config: Any) -> tuple[dict[str, Any], str]:
    """Return the settings and the name of the class."""
    if isinstance(config, Mapping):
        settings = dict(config)
    elif isinstance(config, (str, os.PathLike)):
        settings = _read(Path(config))
    else:
        raise TypeError(f"`config` must be a path or a mapping, got {config!r} ({type(config).__name__}).")
    name = settings.get("_class_name")
    if name not in SCHEDULER_CLASSES:
        given = "no `_class_name`" if name is None else f"`_class_name` {name!r}"
        raise ValueError(f"The scheduler config has {given}; accepted are {', '.join(SCHEDULER_CLASSES)}.")
    return settings, name


def _read(path: Path) -> dict[str, Any]:
    places = [path / _FILE, path / "scheduler" / _FILE] if path.is_dir() else [path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"There is no scheduler config at {' or '.join(map(str, places))}.")
    try:
        settings = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{found} is not JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{found} must hold an object of settings, got {type(settings).__name__}.")
    return settings


def _is_flow(settings: Mapping[str, Any], name: str) -> bool:
    return name in _FLOW or (name in _DISCRETE and bool(settings.get("use_flow_sigmas")))


def _is_preconditioned(settings: Mapping[str, Any], name: str) -> bool:
    """Whether the network is preconditioned by (1); Euler's continuous times say so of v only."""
    continuous = settings.get("timestep_type") == "continuous" and settings.get("prediction_type") == "v_prediction"
    return name in _EDM or (name == "EulerDiscreteScheduler" and continuous)


def _shift(settings: Mapping[str, Any], name: str, image_tokens: int | None) -> float:
    """Return the shift of a flow class; a dynamic one is that of the image's size."""
    predicts = settings.get("prediction_type")
    if name in _DISCRETE and predicts != "flow_prediction":
        raise ValueError(
            f"{name} with `use_flow_sigmas` must have `prediction_type` 'flow_prediction', got {predicts!r}."
        )
    if settings.get("invert_sigmas"):
        raise ValueError(f"{name} with `invert_sigmas` runs its time backwards, which is not supported.")
    if not settings.get("use_dynamic_shifting"):
        return _number(settings, name, "flow_shift" if name in _DISCRETE else "shift")
    if image_tokens is None:
        raise ValueError(f"{name} has `use_dynamic_shifting`: give `image_tokens`, the number of the image's patches.")
    if isinstance(image_tokens, bool) or not isinstance(image_tokens, (int, np.integer)) or image_tokens < 1:
        raise ValueError(f"`image_tokens` must be an int of at least 1, got {image_tokens!r}.")
    low, high = (_number(settings, name, key) for key in ("base_image_seq_len", "max_image_seq_len"))
    start, end = (_number(settings, name, key) for key in ("base_shift", "max_shift"))
    if not high > low:
        raise ValueError(f"{name}: `max_image_seq_len` must be above `base_image_seq_len`, got {high} and {low}.")
    level = start + (image_tokens - low) / (high - low) * (end - start)
    kind = settings.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ValueError(f"{name}: `time_shift_type` must be 'exponential' or 'linear', got {kind!r}.")
    return math.exp(level) if kind == "exponential" else level


def _continuous(settings: Mapping[str, Any], name: str) -> Schedule:
    low, high = _number(settings, name, "sigma_min"), _number(settings, name, "sigma_max")
    if name not in _EDM:
        return EDM(low, high)
    kind = settings.get("sigma_schedule", "karras")
    if kind == "karras":
        return EDM(low, high, _number(settings, name, "rho"))
    if kind == "exponential":
        return VarianceExploding(low, high)
    raise ValueError(f"{name}: `sigma_schedule` must be 'karras' or 'exponential', got {kind!r}.")


def _preconditioning(settings: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Return d and the sign in (1)."""
    predicts = _prediction(settings, name, ("epsilon", "v_prediction"))
    scale = _number(settings, name, "sigma_data") if name in _EDM else 1.0
    if scale <= 0:
        raise ValueError(f"{name}: `sigma_data` must be positive, got {scale}.")
    return scale, 1.0 if predicts == "epsilon" else -1.0


def _prediction(settings: Mapping[str, Any], name: str, accepted) -> str:
    predicts = settings.get("prediction_type")
    if predicts is None:  # files of early versions
        predicts = "epsilon" if settings.get("predict_epsilon", True) else "sample"
    if predicts not in accepted:
        raise ValueError(f"{name}: `prediction_type` must be one of {_listed(accepted)}, got {predicts!r}.")
    return predicts


def _table(settings: Mapping[str, Any], name: str) -> np.ndarray:
    """Return alpha^2 at each step."""
    if settings.get("trained_betas") is not None:
        try:
            given = np.asarray(settings["trained_betas"], float)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: `trained_betas` must be a list of numbers: {error}.") from error
    else:
        kind, ends = _setting(settings, name, "beta_schedule"), {}
        if kind != "squaredcos_cap_v2":
            ends = {end: _number(settings, name, f"beta_{end}") for end in ("start", "end")}
        given = betas(kind, _steps(settings, name), **ends)
    return alphas_cumprod(given, bool(settings.get("rescale_betas_zero_snr")))


def _steps(settings: Mapping[str, Any], name: str) -> int:
    steps = _number(settings, name, "num_train_timesteps")
    if steps != int(steps) or steps < 2:
        raise ValueError(f"{name}: `num_train_timesteps` must be an int of at least 2, got {steps}.")
    return int(steps)


def _number(settings: Mapping[str, Any], name: str, key: str) -> float:
    value = _setting(settings, name, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: `{key}` must be a finite number, got {value!r}.")
    return value


def _setting(settings: Mapping[str, Any], name: str, key: str) -> Any:
    if settings.get(key) is None:
        given = ", ".join(sorted(setting for setting in settings if not setting.startswith("_")))
        raise ValueError(f"{name} needs `{key}`, and the scheduler config has only: {given or 'no settings'}.")
    return settings[key]


def _listed(accepted) -> str:
    return ", ".join(map(repr, accepted))
