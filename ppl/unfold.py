"""The program of a target: its processes unfolded side by side, drawn together and weighed by one rule.

See `ppl.targets` for the mathematics; equation numbers are that module's. Sites and factors of the program:

    origin, path  what the start and the steps draw, stored only when named
    start, step   the processes' terms of the weight (2)
    twist/start, twist, reward      psi at the start and on the way; r less the last psi at the end
    potential     what `weigh_steps` adds
    constraint    0 or -inf at the end: a run's proposal never breaks a constraint, a given path may

By steps, the loop over tokens is an inner one, of as many tokens as a stretch takes, in an outer one over stretches:
only the outer one resamples, and only there twist and potentials are looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ppl.control_flow import scan
from ppl.log_weights import log_weight_of
from ppl.process import Process, draw, note_promise, unfold
from ppl.products import product_law
from ppl.program import Program
from ppl.staging import scope
from ppl.statements import deterministic, factor
from ppl.steering import Steering

if TYPE_CHECKING:
    from ppl.targets import Combination

__all__ = ["target_program"]


def target_program(target: Combination) -> Program:
    """Return the program whose measure is the target's (1)."""
    process, power = target.factors[0]
    decode = process.texts if process.writes_text else None
    alone = len(target.factors) == 1 and power == 1 and target.constraint is None and target.proposal is None
    changed = target.tilts or target.potentials or target.watched or target.steps or target.corrector or target.moves
    if alone and not changed:
        return Program(unfold, (process,), decode=decode, target=target)
    return Program(_Unfolding(target), (), decode=decode, target=target)


class _Unfolding:
    """The function of a target's program. Powers are arrays that it closes over: another value compiles nothing."""

    def __init__(self, target: Combination):
        self.target, self.process = target, target.process
        self.corrector = target.corrector or _product_step
        self.weighs = getattr(target.corrector, "weighs", True)
        self.constraint = target.bound_constraint()
        self.steps = None if target.steps is None else (target.steps, self.process.delimit(target.steps.delimiter))
        self.signs = [power for _, power in target.factors]
        self.powers = jnp.asarray(self.signs, jnp.float32)
        self.reward_powers = jnp.asarray([t.power for t in target.tilts], jnp.float32)
        self.potential_powers = jnp.asarray([t.power for t in target.potentials], jnp.float32)
        self.twisted = any(t.twist is not None for t in target.tilts)
        watched = self.twisted or bool(target.potentials or target.watched) or target.proposal is not None
        self.writes = (watched and self.process.keeps_path) or self.steps is not None
        self.can_end = type(self.process).ended is not Process.ended
        self.__name__ = repr(target)

    def __call__(self) -> Any:
        note_promise(self.target)
        # Not before: an algorithm may have chosen another corrector for what the target would refuse.
        self.processes = self.process.together(self.target)
        self.process = self.processes[0]
        carry = self._start()
        if self.steps is None:
            steps = jnp.arange(self.process.num_steps)
            carry, path = scan(self._step, carry, steps, until=self._ended if self.can_end else None)
        else:
            carry, _ = scan(self._stretch, carry, length=self.steps[0].max_steps, until=self._used_up)
            path = carry["written"]
        value = self.process.finish(carry["states"][0], path)
        if self.constraint is not None:
            kept = self.constraint.accepts(carry["constraint"])
            if self.target.require_end and self.can_end:
                kept = kept & self._ended(carry)
            factor("constraint", jnp.where(kept, 0.0, -jnp.inf))
        if self.target.tilts:
            tilts = zip(self.target.tilts, self.reward_powers, strict=True)
            reward = self._sum("reward", [(t.log_reward, power) for t, power in tilts], value)
            factor("reward", reward - carry["psi"] if self.twisted else reward)
        return value

    def _start(self) -> dict[str, Any]:
        carry: dict[str, Any] = {"states": self._start_states()}
        if self.constraint is not None:
            carry["constraint"] = self.constraint.start()
        if self.writes:
            carry["written"] = self._empty_path(carry["states"][0])
        if self.steps is not None:
            carry["count"] = jnp.int32(0)
            carry["mark"] = jnp.int32(0)
        if self.twisted:
            carry = carry | self._psi(carry, 0)
            with scope("twist"):
                factor("start", carry["psi"])
        return carry

    def _start_states(self):
        """Draw the start, where it is random, and weigh it."""
        laws = [process.origin() for process in self.processes]
        if laws[0] is None:
            return [process.start() for process in self.processes]
        law, log_weight = product_law(laws, self.powers, self.signs)
        drawn = draw("origin", law)
        if log_weight is not None and self.weighs:
            factor("start", log_weight(drawn))
        return [process.start(drawn) for process in self.processes]

    def _empty_path(self, state):
        """Return zeros for all that the process draws, `[num_steps, ...]`: its first step's law says of what type."""
        law = lambda state: self.process.forward(state, jnp.int32(0)).sample(jax.random.key(0))  # noqa: E731
        drawn = jax.eval_shape(law, state)
        return jnp.zeros((self.process.num_steps, *drawn.shape), drawn.dtype)

    def _step(self, carry, t):
        """One step of a process, weighed."""
        if self.target.moves is not None:
            carry = self._move(carry, t)
        carry, drawn = self._draw(carry, t)
        return self._watch(carry, t + 1), drawn if self.process.keeps_path else None

    def _move(self, carry, t):
        """Move a state by a kernel that leaves its level's density as it is; the twist follows it."""
        scheduled = getattr(self.corrector, "powers_at", None)
        powers = self.powers if scheduled is None else scheduled(self.powers, t)
        carry = carry | {"states": self.target.moves(self.processes, carry["states"], powers, t)}
        if not self.twisted:
            return carry
        new = self._psi(carry, t)
        with scope("moved"):
            factor("twist", new["psi"] - carry["psi"])
        return carry | new

    def _stretch(self, carry, _):
        """Steps up to a delimiter, or as many as a stretch may take; inside it nothing is resampled."""
        steps, delimiter = self.steps

        def step(carry, _):
            carry, drawn = self._draw(carry, carry["count"])
            return carry | {"count": carry["count"] + 1, "mark": delimiter.advance(carry["mark"], drawn)}, None

        def over(carry):
            return delimiter.complete(carry["mark"]) | self._used_up(carry)

        carry, _ = scan(step, carry | {"mark": jnp.int32(0)}, length=steps.step_tokens, until=over)
        return self._watch(carry, carry["count"]), None

    def _draw(self, carry, t):
        """Draw the random part of step t from F and weigh it by the processes' terms of (2)."""
        target, states = self.target, carry["states"]
        allowed = None
        if self.constraint is not None:
            budget = self.process.budget_after(t, target.require_end)
            allowed = self.constraint.allowed(carry["constraint"], budget)
        law, log_weight = self.corrector(self.processes, states, self.powers, self.signs, t, allowed)
        proposal = None
        if target.proposal is not None:
            proposal = target.proposal(law, self._view(carry, t))
            if not self.weighs:
                law, proposal = proposal, None
        drawn = draw("path", law, proposal)
        if log_weight is not None:
            factor("step", log_weight(drawn))
        new = carry | {"states": [p.advance(state, drawn, t) for p, state in zip(self.processes, states, strict=True)]}
        if self.constraint is not None:
            new["constraint"] = self.constraint.advance(carry["constraint"], drawn)
        if self.writes:
            new["written"] = carry["written"].at[t].set(drawn)
        return new, drawn

    def _watch(self, carry, t):
        """Weigh the state after t steps by twist and potentials."""
        if self.twisted:
            new = self._psi(carry, t)
            factor("twist", new["psi"] - carry["psi"])
            carry = carry | new
        if self.target.potentials:
            terms = [
                (p.log_weight, power) for p, power in zip(self.target.potentials, self.potential_powers, strict=True)
            ]
            factor("potential", self._sum("potential", terms, self._view(carry, t)))
        for name, function in self.target.watched:
            deterministic(name, function(self._view(carry, t)))
        return carry

    def _view(self, carry, t):
        return self.process.running(carry["states"][0], carry.get("written"), jnp.asarray(t, jnp.int32))

    def _psi(self, carry, t):
        """Return psi after t steps, and what twists with a memory keep."""
        view, memories, total = self._view(carry, t), [], jnp.float32(0.0)
        twists = [(tilt.twist, power) for tilt, power in zip(self.target.tilts, self.reward_powers, strict=True)]
        for number, (twist, power) in enumerate(pair for pair in twists if pair[0] is not None):
            memory = carry["memories"][number] if "memories" in carry else None
            steered = isinstance(twist, Steering)
            guess = self._log_weight("twist", twist.function if steered else twist, view)
            if steered:
                memory, guess = twist.remember(memory, guess)
            memories.append(memory)
            total = total + _raised(guess, power)
        return {"psi": total, "memories": memories}

    def _ended(self, carry):
        return self.process.ended(carry["states"][0])

    def _used_up(self, carry):
        full = carry["count"] >= self.process.num_steps
        return full | self._ended(carry) if self.can_end else full

    def _sum(self, site: str, terms: list, value: Any):
        """Add up log-weights times their powers."""
        weights = [_raised(self._log_weight(site, function, value), power) for function, power in terms]
        return sum(weights, jnp.float32(0.0))

    def _log_weight(self, site: str, function: Any, value: Any):
        return log_weight_of(site, function, self.process.texts if self.process.writes_text else None, value)


def _raised(log_weight, power):
    """Return a log-weight times a power; -inf stays -inf whatever the power."""
    return jnp.where(log_weight == -jnp.inf, -jnp.inf, power * log_weight)


def _product_step(processes, states, powers, signs, t, allowed):
    """The step of (2): drawn from the locally optimal law of the processes' kernels."""
    laws = [process.forward(state, t) for process, state in zip(processes, states, strict=True)]
    return product_law(laws, powers, signs, allowed)
