"""The networks compute what the torch implementations in transformers compute, on every path."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.models.language import LanguageModel

from .conftest import FIXTURES, TINY, advance
from .gguf_writer import write_gguf

# Logits of the tiny networks have a standard deviation near 2; float32 sums in another order differ by 1e-5.
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_forward_matches_torch(tiny, expected, name):
    record = expected(name)
    np.testing.assert_allclose(tiny(name).forward(record["tokens"]), record["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", TINY)
def test_prefill_then_extend_matches_torch_at_every_step(tiny, expected, name):
    lm, record = tiny(name), expected(name)
    tokens = record["tokens"]
    state = lm.prefill(tokens[:21], max_tokens=27)
    for t in range(21, 48):
        np.testing.assert_allclose(lm.next_token(state).logits, record["logits"][t - 1], **TOLERANCE)
        state = lm.extend(state, tokens[t])
    np.testing.assert_allclose(lm.next_token(state).logits, record["logits"][47], **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("llama3", "llama_linear")])
def test_gguf_of_the_same_weights_matches_torch(tiny_folder, expected, tmp_path, name):
    path = write_gguf(tiny_folder(name), tmp_path / f"{name}.gguf")
    record = expected(name)
    lm = LanguageModel.load(path, dtype=np.float32)
    np.testing.assert_allclose(lm.forward(record["tokens"]), record["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama3", "llama_linear"])
def test_gguf_with_scaled_rotations_matches_torch(tiny, tiny_folder, expected, tmp_path, name):
    factors = tiny(name).config.rope_divisors
    extra = dict(rope_factors=factors) if name == "llama3" else dict(linear=factors[0])
    path = write_gguf(tiny_folder(name), tmp_path / f"{name}.gguf", **extra)
    record = expected(name)
    lm = LanguageModel.load(path, dtype=np.float32)
    np.testing.assert_allclose(lm.forward(record["tokens"]), record["logits"], **TOLERANCE)


def test_bfloat16_checkpoint_is_read_and_close_to_float32(tiny, tiny_folder, tmp_path, expected):
    import ml_dtypes
    from safetensors.numpy import load_file

    from .gguf_writer import copy_folder, save_bfloat16

    folder = copy_folder(tiny_folder("qwen3"), tmp_path / "bf16")
    weights = load_file(folder / "model.safetensors")
    save_bfloat16({name: array.astype(ml_dtypes.bfloat16) for name, array in weights.items()}, folder)
    lm = LanguageModel.load(folder)
    assert lm.dtype == jnp.float32
    tokens = expected("qwen3")["tokens"]
    exact = tiny("qwen3").forward(tokens)
    assert np.max(np.abs(lm.forward(tokens) - exact)) < 0.1 * np.std(exact)
    half = LanguageModel.load(folder, dtype=jnp.bfloat16)
    state = half.extend(half.prefill(tokens[:20], max_tokens=4), 5)
    assert state.keys.dtype == state.hidden.dtype == jnp.bfloat16
    assert half.next_token(state).logits.dtype == jnp.float32


@pytest.fixture(scope="module")
def record():
    return json.loads((FIXTURES / "smollm2.json").read_text())


@pytest.fixture(scope="module")
def greedy(smollm2):
    """The 24 likeliest tokens, one after the other, as one compiled loop."""

    def step(state, _):
        token = jnp.argmax(smollm2.next_token(state).logits)
        return advance(smollm2, state, token), token

    return jax.jit(lambda state: jax.lax.scan(step, state, length=24)[1])


@pytest.mark.weights
@pytest.mark.parametrize("index", [0, 1, 2])
def test_smollm2_logits_and_greedy_continuation_match_torch(smollm2, record, greedy, index):
    prompt = record["prompts"][index]
    state = smollm2.prefill(prompt["tokens"])
    logits = np.asarray(smollm2.next_token(state).logits)
    np.testing.assert_allclose(logits[prompt["best"]], prompt["best_logits"], atol=2e-3)
    np.testing.assert_allclose(logits[::97], prompt["every_97th"], atol=2e-3)
    assert greedy(state.enter_loop(1, 24)).tolist() == prompt["greedy"]


@pytest.mark.weights
def test_smollm2_tokenizer_matches_transformers(smollm2, record):
    for entry in record["encodings"]:
        assert smollm2.encode(entry["text"]) == entry["tokens"], entry["text"]
    assert smollm2.chat_prompt(record["messages"]) == record["prompts"][2]["tokens"]
