"""Text states: sharing the prompt, padding, free slots, unused slots, and what `vmap` makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppl.models.language import LanguageModel
from ppl.models.language.cache import write_slot

from .conftest import advance, spread

TOLERANCE = dict(rtol=2e-4, atol=2e-4)


def prompt_of(expected, name="llama3", length=11):
    return expected(name)["tokens"][:length]


def test_bucket_size_does_not_change_the_logits(tiny, expected):
    lm, tokens = tiny("llama3"), expected("llama3")["tokens"]
    full = lm.forward(tokens[:16])
    for length in (1, 2, 15, 16):  # one bucket
        state = lm.prefill(tokens[:length], max_tokens=1)
        assert state.prompt_keys.shape[1] == 16
        np.testing.assert_allclose(lm.next_token(state).logits, full[length - 1], **TOLERANCE)
    state = lm.prefill(tokens[:17], max_tokens=1)
    assert state.prompt_keys.shape[1] == 32
    np.testing.assert_allclose(lm.next_token(state).logits, lm.forward(tokens[:17])[16], **TOLERANCE)


def test_number_of_slots_does_not_change_the_logits(tiny, expected):
    lm, prompt = tiny("qwen3"), prompt_of(expected)
    few = lm.extend(lm.prefill(prompt, max_tokens=1), 7)
    many = lm.extend(lm.prefill(prompt, max_tokens=50), 7)
    grown = lm.extend(lm.prefill(prompt, max_tokens=0).reserve(2).reserve(3), 7)
    assert grown.slots == 5
    np.testing.assert_allclose(few.hidden, many.hidden, **TOLERANCE)
    np.testing.assert_allclose(few.hidden, grown.hidden, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_particles_share_the_prompt_and_go_their_own_way_under_vmap(tiny, expected, name):
    lm, prompt = tiny(name), prompt_of(expected, name)
    state = lm.prefill(prompt).enter_loop(1, 6)
    axes = state.particle_axes()
    texts = jax.random.randint(jax.random.key(0), (5, 6), 3, 128)
    population = spread(state, 5)
    extend = jax.jit(jax.vmap(lambda state, token: advance(lm, state, token), in_axes=(axes, 0), out_axes=axes))
    for t in range(6):
        population = extend(population, texts[:, t])
    assert population.prompt_keys.shape == state.prompt_keys.shape
    assert population.cursor.shape == () and population.cursor == 6
    for text, hidden in zip(texts, population.hidden, strict=True):
        logits = lm.forward(jnp.concatenate([prompt, text]))[-1]
        np.testing.assert_allclose(lm.next_token(dataclasses.replace(state, hidden=hidden)).logits, logits, **TOLERANCE)


def test_unused_slot_is_ignored_whatever_it_holds(tiny, expected):
    lm, prompt = tiny("llama3"), prompt_of(expected)
    state = lm.extend(lm.prefill(prompt, max_tokens=4), 9)
    direct = lm.extend(state, 30)
    # A particle that waits: the others' cursor moves on, its own slot 1 stays unused and holds anything.
    waited = dataclasses.replace(
        state, cursor=state.cursor + 1, keys=state.keys.at[:, 1].set(1e3), values=state.values.at[:, 1].set(-1e3)
    )
    later = lm.extend(waited, 30)
    assert later.valid.tolist() == [True, False, True, False]
    assert int(later.position) == int(direct.position) == len(prompt) + 2
    np.testing.assert_allclose(later.hidden, direct.hidden, **TOLERANCE)


def test_extend_returns_the_prompts_leaves_as_they_are(tiny, expected):
    lm = tiny("llama3")
    state = lm.prefill(prompt_of(expected), max_tokens=2)
    after = lm.extend(state, 3)
    for name in ("prompt_keys", "prompt_values", "prompt_length"):
        assert getattr(after, name) is getattr(state, name)

    def identical(state, token):
        after = lm.extend(state, token)
        assert after.prompt_keys is state.prompt_keys and after.prompt_length is state.prompt_length
        return after.hidden

    jax.make_jaxpr(identical)(state, jnp.int32(3))


def test_scratch_has_the_states_structure_and_names_caches_and_cursor(tiny, expected):
    state = tiny("llama3").prefill(prompt_of(expected), max_tokens=2)
    scratch = state.scratch()
    assert jax.tree.structure(scratch) == jax.tree.structure(state)
    named = {field.name for field in dataclasses.fields(scratch) if getattr(scratch, field.name) is True}
    assert named == {"keys", "values", "cursor"}


def test_reserve_beyond_the_context_names_the_numbers(tiny, expected):
    state = tiny("llama3").prefill(prompt_of(expected), max_tokens=10)
    assert state.reserve(0) is state
    with pytest.raises(ValueError, match="context holds 128 tokens, and 107 places are left; 108 more do not fit"):
        state.reserve(108)
    with pytest.raises(ValueError, match="`slots` must be at least 0, got -1"):
        state.reserve(-1)


def test_extend_makes_room_outside_of_loops_until_the_context_is_full(tiny):
    lm = tiny("llama3")
    state = lm.prefill([3] * 110)
    for _ in range(18):
        state = lm.extend(state, 3)
    assert state.slots == 18 and bool(jnp.isfinite(state.hidden).all())
    with pytest.raises(ValueError, match="context holds 128 tokens, and 0 places are left"):
        lm.extend(state, 3)


def test_reading_more_than_a_loop_was_entered_for_is_refused_and_never_kept(tiny):
    lm = tiny("llama3")
    state = advance(lm, lm.prefill([3] * 5).enter_loop(1, 1), 3)
    assert bool(jnp.isfinite(state.hidden).all())
    with pytest.raises(ValueError, match="lm.extend: all 1 slots of this state are written"):
        advance(lm, state, 3)
    assert bool(jnp.isnan(jax.jit(lambda state: advance(lm, state, 3).hidden)(state)).all())  # an invalid weight


@pytest.mark.parametrize(
    "batched", [(True, True, False), (True, True, True), (False, True, False), (True, False, False)]
)
def test_write_slot_means_the_same_under_vmap(batched):
    cache, entry, slot = batched
    key = jax.random.key(0)
    caches = jax.random.normal(key, (3, 2, 4, 1, 5))
    entries = jax.random.normal(key, (3, 1, 5))
    slots = jnp.array([0, 2, 3])
    arguments = [caches if cache else caches[0], entries if entry else entries[0], 1, slots if slot else slots[1]]
    axes = (0 if cache else None, 0 if entry else None, None, 0 if slot else None)
    got = jax.vmap(write_slot, in_axes=axes)(*arguments)
    for n in range(3):
        one = [caches[n if cache else 0], entries[n if entry else 0], slots[n if slot else 1]]
        np.testing.assert_array_equal(got[n], one[0].at[1, one[2]].set(one[1]))


def test_decoding_loop_copies_no_cache_and_no_weights(tiny, expected):
    """The compiled loop of a population writes its caches in place; the kernels are read where they are."""
    lm, population = tiny("llama2"), 6
    state = lm.prefill(prompt_of(expected)).enter_loop(1, 40)
    axes = state.particle_axes()
    graph, weights = nnx.split(tiny("llama2").decoder)

    def run(weights, state, keys):
        lm = LanguageModel(nnx.merge(graph, weights), None)
        step = jax.vmap(
            lambda state, key: advance(lm, state, lm.next_token(state).sample(key)), in_axes=(axes, 0), out_axes=axes
        )
        return jax.lax.scan(lambda state, keys: (step(state, keys), None), spread(state, population), keys)[0].hidden

    keys = jax.random.split(jax.random.key(0), (4, population))
    text = jax.jit(run).lower(weights, state, keys).compile().as_text()
    cache = f"f32[{population},{','.join(map(str, state.keys.shape))}]"
    kernel = f"f32[{lm.config.hidden_size},{2 * lm.config.intermediate_size}]"
    body = text[: text.index("\nENTRY ")]  # the entry copies the caches once, since a caller's arguments stay his
    for shape in (cache, kernel):
        assert not [
            line for line in body.splitlines() if f"= {shape}" in line and (" copy(" in line or "transpose(" in line)
        ]
