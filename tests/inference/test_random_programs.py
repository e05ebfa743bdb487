"""A few random programs against the sum over their traces; `make fuzz` tries many."""

import pytest

from tests.fuzz.programs import run


@pytest.mark.parametrize("seed", [3, 4])
def test_algorithms_agree_with_enumeration_on_random_programs(seed):
    assert run(60, seed, max_cases=50) == 50
