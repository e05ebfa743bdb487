"""The derivative of the evidence on a finite program, by running an algorithm in every way that it can go.

With arguments theta of a program of measure gamma_theta and estimate Z_hat,

    E[ d exp(log_evidence) / d theta ]  =  sum over traces x of gamma_theta(x) d log gamma_theta(x) / d theta.    (1)

Both sides are sums over finitely many runs and traces: `jax.grad` of a run that loses the derivative of a choice, a
draw, a resampling or a move, cannot pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl.program import as_program
from ppl.testing.exact_traces import all_traces, free_sites
from ppl.testing.tape import MAX_RUNS, enumerate_runs
from ppl.trace import log_density

__all__ = ["assert_unbiased_gradient"]


def assert_unbiased_gradient(
    model: Callable, arguments: Any, algorithm: Callable, atol: float = 1e-5, *, max_runs: int = MAX_RUNS
) -> None:
    """Check (1) by enumeration.

    Args:
        model: maps the arguments, one pytree, to a program with finitely many traces.
        arguments: a pytree of floats and float arrays: theta.
        algorithm: an algorithm; resampling schemes that it names are replaced by their exact laws.
        atol: the largest deviation allowed of each entry, as a share of Z.
        max_runs: the number of runs after which to give up.

    Raises:
        AssertionError: (1) does not hold; says for which arguments, with both numbers and the number of runs.
        DerivativeError: the algorithm or the program refuses a derivative.
        TypeError: a site's law is not finite, or randomness does not come from `ppl.chance`.
    """
    arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), arguments)
    program = as_program(model(arguments))
    traces = all_traces(program, free_sites(program), max_runs)

    def mass(arguments):
        densities = jax.vmap(lambda sites: log_density(model(arguments), sites))
        return jnp.sum(jnp.exp(densities({name: jnp.asarray(values) for name, values in traces.sites.items()})))

    def estimate(arguments, key):
        posterior = algorithm(as_program(model(arguments)), key, progress=False)
        return jnp.exp(posterior.log_evidence)

    key, count = jax.random.key(0), 0
    found = jax.tree.map(lambda x: np.zeros(x.shape), arguments)
    for probability, gradient in enumerate_runs(jax.grad(estimate), arguments, key)(arguments, key, max_runs=max_runs):
        weighted = jax.tree.map(functools.partial(np.multiply, probability, dtype=np.float64), gradient)
        found = jax.tree.map(np.add, found, weighted)
        count += 1
    exact = jax.tree.map(lambda g: np.asarray(g, np.float64), jax.grad(mass)(arguments))
    wrong = [
        f"  {jax.tree_util.keystr(path) or 'the argument'}: E[dZ_hat] = {a.tolist()}, but dZ = {b.tolist()}"
        for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(exact), strict=True)
        if not np.all(np.abs(a - b) <= atol * max(traces.mass, 1e-30))
    ]
    if wrong:
        lines = [f"{algorithm!r}: the derivative of exp(log_evidence) of {program!r} is biased: over all {count} runs,"]
        raise AssertionError("\n".join([*lines, *wrong]))
