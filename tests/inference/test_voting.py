"""Majority vote: what is elected, what is reported, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.inference import SMC, ImportanceSampling
from ppl.inference.voting import MajorityVote
from ppl.models import MarkovChain


def chain(probabilities, length=1):
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(probabilities, np.float32))
    return MarkovChain(logits, np.tile(logits, (len(logits), 1)), length)


def token(value):
    return int(value["tokens"][0])


def test_votes_are_the_weighted_shares_of_answers():
    programs = [chain([0.6, 0.3, 0.1]), chain([0.1, 0.8, 0.1]).tilt(lambda v: 1.0 * v["tokens"][0])]
    algorithm = ImportanceSampling(50)
    posterior = ppl.infer(programs[0], MajorityVote(token, programs[1:], algorithm), seed=4)
    shares = np.zeros(3)
    for program, key in zip(programs, jax.random.split(jax.random.key(4), 2), strict=True):
        run = algorithm(program.program(), key)
        for answer, weight in zip(np.asarray(run.value["tokens"])[:, 0], np.asarray(run.weights), strict=True):
            shares[answer] += weight / 2
    answers, votes = posterior.diagnostics["answers"], posterior.diagnostics["votes"]
    np.testing.assert_allclose(votes, shares[list(answers)], rtol=1e-5)
    assert list(votes) == sorted(votes, reverse=True) and answers[0] == int(np.argmax(shares))
    ballots = posterior.diagnostics["ballots"]
    np.testing.assert_array_equal(np.asarray(answers)[ballots], np.asarray(posterior.value["tokens"])[:, 0])
    np.testing.assert_array_equal(np.asarray(posterior.weights) > 0, ballots == 0)
    assert float(posterior.weights.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(posterior.ess) == pytest.approx(1 / np.sum(np.asarray(posterior.weights, np.float64) ** 2), rel=1e-4)


def test_one_program_elects_its_most_probable_answer():
    posterior = ppl.infer(chain([0.2, 0.5, 0.3]), MajorityVote(token, algorithm=SMC(2000)))
    assert posterior.diagnostics["answers"][0] == 1
    np.testing.assert_allclose(posterior.diagnostics["votes"], [0.5, 0.3, 0.2], atol=5 * 0.5 / np.sqrt(2000))
    assert np.unique(np.asarray(posterior.resample(0, 20).value["tokens"])).tolist() == [1]


def test_the_result_claims_nothing():
    vote = MajorityVote(token)
    posterior = ppl.infer(chain([0.5, 0.5]), vote)
    assert vote.guarantee == posterior.guarantee == "heuristic" and np.isnan(float(posterior.log_evidence))
    assert "MajorityVote(1 programs, ImportanceSampling" in repr(posterior)


def test_texts_are_what_processes_of_text_answer_by():
    class Letters(MarkovChain):
        def texts(self, value):
            return ["".join("ab"[t] for t in row) for row in np.asarray(value["tokens"])]

    logits = np.log(np.array([0.9, 0.1], np.float32))
    posterior = ppl.infer(Letters(logits, np.tile(logits, (2, 1)), 3), MajorityVote(str.upper, algorithm=SMC(64)))
    assert posterior.diagnostics["answers"][0] == "AAA"
    assert {t for t, w in zip(posterior.texts, posterior.weights, strict=True) if w > 0} == {"aaa"}


def test_particles_without_an_answer_do_not_vote():
    posterior = ppl.infer(chain([0.5, 0.3, 0.2]), MajorityVote(lambda v: token(v) or None, algorithm=SMC(500)))
    answers, votes = posterior.diagnostics["answers"], posterior.diagnostics["votes"]
    assert answers == (1, 2) and votes.sum() == pytest.approx(np.mean(posterior.diagnostics["ballots"] >= 0), rel=1e-5)
    silent = ppl.infer(chain([0.5, 0.5]), MajorityVote(lambda v: None, algorithm=SMC(8)))
    assert silent.diagnostics["answers"] == () and float(silent.ess) == pytest.approx(8.0)


def test_equal_votes_go_to_the_first_given():
    posterior = ppl.infer(chain([0.0, 1.0]), MajorityVote(token, [chain([1.0, 0.0])], ImportanceSampling(4)))
    assert posterior.diagnostics["answers"] == (1, 0)


def test_members_that_died_do_not_vote():
    dead = chain([0.5, 0.5]).tilt(lambda v: jnp.where(v["tokens"][0] < 0, 0.0, -jnp.inf))
    posterior = ppl.infer(dead, MajorityVote(token, [chain([1.0, 0.0])], ImportanceSampling(4)))
    assert posterior.diagnostics["answers"] == (0,) and posterior.diagnostics["votes"].tolist() == [1.0]
    with pytest.raises(ppl.AllParticlesDied):
        ppl.infer(dead, MajorityVote(token, [dead], ImportanceSampling(4)))


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="`answer` must be a function"):
        MajorityVote("42")
    with pytest.raises(TypeError, match="`algorithm` must be an algorithm object"):
        MajorityVote(token, algorithm=SMC)
    with pytest.raises(TypeError, match="`ensemble` must be a list of programs"):
        MajorityVote(token, chain([0.5, 0.5]))
    with pytest.raises(TypeError, match="expected a program or a process"):
        MajorityVote(token, [3])
    with pytest.raises(ValueError, match="`state` continues chains"):
        ppl.infer(chain([0.5, 0.5]), MajorityVote(token), state={})
    with pytest.raises(ValueError, match="values of one shape"):
        ppl.infer(chain([0.5, 0.5]), MajorityVote(token, [chain([0.5, 0.5], length=2)]))
    with pytest.raises(TypeError, match="counts votes on the host"):
        jax.jit(lambda key: ppl.infer(chain([0.5, 0.5]), MajorityVote(token), key=key))(jax.random.key(0))
