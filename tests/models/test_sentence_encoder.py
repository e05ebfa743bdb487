"""The encoder computes what torch computes, whatever the padding; retokenised texts are near what they should be."""

import os
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from safetensors.numpy import load_file, save_file

import ppl
from ppl.inference import ImportanceSampling
from ppl.models import LanguageModel, SentenceEncoder
from ppl.models.language.reading import Reader
from ppl.models.rewards.encoder import EncoderConfig
from tests.ppl.checks import compilations

RECORDED = Path(__file__).resolve().parents[1] / "fixtures" / "rewards" / "minilm.npz"
CACHE = Path(os.environ.get("GENPPL_CACHE") or Path.home() / ".cache" / "genppl")
SENTENCES = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife.",
    "Call me Ishmael.",
    "Some years ago, never mind how long precisely, having little or no money in my purse, I thought I would sail "
    "about a little and see the watery part of the world.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "Happy families are all alike; every unhappy family is unhappy in its own way.",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.",
    "To Sherlock Holmes she is always the woman.",
    "Marley was dead, to begin with.",
    "There was no possibility of taking a walk that day.",
    "You don't know about me without you have read a book by the name of The Adventures of Tom Sawyer.",
    "No one would have believed in the last years of the nineteenth century that this world was being watched keenly.",
    "The Time Traveller, for so it will be convenient to speak of him, was expounding a recondite matter to us.",
    "Squire Trelawney, Dr. Livesey, and the rest of these gentlemen having asked me to write down the whole "
    "particulars about Treasure Island, I take up my pen.",
    "I will hope my reader will not be displeased with the narrative of a voyage to several remote nations.",
    "Mr. Utterson the lawyer was a man of a rugged countenance that was never lighted by a smile.",
    "You will rejoice to hear that no disaster has accompanied the commencement of an enterprise.",
    "I was born in the year 1632, in the city of York, of a good family.",
    "Christmas won't be Christmas without any presents, grumbled Jo, lying on the rug.",
    "Whether I shall turn out to be the hero of my own life, these pages must show.",
    "All children, except one, grow up.",
]
REFERENCES = ["A sailor goes to sea.", "A rich man looks for a wife.", "A child is unhappy at home."]


@pytest.fixture(scope="module")
def folder() -> Path:
    if not (CACHE / "all-MiniLM-L6-v2").is_dir():
        pytest.fail(f"{CACHE / 'all-MiniLM-L6-v2'} is missing: run `python scripts/fetch_minilm.py`.")
    return CACHE / "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def encoder(folder) -> SentenceEncoder:
    return SentenceEncoder.load(folder)


@pytest.fixture(scope="module")
def recorded():
    return np.load(RECORDED)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    path = Path(os.environ.get("GENPPL_SMOLLM2") or CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not path.exists():
        pytest.fail(f"{path} is missing: run `python scripts/fetch_smollm2.py` or set GENPPL_SMOLLM2.")
    return LanguageModel.load(path, dtype=np.float32)


@pytest.fixture(scope="module")
def approximate(encoder, lm):
    return encoder.approximate_retokenizer(lm)


@pytest.fixture(scope="module")
def tokens(lm):
    """The sentences as a language model would have written them: tokens with padding, and lengths."""
    rows = [lm.encode(text) for text in SENTENCES]
    padded = np.full((len(rows), 64), lm.padding_token, np.int32)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded, np.array([len(row) for row in rows], np.int32)


def test_pieces_and_vectors_match_torch(encoder, recorded):
    texts = recorded["texts"].tolist()
    pieces, lengths = encoder.tokenize(texts)
    np.testing.assert_array_equal(lengths, recorded["lengths"])
    np.testing.assert_array_equal(pieces, recorded["tokens"])
    vectors = encoder.encode(texts)
    assert vectors.dtype == np.float32 and vectors.shape == (len(texts), 384)
    np.testing.assert_allclose(vectors, recorded["vectors"], rtol=0, atol=1e-5)


def test_load_without_a_source_reads_the_fetched_folder(folder, recorded):
    text = [str(recorded["texts"][0])]
    np.testing.assert_allclose(SentenceEncoder.load().encode(text), recorded["vectors"][:1], rtol=0, atol=1e-5)


def test_embed_is_the_same_whatever_the_padding_under_jit_and_vmap(encoder, recorded):
    lengths = recorded["lengths"][:4]
    short, long = recorded["tokens"][:4, :24], recorded["tokens"][:4, :64].copy()
    long[np.arange(64) >= lengths[:, None]] = 999  # what is padded does not matter
    vectors = jax.jit(jax.vmap(encoder.embed))(short, lengths)
    np.testing.assert_allclose(vectors, recorded["vectors"][:4], rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder.embed(long[1], lengths[1]), recorded["vectors"][1], rtol=0, atol=1e-5)


def test_weights_are_arguments_of_the_compiled_code_not_constants(encoder):
    lowered = encoder._embed.lower(encoder._weights, jnp.zeros(16, jnp.int32), jnp.int32(3))
    assert len(lowered.as_text()) < 200_000  # 90 MB of weights would be in it


def test_encode_compiles_once_for_a_number_of_texts_and_a_longest_text(encoder):
    encoder.encode(SENTENCES[:5])
    before = encoder._embed_rows._cache_size()
    for texts in (SENTENCES[2:7], SENTENCES[2:8], SENTENCES[2:9]):  # 5, 6 and 7 texts in rows of 64 pieces
        encoder.encode(texts)
    assert encoder._embed_rows._cache_size() == before


def test_similarity_is_the_largest_cosine_over_the_references(encoder):
    near = encoder.similarity(REFERENCES)
    cosines = encoder.encode(SENTENCES[:4]).astype(float) @ encoder.encode(REFERENCES).astype(float).T
    np.testing.assert_allclose(near(SENTENCES[:4]), cosines.max(1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(near(REFERENCES), 1.0, rtol=0, atol=1e-6)
    assert near(["A wealthy bachelor seeks a bride."])[0] > near(["The valve leaks oil."])[0] + 0.3


def test_similarity_runs_inside_a_host_callback_on_cpu(encoder):
    near = encoder.similarity(REFERENCES)
    compiled = jax.jit(
        lambda x: jax.pure_callback(lambda _: near(SENTENCES[:4]), jax.ShapeDtypeStruct((4,), jnp.float32), x @ x)
    )
    np.testing.assert_array_equal(compiled(jnp.ones((64, 64))), near(SENTENCES[:4]))


def test_retokenizer_is_exact_and_calls_the_host_once_for_all(encoder, lm, tokens, monkeypatch):
    padded, lengths = tokens
    calls, read = [], Reader.__call__

    def counted(reader, value):
        calls.append(np.shape(value["tokens"]))
        return read(reader, value)

    monkeypatch.setattr(Reader, "__call__", counted)
    retokenizer = encoder.retokenizer(lm)
    pieces, counts = jax.jit(jax.vmap(retokenizer))(padded, lengths)
    expected, expected_counts = encoder.tokenize(SENTENCES)
    assert calls == [padded.shape]
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_array_equal(pieces[:, : expected.shape[1]], expected)


def test_a_program_with_an_exact_retokenizer_weights_by_the_similarity_and_compiles_once(encoder, lm, tokens):
    near = encoder.retokenizer(lm).similarity(REFERENCES, size=64)

    @ppl.model
    def program(padded, lengths):
        index = ppl.sample("index", dist.Categorical(logits=jnp.zeros(len(SENTENCES))))
        ppl.factor("near", 10.0 * near(padded[index], lengths[index]))
        return index

    posterior = ppl.infer(program(*tokens), ImportanceSampling(16), seed=0)
    scores = encoder.similarity(REFERENCES)(SENTENCES)[np.asarray(posterior.value)]
    expected = 10.0 * scores - np.logaddexp.reduce(10.0 * scores)
    np.testing.assert_allclose(posterior.log_weights, expected, rtol=0, atol=1e-4)
    with compilations() as compiled:
        ppl.infer(program(*tokens), ImportanceSampling(16), seed=1)
    assert len(compiled) == 0


def test_retokenizers_cut_what_does_not_fit_and_keep_the_end_marker(encoder, lm, approximate, tokens):
    whole, _ = encoder.tokenize(SENTENCES[:1])
    for retokenizer in (encoder.retokenizer(lm), approximate):
        pieces, count = retokenizer(tokens[0][0], tokens[1][0], size=10)
        assert count == 10 and pieces[0] == encoder.start_token and pieces[9] == encoder.end_token
        np.testing.assert_array_equal(pieces[:9], whole[0, :9])
        pieces, count = retokenizer(tokens[0][0], 0)
        assert count == 2 and pieces[:3].tolist() == [encoder.start_token, encoder.end_token, 0]


def test_approximate_retokenizer_is_exact_where_words_are_tokens_and_its_error_is_what_is_written(
    encoder, lm, approximate, tokens
):
    padded, lengths = tokens
    pieces, counts = jax.vmap(approximate)(padded, lengths)
    expected, expected_counts = encoder.tokenize(SENTENCES)
    same = [
        counts[i] == expected_counts[i] and np.array_equal(pieces[i, : counts[i]], expected[i, : counts[i]])
        for i in range(len(SENTENCES))
    ]
    # A word that starts with a space is one token of SmolLM2, or is not.
    whole = [
        all(len(lm.encode(" " * (i > 0) + word.strip(".,;"))) == 1 for i, word in enumerate(text.split()))
        for text in SENTENCES
    ]
    assert sum(whole) >= 3 and all(same[i] for i in np.flatnonzero(whole))
    assert counts.max() <= 64
    vectors = np.asarray(jax.vmap(encoder.embed)(pieces[:, :64], counts))
    cosines = np.sum(vectors * encoder.encode(SENTENCES), axis=1)
    errors = np.abs(np.max(vectors @ encoder.encode(REFERENCES).T, axis=1) - encoder.similarity(REFERENCES)(SENTENCES))
    assert sum(same) == 11
    assert 0.92 < cosines.mean() < 0.925 and 0.49 < cosines.min() < 0.5
    assert 0.02 < errors.mean() < 0.025 and 0.12 < errors.max() < 0.125


def test_approximate_retokenizer_goes_on_with_a_word_by_continuation_pieces(encoder, lm, approximate):
    text = "unbelievably"
    cut = lm.encode(text)
    assert len(cut) > 1
    pieces, count = approximate(np.array(cut, np.int32), len(cut))
    shown = [encoder.tokenizer.id_to_token(int(piece)) for piece in pieces[1 : count - 1]]
    assert shown[0].isalpha() and all(piece.startswith("##") for piece in shown[1:])
    assert "".join(piece.removeprefix("##") for piece in shown) == text


@pytest.mark.parametrize("texts", [[], ()])
def test_no_texts_are_refused(encoder, texts):
    with pytest.raises(ValueError, match="`texts` is empty: give at least one string"):
        encoder.encode(texts)
    with pytest.raises(ValueError, match="`references` is empty"):
        encoder.similarity(texts)


def test_what_is_no_list_of_strings_is_refused(encoder):
    with pytest.raises(TypeError, match="`texts` must be a list of strings, got str; give .text. for one text"):
        encoder.encode("one text")
    with pytest.raises(TypeError, match=r"it holds 3 \(int\)"):
        encoder.encode(["a", 3])


def test_tokens_of_a_wrong_shape_are_refused(encoder, lm):
    with pytest.raises(ValueError, match=r"shape \(T,\) with T in \[1, 512\], got \(2, 8\); use jax.vmap"):
        encoder.embed(np.zeros((2, 8), np.int32), 3)
    with pytest.raises(ValueError, match=r"got \(513,\)"):
        encoder.embed(np.zeros(513, np.int32), 3)
    with pytest.raises(ValueError, match=r"`size` must be in \[2, 256\], got 1"):
        encoder.retokenizer(lm)(np.zeros(8, np.int32), 3, size=1)
    with pytest.raises(ValueError, match="`max_pieces` must be at least 1, got 0"):
        encoder.approximate_retokenizer(lm, max_pieces=0)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file_is_named(folder, tmp_path, name):
    for path in folder.iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        SentenceEncoder.load(tmp_path)


def test_missing_cache_says_how_to_fill_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GENPPL_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run `python scripts/fetch_minilm.py`, or give a folder"):
        SentenceEncoder.load()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        SentenceEncoder.load(tmp_path / "nowhere")


def test_other_tensors_are_refused_by_name(folder, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path / name)
    tensors = load_file(folder / "model.safetensors")
    lost = tensors.pop("encoder.layer.3.output.dense.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no tensor `encoder.layer.3.output.dense.bias`"):
        SentenceEncoder.load(tmp_path)
    save_file(tensors | {"encoder.layer.3.output.dense.bias": lost[:5]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has shape \(5,\); its configuration calls for \(384,\)"):
        SentenceEncoder.load(tmp_path)
    save_file(tensors | {"encoder.layer.3.output.dense.bias": lost, "extra": lost}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no use for: `extra`"):
        SentenceEncoder.load(tmp_path)


def test_other_pooling_is_refused(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(ValueError, match="asks for pooling_mode_cls_token; accepted is pooling_mode_mean_tokens"):
        SentenceEncoder.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("model_type", "roberta", "bert"),
        ("position_embedding_type", "relative_key", "absolute"),
        ("hidden_act", "selu", "gelu"),
    ],
)
def test_unknown_architectures_are_refused(key, value, accepted):
    settings = dict(model_type="bert", vocab_size=9, hidden_size=8, num_attention_heads=2) | {key: value}
    with pytest.raises(ValueError, match=f"`{key}` in config.json is '{value}'; accepted .*{accepted}"):
        EncoderConfig.from_hf(settings)


def test_configurations_that_lack_an_entry_or_do_not_divide_are_refused():
    settings = dict(model_type="bert", vocab_size=9, hidden_size=8, num_attention_heads=2)
    with pytest.raises(ValueError, match="no entry `num_hidden_layers`"):
        EncoderConfig.from_hf(settings)
    with pytest.raises(ValueError, match="multiple of `num_attention_heads`, got 8 and 3"):
        EncoderConfig.from_hf(settings | dict(num_attention_heads=3))


def test_rewards_by_similarity_pickle(encoder, approximate, lm):
    close = pickle.loads(pickle.dumps(encoder.similarity(["a stormy night"])))
    np.testing.assert_array_equal(close(["it rained"]), encoder.similarity(["a stormy night"])(["it rained"]))
    tokens = jnp.array([10, 20, 30])
    for retokenizer in (approximate, encoder.retokenizer(lm)):
        one = retokenizer.similarity(["a stormy night"])
        assert float(pickle.loads(pickle.dumps(one))(tokens, 3)) == float(one(tokens, 3))
