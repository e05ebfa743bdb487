"""Geweke's test of a kernel by the joint distribution of latent sites and data.

Two ways to draw from p(theta, y), where y are the sites that will be observed and theta the others:

    simulated      theta, y ~ p(theta, y)                                                                         (1)
    alternating    theta ~ K_y(theta, .),  then  y ~ p(y | theta),  again and again                               (2)

If K_y leaves p(theta | y) as it is, a chain (2) that starts with a draw of (1) has the law (1) for ever, between the
two halves of a step too. The means of a test function f along C independent such chains, taken there, are C independent
numbers with the mean that (1) gives, and those of what a step of K adds to f have the mean 0:

    z = (mean over chains - mean over draws of (1)) / sqrt(s_chains^2 / C + s_draws^2 / N),                       (3)
    z = mean over chains of f(theta', y) - f(theta, y), over its standard error.                                  (4)

(3) sees where the chains drift to; (4), in which slow chains do not blur the means, sees a kernel that does not follow
the data. Chains that start in their law need no warm-up, and means of whole chains no estimate of autocorrelation.

Source: Geweke (2004), "Getting it right: joint distribution tests of posterior simulators".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl import chance
from ppl.draws import as_key
from ppl.ir import Given, Score
from ppl.program import Program, as_program, condition
from ppl.testing.columns import as_columns, named_functions
from ppl.testing.invariance import make_steps, trace_space

__all__ = ["assert_joint"]

_THRESHOLD = 5.0  # standard errors
_MOST_ENTRIES = 12  # all of whose products are compared
_SHOWN = 8


def assert_joint(
    program: Any,
    kernel: Any,
    functions: Callable | Mapping[str, Callable] | None = None,
    *,
    observed: Sequence[str] = (),
    num_draws: int = 20_000,
    num_chains: int = 200,
    num_steps: int = 2,
    seed: int = 0,
) -> None:
    """Check a kernel on any program, continuous ones too, by (3) and (4): |z| below 5 for every function.

    It sees only what `num_draws` draws can see, but it sees the random numbers as they are, keys that are used twice
    among them. The kernel runs untuned, as after a warm-up of no steps.

    Args:
        program: a program without observations and factors, in which the data are sample sites.
        kernel: a kernel on traces of the program in which the data are given.
        functions: functions of a trace, sites by name, the data's too, that return any pytree of numbers: one, or
            several by name. By default bounded functions of all entries, t = tanh((x - median) / interquartile range),
            t^2, and the products of pairs, of at most 12 entries, else of the sites' means.
        observed: names of the sites that are the data; the last in the program, as a rule. They are drawn anew from the
            program given the rest, and accepted as `Regenerate` accepts where other sites depend on them.
        num_draws: the number of draws, N, of each kind, over all chains.
        num_chains: the number of chains, C, at least 30.
        num_steps: how many steps the kernel makes with the same data; from the second on it uses what it remembers.
        seed: the seed.

    Raises:
        AssertionError: a test function has another mean; says which, both means and z.
        ValueError: the program cannot be simulated, for it has observations or factors; names them.
    """
    program = as_program(program)
    _require_simulable(program)
    if num_chains < 30 or num_draws < num_chains:
        raise ValueError(f"`num_chains` must be from 30 to `num_draws`, got {num_chains} and {num_draws}.")
    length = num_draws // num_chains
    joint = trace_space(program, kernel)
    observed = joint.select(list(observed), "observed") if observed else ()
    prior_key, chain_key = jax.random.split(as_key(seed))

    def moves_given(sites):
        given = condition(program, {name: sites[name] for name in observed})
        return kernel.bind(trace_space(kernel.prepare(given), kernel))

    def step(sites, key):
        kernel_key, data_key, accept_key = jax.random.split(key, 3)
        latent = {name: value for name, value in sites.items() if name not in observed}
        latent, _ = make_steps(moves_given(sites), kernel_key, latent, num_steps)
        between = {name: latent.get(name, value) for name, value in sites.items()}
        if not observed:
            return between, (sites, between)
        redrawn = dict.fromkeys(observed, True)
        new, log_weight = joint.redraw(data_key, between, redrawn)
        accepted = chance.accept(accept_key, log_weight - joint.redraw_log_weight(between, redrawn))
        return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, between), (sites, between)

    def chain(key):
        keys = jax.random.split(key, length + 1)
        return jax.lax.scan(step, joint.simulate(keys[0])[0], keys[1:])[1]

    draw = jax.jit(jax.vmap(lambda key: joint.simulate(key)[0]))
    prior = draw(jax.random.split(prior_key, num_draws))
    moves = moves_given(jax.tree.map(lambda a: a[0], prior))
    alternate = jax.jit(lambda keys: moves.over(chain, keys))
    halves = alternate(jax.random.split(chain_key, num_chains))
    halves = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), halves)
    evaluate = _default_functions(prior, num_draws) if functions is None else _users_functions(functions)
    labels, expected = evaluate(prior, num_draws)
    before, after = (evaluate(half, num_chains * length)[1].reshape(num_chains, length, -1) for half in halves)
    means, added = after.mean(axis=1), (after - before).mean(axis=1)
    labels += [f"what a step adds to {label}" for label in labels]
    means, expected = np.hstack([means, added]), np.hstack([expected, np.zeros_like(expected)])
    z = _z_scores(means, expected)
    wrong = [i for i in np.argsort(-np.abs(z)) if not abs(z[i]) < _THRESHOLD]
    if wrong:
        rows = [
            f"  {labels[i]}: mean {expected[:, i].mean():.5g}, with the kernel {means[:, i].mean():.5g}, z = {z[i]:.1f}"
            for i in wrong[:_SHOWN]
        ]
        more = [f"  and {len(wrong) - _SHOWN} more."] if len(wrong) > _SHOWN else []
        heading = (
            f"{kernel!r} does not leave the joint distribution of {program!r} as it is: {len(wrong)} of {len(labels)} "
            f"test functions have another mean over {num_draws} draws:"
        )
        raise AssertionError("\n".join([heading, *rows, *more]))


def _z_scores(means: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Return z of (3) for chains' means `[C, F]` and draws `[N, F]`; 0 where nothing varies and the means agree."""
    if not (np.isfinite(means).all() and np.isfinite(draws).all()):
        raise ValueError("a test function is not finite at a draw; bounded functions of the sites are the safest.")
    difference = means.mean(axis=0) - draws.mean(axis=0)
    variance = means.var(axis=0, ddof=1) / len(means) + draws.var(axis=0, ddof=1) / len(draws)
    rounding = 1e-6 * (1 + np.abs(draws.mean(axis=0)))
    return np.where(np.abs(difference) <= rounding, 0.0, difference / np.sqrt(np.maximum(variance, rounding**2)))


def _require_simulable(program: Program) -> None:
    staged = program.stage(keep_rules=False)
    weighed = [
        node.name
        for node, _ in staged.block.statements()
        if isinstance(node, Given) or (isinstance(node, Score) and node.is_evidence)
    ]
    weighed = sorted({*weighed, *staged.given})
    if weighed:
        raise ValueError(
            f"`program` {program!r} cannot be simulated: {weighed} are observations, factors or given values. Make "
            "data sample sites and name them in `observed`."
        )


_Evaluate = Callable[[Mapping[str, Any], int], tuple[list[str], np.ndarray]]
"""From traces `[count, ...]` and their count to the test functions' names and values, `[count, F]`."""


def _default_functions(prior: Mapping[str, Any], num_draws: int) -> _Evaluate:
    """Return bounded functions of a trace's entries, scaled by the draws of (1)."""
    low, middle, high = np.quantile(as_columns(prior, num_draws)[1], [0.25, 0.5, 0.75], axis=0)
    scale = np.where(high > low, high - low, 1.0)

    def evaluate(sites, count):
        labels, entries = as_columns(sites, count)
        t = np.tanh((entries - middle) / scale)
        parts = dict(zip(labels, t.T, strict=True))
        if len(labels) > _MOST_ENTRIES:
            owners = [label.split("[")[0] for label in labels]
            parts = {name: t[:, [o == name for o in owners]].mean(axis=1) for name in sites}
        pairs = list(itertools.combinations(parts, 2))
        names = [f"tanh {label}" for label in labels] + [f"tanh^2 {label}" for label in labels]
        names += [f"tanh {a} tanh {b}" for a, b in pairs]
        products = np.array([parts[a] * parts[b] for a, b in pairs]).reshape(len(pairs), count).T
        return names, np.concatenate([t, t**2, products], axis=1)

    return evaluate


def _users_functions(functions) -> _Evaluate:
    named = named_functions(functions)
    return lambda sites, count: as_columns({name: function(sites) for name, function in named.items()}, count)
