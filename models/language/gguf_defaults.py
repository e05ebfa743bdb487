"""What a GGUF file leaves unsaid, as llama.cpp reads it: word rules, start tokens, and the texts of end tokens.

A byte-level tokenizer's `tokenizer.ggml.pre` names a family. The family decides how a text is cut into words before
its bytes are merged, whether a word that is a token skips the merges, whether a start token is put before a text
where `tokenizer.ggml.add_bos_token` is absent, and the normalisation of characters. And a model may end its turn with
a token that no key names, known by its text alone.

Source: llama.cpp, `src/llama-vocab.cpp` at commit 00ad355e009e83abf98f96a6ded7193b95763681 (`llama_vocab::impl::load`
for names, flags, default tokens and texts). The expressions are those of the families' own `tokenizer.json`; llama.cpp
writes the same ones without classes and flags that its regular expressions lack.
"""

import dataclasses
from collections.abc import Collection, Sequence

__all__ = ["WORD_RULES", "WordRule", "end_of_generation"]

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _SPACES
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
) + _SPACES
_SEED = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
) + _SPACES


@dataclasses.dataclass(frozen=True)
class WordRule:
    """How a family's byte-level tokenizer reads a text.

    Attributes:
        patterns: the expressions that cut a text into words, one after the other.
        add_start: a start token comes before a text where the file does not say.
        whole_words: a word that is a token is taken as it is, without going through the merges.
        nfc: characters are normalised to their composed form first.
    """

    patterns: tuple[str, ...]
    add_start: bool = False
    whole_words: bool = False
    nfc: bool = False


_RULES = (
    (WordRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")), "default"),
    (WordRule((_GPT2,)), "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling"),
    (WordRule((r"\p{N}", _GPT2)), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (
        WordRule((_LLAMA3,), add_start=True, whole_words=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    ),
    (WordRule((_LLAMA3,)), "dbrx smaug-bpe glm4 chatglm-bpe"),
    (WordRule((_QWEN2,), nfc=True), "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez"),
    (WordRule((_QWEN2,)), "stablelm2 hunyuan solar-open grok-2"),
    (WordRule((_QWEN35,), nfc=True), "qwen35"),
    (WordRule((_TEKKEN,), add_start=True, whole_words=True), "tekken"),
    (WordRule((_GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (WordRule((_SEED,)), "seed-coder"),
    (WordRule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")), "falcon"),
    (WordRule((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (WordRule((r"\p{N}{1,3}", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")), whole_words=True), "minicpm5"),
)
WORD_RULES: dict[str, WordRule] = {name: rule for rule, names in _RULES for name in names.split()}

_END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
# Padding, the next repository and the next file, in models that fill in code: there a text is over too.
_FILL_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


def end_of_generation(tokens: Sequence[str], named: dict[str, int], written: Collection[str] = ()) -> list[int]:
    """The tokens that end a generation.

    Args:
        tokens: the texts of all tokens.
        named: tokens that a key of the file names, by the key's role: "eos", "eot", "eom", "fim_pad", ...
        written: texts of tokens that merges make of smaller ones; these are words, and end nothing unless a key names
            them.

    Returns:
        What the keys name first, then what is known by its text, without repeats.
    """
    place = {text: index for index, text in enumerate(tokens) if text not in written}
    ends = [named[role] for role in ("eos", "eot", "eom") if role in named]
    for role, known in _FILL_TEXTS.items():
        found = [named[role]] if role in named else [place[text] for text in known if text in place][:1]
        ends.extend(found)
    here = [text for text in _END_TEXTS if text in place]
    # In these two formats of conversation one of the texts stands within a turn.
    calls = "<|call|>" in here or "<|calls|>" in here
    if "<|end|>" in here and calls and ("<|return|>" in here or "<|flush|>" in here):
        ends = [token for token in ends if token != place["<|end|>"]]
        here.remove("<|end|>")
    if "<|tool_response>" in here and "</s>" in here:
        ends = [token for token in ends if token != place["</s>"]]
        here.remove("</s>")
    return list(dict.fromkeys(ends + [place[text] for text in here]))
