"""Derivatives of a run: which draws move with a parameter, and what the weights remember of the others.

A run at parameter values theta_0 is differentiated as a run whose *mechanism*, all that is chosen, stays that of
theta_0, and whose weights are those of theta near it. For each draw x of a site with density p_theta there are two
ways to stay properly weighted at every theta:

    path     x = x_theta(noise) moves with theta;    w *= p_theta(x) / q_theta(x)  where q proposes               (1)
    score    x stays where it is;                    w *= p_theta(x) / sg(q(x)),   sg(.) held at theta_0          (2)

where q is p itself for a site that is drawn from its own distribution: (1) then changes no weight, (2) multiplies it by
p_theta / sg(p) = 1, whose derivative is that of log p. So E[Z_hat(theta)] = Z(theta) near theta_0, and with it all
derivatives: `jax.grad` of `exp(log_evidence)` is unbiased, that of `log_evidence` is the estimate of the score of Z,
sum_n W_n grad log gamma(x_n), by Fisher's identity: consistent, and 0 for what only proposes, which Z does not know.

(1) needs a smooth sampler, and a smooth program after it. A path that meets a comparison, a rounding, an integer or a
host function loses what happens at the jump, without a word. Which draws meet one is found in the flat program, before
anything runs (`path_draws`); all others go by (2). Where neither holds, a derivative is refused: the bounds of a
support that move under (2), and the parameters of a proposal under (2), for which the derivative of `exp(log_evidence)`
is 0 but that of E[log_evidence], an ELBO, is not: the message says how to say which is meant.

Source: Scibior and Wood (2021), "Differentiable particle filtering without modifying the forward pass", arXiv
2106.10314; Mohamed et al. (2020), "Monte Carlo gradient estimation in machine learning", sections 4 and 5.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from ppl.errors import DerivativeError
from ppl.ir import Apply, Block, Draw, Given, Loop, Record, Score

__all__ = ["path_draws", "refuse", "remembered"]

# Operations that jump where their operands move. Equality of floats is none: it holds on a set of measure zero.
_JUMPS = {
    "lt", "le", "gt", "ge", "lt_to", "le_to", "sign", "floor", "ceil", "round", "argmax", "argmin", "rem", "nextafter",
    "bitcast_convert_type", "top_k", "approx_top_k",
}  # fmt: skip
_OPAQUE = ("callback", "while", "infeed", "ffi_call")  # what has no derivative, or none in reverse
_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")  # their authors say what the derivative is
_STOPS = "stop_gradient"


def path_draws(block: Block, given: frozenset[str]) -> frozenset[str]:
    """Return the names of the draws that go by (1).

    Args:
        block: a whole program, flattened with its derivative rules kept.
        given: the names of sites whose values are given: no draws.
    """
    nodes = [node for node, _ in block.statements()]
    given = given | {node.name for node in nodes if isinstance(node, Given)}
    path = {node.name for node in nodes if isinstance(node, Draw) and node.name not in given and _is_smooth(node)}
    while True:  # a draw that leaves the paths makes others meet it: until nothing changes
        left = path - _meets_a_jump(block, [False] * len(block.outputs), path)[1]
        if left == path:
            return frozenset(path)
        path = left


@jax.custom_jvp
def remembered(log_density: Any) -> Any:
    """Return zeros whose derivative is that of a log-density: log p_theta - log sg(p), also where that is -inf."""
    return jnp.where(jnp.isnan(log_density), 0.0, jnp.zeros_like(log_density))  # batched by `vmap` as its input is


@remembered.defjvp
def _remembered_jvp(primals, tangents):
    (log_density,), (tangent,) = primals, tangents
    return remembered(log_density), jnp.where(log_density > -jnp.inf, tangent, 0.0)


def refuse(value: Any, message: str) -> Any:
    """Return a pytree as it is; differentiating through it raises a `DerivativeError`."""

    @jax.custom_jvp
    def identity(*leaves):
        return leaves

    @identity.defjvp
    def raising(primals, tangents):  # called only where a leaf has a derivative
        raise DerivativeError(message)

    leaves, tree = jax.tree.flatten(value)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    if places:
        for i, leaf in zip(places, identity(*(leaves[i] for i in places)), strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)


# What values meet, backwards through the program ---------------------------------------------------------------------


def _is_smooth(node: Draw) -> bool:
    """Whether a draw has a derivative in its parameters: a float, drawn without a jump that they move."""
    sampler = node.proposal or node.sampler
    if sampler is None or not jnp.issubdtype(node.aval.dtype, jnp.floating):
        return False
    met, _ = _meets_a_jump(sampler, [False], frozenset())
    return not any(met[:-1])  # the last input is the key


def _meets_a_jump(block: Block, outputs: list[bool], path: frozenset[str] | set[str]) -> tuple[list[bool], set[str]]:
    """Return which inputs of a block meet a jump, and the draws among `path` whose values do.

    Args:
        block: the program.
        outputs: which of its outputs meet one further on.
        path: the draws that move.
    """
    meets: set[int] = {a for a, flag in zip(block.outputs, outputs, strict=True) if flag and isinstance(a, int)}
    live: set[int] = {a for a in block.outputs if isinstance(a, int)}  # what counts, in a value or a weight
    jumping: set[str] = set()

    def mark(atoms, flags=None):
        for i, atom in enumerate(atoms):
            if isinstance(atom, int) and (flags is None or flags[i]):
                meets.add(atom)

    for node in reversed(block.nodes):
        if isinstance(node, Apply):
            if not live.intersection(node.outputs):
                continue
            live.update(a for a in node.inputs if isinstance(a, int))
            if _jumps(node, block) or meets.intersection(node.outputs):
                if node.primitive.name != _STOPS:
                    mark(node.inputs)
        elif isinstance(node, Score):
            # The density of a draw from its own distribution is no weight; where it goes by (2) only parameters move.
            if node.kind != "sample" or node.log_proposal is not None or node.name not in path:
                live.update(a for a in node.inputs if isinstance(a, int))
        elif isinstance(node, Draw):
            live.update(a for a in node.inputs if isinstance(a, int))
            if node.name not in path:  # its support must stay where it is, and its proposal is refused
                mark(node.bounds)
                mark(node.proposal_parameters)
            elif node.output in meets:
                jumping.add(node.name)
                mark(node.inputs)
        elif isinstance(node, Record | Given):
            live.update(a for a in node.inputs if isinstance(a, int))
        else:
            met, inner = _loop_meets_a_jump(node, [v in meets for v in node.outputs], path)
            jumping |= inner
            live.update(a for a in node.inputs if isinstance(a, int))
            mark(node.inputs, met)
    return [v in meets for v in block.inputs], jumping


def _loop_meets_a_jump(loop: Loop, outputs: list[bool], path) -> tuple[list[bool], set[str]]:
    """Return which inputs of a loop meet a jump, and the draws in it that do: the fixpoint over its iterations."""
    first, num = len(loop.constants), len(loop.init)
    carry, constants = outputs[:num], [False] * len(loop.until_constants)
    if loop.until is not None:
        met, _ = _meets_a_jump(loop.until, [True], path)
        constants = met[: len(constants)]
        carry = [a or b for a, b in zip(carry, met[len(constants) :], strict=True)]
    while True:
        met, jumping = _meets_a_jump(loop.body, carry + outputs[num:], path)
        new = [a or b for a, b in zip(carry, met[first : first + num], strict=True)]
        if new == carry:
            return [*met[:first], *constants, *carry, *met[first + num :]], jumping
        carry = new


def _jumps(node: Apply, block: Block) -> bool:
    operands = [block.avals[a].dtype for a in node.inputs if isinstance(a, int)]
    if not any(jnp.issubdtype(dtype, jnp.inexact) for dtype in operands):
        return False
    out = [getattr(block.avals[v], "dtype", None) for v in node.outputs]
    return _operation_jumps(node.primitive.name, len(node.inputs), out) or any(
        _jumps_inside(inner) for inner in _programs(node.primitive.name, node.params)
    )


def _operation_jumps(name: str, num_operands: int, out_types: list[Any]) -> bool:
    if name in _JUMPS or any(word in name for word in _OPAQUE):
        return True
    if name == "sort":  # values move continuously, what is sorted along with them does not
        return num_operands > 1
    return name == "convert_element_type" and not jnp.issubdtype(out_types[0], jnp.inexact)


def _jumps_inside(jaxpr: Any) -> bool:
    """Whether a program in an equation, such as a branch or a loop of the user's own, holds a jump of floats."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if name == _STOPS:
            continue
        types = [v.aval.dtype for v in eqn.invars if hasattr(v.aval, "dtype")]
        if any(jnp.issubdtype(t, jnp.inexact) for t in types):
            if _operation_jumps(name, len(eqn.invars), [getattr(v.aval, "dtype", None) for v in eqn.outvars]):
                return True
        if any(map(_jumps_inside, _programs(name, eqn.params))):
            return True
    return False


def _programs(name: str, params: dict[str, Any]) -> list[Any]:
    return [] if name in _RULES else list(jex.jaxprs_in_params(params))
