"""What runs promise: one rule for programs, targets, parts and algorithms, and what a user's own parts make of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ppl
from ppl import chance
from ppl.guarantees import GUARANTEES, promised
from ppl.inference import (
    HMC,
    MCMC,
    MH,
    NUTS,
    PMMH,
    SMC,
    SMC2,
    BackwardSmoothing,
    EntropicAnnealing,
    ImportanceSampling,
    KernelRatio,
    Langevin,
    Lookahead,
    MajorityVote,
    Mixture,
    ParallelTempering,
    PaRIS,
    ParisianGibbs,
    ParticleGibbs,
    Regenerate,
    Repeat,
    ReplicaExchange,
    Sequence,
    SuffixMH,
    TemperedSMC,
    evidence_variance,
    expectation_error,
    resampler,
    sandwich,
)
from ppl.inference.trace_kernel import Moves, TraceKernel
from ppl.kernels import resampling
from ppl.models import GaussianMixture, MarkovChain, VarianceExploding
from ppl.posterior import Status
from ppl.testing import assert_invariant, assert_properly_weighted
from tests.finite_programs import hidden_markov

SYMBOLS = jnp.array([0, 1, 1])


def best(key, log_weights, num):
    """The heaviest half, twice: what no look at a function tells from a fair scheme."""
    order = jnp.argsort(-log_weights)
    return order[jnp.arange(num) % (num // 2)].astype(jnp.int32)


def fair(key, log_weights, num):
    keys = jax.random.split(key, num)
    return jnp.stack([chance.categorical(k, log_weights) for k in keys])


def fair_conditional(key, log_weights, retained, num):
    return fair(key, log_weights, num).at[0].set(retained)


def infer(algorithm, program=None):
    return ppl.infer(hidden_markov(SYMBOLS) if program is None else program, algorithm)


def promise(algorithm, program=None):
    """What the posterior will say; nothing is compiled for it."""
    program = hidden_markov(SYMBOLS) if program is None else program
    return jax.eval_shape(lambda key: ppl.infer(program, algorithm, key=key), jax.random.key(0)).guarantee


# The rule ------------------------------------------------------------------------------------------------------------


def test_the_weakest_part_decides():
    exact = ("unbiased", "invariant")
    for i, first in enumerate(GUARANTEES):
        for second in GUARANTEES[i:]:
            for chain in (False, True):
                expected = exact[chain] if second in exact else second
                assert promised(first, second, chain=chain) == promised(second, first, chain=chain) == expected
    assert promised(None, "unbiased", SMC(2)) == promised() == "unbiased"
    assert promised(object(), "unbiased") == "assumed" and promised(object(), "heuristic") == "heuristic"


def test_a_promise_of_another_name_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Sure(SMC):
        guarantee = "certain"

    with pytest.raises(ValueError, match="'unbiased', 'invariant'.*got 'certain' of"):
        infer(Sure(4))


# Resampling schemes --------------------------------------------------------------------------------------------------


def test_a_function_as_a_resampler_is_assumed_until_it_is_declared():
    posterior = infer(SMC(4, best, ess_threshold=1.0))
    assert posterior.guarantee == SMC(4, best).guarantee == "assumed"
    assert "guarantee: assumed" in repr(posterior) and "±" not in repr(posterior)
    assert np.isfinite(posterior.log_evidence) and np.isnan(posterior.log_evidence_error)
    for guarantee in ("unbiased", "consistent", "assumed", "heuristic"):
        declared = SMC(4, resampler(best, guarantee=guarantee), ess_threshold=1.0)
        assert declared.guarantee == guarantee and f"resampler(best, guarantee='{guarantee}')" in repr(declared)
    run = infer(declared)
    assert run.guarantee == "heuristic" and np.isnan(run.log_evidence)
    np.testing.assert_array_equal(run.value, posterior.value)


def test_who_takes_a_resampler_asks_what_it_promises():
    declared = resampler(fair, guarantee="consistent")
    kernel = Regenerate()
    for scheme, expected in ((fair, "assumed"), (declared, "consistent"), ("ssp", "unbiased")):
        assert SMC(4, scheme).guarantee == PaRIS(SMC(4, scheme), lambda a, b, t: 0.0).guarantee == expected
        assert TemperedSMC(4, kernel, (1.0,), resampler=scheme).guarantee == expected
        assert SMC2(4, SMC(4), "x", scale=0.1, move_every=1, resampler=scheme).guarantee == expected
        assert BackwardSmoothing(SMC(4, scheme)).guarantee == promised(expected, "consistent")
    assert SMC(4, resampling.systematic).guarantee == SMC(4, resampling.birth_death).guarantee == "unbiased"
    assert SMC(4, best, ess_threshold=0.0).guarantee == "unbiased"  # it is never called
    assert SMC(4, fair, annealing=EntropicAnnealing(mode="ess")).guarantee == "heuristic"
    assert SMC(4, annealing=EntropicAnnealing(mode="ess"), ess_threshold=0.0).guarantee == "unbiased"


def test_an_undeclared_scheme_can_be_checked_and_a_bad_one_does_not_pass():
    assert_properly_weighted(hidden_markov(SYMBOLS[:2]), SMC(2, fair, ess_threshold=1.0))
    with pytest.raises(AssertionError, match="not properly weighted"):
        assert_properly_weighted(hidden_markov(SYMBOLS[:2]), SMC(2, best, ess_threshold=1.0))


def test_a_declared_conditional_form_is_run_in_particle_gibbs():
    smc = SMC(2, resampler(fair, "unbiased", conditional=fair_conditional), ess_threshold=1.0)
    assert "conditional=fair_conditional" in repr(smc)
    assert_invariant(hidden_markov(SYMBOLS[:2]), ParticleGibbs(smc), irreducible=True)
    assert hash(smc) == hash(SMC(2, resampler(fair, "unbiased", conditional=fair_conditional), ess_threshold=1.0))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: resampler("systematic"), TypeError, "'systematic' is a name"),
        (lambda: resampler(3), TypeError, "`fn` must be a function.*got 3"),
        (lambda: resampler(SMC), TypeError, "`fn` must be a function"),
        (lambda: resampler(fair, "exact"), ValueError, "'unbiased', 'consistent', 'assumed', 'heuristic', got 'exact'"),
        (lambda: resampler(fair, "invariant"), ValueError, "got 'invariant'"),
        (lambda: resampler(fair, guarantee=None), ValueError, "got None"),
        (lambda: resampler(fair, conditional=1), TypeError, "`conditional`.*got 1"),
    ],
)
def test_declarations_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("scheme", [fair, resampler(fair, "consistent", conditional=fair_conditional)])
@pytest.mark.parametrize(
    "use",
    [
        lambda smc: SMC2(4, smc, "x"),
        lambda smc: sandwich(hidden_markov(SYMBOLS), smc, {"x": SYMBOLS[None]}),
        lambda smc: PMMH("x", smc),
        lambda smc: ParticleGibbs(smc),
        lambda smc: ParisianGibbs(smc, lambda a, b, t: 0.0),
    ],
)
def test_what_needs_unbiased_estimates_refuses_less(use, scheme):
    with pytest.raises(ValueError, match=r"unbiased|conditional form") as refusal:
        use(SMC(4, scheme))
    assert scheme is not fair or 'ppl.inference.resampler(fn, guarantee="unbiased"' in str(refusal.value)


def test_errors_are_not_told_where_nobody_knows_how_ancestors_were_drawn():
    posterior = infer(SMC(4, fair, ess_threshold=1.0))
    for estimate in (evidence_variance, lambda p, **kind: expectation_error(p, lambda x: x[0], **kind)):
        with pytest.raises(ValueError, match="Declare the scheme, ppl.inference.resampler"):
            estimate(posterior)
        estimate(posterior, resampler="multinomial")
    declared = infer(SMC(4, resampler(fair, "unbiased"), ess_threshold=1.0))
    assert np.isfinite(declared.log_evidence_error) and np.isfinite(evidence_variance(declared))


# Kernels and other classes of the user's own -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Still(TraceKernel):
    """A kernel that says nothing about itself."""

    def bind(self, space):
        return StillMoves(tuple(space.sites))


class StillMoves(Moves):
    def __init__(self, sites):
        self.sites = sites

    def step(self, key, sites, memory):
        return dict(sites), memory, {"acceptance": jnp.float32(1.0)}


@dataclasses.dataclass(frozen=True)
class Declared(Still):
    guarantee = "invariant"


class Later(Declared):
    """The declaration of one's own class holds for those below it."""


@dataclasses.dataclass(frozen=True)
class Chosen(Still):
    guarantee: str = "consistent"


class Redrawn(Regenerate):
    pass


class Loose(Langevin):
    pass


class Joined(Sequence):
    pass


def test_kernels_of_ones_own_are_assumed_until_their_class_declares_what_they_leave():
    expected = {
        Still(): "assumed",
        Declared(): "invariant",
        Later(): "invariant",
        Chosen(): "consistent",
        Redrawn(): "assumed",
        Loose(): "assumed",
        Joined(Regenerate()): "assumed",
    }
    for kernel, own in expected.items():
        assert kernel.guarantee == own
        exact = own == "invariant"
        for chain in (MCMC(kernel, 2), MCMC(Sequence(kernel, Regenerate()), 2), MCMC(Mixture(Repeat(kernel, 2)), 2)):
            assert chain.guarantee == own
        assert MCMC(ParallelTempering(kernel, (1.0, 2.0)), 2).guarantee == own
        assert TemperedSMC(4, kernel, (2.0, 1.0)).guarantee == ("unbiased" if exact else own)
        if not isinstance(kernel, Langevin):
            assert SMC(4, rejuvenation=kernel).guarantee == ("unbiased" if exact else own)
    assert promise(MCMC(Still(), 2)) == promise(SMC(4, rejuvenation=Still())) == "assumed"


class Own(SMC):
    pass


class OwnRatio(KernelRatio):
    pass


class OwnSight(Lookahead):
    pass


class OwnSearch(MajorityVote):
    pass


@dataclasses.dataclass(frozen=True)
class OwnSure(SMC):
    guarantee = "unbiased"


def test_subclasses_of_the_librarys_algorithms_are_assumed_at_best():
    assert promise(Own(4)) == Own(4).guarantee == "assumed"
    assert Own(4, corrector="none").guarantee == "heuristic" and Own(4, rejuvenation=HMC(0.1)).guarantee == "assumed"
    assert promise(OwnSure(4)) == "unbiased"
    assert SMC(4, corrector=OwnRatio()).guarantee == SMC(4, lookahead=OwnSight()).guarantee == "assumed"
    assert OwnSearch(lambda value: 0).guarantee == "heuristic"
    with pytest.raises(ValueError, match="declare it"):
        SMC2(4, Own(4), "x")


# Programs and targets ------------------------------------------------------------------------------------------------


class Heuristic(MarkovChain):
    """A process that says that its weights stand for nothing."""

    guarantee = "heuristic"


class Plain(MarkovChain):
    """A process of one's own: its kernels are the program."""


def chain(kind=MarkovChain):
    return kind(jnp.zeros(2), jnp.zeros((2, 2)), 2)


TARGETS = {
    "alone": lambda p: p,
    "a product": lambda p: chain() * p,
    "a power": lambda p: p**2.0,
    "tilted": lambda p: p.tilt(lambda value: 0.1 * value["tokens"][0]),
    "guided": lambda p: ppl.guide(chain(), p, weight=0.5),
    "by steps": lambda p: p.by_steps(max_steps=2, step_tokens=1),
    "weighed steps": lambda p: p.weigh_steps(lambda state: 0.0),
    "watched": lambda p: p.watch("tokens", lambda state: state["tokens"]),
    "with a proposal": lambda p: p.propose(lambda law, state: law),
    "a mixture": lambda p: ppl.mixture(chain(), p, weights=[1, 1]),
    "inside a model": lambda p: inside(p),
    "a target inside a model": lambda p: inside(p**2.0),
    "twice inside a model": lambda p: inside(inside(p)),
    "conditioned": lambda p: ppl.condition(p, {"path": jnp.zeros(2, int)}),
}


def inside(process):
    @ppl.model
    def model():
        coin = ppl.sample("coin", dist.Bernoulli(0.5))
        value = ppl.generate(process, name="inner")
        ppl.factor("score", 0.1 * coin)
        return value

    return model()


@pytest.mark.parametrize("name", TARGETS)
def test_a_program_promises_what_its_processes_do(name):
    for kind, expected in ((Heuristic, "heuristic"), (Plain, "unbiased"), (MarkovChain, "unbiased")):
        program = ppl.program.as_program(TARGETS[name](chain(kind)))
        assert program.stage().guarantee == expected


ALGORITHMS = {
    "ImportanceSampling": ImportanceSampling(2),
    "SMC": SMC(2),
    "SuffixMH": MCMC(SuffixMH(), 2),
    "Regenerate": MCMC(Regenerate(), 2),
    "ParticleGibbs": MCMC(ParticleGibbs(SMC(2)), 2),
    "ParisianGibbs": MCMC(ParisianGibbs(SMC(2), lambda a, b, t: 0.0), 2),
    "BackwardSmoothing": BackwardSmoothing(SMC(2)),
    "PaRIS": PaRIS(SMC(2), lambda a, b, t: 0.0),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_algorithm_promises_more_than_the_process_it_runs(name):
    assert promise(ALGORITHMS[name], chain(Heuristic)) == "heuristic"
    assert promise(ALGORITHMS[name], chain(Plain)) == promised(ALGORITHMS[name], chain="MCMC" in repr(ALGORITHMS[name]))


def test_a_model_that_holds_a_heuristic_process_says_so():
    tempered = TemperedSMC(2, Regenerate(), (1.0,))
    for algorithm, exact in ((MCMC(Regenerate(), 2), "invariant"), (SMC(2), "unbiased"), (tempered, "unbiased")):
        assert promise(algorithm, inside(chain(Heuristic))) == "heuristic"
        assert promise(algorithm, inside(chain())) == exact


def test_what_a_heuristic_process_prints_is_no_number():
    posterior = infer(SMC(2), chain(Heuristic))  # what is compiled for the one process is not taken for the other
    assert infer(SMC(2), chain()).guarantee == "unbiased"
    assert "guarantee: heuristic" in repr(posterior) and np.isnan(posterior.log_evidence)


@pytest.mark.parametrize("program", [chain(Heuristic), inside(chain(Heuristic))], ids=["process", "model"])
def test_unbiased_estimates_are_not_had_of_a_heuristic_process(program):
    site = "coin" if not isinstance(program, MarkovChain) else "path"
    paths = {"path": jnp.zeros((1, 2), int)} if site == "path" else {"coin": [0], "inner/path": jnp.zeros((1, 2), int)}
    uses = [
        lambda: ppl.infer(program, MCMC(PMMH(site, SMC(2), proposal=lambda sites: {}), 2)),
        lambda: ppl.infer(program, SMC2(2, SMC(2), site, scale=0.1)),
        lambda: sandwich(program, SMC(2), paths),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="heuristic"):
            use()


def test_replicas_of_a_heuristic_process_are_heuristic():
    process = GaussianMixture(np.zeros((1, 1)), 0.5).diffuse(VarianceExploding(0.05, 3.0)).reverse(num_steps=2)
    kinds = {"unbiased": "invariant", "discretised": "discretised", "heuristic": "heuristic"}
    for own, expected in kinds.items():
        process.guarantee = own
        assert promise(ReplicaExchange(2, 1), process**2.0) == expected


def test_a_run_around_a_given_path_is_not_unbiased():
    posterior = SMC(4).conditional_run(hidden_markov(SYMBOLS), jax.random.key(0), {"x": SYMBOLS})
    assert posterior.guarantee == "consistent" and np.isfinite(posterior.log_evidence)


# Algorithms of the user's own ----------------------------------------------------------------------------------------


def written(guarantee, **fields):
    """An algorithm that is a function, and builds its posterior by hand."""

    def algorithm(program, key, *, keep, progress):
        one = jnp.ones(1)
        return ppl.Posterior(
            one, {}, {}, 0 * one, jnp.float32(7.0), one[0], {}, Status(0, -1), guarantee=guarantee, **fields
        )

    return algorithm


def test_algorithms_of_ones_own_promise_what_they_state_and_no_more_than_the_program():
    for stated, expected in {"": "assumed", "unbiased": "unbiased", "consistent": "consistent"}.items():
        posterior = infer(written(stated))
        assert posterior.guarantee == expected and posterior.log_evidence == 7.0
    for stated in ("heuristic", "invariant"):
        posterior = infer(written(stated))
        assert posterior.guarantee == stated and np.isnan(posterior.log_evidence)
    assert infer(written("", num_chains=1)).guarantee == "assumed"
    for stated in ("", "unbiased", "invariant"):
        posterior = infer(written(stated), chain(Heuristic))
        assert posterior.guarantee == "heuristic" and np.isnan(posterior.log_evidence)
    assert promise(lambda program, key, **options: SMC(2)(program, key, **options)) == "unbiased"

    class Algorithm:
        guarantee = "consistent"

        def __call__(self, program, key, **options):
            return written("")(program, key, **options)

    assert infer(Algorithm()).guarantee == "consistent"
    with pytest.raises(ValueError, match="got 'sure'"):
        infer(written("sure"))
    with pytest.raises(TypeError, match="must return a Posterior, got int"):
        infer(lambda program, key, **options: 3)


def test_other_kernels_still_say_what_they_said():
    walk = MH(lambda sites: {"x": dist.Normal(0.0, 1.0)})
    assert MCMC(Sequence(walk, NUTS()), 2).guarantee == "invariant"
    assert MCMC(Sequence(walk, Langevin(0.1)), 2).guarantee == "discretised"
    assert SMC(4, rejuvenation=walk).guarantee == "unbiased"
    assert SMC(4, rejuvenation=Langevin(0.1)).guarantee == "discretised"
