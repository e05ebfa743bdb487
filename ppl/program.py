"""Models, programs, and what a staged program knows about itself.

    @ppl.model                      a Python function becomes a `Model`
    walk(observations, scale=2.0)   calling it gives a `Program`: nothing has run
    program.stage()                 runs the Python once, under `jax.make_jaxpr`, and gives a `Staged` program

Arrays, Python floats and pytrees of them are traced. Everything else is static: part of the program's shape. What the
function closes over (a network's weights, a prompt's tokens) is found by staging and passed beside the arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import keyword
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ppl import ir
from ppl.errors import (
    BranchError,
    DuplicateSite,
    MisplacedSite,
    ProgramError,
    SiteTypeError,
    SiteValueError,
    describe_frame,
    last_user_frame,
    source_text,
)
from ppl.guarantees import promised
from ppl.networks import kept_whole
from ppl.numpyro_bridge import Bridge, bind_given
from ppl.primitives import STATEMENTS
from ppl.staging import Staging, staging_context
from ppl.structure import structural_key
from ppl.supports import Support

__all__ = ["Model", "Program", "Site", "Staged", "condition", "model", "static"]

_BRANCH_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@dataclasses.dataclass(frozen=True)
class _Static:
    value: Any


def static(value: Any) -> Any:
    """Mark an argument of a model as static: part of the program's shape, never traced."""
    return _Static(value)


def model(function: Callable) -> Model:
    """Turn a Python function into a model.

    Inside the function `ppl.sample`, `ppl.observe`, `ppl.factor`, `ppl.scan` and NumPyro's statements describe the
    program; it may return any pytree of arrays. Calling the model gives a `Program`.
    """
    if not callable(function):
        raise TypeError(f"ppl.model decorates a function, got {type(function).__name__}.")
    return Model(function)


class Model:
    """A function that describes programs, one for each choice of arguments."""

    def __init__(self, function: Callable):
        self.function = function
        functools.update_wrapper(self, getattr(function, "func", function))

    def __call__(self, *args, **kwargs) -> Program:
        """Return the program for these arguments."""
        try:
            call = inspect.signature(self.function).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.__name__}{inspect.signature(self.function)}: {error}.") from None
        call.apply_defaults()
        return Program(self.function, call.args, call.kwargs)

    def __reduce__(self):
        """Pickle by name, as functions are; a model without one by its function."""
        return self.__qualname__ if _named(self.function) is self else (Model, (self.function,))

    def __get__(self, instance, owner=None):
        """Bind a model that is a method."""
        return self if instance is None else Model(functools.partial(self.function, instance))

    def __repr__(self) -> str:
        return f"<ppl.model {self.__name__}{inspect.signature(self.function)}>"


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model with its arguments: a measure over traces. Nothing has run.

    Attributes:
        function: the model's function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        conditions: values of sites that are observed, see `condition`.
        decode: turns the program's value into texts, for programs that write some.
        target: the process or target that this is the program of, or None.
    """

    function: Callable
    args: tuple = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decode: Callable[[Any], list[str]] | None = None
    target: Any = None

    def __reduce__(self):
        """Pickle by the model's name: its function alone has none, since the model stands in its place."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _program, (_by_name(self.function), {n: v for n, v in fields.items() if n != "function"})

    @property
    def name(self) -> str:
        """The model function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def run_inside(self) -> Any:
        """Run the function inside the model that is being staged; conditioned sites are observed there."""
        for name, value in self.conditions.items():
            bind_given(name, value)
        args, kwargs = jax.tree.map(_plain, (self.args, dict(self.kwargs)), is_leaf=lambda x: isinstance(x, _Static))
        return self.function(*args, **kwargs)

    def stage(self, *, keep_rules: bool = True) -> Staged:
        """Run the Python function once and return the program as data; see `ppl.ir.flatten` for `keep_rules`."""
        return _stage(self, keep_rules)

    def __repr__(self) -> str:
        given = f", given {sorted(self.conditions)}" if self.conditions else ""
        return f"<ppl.Program {self.name}{given}>"


def _named(function: Callable) -> Any:
    """Return what a function's module holds by its name."""
    found = sys.modules.get(getattr(function, "__module__", None) or "")
    for name in getattr(function, "__qualname__", "<none>").split("."):
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
    return found


def _by_name(function: Any) -> Any:
    """Return what stands for a model's function in a pickle: the model of that name, whose function it is."""
    if isinstance(function, functools.partial):
        return functools.partial(_by_name(function.func), *function.args, **function.keywords)
    found = _named(function)
    return found if isinstance(found, Model) and found.function is function else function


def _of_name(function: Any) -> Any:
    if isinstance(function, functools.partial):
        return functools.partial(_of_name(function.func), *function.args, **function.keywords)
    return function.function if isinstance(function, Model) else function


def _program(function: Any, fields: dict[str, Any]) -> Program:
    return Program(_of_name(function), **fields)


@dataclasses.dataclass(frozen=True)
class Site:
    """A sample site or a recorded value.

    Attributes:
        name: its full name.
        kind: "sample" or "deterministic".
        shape: the shape of its value in one trace, loops' time axes leading.
        dtype: its type.
        time_shape: the leading part of `shape`: the lengths of the loops around it.
        internal: whether it is stored only when named.
        where: `file:line` of its statement.
        support: where values of one draw may lie; None for recorded values and laws that state none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: Any
    time_shape: tuple[int, ...]
    internal: bool
    where: str
    support: Support | None = None

    @property
    def is_discrete(self) -> bool:
        """Whether its values are discrete."""
        return not jnp.issubdtype(self.dtype, jnp.floating) if self.support is None else self.support.is_discrete


@dataclasses.dataclass(frozen=True, eq=False)
class Staged:
    """A program as data: a block, the values of its inputs, and the sites it holds."""

    block: ir.Block
    inputs: list[Any]
    given: dict[str, Any]
    out_tree: Any
    sites: dict[str, Site]
    statements: dict[str, str]  # every statement's name, with its line
    guarantee: str = "unbiased"  # the weakest of the processes that unfold in it, see `ppl.guarantees`

    def key(self) -> tuple:
        """Return what makes a compiled run of this program reusable for another."""
        given = tuple((name, v.shape, str(v.dtype)) for name, v in sorted(self.given.items()))
        return structural_key(self.block), given, self.out_tree, self.guarantee

    def without_values(self) -> Staged:
        """Return the program without the arrays it would run on, for a cache that must not hold them."""
        return dataclasses.replace(self, inputs=[], given={})


def condition(program: Program, sites: Mapping[str, Any]) -> Program:
    """Return a program in which sites are observed.

    Args:
        program: a program.
        sites: values by site name, of the sites' shapes, time axes leading.

    Returns:
        The program whose measure is the old one's density at these values. Proposals of the sites are dropped.

    Raises:
        SiteValueError: a name is not a sample site of the program, or a value has another shape.
        SiteTypeError: a value of another type than its site.
    """
    if not isinstance(program, Program):
        program = as_program(program)
    if not isinstance(sites, Mapping):
        raise SiteTypeError(f"condition: `sites` must be a dictionary of values by name, got {type(sites).__name__}.")
    staged = program.stage(keep_rules=False)
    _check_values("condition", sites, staged.sites, staged.statements)
    return dataclasses.replace(program, conditions={**program.conditions, **sites})


def as_program(value: Any) -> Program:
    """Return the program of a program or a process.

    Raises:
        TypeError: it is neither; a model that was not called says so.
    """
    if isinstance(value, Program):
        return value
    if hasattr(value, "program") and callable(value.program):
        return value.program()
    if isinstance(value, Model):
        raise TypeError(f"{value!r} is a model; call it with its arguments to get a program.")
    raise TypeError(f"expected a program or a process, got {type(value).__name__}.")


# Staging -------------------------------------------------------------------------------------------------------------


# NumPyro's stack of handlers is one for all threads.
_ONE_AT_A_TIME = threading.RLock()


def _stage(program: Program, keep_rules: bool) -> Staged:
    with _ONE_AT_A_TIME:
        try:
            return _stage_once(program, keep_rules, Staging())
        except _StaleTrace:  # a jitted helper's statements are another staging's: trace everything anew
            return _stage_once(program, keep_rules, Staging(token=object()))


class _StaleTrace(Exception):
    """A statement that JAX's cache of traces kept from another staging."""


def _stage_once(program: Program, keep_rules: bool, staging: Staging) -> Staged:
    leaves, tree = jax.tree.flatten((program.args, dict(program.kwargs)), is_leaf=lambda x: isinstance(x, _Static))
    traced = [i for i, leaf in enumerate(leaves) if _is_traced(leaf)]
    values = [leaves[i] for i in traced]
    structure: dict[str, Any] = {}

    def flat_function(*flat):
        filled = [_plain(leaf) for leaf in leaves]
        for i, value in zip(traced, flat, strict=True):
            filled[i] = value
        args, kwargs = jax.tree.unflatten(tree, filled)
        staging.values.extend(_describe_arguments(program.function, args, kwargs))
        with staging_context(staging), Bridge():
            result = program.function(*args, **kwargs)
        flat_result, structure["tree"] = jax.tree.flatten(result, is_leaf=lambda x: isinstance(x, Iterator))
        return [_as_output(program, x) for x in flat_result]

    try:
        with kept_whole(program.function, (program.args, program.kwargs)):
            closed = jax.make_jaxpr(flat_function)(*values)
    except _BRANCH_ERRORS as error:
        raise _branch_error(error, staging) from error
    except ProgramError:
        raise
    except Exception as error:
        if isinstance(error, TypeError) and "concrete" in str(error):  # a traced shape
            raise _branch_error(error, staging) from error
        explained = _explain(error)
        if explained is None:
            raise
        raise explained from error
    jaxpr = getattr(closed, "jaxpr", closed)
    _check_statements(jaxpr, staging)
    block, constants = ir.flatten(jaxpr, closed.consts, keep_rules=keep_rules)
    sites, statements = _collect_sites(block)
    given = _check_values("condition", program.conditions, sites, statements)
    guarantee = promised(*staging.promises)
    return Staged(block, [*constants, *values], given, structure["tree"], sites, statements, guarantee)


def _plain(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, _Static) else leaf


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) or (
        isinstance(leaf, float | complex) and not isinstance(leaf, bool)
    )


def _as_output(program: Program, value: Any):
    try:
        return jnp.asarray(value)
    except TypeError as error:
        raise SiteTypeError(
            f"the model {program.name!r} returns a {type(value).__name__}; it may return any pytree of arrays."
        ) from error


def _collect_sites(block: ir.Block) -> tuple[dict[str, Site], dict[str, str]]:
    """Find the statements of a program; refuse two of one name."""
    sites: dict[str, Site] = {}
    statements: dict[str, str] = {}
    given: dict[str, tuple[ir.Given, int]] = {}
    for node, loops in block.statements():
        if isinstance(node, ir.Given):
            given[node.name] = node, len(loops)
            continue
        if isinstance(node, ir.Score) and (node.kind == "sample" or node.checks):
            continue  # the density of a `Draw` of the same name, or a check of it
        if node.name in statements:
            raise DuplicateSite(
                f"two statements are named {node.name!r}: at {statements[node.name]} and at {node.where}. Rename one, "
                "or "
                "put it in ppl.scope(...)."
            )
        statements[node.name] = node.where
        if isinstance(node, ir.Score):
            continue
        aval = node.aval
        times = tuple(loop.length for loop in loops)
        kind = "sample" if isinstance(node, ir.Draw) else "deterministic"
        shape, support = times + aval.shape, getattr(node, "support", None)
        sites[node.name] = Site(node.name, kind, shape, aval.dtype, times, node.internal, node.where, support)
    for name, (node, depth) in given.items():  # a condition inside loops holds for one of their iterations
        if name not in sites or sites[name].kind != "sample":
            known = sorted(site for site, s in sites.items() if s.kind == "sample")
            raise SiteValueError(
                f"condition: {name!r} ({node.where}) is not a sample site. The sample sites are {known}."
            )
        _check_type("condition", sites[name], node.aval, sites[name].shape[depth:])
        del sites[name]
    return sites, statements


def kept_sites(staged: Staged, keep: frozenset[str] | None) -> frozenset[str]:
    """Return the names of the sites to store: those asked for, by default all but internal ones.

    Raises:
        SiteValueError: `keep` names what is not a site of the program.
    """
    unknown = sorted((keep or frozenset()) - staged.sites.keys())
    if unknown:
        raise SiteValueError(f"`keep` names {unknown}, not sites of the program. Its sites are {sorted(staged.sites)}.")
    return frozenset(name for name, site in staged.sites.items() if not site.internal) if keep is None else keep


def check_sites(staged: Staged, values: Mapping[str, Any], *, complete: bool) -> dict[str, Any]:
    """Check values for sites by name, shape and type; returns those of sample sites.

    Args:
        staged: the program.
        values: arrays by name; deterministic sites are accepted and left out.
        complete: every sample site that is not conditioned must have a value.
    """
    given = _check_values("sites", values, staged.sites, staged.statements)
    if complete:
        missing = [
            name
            for name, s in staged.sites.items()
            if s.kind == "sample" and name not in given and name not in staged.given
        ]
        if missing:
            raise SiteValueError(f"values are missing for the sites {missing}. Give every sample site a value.")
    return given


def _check_values(role: str, values: Mapping[str, Any], sites: dict[str, Site], statements) -> dict[str, Any]:
    given = {}
    for name, value in values.items():
        if name not in sites:
            known = sorted(n for n, s in sites.items() if s.kind == "sample")
            is_weight = name in statements
            what = "an observation or a factor, not a sample site" if is_weight else "not a site of the program"
            raise SiteValueError(f"{role}: {name!r} is {what}. Its sample sites are {known}.")
        site = sites[name]
        if site.kind == "sample":
            array = _numeric(role, name, value)
            _check_type(role, site, array, site.shape)
            given[name] = array if array.dtype == site.dtype else array.astype(site.dtype)
        elif role == "condition":
            raise SiteValueError(f"condition: {name!r} is a deterministic value; only sample sites can be observed.")
    return given


def _numeric(role: str, name: str, value: Any):
    try:
        array = None if value is None or isinstance(value, str | bytes) else jnp.asarray(value)
    except (TypeError, ValueError):
        array = None
    if array is None or jnp.issubdtype(array.dtype, jnp.complexfloating):
        kind = "complex" if array is not None else "None" if value is None else type(value).__name__
        raise SiteTypeError(f"{role}: the value of {name!r} is {kind}; it must be a real number or an array of them.")
    return array


def _check_type(role: str, site: Site, value: Any, shape: tuple[int, ...]) -> None:
    """Raise unless a value, or its type, fits a site."""
    if value.shape != shape:
        raise SiteValueError(
            f"{role}: the value of {site.name!r} has shape {value.shape}, the site ({site.where}) has {shape}."
        )
    whole = jnp.issubdtype(value.dtype, jnp.integer) or value.dtype == jnp.bool_
    if jnp.issubdtype(site.dtype, jnp.integer) and not whole:
        raise SiteTypeError(
            f"{role}: the value of {site.name!r} is {value.dtype}, the site ({site.where}) holds {site.dtype}."
        )


def _check_statements(jaxpr, staging: Staging, inside: str | None = None) -> None:
    """Raise where a statement stands inside control flow that is not the language's, or belongs to another staging."""
    for eqn in jaxpr.eqns:
        if eqn.primitive in STATEMENTS:
            if eqn.params["owner"] is not staging.owner:
                raise _StaleTrace
            if inside is not None:
                raise _hidden(eqn, inside)
            for name in ("body", "until"):
                if eqn.params.get(name) is not None:
                    _check_statements(eqn.params[name].jaxpr, staging, "until" if name == "until" else None)
            continue
        name = eqn.primitive.name
        transparent = name in ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")
        for inner in jex.jaxprs_in_params(eqn.params):
            _check_statements(getattr(inner, "jaxpr", inner), staging, inside if transparent else name)


_PLACES = {
    "scan": ("a jax.lax.scan of your own", "use ppl.scan"),
    "while": ("a jax.lax.while_loop of your own", "use ppl.scan(..., until=...)"),
    "cond": ("a jax.lax.cond of your own", "draw before it, and select with jnp.where"),
    "checkpoint": ("a jax.checkpoint of your own", "put the statement outside of it"),
    "remat2": ("a jax.checkpoint of your own", "put the statement outside of it"),
    "until": ("the until of a ppl.scan", "draw in the step, and let until read the carry"),
}


def _hidden(eqn, inside: str) -> MisplacedSite:
    name = eqn.params.get("name")
    what = f"the statement {name!r}" if name else "ppl.scan"
    place, remedy = _PLACES.get(inside, (f"the JAX operation {inside!r}", "put the statement outside of it"))
    return MisplacedSite(
        f"{what} at {eqn.params['where']} stands inside {place}, where no inference algorithm can see it: {remedy}."
    )


# Explaining errors ---------------------------------------------------------------------------------------------------


def _describe_arguments(function: Callable, args, kwargs) -> list[tuple[str, Any]]:
    """List the traced leaves of a call with the names of the arguments they came in by."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return []
    described = []
    for name, value in bound.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            described.append((f"the argument {name + jax.tree_util.keystr(path)!r}", leaf))
    return described


def _branch_error(error: Exception, staging: Staging) -> BranchError:
    found = last_user_frame(error)
    if found is None:
        return BranchError(f"a Python branch or conversion needs the value of something traced: {error}")
    frame, line = found
    text = source_text(frame, line)
    names = dict.fromkeys(n for n in re.findall(r"[A-Za-z_]\w*", text) if not keyword.iskeyword(n))
    scope = {**frame.f_globals, **frame.f_locals}
    known = {id(value): label for label, value in staging.values}
    culprits = []
    for name in names:
        for leaf in jax.tree.leaves(scope.get(name)):
            if isinstance(leaf, jax.core.Tracer):
                label = known.get(id(leaf), "a value computed from sites or traced arguments")
                culprits.append(f"`{name}` is {label}")
                break
    because = "; ".join(culprits) or "it depends on a site or a traced argument"
    return BranchError(
        f"{describe_frame(frame, line)}: `{text}` needs a value that is known only when the program runs ({because}). "
        "A program "
        "is staged once for all values: use jnp.where, jax.lax.cond without statements inside, or ppl.scan(..., "
        "until=...); "
        "if it is an argument that shapes the program, pass it as an int or as ppl.static(...)."
    )


def _explain(error: Exception) -> ProgramError | None:
    """Return a clearer error for those that JAX or flax raise on behalf of the program, or None."""
    if type(error).__module__.startswith("flax"):
        found = last_user_frame(error)
        where = describe_frame(*found) if found else "an unknown line"
        return MisplacedSite(
            f"{where}: a flax transformation (nnx.jit, nnx.remat, nnx.scan, nnx.vmap, nnx.grad) runs inside a model on "
            "a "
            "network that was made outside of it, and flax refuses to change that network there. Call the network "
            "plainly, or "
            "through jax.jit; for anything else split it outside, graphdef, state = nnx.split(network), and call "
            "nnx.merge(graphdef, state) inside the model."
        )
    return None
