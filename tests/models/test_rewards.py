"""Reward models give torch's values, for whole texts and for steps, and say what they cannot read."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppl.models import RewardModel
from ppl.models.rewards.reward_model import ScoreHead

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "rewards"
WHOLE = ("llama", "qwen2", "qwen3", "two_layers")
# Values of the tiny networks have a standard deviation near 1; float32 sums in another order differ by 1e-6.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """128 tokens: three special ones and 125 bytes, without merges; token 7 is "%"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:125]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A function from a fixture's name to a folder with network and tokenizer."""
    root = tmp_path_factory.mktemp("rewards")
    for name in (*WHOLE, "process"):
        shutil.copytree(FIXTURES / name, root / name)
        tokenizer.save_pretrained(root / name)
    return lambda name: root / name


@pytest.fixture(scope="module")
def load(folder):
    """A function from a fixture's name to the model, each read once."""
    known = {}

    def load(name: str) -> RewardModel:
        if name not in known:
            separator = "%" if name == "process" else None
            known[name] = RewardModel.load(folder(name), dtype=np.float32, separator=separator)
        return known[name]

    return load


def recorded(name: str):
    return np.load(FIXTURES / name / "expected.npz")


def edited(source: Path, target: Path, **settings) -> Path:
    """A copy of a folder with other entries in config.json."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return target


@pytest.mark.parametrize("name", WHOLE)
def test_reward_matches_torch_whatever_the_padding(load, name):
    model, record = load(name), recorded(name)
    tokens, lengths = record["tokens"], record["lengths"]
    reward = jax.jit(jax.vmap(model.reward))
    rewards = reward(tokens, lengths)
    assert rewards.dtype == jnp.float32 and np.std(record["values"]) > 0.1
    np.testing.assert_allclose(rewards, record["values"], **TOLERANCE)
    other = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 99)
    np.testing.assert_allclose(reward(other, lengths), record["values"], **TOLERANCE)
    n = int(lengths[1])
    np.testing.assert_allclose(model.reward(tokens[1, :n], n), record["values"][1], **TOLERANCE)


def test_step_rewards_match_torch_at_the_separators(load):
    model, record = load("process"), recorded("process")
    tokens, lengths = record["tokens"], record["lengths"]
    values, ends = jax.jit(jax.vmap(model.step_rewards))(tokens, lengths)
    expected = (tokens == int(record["separator"])) & (np.arange(tokens.shape[1]) < lengths[:, None])
    assert expected.sum(1).tolist() == [0, 1, 4, 8]
    np.testing.assert_array_equal(ends, expected)
    np.testing.assert_allclose(values, np.where(expected, record["values"], 0.0), **TOLERANCE)


@pytest.mark.parametrize(
    ("aggregation", "combine"),
    [("product", np.prod), ("min", np.min), ("mean", np.mean), ("last", lambda values: values[-1])],
)
def test_reward_of_a_process_model_combines_its_steps(folder, aggregation, combine):
    model = RewardModel.load(folder("process"), dtype=np.float32, separator=7, aggregation=aggregation)
    record = recorded("process")
    for tokens, length, values in zip(record["tokens"], record["lengths"], record["values"], strict=True):
        steps = values[:length][tokens[:length] == 7]
        expected = combine(steps) if steps.size else 1.0
        np.testing.assert_allclose(model.reward(tokens, length), expected, **TOLERANCE)


def test_score_texts_gives_what_reward_gives_for_each_text(load):
    texts = ["one", "a longer text, of more tokens than sixteen", "c" * 128]
    for name in ("llama", "process"):
        model = load(name)
        scores = model.score_texts([*texts, "1 + 1 = 2%"])
        assert scores.shape == (4,) and scores.dtype == np.float32
        for text, score in zip(texts, scores, strict=False):
            tokens = model.tokenizer.encode(text)
            padded = np.pad(tokens, (0, 128 - len(tokens)))
            np.testing.assert_allclose(model.reward(padded, len(tokens)), score, **TOLERANCE)
    assert 0 < scores[3] < 1 and scores[0] == 1


def test_score_texts_compiles_once_for_a_number_of_texts(load):
    model = load("qwen2")
    model.score_texts(["abc"] * 5)
    before = model._reward_rows._cache_size()
    for texts in (["a"] * 6, ["another one"] * 7, ["x", "y" * 16] * 4):
        model.score_texts(texts)
    assert model._reward_rows._cache_size() == before


def test_many_texts_go_in_several_batches(load, monkeypatch):
    model, texts = load("qwen3"), [f"text {i}" for i in range(11)]
    expected = model.score_texts(texts)
    monkeypatch.setattr("ppl.models.rewards.batches._TOKENS_AT_ONCE", 64)  # four rows of 16
    np.testing.assert_allclose(model.score_texts(texts), expected, **TOLERANCE)


def test_rewards_are_differentiable_and_weights_are_no_constants(load):
    model = load("llama")
    lowered = model._reward.lower(model._weights, jnp.zeros(16, jnp.int32), jnp.int32(3))
    assert max(len(line) for line in lowered.as_text().splitlines()) < 20_000
    shapes = {leaf.shape for leaf in jax.tree.leaves(lowered.args_info[0][0])}
    assert {(32, 128), (32, 1)} <= shapes  # the embedding table and the head

    def scaled(scale):
        return model._reward(jax.tree.map(lambda leaf: leaf * scale, model._weights), jnp.arange(8), jnp.int32(8))

    assert np.isfinite(jax.grad(scaled)(1.0))


def test_an_empty_text_has_no_reward_under_jit(load):
    assert np.isnan(jax.jit(load("llama").reward)(np.zeros(8, np.int32), 0))
    values, ends = load("process").step_rewards(np.full(8, 7), 0)
    assert not ends.any() and not values.any()


def test_bfloat16_is_close_to_float32_and_rewards_stay_float32(folder, load):
    record = recorded("qwen2")
    model = RewardModel.load(folder("qwen2"), dtype=jnp.bfloat16)
    rewards = jax.vmap(model.reward)(record["tokens"], record["lengths"])
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, record["values"], atol=0.05 * np.abs(record["values"]).max())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(architectures=["LlamaForCausalLM"]),
            r"`architectures` in config.json is \['LlamaForCausalLM'\]; accepted .*Qwen2ForProcessRewardModel",
        ),
        (dict(architectures=None), r"is \[\]; accepted for a reward model: LlamaForSequenceClassification"),
        (dict(model_type="qwen3"), "is 'qwen3'; accepted for LlamaForSequenceClassification is 'llama'"),
        (dict(id2label={"0": "a", "1": "b", "2": "c"}), "classifier of 3 labels is no reward model"),
        (dict(id2label=None), "classifier of 2 labels is no reward model"),
    ],
)
def test_other_architectures_are_refused(folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RewardModel.load(edited(folder("llama"), tmp_path / "other", **settings))


def test_missing_score_head_is_said(folder, tmp_path):
    target = edited(folder("llama"), tmp_path / "headless")
    tensors = load_file(target / "model.safetensors")
    head = tensors.pop("score.weight")
    save_file(tensors, target / "model.safetensors")
    with pytest.raises(ValueError, match="has no score head: none of its tensors starts with `score.`"):
        RewardModel.load(target)
    save_file(tensors | {"score.weight": np.concatenate([head, head])}, target / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"`score.weight` .* has shape \(2, 32\); its configuration calls for \(1, 32\)"
    ):
        RewardModel.load(target)
    save_file(tensors | {"score.weight": head, "score.bias": head[0, :1]}, target / "model.safetensors")
    with pytest.raises(ValueError, match="has no use for: `score.bias`"):
        RewardModel.load(target)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no model.safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_missing_file_is_named(folder, tmp_path, name, message):
    target = edited(folder("llama"), tmp_path / "part")
    (target / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        RewardModel.load(target)


def test_sources_that_are_no_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        RewardModel.load(tmp_path / "nowhere")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is a file; accepted are a folder"):
        RewardModel.load(tmp_path / "model.gguf")


def test_separators_that_are_no_token_are_refused(folder):
    with pytest.raises(ValueError, match="`separator` = '<extra_0>' must be one token .*, got 9"):
        RewardModel.load(folder("process"))
    with pytest.raises(ValueError, match=r"`separator` must be in \[0, 128\), got 128"):
        RewardModel.load(folder("process"), separator=128)
    with pytest.raises(ValueError, match="`separator` = '%' is for process reward models"):
        RewardModel.load(folder("llama"), separator="%")
    with pytest.raises(ValueError, match="one of product, min, mean, last; got 'sum'"):
        RewardModel.load(folder("process"), separator="%", aggregation="sum")


def test_step_rewards_of_a_model_of_whole_texts_are_refused(load):
    with pytest.raises(ValueError, match="needs a process reward model"):
        load("llama").step_rewards(np.zeros(4, np.int32), 4)


def test_texts_and_tokens_that_cannot_be_scored_are_refused(load):
    model = load("llama")
    with pytest.raises(ValueError, match="`texts` is empty"):
        model.score_texts([])
    with pytest.raises(TypeError, match="must be a list of strings, got str"):
        model.score_texts("text")
    with pytest.raises(ValueError, match=r"`texts\[1\]` has 0 tokens; accepted are 1 to 128"):
        model.score_texts(["a", ""])
    with pytest.raises(ValueError, match=r"`texts\[0\]` has 129 tokens"):
        model.score_texts(["a" * 129])
    with pytest.raises(ValueError, match=r"shape \(T,\) with T in \[1, 128\], got \(2, 4\); use jax.vmap"):
        model.reward(np.zeros((2, 4), np.int32), 4)


def test_heads_of_other_shapes_are_refused(load, tokenizer):
    decoder = nnx.merge(load("llama")._graph, load("llama")._weights)[0]
    with pytest.raises(ValueError, match="`layers` must be 1 or 2, got 3"):
        ScoreHead(32, 1, layers=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must have 1 output, or 2 for a process reward model; got 5"):
        RewardModel(decoder, ScoreHead(32, 5, layers=1, rngs=nnx.Rngs(0)), tokenizer)
    with pytest.raises(ValueError, match="`separator` must be a token for a head of 2"):
        RewardModel(decoder, ScoreHead(32, 2, layers=1, rngs=nnx.Rngs(0)), tokenizer)
