"""Constraints on texts, compiled into automata over a token vocabulary that are kept on the device."""

from ppl.models.constraints.automaton import Automaton as Automaton
from ppl.models.constraints.automaton import accepts as accepts
from ppl.models.constraints.automaton import advance as advance
from ppl.models.constraints.automaton import allowed as allowed
from ppl.models.constraints.automaton import check_reachable as check_reachable
from ppl.models.constraints.grammar import Grammar as Grammar
from ppl.models.constraints.json_schema import JsonSchema as JsonSchema
from ppl.models.constraints.regular import Choice as Choice
from ppl.models.constraints.regular import Constraint as Constraint
from ppl.models.constraints.regular import Regex as Regex
from ppl.models.constraints.vocabulary import Vocabulary as Vocabulary

__all__ = [
    "Automaton",
    "Choice",
    "Constraint",
    "Grammar",
    "JsonSchema",
    "Regex",
    "Vocabulary",
    "accepts",
    "advance",
    "allowed",
    "check_reachable",
]
