"""Targets: processes multiplied, raised to powers, tilted and constrained, with one weight rule.

A target combines processes p_i that unfold in the same steps over the same values, with powers b_i, a log-reward r of
the finished value and a constraint c, into the measure on whole generations

    prod_i p_i(path)^{b_i} * k(path | value)^{1 - sum b_i} * exp(r(value)) * [c holds]                              (1)

with k the processes' shared backward kernel: certain for text, so that (1) is `prod_i p_i(text)^{b_i} exp(r)`. Every
operator gives the same normal form, in which powers multiply and lists join:

    p * q           powers side by side            (p ** a) ** b   = p ** (a b)
    p / q           p * q ** -1
    guide(p, q, w)  p ** (1 - w) * q ** w          (p tilted by r) ** b = p ** b tilted by b r
    constrain       joins with `&`, and is idempotent under powers

A power of 0 drops a factor but not its support; where a factor with a negative power is 0 the target has no mass.

One step draws x' from F, by default the locally optimal law, and weighs it by

    log w = sum_i b_i [log p_i(x'|x) - log k(x|x')] + log k(x|x') - log F(x'|x) + psi(x') - psi(x)                  (2)

psi is the target's twist, a guess of r on the way: the start carries exp psi(start), the end exp(r - psi). It
telescopes, so that it steers resampling and is gone from (1).
"""

from __future__ import annotations

import abc
import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ppl.errors import SiteTypeError
from ppl.guarantees import promised
from ppl.host import Host
from ppl.steering import Steering

if TYPE_CHECKING:
    import numpyro.distributions as dist

    from ppl.process import Process
    from ppl.program import Program

__all__ = ["Combination", "Target", "Tilt", "guide"]


class Target(abc.ABC):
    """What can be combined and inferred: a process, or a combination of processes."""

    @abc.abstractmethod
    def combination(self) -> Combination:
        """Return the normal form."""

    def program(self) -> Program:
        """Return the target as a program that returns the finished value."""
        return self.combination().program()

    def __mul__(self, other: Target) -> Combination:
        """Return the product of experts, `p(path) q(path)`."""
        if not isinstance(other, Target):
            return NotImplemented
        return self.combination().join(other.combination())

    def __truediv__(self, other: Target) -> Combination:
        """Return the quotient, `p(path) / q(path)`; it has no mass where q is 0.

        Alone its powers sum to 0, and it is no target: `p * r / q` changes r as p differs from q, `p ** 2 / q` is p
        pushed away from q.
        """
        if not isinstance(other, Target):
            return NotImplemented
        return self.combination().join(other.combination().raised(-1.0))

    def __pow__(self, power: float) -> Combination:
        """Return the annealed target, `p(path) ** power`. Negative powers are written `q / p`."""
        if not isinstance(power, numbers.Real) or isinstance(power, bool):
            raise TypeError(f"a target's power must be a number, got {type(power).__name__}.")
        if not 0 <= power < math.inf:
            raise ValueError(
                f"a target's power must be at least 0 and finite, got {power}. A negative power is a quotient: q / p."
            )
        return self.combination().raised(float(power))

    def tilt(self, log_reward: Callable | Host, twist: Callable | Host | Steering | None = None) -> Combination:
        """Multiply the target by `exp(log_reward(value))`.

        Args:
            log_reward: a JAX function of one finished value (for text `{"tokens", "length"}`) that returns a scalar, in
                nats, or `ppl.host(fn)` of a Python function of all particles' texts.
            twist: the same kind of function of the running state, a guess of the log-reward on the way. For text the
                state is the value so far, `{"tokens", "length"}`, with the network's last hidden state `"hidden"`; for
                diffusion `{"x", "denoised", "t", "step"}`. It steers which particles survive; the target stays the
                same. `ppl.steering` gives it a memory.
        """
        for name, function in (("log_reward", log_reward), ("twist", twist)):
            given = (
                callable(function) or isinstance(function, Host) or (name == "twist" and isinstance(function, Steering))
            )
            if function is not None and not given:
                raise TypeError(f"`{name}` must be a function or ppl.host(function), got {type(function).__name__}.")
        if log_reward is None:
            raise TypeError("`log_reward` must be a function or ppl.host(function), got None.")
        whole = self.combination()
        return dataclasses.replace(whole, tilts=(*whole.tilts, Tilt(log_reward, twist, 1.0)))

    def constrain(self, constraint: Any, *, require_end: bool = False) -> Combination:
        """Condition the finished value on a constraint.

        A text is finished when it ends by an end token, or fills its budget. The probability of a text includes that of
        its end, unless it fills the budget: how likely one of several texts is depends on `max_tokens`. For the odds of
        strings as continuations, whatever follows them, ask `lm.log_prob(prompt, string)`; for those of whole texts
        give a budget with room for an end token after the longest, and `require_end=True`.

        Args:
            constraint: what it must satisfy, such as `ppl.models.Regex(...)`.
            require_end: drop generations that were cut off by the budget, matching or not.

        Raises:
            ValueError: no value that the process can write within its budget satisfies the constraint.
        """
        whole = self.combination()
        joined = constraint if whole.constraint is None else whole.constraint & constraint
        whole = dataclasses.replace(whole, constraint=joined, require_end=whole.require_end or require_end)
        whole.bound_constraint()  # says now what could only fail later
        return whole

    def by_steps(self, delimiter: Any = None, *, max_steps: int, step_tokens: int) -> Combination:
        """Generate in stretches, between which particles are resampled; those that have ended wait.

        Args:
            delimiter: what ends a stretch after the token that completes it, for text a string such as an empty line;
                None for stretches of `step_tokens` tokens.
            max_steps: how many stretches there may be. What is not finished by then is cut off.
            step_tokens: how many tokens a stretch has at most.

        Returns:
            The target by stretches. Twists and potentials are looked at after each of them.
        """
        for name, count in (("max_steps", max_steps), ("step_tokens", step_tokens)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"`{name}` must be an int of at least 1, got {count!r}.")
        return dataclasses.replace(self.combination(), steps=Steps(delimiter, max_steps, step_tokens))

    def weigh_steps(self, log_weight: Callable | Host) -> Combination:
        """Multiply the target by `exp(log_weight(state))` after every step: a potential on the path, not on its end.

        With a process reward r in (0, 1) and `log_weight = logit(r)` this is particle filtering for inference-time
        scaling as published (Puri et al. 2025, arXiv 2502.01618, Algorithm 1): the path has the density
        `p(path) prod_t r_t / (1 - r_t)`. For a target that only the last reward counts in, take `tilt` with a twist.

        Args:
            log_weight: a function of the running state, see `tilt`.
        """
        if not callable(log_weight) and not isinstance(log_weight, Host):
            raise TypeError(f"`log_weight` must be a function or ppl.host(function), got {type(log_weight).__name__}.")
        whole = self.combination()
        return dataclasses.replace(whole, potentials=(*whole.potentials, Potential(log_weight, 1.0)))

    def watch(self, name: str, function: Callable) -> Combination:
        """Record a function of the running state after every step as a site.

        Args:
            name: the site's name.
            function: maps one particle's running state, see `tilt`, to an array.
        """
        if not callable(function):
            raise TypeError(f"`function` must map the running state to an array, got {type(function).__name__}.")
        whole = self.combination()
        return dataclasses.replace(whole, watched=(*whole.watched, (name, function)))

    def propose(self, proposal: Callable) -> Combination:
        """Replace the locally optimal proposal.

        Args:
            proposal: maps the default's distribution and the running state (see `tilt`) to the distribution to draw
                from. It must reach what the default reaches: `target.propose(lambda law, state: law.top_p(0.9))`.
        """
        if not callable(proposal):
            raise TypeError(f"`proposal` must be a function (law, state) -> distribution, got {proposal!r}.")
        return dataclasses.replace(self.combination(), proposal=proposal)


@dataclasses.dataclass(frozen=True, eq=False)
class Tilt:
    """A log-reward, its twist, and the power they are raised to."""

    log_reward: Callable | Host
    twist: Callable | Host | Steering | None
    power: float


@dataclasses.dataclass(frozen=True, eq=False)
class Potential:
    """A log-weight of every step's state, and the power it is raised to."""

    log_weight: Callable | Host
    power: float


class Corrector(Protocol):
    """How a step is drawn and weighed. One whose attribute `weighs` is False does without the start's weight too."""

    def __call__(
        self, processes: list[Process], states: list[Any], powers: Any, signs: list[float], step: Any, allowed: Any
    ) -> tuple[dist.Distribution, Callable[[Any], Any] | None]:
        """Return the law of the random part of a step, and the weight of what is drawn, None for 0.

        Args:
            processes: the factors.
            states: their states.
            powers: `float32[factors]`.
            signs: the powers as Python numbers.
            step: its number, int32.
            allowed: what a constraint allows, or None.
        """


class Moves(Protocol):
    """A Markov kernel on a target's states, applied before each step."""

    def __call__(self, processes: list[Process], states: list[Any], powers: Any, step: Any) -> list[Any]:
        """Return moved states."""

    def network_calls(self, processes: list[Process]) -> int:
        """Return how often one particle calls networks for moves in a run."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """How a generation is cut into stretches; see `Target.by_steps`."""

    delimiter: Any
    max_steps: int
    step_tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class Combination(Target):
    """The normal form (1) of a target.

    Attributes:
        factors: processes with their powers.
        tilts: log-rewards.
        potentials: log-weights of every step.
        constraint: what the value must satisfy, or None.
        require_end: whether generations cut off by the budget are dropped.
        proposal: what replaces the locally optimal proposal, or None.
        steps: how the generation is cut into stretches, or None.
        watched: names of sites with the functions of the running state that they record.
        corrector: how a step is drawn and weighed, where not by (2); an algorithm's choice, see `Corrector`.
        moves: a kernel that moves states between steps; an algorithm's choice, see `Moves`.
    """

    factors: tuple[tuple[Process, float], ...]
    tilts: tuple[Tilt, ...] = ()
    potentials: tuple[Potential, ...] = ()
    constraint: Any = None
    require_end: bool = False
    proposal: Callable | None = None
    steps: Steps | None = None
    watched: tuple[tuple[str, Callable], ...] = ()
    corrector: Corrector | None = None
    moves: Moves | None = None

    def combination(self) -> Combination:
        """Return itself."""
        return self

    @property
    def process(self) -> Process:
        """The first of the processes: it says how values look."""
        return self.factors[0][0]

    @property
    def guarantee(self) -> str:
        """What weighted runs of the target can promise at best."""
        return promised(*(process for process, _ in self.factors))

    def join(self, other: Combination) -> Combination:
        """Return the product with another one; processes must unfold alike."""
        ours, theirs = self.process.unfolds_like(), other.process.unfolds_like()
        if ours != theirs:
            different = [name for name in ours if ours[name] != theirs.get(name)] or list(theirs)
            shown = "; ".join(f"{name}: {ours.get(name)!s} and {theirs.get(name)!s}" for name in different)
            raise ValueError(f"{self.process!r} and {other.process!r} cannot be multiplied: {shown}.")
        if self.proposal is not None and other.proposal is not None:
            raise ValueError("both targets have a proposal of their own; call .propose(...) on the product instead.")
        if self.steps is not None and other.steps is not None and self.steps != other.steps:
            raise ValueError(f"the targets' steps differ: {self.steps} and {other.steps}.")
        constraint = self.constraint if other.constraint is None else other.constraint
        if self.constraint is not None and other.constraint is not None:
            constraint = self.constraint & other.constraint
        return Combination(
            _merge(self.factors + other.factors),
            self.tilts + other.tilts,
            self.potentials + other.potentials,
            constraint,
            self.require_end or other.require_end,
            self.proposal or other.proposal,
            self.steps or other.steps,
            self.watched + other.watched,
        )

    def raised(self, power: float) -> Combination:
        """Return the target to a power, which may be negative here."""
        return dataclasses.replace(
            self,
            factors=tuple((process, beta * power) for process, beta in self.factors),
            tilts=tuple(dataclasses.replace(t, power=t.power * power) for t in self.tilts),
            potentials=tuple(dataclasses.replace(p, power=p.power * power) for p in self.potentials),
        )

    def bound_constraint(self) -> Any:
        """Return the constraint made for the process's values, or None.

        Raises:
            ValueError: the process cannot be constrained, or no value within its budget satisfies the constraint.
        """
        return None if self.constraint is None else self.process.bind(self.constraint, self.require_end)

    def program(self) -> Program:
        """Return the target as a program that returns the finished value.

        Raises:
            ValueError: the powers sum to 0 or less: the target has no proposal, and for densities no mass.
        """
        from ppl.unfold import target_program  # the program needs the statements, which need nothing of targets

        total = sum(power for _, power in self.factors)
        if total <= 0:
            named = ", ".join(f"{process!r} ** {power:g}" for process, power in self.factors)
            raise ValueError(f"the powers of {named} sum to {total:g}; a target's powers must sum to more than 0.")
        return target_program(self)

    def network_calls(self) -> int | None:
        """Return how often one particle calls networks in a run; None where that is not known."""
        calls = [process.network_calls(self.corrector is not None) for process, _ in self.factors]
        if None in calls:
            return None
        moves = 0 if self.moves is None else self.moves.network_calls([process for process, _ in self.factors])
        return sum(calls) + moves + getattr(self.proposal, "network_calls", 0)

    def __repr__(self) -> str:
        parts = [repr(p) if power == 1 else f"{p!r} ** {power:g}" for p, power in self.factors]
        parts += [f"tilted ** {t.power:g}" if t.power != 1 else "tilted" for t in self.tilts]
        return f"<Target {' * '.join(parts)}{'' if self.constraint is None else f' | {self.constraint!r}'}>"


def guide(p: Target, q: Target, *, weight: float) -> Combination:
    """Return the geometric mixture `p ** (1 - weight) * q ** weight`; beyond 1 it is classifier-free guidance.

    Args:
        p: the unconditional target.
        q: the conditional one.
        weight: a finite number; 0 is p, 1 is q, more moves past q away from p.
    """
    if not isinstance(p, Target) or not isinstance(q, Target):
        raise SiteTypeError(f"ppl.guide takes two processes or targets, got {type(p).__name__} and {type(q).__name__}.")
    if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
        raise ValueError(f"`weight` must be a finite number, got {weight!r}.")
    return p.combination().raised(1.0 - float(weight)).join(q.combination().raised(float(weight)))


def _merge(factors: tuple[tuple[Process, float], ...]) -> tuple[tuple[Process, float], ...]:
    """Add up the powers of a process that stands in a product more than once, so that it runs once."""
    merged: dict[int, tuple[Process, float]] = {}
    for process, power in factors:
        _, before = merged.get(id(process), (process, 0.0))
        merged[id(process)] = process, before + power
    return tuple(merged.values())
