"""The statements of the language, as Python functions and as the JAX primitives they bind.

A model is run once, under `jax.make_jaxpr`, and each statement leaves an equation in the jaxpr:

    value = draw[sampler, proposal] parameters      the law as a program from (parameters, key) to a value
    score[name, kind] log_density (log_proposal)    log p(value), computed by ordinary equations beside it
    record[name] value
    given[name] value                               a site of an inner program that is observed
    carry..., ys... = loop[body, until] ...         see `ppl.control_flow`

What to draw, what to weigh and what to keep is decided by whoever interprets the equations (`ppl.interpret`), never
here. `ppl.sample` goes through NumPyro's message stack, so plates, masks and scales hold for both languages'
statements.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.interpreters import batching
from numpyro.distributions import constraints

from ppl.errors import MisplacedSite, SiteTypeError, SiteValueError, user_line

__all__ = ["deterministic", "factor", "observe", "sample", "scope"]

KEY = jax.eval_shape(lambda: jax.random.key(0))  # the type of a PRNG key, to trace samplers with


def sample(name: str, distribution: dist.Distribution, *, proposal: dist.Distribution | None = None):
    """Draw a value from a distribution.

    Args:
        name: the site's name, unique in the program.
        distribution: any NumPyro distribution. Its density counts 0 outside its support.
        proposal: a distribution over the same values to draw from instead. The particle's log-weight gains
            `log distribution(value) - log proposal(value)`, so the program still means `distribution`.

    Returns:
        The value, of shape `distribution.batch_shape + distribution.event_shape`.

    Raises:
        SiteTypeError: `distribution` or `proposal` is not a distribution.
        SiteValueError: `proposal` draws values of another shape.
        MisplacedSite: outside a model, or inside `jax.vmap`, `jax.grad` or control flow of the user's own.
    """
    staging = current_staging(f"ppl.sample({name!r})")
    _require_distribution(staging, name, "distribution", distribution)
    if proposal is not None:
        _require_distribution(staging, name, "proposal", proposal)
    return numpyro.sample(name, distribution, infer={"ppl": _Options(proposal)})


def observe(name: str, distribution: dist.Distribution, value):
    """Condition on a value: the log-density of `value` is added to the particle's log-weight.

    Args:
        name: the site's name, unique in the program.
        distribution: any NumPyro distribution.
        value: an array of the distribution's shape.

    Returns:
        The value, as an array.

    Raises:
        SiteValueError: `value` has another shape than the distribution.
        SiteTypeError: `value` is not numeric, or not whole-numbered where the distribution is discrete.
    """
    staging = current_staging(f"ppl.observe({name!r})")
    _require_distribution(staging, name, "distribution", distribution)
    return numpyro.sample(name, distribution, obs=_as_array(name, value))


def factor(name: str, log_weight) -> None:
    """Multiply the particle's weight by `exp(log_weight)`, a scalar in nats; -inf kills the particle."""
    current_staging(f"ppl.factor({name!r})")
    numpyro.factor(name, _as_array(name, log_weight))


def deterministic(name: str, value):
    """Keep a computed value under a name; returns it."""
    current_staging(f"ppl.deterministic({name!r})")
    return numpyro.deterministic(name, jax.tree.map(lambda leaf: _as_array(name, leaf), value))


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Prefix the names of the statements inside with `name/`."""
    staging = current_staging(f"ppl.scope({name!r})")
    outer = staging.prefix
    staging.prefix = f"{outer}{name}/"
    try:
        with _JIT_CACHE_TOKEN((staging.token, staging.prefix)):
            yield
    finally:
        staging.prefix = outer


# Staging -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Staging:
    """One run of a model under `make_jaxpr`: what its statements need to know about where they stand."""

    arguments: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    values: list[tuple[str, Any]] = dataclasses.field(default_factory=list)  # (description, tracer), for messages
    prefix: str = ""
    inner: bool = False  # loops do not resample: inside `ppl.generate` or another loop
    internal: bool = False  # sites are kept only when named: the path of a process
    trace: Any = None
    token: Any = dataclasses.field(default_factory=object)


_STAGING: contextvars.ContextVar[Staging | None] = contextvars.ContextVar("ppl_staging", default=None)
# JAX caches the traces of a jitted helper by its arguments' types. Under a token of its own each staging traces anew,
# so a helper that holds statements never brings those of another program, plate or scope.
_JIT_CACHE_TOKEN = jax.make_user_context(None)


@contextlib.contextmanager
def staging_context(staging: Staging) -> Iterator[Staging]:
    """Make `staging` the current one."""
    reset = _STAGING.set(staging)
    try:
        with _JIT_CACHE_TOKEN((staging.token, staging.prefix)), _Bridge():
            staging.trace = _trace_identity()
            yield staging
    finally:
        _STAGING.reset(reset)


def current_staging(statement: str) -> Staging:
    """Return the staging in force, or say that the statement stands outside of a model."""
    staging = _STAGING.get()
    if staging is None:
        raise MisplacedSite(
            f"{statement} at {user_line()} stands outside of a model. Put it in a function decorated with @ppl.model "
            "and "
            "run that with ppl.infer or ppl.simulate."
        )
    _refuse_transformations(staging, statement)
    return staging


@contextlib.contextmanager
def staging_options(**changes) -> Iterator[None]:
    """Change fields of the current staging for a while."""
    staging = _STAGING.get()
    saved = {name: getattr(staging, name) for name in changes}
    for name, value in changes.items():
        setattr(staging, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(staging, name, value)


def _trace_identity():
    reference = getattr(jex.get_opaque_trace_state(), "_trace_ref", None)
    return None if reference is None else reference()


def _refuse_transformations(staging: Staging, statement: str) -> None:
    """Raise if a `vmap` or `grad` of the user's own lies between the model and this statement."""
    trace = _trace_identity()
    while trace is not None and trace is not staging.trace:
        kind = type(trace).__name__
        if "Batch" in kind:
            raise _transformed(
                statement, "jax.vmap", "use a distribution with a batch shape, numpyro.plate or ppl.scan"
            )
        if "JVP" in kind or "Linearize" in kind:
            raise _transformed(statement, "jax.grad", "differentiate ppl.log_density(program, sites) instead")
        trace = getattr(trace, "parent_trace", None)


def _transformed(statement: str, transformation: str, remedy: str) -> MisplacedSite:
    return MisplacedSite(
        f"{statement} at {user_line()} stands inside a {transformation} of your own, where no inference algorithm can "
        f"see it: {remedy}."
    )


# Binding -------------------------------------------------------------------------------------------------------------

draw_p = jex.Primitive("ppl_draw")
score_p = jex.Primitive("ppl_score")
record_p = jex.Primitive("ppl_record")
given_p = jex.Primitive("ppl_given")
loop_p = jex.Primitive("ppl_loop")
STATEMENTS = (draw_p, score_p, record_p, given_p, loop_p)

for _primitive in STATEMENTS:
    _primitive.multiple_results = True


@draw_p.def_abstract_eval
def _draw_type(*_, sampler, **__):
    return list(sampler.out_avals)


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
        raise _transformed(statement, "jax.vmap", "use a distribution with a batch shape, numpyro.plate or ppl.scan")

    batching.fancy_primitive_batchers[primitive] = rule


for _primitive in STATEMENTS:
    _refuse_batching(_primitive)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What `ppl.sample` has to say beyond NumPyro's own arguments, carried in the message's `infer` field."""

    proposal: Any = None


class _Bridge(numpyro.primitives.Messenger):
    """Turns NumPyro's messages into this language's equations. It lies at the bottom of NumPyro's stack."""

    def process_message(self, msg):
        kind, name = msg["type"], msg["name"]
        if kind == "plate":
            if msg["value"] is None:
                raise SiteTypeError(
                    f"plate {name!r} at {user_line()} asks for a random subsample. Programs have no subsampling: give "
                    "the plate its full size, or pass the subsample as an argument."
                )
            return
        staging = current_staging(f"statement {name!r}")
        if kind == "sample":
            msg["value"] = _bind_message(staging, msg)
        elif kind == "deterministic":
            _bind_record(staging, name, msg["value"])
        elif kind in ("param", "mutable", "prng_key"):
            raise SiteTypeError(
                f"numpyro.{kind}({name!r}) at {user_line()} has no meaning in a program: pass parameters as arguments "
                "of the model, and draw random values with ppl.sample."
            )
        msg["stop"] = True


def _bind_message(staging: Staging, msg):
    name, law, scale = msg["name"], msg["fn"], msg.get("scale")
    options = msg["infer"].get("ppl", _Options()) if msg["infer"] else _Options()
    _require_distribution(staging, name, "distribution", law)
    sample_shape = msg["kwargs"].get("sample_shape", ())
    if sample_shape:
        law = law.expand(tuple(sample_shape) + law.batch_shape)
    if isinstance(_innermost(law), dist.Unit):
        _bind_score(staging, name, "factor", _total(law.log_factor, scale))
        return msg["value"]
    if msg["is_observed"]:
        return _bind_observation(staging, name, law, msg["value"], scale)
    return _bind_draw(staging, name, law, options.proposal, scale)


def _bind_draw(staging: Staging, name: str, law, proposal, scale):
    full_name, where = staging.prefix + name, user_line()
    sampler, parameters = _sampler(staging, name, "distribution", law)
    proposer, proposal_parameters = None, []
    if proposal is not None:
        if proposal.batch_shape != law.batch_shape:
            proposal = proposal.expand(law.batch_shape)
        proposer, proposal_parameters = _sampler(staging, name, "proposal", proposal)
        if proposer.out_avals[0].shape != sampler.out_avals[0].shape:
            raise SiteValueError(
                f"sample({full_name!r}) at {where}: the proposal draws values of shape {proposer.out_avals[0].shape}, "
                f"the distribution of shape {sampler.out_avals[0].shape}. They must agree."
            )
        if proposer.out_avals[0].dtype != sampler.out_avals[0].dtype:
            raise SiteTypeError(
                f"sample({full_name!r}) at {where}: the proposal draws {proposer.out_avals[0].dtype}, the distribution "
                f"{sampler.out_avals[0].dtype}. They must agree."
            )
    (value,) = draw_p.bind(
        *parameters, *proposal_parameters, sampler=sampler, proposal=proposer, num_parameters=len(parameters),
        name=full_name, internal=staging.internal, where=where,
    )  # fmt: skip
    staging.values.append((f"the site {full_name!r}", value))
    log_density = _log_density(law, value, scale)
    log_proposal = () if proposal is None else (_log_density(proposal, value, None),)
    _bind_score(staging, name, "sample", log_density, *log_proposal)
    return value


def _bind_observation(staging: Staging, name: str, law, value, scale):
    value = _as_array(name, value)
    shape = law.batch_shape + law.event_shape
    label = f"observe({staging.prefix + name!r}) at {user_line()}"
    if value.shape != shape:
        raise SiteValueError(
            f"{label}: the value has shape {value.shape}, the distribution {type(law).__name__} has shape {shape}. "
            "Give "
            f"both one shape, for instance by distribution.expand({list(value.shape)}) or a numpyro.plate."
        )
    if law.is_discrete and not (jnp.issubdtype(value.dtype, jnp.integer) or value.dtype == jnp.bool_):
        raise SiteTypeError(
            f"{label}: {type(law).__name__} is discrete, the value is {value.dtype}. Pass whole numbers."
        )
    _bind_score(staging, name, "observe", _log_density(law, value, scale))
    return value


def _bind_score(staging: Staging, name: str, kind: str, *log_densities) -> None:
    for log_density in log_densities:
        if jnp.shape(log_density) != ():
            raise SiteValueError(
                f"factor({staging.prefix + name!r}) at {user_line()}: the log-weight has shape "
                f"{jnp.shape(log_density)}; it "
                "must be one number. Sum it, or put the factor in a numpyro.plate."
            )
    floats = [jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)) for x in log_densities]
    score_p.bind(*floats, name=staging.prefix + name, kind=kind, where=user_line())


def _bind_record(staging: Staging, name: str, value) -> None:
    leaves, _ = jax.tree.flatten(value)
    if len(leaves) != 1:
        raise SiteTypeError(
            f"deterministic({staging.prefix + name!r}) at {user_line()}: the value has {len(leaves)} arrays; "
            "record one each."
        )
    record_p.bind(leaves[0], name=staging.prefix + name, internal=staging.internal, where=user_line())


def bind_given(name: str, value) -> None:
    """Say that a site which follows is observed, with this value, `[T, ...]` inside loops."""
    staging = current_staging(f"the condition on {name!r}")
    given_p.bind(_as_array(name, value), name=staging.prefix + name, where=user_line())


def _sampler(staging: Staging, name: str, role: str, law):
    """Trace a distribution's sampler to a program from a key to a value."""
    program, constants = trace(law.sample, KEY)
    if len(program.out_avals) != 1:
        raise SiteTypeError(
            f"sample({staging.prefix + name!r}) at {user_line()}: the {role} {type(law).__name__} draws "
            f"{len(program.out_avals)} arrays; a site is one array."
        )
    return program, constants


@dataclasses.dataclass(frozen=True, eq=False)
class Inner:
    """A program inside an equation. Its constant variables are operands of the equation that holds it."""

    jaxpr: Any
    out_avals: tuple[Any, ...]


def trace(function: Callable, *args) -> tuple[Inner, list[Any]]:
    """Trace a function of the program; returns it and the values it closes over, tracers among them."""
    closed = jax.make_jaxpr(function)(*args)
    return Inner(getattr(closed, "jaxpr", closed), tuple(closed.out_avals)), list(closed.consts)


def _log_density(law, value, scale):
    """Return the log-density of a value: -inf outside the support, summed over the batch."""
    log_density = law.log_prob(value)
    inside = _in_support(law, value)
    if inside is not None:
        log_density = jnp.where(inside, log_density, -jnp.inf)
    return _total(log_density, scale)


def _total(log_density, scale):
    log_density = jnp.sum(jnp.asarray(log_density))
    return log_density if scale is None else scale * log_density


def _in_support(law, value):
    """Return whether each value of the batch lies in the support, or None where every number does.

    NaN is left to the density, which answers NaN: bad data is an error, not an impossible event.
    """
    try:
        support = law.support
    except NotImplementedError:
        return None
    base = support
    while hasattr(base, "base_constraint"):
        base = base.base_constraint
    if (
        support is None
        or base in (constraints.real, constraints.real_vector)
        or isinstance(base, type(constraints.dependent))
    ):
        return None
    inside = support(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return inside
    is_nan = jnp.isnan(value)
    extra = is_nan.ndim - jnp.ndim(inside)
    return inside | jnp.any(is_nan, axis=tuple(range(is_nan.ndim - extra, is_nan.ndim)))


def _innermost(law):
    while isinstance(law, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        law = law.base_dist
    return law


def _require_distribution(staging: Staging, name: str, role: str, value) -> None:
    if not isinstance(value, dist.Distribution):
        raise SiteTypeError(
            f"site {staging.prefix + name!r} at {user_line()}: the {role} is a {type(value).__name__}; it must be a "
            "NumPyro "
            "distribution, for instance dist.Normal(0.0, 1.0)."
        )


def _as_array(name: str, value):
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise SiteTypeError(
            f"site {name!r} at {user_line()}: the value is a {type(value).__name__}; it must be a number or an array."
        ) from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == jnp.bool_):
        raise SiteTypeError(f"site {name!r} at {user_line()}: the value has type {array.dtype}; it must be numeric.")
    return array
