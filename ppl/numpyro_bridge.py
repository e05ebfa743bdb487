"""From distributions to equations, through NumPyro's message stack.

Every statement, this language's or NumPyro's, is a NumPyro message, so that plates, masks and scales hold for both. A
`Bridge` lies at the bottom of the stack while a model is staged and binds what reaches it:

    sample      the distribution's sampler, traced to a program from a key to a value, and its log-density
    observe     the log-density of the value: -inf outside the distribution's support (law L1)
    factor      the log-weight
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from ppl import chance, densities
from ppl.errors import MisplacedSite, SiteTypeError, SiteValueError, user_line
from ppl.primitives import Inner, draw_p, given_p, record_p, score_p, trace
from ppl.staging import Staging, current_staging
from ppl.supports import split_support

__all__ = ["Bridge", "Options", "as_array", "bind_given", "require_distribution"]

KEY = jax.eval_shape(lambda: jax.random.key(0))  # the type of a PRNG key, to trace samplers with


@dataclasses.dataclass(frozen=True)
class Options:
    """What `ppl.sample` has to say beyond NumPyro's own arguments, carried in the message's `infer` field."""

    proposal: Any = None


class Bridge(numpyro.primitives.Messenger):
    """Turns NumPyro's messages into this language's equations. It lies at the bottom of NumPyro's stack."""

    def process_message(self, msg):
        """Bind a message as an equation and give it a value."""
        kind, name = msg["type"], msg.get("name")
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
        elif kind == "control_flow":
            raise MisplacedSite(
                f"a loop of numpyro.contrib.control_flow at {user_line()} hides its steps from inference: use ppl.scan."
            )
        elif kind in ("param", "mutable", "prng_key"):
            raise SiteTypeError(
                f"numpyro.{kind}({name!r}) at {user_line()} has no meaning in a program: pass parameters as arguments "
                "of the model, and draw random values with ppl.sample."
            )
        msg["stop"] = True


def _bind_message(staging: Staging, msg):
    name, law, scale = msg["name"], msg["fn"], msg.get("scale")
    options = msg["infer"].get("ppl", Options()) if msg["infer"] else Options()
    require_distribution(staging, name, "distribution", law)
    sample_shape = msg["kwargs"].get("sample_shape", ())
    if sample_shape:
        law = law.expand(tuple(sample_shape) + law.batch_shape)
    if isinstance(densities.innermost(law), dist.Unit):
        given = jnp.asarray(densities.innermost(law).log_factor)
        if given.dtype == jnp.bool_:
            raise SiteTypeError(
                f"factor({staging.prefix + name!r}) at {user_line()}: the log-weight is a truth value, not a number in "
                "nats. To forbid what does not satisfy it, pass jnp.where(ok, 0.0, -jnp.inf)."
            )
        shape = given.shape
        if shape and not msg["cond_indep_stack"]:
            raise SiteValueError(
                f"factor({staging.prefix + name!r}) at {user_line()}: the log-weight has shape "
                f"{shape}; it must be one number. Sum it, or put the factor in a numpyro.plate."
            )
        _bind_score(staging, name, "factor", _total(law.log_prob(msg["value"]), scale))
        return msg["value"]
    if msg["is_observed"]:
        return _bind_observation(staging, name, law, msg["value"], scale)
    return _bind_draw(staging, name, law, options.proposal, scale)


def _bind_draw(staging: Staging, name: str, law, proposal, scale):
    full_name, where = staging.prefix + name, user_line()
    law = densities.latent(law)
    sampler, parameters = _sampler(staging, name, "distribution", law)
    proposer, proposal_parameters = None, []
    if proposal is not None:
        try:
            proposal = proposal if proposal.batch_shape == law.batch_shape else proposal.expand(law.batch_shape)
        except ValueError as error:
            raise SiteValueError(
                f"sample({full_name!r}) at {where}: the proposal has batch shape {proposal.batch_shape}, "
                f"the distribution {law.batch_shape}. They must agree."
            ) from error
        proposal = densities.latent(proposal)
        proposer, proposal_parameters = _sampler(staging, name, "proposal", proposal)
        if proposer is None:
            raise SiteTypeError(
                f"sample({full_name!r}) at {where}: the proposal {type(proposal).__name__} has no sampler. Propose "
                "from a distribution that can be drawn from, such as dist.Normal(0.0, 1.0)."
            )
        drawn, shape = proposer.out_avals[0], law.batch_shape + law.event_shape
        if drawn.shape != shape:
            raise SiteValueError(
                f"sample({full_name!r}) at {where}: the proposal draws values of shape {drawn.shape}, "
                f"the distribution has shape {shape}. They must agree."
            )
        if sampler is not None and drawn.dtype != sampler.out_avals[0].dtype:
            raise SiteTypeError(
                f"sample({full_name!r}) at {where}: the proposal draws {drawn.dtype}, the distribution "
                f"{sampler.out_avals[0].dtype}. They must agree."
            )
    support, bounds = split_support(law)
    aval = (sampler or proposer or _without_sampler(law)).out_avals[0]
    (value,) = draw_p.bind(
        *parameters, *proposal_parameters, *bounds, sampler=sampler, proposal=proposer, support=support,
        num_parameters=len(parameters), num_bounds=len(bounds), aval=aval, name=full_name, internal=staging.internal,
        where=where, owner=staging.owner,
    )  # fmt: skip
    staging.values.append((f"the site {full_name!r}", value))
    # A site whose density is scaled is drawn from the unscaled law: the weight makes up for it.
    drawn_from = law if proposal is None and scale is not None else proposal
    same_support = drawn_from is law
    if proposal is not None and support is not None and not bounds:
        same_support = split_support(proposal) == (support, [])
    log_density = _log_density(law, value, scale, known_inside=same_support)
    log_proposal = () if drawn_from is None else (_log_density(drawn_from, value, None, known_inside=True),)
    for role, part in (("distribution", law), ("proposal", proposal)):
        valid = None if part is None else densities.parameters_valid(part)
        if valid is not None:  # of what is drawn no density is weighed that would show it
            _bind_score(staging, name, f"{role}'s parameters", jnp.where(valid, 0.0, jnp.nan))
        # What the library draws by itself knows its dead ends, and says elsewhere why nothing is possible there.
        possible = None if part is None or staging.internal else densities.is_possible(part)
        if possible is not None:
            _bind_score(staging, name, f"{role}'s parameters", jnp.where(possible, 0.0, -jnp.inf))
    _bind_score(staging, name, "sample", log_density, *log_proposal)
    return value


def _without_sampler(law) -> Inner:
    """Return a program that gives the type of a law that has a density alone."""
    dtype = jnp.int32 if law.is_discrete else jnp.result_type(float)
    return trace(lambda key: [jnp.zeros(law.batch_shape + law.event_shape, dtype)], KEY)[0]


def _bind_observation(staging: Staging, name: str, law, value, scale):
    value = as_array(name, value)
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
    if not law.is_discrete and value.dtype == jnp.bool_:
        raise SiteTypeError(f"{label}: {type(law).__name__} is continuous, the value is bool. Pass real numbers.")
    _bind_score(staging, name, "observe", _log_density(law, value, scale))
    return value


def _bind_score(staging: Staging, name: str, kind: str, *log_densities) -> None:
    for log_density in log_densities:
        if jnp.issubdtype(jnp.result_type(log_density), jnp.complexfloating):
            raise SiteTypeError(f"factor({staging.prefix + name!r}) at {user_line()}: the log-weight is complex.")
    floats = [jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)) for x in log_densities]
    score_p.bind(*floats, name=staging.prefix + name, kind=kind, where=user_line(), owner=staging.owner)


def _bind_record(staging: Staging, name: str, value) -> None:
    leaves, _ = jax.tree.flatten(value)
    if len(leaves) != 1:
        raise SiteTypeError(
            f"deterministic({staging.prefix + name!r}) at {user_line()}: the value has {len(leaves)} arrays; "
            "record one each."
        )
    record_p.bind(
        leaves[0], name=staging.prefix + name, internal=staging.internal, where=user_line(), owner=staging.owner
    )


def bind_given(name: str, value) -> None:
    """Say that a site which follows is observed, with this value, `[T, ...]` inside loops."""
    staging = current_staging(f"the condition on {name!r}")
    given_p.bind(as_array(name, value), name=staging.prefix + name, where=user_line(), owner=staging.owner)


def _sampler(staging: Staging, name: str, role: str, law):
    """Trace a distribution's sampler to a program from a key to a value; (None, []) where it has none."""
    try:
        program, constants = trace(chance.sampler(law, staging.prefix + name), KEY)
    except NotImplementedError:  # a density alone: fine where a proposal is drawn from, or the site is observed
        return None, []
    if len(program.out_avals) != 1:
        raise SiteTypeError(
            f"sample({staging.prefix + name!r}) at {user_line()}: the {role} {type(law).__name__} draws "
            f"{len(program.out_avals)} arrays; a site is one array."
        )
    return program, constants


def _log_density(law, value, scale, known_inside: bool = False):
    """Return the log-density of a value, see `ppl.densities`, to the power `scale` where a handler says so."""
    log_density = densities.log_density(law, value, known_inside=known_inside)
    return log_density if scale is None else scale * log_density


def _total(log_density, scale):
    log_density = jnp.sum(jnp.asarray(log_density))
    return log_density if scale is None else scale * log_density


def require_distribution(staging: Staging, name: str, role: str, value) -> None:
    """Raise unless a site was given a NumPyro distribution."""
    if not isinstance(value, dist.Distribution):
        raise SiteTypeError(
            f"site {staging.prefix + name!r} at {user_line()}: the {role} is a {type(value).__name__}; it must be a "
            "NumPyro "
            "distribution, for instance dist.Normal(0.0, 1.0)."
        )


def as_array(name: str, value):
    """Return a site's value as a numeric array, or say what it is instead."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text is no array")
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise SiteTypeError(
            f"site {name!r} at {user_line()}: the value is a {type(value).__name__}; it must be a number or an array."
        ) from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == jnp.bool_):
        raise SiteTypeError(f"site {name!r} at {user_line()}: the value has type {array.dtype}; it must be numeric.")
    return array
