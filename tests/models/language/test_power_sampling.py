"""Power sampling: chains over texts against exact sums and SMC, caches that are rewound, and the real SmolLM2."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import MCMC, SMC, SuffixMH
from ppl.models import Choice, Regex
from ppl.models.language import LanguageModel
from ppl.trace_space import TraceSpace

CHAINS = 32


def log_probs(lm, prompt, texts):
    """The log-probability of each text, given as tokens, and of any end token after it."""
    scores = []
    for tokens in texts:
        logits = np.asarray(lm.forward([*prompt, *tokens]), np.float64)[len(prompt) - 1 :]
        logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        scores.append((logits[np.arange(len(tokens)), list(tokens)].sum(), logits[-1, list(lm.end_tokens)]))
    return scores


def powered(scores, alpha):
    """The normalised `p ** alpha` of texts that end."""
    weights = np.array([np.exp(alpha * (text + ends)).sum() for text, ends in scores])
    return weights / weights.sum()


def assert_frequencies(posterior, texts, exact, num_chains=CHAINS):
    """Compare the share of each text with its probability, by the spread between chains."""
    written = np.array(posterior.texts).reshape(num_chains, -1)
    assert set(written.ravel()) <= set(texts)
    for text, probability in zip(texts, exact, strict=True):
        shares = (written == text).mean(axis=1)
        error = shares.std(ddof=1) / np.sqrt(num_chains)
        assert abs(shares.mean() - probability) < 5 * error + 1e-3, (text, shares.mean(), probability)


def assert_shares(particles, texts, exact):
    """Compare the weight of each text with its probability, by the effective sample size."""
    weights = np.asarray(particles.weights, np.float64)
    assert set(particles.texts) <= set(texts)
    for text, probability in zip(texts, exact, strict=True):
        share = weights[np.array(particles.texts) == text].sum()
        assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / float(particles.ess))


def test_short_texts_have_the_power_of_their_probability(tiny):
    lm = tiny("llama2")
    target = lm.complete("ab", max_tokens=4).constrain(Regex("[ab]{1,3}"), require_end=True) ** 0.4
    texts = ["".join(letters) for n in (1, 2, 3) for letters in itertools.product("ab", repeat=n)]
    exact = powered(log_probs(lm, target.process.prompt, [lm.encode(text) for text in texts]), 0.4)
    assert 0.02 < exact.max() < 0.9
    chains = ppl.infer(target, MCMC(SuffixMH(), num_samples=100, num_warmup=20, num_chains=CHAINS), seed=1)
    assert_frequencies(chains, texts, exact)
    assert_shares(ppl.infer(target, SMC(4096), seed=3), texts, exact)


def test_rewound_caches_are_those_of_a_new_run(tiny):
    """After several moves the remembered weight is that of a run without any memory; texts end when they like."""
    network = tiny("llama2")
    lm = LanguageModel(network.decoder, network.tokenizer, end_tokens=range(16))
    moves = SuffixMH().bind(TraceSpace((lm.complete("ab", max_tokens=8) ** 1.2).program().stage(keep_rules=False)))

    @jax.jit
    @jax.vmap
    def run(key):
        first, *keys = jax.random.split(key, 8)
        sites, _ = moves.space.simulate(first)

        def step(state, key):
            after = moves.step(key, *state)[:2]
            return after, jnp.any(after[0]["path"] != state[0]["path"])

        (sites, memory), moved = jax.lax.scan(step, (sites, moves.init(first, sites, 0)), jnp.stack(keys))
        return memory, moves.refresh(first, sites, memory), moved

    kept, found, moved = run(jax.random.split(jax.random.key(0), 8))
    assert moved.sum() > 16
    lengths = kept.choices.sum(axis=1)
    assert len(set(lengths.tolist())) > 2
    np.testing.assert_array_equal(kept.choices, found.choices)
    np.testing.assert_allclose(kept.log_weight, found.log_weight, atol=1e-4)
    hidden = [(a, b) for a, b in zip(*map(jax.tree.leaves, (kept.checkpoint.rows, found.checkpoint.rows)), strict=True)]
    for a, b in hidden:
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
@pytest.mark.weights
def test_chains_and_particles_agree_on_a_real_vocabulary(shallow):
    question = shallow.chat([{"role": "user", "content": "Say yes or no."}], max_tokens=3)
    words = ["Yes", "No", "yes", "no"]  # none begins another: this network rarely ends a text that may go on
    target = question.constrain(Choice(words), require_end=True) ** 0.5
    vocabulary = {}
    for token, data in enumerate(shallow.byte_vocabulary.tokens):
        if data is not None and len(data) <= 4:
            vocabulary.setdefault(data, []).append(token)

    def spellings(word):
        """All texts of at most two tokens that write a word."""
        pairs = ((word[:cut], word[cut:]) for cut in range(1, len(word)))
        return [(token,) for token in vocabulary.get(word, [])] + [
            (x, y) for first, last in pairs for x in vocabulary.get(first, []) for y in vocabulary.get(last, [])
        ]

    scores = [log_probs(shallow, question.prompt, spellings(word.encode())) for word in words]
    weights = np.array([sum(np.exp(0.5 * (text + ends)).sum() for text, ends in of_word) for of_word in scores])
    exact = weights / weights.sum()
    chains = ppl.infer(target, MCMC(SuffixMH(), num_samples=24, num_warmup=12, num_chains=12), seed=0)
    assert_frequencies(chains, words, exact, 12)
    assert_shares(ppl.infer(target, SMC(128), seed=0), words, exact)


@pytest.mark.slow
@pytest.mark.weights
def test_texts_to_the_power_of_four(shallow):
    target = shallow.complete("Once upon a time", max_tokens=6) ** 4.0
    posterior = ppl.infer(target, MCMC(SuffixMH(), num_samples=3, num_chains=4), seed=0)
    assert len(posterior.texts) == 12 and posterior.num_chains == 4
    acceptance = np.asarray(posterior.diagnostics["acceptance"])
    assert acceptance.shape == (4, 3) and (acceptance >= 0).all() and acceptance.max() > 0
    again = ppl.infer(target, MCMC(SuffixMH(), num_samples=3, num_chains=4), seed=0)
    assert again.texts == posterior.texts
