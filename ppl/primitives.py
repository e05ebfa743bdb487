"""The JAX primitives that the language's statements bind.

A model is run once, under `jax.make_jaxpr`, and each statement leaves an equation in the jaxpr:

    value = draw[sampler, proposal] parameters      the law as a program from (parameters, key) to a value
    score[name, kind] log_density (log_proposal)    log p(value), computed by ordinary equations beside it
    record[name] value
    given[name] value                               a site of an inner program that is observed
    carry..., ys... = loop[body, until] ...         see `ppl.control_flow`

What to draw, what to weigh and what to keep is decided by whoever interprets the equations (`ppl.interpret`), never
here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
from jax.interpreters import batching

from ppl.staging import transformed

__all__ = ["STATEMENTS", "Inner", "draw_p", "given_p", "loop_p", "record_p", "score_p", "trace"]

draw_p = jex.Primitive("ppl_draw")
score_p = jex.Primitive("ppl_score")
record_p = jex.Primitive("ppl_record")
given_p = jex.Primitive("ppl_given")
loop_p = jex.Primitive("ppl_loop")
STATEMENTS = (draw_p, score_p, record_p, given_p, loop_p)

for _primitive in STATEMENTS:
    _primitive.multiple_results = True


@draw_p.def_abstract_eval
def _draw_type(*_, aval, **__):
    return [aval]


@score_p.def_abstract_eval
def _score_type(*_, **__):
    return []


@record_p.def_abstract_eval
def _record_type(*_, **__):
    return []


@given_p.def_abstract_eval
def _given_type(*_, **__):
    return []


def _refuse_batching(primitive):
    def rule(axis_data, operands, axes, **params):
        del axis_data, operands, axes
        statement = f"the statement {params.get('name', 'ppl.scan')!r}"
        raise transformed(statement, "jax.vmap", "use a distribution with a batch shape, numpyro.plate or ppl.scan")

    batching.fancy_primitive_batchers[primitive] = rule


for _primitive in STATEMENTS:
    _refuse_batching(_primitive)


@dataclasses.dataclass(frozen=True, eq=False)
class Inner:
    """A program inside an equation. Its constant variables are operands of the equation that holds it.

    JAX caches the types of equations by their parameters, and keeps those; programs of one type are equal, so that it
    keeps one of them and not one for every staging.
    """

    jaxpr: Any
    out_avals: tuple[Any, ...]

    def __eq__(self, other):
        return isinstance(other, Inner) and self.out_avals == other.out_avals

    def __hash__(self):
        return hash(self.out_avals)


def trace(function: Callable, *args) -> tuple[Inner, list[Any]]:
    """Trace a function of the program; returns it and the values it closes over, tracers among them."""
    closed = jax.make_jaxpr(lambda *flat: function(*flat))(*args)  # a function of its own, that no cache keeps
    return Inner(getattr(closed, "jaxpr", closed), tuple(closed.out_avals)), list(closed.consts)
