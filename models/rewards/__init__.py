"""Rewards for texts: reward models on the decoder of the language models, and nearness of meaning."""

from ppl.models.rewards.retokenizer import ApproximateRetokenizer as ApproximateRetokenizer
from ppl.models.rewards.retokenizer import Retokenizer as Retokenizer
from ppl.models.rewards.reward_model import RewardModel as RewardModel
from ppl.models.rewards.sentence_encoder import SentenceEncoder as SentenceEncoder

__all__ = ["ApproximateRetokenizer", "Retokenizer", "RewardModel", "SentenceEncoder"]
