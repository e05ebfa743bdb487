"""Weights of large populations, particle by particle; `python -m tests.large_populations` checks many more programs."""

import pytest

from tests.large_populations import STRUCTURES, assert_weights_are_densities, family_program, observed_program


@pytest.mark.optimized
@pytest.mark.parametrize(
    "names", [("Beta over an array", "StudentT", "Poisson", "Dirichlet", "MixtureSameFamily"), ("Gamma", "Binomial")]
)
def test_weights_of_a_large_population_are_the_densities_of_its_particles(names):
    assert_weights_are_densities(lambda: family_program(*names))


@pytest.mark.optimized
def test_weights_of_an_observation_alone_are_its_densities():
    assert_weights_are_densities(lambda: observed_program("Beta over an array"), 20_000)


@pytest.mark.optimized
def test_weights_of_loops_and_masks_are_the_densities_of_their_particles():
    assert_weights_are_densities(STRUCTURES["plates"])
