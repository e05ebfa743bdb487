"""The tokenizer that a GGUF file describes, as a `transformers` fast tokenizer.

Two kinds of files exist. `tokenizer.ggml.model = gpt2` is byte-level BPE with a list of merges, where
`tokenizer.ggml.pre` names the rules by which text is first cut into words; the rules here are those of the original
tokenizers of the named families. `llama` is SentencePiece BPE with scores: the merges are those pairs of tokens
whose concatenation is a token, best score first, and what no token covers becomes bytes.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

__all__ = ["build_tokenizer"]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The rules that cut a text into words, one after the other, before its bytes are looked at.
_WORD_RULES = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
}

_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2


def build_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """Build the tokenizer of a GGUF file.

    Args:
        metadata: the key-value section, with Python values.

    Returns:
        A `transformers.PreTrainedTokenizerFast` with the special tokens and the chat template.

    Raises:
        ValueError: a tokenizer model or a word rule that is not supported, or a list that is missing.
    """
    from transformers import PreTrainedTokenizerFast  # takes a second to import

    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"unknown tokenizer: `tokenizer.ggml.model` is {kind!r}; accepted are gpt2, llama.")
    tokens = _need(metadata, "tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    tokenizer = _byte_level(metadata, tokens) if kind == "gpt2" else _sentencepiece(metadata, tokens, types)
    added = [
        AddedToken(token, special=token_type == _CONTROL, normalized=False)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)

    def text_of(name: str) -> str | None:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if token is None else tokens[token]

    start = text_of("bos")
    if start is not None and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, tokens.index(start))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=text_of("eos"),
        unk_token=text_of("unknown"),
        pad_token=text_of("padding"),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    return wrapped


def _need(metadata: Mapping[str, Any], name: str) -> Any:
    if metadata.get(f"tokenizer.ggml.{name}") is None:
        raise ValueError(f"the GGUF file has no `tokenizer.ggml.{name}`, which its tokenizer needs.")
    return metadata[f"tokenizer.ggml.{name}"]


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    rule = metadata.get("tokenizer.ggml.pre", "default")
    if rule not in _WORD_RULES:
        raise ValueError(f"unknown word rule: `tokenizer.ggml.pre` is {rule!r}; accepted are {', '.join(_WORD_RULES)}.")
    merges = [tuple(merge.split(" ", 1)) for merge in _need(metadata, "merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a whole word that is a token as it is, without going through the merges.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule == "llama-bpe"))
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _WORD_RULES[rule]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    scores = _need(metadata, "scores")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, index in vocabulary.items():
        if types[index] not in (1, _USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            first, second = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if first is not None and second is not None:
                merges.append((-scores[index], first, second, token[:cut], token[cut:]))
    merges.sort()
    unknown = next((tokens[index] for index, kind in enumerate(types) if kind == _UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(first, second) for *_, first, second in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    space = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
