"""Products of two language models that share a vocabulary, and what another prompt or constraint compiles."""

import re

import jax
import jax.numpy as jnp
import numpy as np

import ppl
from ppl.inference import SMC
from ppl.inference.population import lower
from ppl.models import Choice, Regex
from tests.ppl.checks import assert_mean_within_5_standard_errors, compilations, repeat


def log_probs(lm, prompt):
    """Log-probabilities of the first token, `[V]`, and of the second given each first, `[V, V]`, float64."""
    tokens = jnp.concatenate(
        [jnp.broadcast_to(jnp.array(prompt), (lm.vocab_size, len(prompt))), jnp.arange(lm.vocab_size)[:, None]], 1
    )
    logits = np.asarray(jax.lax.map(lm.forward, tokens), np.float64)
    logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logits[0, -2], logits[:, -1]


def test_product_of_two_models_has_the_sum_of_their_products_as_evidence(tiny):
    p, q = tiny("llama2"), tiny("qwen3")
    assert p is not q and p.end_tokens == q.end_tokens
    target = p.complete([5, 9], max_tokens=2) ** 0.7 * q.complete([20, 7, 8], max_tokens=2)
    (p1, p2), (q1, q2) = log_probs(p, [5, 9]), log_probs(q, [20, 7, 8])
    first, second = 0.7 * p1 + q1, np.logaddexp.reduce(0.7 * p2 + q2, axis=1)
    second[list(p.end_tokens)] = 0.0  # the text is over
    exact = np.logaddexp.reduce(first + second)
    estimates = repeat(target.program(), SMC(32), lambda posterior: posterior.log_evidence, 100)
    assert_mean_within_5_standard_errors(np.exp(np.asarray(estimates, np.float64) - exact), 1.0)


def test_another_prompt_compiles_nothing_under_a_constraint(tiny):
    lm = tiny("llama2")

    def run(prompt, seed):
        return ppl.infer(lm.complete(prompt, max_tokens=4).constrain(Regex("[A-Z]+")), SMC(4), seed=seed)

    jax.block_until_ready(run([5, 9], 0).value)
    with compilations() as compiled:
        jax.block_until_ready(run([20, 7, 8], 1).value)
    assert len(compiled) == 0


def test_constrained_run_holds_no_array_constants(tiny):
    target = tiny("llama2").complete([5, 9], max_tokens=4).constrain(Choice(["ABC", "AB", "CA"]))
    text = lower(target, SMC(2)).as_text()
    sizes = re.findall(r'constant dense<(?:"0x|\[)[^>]*> : tensor<([0-9x]+)x[a-z]', text)
    assert [s for s in sizes if np.prod([int(n) for n in s.split("x")]) > 64] == []
