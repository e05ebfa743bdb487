"""Arrays that the bodies of `jax.lax` loops and branches close over, made arguments of them.

A network that is called inside `jax.lax.cond`, `scan` or `while_loop` through a `jax.jit` of its own leaves its weights
in the inner program, as constants. Here such an equation is said again, by the public functions, with inner programs
that are flat and are given what they closed over,

    scan(f, init, xs)   ->   (lifted, init, xs) -> scan(flat f given lifted, init, xs)

so that other weights are other arguments and compile nothing (law L4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax

__all__ = ["inner_programs", "said_again"]


def inner_programs(eqn: Any) -> list[Any]:
    """Return the programs inside of a loop or branch, closed jaxprs; of other equations none."""
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        return list(params["branches"])
    if name == "scan":
        return [params["jaxpr"]]
    if name == "while":
        return [params["cond_jaxpr"], params["body_jaxpr"]]
    return []


def said_again(eqn: Any, functions: list[Callable]) -> Callable:
    """Return a loop or branch as a function of its operands.

    Args:
        eqn: the equation.
        functions: its inner programs, functions from flat arguments to a list.
    """
    return {"cond": _cond, "scan": _scan, "while": _while}[eqn.primitive.name](eqn, functions)


def _cond(eqn, branches):
    def call(index, *operands):
        return lax.switch(index, [lambda *args, f=f: f(*args) for f in branches], *operands)

    return call


def _scan(eqn, functions):
    (function,), params = functions, eqn.params
    inside = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
    ranks = lambda variables: [v.aval.ndim for v in variables]  # noqa: E731
    carried = [a == b for a, b in zip(ranks(eqn.outvars), ranks(inside.outvars), strict=True)].count(True)
    walked = [a > b for a, b in zip(ranks(eqn.invars), ranks(inside.invars), strict=True)].count(True)
    first = len(eqn.invars) - walked - carried

    def call(*operands):
        constants, init, xs = operands[:first], operands[first : first + carried], operands[first + carried :]

        def step(carry, x):
            results = function(*constants, *carry, *x)
            return tuple(results[:carried]), tuple(results[carried:])

        settings = {name: params[name] for name in ("length", "reverse", "unroll")}
        last, ys = lax.scan(step, tuple(init), tuple(xs), **settings)
        return [*last, *ys]

    return call


def _while(eqn, functions):
    condition, body = functions
    cuts = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]

    def call(*operands):
        of_condition, of_body, init = operands[: cuts[0]], operands[cuts[0] : cuts[1]], operands[cuts[1] :]
        return lax.while_loop(
            lambda state: condition(*of_condition, *state)[0],
            lambda state: tuple(body(*of_body, *state)),
            tuple(init),
        )

    return call
