"""What several tests of the language measure in the same way."""

import contextlib
import inspect
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl

logging.getLogger("jax").setLevel(logging.WARNING)

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: _COMPILED.append(event) if event == _COMPILE_EVENT else None
)


@contextlib.contextmanager
def compilations():
    """Count what XLA compiles: a list that is filled while the block runs."""
    start, counted = len(_COMPILED), []
    yield counted
    counted.extend(_COMPILED[start:])


def finished(tree):
    """Wait for arrays, so that a count of compilations is complete."""
    return jax.block_until_ready(tree)


def repeat(program, algorithm, function, num_runs, seed=0):
    """Return `function(posterior)` of many independent runs, stacked, in one compiled map."""

    def one(key):
        return function(ppl.infer(program, algorithm, key=key))

    return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(seed), num_runs))


def assert_mean_within_5_standard_errors(samples, truth, label=""):
    """Compare the mean of independent estimates, leading axis, with its exact expectation."""
    samples = np.asarray(samples, np.float64)
    mean, error = samples.mean(0), samples.std(0, ddof=1) / np.sqrt(len(samples))
    z = (mean - truth) / error
    assert np.all(np.abs(z) < 5), (
        f"{label}: mean {mean}, truth {truth}, standard error {error}, z {z}, runs {len(samples)}"
    )


def assert_trace_agrees_with_log_density(program, seeds=(0, 1, 2)):
    """Check that a program's draws and its density are those of one measure."""
    for seed in seeds:
        trace = ppl.simulate(program, seed=seed)
        expected = float(trace.log_density)
        assert np.isfinite(expected)
        np.testing.assert_allclose(ppl.log_density(program, trace.sites), expected, rtol=1e-5, atol=1e-5)


def assert_close(actual, desired):
    """Compare pytrees up to float32 rounding."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, desired)


def assert_equal(actual, desired):
    """Compare pytrees bit by bit, NaN included."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), actual, desired)


def log_mean_exp(x):
    """Return log(mean(exp(x))) of a vector."""
    return jax.nn.logsumexp(x) - jnp.log(float(len(x)))


def line_of(function, text):
    """Return `file:line` of the first line of a function that holds a text."""
    lines, first = inspect.getsourcelines(function)
    offset = next(i for i, line in enumerate(lines) if text in line)
    return f"{os.path.basename(inspect.getsourcefile(function))}:{first + offset}"


def run(function, *args, **kwargs):
    """Simulate a model that is given as a plain function."""
    return ppl.simulate(ppl.model(function)(*args, **kwargs))


def refusal(error, function, *args):
    """Return the message with which staging a program is refused."""
    with pytest.raises(error) as caught:
        run(function, *args)
    assert isinstance(caught.value, ppl.ProgramError)
    return str(caught.value)
