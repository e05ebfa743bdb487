"""What a choice among texts means: whole texts, that end by an end token or fill the budget; exact values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import ImportanceSampling
from ppl.models import Choice, MarkovChain

PROMPT, STRINGS = "ab", ("c", "de", "fgh")  # of one, two and three tokens


@pytest.fixture(scope="module")
def exact(one_block):
    """A function from a string to its log-probability as a continuation, and that of the end token after it."""

    def values(string):
        after = one_block.next_token(one_block.prefill(one_block.encode(PROMPT) + one_block.encode(string)))
        return one_block.log_prob(PROMPT, string), float(after.log_prob(one_block.end_tokens[0]))

    return {string: values(string) for string in STRINGS}


def measured(lm, max_tokens, require_end=False):
    """The log-density of each string as a whole text under the constrained target."""
    story = lm.complete(PROMPT, max_tokens=max_tokens).constrain(Choice(STRINGS), require_end=require_end)
    program, paths = story.program(), np.zeros((len(STRINGS), max_tokens), np.int32)
    for path, string in zip(paths, STRINGS, strict=True):
        tokens = [*lm.encode(string), lm.end_tokens[0]][:max_tokens]
        path[: len(tokens)] = tokens
    return jax.vmap(lambda path: ppl.log_density(program, {"path": path}))(jnp.asarray(paths))


@pytest.mark.parametrize("max_tokens", [1, 2, 4])
def test_odds_of_a_choice_depend_on_the_budget(one_block, exact, max_tokens):
    expected = []
    for string in STRINGS:
        text, end = exact[string]
        free = max_tokens - len(string)
        expected.append(-np.inf if free < 0 else text if free == 0 else text + end)
    np.testing.assert_allclose(measured(one_block, max_tokens), expected, atol=1e-4)


def test_odds_of_whole_texts_and_of_continuations(one_block, exact):
    whole = [text + end for text, end in exact.values()]
    np.testing.assert_allclose(measured(one_block, 4, require_end=True), whole, atol=1e-4)
    story = one_block.complete(PROMPT, max_tokens=4).constrain(Choice(STRINGS), require_end=True)
    run = ppl.infer(story, ImportanceSampling(1000), seed=0)
    share = np.exp(whole - np.logaddexp.reduce(whole))
    weights = np.exp(np.asarray(run.log_weights))
    for string, truth in zip(STRINGS, share, strict=True):
        chosen = np.array([text == string for text in run.texts])
        error = np.sqrt(np.sum(weights**2 * (chosen - truth) ** 2))
        assert abs(np.sum(weights * chosen) - truth) < 5 * error
    continuations = np.array([text for text, _ in exact.values()])
    assert np.abs(continuations - continuations[0] - (np.array(whole) - whole[0])).max() > 0.1  # another question


def test_chain_of_fixed_length_has_no_end_to_pay_for():
    initial, moves = jnp.log(jnp.array([0.2, 0.3, 0.5])), jnp.log(jnp.array([[0.1, 0.6, 0.3]] * 3))
    chain = MarkovChain(initial, moves, 2).constrain(Choice(["ab", "cc", "a"]))
    run = ppl.infer(chain, ImportanceSampling(64), seed=0)
    assert set(run.value["tokens"][:, 0].tolist()) <= {0, 2}
    density = lambda a, b: ppl.log_density(chain.program(), {"path": jnp.array([a, b])})  # noqa: E731
    np.testing.assert_allclose(np.exp([density(0, 1), density(2, 2)]), [0.2 * 0.6, 0.5 * 0.3], rtol=1e-5)
