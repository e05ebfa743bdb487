"""Branches of a text's state: each reads on by itself, wherever it is made, and has room for what it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC
from ppl.models.language.cache import Room

START, TOKENS, QUESTION = [3, 4, 5], [5, 9, 30, 41], [10, 11, 12]
STOP = -7.0  # a log-probability that some texts of the test pass on the way
TOLERANCE = dict(rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module")
def lm(one_block):
    return one_block


def after(lm, *parts):
    """The logits after a text that is read at once."""
    return np.asarray(lm.next_token(lm.prefill([token for part in parts for token in part])).logits)


def read(lm, state, tokens):
    for token in tokens:
        state = lm.extend(state, token)
    return state


def logits(lm, state):
    return lm.next_token(state).logits


def prefixes(tokens):
    return [tokens[:t] for t in range(len(tokens))]


def test_branch_in_every_iteration_has_room_for_what_it_reads(lm):
    @ppl.model
    def program():
        def step(state, token):
            branch = read(lm, state, QUESTION)
            deeper = read(lm, branch, [20])  # a branch of a branch
            state = lm.extend(state, token)
            return state, (logits(lm, branch), logits(lm, deeper), logits(lm, read(lm, state, [50])), state)

        last, (asked, deeper, late, kept) = ppl.scan(step, lm.prefill(START), jnp.array(TOKENS))
        again = read(lm, last, QUESTION)  # after the loop, and both go on
        second = jax.tree.map(lambda leaf: leaf[1], kept)  # one that was put out in the loop
        ends = [logits(lm, read(lm, s, [60, 61])) for s in (again, last, second)]
        return {"asked": asked, "deeper": deeper, "late": late, "ends": ends}

    value = ppl.simulate(program()).value
    for t, before in enumerate(prefixes(TOKENS)):
        np.testing.assert_allclose(value["asked"][t], after(lm, START, before, QUESTION), **TOLERANCE)
        np.testing.assert_allclose(value["deeper"][t], after(lm, START, before, QUESTION, [20]), **TOLERANCE)
        np.testing.assert_allclose(value["late"][t], after(lm, START, TOKENS[: t + 1], [50]), **TOLERANCE)
    texts = [TOKENS + QUESTION, TOKENS, TOKENS[:2]]
    for end, text in zip(value["ends"], texts, strict=True):
        np.testing.assert_allclose(end, after(lm, START, text, [60, 61]), **TOLERANCE)


def test_nested_loops_read_branches_and_the_text_itself(lm):
    def block(state, tokens):
        return ppl.scan(lambda s, token: (lm.extend(s, token), None), state, jnp.array(tokens))[0]

    @ppl.model
    def program():
        outside = lm.prefill([7, 8])

        def inner(state, token):
            asked = logits(lm, block(read(lm, state, [20]), QUESTION))
            return lm.extend(state, token), asked

        def outer(state, token):
            _, dropped = ppl.scan(inner, read(lm, state, [25]), jnp.array([30, 31]))  # two deep, and dropped
            other = logits(lm, lm.extend(outside, token))  # of a text from outside of both loops
            state = block(lm.extend(state, token), [40, 41])
            return state, (dropped, other)

        last, (dropped, other) = ppl.scan(outer, lm.prefill(START), jnp.array(TOKENS[:2]))
        return dropped, other, logits(lm, lm.extend(last, 6))

    dropped, other, last = ppl.simulate(program()).value
    text = []
    for t in range(2):
        for i, inner in enumerate(([], [30])):
            expected = after(lm, START, text, [25], inner, [20], QUESTION)
            np.testing.assert_allclose(dropped[t, i], expected, **TOLERANCE)
        np.testing.assert_allclose(other[t], after(lm, [7, 8], TOKENS[t : t + 1]), **TOLERANCE)
        text += [TOKENS[t], 40, 41]
    np.testing.assert_allclose(last, after(lm, START, text, [6]), **TOLERANCE)


def test_carry_may_take_a_branch_exchange_two_texts_or_begin_anew(lm):
    """The texts of a carry change places at other depths, and one begins again from outside in every iteration."""

    @ppl.model
    def program():
        deep = read(lm, lm.prefill(START), [30, 31, 32])

        def step(carry, token):
            one, other, fresh = carry
            lost = read(lm, one, QUESTION)
            return (read(lm, other, [token, 7]), one, lm.extend(deep, token)), logits(lm, lost)

        init = (lm.prefill(START), deep, lm.prefill(START))
        carry, lost = ppl.scan(step, init, jnp.array(TOKENS[:3]))
        return [logits(lm, read(lm, state, [8, 8])) for state in carry], lost

    ends, lost = ppl.simulate(program()).value
    deep, a, b, c = [30, 31, 32], *TOKENS[:3]
    one = [[], deep + [a, 7], [b, 7]]  # the first place before each iteration
    texts = [deep + [a, 7, c, 7], [b, 7], deep + [c]]
    for t in range(3):
        np.testing.assert_allclose(lost[t], after(lm, START, one[t], QUESTION), **TOLERANCE)
    for end, text in zip(ends, texts, strict=True):
        np.testing.assert_allclose(end, after(lm, START, text, [8, 8]), **TOLERANCE)


def test_particles_branch_where_they_are_resampled_and_wait(lm):
    """Drawn tokens, a branch in the step and one that says when to stop, resampling in every iteration."""
    steps = 5

    @ppl.model
    def program():
        def step(state, _):
            asked = lm.next_token(read(lm, state, QUESTION)).log_prob(7)
            token = ppl.sample("token", lm.next_token(state))
            ppl.factor("prefer", jnp.where(token > 60, 1.0, 0.0))
            return lm.extend(state, token), (token, asked)

        def stop(state):  # a branch of three tokens, also after the last iteration
            return lm.next_token(read(lm, state, [90, 91])).log_prob(7) > STOP

        last, (tokens, asked) = ppl.scan(step, lm.prefill(START), length=steps, until=stop)
        return tokens, asked, lm.next_token(read(lm, last, [10, 11])).log_prob(7)

    posterior = ppl.infer(program(), SMC(8, ess_threshold=1.0), seed=0)
    present = np.asarray(posterior.present["token"])
    assert 0 < present.sum() < present.size  # some waited
    for tokens, asked, last, counts in zip(*map(np.asarray, posterior.value), present, strict=True):
        text = tokens[counts].tolist()
        for t, prefix in enumerate(prefixes(text)):
            law = jax.nn.log_softmax(after(lm, START, prefix, QUESTION))
            np.testing.assert_allclose(asked[t], law[7], **TOLERANCE)
            assert jax.nn.log_softmax(after(lm, START, prefix, [90, 91]))[7] <= STOP + 1e-3
        np.testing.assert_allclose(last, jax.nn.log_softmax(after(lm, START, text, [10, 11]))[7], **TOLERANCE)
        np.testing.assert_array_equal(asked[~counts], 0)


def test_branches_of_a_process_inside_a_model(lm):
    @ppl.model
    def asking(token):
        state = lm.extend(lm.prefill(START), token)

        def step(state, token):
            return lm.extend(state, token), logits(lm, read(lm, state, QUESTION))

        return ppl.scan(step, state, jnp.array(TOKENS[:2]))

    @ppl.model
    def program():
        def step(_, token):
            state, asked = ppl.generate(asking(token))
            return None, (asked, logits(lm, read(lm, state, [20] * 3)))

        return ppl.scan(step, None, jnp.array([60, 61]))[1]

    asked, ends = ppl.simulate(program()).value
    for t, token in enumerate((60, 61)):
        for i in range(2):
            np.testing.assert_allclose(asked[t, i], after(lm, START, [token], TOKENS[:i], QUESTION), **TOLERANCE)
        np.testing.assert_allclose(ends[t], after(lm, START, [token], TOKENS[:2], [20] * 3), **TOLERANCE)


# What has no room ----------------------------------------------------------------------------------------------------


def stage(step, state, length):
    @ppl.model
    def program():
        return ppl.scan(step, state() if callable(state) else state, length=length)[1]

    return program().stage()


def test_text_that_exceeds_the_context_is_refused_while_staging(lm):
    def further(state, _):
        return lm.extend(state, 3), None

    def asking(state, _):
        return state, logits(lm, read(lm, state, QUESTION))

    stage(further, lambda: lm.prefill([3] * 100), 28)
    with pytest.raises(ValueError, match="scan of 29 iterations .* lm.extend .* 128 tokens, and 28 places are left"):
        stage(further, lambda: lm.prefill([3] * 100), 29)
    with pytest.raises(ValueError, match="scan of 29 iterations"):
        stage(further, lm.prefill([3] * 100), 29)  # read before, outside of the model

    @ppl.model
    def given(state):
        return ppl.scan(further, state, length=29)[0].hidden

    with pytest.raises(ValueError, match="scan of 29 iterations"):
        given(lm.prefill([3] * 100)).stage()
    stage(asking, lambda: lm.prefill([3] * 125), 50)  # many branches, none of them longer than the context
    with pytest.raises(
        ValueError, match="lm.extend: the model's context holds 128 tokens, and 0 places are left; 1 more"
    ):
        stage(asking, lambda: lm.prefill([3] * 126), 50)

    def both(state, _):
        asked = logits(lm, read(lm, state, QUESTION))
        return lm.extend(state, 3), asked

    stage(both, lambda: lm.prefill([3] * 100), 26)
    with pytest.raises(ValueError, match="lm.extend: the model's context holds 128 tokens"):
        stage(both, lambda: lm.prefill([3] * 100), 27)


def test_loop_of_jax_is_refused_with_the_room(lm):
    for slots in (0, 6):
        state = lm.prefill(START, max_tokens=slots)
        with pytest.raises(
            TypeError,
            match="room for 5 more tokens: lm.extend takes one; ppl.scan makes room"
            if slots
            else "ppl.scan makes room",
        ):
            jax.jit(lambda state: jax.lax.scan(lambda s, t: (lm.extend(s, t), None), state, jnp.array(TOKENS)))(state)


def test_bad_tokens_are_refused(lm):
    state = lm.prefill(START)
    with pytest.raises(ValueError, match=r"lm.extend: `token` must be one token, .* got shape \(4,\); .* ppl.scan"):
        lm.extend(state, jnp.array(TOKENS))
    with pytest.raises(ValueError, match=r"got shape \(1,\)"):
        jax.make_jaxpr(lm.extend)(state, jnp.array([3]))
    with pytest.raises(TypeError, match="`token` must be an integer, got float"):
        lm.extend(state, 3.0)
    with pytest.raises(TypeError, match="`token` must be an integer, got bool"):
        lm.extend(state, True)
    for token in (128, -1):
        with pytest.raises(ValueError, match=rf"`token` must be in \[0, 128\), got {token}"):
            lm.extend(state, token)


def test_states_of_other_prompts_are_alike_and_their_room_is_not(lm):
    one, other = lm.prefill(START), lm.prefill([*START, 6])
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert one.room == Room(0) and one.room != Room(1) and hash(one.room) == hash(Room(0, 9))
    assert (one.room.prompt, other.room.prompt) == (3, 4)
