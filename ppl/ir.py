"""The staged program: a jaxpr made flat, with the program's statements as nodes of their own.

`make_jaxpr` gives a tree of nested jaxprs: every `jax.jit` inside the user's function is an equation with a program
inside. A particle can only be kept whole if one frame holds every live value, so `flatten` inlines these, lifts the
arrays they close over to inputs, and numbers the variables in order of appearance. Programs inside `jax.lax` loops and
branches of the user's own are flattened where they stand, see `ppl.lifting`.

A `Block` is a straight line of nodes:

    Apply    a JAX primitive                          (a deterministic computation)
    Draw     a random value with the law it comes from (`ppl.sample`)
    Score    a log-density or a factor                 (`ppl.sample`, `ppl.observe`, `ppl.factor`)
    Record   a named value                             (`ppl.deterministic`)
    Given    the value of a site that is observed      (`ppl.condition` of an inner program)
    Loop     `ppl.scan`, its body a `Block`
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from ppl.lifting import inner_programs, said_again
from ppl.primitives import Inner, draw_p, given_p, loop_p, record_p, score_p
from ppl.supports import Support

__all__ = [
    "Apply",
    "Block",
    "Draw",
    "Given",
    "Literal",
    "Loop",
    "Record",
    "Score",
    "Stretch",
    "evaluate_fixed",
    "flatten",
    "open_jaxpr",
]

# Equations whose inner program is run once, as it stands. The derivative rules of the custom ones matter only to
# interpretations that differentiate, see `flatten`.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_CUSTOM_RULES = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Literal:
    """A scalar constant written in the program."""

    value: Any

    def key(self):
        """Return what makes two literals the same: type, shape and bytes."""
        value = np.asarray(self.value)
        return ("literal", str(value.dtype), value.shape, value.tobytes())


Atom = int | Literal  # a variable's number, or a constant


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Apply:
    """A JAX primitive applied to values."""

    primitive: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """A random value: `sampler` maps (parameters..., key) to it; so does `proposal`, where the user gave one.

    `support` tells where it may lie, given `bounds`. A law that has a density alone has no sampler.
    """

    name: str
    parameters: tuple[Atom, ...]
    proposal_parameters: tuple[Atom, ...]
    bounds: tuple[Atom, ...]
    output: int
    sampler: Block | None
    proposal: Block | None
    support: Support | None
    aval: Any
    internal: bool
    key_index: int
    where: str

    @property
    def inputs(self) -> tuple[Atom, ...]:
        """The values that this node reads."""
        return self.parameters + self.proposal_parameters + self.bounds

    @property
    def is_certain(self) -> bool:
        """Whether the value is certain given the parameters, as that of `dist.Delta` is: nothing is drawn."""
        if self.sampler is None or self.proposal is not None:
            return False
        return not any(self.sampler.inputs[-1] in node.inputs for node in self.sampler.nodes)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The variable that this node defines."""
        return (self.output,)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Score:
    """A contribution to the log-density: of a sample site, an observation or a factor."""

    name: str
    kind: str  # "sample", "observe", "factor", or whose parameters it checks: "distribution's parameters"
    log_density: Atom
    log_proposal: Atom | None
    where: str

    @property
    def inputs(self) -> tuple[Atom, ...]:
        """The values that this node reads."""
        return (self.log_density,) if self.log_proposal is None else (self.log_density, self.log_proposal)

    @property
    def checks(self) -> bool:
        """Whether it is no part of the density: 0, NaN where a parameter is wrong, -inf where no value is possible."""
        return self.kind.endswith("parameters")

    @property
    def is_evidence(self) -> bool:
        """Whether it is an observation's or a factor's."""
        return self.kind in ("observe", "factor")

    @property
    def outputs(self) -> tuple[int, ...]:
        """A score defines nothing."""
        return ()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A deterministic value that the user asked to keep."""

    name: str
    value: Atom
    aval: Any
    internal: bool
    where: str

    @property
    def inputs(self) -> tuple[Atom, ...]:
        """The value that is recorded."""
        return (self.value,)

    @property
    def outputs(self) -> tuple[int, ...]:
        """A record defines nothing."""
        return ()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Given:
    """The value of a sample site further on that is not drawn but observed."""

    name: str
    value: Atom
    aval: Any
    where: str

    @property
    def inputs(self) -> tuple[Atom, ...]:
        """The value."""
        return (self.value,)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Nothing is defined."""
        return ()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Loop:
    """`ppl.scan`. The body maps (constants, carry, x) to (carry, y); `until` maps (its constants, carry) to a bool."""

    constants: tuple[Atom, ...]
    until_constants: tuple[Atom, ...]
    init: tuple[Atom, ...]
    xs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    body: Block
    until: Block | None
    length: int
    scratch: tuple[bool, ...]
    resamples: bool
    key_index: int
    where: str

    @property
    def inputs(self) -> tuple[Atom, ...]:
        """The values that this node reads."""
        return self.constants + self.until_constants + self.init + self.xs

    @property
    def invariant(self) -> tuple[bool, ...]:
        """Which carry values the body hands on untouched: constants in all but name."""
        first = len(self.constants)
        entering = self.body.inputs[first : first + len(self.init)]
        return tuple(a == b for a, b in zip(entering, self.body.outputs, strict=False))


Node = Apply | Draw | Score | Record | Given | Loop


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """A run of deterministic nodes between two statements, evaluated as one function of `inputs`."""

    nodes: tuple[Apply, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __call__(self, *arrays):
        """Evaluate the run; returns the values of `outputs`."""
        values = dict(zip(self.inputs, arrays, strict=True))
        for node in self.nodes:
            operands = [values[a] if isinstance(a, int) else a.value for a in node.inputs]
            results = node.primitive.bind(*operands, **node.primitive.get_bind_params(node.params))
            values.update(zip(node.outputs, results if node.primitive.multiple_results else [results], strict=True))
        return [values[v] for v in self.outputs]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A straight line of nodes. Variables are numbered within the block; `avals` gives their types."""

    inputs: tuple[int, ...]
    outputs: tuple[Atom, ...]
    nodes: tuple[Node, ...]
    num_keys: int
    avals: dict[int, Any]

    @cached_property
    def segments(self) -> tuple[Stretch | Node, ...]:
        """The nodes with runs of `Apply` gathered into stretches."""
        needed = {a for a in self.outputs if isinstance(a, int)}
        segments: list[Stretch | Node] = []
        run: list[Apply] = []

        def close_run():
            if run:
                segments.append(_stretch(tuple(reversed(run)), needed))
                needed.update(segments[-1].inputs)
                run.clear()

        for node in reversed(self.nodes):
            if isinstance(node, Apply):
                run.append(node)
            else:
                close_run()
                segments.append(node)
                needed.update(a for a in node.inputs if isinstance(a, int))
        close_run()
        return tuple(reversed([s for s in segments if not isinstance(s, Stretch) or s.nodes]))

    def evaluate(self, *arrays) -> list[Any]:
        """Evaluate a block without statements at its inputs' values."""
        values = dict(zip(self.inputs, arrays, strict=True))
        for stretch in self.segments:
            values.update(zip(stretch.outputs, stretch(*(values[v] for v in stretch.inputs)), strict=True))
        return [values[a] if isinstance(a, int) else a.value for a in self.outputs]

    def statements(self) -> Iterator[tuple[Node, tuple[Loop, ...]]]:
        """Yield every statement, loops included, with the loops it stands in, outermost first."""
        for node in self.nodes:
            if isinstance(node, Loop):
                for inner, loops in node.body.statements():
                    yield inner, (node, *loops)
            elif not isinstance(node, Apply):
                yield node, ()

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the block's statements, loops included."""
        return frozenset(node.name for node, _ in self.statements())


def _stretch(nodes: tuple[Apply, ...], needed: set[int]) -> Stretch:
    """Gather a run of nodes, without those that nothing needs."""
    wanted = set(needed)
    kept: list[Apply] = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs) or _is_effect(node):
            kept.append(node)
            wanted.update(a for a in node.inputs if isinstance(a, int))
    kept.reverse()
    defined = {v for node in kept for v in node.outputs}
    inputs = dict.fromkeys(a for node in kept for a in node.inputs if isinstance(a, int) and a not in defined)
    return Stretch(tuple(kept), tuple(inputs), tuple(v for v in sorted(defined) if v in needed))


def _is_effect(node: Apply) -> bool:
    return "callback" in node.primitive.name or node.primitive.name.startswith("debug_")


def evaluate_fixed(block: Block, inputs: list[Any]) -> tuple[Block, list[Any]]:
    """Evaluate what a program computes from its inputs alone, as the reading of a prompt, once and for all.

    Args:
        block: a whole program.
        inputs: its inputs' values.

    Returns:
        A program that is given the results, with their values after `inputs`, and that means the same.
    """
    known = dict(zip(block.inputs, inputs, strict=True))
    kept: list[Node] = []
    for node in block.nodes:
        fixed = isinstance(node, Apply) and all(not isinstance(a, int) or a in known for a in node.inputs)
        if not fixed or _is_effect(node):
            kept.append(node)
            continue
        operands = [known[a] if isinstance(a, int) else a.value for a in node.inputs]
        results = node.primitive.bind(*operands, **node.primitive.get_bind_params(node.params))
        known.update(zip(node.outputs, results if node.primitive.multiple_results else [results], strict=True))
    needed = {a for a in block.outputs if isinstance(a, int)}
    needed.update(a for node in kept for a in node.inputs if isinstance(a, int))
    more = tuple(v for v in known if v in needed and v not in block.inputs)
    rest = Block((*block.inputs, *more), block.outputs, tuple(kept), block.num_keys, block.avals)
    return rest, [*inputs, *(known[v] for v in more)]


def flatten(jaxpr, consts=(), *, keep_rules: bool = True) -> tuple[Block, list[Any]]:
    """Make a jaxpr flat.

    Args:
        jaxpr: a `Jaxpr` as `jax.make_jaxpr` gives it.
        consts: the values of its constant variables. They become the block's first inputs.
        keep_rules: keep equations with derivative rules of their own (`jax.custom_jvp`, `jax.custom_vjp`) whole.
            False inlines them: the values are the same, and the key no longer depends on the rule's identity.

    Returns:
        The block, whose inputs are (constants..., the jaxpr's inputs...), and the constants' values: `consts` and
        the arrays that inner programs closed over.
    """
    builder = _Builder(keep_rules)
    args = [builder.variable(v.aval) for v in jaxpr.invars]
    outputs = builder.inline(jaxpr, [builder.constant(c) for c in consts], args)
    return builder.block(args, outputs), builder.constants


class _Builder:
    """Numbers variables and collects nodes and constants while jaxprs are inlined."""

    def __init__(self, keep_rules: bool):
        self.keep_rules = keep_rules
        self.avals: dict[int, Any] = {}
        self.nodes: list[Node] = []
        self.num_keys = 0
        self.constants: list[Any] = []
        self.constant_variables: dict[int, int] = {}

    def variable(self, aval) -> int:
        self.avals[len(self.avals)] = aval
        return len(self.avals) - 1

    def constant(self, value) -> int:
        """Return the variable of a closed-over array, one for each array object."""
        if id(value) not in self.constant_variables:
            self.constant_variables[id(value)] = self.variable(jax.typeof(value))
            self.constants.append(value)
        return self.constant_variables[id(value)]

    def block(self, args: list[int], outputs: list[Atom]) -> Block:
        inputs = (*self.constant_variables.values(), *args)
        return Block(inputs, tuple(outputs), tuple(self.nodes), self.num_keys, self.avals)

    def sub_block(self, inner: Inner) -> tuple[Block, list[int]]:
        """Flatten an inner program; the arrays it closed over become constants of this one."""
        builder = _Builder(self.keep_rules)
        args = [builder.variable(v.aval) for v in (*inner.jaxpr.constvars, *inner.jaxpr.invars)]
        cut = len(inner.jaxpr.constvars)
        outputs = builder.inline(inner.jaxpr, args[:cut], args[cut:])
        return builder.block(args, outputs), [self.constant(c) for c in builder.constants]

    def inline(self, jaxpr, consts: list[Atom], args: list[Atom]) -> list[Atom]:
        """Append a jaxpr's equations to this block; returns its outputs."""
        env: dict[Any, Atom] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom) -> Atom:
            return Literal(atom.val) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inner = self.called_program(eqn)
            inputs = [read(a) for a in eqn.invars]
            if inner is not None:
                inner_jaxpr, inner_consts = open_jaxpr(inner)
                results = self.inline(inner_jaxpr, [self.constant(c) for c in inner_consts], inputs)
            elif (opened := self.opened(eqn)) is not None:
                again, lifted = opened
                inner_jaxpr, inner_consts = open_jaxpr(again)
                lifted = [self.constant(array) for array in lifted]
                results = self.inline(inner_jaxpr, [self.constant(c) for c in inner_consts], [*lifted, *inputs])
            else:
                results = [self.variable(v.aval) for v in eqn.outvars]
                self.nodes.append(self.node(eqn, tuple(inputs), tuple(results)))
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def called_program(self, eqn):
        """Return the inner program of an equation that is to be inlined, or None."""
        name = eqn.primitive.name
        if name in _CALLS:
            return eqn.params[_CALLS[name]]
        if name in _CUSTOM_RULES and not self.keep_rules:
            return eqn.params[_CUSTOM_RULES[name]]
        return None

    def node(self, eqn, inputs: tuple[Atom, ...], outputs: tuple[int, ...]) -> Node:
        params = eqn.params
        if eqn.primitive is draw_p:
            cut = params["num_parameters"]
            bounds_start = len(inputs) - params["num_bounds"]
            sampler, parameters = None, ()
            if params["sampler"] is not None:
                sampler, lifted = self.sub_block(params["sampler"])
                parameters = (*lifted, *inputs[:cut])
            proposal, proposal_parameters = None, ()
            if params["proposal"] is not None:
                proposal, lifted = self.sub_block(params["proposal"])
                proposal_parameters = (*lifted, *inputs[cut:bounds_start])
            key_index, self.num_keys = self.num_keys, self.num_keys + 1
            return Draw(
                params["name"], parameters, proposal_parameters, inputs[bounds_start:], outputs[0], sampler, proposal,
                params["support"], eqn.outvars[0].aval, params["internal"], key_index, params["where"],
            )  # fmt: skip
        if eqn.primitive is score_p:
            return Score(params["name"], params["kind"], inputs[0], *(inputs[1:] or (None,)), params["where"])
        if eqn.primitive is record_p:
            return Record(params["name"], inputs[0], eqn.invars[0].aval, params["internal"], params["where"])
        if eqn.primitive is given_p:
            return Given(params["name"], inputs[0], eqn.invars[0].aval, params["where"])
        if eqn.primitive is loop_p:
            return self.loop(params, inputs, outputs)
        return Apply(eqn.primitive, inputs, outputs, params)

    def opened(self, eqn) -> tuple[Any, list[Any]] | None:
        """Return a loop or branch that holds programs to be inlined as (jaxpr, arrays that they closed over).

        The jaxpr's inputs are these arrays and the equation's operands. None for other equations.
        """
        programs = inner_programs(eqn)
        if not any(self.nests(program) for program in programs):
            return None
        flat = [flatten(*open_jaxpr(program), keep_rules=self.keep_rules) for program in programs]
        lifted = [array for _, arrays in flat for array in arrays]

        def call(*values):
            rest, functions = iter(values), []
            for block, arrays in flat:
                functions.append(functools.partial(block.evaluate, *(next(rest) for _ in arrays)))
            return said_again(eqn, functions)(*rest)

        types = [jax.typeof(array) for array in lifted] + [atom.aval for atom in eqn.invars]
        types = [jax.ShapeDtypeStruct(t.shape, t.dtype, weak_type=t.weak_type) for t in types]
        closed = jax.make_jaxpr(call)(*types)
        return closed, lifted

    def nests(self, program) -> bool:
        """Whether a program closes over arrays, or holds one that is to be inlined."""
        jaxpr, consts = open_jaxpr(program)
        if consts:
            return True
        return any(
            self.called_program(eqn) is not None or any(map(self.nests, inner_programs(eqn))) for eqn in jaxpr.eqns
        )

    def loop(self, params, inputs: tuple[Atom, ...], outputs: tuple[int, ...]) -> Loop:
        cuts = np.cumsum([params["num_constants"], params["num_until_constants"], params["num_carry"]])
        constants, until_constants, init, xs = (
            inputs[a:b] for a, b in zip([0, *cuts], [*cuts, len(inputs)], strict=True)
        )
        body, body_lifted = self.sub_block(params["body"])
        until, until_lifted = None, []
        if params["until"] is not None:
            until, until_lifted = self.sub_block(params["until"])
        key_index, self.num_keys = self.num_keys, self.num_keys + 1
        return Loop(
            (*body_lifted, *constants), (*until_lifted, *until_constants), init, xs, outputs, body, until,
            params["length"], params["scratch"], params["resamples"], key_index, params["where"],
        )  # fmt: skip


def open_jaxpr(jaxpr) -> tuple[Any, list[Any]]:
    """Return (jaxpr, constants' values) of a closed jaxpr, whichever class this JAX uses for it."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, list(getattr(jaxpr, "consts", ()))
