"""Scheduler files of pretrained models give the noise levels that those models were trained on."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ppl.models.diffusion.beta_schedules import BETA_SCHEDULES
from ppl.models.diffusion.predictions import to_denoised
from ppl.models.diffusion.scheduler_config import SCHEDULER_CLASSES, network_denoiser, read_scheduler
from ppl.models.diffusion.schedules import EDM, RectifiedFlow, VarianceExploding
from ppl.models.diffusion.tabulated_schedule import Tabulated

STABLE_DIFFUSION = {  # as published with Stable Diffusion 1.5: no `prediction_type` in files that old
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
ZERO_SNR = {  # a v-prediction fine-tune of SDXL
    **STABLE_DIFFUSION,
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sigma_max": None,
    "sigma_min": None,
    "timestep_type": "discrete",
    "use_karras_sigmas": False,
}
VIDEO = {  # Stable Video Diffusion
    **STABLE_DIFFUSION,
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
FLUX = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
EDM_FILE = {
    "_class_name": "EDMEulerScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "sigma_schedule": "karras",
}
DDPM = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "variance_type": "fixed_large",
}


def test_stable_diffusion_has_its_published_levels():
    schedule, predicts = read_scheduler(STABLE_DIFFUSION)
    assert predicts == "epsilon" and isinstance(schedule, Tabulated)
    ratio = np.exp(schedule.log_ratio(np.array([0.0, 1.0])))
    np.testing.assert_allclose(ratio, [0.0292, 14.6146], atol=5e-5)  # k-diffusion's sigma_min and sigma_max
    np.testing.assert_allclose(ratio[0], math.sqrt(0.00085 / (1 - 0.00085)), rtol=1e-12)


def test_the_levels_of_the_first_diffusion_models():
    schedule, predicts = read_scheduler(DDPM)
    assert predicts == "epsilon"
    product, table = 1.0, []
    for step in range(1000):
        product *= 1 - (0.0001 + (0.02 - 0.0001) * step / 999)
        table.append(product)
    np.testing.assert_allclose(schedule.alphas_cumprod, table, rtol=1e-11)
    np.testing.assert_allclose(schedule.alphas_cumprod[-1], 4.0358e-5, rtol=1e-4)


def test_the_cosine_table_is_the_cosine_but_for_the_capped_end():
    schedule, _ = read_scheduler({**DDPM, "beta_schedule": "squaredcos_cap_v2"})
    steps = np.arange(1000)
    cosine = (np.cos(np.pi / 2 * ((steps + 1) / 1000 + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], cosine[:-1], rtol=1e-9)
    np.testing.assert_allclose(schedule.alphas_cumprod[-1], cosine[-2] * 0.001, rtol=1e-9)


def test_zero_terminal_snr_keeps_the_first_step_and_leaves_nothing_in_the_last():
    plain, _ = read_scheduler({**ZERO_SNR, "rescale_betas_zero_snr": False})
    schedule, predicts = read_scheduler(ZERO_SNR)
    assert predicts == "v"
    assert schedule.alphas_cumprod[-1] == 0.0 and schedule.alpha(1.0) == 0.0 and schedule.log_ratio(1.0) == math.inf
    before, after = (np.sqrt(np.asarray(each.alphas_cumprod)) for each in (plain, schedule))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-13)
    falls = np.diff(after) / np.diff(before)
    np.testing.assert_allclose(falls, np.full(999, before[0] / (before[0] - before[-1])), rtol=1e-9)


def test_trained_betas_are_taken_as_they_are():
    betas = [0.1, 0.2, 0.3]
    schedule, _ = read_scheduler({"_class_name": "DDIMScheduler", "trained_betas": betas})
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.9, 0.72, 0.504], rtol=1e-13)


@pytest.mark.parametrize("name", [name for name in SCHEDULER_CLASSES if not name.startswith(("EDM", "Flow"))])
def test_discrete_classes_differ_in_their_sampler_only(name):
    assert read_scheduler({**STABLE_DIFFUSION, "_class_name": name}) == read_scheduler(STABLE_DIFFUSION)


@pytest.mark.parametrize("given, predicts", [("epsilon", "epsilon"), ("sample", "x0"), ("v_prediction", "v")])
def test_prediction_types(given, predicts):
    assert read_scheduler({**DDPM, "prediction_type": given})[1] == predicts


def test_the_prediction_of_early_files():
    early = {key: value for key, value in DDPM.items() if key != "prediction_type"}
    assert read_scheduler({**early, "predict_epsilon": True})[1] == "epsilon"
    assert read_scheduler({**early, "predict_epsilon": False})[1] == "x0"


def test_continuous_classes():
    assert read_scheduler(EDM_FILE) == (EDM(0.002, 80.0, 7.0), "x0")
    multistep = {**EDM_FILE, "_class_name": "EDMDPMSolverMultistepScheduler", "sigma_schedule": "exponential"}
    assert read_scheduler(multistep) == (VarianceExploding(0.002, 80.0), "x0")
    assert read_scheduler(VIDEO) == (EDM(0.002, 700.0, 7.0), "x0")


def test_flow_classes():
    fixed = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    assert read_scheduler(fixed) == (RectifiedFlow(3.0), "velocity")
    assert read_scheduler({**fixed, "_class_name": "FlowMatchHeunDiscreteScheduler"}) == (
        RectifiedFlow(3.0),
        "velocity",
    )
    solver = {**DDPM, "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}
    assert read_scheduler({**solver, "use_flow_sigmas": True, "flow_shift": 5.0}) == (RectifiedFlow(5.0), "velocity")


@pytest.mark.parametrize("tokens, level", [(256, 0.5), (4096, 1.15), (2176, 0.825)])
def test_a_dynamic_shift_is_that_of_the_image(tokens, level):
    schedule, _ = read_scheduler(FLUX, image_tokens=tokens)
    assert schedule.shift == pytest.approx(math.exp(level), rel=1e-12)
    t = np.array([0.2, 0.7])
    np.testing.assert_allclose(schedule.sigma(t), math.exp(level) / (math.exp(level) + 1 / t - 1), rtol=1e-12)
    linear, _ = read_scheduler({**FLUX, "time_shift_type": "linear"}, image_tokens=tokens)
    assert linear.shift == pytest.approx(level, rel=1e-12)


def test_a_file_is_found_by_its_path_its_folder_and_the_models_folder(tmp_path):
    folder = tmp_path / "model" / "scheduler"
    folder.mkdir(parents=True)
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(STABLE_DIFFUSION))
    wanted = read_scheduler(STABLE_DIFFUSION)
    for given in (path, str(path), folder, tmp_path / "model"):
        assert read_scheduler(given) == wanted


def test_a_discrete_network_is_given_the_step():
    seen = []
    denoiser = network_denoiser(lambda x, step, text: seen.append((step, text)) or x, STABLE_DIFFUSION)
    for t, step in ((0.0, 0), (1.0, 999), (500 / 999, 500)):
        assert denoiser(2.0, t, text="a") == 2.0
        assert seen[-1][0] == pytest.approx(step, abs=1e-9) and seen[-1][1] == "a"


def test_a_flow_network_is_given_a_thousand_noise_levels():
    fixed = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    denoiser = network_denoiser(lambda x, step: step, fixed)
    assert denoiser(2.0, 1.0) == 1000.0
    assert denoiser(2.0, 0.5) == pytest.approx(750.0)
    assert network_denoiser(lambda x, step: step, FLUX, image_tokens=256)(2.0, 1.0) == 1000.0


@pytest.mark.parametrize("config", [EDM_FILE, {**EDM_FILE, "prediction_type": "v_prediction"}, VIDEO])
def test_a_preconditioned_network_gives_the_denoised_value(config):
    # With z = x / sqrt(s^2 + d^2) on the path where the data are divided by d, v-prediction is `v` of that path, and
    # what EDM files call "epsilon" is minus that.
    data_scale, sign = config.get("sigma_data", 1.0), 1 if config["prediction_type"] == "epsilon" else -1
    mean, spread = 0.3, 0.8
    schedule, predicts = read_scheduler(config)
    assert predicts == "x0"

    def network(z, time):
        sigma = jnp.exp(4 * time)
        norm = jnp.hypot(sigma, data_scale)
        x, alpha, noise = z * norm, data_scale / norm, sigma / norm
        denoised = mean + spread**2 * (x - mean) / (spread**2 + sigma**2)
        epsilon = (x - denoised) / sigma
        return -sign * (alpha * epsilon - noise * denoised / data_scale)

    denoiser, x = network_denoiser(network, config), jnp.linspace(-2.0, 2.0, 5)
    for t in (0.0, 0.2, 0.6, 1.0):
        sigma = schedule.sigma(t)
        denoised = mean + spread**2 * (x - mean) / (spread**2 + sigma**2)
        got = to_denoised(predicts, denoiser(x, t), x, schedule.alpha(t), sigma)
        np.testing.assert_allclose(got, denoised, rtol=1e-4, atol=1e-5)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "has no `_class_name`; accepted are DDIMInverseScheduler, .*EDMEulerScheduler"),
        ({"_class_name": "LCMScheduler"}, "has `_class_name` 'LCMScheduler'; accepted are DDIM"),
        ({**DDPM, "beta_schedule": "sigmoid"}, f"must be one of {', '.join(map(repr, BETA_SCHEDULES))}, got 'sigmoid'"),
        ({**DDPM, "prediction_type": "flow"}, "must be one of 'epsilon', 'sample', 'v_prediction', got 'flow'"),
        ({**EDM_FILE, "prediction_type": "sample"}, "must be one of 'epsilon', 'v_prediction', got 'sample'"),
        ({**EDM_FILE, "sigma_schedule": "linear"}, "must be 'karras' or 'exponential', got 'linear'"),
        ({**EDM_FILE, "sigma_data": 0}, "`sigma_data` must be positive, got 0"),
        (without(EDM_FILE, "sigma_data"), "EDMEulerScheduler needs `sigma_data`, and .* only: num_train_timesteps"),
        (without(EDM_FILE, "rho"), "EDMEulerScheduler needs `rho`"),
        (without(DDPM, "beta_schedule"), "DDPMScheduler needs `beta_schedule`"),
        (without(DDPM, "beta_end"), "DDPMScheduler needs `beta_end`, and .* only: beta_schedule, beta_start"),
        (without(DDPM, "num_train_timesteps"), "DDPMScheduler needs `num_train_timesteps`"),
        ({"_class_name": "DDPMScheduler"}, "needs `beta_schedule`, and the scheduler config has only: no settings"),
        ({**DDPM, "beta_start": "0.1"}, "`beta_start` must be a finite number, got '0.1'"),
        ({**DDPM, "beta_end": 1.5}, "The betas must be at least 2 numbers between 0 and 1"),
        (
            {**DDPM, "beta_schedule": "scaled_linear", "beta_start": -0.1},
            "`beta_start` and `beta_end` must be positive",
        ),
        ({**DDPM, "num_train_timesteps": 1}, "`num_train_timesteps` must be an int of at least 2, got 1"),
        ({**DDPM, "num_train_timesteps": 10.5}, "`num_train_timesteps` must be an int of at least 2, got 10.5"),
        ({**DDPM, "trained_betas": [0.1, "a"]}, "`trained_betas` must be a list of numbers"),
        ({**DDPM, "trained_betas": [0.1]}, "The betas must be at least 2 numbers"),
        ({**DDPM, "use_flow_sigmas": True}, "must have `prediction_type` 'flow_prediction', got 'epsilon'"),
        (without(FLUX, "shift", "use_dynamic_shifting"), "FlowMatchEulerDiscreteScheduler needs `shift`"),
        (FLUX, "has `use_dynamic_shifting`: give `image_tokens`"),
        ({**FLUX, "use_dynamic_shifting": False, "shift": 0.0}, "`shift` must be positive"),
        ({**FLUX, "invert_sigmas": True}, "`invert_sigmas` runs its time backwards"),
    ],
)
def test_bad_files_are_refused_by_what_is_wrong_with_them(config, message):
    with pytest.raises(ValueError, match=message):
        read_scheduler(config)


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True])
def test_bad_image_sizes_are_refused(tokens):
    with pytest.raises(ValueError, match="`image_tokens` must be an int of at least 1"):
        read_scheduler(FLUX, image_tokens=tokens)


def test_bad_dynamic_shifts_are_refused():
    with pytest.raises(ValueError, match="`time_shift_type` must be 'exponential' or 'linear', got 'cubic'"):
        read_scheduler({**FLUX, "time_shift_type": "cubic"}, image_tokens=300)
    with pytest.raises(ValueError, match="`max_image_seq_len` must be above `base_image_seq_len`, got 256 and 256"):
        read_scheduler({**FLUX, "max_image_seq_len": 256}, image_tokens=300)


def test_files_that_are_not_there_or_not_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="no scheduler config at .*scheduler_config.json or .*scheduler/"):
        read_scheduler(tmp_path)
    with pytest.raises(FileNotFoundError, match="no scheduler config at .*none.json"):
        read_scheduler(tmp_path / "none.json")
    path = tmp_path / "scheduler_config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_scheduler(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must hold an object of settings, got list"):
        read_scheduler(tmp_path)
    with pytest.raises(TypeError, match="`config` must be a path or a mapping, got 3"):
        read_scheduler(3)
