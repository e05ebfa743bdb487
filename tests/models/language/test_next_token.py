"""The next token's law: the sampler inverts the CDF exactly, and never draws what cannot be drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from ppl.kernels.tokens import invert_cdf
from ppl.models.language.next_token import NextToken

STEP = 2.0**-24


def test_every_breakpoint_of_a_small_cdf_is_where_it_should_be():
    # Weights are multiples of 1/8, so that sums and thresholds are exact; one block holds them all.
    weights = np.array([0.125, 0.0, 0.25, 0.125, 0.0, 0.5, 0.0])
    logits = jnp.log(jnp.asarray(weights, jnp.float32))
    edges = np.cumsum(weights)
    for edge, token in zip([0.0, *edges[[0, 2, 3]]], [0, 2, 3, 5], strict=True):
        assert int(invert_cdf(logits, jnp.array([0.0, edge]))) == token
        if edge > 0:
            before = int(invert_cdf(logits, jnp.array([0.0, edge - STEP])))
            assert before == {2: 0, 3: 2, 5: 3}[token]
    assert int(invert_cdf(logits, jnp.array([1 - STEP, 1 - STEP]))) == 5


def test_blocks_are_entered_at_their_breakpoints():
    # Four blocks of 256 equal tokens: the first uniform chooses the block, the second the token.
    logits = jnp.zeros(1024)
    for block in range(4):
        assert int(invert_cdf(logits, jnp.array([block / 4, 0.0]))) == block * 256
        assert int(invert_cdf(logits, jnp.array([(block + 1) / 4 - STEP, 1 - STEP]))) == block * 256 + 255
    for token in range(256):
        assert int(invert_cdf(logits, jnp.array([0.0, token / 256]))) == token


def test_measure_of_every_token_is_its_probability():
    # The set of uniforms that gives a token, measured on a grid: the law itself, without sampling error.
    probabilities = np.array([0.30, 0.05, 0.0, 0.4, 0.15, 0.1])
    grid = (jnp.arange(2**18) + 0.5) / 2**18
    tokens = invert_cdf(jnp.log(jnp.asarray(probabilities)), jnp.stack([jnp.zeros_like(grid), grid], -1))
    measure = np.bincount(tokens, minlength=6) / 2**18
    np.testing.assert_allclose(measure, probabilities, atol=2 / 2**18)
    assert measure[2] == 0


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 49152, 262144])
@pytest.mark.parametrize("where", ["head", "tail", "all but one", "every other"])
def test_forbidden_tokens_are_never_drawn(size, where):
    allowed = np.ones(size, bool)
    if where == "head":
        allowed[: size // 2] = False
    elif where == "tail":
        allowed[size - size // 2 :] = False
    elif where == "all but one":
        allowed[:] = False
        allowed[size // 3] = True
    else:
        allowed[1::2] = False
    logits = jnp.where(jnp.asarray(allowed), jax.random.normal(jax.random.key(1), (size,)) * 8, -jnp.inf)
    corners = jnp.array([[a, b] for a in (0.0, 0.5, 1 - STEP) for b in (0.0, 0.5, 1 - STEP)])
    at_corners = np.asarray(invert_cdf(logits, corners))
    draws = np.asarray(NextToken(logits=logits).sample(jax.random.key(2), (500,)))
    for tokens in (at_corners, draws):
        assert tokens.min() >= 0 and tokens.max() < size
        assert allowed[tokens].all()


@pytest.mark.parametrize("size", [50, 5000, 262144])
def test_frequencies_agree_with_probabilities(size):
    logits = jax.random.normal(jax.random.key(size), (size,)) * 2.0
    law = NextToken(logits=logits)
    count = 40_000
    draws = np.asarray(law.sample(jax.random.key(0), (count,)))
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    groups = np.arange(size) % 20
    expected = np.bincount(groups, probabilities, 20)
    seen = np.bincount(groups[draws], minlength=20) / count
    z = (seen - expected) / np.sqrt(expected * (1 - expected) / count)
    assert np.abs(z).max() < 5, z


def test_rare_tokens_of_a_flat_law_keep_their_probability():
    # With one uniform of 24 bits a token of probability 2^-18 would be off by up to 3 parts in 100.
    logits = jnp.zeros(2**18)
    grid = (jnp.arange(2**16) * 2**8) * STEP
    tokens = invert_cdf(logits, jnp.stack([jnp.full_like(grid, 0.3), grid], -1))
    counts = np.bincount(np.asarray(tokens) % 256, minlength=256)
    assert counts.min() == counts.max() == 2**8


@pytest.mark.parametrize(("batch", "shape"), [((), ()), ((), (2, 5)), ((3,), ()), ((3,), (4,)), ((2, 3), (2, 5))])
def test_shapes_are_those_of_numpyro(batch, shape):
    logits = jax.random.normal(jax.random.key(0), (*batch, 300))
    law, reference = NextToken(logits=logits), dist.CategoricalLogits(logits)
    draws = law.sample(jax.random.key(1), shape)
    assert draws.shape == reference.sample(jax.random.key(1), shape).shape and draws.dtype == jnp.int32
    np.testing.assert_allclose(law.log_prob(draws), reference.log_prob(draws), rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_are_drawn_from_their_own_law():
    logits = jnp.full((2, 3, 600), -jnp.inf)
    for row in range(2):
        for column in range(3):
            logits = logits.at[row, column, 100 * (3 * row + column)].set(0.0)
    draws = NextToken(logits=logits).sample(jax.random.key(0), (4,))
    np.testing.assert_array_equal(draws, np.broadcast_to(100 * np.arange(6).reshape(2, 3), (4, 2, 3)))


def test_sample_under_vmap_and_jit_is_the_sample_without():
    logits = jax.random.normal(jax.random.key(0), (4, 1000))
    keys = jax.random.split(jax.random.key(1), 4)
    one_by_one = [int(NextToken(logits=row).sample(key)) for row, key in zip(logits, keys, strict=True)]
    together = jax.jit(jax.vmap(lambda row, key: NextToken(logits=row).sample(key)))(logits, keys)
    assert together.tolist() == one_by_one


def test_log_prob_is_minus_infinity_off_the_support_and_broadcasts():
    law = NextToken(logits=jnp.array([0.0, -jnp.inf, 1.0]))
    assert float(law.log_prob(1)) == -np.inf
    np.testing.assert_allclose(jnp.exp(law.log_prob(jnp.arange(3))).sum(), 1.0, rtol=1e-6)
    assert law.log_prob(jnp.zeros((4, 2), int)).shape == (4, 2)


def test_law_is_a_numpyro_categorical_with_its_support_and_validation():
    law = NextToken(logits=jnp.zeros(5), validate_args=True)
    assert isinstance(law, dist.CategoricalLogits)
    assert law.enumerate_support().tolist() == [0, 1, 2, 3, 4]
    assert law.support(jnp.array([-1, 0, 4, 5])).tolist() == [False, True, True, False]
    with pytest.warns(UserWarning, match="Out-of-support"):
        law.log_prob(7)
    leaves, structure = jax.tree.flatten(law)
    assert isinstance(jax.tree.unflatten(structure, leaves), NextToken)


def test_gradient_of_log_prob_is_the_score():
    logits = jnp.array([0.3, -1.0, 2.0])
    gradient = jax.grad(lambda logits: NextToken(logits=logits).log_prob(2))(logits)
    np.testing.assert_allclose(gradient, jnp.eye(3)[2] - jax.nn.softmax(logits), atol=1e-6)
