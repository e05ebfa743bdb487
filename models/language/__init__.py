"""Language models: checkpoints, the network, its states and the next token's law."""

from ppl.models.language.cache import TextState as TextState
from ppl.models.language.config import DecoderConfig as DecoderConfig
from ppl.models.language.decoder import Decoder as Decoder
from ppl.models.language.language_model import LanguageModel as LanguageModel
from ppl.models.language.next_token import NextToken as NextToken

__all__ = ["Decoder", "DecoderConfig", "LanguageModel", "NextToken", "TextState"]
