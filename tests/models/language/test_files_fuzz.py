"""Files changed at random: refused with a reason, or read right. `tests/fuzz/files.py` runs many more."""

from tests.fuzz import files


def test_changed_files_are_refused_with_a_reason_or_read_right():
    assert files.run(seconds=300, seed=0, max_cases=48) == 48
