"""Processes: generations that unfold in steps.

A process has a start, a forward kernel for each step, and a value once it has ended:

    y ~ origin()                  the random part of the start, where it has one: noise
    x_0 = start(y)
    y_t ~ forward(x_t, t)         the random part of a step: a token, the next image, the tokens that are unmasked
    x_(t+1) = advance(x_t, y_t, t)
    value = finish(x_T, y)

so that p(path) = p(y) prod_t p(y_t | x_t). A language model, a diffusion model and a masked diffusion model are all
processes; what combines or reweighs them needs only the kernels' distributions, which know their backward kernels (see
`ppl.products`). As a program a process is one `ppl.scan` with one site, `path`, and `origin` before it where the start
is random; they are stored only when `keep` names them.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist

from ppl.control_flow import scan
from ppl.guarantees import promised
from ppl.program import as_program
from ppl.staging import current_staging, scope, staging_options
from ppl.statements import sample
from ppl.targets import Combination, Target

__all__ = ["NoDelimiter", "Process", "draw", "generate", "note_promise", "unfold"]


class Process(Target):
    """A generation that unfolds in at most `num_steps` steps. Subclasses define the methods below."""

    num_steps: int
    guarantee: str = "unbiased"  # what weighted runs can promise at best, see `ppl.guarantees`
    keeps_path: bool = True  # whether `finish` and `running` read what was drawn
    resamples_every_step: bool = False  # whether that is the better default for populations

    def origin(self) -> dist.Distribution | None:
        """Return the distribution of the random part of the start; None where the start is certain."""

    @abc.abstractmethod
    def start(self, *drawn) -> Any:
        """Return the first state, a pytree of arrays, given what was drawn from `origin`, if anything."""

    @abc.abstractmethod
    def forward(self, state: Any, step) -> dist.Distribution:
        """Return the distribution of the random part of a step, given the state and the step's number (int32)."""

    @abc.abstractmethod
    def advance(self, state: Any, drawn, step) -> Any:
        """Return the next state."""

    def ended(self, state: Any):
        """Return whether the generation has ended before its last step, a bool; None for those that never do."""
        del state

    def finish(self, state: Any, path) -> Any:
        """Return the generation's value from the last state and all that was drawn, `[num_steps, ...]`."""
        del path
        return state

    def texts(self, value: Any) -> list[str] | None:
        """Return the texts of a value with a leading particle axis; None for processes that write none."""
        del value

    # What targets ask of a process.

    def running(self, state: Any, path, step) -> Any:
        """Return the state as twists and proposals see it.

        Args:
            state: the state before step `step`.
            path: what was drawn so far, `[num_steps, ...]`; entries from `step` on mean nothing.
            step: how many steps were made.
        """
        del path, step
        return state

    def unfolds_like(self) -> dict[str, Any]:
        """Return what must be equal in processes that are multiplied, by name."""
        return {"process": type(self).__name__, "steps": self.num_steps}

    def together(self, target: Combination) -> list[Process]:
        """Return the processes of a target, of which this is the first, as they unfold together.

        Args:
            target: the target.

        Raises:
            ValueError: they have no proposal together.
        """
        return [process for process, _ in target.factors]

    def aligned_with(self, processes: Sequence[Process]) -> list[Process]:
        """Return processes, of which this is one, in steps that they share."""
        return list(processes)

    def network_calls(self, corrected: bool = False) -> int | None:
        """Return how often one particle calls a network in a run; None where that is not known.

        Args:
            corrected: a corrector draws the steps, which so call none of their own.
        """

    def bind(self, constraint: Any, require_end: bool) -> Any:
        """Return a constraint made for this process's values.

        Raises:
            ValueError: the process cannot be constrained, or no value within its budget satisfies the constraint.
        """
        raise ValueError(f"{self!r} cannot be constrained by {constraint!r}: it draws no tokens.")

    def delimit(self, delimiter: Any) -> Any:
        """Return what finds a delimiter in the drawn values: `advance(mark, drawn) -> mark` and `complete(mark)`.

        Marks are int32, 0 at the start of a stretch.

        Raises:
            ValueError: the process knows no such delimiter.
        """
        if delimiter is not None:
            raise ValueError(f"{self!r} cannot be cut at {delimiter!r}: it writes no text.")
        return NoDelimiter()

    def budget_after(self, step, require_end: bool):
        """Return how many more text tokens may follow the one that is drawn at a step, int32."""
        return self.num_steps - 1 - step - int(require_end)

    @property
    def writes_text(self) -> bool:
        """Whether values can be read as texts."""
        return type(self).texts is not Process.texts

    def combination(self) -> Combination:
        """Return the process as a target: itself, to the power 1."""
        return Combination(((self, 1.0),))


class NoDelimiter:
    """Stretches of equal length."""

    def advance(self, mark, drawn):
        """Return the mark as it is."""
        del drawn
        return mark

    def complete(self, mark):
        """Return False."""
        return mark < 0


def unfold(process: Process):
    """The program of every process that stands alone."""
    note_promise(process)

    def step(state, t):
        drawn = draw("path", process.forward(state, t))
        return process.advance(state, drawn, t), drawn if process.keeps_path else None

    origin = process.origin()
    state = process.start() if origin is None else process.start(draw("origin", origin))
    can_end = type(process).ended is not Process.ended
    steps = jnp.arange(process.num_steps)
    state, path = scan(step, state, steps, until=process.ended if can_end else None)
    return process.finish(state, path)


def note_promise(part: Any) -> None:
    """Let the program that is being staged promise no more than a process or a target that unfolds in it."""
    current_staging("a process").promises.append(promised(part))


def draw(name: str, law: dist.Distribution, proposal: dist.Distribution | None = None) -> Any:
    """Draw the random part of a start or of a step, as a site that is stored only when it is named."""
    with staging_options(internal=True):
        return sample(name, law, proposal=proposal)


def generate(program_or_process, *, name: str | None = None) -> Any:
    """Run a program or a process inside another model, factors included, and return its value.

    Args:
        program_or_process: what to run.
        name: prefixes its sites with `name/`; needed where two of one kind stand in one model.

    Its loops are inner ones: particles are not resampled within them. Conditioned sites of a program are observed.
    """
    current_staging("ppl.generate")
    program = as_program(program_or_process)
    with scope(name) if name is not None else contextlib.nullcontext(), staging_options(inner=True):
        return program.run_inside()
