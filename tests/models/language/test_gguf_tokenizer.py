"""Tokenizers built from GGUF metadata."""

import pytest

from ppl.models.language.gguf_tokenizer import build_tokenizer

ALPHABET = "▁abcdehlorwé"


def sentencepiece(**changes):
    pieces = ["he", "▁he", "ll", "llo", "▁hello", "ld", "▁w"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *ALPHABET]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(ALPHABET))
    scores = [0.0] * 259 + [-float(i + 1) for i in range(len(pieces) + len(ALPHABET))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def test_sentencepiece_takes_the_best_score_first():
    tokenizer = build_tokenizer(sentencepiece())
    assert tokenizer.tokenize("hello world") == ["▁hello", "▁w", "o", "r", "ld"]
    assert tokenizer.encode("hello") == [1, *tokenizer.convert_tokens_to_ids(["▁hello"])]
    assert tokenizer.encode("hello", add_special_tokens=False) == tokenizer.convert_tokens_to_ids(["▁hello"])


def test_sentencepiece_falls_back_to_bytes_and_decodes_them():
    tokenizer = build_tokenizer(sentencepiece())
    tokens = tokenizer.encode("é日", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(tokens) == ["▁", "é", "<0xE6>", "<0x97>", "<0xA5>"]
    assert tokenizer.decode(tokens) == "é日"


def test_start_token_is_added_where_the_file_says_so():
    assert build_tokenizer(sentencepiece(**{"tokenizer.ggml.add_bos_token": False})).encode("he")[0] != 1
    assert build_tokenizer(sentencepiece()).encode("he")[0] == 1


def test_unknown_tokenizers_and_missing_lists_are_refused_by_name():
    with pytest.raises(ValueError, match="`tokenizer.ggml.model` is 't5'; accepted are gpt2, llama"):
        build_tokenizer(sentencepiece(**{"tokenizer.ggml.model": "t5"}))
    with pytest.raises(ValueError, match="no `tokenizer.ggml.scores`"):
        build_tokenizer(sentencepiece(**{"tokenizer.ggml.scores": None}))
    with pytest.raises(ValueError, match="no `tokenizer.ggml.merges`"):
        build_tokenizer(sentencepiece(**{"tokenizer.ggml.model": "gpt2"}))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("gpt-2", ["it", "'s", "Ġ1234", "!!", "ĊĠ", "ĠX"]),
        ("smollm", ["it", "'s", "Ġ", "1", "2", "3", "4", "!!", "ĊĠ", "ĠX"]),
        ("llama-bpe", ["it", "'s", "Ġ", "123", "4", "!!Ċ", "Ġ", "ĠX"]),
        ("qwen2", ["it", "'s", "Ġ", "1", "2", "3", "4", "!!Ċ", "Ġ", "ĠX"]),
        ("default", ["it", "'", "s", "Ġ", "123", "4", "!!", "ĊĠ", "ĠX"]),
    ],
)
def test_word_rules_cut_where_their_families_do(rule, words):
    tokens = ["<s>", "a", "b"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [],
    }
    backend = build_tokenizer(metadata).backend_tokenizer
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("it's 1234!!\n  X")] == words
