"""`LanguageModel`: texts and tokens, states and densities, staging, and what it says to bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.models.language import LanguageModel

from .conftest import advance


@pytest.fixture(scope="module")
def lm(tiny):
    return tiny("llama3")


def test_log_prob_is_the_sum_of_the_steps(lm):
    prompt, continuation = "hello", " world, and again"
    state, total = lm.prefill(prompt, max_tokens=20), 0.0
    for token in lm.encode(continuation):
        total += float(lm.next_token(state).log_prob(token))
        state = lm.extend(state, token)
    assert lm.log_prob(prompt, continuation) == pytest.approx(total, abs=1e-4)


def test_log_prob_of_nothing_is_zero_and_of_parts_adds_up(lm):
    assert lm.log_prob("hello", "") == 0.0
    both = lm.log_prob("hello", "ab") + lm.log_prob("helloab", "cde")
    assert lm.log_prob("hello", "abcde") == pytest.approx(both, abs=1e-4)


def test_log_prob_compiles_once_for_a_bucket(lm):
    lm.log_prob("abc", "de")
    before = lm._log_probs._cache_size()
    lm.log_prob("x", "yz0123")
    assert lm._log_probs._cache_size() == before


def test_another_prompt_of_the_bucket_traces_to_the_same_program(lm):
    def program(prompt):
        def run():
            state = lm.extend(lm.prefill(prompt, max_tokens=4), 5)
            return lm.next_token(state).logits

        return jax.make_jaxpr(run)()

    first, second = program("hello"), program("something")
    assert str(first.jaxpr) == str(second.jaxpr)
    assert [jnp.shape(array) for array in first.consts] == [jnp.shape(array) for array in second.consts]
    assert [(a.shape, a.dtype) for a in first.in_avals] == []


def test_weights_enter_a_traced_program_as_constants_that_are_arrays(lm):
    state = lm.prefill("hello", max_tokens=4)
    closed = jax.make_jaxpr(lm.extend)(state, jnp.int32(5))
    kernels = [array for array in closed.consts if array.ndim == 2]
    weights = {id(leaf) for leaf in jax.tree.leaves(lm._weights)}
    assert kernels and all(id(array) in weights for array in kernels)
    assert all(isinstance(array, jax.Array) for array in closed.consts)


def test_prefill_inside_jit_is_prefill_outside(lm):
    outside = lm.prefill("hello", max_tokens=4)
    inside = jax.jit(lambda: lm.prefill("hello", max_tokens=4))()
    assert jax.tree.structure(inside) == jax.tree.structure(outside)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_extend_keeps_the_states_types_so_that_it_can_be_a_scans_carry(lm):
    state = lm.prefill("hello").enter_loop(1, 4)
    after = jax.eval_shape(lambda state, token: advance(lm, state, token), state, jnp.int32(3))
    before = jax.eval_shape(lambda state: state, state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), before
    )


def test_prompt_may_be_text_list_or_array(lm):
    tokens = lm.encode("hello")
    states = [lm.prefill(prompt, max_tokens=1) for prompt in ("hello", tokens, np.array(tokens), jnp.array(tokens))]
    for state in states[1:]:
        np.testing.assert_array_equal(state.hidden, states[0].hidden)


def test_decode_stops_at_the_first_end_token_and_takes_one_text_or_many(lm):
    hello, end = lm.encode("hello"), lm.end_tokens[0]
    assert lm.decode(hello) == "hello"
    assert lm.decode([*hello, end, *hello]) == "hello"
    assert lm.decode([end]) == "" and lm.decode([]) == ""
    rows = jnp.array([hello + [end, 0], hello[:3] + [end, 9, end, 4]])
    assert lm.decode(rows) == ["hello", "hel"]
    assert lm.decode(rows, length=[2, 7]) == ["he", "hel"]
    assert lm.decode(hello, length=jnp.int32(4)) == "hell"
    with pytest.raises(ValueError, match=r"`tokens` must have shape \(T,\) or \(N, T\), got \(1, 1, 1\)"):
        lm.decode(np.zeros((1, 1, 1)))


def test_prompt_longer_than_the_context_names_both_numbers(lm):
    assert lm.prefill([3] * 128).slots == 0
    with pytest.raises(ValueError, match="`prompt` has 129 tokens; the model's context holds 128"):
        lm.prefill([3] * 129)
    with pytest.raises(ValueError, match="together have 130 tokens; the model's context holds 128"):
        lm.log_prob("a" * 65, "b" * 65)


def test_bad_prompts_are_refused(lm):
    with pytest.raises(ValueError, match=r"`prompt` is empty: give at least one token, .* \[1\]"):
        lm.prefill("")
    with pytest.raises(ValueError, match="`prompt` is empty"):
        lm.log_prob("", "x")
    with pytest.raises(ValueError, match=r"tokens outside of \[0, 128\): \[128\]"):
        lm.prefill([5, 128])
    with pytest.raises(ValueError, match="`max_tokens` must be at least 0, got -1"):
        lm.prefill("a", max_tokens=-1)


def test_chat_without_a_template_is_refused(lm):
    with pytest.raises(ValueError, match="no chat template"):
        lm.chat_prompt([{"role": "user", "content": "hi"}])


def test_end_tokens_are_those_of_configuration_generation_and_tokenizer(lm):
    assert lm.end_tokens == (2,)
    assert LanguageModel.__name__ in repr(lm) and "2 layers of width 32" in repr(lm)


@pytest.mark.weights
def test_smollm2_reads_and_writes_text(smollm2):
    assert set(smollm2.end_tokens) == {0, 2, 4} and smollm2.end_tokens[0] == 2  # as llama.cpp ends its texts
    assert (smollm2.vocab_size, smollm2.context_length) == (49152, 8192)
    for text in ("Hello world 2024\n", " naïve 日本 👩‍👧"):
        assert smollm2.decode(smollm2.encode(text)) == text
    prompt = smollm2.chat_prompt([{"role": "user", "content": "hi"}])
    assert (
        smollm2.decode(prompt) == "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face"
    )


@pytest.mark.weights
def test_smollm2_prefers_sense_to_nonsense(smollm2):
    sense = smollm2.log_prob("The capital of France is", " Paris")
    assert sense > -2.5
    assert sense > smollm2.log_prob("The capital of France is", " cheese") + 3
