"""Programs over the distributions that people use, and the check that a large population's weights are their densities.

A population of N particles runs through fused, vectorised code that no small test meets: a compiler's error there shows
from some row on, and only where it fuses so: one was seen at N = 20,000 for an observation that stood alone, and not at
2^17, nor beside other statements. The check runs a program at large N in float32, with its draws weighed, and compares
each particle's log-weight with `ppl.log_density` of its sites in float64, a few particles at a time. The weights of
importance sampling are compared in the same way, less the density of what was drawn.

    python -m tests.large_populations                all of them, in a few minutes
    python -m tests.large_populations Gamma Beta     some
"""

import functools
import sys

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import numpyro
import numpyro.distributions as dist

import ppl
from ppl.inference import ImportanceSampling
from ppl.interpret import Interpreter
from ppl.lanes import Lane
from ppl.models import GaussianMixture, MarkovChain, VariancePreserving
from ppl.program import as_program
from ppl.trace_space import TraceSpace

BLOCK = 4096  # particles whose densities are computed at once in float64: none of a large population's code


def _positive(z):
    return jnp.exp(0.3 * z)


def _unit(z):
    return jax.nn.sigmoid(z)


def _simplex(z):
    return jax.nn.softmax(jnp.stack([z, 0.5 * z, -z]))


def _cholesky(z):
    return jnp.array([[1.0, 0.0], [0.3, 1.0]]) * _positive(z)


# name -> (distribution of a standard normal z, an observed value). Each is drawn and observed.
UNIVARIATE = {
    "AsymmetricLaplace": (lambda z: dist.AsymmetricLaplace(z, _positive(z), 1.3), 0.4),
    "Beta": (lambda z: dist.Beta(_positive(z), 2.0), 0.3),
    "BetaProportion": (lambda z: dist.BetaProportion(_unit(z), 3.0), 0.3),
    "Cauchy": (lambda z: dist.Cauchy(z, _positive(z)), 0.7),
    "Chi2": (lambda z: dist.Chi2(2 * _positive(z)), 1.5),
    "Exponential": (lambda z: dist.Exponential(_positive(z)), 0.8),
    "Gamma": (lambda z: dist.Gamma(2 * _positive(z), 1.5), 0.9),
    "Gompertz": (lambda z: dist.Gompertz(_positive(z), 1.2), 0.4),
    "Gumbel": (lambda z: dist.Gumbel(z, _positive(z)), 0.2),
    "HalfCauchy": (lambda z: dist.HalfCauchy(_positive(z)), 0.9),
    "HalfNormal": (lambda z: dist.HalfNormal(_positive(z)), 0.9),
    "InverseGamma": (lambda z: dist.InverseGamma(3 * _positive(z), 1.5), 0.7),
    "Kumaraswamy": (lambda z: dist.Kumaraswamy(_positive(z), 2.0), 0.3),
    "Laplace": (lambda z: dist.Laplace(z, _positive(z)), 0.7),
    "Levy": (lambda z: dist.Levy(0.0, _positive(z)), 2.0),
    "Logistic": (lambda z: dist.Logistic(z, _positive(z)), 0.7),
    "LogNormal": (lambda z: dist.LogNormal(z, _positive(z)), 1.7),
    "LogUniform": (lambda z: dist.LogUniform(0.1 * _positive(z), 20.0), 2.0),
    "Normal": (lambda z: dist.Normal(z, _positive(z)), 0.7),
    "Pareto": (lambda z: dist.Pareto(0.1 * _positive(z), 3.0), 2.0),
    "SoftLaplace": (lambda z: dist.SoftLaplace(z, _positive(z)), 0.7),
    "StudentT": (lambda z: dist.StudentT(3 * _positive(z), z, 1.5), 0.7),
    "TruncatedNormal": (lambda z: dist.TruncatedNormal(z, 1.0, low=-0.5, high=2.0), 0.7),
    "Uniform": (lambda z: dist.Uniform(-_positive(z) - 1, 2.0), 0.7),
    "VonMises": (lambda z: dist.VonMises(z, 2 * _positive(z)), 0.7),
    "Weibull": (lambda z: dist.Weibull(_positive(z), 1.5), 0.7),
}
DISCRETE = {
    "Bernoulli": (lambda z: dist.Bernoulli(_unit(z)), 1),
    "BernoulliLogits": (lambda z: dist.Bernoulli(logits=z), 1),
    "BetaBinomial": (lambda z: dist.BetaBinomial(_positive(z), 2.0, 9), 4),
    "Binomial": (lambda z: dist.Binomial(9, _unit(z)), 4),
    "BinomialLogits": (lambda z: dist.Binomial(9, logits=z), 4),
    "Categorical": (lambda z: dist.Categorical(_simplex(z)), 1),
    "CategoricalLogits": (lambda z: dist.Categorical(logits=jnp.stack([z, -z, 0.5 * z])), 1),
    "DiscreteUniform": (lambda z: dist.DiscreteUniform(0, 9), 4),
    "GammaPoisson": (lambda z: dist.GammaPoisson(2 * _positive(z), 0.5), 4),
    "Geometric": (lambda z: dist.Geometric(_unit(z)), 2),
    "NegativeBinomial2": (lambda z: dist.NegativeBinomial2(3 * _positive(z), 2.0), 4),
    "NegativeBinomialLogits": (lambda z: dist.NegativeBinomial(4.0, logits=0.3 * z), 4),
    "OrderedLogistic": (lambda z: dist.OrderedLogistic(z, jnp.array([-1.0, 0.5])), 1),
    "Poisson": (lambda z: dist.Poisson(3 * _positive(z)), 4),
    "ZeroInflatedPoisson": (lambda z: dist.ZeroInflatedPoisson(0.3, 3 * _positive(z)), 4),
}
MULTIVARIATE = {
    "Dirichlet": (lambda z: dist.Dirichlet(_positive(z) * jnp.array([1.0, 2.0, 3.0])), [0.2, 0.3, 0.5]),
    "DirichletMultinomial": (
        lambda z: dist.DirichletMultinomial(_positive(z) * jnp.array([1.0, 2.0, 3.0]), 6),
        [1, 2, 3],
    ),
    "LKJCholesky": (lambda z: dist.LKJCholesky(2, 2 * _positive(z)), [[1.0, 0.0], [0.6, 0.8]]),
    "LowRankMultivariateNormal": (
        lambda z: dist.LowRankMultivariateNormal(z * jnp.ones(2), jnp.ones((2, 1)), _positive(z) * jnp.ones(2)),
        [0.2, -0.4],
    ),
    "MatrixNormal": (
        lambda z: dist.MatrixNormal(z * jnp.ones((2, 2)), _cholesky(z), jnp.eye(2)),
        [[0.1, 0.2], [0.3, 0.4]],
    ),
    "Multinomial": (lambda z: dist.Multinomial(6, _simplex(z)), [1, 2, 3]),
    "MultivariateNormal": (
        lambda z: dist.MultivariateNormal(z * jnp.ones(2), jnp.eye(2) + 0.2 * _positive(z)),
        [0.2, -0.4],
    ),
    "MultivariateStudentT": (lambda z: dist.MultivariateStudentT(4.0, z * jnp.ones(2), _cholesky(z)), [0.2, -0.4]),
}
COMPOSED = {
    "expand": (lambda z: dist.Beta(_positive(z), 2.0).expand([3]), [0.2, 0.7, 0.4]),
    "expand and to_event": (lambda z: dist.StudentT(4.0, z, 1.0).expand([2, 3]).to_event(2), [[0.2, 0.7, 0.4]] * 2),
    "Beta over an array": (lambda z: dist.Beta(_positive(z) * jnp.ones(3), 1.0), [0.2, 0.7, 0.4]),
    "MixtureGeneral": (
        lambda z: dist.MixtureGeneral(dist.Categorical(_simplex(z)[:2] / _simplex(z)[:2].sum()),
                                      [dist.Normal(z, 1.0), dist.Normal(-z, 2.0)]),
        0.3,
    ),
    "MixtureSameFamily": (
        lambda z: dist.MixtureSameFamily(
            dist.Categorical(_simplex(z)), dist.Gamma(jnp.array([1.0, 2.0, 3.0]), _positive(z))
        ),
        0.8,
    ),
    "transformed by tanh": (
        lambda z: dist.TransformedDistribution(dist.Normal(z, 1.0), dist.transforms.SigmoidTransform()),
        0.3,
    ),
    "transformed affinely": (
        lambda z: dist.TransformedDistribution(dist.Gamma(2.0, 1.0), dist.transforms.AffineTransform(z, _positive(z))),
        9.0,
    ),
}  # fmt: skip
FAMILIES = UNIVARIATE | DISCRETE | MULTIVARIATE | COMPOSED


@ppl.model
def families(names, values):
    """Every named distribution drawn and observed, given one latent."""
    z = ppl.sample("z", dist.Normal(0.0, 1.0))
    for name in names.split("|"):
        make, _ = FAMILIES[name]
        ppl.sample(f"{name}", make(z))
        ppl.observe(f"{name} seen", make(z), values[name])


@ppl.model
def observed(name, value):
    """A named distribution observed, and nothing else, given one latent."""
    z = ppl.sample("z", dist.Normal(0.0, 1.0))
    ppl.observe(name, FAMILIES[name][0](z), value)


def observed_program(name):
    """Return the program in which a family is observed alone."""
    return observed(name, jnp.asarray(FAMILIES[name][1]))


def family_program(*names):
    """Return the program of some families."""
    values = {name: jnp.asarray(FAMILIES[name][1]) for name in names}
    return families("|".join(names), values)


@ppl.model
def plates(y):
    """Plates, masks inside and outside of events, scales, a scan."""
    scale = ppl.sample("scale", dist.Gamma(2.0, 1.0))
    with numpyro.plate("rows", 4):
        numpyro.sample("rate", dist.Gamma(2.0, scale))
        with numpyro.handlers.mask(mask=jnp.array([True, False, True, True])):
            numpyro.sample("y", dist.Beta(scale, 2.0), obs=y)
    masked = dist.Gamma(scale * jnp.ones(4), 1.0).mask(jnp.array([True, True, False, True])).to_event(1)
    ppl.observe("event", masked, y)
    with numpyro.handlers.scale(scale=2.5):
        numpyro.sample("scaled", dist.StudentT(3.0, 0.0, scale), obs=0.4)

    def step(x, t):
        x = ppl.sample("x", dist.Normal(0.9 * x, scale))
        ppl.observe("count", dist.Poisson(jnp.exp(x)), t)
        return x, x

    ppl.scan(step, 0.0, jnp.arange(3))


def assert_weights_are_densities(program, num_particles=2**17, tolerance=2e-5):
    """Compare the log-weights of a population with densities in float64, particle by particle.

    Args:
        program: makes the program; it is called in either precision.
        num_particles: N.
        tolerance: the largest deviation, as a share of 1 and the absolute terms of the log-density.
    """
    staged = program().stage(keep_rules=False)
    names = frozenset(name for name, site in staged.sites.items() if site.kind == "sample")

    @jax.jit
    def joint(key):
        result = Interpreter(num_particles, weigh_draws=True, keep=names).run(staged.block, staged.inputs, key)
        sites = {name: _whole(lane, num_particles) for name, lane in result.sites.items()}
        return sites, result.log_weights

    sites, log_densities = joint(jax.random.key(0))
    posterior = ppl.infer(program(), ImportanceSampling(num_particles), keep=names, seed=1)
    log_weights = posterior.log_weights + posterior.log_evidence + jnp.log(float(num_particles))
    for found, at, parts in ((log_densities, sites, 1.0), (log_weights, posterior.sites, 0.0)):
        expected, size = _densities(program, at, parts)
        found = np.asarray(found, np.float64)
        alike = np.isneginf(found) & np.isneginf(expected)
        wrong = ~alike & ~(np.abs(found - expected) <= tolerance * (1 + size))
        assert not wrong.any(), (
            f"{wrong.sum()} of {num_particles} weights differ, first that of particle {np.argmax(wrong)}: "
            f"{found[wrong][0]} for {expected[wrong][0]}"
        )


def _whole(lane: Lane, num_particles: int):
    return lane.array if lane.random else jnp.broadcast_to(lane.array, (num_particles, *jnp.shape(lane.array)))


def _densities(program, sites, draws: float):
    """Return log-densities in float64, that of what was drawn times `draws`, and the sizes of their parts."""
    sites = jax.tree.map(np.asarray, sites)
    with jax.enable_x64(True):
        space = TraceSpace(program().stage(keep_rules=False))

        @jax.jit
        @jax.vmap
        def parts(sites):
            whole, prior = space.log_density(sites), space.tempered(0.0).log_density(sites)
            return whole, prior

        wide = {n: a.astype(np.float64) if np.issubdtype(a.dtype, np.floating) else a for n, a in sites.items()}
        count = len(next(iter(sites.values())))
        blocks = [
            parts({name: jnp.asarray(values[first : first + BLOCK]) for name, values in wide.items()})
            for first in range(0, count, BLOCK)
        ]
        whole, prior = (np.concatenate([np.asarray(block[i]) for block in blocks]) for i in (0, 1))
    return (whole if draws else whole - prior), np.abs(whole) + np.abs(prior)


@ppl.model
def steps():
    """A loop that stops, discrete and continuous draws, a proposal, a factor."""

    def step(state, _):
        kind = ppl.sample("kind", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))
        x = ppl.sample("x", dist.Gamma(2.0 + state, 1.0), proposal=dist.LogNormal(0.5, 1.0))
        ppl.factor("f", -0.1 * x * kind)
        return state + x, x

    ppl.scan(step, 0.5, length=3, until=lambda state: state > 5.0)


def chain_target():
    """A product of powers over a process of tokens, tilted."""
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]]))
    p, q = MarkovChain(logits[0], logits, 5), MarkovChain(logits[1], logits.T, 5)
    return as_program(((p**1.5) * q).tilt(lambda value: 0.3 * value["tokens"].sum()))


def diffusion_target():
    """A power of a mixture by diffusion."""
    mixture = GaussianMixture(jnp.array([[-2.0], [1.0]]), jnp.array([0.5, 0.3]), jnp.array([0.4, 0.6]))
    return as_program(mixture.diffuse(VariancePreserving()).reverse(num_steps=8) ** 2.0)


STRUCTURES = {
    "plates": lambda: plates(jnp.array([0.2, 0.3, 0.4, 0.5])),
    "steps": steps,
    "a product of chains": chain_target,
    "diffusion": diffusion_target,
}


def main(names: list[str]) -> None:
    """Check families and structures, all if none is named; to be run with every supported version of jaxlib."""
    print(f"jax {jax.__version__}, jaxlib {jaxlib.__version__}")
    checks = {}
    for name in names or [*FAMILIES, *STRUCTURES]:
        if name in STRUCTURES:
            checks[name] = STRUCTURES[name], 2**17
        else:
            checks[name] = functools.partial(family_program, name), 2**17
            checks[f"{name} alone"] = functools.partial(observed_program, name), 20_000
    failed = []
    for name, (program, num_particles) in checks.items():
        try:
            assert_weights_are_densities(program, num_particles)
        except AssertionError as error:
            failed.append(name)
            print(f"{name}: {error}", flush=True)
        jax.clear_caches()
    print(f"{len(checks)} programs, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
