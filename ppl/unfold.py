"""The program of a target: its processes unfolded side by side, drawn together and weighed by one rule.

See `ppl.targets` for the mathematics; equation numbers are that module's. Sites and factors of the program:

    path          what the steps draw, stored only when named        step        the weight (2) of a step
    twist/start, twist, reward   psi at the start and on the way; r less the last psi at the end
    constraint    0 or -inf at the end: a run's proposal never breaks a constraint, a given path may
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from ppl.control_flow import scan
from ppl.host import Host
from ppl.process import Process, unfold
from ppl.products import product_law, weighted_log_prob
from ppl.program import Program
from ppl.staging import scope, staging_options
from ppl.statements import factor, sample

if TYPE_CHECKING:
    from ppl.targets import Combination

__all__ = ["target_program"]


def target_program(target: Combination) -> Program:
    """Return the program whose measure is the target's (1)."""
    process, power = target.factors[0]
    plain = len(target.factors) == 1 and power == 1 and target.proposal is None
    decode = process.texts if process.writes_text else None
    if plain and not target.tilts and target.constraint is None:
        return Program(unfold, (process,), decode=decode)
    powers = jnp.asarray([power for _, power in target.factors], jnp.float32)
    rewards = jnp.asarray([t.power for t in target.tilts], jnp.float32)
    return Program(_Unfolding(target, powers, rewards), (), decode=decode)


class _Unfolding:
    """The function of a target's program. Powers are arrays that it closes over: another value compiles nothing."""

    def __init__(self, target: Combination, powers: Any, reward_powers: Any):
        self.target, self.powers, self.reward_powers = target, powers, reward_powers
        self.__name__ = repr(target)

    def __call__(self) -> Any:
        target, first = self.target, self.target.process
        constraint = target.bound_constraint()
        twisted = any(t.twist is not None for t in target.tilts)
        keeps_path = twisted or target.proposal is not None
        powers = [self.powers[i] for i in range(len(target.factors))]
        signs = [float(power) for _, power in target.factors]

        states = [process.start() for process, _ in target.factors]
        carry = {"states": states}
        if constraint is not None:
            carry["automaton"] = constraint.start
        if keeps_path:
            carry["written"] = jnp.zeros(*first.path_type())
        if twisted:
            psi = self._twist(first.running(states[0], carry["written"], jnp.int32(0)))
            with scope("twist"):
                factor("start", psi)
            carry["psi"] = psi

        def step(carry, t):
            laws = [p.forward(s, t) for (p, _), s in zip(target.factors, carry["states"], strict=True)]
            allowed = None
            if constraint is not None:
                allowed = constraint.allowed(carry["automaton"], first.budget_after(t, target.require_end))
            law = product_law(laws, powers, signs, allowed)
            proposal = None
            if target.proposal is not None:
                proposal = target.proposal(law, first.running(carry["states"][0], carry["written"], t))
            with staging_options(internal=True):
                drawn = sample("path", law, proposal=proposal)
            if law is not laws[0]:
                factor("step", _increment(laws, powers, signs, law, drawn))
            states = [p.advance(s, drawn, t) for (p, _), s in zip(target.factors, carry["states"], strict=True)]
            new = {"states": states}
            if constraint is not None:
                new["automaton"] = constraint.advance(carry["automaton"], drawn)
            if keeps_path:
                new["written"] = carry["written"].at[t].set(drawn)
            if twisted:
                new["psi"] = self._twist(first.running(states[0], new["written"], t + 1))
                factor("twist", new["psi"] - carry["psi"])
            return new, drawn

        ends = type(first).ended is not Process.ended
        until = (lambda carry: first.ended(carry["states"][0])) if ends else None
        carry, path = scan(step, carry, jnp.arange(first.num_steps), until=until)
        value = first.finish(carry["states"][0], path)
        if constraint is not None:
            kept = constraint.accepts(carry["automaton"])
            if target.require_end and ends:
                kept = kept & first.ended(carry["states"][0])
            factor("constraint", jnp.where(kept, 0.0, -jnp.inf))
        if target.tilts:
            total = self._reward(value)
            factor("reward", total - carry["psi"] if twisted else total)
        return value

    def _twist(self, state: Any):
        terms = [(t.twist, power) for t, power in self._tilts() if t.twist is not None]
        return _sum(self.target.process, "twist", terms, state)

    def _reward(self, value: Any):
        return _sum(self.target.process, "reward", [(t.log_reward, power) for t, power in self._tilts()], value)

    def _tilts(self):
        return [(tilt, self.reward_powers[i]) for i, tilt in enumerate(self.target.tilts)]


def _sum(process: Process, site: str, terms: list, value: Any):
    """Add up log-rewards, or twists, times their powers; -inf stays -inf whatever the power."""
    total = jnp.float32(0.0)
    for function, power in terms:
        if isinstance(function, Host):
            log_weight = function(site, process.texts if process.writes_text else None, value)
        else:
            log_weight = jnp.asarray(function(value))
        total = total + jnp.where(log_weight == -jnp.inf, -jnp.inf, power * log_weight)
    return total


def _increment(laws, powers, signs, law, drawn):
    """The weight (2) of one step; -inf where nothing could be drawn."""
    log_drawn = law.log_prob(drawn)
    weighted = weighted_log_prob(laws, powers, signs, drawn)
    possible = (log_drawn > -jnp.inf) & (weighted > -jnp.inf)
    return jnp.where(possible, weighted - jnp.where(possible, log_drawn, 0.0), -jnp.inf)
