"""Every public algorithm and kernel: what it prints, under 64-bit numbers too, and that nothing it returns is NaN."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl.guarantees import has_evidence
from ppl.inference import (
    HMC,
    MCMC,
    SMC,
    SMC2,
    BackwardSmoothing,
    ImportanceSampling,
    MajorityVote,
    PaRIS,
    ParticleGibbs,
    Regenerate,
    Sequence,
    SuffixMH,
    TemperedSMC,
)
from tests.inference.every_algorithm import CASES, Case, chosen, hidden, text

ON_THE_HOST = ("AdaptiveImportanceSampling", "MajorityVote")  # they decide on the way, so that they must be run
NO_RUN = {"LearnedTwist", "Sandwich", "SuperposedAnd"}  # a twist, a result; the last is a case without being a part


def parts(value):
    """The classes of an algorithm and of all that it is made of."""
    found = {type(value).__name__}
    if isinstance(value, tuple):
        return found.union(*map(parts, value))
    if dataclasses.is_dataclass(value):
        return found.union(*(parts(getattr(value, field.name)) for field in dataclasses.fields(value)))
    return found


def test_every_public_algorithm_kernel_and_part_has_a_case():
    classes = {name for name in ppl.inference.__all__ if inspect.isclass(getattr(ppl.inference, name))}
    assert classes - NO_RUN <= set().union(*(parts(case.algorithm) for case in CASES.values()))


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_it_promises_and_computes_with_64_bits(name):
    case = CASES[name]
    with jax.enable_x64(True):
        program = case.program()
        if name in ON_THE_HOST:
            posterior = ppl.infer(program, case.algorithm)
            assert f"guarantee: {case.guarantee}" in repr(posterior)
        else:  # types that do not fit show where a run is traced: nothing need be compiled
            posterior = jax.eval_shape(
                lambda key: ppl.infer(program, case.algorithm, key=key, progress=False), jax.random.key(0)
            )
    assert posterior.guarantee == case.guarantee
    assert posterior.log_weights.dtype in ("float64", "float32")


@pytest.mark.parametrize("name", ["SMC2", "TemperedSMC, adaptive", "PMMH"])
def test_what_failed_with_64_bits_runs(name):
    case = CASES[name]
    with jax.enable_x64(True):
        posterior = ppl.infer(case.program(), case.algorithm)
        assert f"guarantee: {case.guarantee}" in repr(posterior)
        assert all(site.dtype == "float64" for site in posterior.sites.values())
    assert_numbers(posterior)


# Nothing is NaN ------------------------------------------------------------------------------------------------------


@ppl.model
def stopping(y):
    """A loop that a trace leaves at a time of its own, missing data, and a latent that is masked in part."""
    level = ppl.sample("level", dist.Normal(0.0, 1.0))
    ppl.sample("padded", dist.Normal(level * jnp.ones(2), 1.0).mask(jnp.array([True, False])))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + level, 1.0))
        ppl.observe("y", dist.Normal(x, 0.5).mask(~jnp.isnan(y)), y)
        return x, x

    return ppl.scan(step, 0.0, y, until=lambda x: x > 0.5)[1]


def interrupted():
    return stopping(jnp.array([0.1, jnp.nan, 0.4]))


def symbols():
    return hidden(jnp.array([0, 1, 1]))


MOVES = Sequence(Regenerate("level"), SuffixMH(), ParticleGibbs(SMC(2), sites="x"), HMC(0.3, 2, sites="padded"))

RUNS = {
    "importance sampling, stopping": Case(ImportanceSampling(8), interrupted, "unbiased"),
    "moves now and then, stopping": Case(
        SMC(8, rejuvenation=Regenerate(), rejuvenate_every=2), interrupted, "unbiased"
    ),
    "tempered, stopping": Case(TemperedSMC(8, SuffixMH(), max_steps=3), interrupted, "consistent"),
    "SMC squared, stopping": Case(SMC2(4, SMC(2), "level", scale=0.5, move_every=2), interrupted, "unbiased"),
    "chains, stopping": Case(MCMC(MOVES, 3, 1, num_chains=2), interrupted, "invariant"),
    "text": Case(SMC(4, rejuvenation=SuffixMH(), rejuvenate_every=2), text, "unbiased"),
    "chains of text": Case(MCMC(SuffixMH(), 3), text, "invariant"),
    "votes": Case(MajorityVote(lambda value: int(value["tokens"][0]), algorithm=SMC(4)), text, "heuristic"),
    "PaRIS": Case(PaRIS(SMC(4), chosen), symbols, "unbiased"),
    "backward": Case(BackwardSmoothing(SMC(4)), symbols, "consistent"),
}


def assert_numbers(posterior):
    """Check that no float among sites, value and diagnostics is NaN, but for estimates of log Z where there is none."""
    diagnostics = dict(posterior.diagnostics)
    if not has_evidence(posterior.guarantee):
        assert np.isnan(posterior.log_evidence)
        assert np.all(np.isnan(diagnostics.pop("log_evidence", jnp.nan)))
    held = {"sites": posterior.sites, "value": posterior.value, "diagnostics": diagnostics}
    for path, leaf in jax.tree_util.tree_leaves_with_path(held):
        if np.issubdtype(np.asarray(leaf).dtype, np.floating):
            assert not np.isnan(leaf).any(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_ends_well_holds_no_nan(name):
    case = RUNS[name]
    posterior = ppl.infer(case.program(), case.algorithm)
    assert posterior.guarantee == case.guarantee and bool(posterior.status.ok)
    assert_numbers(posterior)
    if "moved" in posterior.diagnostics:
        moved, rate = (np.asarray(posterior.diagnostics[figure]) for figure in ("moved", "acceptance"))
        np.testing.assert_array_equal(moved, np.arange(1, len(moved) + 1) % 2 == 0)
        assert np.all(rate[~moved] == 0)
