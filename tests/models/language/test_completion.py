"""Text as a process: its value, its evidence, and that other prompts compile nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling
from ppl.inference.population import lower
from tests.ppl.checks import compilations

MAX_TOKENS = 6


@pytest.mark.weights
def test_completion_has_evidence_one_and_a_padded_value(smollm2):
    posterior = ppl.infer(smollm2.complete("Once upon a time", max_tokens=MAX_TOKENS), SMC(4), seed=0)
    assert posterior.log_evidence == 0.0 and posterior.ess == 4.0 and posterior.sites == {}
    tokens, lengths = np.asarray(posterior.value["tokens"]), np.asarray(posterior.value["length"])
    assert tokens.shape == (4, MAX_TOKENS) and tokens.dtype == np.int32
    for row, length in zip(tokens, lengths, strict=True):
        assert not np.isin(row[:length], smollm2.end_tokens).any()
        assert (row[length:] == smollm2.padding_token).all()
    assert posterior.texts == smollm2.decode(tokens, length=lengths)


@pytest.mark.weights
def test_density_of_a_path_is_that_of_one_parallel_pass(shallow):
    prompt, after = "The capital of France is", " Paris. It is"
    tokens = shallow.encode(after)
    program = shallow.complete(prompt, max_tokens=len(tokens))
    density = ppl.log_density(program, {"path": jnp.asarray(tokens, jnp.int32)})
    assert float(density) == pytest.approx(shallow.log_prob(prompt, after), abs=2e-3)


@pytest.mark.weights
def test_another_prompt_of_the_bucket_and_another_seed_compile_nothing(shallow):
    algorithm = ImportanceSampling(2)
    jax.block_until_ready(ppl.infer(shallow.complete("Once upon a time", max_tokens=MAX_TOKENS), algorithm).value)
    with compilations() as compiled:
        process = shallow.complete("A very different beginning, of another length", max_tokens=MAX_TOKENS)
        jax.block_until_ready(ppl.infer(process, algorithm, seed=1).value)
    assert len(compiled) == 0


@pytest.mark.weights
def test_run_holds_no_array_constants(shallow):
    text = lower(shallow.complete("Once upon a time", max_tokens=MAX_TOKENS), SMC(2)).as_text()
    sizes = re.findall(r'constant dense<(?:"0x|\[)[^>]*> : tensor<([0-9x]+)x[a-z]', text)
    assert [s for s in sizes if np.prod([int(n) for n in s.split("x")]) > 64] == []


@pytest.mark.weights
def test_budget_that_does_not_fit_is_refused(smollm2):
    with pytest.raises(ValueError, match="`max_tokens` must be at least 1, got 0"):
        smollm2.complete("Hello", max_tokens=0)
    with pytest.raises(ValueError, match=r"context of 8192 tokens"):
        smollm2.complete("Hello", max_tokens=8192)
    with pytest.raises(TypeError, match="`max_tokens` must be an int"):
        smollm2.complete("Hello", max_tokens=3.0)
