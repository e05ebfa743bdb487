"""Twists with a memory: their formulas, and that what they add is taken out again in every run."""

import numpy as np
import pytest

import ppl
from ppl.inference import SMC
from ppl.models import MarkovChain
from ppl.testing import assert_properly_weighted

GUESSES = np.array([0.5, -1.0, 0.7, 0.2])


@pytest.mark.parametrize(
    "form, expected",
    [
        ("difference", GUESSES),
        ("max", np.cumsum(np.maximum.accumulate(GUESSES))),
        ("sum", np.cumsum(np.cumsum(GUESSES))),
    ],
)
def test_the_twist_adds_up_the_potentials_of_its_form(form, expected):
    twist, memory, found = ppl.steering(lambda state: 0.0, form), None, []
    for guess in GUESSES:
        memory, psi = twist.remember(memory, guess)
        found.append(psi)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("form", ["max", "sum"])
def test_what_it_adds_on_the_way_is_taken_out_at_the_end(form):
    rng = np.random.default_rng(0)
    chain = MarkovChain(*(rng.normal(size=s).astype(np.float32) for s in (2, (2, 2))), 2)
    target = chain.tilt(lambda value: 0.5 * value["tokens"].sum())
    twist = ppl.steering(lambda state: 0.7 * state["tokens"][0] - 0.4 * state["tokens"][1], form)
    assert_properly_weighted(target, SMC(2, ess_threshold=1.0, twist=twist))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="'difference', 'max', 'sum', got 'last'"):
        ppl.steering(lambda state: 0.0, "last")
    with pytest.raises(TypeError, match="`function` must be a function.*got float"):
        ppl.steering(0.5)
