"""The tokenizer that a GGUF file describes, as a `transformers` fast tokenizer.

Two kinds of files exist. `tokenizer.ggml.model = gpt2` is byte-level BPE with a list of merges, where
`tokenizer.ggml.pre` names the rules by which text is first cut into words: `gguf_defaults` has them. `llama` is
SentencePiece BPE with scores: the merges are those pairs of tokens whose concatenation is a token, best score first,
and what no token covers becomes bytes.

Which tokens are special is told by their types, not by their roles: a start, end, padding or unknown token of ordinary
type stays text that is cut and written like any other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ppl.models.language.gguf_defaults import WORD_RULES, end_of_generation
from ppl.models.language.settings import Settings

__all__ = ["build_tokenizer", "end_tokens_of"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
# The tokens of SentencePiece models whose files do not name them; as llama.cpp has them.
_SENTENCEPIECE_ROLES = {"bos": 1, "eos": 2, "unknown": 0}


def build_tokenizer(metadata: Mapping[str, Any], source: str = "the GGUF file") -> Any:
    """Build the tokenizer of a GGUF file.

    Args:
        metadata: the key-value section, with Python values.
        source: what to call the file in messages.

    Returns:
        A `transformers.PreTrainedTokenizerFast` with the special tokens and the chat template.

    Raises:
        ValueError: a tokenizer model or a word rule that is not supported, or a list or number that is missing or
            cannot be.
    """
    from transformers import PreTrainedTokenizerFast  # takes a second to import

    file = _settings(metadata, source)
    kind = _kind(file)
    tokens = _tokens(file)
    roles = _roles(file, kind, tokens)
    types = _listed(file, "token_type", int, len(tokens)) or [_NORMAL] * len(tokens)
    tokenizer = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens, types)
    # What is known to end a text is special, whatever type the file gives it.
    special = set(_known_ends(file, kind, tokens, {})) | {token for token, t in enumerate(types) if t == _CONTROL}
    tokenizer.add_tokens(
        [
            AddedToken(text, special=token in special, normalized=False)
            for token, text in enumerate(tokens)
            if token in special or types[token] == _USER_DEFINED
        ]
    )
    default = kind == "llama" or WORD_RULES[file.text("pre", "default")].add_start
    before = [roles["bos"]] if "bos" in roles and file.flag("add_bos_token", default) else []
    after = [roles["eos"]] if "eos" in roles and file.flag("add_eos_token", False) else []
    if before or after:
        named = [("before", before), ("after", after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*["before"] * len(before), "$A", *["after"] * len(after)],
            pair=[*["before"] * len(before), "$A", "$B", *["after"] * len(after)],
            special_tokens=[{"id": name, "ids": ids, "tokens": [tokens[ids[0]]]} for name, ids in named if ids],
        )
    special |= {token for token, t in enumerate(types) if t == _UNKNOWN}
    names = {f"{name}_token": tokens[roles[role]] for role, name in _ROLES.items() if roles.get(role) in special}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    wrapped.chat_template = _chat_template(metadata, source)
    return wrapped


def end_tokens_of(metadata: Mapping[str, Any], source: str = "the GGUF file") -> tuple[int, ...]:
    """The tokens that end a text: those that the file names, and those known by their texts.

    Args:
        metadata: the key-value section, with Python values.
        source: what to call the file in messages.

    Returns:
        The tokens, the one of `eos_token_id` first.
    """
    file = _settings(metadata, source)
    kind = _kind(file)
    tokens = _tokens(file)
    return tuple(_known_ends(file, kind, tokens, _roles(file, kind, tokens)))


def _known_ends(file: Settings, kind: str, tokens: list[str], roles: dict[str, int]) -> list[int]:
    merged = {first + second for first, second in _merges(file)} if kind == "gpt2" else set()
    return end_of_generation(tokens, roles, merged)


def _settings(metadata: Mapping[str, Any], source: str) -> Settings:
    return Settings(metadata, source, "tokenizer.ggml.")


def _kind(file: Settings) -> str:
    kind = file.values.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"unknown tokenizer: `tokenizer.ggml.model` is {kind!r}; accepted are gpt2, llama ({file.source})."
        )
    rule = file.text("pre", "default")
    if kind == "gpt2" and rule not in WORD_RULES:
        raise ValueError(
            f"unknown word rule: `tokenizer.ggml.pre` is {rule!r}; accepted are {', '.join(WORD_RULES)} "
            f"({file.source}). A folder with the model's tokenizer.json and safetensors can be read instead."
        )
    return kind


def _listed(file: Settings, name: str, kind: type, length: int | None = None) -> list[Any] | None:
    """A list of one type, of a length; None where the file has none."""
    values = file.values.get(f"tokenizer.ggml.{name}")
    if values is None:
        return None
    accepted = f"a list of {kind.__name__}" + ("" if length is None else f", one for each of the {length} tokens")
    numbers = (int, float) if kind is float else kind
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, numbers) for v in values):
        raise file.wrong(name, accepted)
    if length is not None and len(values) != length:
        raise ValueError(f"`tokenizer.ggml.{name}` in {file.source} must be {accepted}; got {len(values)}.")
    return list(values)


def _need(file: Settings, name: str, kind: type, length: int | None = None) -> list[Any]:
    values = _listed(file, name, kind, length)
    if values is None:
        raise ValueError(f"{file.source} has no `tokenizer.ggml.{name}`, which its tokenizer needs.")
    return values


def _tokens(file: Settings) -> list[str]:
    tokens = [text or f"[EMPTY_{token}]" for token, text in enumerate(_need(file, "tokens", str))]
    if not tokens:
        raise file.wrong("tokens", "a list of at least one token")
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(text for text in tokens if text in seen or seen.add(text))
        raise ValueError(f"`tokenizer.ggml.tokens` in {file.source} has the token {twice!r} twice.")
    return tokens


def _roles(file: Settings, kind: str, tokens: Sequence[str]) -> dict[str, int]:
    """The tokens that have a role, by its name in the file's keys; special or not."""
    names = (*_ROLES, "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    default = _SENTENCEPIECE_ROLES if kind == "llama" else {}
    roles = {}
    for role in names:
        given = file.values.get(f"tokenizer.ggml.{role}_token_id", 0)
        if role in ("padding", "unknown") and given not in range(len(tokens)):
            continue  # nothing here depends on them
        found = file.tokens(f"{role}_token_id", len(tokens))
        if not found and default.get(role, len(tokens)) < len(tokens):
            found = (default[role],)
        if found:
            roles[role] = found[0]
    return roles


def _merges(file: Settings) -> list[tuple[str, str]]:
    merges = []
    for merge in _need(file, "merges", str):
        cut = merge.find(" ", 1)
        if cut < 0 or cut + 1 == len(merge):
            raise ValueError(
                f"`tokenizer.ggml.merges` in {file.source} must hold pairs of tokens with a space between, got "
                f"{merge!r}."
            )
        merges.append((merge[:cut], merge[cut + 1 :]))
    return merges


def _byte_level(file: Settings, tokens: list[str]) -> Tokenizer:
    rule = WORD_RULES[file.text("pre", "default")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges(file)
    for pair in merges:
        unknown = next((text for text in (*pair, "".join(pair)) if text not in vocabulary), None)
        if unknown is not None:
            raise ValueError(
                f"`tokenizer.ggml.merges` in {file.source} has {' '.join(pair)!r}, and {unknown!r} is no token."
            )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: Settings, tokens: list[str], types: list[int]) -> Tokenizer:
    scores = _need(file, "scores", float, len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, index in vocabulary.items():
        if types[index] not in (_NORMAL, _USER_DEFINED):
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
    prefix = file.flag("add_space_prefix", True)
    space = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _chat_template(metadata: Mapping[str, Any], source: str) -> Any:
    """The chat template, or those of several names."""
    file = Settings(metadata, source, "tokenizer.")
    default = file.text("chat_template", None)
    others = {
        key.removeprefix("tokenizer.chat_template."): file.text(key.removeprefix("tokenizer."))
        for key in metadata
        if key.startswith("tokenizer.chat_template.")
    }
    return ({"default": default} if default is not None else {}) | others if others else default
