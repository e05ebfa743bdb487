"""What a masked diffusion model is built of, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ppl
from ppl.inference import SMC
from ppl.models.masked import Blocks, LeftToRight, MaskedDiffusion, MostConfident, Random, Remasking
from ppl.models.masked.schedule import plan


def flat(tokens, shift=0.0):
    return jnp.zeros((tokens.shape[0], 5)) + shift


def test_conditions_are_bound_by_name():
    def denoiser(tokens, label):
        return jnp.where(jnp.arange(5) == label, 0.0, -jnp.inf) + jnp.zeros((tokens.shape[0], 1))

    model = MaskedDiffusion(denoiser, 4, 5)
    posterior = ppl.infer(model.given(label=3).reverse(2), SMC(2))
    assert np.all(np.asarray(posterior.value["tokens"]) == 3)


def test_modules_are_denoisers():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.table, self.head = nnx.Embed(6, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, tokens):
            return self.head(self.table(tokens) + jnp.mean(self.table(tokens), axis=0))

    posterior = ppl.infer(MaskedDiffusion(Network(nnx.Rngs(0)), 3, 5).reverse(3) ** 2, SMC(4))
    assert posterior.value["tokens"].shape == (4, 3) and np.isfinite(posterior.log_evidence)


def test_the_mask_of_the_vocabulary_is_never_drawn():
    model = MaskedDiffusion(lambda tokens: jnp.where(jnp.arange(5) == 2, 9.0, 0.0) + flat(tokens), 4, 5, mask_token=2)
    tokens = np.asarray(ppl.infer(model.reverse(2), SMC(64)).value["tokens"])
    assert set(np.unique(tokens)) == {0, 1, 3, 4}
    assert np.isneginf(model.log_probs(jnp.zeros(4, jnp.int32))[:, 2]).all()


@pytest.mark.parametrize(
    "policy, schedule, size",
    [
        (Random(), "linear", 3),
        (Random(fixed=True), "cosine", None),
        (LeftToRight(), "linear", 3),
        (LeftToRight(), "cosine", None),
        (MostConfident(0.3), "cosine", None),
    ],
)
def test_every_schedule_ends_without_masks(policy, schedule, size):
    model = MaskedDiffusion(flat, 7, 5)
    chosen = policy if size is None else policy.blocks(size)
    remask = None if policy.looks else Remasking(0.4)
    tokens = np.asarray(ppl.infer(model.reverse(6, chosen, schedule=schedule, remask=remask), SMC(8)).value["tokens"])
    assert tokens.max() < 5


def test_blocks_are_finished_one_after_the_other():
    process = MaskedDiffusion(flat, 6, 5).reverse(6, Random(fixed=True).blocks(2))
    posterior = ppl.infer(process.watch("masks", lambda state: state["masked"]), SMC(16))
    masked = np.asarray(posterior.sites["masks"])
    for step in range(6):
        assert np.all(masked[:, step].sum(axis=1) == 5 - step)
        assert not masked[:, step, : 2 * ((step + 1) // 2)].any()
        assert masked[:, step, 2 * ((step + 2) // 2) :].all()


def test_schedules_follow_their_formulas():
    linear = plan(10, 4)
    assert (10 - linear.masked_after).tolist() == [3, 6, 8, 10] and linear.most == 3
    np.testing.assert_allclose(linear.unmask, [1 / 4, 1 / 3, 1 / 2, 1], rtol=1e-6)
    cosine = plan(10, 4, schedule="cosine")
    share = np.sin(np.pi / 2 * np.array([1.0, 0.75, 0.5, 0.25, 0.0]))
    np.testing.assert_allclose(cosine.unmask, (share[:-1] - share[1:]) / share[:-1], rtol=1e-6)
    given = plan(6, 4, schedule=(2, 1), block_size=3)
    assert given.masked_after.tolist() == [1, 0, 1, 0] and given.block.tolist() == [0, 0, 1, 1]
    capped = plan(10, 4, remasking=Remasking(0.9))
    np.testing.assert_allclose(capped.remask, [0.0, 0.9, 0.5, 0.0], rtol=1e-6)
    alpha, now, then = 0.25, 0.75, 0.5
    np.testing.assert_allclose(capped.unmask[1], ((1 - then) - (1 - 0.9) * alpha) / now, rtol=1e-6)
    loop = plan(10, 10, remasking=Remasking(0.2, window=(0.6, 0.3)))
    np.testing.assert_allclose(loop.remask, [0] * 4 + [0.2] * 3 + [0] * 3, rtol=1e-6)
    np.testing.assert_allclose(loop.unmask[4:7], 0.2 * 0.4 / 0.6, rtol=1e-6)


def test_masking_again_keeps_the_schedule_on_average():
    """The share of masks after each step is m(s), whatever sigma."""
    process = MaskedDiffusion(flat, 40, 5).reverse(8, remask=0.3)
    posterior = ppl.infer(process.watch("masks", lambda state: state["masked"]), SMC(500, ess_threshold=0.0))
    share = np.asarray(posterior.sites["masks"], np.float64).mean(axis=(0, 2))
    expected = 1 - np.arange(1, 9) / 8
    assert np.all(np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-12)


def test_network_calls_are_counted():
    process = MaskedDiffusion(flat, 4, 5).reverse(3)
    assert process.network_calls() == 3


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: MaskedDiffusion(3, 4, 5), TypeError, "`denoiser` must be a function"),
        (lambda: MaskedDiffusion(flat, 0, 5), ValueError, "`length` must be at least 1, got 0"),
        (lambda: MaskedDiffusion(flat, 4.0, 5), TypeError, "`length` must be a whole number"),
        (lambda: MaskedDiffusion(flat, 4, 1, mask_token=0), ValueError, "nothing is left to draw"),
        (lambda: MaskedDiffusion(flat, 4, 5, end_tokens=(5,)), ValueError, r"`end_tokens` must be .* got \[5\]"),
        (lambda: MaskedDiffusion(flat, 4, 6).reverse(2), ValueError, r"shape \(4, 6\), got \(4, 5\)"),
        (lambda: MaskedDiffusion(flat, 4, 5).reverse(0), ValueError, "`num_steps` must be at least 1"),
        (lambda: MaskedDiffusion(flat, 4, 5).reverse(2, "best"), ValueError, "`policy` must be one of 'random'"),
        (lambda: MaskedDiffusion(flat, 4, 5).reverse(2, 3), TypeError, "`policy` must be a name or a policy"),
        (lambda: MaskedDiffusion(flat, 4, 5).reverse(2, schedule="fast"), ValueError, "`schedule` must be 'linear'"),
        (lambda: MaskedDiffusion(flat, 4, 5).reverse(2, schedule=(3, 2)), ValueError, "sum to the block's size 4"),
        (lambda: MaskedDiffusion(flat, 4, 5).reverse(3, Random().blocks(2)), ValueError, "multiple of the number of"),
        (lambda: MaskedDiffusion(flat, 4, 5).reverse(2, remask=1.5), ValueError, r"`cap` must be a number in \(0, 1\]"),
        (lambda: MaskedDiffusion(flat, 4, 5).reverse(2, remask="cap"), TypeError, "`remask` must be a number"),
        (lambda: MaskedDiffusion(flat, 4, 5).reverse(2, "most_confident", remask=0.1), ValueError, "sees only which"),
        (lambda: Remasking(0.1, window=(0.2, 0.4)), ValueError, r"`window` must be \(on, off\)"),
        (lambda: plan(4, 2, remasking=Remasking(0.1, (0.6, 0.5))), ValueError, "holds none of 2 steps"),
        (lambda: MostConfident(-1.0), ValueError, "`temperature` must be a finite number"),
        (lambda: Random().blocks(0), ValueError, "`size` must be an int of at least 1"),
        (lambda: Blocks(Random().blocks(2), 2), TypeError, "a policy without blocks"),
        (lambda: MaskedDiffusion(flat, 4, 5).after("Hi"), ValueError, "the model has no tokenizer"),
        (lambda: MaskedDiffusion(flat, 4, 5).after([1, 9]), ValueError, r"`prompt` must hold tokens .* got \[9\]"),
    ],
)
def test_bad_input_is_refused_by_name(build, error, message):
    with pytest.raises(error, match=message):
        build()
