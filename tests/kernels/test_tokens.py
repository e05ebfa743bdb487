"""Token sampling: its exact law for few tokens, its log-probabilities for many, and what is never drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl.kernels.tokens import TokenDraw, invert_cdf, sample_tokens, token_log_prob

INF = np.inf
STEP = 2.0**-24
sample = jax.jit(sample_tokens)


def log_softmax(logits):
    values = np.asarray(logits, np.float64)
    top = values.max(-1, keepdims=True)
    return values - top - np.log(np.exp(values - top).sum(-1, keepdims=True))


def log_normalizer(logits):
    values = np.asarray(logits, np.float64)
    top = values.max(-1)
    return top + np.log(np.exp(values - top[..., None]).sum(-1))


def at(log_probs, tokens):
    return np.take_along_axis(log_probs, np.asarray(tokens)[..., None], -1)[..., 0]


def make_logits(shape, scale=3.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_invert_cdf_law_is_exact_for_few_tokens(size):
    """Weights are eighths, so that sums and breakpoints are exact; the lengths between them are the law."""
    generator = np.random.default_rng(size)
    for _ in range(10):
        weights = np.bincount(generator.integers(size, size=8), minlength=size) / 8
        with np.errstate(divide="ignore"):
            logits = np.log2(weights).astype(np.float32) * np.float32(np.log(2))
        edges = np.arange(8) / 8
        uniforms = np.stack([np.full(8, 0.4), edges + 1 / 16], -1).astype(np.float32)
        measure = np.bincount(invert_cdf(logits, uniforms), minlength=size) / 8
        np.testing.assert_array_equal(measure, weights)


def test_invert_cdf_law_of_both_levels_is_the_softmax():
    """Both uniforms on a grid: its cells give each token its probability within the grid's step."""
    logits = np.full(512, -INF, np.float32)
    chosen = np.array([0, 5, 255, 256, 300, 511])
    logits[chosen] = np.log([0.1, 0.3, 0.05, 0.25, 0.2, 0.1])
    grid = (np.arange(400) + 0.5) / 400
    pairs = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).astype(np.float32)
    measure = np.bincount(np.asarray(invert_cdf(logits, pairs)).ravel(), minlength=512) / 400**2
    assert (measure[np.isneginf(logits)] == 0).all()
    np.testing.assert_allclose(measure, np.exp(logits), atol=2 / 400)


@pytest.mark.parametrize("shape", [(32, 300), (3, 1009), (2, 50257), (2, 151936), (2, 262144), (2, 3, 700)])
@pytest.mark.parametrize("scale", [0.0, 3.0, 40.0])
def test_sample_tokens_log_probabilities_agree_with_float64(shape, scale):
    logits = make_logits(shape, scale)
    draw = sample(jax.random.key(1), logits)
    assert isinstance(draw, TokenDraw) and all(x.shape == shape[:-1] for x in draw)
    np.testing.assert_allclose(draw.log_prob, at(log_softmax(logits), draw.token), rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(draw.log_normalizer, log_normalizer(logits), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(draw.log_prob, draw.log_proposal)


@pytest.mark.parametrize("size", [50, 262144])
def test_sample_tokens_with_mask_temperature_and_logits_agrees_with_float64(size):
    logits, other = make_logits((4, size)), make_logits((4, size), seed=1)
    mask = np.random.default_rng(2).random((4, size)) < 0.3
    temperature = np.array([0.3, 0.7, 1.5, 4.0], np.float32)
    for given_mask in (None, mask, mask[0]):
        for given_temperature in (1.0, 0.5, temperature):
            for proposal_logits in (None, other, other[0]):
                draw = sample_tokens(
                    jax.random.key(3),
                    logits,
                    mask=given_mask,
                    temperature=given_temperature,
                    proposal_logits=proposal_logits,
                )
                law = (
                    logits
                    if proposal_logits is None
                    else np.broadcast_to(other if other is proposal_logits else other[0], logits.shape)
                )
                law = np.asarray(law, np.float64) / np.broadcast_to(given_temperature, 4)[:, None]
                law = law if given_mask is None else np.where(given_mask, law, -INF)
                expected = at(log_softmax(law), draw.token)
                assert np.isfinite(expected).all()
                np.testing.assert_allclose(draw.log_proposal, expected, rtol=5e-6, atol=5e-6)
                np.testing.assert_allclose(draw.log_prob, at(log_softmax(logits), draw.token), rtol=5e-6, atol=5e-6)


def test_sample_tokens_frequencies_are_those_of_the_proposal_and_weights_lead_back():
    size, count = 3000, 40_000
    logits, mask = make_logits(size, 2.0), np.arange(size) % 7 != 0
    rows = functools.partial(jnp.broadcast_to, shape=(200, size))
    draw = jax.jit(
        lambda keys: jax.lax.map(
            lambda key: sample_tokens(key, rows(logits), mask=jnp.asarray(mask), temperature=1.7), keys
        )
    )(jax.random.split(jax.random.key(0), count // 200))
    tokens, groups = np.asarray(draw.token).ravel(), np.arange(size) % 20
    proposal = np.exp(log_softmax(np.where(mask, logits / 1.7, -INF)))
    expected = np.bincount(groups, proposal, 20)
    seen = np.bincount(groups[tokens], minlength=20) / count
    z = (seen - expected) / np.sqrt(expected * (1 - expected) / count)
    assert np.abs(z).max() < 5, z
    weights = np.exp(np.asarray(draw.log_prob - draw.log_proposal, np.float64)).ravel()
    allowed = np.exp(log_softmax(logits))[mask].sum()
    assert abs(weights.mean() - allowed) < 5 * weights.std() / np.sqrt(count)


def test_sample_tokens_mask_may_leave_only_what_is_far_below_the_top():
    """Every allowed weight would underflow relative to the row's largest logit."""
    logits = np.zeros((1, 1000), np.float32)
    logits[0, [400, 410]] = [-300.0, -301.0]
    mask = np.isin(np.arange(1000), [400, 410])
    tokens = [int(sample(jax.random.key(i), logits, mask=mask).token[0]) for i in range(40)]
    assert set(tokens) == {400, 410}
    draw = sample(jax.random.key(0), logits, mask=mask)
    expected = {400: -np.log1p(np.exp(-1)), 410: -1 - np.log1p(np.exp(-1))}[int(draw.token[0])]
    np.testing.assert_allclose(draw.log_proposal[0], expected, rtol=1e-6)


@pytest.mark.parametrize("level", [-1e4, 1e4, 1e30, -1e30])
def test_sample_tokens_takes_extreme_logits(level):
    logits = np.full((2, 1024), -INF, np.float32)
    logits[0, 700:] = level  # whole blocks before it are impossible
    logits[1, 3] = level
    draw = sample(jax.random.key(0), logits)
    assert draw.token[0] >= 700 and draw.token[1] == 3
    np.testing.assert_allclose(draw.log_prob, [-np.log(324), 0.0], rtol=1e-6)
    np.testing.assert_allclose(draw.log_normalizer, log_normalizer(logits), rtol=1e-6)


def test_sample_tokens_at_a_tiny_temperature_is_the_most_probable():
    logits = make_logits((5, 777))
    for temperature in (1e-4, 1e-30, np.float32(1e-30)):
        draw = sample(jax.random.key(0), logits, temperature=temperature)
        np.testing.assert_array_equal(draw.token, logits.argmax(-1))
        np.testing.assert_array_equal(draw.log_proposal, np.zeros(5))


def test_sample_tokens_accumulates_bfloat16_in_float32():
    half = jnp.asarray(make_logits((4, 49152))).astype(jnp.bfloat16)
    draw, wide = sample(jax.random.key(0), half), sample(jax.random.key(0), half.astype(jnp.float32))
    assert draw.log_prob.dtype == draw.log_normalizer.dtype == jnp.float32
    for a, b in zip(draw, wide, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sample_tokens_rows_without_a_choice_are_draws_of_weight_zero():
    logits = np.zeros((3, 300), np.float32)
    logits[1] = -INF
    draw = sample(jax.random.key(0), logits, mask=np.array([[True], [True], [False]]) & np.ones(300, bool))
    assert draw.token[1:].tolist() == [0, 0]
    assert draw.log_prob[1:].tolist() == [-INF, -INF]
    assert draw.log_proposal[1:].tolist() == [0, 0]
    np.testing.assert_allclose(draw.log_normalizer, [np.log(300), -INF, np.log(300)], rtol=1e-6)


@pytest.mark.parametrize("broken", [np.nan, INF])
@pytest.mark.parametrize("rest", [0.0, -INF])
@pytest.mark.parametrize("place", [0, 5, 299])
def test_sample_tokens_broken_rows_are_nan_and_leave_others_alone(broken, rest, place):
    logits = np.full((2, 300), rest, np.float32)
    logits[0, place], logits[1] = broken, 0.0
    draw = sample(jax.random.key(0), logits)
    assert draw.token[0] == 0 and np.isnan([x[0] for x in draw[1:]]).all()
    assert np.isfinite([x[1] for x in draw[1:]]).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, INF])
def test_sample_tokens_traced_temperature_out_of_range_is_nan(temperature):
    draw = sample(jax.random.key(0), np.zeros((1, 5), np.float32), temperature=jnp.float32(temperature))
    assert draw.token[0] == 0 and np.isnan(draw.log_proposal[0]) and np.isfinite(draw.log_prob[0])


def test_sample_tokens_repeats_itself_under_jit_vmap_scan_and_raw_keys():
    logits, key = make_logits((3, 1000)), jax.random.key(5)
    expected = sample_tokens(key, logits).token
    np.testing.assert_array_equal(sample(key, logits).token, expected)
    np.testing.assert_array_equal(sample(jax.random.key_data(key), logits).token, expected)
    scanned = jax.lax.scan(lambda c, k: (c, sample_tokens(k, logits).token), 0, key[None])[1]
    np.testing.assert_array_equal(scanned[0], expected)
    keys = jax.random.split(key, 3)
    mapped = jax.vmap(sample_tokens)(keys, logits)
    for row, one, token in zip(logits, keys, mapped.token, strict=True):
        assert int(sample_tokens(one, row).token) == int(token)


def test_token_log_prob_shares_its_sweep_with_the_draw():
    """One set of exponentials over the vocabulary in the compiled program, not two."""
    logits = make_logits((8, 49152))

    def separately(key, logits):
        uniforms = jax.random.uniform(key, (8, 2))
        token = invert_cdf(logits, uniforms)
        return token, token_log_prob(logits, token)

    def flops(function):
        return jax.jit(function).lower(jax.random.key(0), logits).compile().cost_analysis()["transcendentals"]

    assert flops(separately) < 1.2 * logits.size


def test_token_log_prob_gradient_is_the_score():
    logits = jnp.asarray(make_logits(600)).at[7].set(-INF)
    gradient = jax.grad(lambda logits: token_log_prob(logits, jnp.int32(2)))(logits)
    np.testing.assert_allclose(gradient, (np.arange(600) == 2) - np.exp(log_softmax(logits)), atol=1e-6)


@pytest.mark.parametrize("bad", [np.float32(0), np.zeros((2, 0), np.float32), np.zeros((2, 3), np.int32)])
def test_sample_tokens_refuses_other_logits(bad):
    with pytest.raises(ValueError, match="`logits` must be floats of shape"):
        sample_tokens(jax.random.key(0), bad)


def test_sample_tokens_refuses_arguments_that_do_not_fit():
    key, logits = jax.random.key(0), jnp.zeros((2, 5))
    with pytest.raises(TypeError, match="`mask` must be boolean.*int32"):
        sample_tokens(key, logits, mask=jnp.ones(5, jnp.int32))
    with pytest.raises(ValueError, match=r"`mask` must have shape \(5,\) or \(2, 5\).*got \(3, 5\)"):
        sample_tokens(key, logits, mask=jnp.ones((3, 5), bool))
    with pytest.raises(ValueError, match=r"`proposal_logits` must have shape.*got \(4,\)"):
        sample_tokens(key, logits, proposal_logits=jnp.zeros(4))
    with pytest.raises(ValueError, match=r"`temperature` must be a scalar or have shape \(2,\).*got \(3,\)"):
        sample_tokens(key, logits, temperature=jnp.ones(3))
    for temperature in (0, -1.0, np.nan, INF):
        with pytest.raises(ValueError, match="`temperature` must be positive and finite"):
            sample_tokens(key, logits, temperature=temperature)
    with pytest.raises(ValueError, match="`uniforms` must have shape"):
        invert_cdf(logits, jnp.zeros((3, 2)))


values = st.floats(-1e4, 1e4, width=32) | st.floats(-3, 3, width=32) | st.just(-INF)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(values, min_size=300, max_size=300),
    st.lists(st.booleans(), min_size=300, max_size=300),
    st.floats(2.0**-6, 2.0**6, width=32),
    st.integers(0, 2**31),
)
def test_sample_tokens_never_draws_what_cannot_be_drawn(logits, mask, temperature, seed):
    logits, mask = np.array(logits, np.float32), np.array(mask)
    draw = sample(jax.random.key(seed), logits, mask=mask, temperature=jnp.float32(temperature))
    token = int(draw.token)
    if (mask & (logits > -INF)).any():
        assert mask[token] and logits[token] > -INF
        assert np.isfinite(draw.log_prob) and draw.log_prob <= 0 and draw.log_proposal <= 0
    else:
        assert token == 0 and draw.log_prob == -INF
