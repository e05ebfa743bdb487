"""`SentenceEncoder`: texts as unit vectors, so that texts of like meaning are near each other.

    encoder = SentenceEncoder.load()                         all-MiniLM-L6-v2, once scripts/fetch_minilm.py has run
    encoder.encode(["a cat", "a kitten"])                    float32 [2, 384], on the host
    near = encoder.similarity(["The ship sank."])            texts -> float32 [N], cosines in [-1, 1]

A completion's tokens are another tokenizer's, and become this encoder's pieces exactly only by way of their text. There
are three ways:

    encoder.similarity(texts)                                a function of texts, for `ppl.host`
    encoder.retokenizer(lm).similarity(texts)                a function of tokens: the host cuts, the device embeds
    encoder.approximate_retokenizer(lm).similarity(texts)    a function of tokens, all on the device; not exact

The model is that of Wang et al. 2020 (MiniLM, arXiv 2002.10957), trained for sentences as Reimers and Gurevych 2019
(arXiv 1908.10084) propose; its network is in `encoder.py`.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int
from tokenizers import Tokenizer

from ppl.models.compiled import Compiled
from ppl.models.language.checkpoints import locate, open_safetensors, read_json
from ppl.models.layers import for_device
from ppl.models.rewards.batches import check_texts, in_batches, pad_rows
from ppl.models.rewards.encoder import Encoder, EncoderConfig, build_encoder

if TYPE_CHECKING:
    from ppl.models.language import LanguageModel
    from ppl.models.rewards.retokenizer import ApproximateRetokenizer, Retokenizer

__all__ = ["SentenceEncoder"]

_FETCHED = "all-MiniLM-L6-v2"


class SentenceEncoder(Compiled):
    """A BERT encoder with its tokenizer: mean over the pieces, scaled to length 1.

    Attributes:
        tokenizer: the `tokenizers` tokenizer.
        config: the network's shape.
        width: of a text's vector, E (384 for all-MiniLM-L6-v2).
        max_length: pieces that count, the two markers included; longer texts are cut.
        dtype: of weights and hidden states; vectors are float32.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, *, max_length: int | None = None):
        """Wrap a network and a tokenizer that are at hand; `load` reads them from files.

        Args:
            encoder: the network.
            tokenizer: a tokenizer for the same vocabulary that puts one marker before and one after a text.
            max_length: pieces that count; None takes the network's context.

        Raises:
            ValueError: `max_length` outside of [3, the network's context], or other markers.
        """
        self.config: EncoderConfig = encoder.config
        self.width, context = self.config.hidden_size, self.config.context_length
        self.max_length = context if max_length is None else max_length
        if not 3 <= self.max_length <= context:
            raise ValueError(f"`max_length` must be in [3, {context}], got {max_length}.")
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())  # our own, for its settings are changed
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_length)
        markers = self.tokenizer.encode("").ids
        if len(markers) != 2:
            raise ValueError(f"`tokenizer` must put one marker before and one after a text, got {markers} for ''.")
        self.start_token, self.end_token = markers
        self._graph, self._weights = nnx.split(for_device(encoder))
        self.dtype = encoder.words.dtype
        self._compile()

    def _compile(self) -> None:
        def embed(weights: Any, tokens: Array, length: Array) -> Array:
            return nnx.merge(self._graph, weights)(tokens, length)

        # The weights are arguments: they are not compiled in.
        self._embed = jax.jit(embed)
        self._embed_rows = jax.jit(jax.vmap(embed, in_axes=(None, 0, 0)))

    @classmethod
    def load(cls, source: str | Path | None = None, *, dtype: Any = jnp.float32) -> "SentenceEncoder":
        """Read an encoder from disk or from the hub.

        Args:
            source: a folder with `config.json`, `model.safetensors` and `tokenizer.json`, or a hub id such as
                "sentence-transformers/all-MiniLM-L6-v2". None is the folder that `scripts/fetch_minilm.py` fills.
            dtype: of weights and hidden states.

        Returns:
            The encoder, its weights on JAX's default device.

        Raises:
            FileNotFoundError: no such folder or hub repository, or one of the files is missing.
            ValueError: a file that is damaged, or an architecture, pooling or tensor that is not supported.
        """
        folder = _fetched_folder() if source is None else locate(source)
        if not folder.is_dir():
            raise ValueError(
                f"`source` = {str(source)!r} is a file; accepted are a folder with config.json, model.safetensors and "
                "tokenizer.json, and a hub id."
            )
        config = EncoderConfig.from_hf(read_json(folder, "config.json"), str(folder / "config.json"))
        _check_pooling(folder)
        if not (folder / "tokenizer.json").exists():
            raise FileNotFoundError(f"{folder} has no tokenizer.json; tokenizers are read from that file alone.")
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # what the Rust library raises has no narrower type
            raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}.") from error
        encoder = build_encoder(config, open_safetensors(folder, prefix=""), dtype=dtype)
        name = "sentence_bert_config.json"
        longest = read_json(folder, name).get("max_seq_length") if (folder / name).exists() else None
        return cls(encoder, tokenizer, max_length=min(longest or config.context_length, config.context_length))

    def __repr__(self) -> str:
        c = self.config
        return (
            f"SentenceEncoder({c.num_layers} layers of width {c.hidden_size}, vocabulary {c.vocab_size}, at most "
            f"{self.max_length} pieces, {jnp.dtype(self.dtype).name})"
        )

    def tokenize(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "N S"], Int[np.ndarray, "N"]]:
        """Cut texts into pieces; plain Python, for the host.

        Args:
            texts: N strings; beyond `max_length` pieces they are cut.

        Returns:
            The pieces with their markers, int32, padded to S = 16, 32, 64, ... or `max_length`, and how many are real.

        Raises:
            TypeError: not a list of strings.
            ValueError: an empty list.
        """
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(check_texts(texts))]
        return pad_rows(rows, largest=self.max_length)

    def embed(self, tokens: Int[ArrayLike, "T"], length: Int[ArrayLike, ""]) -> Float[Array, "E"]:
        """Embed one text; pure, for use inside `jit`, `vmap` and programs.

        Args:
            tokens: the text's pieces, the markers included, and padding of any content; T at most the context.
            length: how many of them are real, in [1, T].

        Returns:
            A float32 vector of length 1.

        Raises:
            ValueError: `tokens` is not of rank 1, or longer than the network's context.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 1 or not 1 <= tokens.shape[0] <= self.config.context_length:
            raise ValueError(
                f"`tokens` must have shape (T,) with T in [1, {self.config.context_length}], got {tokens.shape}; "
                "use jax.vmap for many texts."
            )
        return self._embed(self._weights, tokens, jnp.asarray(length, jnp.int32))

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        """Embed texts.

        Args:
            texts: N strings; beyond `max_length` pieces they are cut.

        Returns:
            Their vectors, float32, of length 1 each. N and the number of pieces are rounded up to powers of two, so
            that calls with as many texts compile anew only where a longer one comes.

        Raises:
            TypeError: not a list of strings.
            ValueError: an empty list.
        """
        tokens, lengths = self.tokenize(texts)
        return in_batches(lambda *rows: self._embed_rows(self._weights, *rows), tokens, lengths)

    def similarity(self, references: Sequence[str]) -> Callable[[Sequence[str]], Float[np.ndarray, "N"]]:
        """The nearness to some texts, as a function of texts.

        Args:
            references: one string or more.

        Returns:
            A Python function from N texts to float32 [N]: the largest cosine between a text and a reference, in
            [-1, 1]; as a reward, multiply it by the nats that a cosine of 1 is worth. It runs compiled code, which
            `ppl.host` allows on a CPU; on accelerators, which may not run one program while they wait in another,
            prefer `retokenizer`.

        Raises:
            TypeError: not a list of strings.
            ValueError: an empty list.
        """
        return _Similarity(self, self.encode(check_texts(references, "references")))

    def retokenizer(self, lm: "LanguageModel") -> "Retokenizer":
        """The map from a language model's tokens to this encoder's pieces, exact, by way of the text on the host.

        Args:
            lm: the language model.

        Returns:
            The map; its `similarity` gives a reward as a JAX function of a completion's `tokens` and `length`.
        """
        from ppl.models.rewards.retokenizer import Retokenizer

        return Retokenizer(self, lm)

    def approximate_retokenizer(self, lm: "LanguageModel", *, max_pieces: int = 4) -> "ApproximateRetokenizer":
        """A table from a language model's tokens to this encoder's pieces, for use on the device.

        Args:
            lm: the language model.
            max_pieces: most pieces that a token becomes, K; what is beyond is dropped.

        Returns:
            The map, which is approximate: see `ppl.models.rewards.retokenizer` for where it errs and how much.
        """
        from ppl.models.rewards.retokenizer import ApproximateRetokenizer

        return ApproximateRetokenizer(self, lm, max_pieces=max_pieces)


@dataclasses.dataclass(frozen=True, eq=False)
class _Similarity:
    """The largest cosine between each text and the reference vectors."""

    encoder: SentenceEncoder
    known: Float[np.ndarray, "R E"]

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "N"]:
        return np.max(self.encoder.encode(texts) @ self.known.T, axis=1)


def _fetched_folder() -> Path:
    cache = Path(os.environ.get("GENPPL_CACHE") or Path.home() / ".cache" / "genppl").expanduser()
    if not (cache / _FETCHED).is_dir():
        raise FileNotFoundError(
            f"{cache / _FETCHED} is not there: run `python scripts/fetch_minilm.py`, or give a folder with "
            "config.json, model.safetensors and tokenizer.json, or a hub id."
        )
    return cache / _FETCHED


def _check_pooling(folder: Path) -> None:
    if not (folder / "1_Pooling" / "config.json").exists():
        return
    pooling = read_json(folder / "1_Pooling", "config.json")
    modes = sorted(name for name, on in pooling.items() if name.startswith("pooling_mode") and on is True)
    if modes != ["pooling_mode_mean_tokens"]:
        raise ValueError(
            f"unknown pooling: {folder / '1_Pooling' / 'config.json'} asks for {', '.join(modes) or 'none'}; accepted "
            "is pooling_mode_mean_tokens."
        )
