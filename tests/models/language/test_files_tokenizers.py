"""Tokenizers of files: word rules, start and end tokens, and which tokens are text."""

import itertools
import json
import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ppl.models import JsonSchema
from ppl.models.constraints.vocabulary import Vocabulary
from ppl.models.language import LanguageModel
from ppl.models.language.gguf_defaults import WORD_RULES, end_of_generation
from ppl.models.language.gguf_tokenizer import build_tokenizer, end_tokens_of

from .gguf_writer import copy_folder

TEXTS = (
    "It's 1234567 o'clock!!\n  I'LL be there, naïve Ünïcödé",
    " spaces   and\ttabs\r\n\r\n  a/b//c\n/d  ",
    "日本語のテキスト 中文字符 한국어 ไทย हिन्दी",
    "def f(x):\n    return x**2  # ½ ² ٣",
    "e\u0301 vs é, mixedCase HTTPServer don't DON'T we're",
    "👩‍👧 emoji 🎉🎉 <tag attr='v'/> $5.00 (50%) [x] {y}",
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def bpe(cuts, size=600, nfc=False):
    """A tokenizer of the library's own, trained on the texts: what a family's tokenizer.json would be."""
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in cuts]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def metadata_of(tokenizer, pre, *, special=(), **changes):
    """The same tokenizer as the metadata of a GGUF file, special tokens behind the others."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), *special]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(model["vocab"]) + [3] * len(special),
        "tokenizer.ggml.merges": merges,
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-v3"])
def test_gguf_tokenizers_encode_as_the_tokenizers_library_does(pre):
    rule = WORD_RULES[pre]
    original = bpe(rule.patterns, nfc=rule.nfc)
    built = build_tokenizer(metadata_of(original, pre))
    pieces = list(itertools.chain.from_iterable(text.split(" ") for text in TEXTS))
    rng = random.Random(0)
    texts = [*TEXTS, *(rng.choice([" ", "", "\n"]).join(rng.choices(pieces, k=8)) for _ in range(50))]
    for text in texts:
        tokens = original.encode(text).ids
        assert built.encode(text, add_special_tokens=False) == tokens, text
        assert built.decode(tokens) == (normalizers.NFC().normalize_str(text) if rule.nfc else text)


# Families by the way that they cut "HelloWORLD's 12345 a/\n\n  e\u0301x", in the bytes' names.
CUTS = {
    "llama-v3": ["HelloWORLD", "'s", "Ġ", "123", "45", "Ġa", "/ĊĊ", "Ġ", "Ġe", "Ìģx"],
    "dbrx": ["HelloWORLD", "'s", "Ġ", "123", "45", "Ġa", "/ĊĊ", "Ġ", "Ġe", "Ìģx"],
    "deepseek-r1-qwen": ["HelloWORLD", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġa", "/ĊĊ", "Ġ", "ĠÃ©x"],
    "stablelm2": ["HelloWORLD", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġa", "/ĊĊ", "Ġ", "Ġe", "Ìģx"],
    "qwen35": ["HelloWORLD", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġa", "/ĊĊ", "Ġ", "ĠÃ©x"],
    "tekken": ["Hello", "WORLD", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġa", "/ĊĊ", "Ġ", "ĠeÌģx"],
    "gpt-4o": ["Hello", "WORLD's", "Ġ", "123", "45", "Ġa", "/ĊĊ", "Ġ", "ĠeÌģx"],
    "starcoder": ["HelloWORLD", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġa", "/", "ĊĊĠ", "Ġe", "Ìģ", "x"],
    "falcon": ["HelloWORLD", "'", "s", "Ġ", "123", "45", "Ġa", "/", "ĊĊĠ", "Ġe", "Ìģ", "x"],
    "seed-coder": ["HelloWORLD", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġa", "/", "ĊĊ", "Ġ", "Ġe", "Ìģx"],
}


@pytest.mark.parametrize("rule", CUTS)
def test_families_cut_words_in_their_own_ways(rule):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.merges": [],
    }
    backend = build_tokenizer(metadata).backend_tokenizer
    text = "HelloWORLD's 12345 a/\n\n  e\u0301x"
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == CUTS[rule]


def test_start_token_follows_the_family_where_the_file_does_not_say():
    original = bpe((GPT2,), size=260)
    # llama.cpp's defaults: Llama 3's and Mistral's families put a start token before a text, the others do not.
    with_start = {
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken",
    }  # fmt: skip
    assert {name for name, rule in WORD_RULES.items() if rule.add_start} == with_start
    for pre in ("llama-bpe", "llama-v3", "tekken", "gpt-2", "qwen2", "dbrx"):
        for said, expected in ((None, pre in with_start), (True, True), (False, False)):
            changes = {} if said is None else dict(add_bos_token=said)
            metadata = metadata_of(
                original, pre, special=("<s>", "</s>"), bos_token_id=260, eos_token_id=261, **changes
            )
            plain = build_tokenizer(metadata).encode("a", add_special_tokens=False)
            assert build_tokenizer(metadata).encode("a") == [260] * expected + plain, (pre, said)


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "[EOS]",
     "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|return|>", "<end_of_utterance>", "<|fim_pad|>", "<|file_sep|>"],
)  # fmt: skip
def test_end_tokens_that_are_known_by_their_text_end_a_text(text):
    special = ("<other>", "<s>", text)
    metadata = metadata_of(bpe((GPT2,), size=260), "gpt-2", special=special, eos_token_id=261)
    assert end_tokens_of(metadata) == (261, 262)
    metadata["tokenizer.ggml.token_type"][262] = 1  # whatever its type: merges cannot write it
    assert end_tokens_of(metadata) == (261, 262)
    assert build_tokenizer(metadata).encode(f"a{text}")[-1] == 262


def test_end_tokens_follow_the_keys_and_two_formats_keep_a_token_within_the_turn():
    assert end_of_generation(["a", "<x>", "<y>", "</s>"], {"eos": 1, "eot": 2, "eom": 1}) == [1, 2, 3]
    assert end_of_generation(["<|end|>", "<|return|>", "<|call|>"], {}) == [1, 2]
    assert end_of_generation(["<|end|>", "<|call|>"], {}) == [0, 1]
    assert end_of_generation(["</s>", "<|tool_response>"], {"eos": 0}) == [1]
    assert end_of_generation(["<PAD>", "[PAD]"], {}) == [0] and end_of_generation(["<PAD>", "x"], {"fim_pad": 1}) == [1]
    # A word that merges write is a word.
    assert end_of_generation(["<EOT>", "</s>"], {}, {"</s>"}) == [0]


def test_sentencepiece_files_have_the_tokens_of_llama_where_they_name_none():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1, 1],
        "tokenizer.ggml.scores": [0.0] * len(tokens),
    }
    assert build_tokenizer(metadata).encode("a") == [1, 259, 260]
    assert end_tokens_of(metadata) == (2,)
    assert build_tokenizer(metadata | {"tokenizer.ggml.add_eos_token": True}).encode("a") == [1, 259, 260, 2]


def test_chat_templates_of_several_names_are_kept_apart():
    metadata = metadata_of(bpe((GPT2,), size=260), "gpt-2") | {"tokenizer.chat_template": "plain"}
    assert build_tokenizer(metadata).chat_template == "plain"
    named = build_tokenizer(metadata | {"tokenizer.chat_template.tool_use": "tools"})
    assert named.get_chat_template() == "plain" and named.get_chat_template(tools=[{}]) == "tools"
    with pytest.raises(ValueError, match="`tokenizer.chat_template` in x.gguf must be a string, got 3"):
        build_tokenizer(metadata | {"tokenizer.chat_template": 3}, "x.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pre="kimi-k2"), "`tokenizer.ggml.pre` is 'kimi-k2'; accepted are default, gpt-2.*tokenizer.json"),
        (dict(pre=7), "`tokenizer.ggml.pre` in x.gguf must be a string, got 7"),
        (dict(model="bert"), "`tokenizer.ggml.model` is 'bert'; accepted are gpt2, llama"),
        (dict(tokens="abc"), "`tokenizer.ggml.tokens` in x.gguf must be a list of str, got 'abc'"),
        (dict(tokens=[]), "`tokenizer.ggml.tokens` in x.gguf must be a list of at least one token"),
        (dict(tokens=["a", "b", "a"]), "`tokenizer.ggml.tokens` in x.gguf has the token 'a' twice"),
        (dict(merges=["ab"]), "`tokenizer.ggml.merges` in x.gguf must hold pairs of tokens .* got 'ab'"),
        (dict(merges=["a nothing"]), "`tokenizer.ggml.merges` in x.gguf has 'a nothing', and 'nothing' is no token"),
        (dict(merges=["a b"]), "has 'a b', and 'ab' is no token"),
        (dict(token_type=[1]), "`tokenizer.ggml.token_type` in x.gguf must be a list of int, one for each of the 3"),
        (dict(bos_token_id=3), r"`tokenizer.ggml.bos_token_id` in x.gguf must be tokens in \[0, 3\), got 3"),
        (dict(eos_token_id="2"), r"`tokenizer.ggml.eos_token_id` in x.gguf must be tokens in \[0, 3\), got '2'"),
        (dict(add_bos_token="no", bos_token_id=0), "`tokenizer.ggml.add_bos_token` in x.gguf must be true or false"),
        (dict(model="llama", scores=[0.0]), "`tokenizer.ggml.scores` in x.gguf must be a list of float, one for"),
    ],
)  # fmt: skip
def test_tokenizers_that_cannot_be_are_refused_by_key(changes, message):
    metadata = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "c"], "merges": []} | changes
    with pytest.raises(ValueError, match=message):
        build_tokenizer({f"tokenizer.ggml.{name}": value for name, value in metadata.items()}, "x.gguf")


def byte_tokenizer(**roles):
    """128 tokens, bytes and three special ones, with roles that may be any of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:124]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet, "he"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


@pytest.mark.parametrize("role", ["bos_token", "pad_token", "unk_token", "cls_token"])
@pytest.mark.parametrize("text", [",", "1", "he"])
def test_a_token_with_a_role_is_text_where_the_tokenizer_writes_it(role, text):
    tokenizer = byte_tokenizer(eos_token="</s>", **{role: text})
    vocabulary = Vocabulary.from_tokenizer(tokenizer, end_tokens=(2,))
    assert vocabulary.tokens[tokenizer.convert_tokens_to_ids(text)] == text.encode()
    assert vocabulary.tokens[:3] == (None, None, None)  # special, with a role or without


def test_a_constraint_can_be_met_with_a_comma_that_starts_documents(tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder("llama_tied"), tmp_path / "copy")
    byte_tokenizer(eos_token="</s>", bos_token=",", pad_token="1").save_pretrained(folder)
    lm = LanguageModel.load(folder)
    schema = JsonSchema({"const": [1, 2]})
    bound = lm.complete("a", max_tokens=8).bind(schema, False)
    assert bound is not None
    tokens = lm.encode("[1,2]")
    assert lm.byte_vocabulary.text(tokens) == b"[1,2]" and lm.decode(tokens) == "[1,2]"
    assert lm.encode(",", start=True) == lm.encode(",")


def test_gguf_roles_of_ordinary_type_stay_text():
    original = bpe((GPT2,), size=260)
    comma = original.token_to_id(",")
    metadata = metadata_of(
        original, "gpt-2", special=("</s>",), bos_token_id=comma, padding_token_id=comma, eos_token_id=260
    )
    built = build_tokenizer(metadata)
    assert built.bos_token is None and built.pad_token is None and built.eos_token == "</s>"
    assert built.encode("1,,2") == original.encode("1,,2").ids
    assert Vocabulary.from_tokenizer(built, end_tokens=(260,)).tokens[comma] == b","
    started = build_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": True})
    assert started.encode("1,2") == [comma, *original.encode("1,2").ids]


def test_a_prompt_never_ends_in_what_a_tokenizer_puts_after_a_document(tiny, byte_tokenizer):
    from tokenizers import processors

    decoder = tiny("llama_tied").decoder
    for single, before in (("<s> $A </s>", [1]), ("$A </s>", []), ("<s> <s> $A </s> </s>", [1, 1]), ("</s> $A", [2])):
        backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        lm = LanguageModel(
            decoder, PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
        )
        assert lm.encode("hello", start=True) == before + lm.encode("hello")
        assert lm.complete("hello", max_tokens=2).prompt == (*before, *lm.encode("hello"))
        assert lm.encode("", start=True) == before
        assert lm.encode("<s>hello</s>", start=True) == before + [1, *lm.encode("hello"), 2]  # what is written stays


def test_a_folder_with_code_of_its_own_is_refused_without_a_question(tiny_folder, tmp_path, monkeypatch):
    folder = copy_folder(tiny_folder("llama_tied"), tmp_path / "copy")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    ran = tmp_path / "ran"
    (folder / "tokenization_own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    own = dict(tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    path.write_text(json.dumps(settings | own))
    with pytest.raises(ValueError, match=r"tokenizer_config.json names code of its own .`auto_map` = .*never run"):
        LanguageModel.load(folder)
    config = json.loads((folder / "config.json").read_text())
    path.write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config | dict(auto_map={"AutoConfig": "tokenization_own.Own"})))
    LanguageModel.load(folder)  # the network is known, and its code is not needed
    assert not ran.exists()


def test_damaged_tokenizers_are_refused_by_folder(tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder("llama_tied"), tmp_path / "copy")
    whole = (folder / "tokenizer.json").read_text()
    for content in (whole[:200], "{}", "[]", json.dumps(json.loads(whole) | {"model": {"type": "Other"}})):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="the tokenizer in .*copy cannot be read"):
            LanguageModel.load(folder)
    model = json.loads(whole)["model"] | {"unk_token": "nowhere"}
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(whole) | {"model": model}))
    with pytest.raises(ValueError, match="copy cannot be read: ValueError: its unknown token 'nowhere' is not"):
        LanguageModel.load(folder)
    (folder / "tokenizer.json").write_text(whole)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": "long"}))
    with pytest.raises(ValueError, match="copy cannot be read: TypeError"):
        LanguageModel.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        LanguageModel.load(folder)


def test_a_tokenizer_with_more_text_than_the_network_has_rows_is_refused(tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder("llama_tied"), tmp_path / "copy")
    tokenizer = byte_tokenizer(eos_token="</s>")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    lm = LanguageModel.load(folder)  # padding that the network never reads
    with pytest.raises(ValueError, match=r"tokens outside of \[0, 128\): \[128\]"):
        lm.complete("a<pad>", max_tokens=2)
    tokenizer.add_tokens(["hello"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"tokenizer of 130 tokens and a vocabulary .* of 128: .* token 129, 'hello'"):
        LanguageModel.load(folder)
