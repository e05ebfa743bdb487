"""The next token's law: the sampler inverts the CDF exactly, and never draws what cannot be drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.inference import ImportanceSampling
from ppl.kernels.tokens import invert_cdf
from ppl.kernels.truncation import top_p
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


@pytest.mark.optimized
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
    theirs = jax.eval_shape(lambda: reference.sample(jax.random.key(1), shape))
    assert draws.shape == theirs.shape and draws.dtype == jnp.int32
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


PROPOSALS = {
    "top_k": lambda law: law.top_k(2),
    "top_p": lambda law: law.top_p(0.7, defensive=0.25),
    "min_p": lambda law: law.min_p(0.5, defensive=0.01),
    "temper": lambda law: law.temper(0.6),
    "itself": lambda law: law.top_k(3, defensive=1.0),
}


@pytest.mark.parametrize("name", PROPOSALS)
def test_weighted_proposal_has_the_law_s_expectations_exactly(name):
    logits = jnp.log(jnp.array([0.02, 0.5, 0.08, 0.0, 0.25, 0.15]))
    law = NextToken(logits=logits)
    proposal = PROPOSALS[name](law)
    assert type(proposal) is NextToken
    tokens = jnp.arange(6)
    p, q = (np.exp(np.asarray(x.log_prob(tokens), np.float64)) for x in (law, proposal))
    np.testing.assert_allclose(q.sum(), 1, rtol=1e-6)
    assert ((q > 0) == (p > 0)).all()
    values = np.array([3.0, -1.0, 2.0, 100.0, 0.5, 7.0])
    weights = np.divide(p, q, out=np.zeros(6), where=q > 0)
    np.testing.assert_allclose((q * weights * values).sum(), (p * values).sum(), rtol=1e-6)


@pytest.mark.parametrize("defensive", [0.01, 0.1, 0.5, 1.0])
def test_defensive_mixture_has_its_density_and_bounds_the_weights(defensive):
    law = NextToken(logits=jax.random.normal(jax.random.key(0), (3, 400)) * 3)
    inside = np.asarray(top_p(law.logits, 0.9))
    p = np.exp(np.asarray(jax.nn.log_softmax(law.logits), np.float64))
    expected = (1 - defensive) * p * inside / (p * inside).sum(-1, keepdims=True) + defensive * p
    proposal = law.top_p(0.9, defensive=defensive)
    q = np.exp(np.asarray(proposal.log_prob(jnp.arange(400)[:, None]), np.float64)).T
    np.testing.assert_allclose(q, expected, rtol=1e-5)
    assert (p / q).max() <= (1 + 1e-5) / defensive


def test_truncation_without_a_defence_is_refused_and_says_what_to_do():
    law = NextToken(logits=jnp.zeros(5))
    for call, remedy in [
        (lambda d: law.top_k(2, d), "top_k"),
        (lambda d: law.top_p(0.9, d), "top_p"),
        (lambda d: law.min_p(0.1, d), "min_p"),
    ]:
        for defensive in (0, 0.0, -0.1, 1.5, float("nan")):
            with pytest.raises(
                ValueError, match=rf"`defensive` must be in \(0, 1\].*law\.restrict\({remedy}\(law\.logits"
            ):
                call(defensive)
    for temperature in (0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="`temperature` must be positive and finite"):
            law.temper(temperature)


@pytest.mark.parametrize("name", PROPOSALS)
def test_proposals_leave_the_evidence_of_a_program_alone(name):
    """One token with a likelihood: with more, weights of 1 / d each would make the standard error a poor guide."""
    likelihood = jnp.array([0.9, 0.1, 0.6, 0.5, 0.3, 0.8])
    logits = jnp.log(jnp.array([0.02, 0.5, 0.08, 0.0, 0.25, 0.15]))

    @ppl.model
    def program(logits):
        def step(carry, _):
            law = NextToken(logits=logits)
            token = ppl.sample("token", law, proposal=PROPOSALS[name](law))
            ppl.factor("likelihood", jnp.log(likelihood[token]))
            return carry, token

        return ppl.scan(step, 0, length=1)[1]

    truth = np.log(np.exp(np.asarray(logits, np.float64)) @ np.asarray(likelihood, np.float64))
    assert_evidence(ppl.infer(program(logits), ImportanceSampling(20_000), seed=0), truth)


def assert_evidence(posterior, truth):
    """The mean of independent weights, against its own standard error."""
    weights = np.exp(np.asarray(posterior.log_weights, np.float64))
    error = np.sqrt((weights**2).sum() - 1 / len(weights))
    assert error < 0.1
    assert abs(1 - np.exp(truth - float(posterior.log_evidence))) < 5 * error


def test_truncated_proposal_runs_in_a_language_model_s_program(tiny):
    """The factor's exact evidence comes from all pairs of tokens."""
    lm = tiny("llama2")
    state = lm.prefill([5, 6, 7], max_tokens=2)

    @ppl.model
    def program():
        def step(state, _):
            law = lm.next_token(state)
            token = ppl.sample("token", law, proposal=law.top_p(0.9))
            ppl.factor("even", jnp.where(token % 2 == 0, 0.0, -1.0))
            return lm.extend(state, token), token

        return ppl.scan(step, lm.prefill([5, 6, 7]), length=2)[1]

    first = np.exp(np.asarray(jax.nn.log_softmax(lm.next_token(state).logits), np.float64))
    reward = np.where(np.arange(lm.vocab_size) % 2 == 0, 1.0, np.exp(-1.0))
    states = [lm.next_token(lm.extend(state, token)).logits for token in range(lm.vocab_size)]
    second = np.exp(np.asarray(jax.nn.log_softmax(jnp.stack(states)), np.float64)) @ reward
    truth = np.log((first * reward * second).sum())
    assert_evidence(ppl.infer(program(), ImportanceSampling(2000), seed=0), truth)
