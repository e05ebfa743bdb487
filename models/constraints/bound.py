"""A constraint on one process, as a target asks for it: what may follow, the state after, whether it is satisfied."""

import dataclasses

from jaxtyping import Array, Bool, Int

from ppl.models.constraints.automaton import Automaton, accepts, advance, allowed

__all__ = ["BoundAutomaton"]


@dataclasses.dataclass(frozen=True, eq=False)
class BoundAutomaton:
    """An automaton over the tokens of a process; its state is one integer a particle."""

    automaton: Automaton

    def start(self) -> Int[Array, ""]:
        """Return the state before the first token."""
        return self.automaton.start

    def allowed(self, state: Int[Array, ""], budget: Int[Array, ""]) -> Bool[Array, " V"]:
        """Return the tokens that may follow, given how many more there is room for after it."""
        return allowed(self.automaton, state, budget)

    def advance(self, state: Int[Array, ""], token: Int[Array, ""]) -> Int[Array, ""]:
        """Return the state after a token."""
        return advance(self.automaton, state, token)

    def accepts(self, state: Int[Array, ""]) -> Bool[Array, ""]:
        """Return whether the text so far satisfies the constraint."""
        return accepts(self.automaton, state)
