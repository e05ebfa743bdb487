"""`ppl.infer`: run an algorithm on a program, and raise what went wrong in the words of the program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from ppl.draws import as_key
from ppl.errors import AllParticlesDied, InvalidWeight
from ppl.guarantees import has_evidence, promised
from ppl.posterior import Outcome, Posterior
from ppl.program import as_program
from ppl.runners import is_traced

__all__ = ["infer"]


def infer(
    program,
    algorithm,
    *,
    seed: int = 0,
    key=None,
    state=None,
    keep: Iterable[str] | None = None,
    progress: bool | None = None,
) -> Posterior:
    """Run an inference algorithm on a program.

    Args:
        program: a program (a model called with its arguments) or a process.
        algorithm: an algorithm of `ppl.inference`, or any callable `(program, key, **options) -> Posterior`.
        seed: the seed of all randomness: same program, algorithm and seed, same result.
        key: a PRNG key to use instead of `seed`.
        state: `posterior.state` of an earlier run, to continue a chain.
        keep: names of the sites to store; by default all but a process's path.
        progress: show a progress bar once the run has taken a few seconds; by default in terminals and notebooks.

    Returns:
        The posterior. Under a `jit` or `vmap` of the user's own nothing is raised: `posterior.status` tells.

    Raises:
        InvalidWeight: a living particle's weight became NaN or +inf; names the site and the step.
        HostError: a host function raised, or did not return one log-weight for each particle.
        AllParticlesDied: every particle has weight zero; names the sites that killed them and the step.
        SiteValueError: `keep` names what is not a site.
    """
    program = as_program(program)
    if not callable(algorithm) or isinstance(algorithm, type):
        given = f"the class {algorithm.__name__}" if isinstance(algorithm, type) else type(algorithm).__name__
        raise TypeError(f"`algorithm` must be an algorithm object such as SMC(num_particles=100), got {given}.")
    key = _key(seed, key)
    options: dict[str, Any] = {
        "keep": None if keep is None else frozenset(_names(keep)),
        "progress": progress,
    }
    if state is not None:
        options["state"] = state
    posterior = with_guarantee(program, algorithm, algorithm(program, key, **options))
    status = posterior.status
    if is_traced(status) or jnp.ndim(status.code):
        return posterior
    if int(status.code) == Outcome.OK:
        return posterior
    raise _failure(program, algorithm, key, posterior)


def with_guarantee(program, algorithm, posterior: Posterior) -> Posterior:
    """Return a posterior that promises no more than is known: algorithms of the user's own may leave that open."""
    if not isinstance(posterior, Posterior):
        raise TypeError(f"`algorithm` {algorithm!r} must return a Posterior, got {type(posterior).__name__}.")
    stated = posterior.guarantee
    if stated:
        parts, chain = [stated, program.target], stated == "invariant"
    else:
        staged = program.stage(keep_rules=False)
        parts, chain = [staged, promised(algorithm)], getattr(algorithm, "guarantee", None) == "invariant"
    guarantee = promised(*parts, chain=chain or posterior.num_chains > 0)
    log_evidence = posterior.log_evidence
    if not has_evidence(guarantee):
        log_evidence = jnp.full_like(log_evidence, jnp.nan)
    return dataclasses.replace(posterior, guarantee=guarantee, log_evidence=log_evidence)


def _key(seed, key):
    name, given = ("seed", seed) if key is None else ("key", key)
    try:
        key = as_key(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{name}`: {error}") from None
    if key.ndim:
        raise ValueError(f"`{name}` holds {key.size} PRNG keys, of shape {key.shape}; pass one of them.")
    return key


def _names(keep) -> list[str]:
    if isinstance(keep, str):
        raise TypeError(f"`keep` must be a list of site names, got the string {keep!r}; write keep=[{keep!r}].")
    names = list(keep) if isinstance(keep, Iterable) else [keep]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`keep` must be a list of site names, got {keep!r}.")
    return names


def _failure(program, algorithm, key, posterior: Posterior) -> Exception:
    """Run the same program with the same key again, counting what each site did, and say what went wrong."""
    outcome, step = Outcome(int(posterior.status.code)), int(posterior.status.step)
    blame = algorithm.blame(program, key) if hasattr(algorithm, "blame") else {}
    kind = "invalid" if outcome == Outcome.INVALID_WEIGHT else "killed"
    lines = program.stage(keep_rules=False).statements
    culprits, repeated = [], getattr(algorithm, "blamed", None)
    for name, counts in blame.items():
        count = jnp.asarray(counts[kind])
        if count.ndim and step >= 0 and repeated is None:  # what comes after the run has failed is not its cause
            count = count[: max(step + 1 - int(counts["start"]), 0)]
        total = int(count.sum())
        if total:
            steps = "" if count.ndim == 0 else f", first at step {int(counts['start'] + jnp.argmax(count > 0))}"
            line = f"{lines[name]}{steps}; " if name in lines else ""  # the returned value has none
            culprits.append((name, total, f"{name!r} ({line}{total} times)"))
    culprits.sort(key=lambda c: -c[1])
    named = ", ".join(text for *_, text in culprits) or "no single site"
    if blame and repeated is not None:
        named += f", as {repeated} tell: the run itself was not repeated"
    place = f"at step {step}" if step >= 0 else "outside of the loops"
    if outcome == Outcome.INVALID_WEIGHT:
        what = "the log-weight of a living particle became"
        if posterior.num_chains:
            what, place = "the log-density at a chain's start is", ""
        return InvalidWeight(
            f"{algorithm!r}: {what} NaN or +inf{place and f' {place}'}. It came from {named}. "
            "Check the "
            "distribution's parameters and the value there; a forbidden value has log-weight -inf."
        )
    if posterior.num_chains:
        return AllParticlesDied(
            f"{algorithm!r}: a chain found no start of positive density among its draws of the program. They were "
            f"killed by {named}. Let it choose among more draws, `num_starts`; draw the sites there from where the "
            "program is possible, ppl.sample(..., proposal=...); or hold some of them at values that are, "
            "ppl.condition(program, {site: value})."
        )
    return AllParticlesDied(
        f"{algorithm!r}: all {posterior.num_particles} particles have weight zero {place}. They were killed by "
        f"{named}. Use more "
        "particles, a proposal that respects the constraint, or check that the program is possible."
    )
