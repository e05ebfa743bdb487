"""Language models: checkpoints, the network, its states and the next token's law."""

import os

# Only tokenizers and chat templates of transformers are used; its advice to install torch is beside the point.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from ppl.models.language.cache import TextState as TextState  # noqa: E402
from ppl.models.language.config import DecoderConfig as DecoderConfig  # noqa: E402
from ppl.models.language.decoder import Decoder as Decoder  # noqa: E402
from ppl.models.language.language_model import LanguageModel as LanguageModel  # noqa: E402
from ppl.models.language.next_token import NextToken as NextToken  # noqa: E402

__all__ = ["Decoder", "DecoderConfig", "LanguageModel", "NextToken", "TextState"]
