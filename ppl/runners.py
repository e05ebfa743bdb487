"""Compiled runs, kept by what they compute.

Staging a program takes milliseconds, compiling a run takes seconds. A runner is therefore cached by the program's
structure (`ppl.structure`) and by what is to be done with it, and the arrays it works on (arguments, network
weights, prompts, conditioned values, the key) are passed in. Another seed, other values of the same shapes, or the same
model defined again compile nothing (law L4). The cache holds no arrays.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import jax

from ppl.chance import is_replaced
from ppl.derivatives import refuse
from ppl.host import execute
from ppl.program import Staged

__all__ = ["clear_cache", "is_traced", "lower", "run"]

_MAX_RUNNERS = 256
_RUNNERS: OrderedDict[Hashable, Callable] = OrderedDict()
_LOCK = threading.Lock()


def run(
    staged: Staged,
    purpose: Hashable,
    function: Callable,
    key: Any = None,
    *more: Any,
    differentiable: bool = False,
) -> Any:
    """Run `function(staged, inputs, given, key, *more)`, compiled unless it is being traced already.

    Args:
        staged: the program.
        purpose: what else the compiled code depends on, hashable: the algorithm and its settings.
        function: what to run. It sees the program without its values.
        key: a PRNG key, or None.
        more: further pytrees of arrays.
        differentiable: whether a derivative of the run with respect to values and arrays is right; others are refused.

    Raises:
        HostError: a host function of the program failed, see `ppl.host`.
    """
    if is_traced((staged.inputs, staged.given, key, more)):
        arguments = staged.inputs, staged.given, more
        if not differentiable:
            doer = purpose[0] if isinstance(purpose, tuple) else purpose
            arguments = refuse(
                arguments,
                f"{doer!r} has no derivative with respect to the program's arguments. ImportanceSampling and SMC have "
                "one, of log_evidence and of weighted means, and so has ppl.log_density. If none is wanted, wrap the "
                "arguments in jax.lax.stop_gradient.",
            )
        inputs, given, more = arguments
        return function(staged, inputs, given, key, *more)
    runner = _runner(staged, purpose, function)
    return execute(lambda inputs: runner(inputs, staged.given, key, *more), staged.inputs)


def lower(staged: Staged, purpose: Hashable, function: Callable, key: Any = None):
    """Return the runner lowered for these values, to look at what it compiles to."""
    return _runner(staged, purpose, function).lower(staged.inputs, staged.given, key)


def is_traced(tree: Any) -> bool:
    """Whether any leaf is a JAX tracer."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def clear_cache() -> None:
    """Forget every compiled run."""
    _RUNNERS.clear()


def _runner(staged: Staged, purpose: Hashable, function: Callable) -> Callable:
    cache_key = (staged.key(), purpose, is_replaced())  # enumerated choices compile to other code
    with _LOCK:
        runner = _RUNNERS.get(cache_key)
        if runner is None:
            skeleton = staged.without_values()
            runner = jax.jit(lambda inputs, given, *rest: function(skeleton, inputs, given, *rest))
            _RUNNERS[cache_key] = runner
            while len(_RUNNERS) > _MAX_RUNNERS:
                _RUNNERS.popitem(last=False)
        _RUNNERS.move_to_end(cache_key)
    return runner
