"""Checks of algorithms, proposals and kernels, yours included."""

from ppl.testing.proper_weighting import assert_properly_weighted as assert_properly_weighted
from ppl.testing.tape import enumerate_runs as enumerate_runs
from ppl.testing.tape import enumerating as enumerating
