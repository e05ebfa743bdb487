"""Every public name has a docstring and is used in a test."""

import importlib
import inspect
import re
import typing
from pathlib import Path

import jax.numpy as jnp
import pytest

import ppl
from ppl.inference import SMC, Sandwich, sandwich
from ppl.kernels.weights import WeightSummary, summarize
from tests.finite_programs import hidden_markov

TESTS = Path(__file__).parent
PACKAGES = [
    "ppl",
    "ppl.inference",
    "ppl.models",
    "ppl.testing",
    "ppl.kernels.annealing",
    "ppl.kernels.moves",
    "ppl.kernels.resampling",
    "ppl.kernels.tokens",
    "ppl.kernels.weights",
]


def public_names(package):
    """The names that a package exports: `__all__`, or what it imports under its own name."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name for name, value in vars(module).items() if not name.startswith("_") and not inspect.ismodule(value)
        ]
    assert names, package
    public = {name: getattr(module, name) for name in names}
    return {name: value for name, value in public.items() if typing.get_origin(value) is None}  # no aliases of types


@pytest.fixture(scope="module")
def words():
    """All identifiers that stand in tests, in the order of no importance."""
    texts = (path.read_text() for path in TESTS.rglob("*.py"))
    return {word for text in texts for word in re.findall(r"\w+", text)}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(package):
    lacking = []
    for name, value in public_names(package).items():
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue  # constants and type aliases say what they are beside their definition
        own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        generated = own is not None and own.startswith(f"{name}(")  # what a dataclass writes where nobody did
        if not (own and own.strip()) or generated:
            lacking.append(name)
    assert not lacking


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_used_in_a_test(package, words):
    assert not sorted(set(public_names(package)) - words)


def test_the_check_sees_a_name_that_no_test_uses(words):
    assert "resampler" in words and "no" + "body" + "says" + "this" not in words


def test_what_comes_back_is_of_the_types_that_are_exported():
    program = hidden_markov(jnp.array([0, 1]))
    assert isinstance(program, ppl.Program) and isinstance(hidden_markov, ppl.Model)
    trace = ppl.simulate(program)
    assert isinstance(trace, ppl.Trace)
    assert isinstance(sandwich(program, SMC(2), {"x": trace.sites["x"][None]}, num_runs=2), Sandwich)
    assert isinstance(summarize(jnp.zeros(2)), WeightSummary)
    assert issubclass(ppl.Process, ppl.Target) and issubclass(ppl.Mixture, ppl.Process)
