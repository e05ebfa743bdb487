"""Particle Gibbs, SMC squared and NUTS against what else one would use, in one process, sides taking turns.

    python -m benchmarks.mcmc               everything
    python -m benchmarks.mcmc gibbs         particle Gibbs: seconds a sweep, and how well the chains mix
    python -m benchmarks.mcmc smc2          SMC squared: seconds a run, log Z and its spread
    python -m benchmarks.mcmc nuts          NUTS: seconds a leapfrog step, see `benchmarks.nuts`

Particle Gibbs: x_0 ~ N(0, 2),  x_t = x/2 + 25 x / (1 + x^2) + 8 cos(1.2 t) + N(0, 10),  y_t = x_t^2 / 20 + N(0, 1),
T = 200, N = 128, multinomial resampling at half the particles, on both sides; `particles` 0.4 draws traced or backward
lines (`extract_one_trajectory`, `backward_sampling_ON2`), one sweep a Python call, in float64. SMC squared: the same
model with both variances unknown, T = 100, 64 parameters with 100 states each.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import ppl
from benchmarks.timing import machine
from ppl.diagnostics import bulk_ess
from ppl.inference import MCMC, SMC, SMC2, ParticleGibbs

LENGTH, NUM = 200, 128
SWEEPS = int(os.environ.get("BENCH_SWEEPS", 300))
REPEATS = int(os.environ.get("BENCH_REPEATS", 5))


def drift(x, t):
    """Return the mean of the next state."""
    return 0.5 * x + 25 * x / (1 + x**2) + 8 * jnp.cos(1.2 * t)


@ppl.model
def growth(observations, process_variance=10.0, noise_variance=1.0):
    """The nonlinear growth model."""

    def step(x, given):
        t, y = given
        scale = jnp.where(t == 0, jnp.sqrt(2.0), jnp.sqrt(process_variance))
        x = ppl.sample("x", dist.Normal(jnp.where(t == 0, 0.0, drift(x, t)), scale))
        ppl.observe("y", dist.Normal(x**2 / 20, jnp.sqrt(noise_variance)), y)
        return x, None

    times = jnp.arange(observations.shape[0])
    ppl.scan(step, 0.0, (times, observations))


@ppl.model
def growth_with_parameters(observations):
    """The same with both variances unknown."""
    process_variance = ppl.sample("process_variance", dist.InverseGamma(3.0, 20.0))
    noise_variance = ppl.sample("noise_variance", dist.InverseGamma(3.0, 2.0))
    growth.function(observations, process_variance, noise_variance)


def data(length: int = LENGTH) -> np.ndarray:
    """Return observations of the growth model."""
    rng, x, out = np.random.default_rng(1), 0.0, []
    for t in range(length):
        mean = 0.5 * x + 25 * x / (1 + x * x) + 8 * np.cos(1.2 * t)
        x = rng.normal(0.0, np.sqrt(2.0)) if t == 0 else rng.normal(mean, np.sqrt(10.0))
        out.append(x * x / 20 + rng.normal())
    return np.array(out)


def mixing(draws: np.ndarray) -> str:
    """Say how often states change and how many draws a sweep is worth, the median and the worst state."""
    changes = np.mean(draws[1:] != draws[:-1], axis=0)
    ess = bulk_ess(draws[None]) / len(draws)
    return (
        f"states that change: median {np.median(changes):.3f}, fewest {changes.min():.3f};  "
        f"ESS a sweep: median {np.median(ess):.3f}, worst {ess.min():.4f}"
    )


def gibbs() -> None:
    """Time a sweep of particle Gibbs, and look at its chains."""
    import particles
    from particles import distributions as pdist
    from particles import mcmc
    from particles import state_space_models as ssms

    class Growth(ssms.StateSpaceModel):
        def PX0(self):  # noqa: N802
            return pdist.Normal(scale=np.sqrt(2.0))

        def PX(self, t, xp):  # noqa: N802
            return pdist.Normal(loc=xp / 2 + 25 * xp / (1 + xp**2) + 8 * np.cos(1.2 * t), scale=np.sqrt(10.0))

        def PY(self, t, xp, x):  # noqa: N802
            return pdist.Normal(loc=x**2 / 20, scale=1.0)

    y = data()
    program = growth(jnp.asarray(y, jnp.float32))
    smc = SMC(NUM, resampler="multinomial")
    ours = {
        "traced": MCMC(ParticleGibbs(smc), SWEEPS),
        "backward": MCMC(ParticleGibbs(smc, backward_sampling=True), SWEEPS),
        "ancestors": MCMC(ParticleGibbs(smc, ancestor_sampling=True), SWEEPS),
    }
    fk = ssms.Bootstrap(ssm=Growth(), data=y)

    def theirs(backward: bool, sweeps: int, seed: int) -> np.ndarray:
        np.random.seed(seed)
        filtered = particles.SMC(fk=fk, N=NUM, store_history=True, collect="off")
        filtered.run()
        x, draws = filtered.hist.extract_one_trajectory(), []
        for _ in range(sweeps):
            conditional = mcmc.CSMC(fk=fk, N=NUM, xstar=x)
            conditional.run()
            history = conditional.hist
            x = history.backward_sampling_ON2(1) if backward else history.extract_one_trajectory()
            draws.append(np.asarray(x).reshape(LENGTH))
        return np.array(draws)

    def run(name: str, seed: int) -> np.ndarray:
        posterior = ppl.infer(program, ours[name], seed=seed)
        return np.asarray(posterior.sites["x"])

    print(f"particle Gibbs, T = {LENGTH}, N = {NUM}, {SWEEPS} sweeps a call, {REPEATS} calls a side in turns")
    theirs(False, 2, 0), theirs(True, 2, 0)  # compiled by numba
    for name in ours:
        run(name, 0)
    few = max(SWEEPS // 10, 10)
    seconds: dict[str, list[float]] = {}
    last: dict[str, list[np.ndarray]] = {}
    for repeat in range(1, REPEATS + 1):
        for name in ours:
            start = time.perf_counter()
            draws = run(name, repeat)
            seconds.setdefault(f"ppl, {name}", []).append((time.perf_counter() - start) / SWEEPS)
            last.setdefault(f"ppl, {name}", []).append(draws)
        for name in ("traced", "backward"):
            start = time.perf_counter()
            draws = theirs(name == "backward", few, repeat)
            seconds.setdefault(f"particles, {name}", []).append((time.perf_counter() - start) / few)
    for name in ("traced", "backward"):
        last[f"particles, {name}"] = [theirs(name == "backward", SWEEPS, 100)]
    for name, times in seconds.items():
        baseline = seconds["particles, backward" if "backward" in name or "ancestors" in name else "particles, traced"]
        ratio = statistics.median(b / a for a, b in zip(times, baseline, strict=True))
        print(f"  {name:22s} median {statistics.median(times) * 1e3:8.3f} ms a sweep   {ratio:6.2f} times as fast")
    for name, draws in last.items():
        print(f"  {name:22s} {mixing(np.concatenate(draws[-1:]))}")


def smc2() -> None:
    """Time a run of SMC squared, and compare estimates of log Z."""
    from collections import OrderedDict

    import particles
    from particles import distributions as pdist
    from particles import smc_samplers
    from particles import state_space_models as ssms

    class Growth(ssms.StateSpaceModel):
        def PX0(self):  # noqa: N802
            return pdist.Normal(scale=np.sqrt(2.0))

        def PX(self, t, xp):  # noqa: N802
            mean = xp / 2 + 25 * xp / (1 + xp**2) + 8 * np.cos(1.2 * t)
            return pdist.Normal(loc=mean, scale=np.sqrt(self.process_variance))

        def PY(self, t, xp, x):  # noqa: N802
            return pdist.Normal(loc=x**2 / 20, scale=np.sqrt(self.noise_variance))

    length, parameters, states = 100, 64, 100
    y = data(length)
    program = growth_with_parameters(jnp.asarray(y, jnp.float32))
    algorithm = SMC2(parameters, SMC(states), parameters=["process_variance", "noise_variance"])
    prior = pdist.StructDist(
        OrderedDict(process_variance=pdist.InvGamma(3.0, 20.0), noise_variance=pdist.InvGamma(3.0, 2.0))
    )

    def theirs(seed: int) -> float:
        np.random.seed(seed)
        squared = smc_samplers.SMC2(ssm_cls=Growth, prior=prior, data=y, init_Nx=states, wastefree=False, len_chain=2)
        run = particles.SMC(fk=squared, N=parameters, ESSrmin=0.5, resampling="systematic")
        run.run()
        return float(run.logLt)

    def ours(seed: int) -> float:
        return float(ppl.infer(program, algorithm, seed=seed).log_evidence)

    print(f"SMC squared, T = {length}, {parameters} parameters with {states} states, {REPEATS} runs a side in turns")
    ours(0)
    seconds: dict[str, list[float]] = {"ppl": [], "particles": []}
    evidence: dict[str, list[float]] = {"ppl": [], "particles": []}
    for repeat in range(1, REPEATS + 1):
        for name, run in (("ppl", ours), ("particles", theirs)):
            start = time.perf_counter()
            evidence[name].append(run(repeat))
            seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(seconds["ppl"], seconds["particles"], strict=True))
    for name, times in seconds.items():
        spread = np.std(evidence[name], ddof=1) if REPEATS > 1 else float("nan")
        print(
            f"  {name:12s} median {statistics.median(times):7.2f} s   log Z {np.mean(evidence[name]):9.3f}, "
            f"standard deviation of a run {spread:.3f}"
        )
    print(f"  {ratio:.1f} times as fast")


def main() -> None:
    """Run what the command line names, everything by default."""
    wanted = sys.argv[1:] or ["gibbs", "smc2", "nuts"]
    print(machine())
    for name in wanted:
        if name == "nuts":
            from benchmarks.nuts import main as nuts

            nuts()
        else:
            {"gibbs": gibbs, "smc2": smc2}[name]()


if __name__ == "__main__":
    main()
