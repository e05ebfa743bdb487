"""Other libraries' resampling schemes under one signature, as far as they are installed.

All start from unnormalised log-weights: blackjax and particles ask for normalised weights, so their softmax is part of
the call; cuthbert normalises by itself. On a CPU cuthbert searches in numba, through a callback.
"""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["jax_peers", "missing", "numpy_peers"]

JaxResampler = Callable[[jax.Array, jax.Array], jax.Array]
"""``(key, log_weights[n]) -> ancestors[n]``."""


def _module(name: str):
    """Import a module; None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def missing() -> list[str]:
    """Return the names of the peers that are not installed."""
    modules = {"blackjax": "blackjax", "cuthbert": "cuthbertlib.resampling", "particles": "particles.resampling"}
    return [name for name, module in modules.items() if _module(module) is None]


def jax_peers(scheme: str) -> dict[str, JaxResampler]:
    """Return the peers' functions for one scheme that work inside `jax.jit`, by the library's name."""
    peers: dict[str, JaxResampler] = {}
    if (blackjax := _module("blackjax.smc.resampling")) and hasattr(blackjax, scheme):
        resample = getattr(blackjax, scheme)
        peers["blackjax"] = lambda key, log_weights: resample(key, jax.nn.softmax(log_weights), log_weights.shape[0])
    if cuthbert := _module(f"cuthbertlib.resampling.{scheme}"):
        peers["cuthbert"] = lambda key, log_weights: cuthbert.resampling(key, log_weights, (), log_weights.shape[0])[0]
    if scheme == "systematic" and jax.default_backend() != "cpu":
        peers["cumsum + searchsorted"] = _search
    return peers


def numpy_peers(scheme: str) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Return the peers' functions for one scheme that work on float64 NumPy arrays, by the library's name.

    In float32 the search of particles 0.4 runs past the end of its weights, whose sum is then below 1.
    """
    particles = _module("particles.resampling")
    if particles is None or scheme not in particles.rs_funcs:
        return {}
    resample = particles.rs_funcs[scheme]
    return {"particles": lambda log_weights: resample(particles.exp_and_normalise(log_weights))}


def _search(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Systematic resampling as one would write it by hand."""
    n = log_weights.shape[0]
    points = (jnp.arange(n) + jax.random.uniform(key)) / n
    return jnp.clip(jnp.searchsorted(jnp.cumsum(jax.nn.softmax(log_weights)), points), 0, n - 1)
