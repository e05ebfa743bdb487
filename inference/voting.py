"""Majority vote: the answer that most generations agree on.

Of J programs that answer the same question, each is run by an algorithm, and every particle votes with its weight:

    V(a) = (1 / J) sum_j sum_n W_jn [answer(value_jn) = a],        elected = argmax_a V(a)                         (1)

With one program this is self-consistency. With one masked diffusion model under several block schedules, each of them
an expert of its own, it is HEX. The elected answer is the likeliest one under the mixture of the runs; nothing is said
about the programs' own targets, so that the result is heuristic.

Source: Wang et al. (2022), "Self-consistency improves chain of thought reasoning in language models", arXiv 2203.11171;
"Test-time scaling in diffusion LLMs via hidden semi-autoregressive experts" (2025), arXiv 2510.05040.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ppl.guarantees import Promising
from ppl.inference.importance import ImportanceSampling
from ppl.inference.validation import refuse_state
from ppl.posterior import Posterior, Status
from ppl.program import Program, as_program
from ppl.runners import is_traced

__all__ = ["MajorityVote"]


@dataclasses.dataclass(frozen=True)
class MajorityVote(Promising):
    """Run a program and others beside it, and keep the generations that gave the most frequent answer.

    Attributes:
        answer: what a particle answers: a Python function of its text, of programs that write no text of its value (in
            NumPy). It returns anything hashable, or None for a particle that does not vote.
        ensemble: further programs, processes or targets that vote, with values like the first one's: for HEX one model
            under other block schedules.
        algorithm: what runs each of them.

    The posterior holds the particles of all runs; those that gave another answer than the elected one have weight zero.
    `posterior.diagnostics` reports `answers`, the distinct ones by falling votes and, where votes are equal, in the
    order in which they were first given; `votes`, their shares (1), which sum to less than 1 where some did not vote;
    and `ballots`, int32 `[N]`: each particle's place in `answers`, -1 for none. If nobody votes the weights stay as
    they are.
    """

    answer: Callable[[Any], Hashable]
    ensemble: Sequence[Any] = ()
    algorithm: Any = dataclasses.field(default_factory=lambda: ImportanceSampling(8))
    guarantee: ClassVar[str] = "heuristic"

    def __post_init__(self):
        if not callable(self.answer):
            raise TypeError(f"`answer` must be a function of a text or a value, got {type(self.answer).__name__}.")
        if not callable(self.algorithm) or isinstance(self.algorithm, type):
            raise TypeError(f"`algorithm` must be an algorithm object such as SMC(8), got {self.algorithm!r}.")
        if isinstance(self.ensemble, str) or not isinstance(self.ensemble, Sequence):
            raise TypeError(f"`ensemble` must be a list of programs, got {type(self.ensemble).__name__}.")
        object.__setattr__(self, "ensemble", tuple(self.ensemble))
        for member in self.ensemble:
            as_program(member)

    def __repr__(self) -> str:
        return f"MajorityVote({1 + len(self.ensemble)} programs, {self.algorithm!r})"

    def __call__(self, program, key, *, keep=None, progress=None, state=None) -> Posterior:
        """Run; see `ppl.infer` for the arguments.

        Raises:
            TypeError: under a `jit` of the user's own: votes are counted on the host.
            ValueError: values of different shapes.
        """
        refuse_state(self, state)
        programs = [as_program(member) for member in (program, *self.ensemble)]
        keys = jax.random.split(key, len(programs))
        runs = [self.algorithm(p, k, keep=keep, progress=progress) for p, k in zip(programs, keys, strict=True)]
        if is_traced(runs):
            raise TypeError("MajorityVote counts votes on the host: call it outside of jax.jit and jax.vmap.")
        voting = [run for run in runs if bool(run.status.ok)]
        if not voting:
            nan = jnp.full_like(runs[0].log_evidence, jnp.nan)
            return dataclasses.replace(runs[0], log_evidence=nan, guarantee=self.guarantee, algorithm=repr(self))
        return self._elect(programs[0], voting)

    def _elect(self, program: Program, runs: list[Posterior]) -> Posterior:
        pooled = _pool(runs)
        weights = np.concatenate([np.asarray(run.weights, np.float64) for run in runs]) / len(runs)
        given = [self._answer(program, pooled["value"], n) if w > 0 else None for n, w in enumerate(weights)]
        votes: dict[Hashable, float] = {}
        for answer, weight in zip(given, weights, strict=True):
            if answer is not None:
                votes[answer] = votes.get(answer, 0.0) + float(weight)
        ranked = sorted(votes, key=lambda answer: -votes[answer])  # stable: the first of equal ones
        ballots = np.array([-1 if answer is None else ranked.index(answer) for answer in given], np.int32)
        kept = np.where(ballots == 0, weights, 0.0) if ranked else weights
        kept = kept / kept.sum()
        with np.errstate(divide="ignore"):
            log_weights = jnp.asarray(np.log(kept), jnp.float32)
        num = len(weights)
        diagnostics = {
            "ess": jnp.zeros(0), "resampled": jnp.zeros(0, bool), "log_evidence": jnp.zeros(0),
            "ancestors": jnp.zeros((0, num), jnp.int32), "answers": tuple(ranked),
            "votes": np.array([votes[answer] for answer in ranked]), "ballots": ballots,
        }  # fmt: skip
        calls = [run.diagnostics.get("network_calls") for run in runs]
        if None not in calls:
            diagnostics["network_calls"] = sum(calls)
        return Posterior(
            **pooled,
            log_weights=log_weights,
            log_evidence=jnp.float32(jnp.nan),
            ess=jnp.float32(1 / np.sum(kept**2)),
            diagnostics=diagnostics,
            status=Status(jnp.int32(0), jnp.int32(-1)),
            guarantee=self.guarantee,
            algorithm=repr(self),
            decode=program.decode,
        )

    def _answer(self, program: Program, value: Any, n: int) -> Hashable:
        one = jax.tree.map(lambda leaf: np.asarray(leaf)[n], value)
        if program.decode is None:
            return self.answer(one)
        (text,) = program.decode(jax.tree.map(lambda leaf: leaf[None], one))
        return self.answer(text)


def _pool(runs: list[Posterior]) -> dict[str, Any]:
    """Join the particles of runs: their values, and the sites that all of them have."""
    shapes = [jax.tree.map(lambda leaf: leaf.shape[1:], run.value) for run in runs]
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise ValueError(f"programs that vote must have values of one shape, got {shapes[0]} and {other}.")

    def join(*leaves):
        return jnp.concatenate(leaves)

    def shared(part):
        first, *rest = ({name: leaf.shape[1:] for name, leaf in part(run).items()} for run in runs)
        names = [name for name in first if all(first[name] == shape.get(name) for shape in rest)]
        return {name: join(*(part(run)[name] for run in runs)) for name in names}

    return {
        "value": jax.tree.map(join, *(run.value for run in runs)),
        "sites": shared(lambda run: run.sites),
        "present": shared(lambda run: run.present),
    }
