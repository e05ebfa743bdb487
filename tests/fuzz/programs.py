"""Random programs, of which populations and chains must agree with the sum or integral over all their traces.

A *shape* is a random structure of statements: draws and observations of some twenty families, plates, masks, factors,
proposals, loops in loops, loops that stop, conditioned sites. A *case* is a shape at random parameters, which are
traced arguments: all cases of a shape share their compiled runs. For each case, with density gamma and mass Z by
enumeration (and quadrature over at most one continuous latent),

    importance sampling, SMC     E[Z_hat / Z] = 1  and  E[(Z_hat / Z) sum_n W_n f(x_n)] = E_pi[f]                  (1)
    Regenerate, MH, particle Gibbs   x ~ pi, x' ~ K(x, .):  E[f(x')] = E[f(x)]                                     (2)

for f the values of the sites. Deviations of all cases and repetitions of a shape are pooled: a z-score beyond 5 is run
again with other keys and sixteen times as many, and is a failure if it stays beyond 5.
"""

from __future__ import annotations

import itertools
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import ppl
from ppl.inference import MH, SMC, ImportanceSampling, ParticleGibbs, Regenerate
from ppl.trace_space import TraceSpace

CASES, REPEATS, LIMIT = 250, 64, 5.0
MOST_TRACES = 1500
GRID = 400  # points of a quadrature

FINITE = {
    "bernoulli": (lambda a, b: dist.Bernoulli(jax.nn.sigmoid(a + b)), 2),
    "bernoulli logits": (lambda a, b: dist.Bernoulli(logits=a - b), 2),
    "categorical": (lambda a, b: dist.Categorical(jax.nn.softmax(jnp.stack([a, b, 0.0 * a]))), 3),
    "categorical logits": (lambda a, b: dist.Categorical(logits=jnp.stack([a, b])), 2),
    "binomial": (lambda a, b: dist.Binomial(2, jax.nn.sigmoid(a * b)), 3),
    "uniform": (lambda a, b: dist.DiscreteUniform(0, 1), 2),
}
CONTINUOUS = {  # with the map from (0, 1) to the support that the quadrature walks along
    "normal": (lambda a, b: dist.Normal(a, jnp.exp(0.3 * b)), lambda u: 4 * jnp.log(u / (1 - u))),
    "beta": (lambda a, b: dist.Beta(2 + a**2, 2 + b**2), lambda u: u),
    "gamma": (lambda a, b: dist.Gamma(2 + a**2, jnp.exp(0.3 * b)), lambda u: u / (1 - u)),
}
OBSERVED = {
    "normal": (lambda a, b: dist.Normal(a, jnp.exp(0.3 * b)), 0.4),
    "student": (lambda a, b: dist.StudentT(4.0, a, jnp.exp(0.3 * b)), 0.4),
    "laplace": (lambda a, b: dist.Laplace(a, jnp.exp(0.3 * b)), 0.4),
    "gamma": (lambda a, b: dist.Gamma(2 + a**2, jnp.exp(0.3 * b)), 0.9),
    "exponential": (lambda a, b: dist.Exponential(jnp.exp(0.5 * a - 0.2 * b)), 0.9),
    "lognormal": (lambda a, b: dist.LogNormal(0.5 * a, jnp.exp(0.3 * b)), 1.2),
    "beta": (lambda a, b: dist.Beta(1 + a**2, 1 + b**2), 0.3),
    "poisson": (lambda a, b: dist.Poisson(jnp.exp(0.5 * a - 0.2 * b)), 2),
    "bernoulli": (lambda a, b: dist.Bernoulli(logits=a + b), 1),
    "categorical": (lambda a, b: dist.Categorical(logits=jnp.stack([a, b, 0.0 * a])), 2),
    "mixture": (
        lambda a, b: dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.4, 0.6])), dist.Normal(jnp.stack([a, b]), 1.0)
        ),
        0.4,
    ),
}


# Shapes --------------------------------------------------------------------------------------------------------------


class _Shape:
    """A random structure: statements as tuples, and what is free in it."""

    def __init__(self, rng: random.Random):
        self.rng, self.traces = rng, MOST_TRACES + 1
        while not 1 < self.traces <= MOST_TRACES:
            self.count, self.traces, self.continuous = 0, 1, None
            self.supports: dict[str, tuple[int, tuple[int, ...]]] = {}  # name -> (number of values, shape)
            self.statements = tuple(self.statement(()) for _ in range(rng.randint(2, 5)))
        free = [name for name, (_, shape) in self.supports.items() if shape == ()]
        self.condition = rng.choice(free) if len(self.supports) > 2 and free and rng.random() < 0.3 else None

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def statement(self, shape: tuple[int, ...], depth: int = 0):
        rng = self.rng
        kinds = ["draw", "draw", "observe", "observe", "factor"] + ["plate"] * (not shape) + ["scan"] * 2 * (depth < 2)
        if depth == 0 and self.continuous is None:
            kinds.append("continuous")
        kind = rng.choice(kinds)
        parents, theta = (rng.random(), rng.random()), rng.randrange(6)
        if kind == "draw":
            return self.finite(kind, shape, parents, theta, proposes=rng.random() < 0.4)
        if kind == "plate":
            return self.finite(kind, (2,), parents, theta)
        if kind == "continuous":
            self.continuous = self.name("c")
            return kind, self.continuous, rng.choice(sorted(CONTINUOUS)), parents, theta
        if kind == "observe":
            mask = rng.choice([None, None, "masked", "event"])
            return kind, self.name("y"), rng.choice(sorted(OBSERVED)), parents, theta, mask
        if kind == "factor":
            return kind, self.name("f"), parents, theta
        length, stops = rng.randint(1, 3 - depth), rng.random() < 0.4
        body = tuple(self.statement((*shape, length), depth + 1) for _ in range(rng.randint(1, 3)))
        return kind, length, stops, body

    def finite(self, kind, shape, parents, theta, proposes=False):
        name, family = self.name("x"), self.rng.choice(sorted(FINITE))
        size = FINITE[family][1]
        self.supports[name] = size, shape
        self.traces *= size ** int(np.prod(shape))
        return kind, name, family, parents, theta, proposes

    def program(self, theta):
        """Return the program at parameters `[6]`."""
        program = _model(theta, ppl.static(self.statements))
        return program if self.condition is None else ppl.condition(program, {self.condition: jnp.int32(1)})

    def __repr__(self) -> str:
        given = "" if self.condition is None else f", given {self.condition} = 1"
        return f"{self.statements!r}{given}"


@ppl.model
def _model(theta, statements):
    values = _run(statements, [jnp.float32(0.3)], theta)
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in values])


def _run(statements, values, theta):
    for statement in statements:
        kind = statement[0]
        if kind != "scan":
            parents, number = statement[2:4] if kind == "factor" else statement[3:5]
            a, b = (values[int(share * len(values))] for share in parents)
            a, b = a * theta[number] + 0.1 * number, b - theta[5 - number]
        if kind == "draw":
            make, size = FINITE[statement[2]]
            proposal = dist.DiscreteUniform(0, size - 1) if statement[5] else None
            values.append(ppl.sample(statement[1], make(a, b), proposal=proposal) * 1.0)
        elif kind == "plate":
            with numpyro.plate(f"{statement[1]} plate", 2):
                values.append(jnp.sum(numpyro.sample(statement[1], FINITE[statement[2]][0](a, b))) * 0.5)
        elif kind == "continuous":
            values.append(ppl.sample(statement[1], CONTINUOUS[statement[2]][0](a, b)))
        elif kind == "observe":
            make, seen = OBSERVED[statement[2]]
            law = make(a, b)
            if statement[5] is None:
                ppl.observe(statement[1], law, seen)
            else:
                law = law.expand([3]).mask(jnp.array([True, False, True]))
                missing = jnp.array([seen, -9 if law.is_discrete else jnp.nan, seen])
                ppl.observe(statement[1], law.to_event(1) if statement[5] == "event" else law, missing)
        elif kind == "factor":
            ppl.factor(statement[1], 0.3 * jnp.tanh(a - b))
        else:
            _, length, stops, body = statement

            def step(state, t, body=body, values=tuple(values)):
                inner = _run(body, [*values, state], theta)
                return jnp.float32(jnp.tanh(sum(inner[1:]) + 0.2 * t)), inner[-1] * 1.0

            until = (lambda state: state > theta[0]) if stops else None
            last, ys = ppl.scan(step, jnp.float32(0.1), jnp.arange(length), until=until)
            values += [last, jnp.sum(ys)]
    return values


# The truth -----------------------------------------------------------------------------------------------------------


def _all_traces(shape: _Shape):
    """Return every assignment of the free sites, `[M, ...]`, and the logs of the quadrature's weights `[M]`."""
    free = {name: spec for name, spec in shape.supports.items() if name != shape.condition}
    entries = [(name, place) for name, (_, form) in free.items() for place in np.ndindex(*form)]
    options = [range(free[name][0]) for name, _ in entries]
    rows = np.array(list(itertools.product(*options)), np.int32).reshape(-1, len(entries))
    sites = {name: np.zeros((len(rows), *form), np.int32) for name, (_, form) in free.items()}
    for column, (name, place) in enumerate(entries):
        sites[name][(slice(None), *place)] = rows[:, column]
    log_sizes = np.zeros(len(rows))
    if shape.continuous is not None:
        family = next(s[2] for s in shape.statements if s[:2] == ("continuous", shape.continuous))
        u = (np.arange(GRID) + 0.5) / GRID
        x = np.asarray(CONTINUOUS[family][1](jnp.asarray(u)))
        slopes = np.asarray(jax.vmap(jax.grad(CONTINUOUS[family][1]))(jnp.asarray(u)))
        sites = {name: np.repeat(values, GRID, 0) for name, values in sites.items()}
        sites[shape.continuous] = np.tile(x, len(rows)).astype(np.float32)
        log_sizes = np.tile(np.log(slopes / GRID), len(rows))
    return {name: jnp.asarray(values) for name, values in sites.items()}, jnp.asarray(log_sizes, jnp.float32)


def _features(sites):
    """Return f: the values of a trace's sites as one vector."""
    return jnp.concatenate([jnp.ravel(jnp.asarray(sites[name], jnp.float32)) for name in sorted(sites)])


def _truth(shape: _Shape, traces, log_sizes, thetas):
    """Return log Z `[B]`, the posterior's logits `[B, M]` and E[f] `[B, F]`; of absent entries only 0 counts."""

    def one(theta):
        space = TraceSpace(shape.program(theta).stage(keep_rules=False))

        def density(sites):
            evaluated = space.evaluate(sites)
            same = [jnp.all(evaluated.sites[name] == sites[name]) for name in sites]
            return jnp.where(jnp.all(jnp.stack(same)), evaluated.log_density, -jnp.inf)

        logits = jax.vmap(density)(traces) + log_sizes
        log_z = jax.nn.logsumexp(logits)
        return log_z, logits, jnp.exp(logits - log_z) @ jax.vmap(_features)(traces)

    return jax.jit(lambda thetas: jax.lax.map(one, thetas, batch_size=16))(thetas)


# The checks ----------------------------------------------------------------------------------------------------------


def _population(shape: _Shape, algorithm, thetas, log_z, means, key):
    """Return deviations `[cases * repeats, 1 + F]` of (1)."""

    def one(theta, key):
        names = frozenset(set(shape.supports) | {shape.continuous}) - {None, shape.condition}
        posterior = algorithm(shape.program(theta), key, keep=names, progress=False)
        features = jax.vmap(_features)({name: posterior.sites[name] for name in names})
        weights = jnp.exp(posterior.log_weights)
        return posterior.log_evidence, jnp.where(weights > 0, weights, 0.0) @ features

    run = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, 0)))
    log_hat, found = run(thetas, key)
    ratio = jnp.exp(log_hat - log_z[:, None])
    each = ratio[..., None] * (found - means[:, None])
    return jnp.concatenate([(ratio - 1)[..., None], each], -1).reshape(ratio.size, -1)


def _chain(shape: _Shape, kernel, thetas, traces, logits, keys):
    """Return deviations `[cases * repeats, F]` of (2)."""

    def one(theta, logits, key):
        start_key, init_key, step_key = jax.random.split(key, 3)
        chosen = jax.random.categorical(start_key, logits)
        sites = {name: values[chosen] for name, values in traces.items()}
        moves = kernel.bind(TraceSpace(shape.program(theta).stage(keep_rules=False)))
        new, _, _ = moves.step(step_key, sites, moves.init(init_key, sites, 0))
        return _features({name: new[name] for name in sites}) - _features(sites)

    run = jax.jit(jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, 0)))
    found = run(thetas, logits, keys)
    return found.reshape(-1, found.shape[-1])


def _worst(deviations) -> float:
    d = np.asarray(deviations, np.float64)
    assert np.isfinite(d).all(), "a deviation is not finite"
    spread = d.std(0) / np.sqrt(len(d))
    scores = np.where(spread > 1e-7, np.abs(d.mean(0)) / np.maximum(spread, 1e-30), np.abs(d.mean(0)) / 1e-4)
    return float(scores.max())


def check_shape(seed: int, cases: int = CASES, repeats: int = REPEATS) -> None:
    """Check one shape at random parameters.

    Raises:
        AssertionError: an algorithm disagrees with the truth, twice; gives the seed, the shape and the z-score.
    """
    rng = random.Random(seed)
    shape = _Shape(rng)
    thetas = jnp.asarray(np.random.default_rng(seed).normal(size=(cases, 6)), jnp.float32)
    traces, log_sizes = _all_traces(shape)
    log_z, logits, means = _truth(shape, traces, log_sizes, thetas)
    resampler = rng.choice(["systematic", "multinomial", "stratified", "residual", "ssp", "killing"])
    smc = SMC(rng.choice([2, 5, 8]), resampler=resampler, ess_threshold=rng.choice([0.5, 0.9, 1.0]))
    checks = {repr(a): (_population, a, (thetas, log_z, means)) for a in (ImportanceSampling(8), smc)}
    if shape.continuous is None:
        sizes = {name: size for name, (size, _) in shape.supports.items() if name != shape.condition}

        def walk(sites):
            return {n: dist.DiscreteUniform(jnp.zeros(v.shape, int), sizes[n] - 1) for n, v in sites.items()}

        for kernel in (Regenerate(), MH(walk), ParticleGibbs(smc)):
            checks[repr(kernel)] = _chain, kernel, (thetas, traces, logits)
    for label, (check, algorithm, arguments) in checks.items():
        for attempt, count in ((0, repeats), (1, 16 * repeats)):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), attempt), (cases, count))
            worst = _worst(check(shape, algorithm, *arguments, keys))
            if worst <= LIMIT:
                break
        else:
            raise AssertionError(f"seed {seed}: {label} is off by {worst:.1f} standard errors on {shape!r}.")


def run(seconds: float, seed: int = 0, max_cases: int | None = None) -> int:
    """Check shapes until the time is over; returns the number of cases."""
    start, done = time.monotonic(), 0
    while time.monotonic() - start < seconds and (max_cases is None or done < max_cases):
        cases = CASES if max_cases is None else min(CASES, max_cases - done)
        check_shape(seed, cases)
        seed, done = seed + 1, done + cases
        jax.clear_caches()
    return done
