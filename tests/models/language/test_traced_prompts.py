"""Prompts whose tokens are known only when a program runs: drawn, computed, padded; alone, in loops, side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import SMC

TOLERANCE = dict(rtol=2e-4, atol=2e-4)
TOKENS = [3, 40, 5, 9, 30]


@pytest.fixture(scope="module")
def lm(one_block):
    return one_block


def after(lm, tokens):
    return np.asarray(lm.next_token(lm.prefill(list(map(int, tokens)))).logits)


def test_traced_tokens_and_lengths_are_read_like_known_ones(lm):
    padded = jnp.array([*TOKENS, 77, 78])  # what lies beyond the length is not looked at

    @jax.jit
    def read(tokens, length):
        state = lm.prefill(tokens, length)
        further = lm.extend(lm.extend(state, 50), 51)
        static = lm.prefill(tokens, 3)
        return [lm.next_token(s).logits for s in (state, further, static, lm.prefill(tokens))]

    for length in (1, 5, 7):
        given = padded[:length].tolist()
        texts = [given, [*given, 50, 51], padded[:3].tolist(), padded.tolist()]
        for got, text in zip(read(padded, length), texts, strict=True):
            np.testing.assert_allclose(got, after(lm, text), **TOLERANCE)
    known = lm.prefill(np.array([*TOKENS, -1, 1000]), 5)  # padding may be no token at all
    np.testing.assert_allclose(lm.next_token(known).logits, after(lm, TOKENS), **TOLERANCE)
    assert known.room.prompt == 5 and int(known.prompt_length) == 5


def test_many_prompts_side_by_side_and_a_length_that_is_none(lm):
    rows = jnp.array([TOKENS, TOKENS[::-1], [60, 61, 62, 0, 0]])
    lengths = jnp.array([5, 4, 3])
    read = jax.jit(jax.vmap(lambda tokens, length: lm.next_token(lm.extend(lm.prefill(tokens, length), 7)).logits))
    for row, length, logits in zip(rows, lengths, read(rows, lengths), strict=True):
        np.testing.assert_allclose(logits, after(lm, [*row[:length], 7]), **TOLERANCE)
    for length in (0, 6, -1):  # nothing that could be taken for an answer
        assert bool(jnp.isnan(read(rows[:1], jnp.array([length]))).all())


def test_drawn_prompts_in_loops_of_particles(lm):
    @ppl.model
    def program(fixed):
        begins = ppl.sample("begins", dist.Categorical(logits=jnp.zeros(100)).expand([3]).to_event(1))
        state = lm.prefill([begins[0], 9, begins[1]])  # a list of traced tokens

        def step(state, _):
            token = ppl.sample("token", lm.next_token(state))
            length = 1 + token % 3
            read = lm.prefill(jnp.concatenate([begins, token[None]]), length)
            told = lm.next_token(lm.extend(read, token)).log_prob(7)
            ppl.factor("told", 0.1 * told)
            return lm.extend(state, token), (token, told)

        _, (tokens, told) = ppl.scan(step, state, length=3)
        written = ppl.generate(lm.complete(begins, max_tokens=2), name="written")
        return begins, tokens, told, written["tokens"], lm.next_token(lm.prefill(fixed)).log_prob(7)

    posterior = ppl.infer(program(np.array(TOKENS)), SMC(8, ess_threshold=1.0), keep=["written/path"])
    for begins, tokens, told, written, fixed in zip(*map(np.asarray, posterior.value), strict=True):
        for token, score in zip(tokens, told, strict=True):
            text = [*begins, token][: 1 + token % 3]
            np.testing.assert_allclose(score, jax.nn.log_softmax(after(lm, [*text, token]))[7], **TOLERANCE)
        assert written.shape == (2,)
        np.testing.assert_allclose(fixed, jax.nn.log_softmax(after(lm, TOKENS))[7], **TOLERANCE)
    assert len(np.unique(np.asarray(posterior.value[0]), axis=0)) > 1


def test_density_of_text_after_a_traced_prompt(lm):
    @ppl.model
    def program(prompt):
        return ppl.generate(lm.complete(prompt, max_tokens=2))

    density = ppl.log_density(program(jnp.array(TOKENS)), {"path": jnp.array([60, 61])})
    first, second = (jax.nn.log_softmax(after(lm, text)) for text in (TOKENS, [*TOKENS, 60]))
    assert float(density) == pytest.approx(float(first[60] + second[61]), abs=1e-4)


def test_bad_prompts_are_refused(lm):
    def trace(tokens, *length, **more):
        return jax.make_jaxpr(lambda tokens: lm.prefill(tokens, *length, **more))(tokens)

    with pytest.raises(TypeError, match="`prompt` must hold tokens, which are integers; got float32"):
        trace(jnp.ones(3))
    with pytest.raises(
        ValueError, match=r"of shape \(T,\) with T at least 1, got \(2, 2\); read many texts by jax.vmap"
    ):
        trace(jnp.ones((2, 2), int))
    with pytest.raises(ValueError, match=r"with T at least 1, got \(0,\)"):
        trace(jnp.ones(0, int))
    for length in (0, 4):
        with pytest.raises(
            ValueError, match=rf"`length` must be in \[1, 3\], the number of tokens given; got {length}"
        ):
            trace(jnp.ones(3, int), length)
        with pytest.raises(
            ValueError, match=rf"`length` must be in \[1, 3\], the number of tokens given; got {length}"
        ):
            lm.prefill([3, 4, 5], length)
    with pytest.raises(TypeError, match="`length` must be one integer, got float"):
        trace(jnp.ones(3, int), 1.5)
    with pytest.raises(TypeError, match="`length` says how many tokens of an array count"):
        lm.prefill("hello", 3)
    with pytest.raises(ValueError, match="`prompt` has 129 tokens; the model's context holds 128"):
        trace(jnp.ones(129, int))
    with pytest.raises(ValueError, match="a prompt of 100 tokens and `max_tokens` = 29 do not fit"):
        trace(jnp.ones(100, int), max_tokens=29)
    with pytest.raises(ValueError, match="places are left"):
        jax.make_jaxpr(lambda tokens: lm.extend(lm.prefill(tokens), 3))(jnp.ones(128, int))
