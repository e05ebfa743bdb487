"""Generations written in the language: what is built on networks and gives processes and distributions."""

from ppl.models.language import LanguageModel as LanguageModel

__all__ = ["LanguageModel"]
