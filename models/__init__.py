"""Generations written in the language: what is built on networks and gives processes and distributions."""

from ppl.models.language import LanguageModel as LanguageModel
from ppl.models.markov_chain import MarkovChain as MarkovChain
from ppl.models.rewards import RewardModel as RewardModel
from ppl.models.rewards import SentenceEncoder as SentenceEncoder

__all__ = ["LanguageModel", "MarkovChain", "RewardModel", "SentenceEncoder"]
