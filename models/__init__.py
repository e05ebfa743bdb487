"""Generations written in the language: what is built on networks and gives processes and distributions."""

from ppl.models.constraints import Choice as Choice
from ppl.models.constraints import Grammar as Grammar
from ppl.models.constraints import JsonSchema as JsonSchema
from ppl.models.constraints import Regex as Regex
from ppl.models.language import LanguageModel as LanguageModel
from ppl.models.markov_chain import MarkovChain as MarkovChain
from ppl.models.rewards import RewardModel as RewardModel
from ppl.models.rewards import SentenceEncoder as SentenceEncoder

__all__ = [
    "Choice",
    "Grammar",
    "JsonSchema",
    "LanguageModel",
    "MarkovChain",
    "Regex",
    "RewardModel",
    "SentenceEncoder",
]
