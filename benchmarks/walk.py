"""The `walk` program under SMC against a particle filter written by hand for it: N = 16384, T = 200, compiled runs.

Both sides draw in batches from one threefry key a step, resample with the library's `systematic` when the ESS falls
below N / 2, keep ancestors and ESS, and return log Z, drift and traced-back paths.
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import ppl
from benchmarks.baselines.bootstrap_filter import bootstrap_filter, kalman_log_evidence, simulate_observations
from benchmarks.timing import report, side_by_side
from ppl.inference import SMC

NUM_PARTICLES, NUM_STEPS, REPEATS = 16384, 200, 30


@ppl.model
def walk(observations, scale=1.0):
    drift = ppl.sample("drift", dist.Normal(0.0, scale))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + drift, 1.0))
        ppl.observe("y", dist.Normal(x, 0.5), y)
        return x, x

    _, path = ppl.scan(step, 0.0, observations)
    return {"drift": drift, "path": path}


def main() -> None:
    observations = jnp.asarray(simulate_observations(0, NUM_STEPS))
    # Staging is not timed on either side: the run is compiled inside one jit as a user's own program would be.
    infer = jax.jit(lambda key, y: SMC(NUM_PARTICLES)(walk(y), key))

    def ours(seed):
        return infer(jax.random.key(seed), observations)

    def by_hand(seed):
        return bootstrap_filter(jax.random.key(seed), observations, num_particles=NUM_PARTICLES)

    def whole_call(seed):
        return ppl.infer(walk(observations), SMC(NUM_PARTICLES), seed=seed)

    exact = kalman_log_evidence(observations)
    print(
        f"log Z: exact {exact:.2f}, ours {float(ours(0).log_evidence):.2f}, "
        f"by hand {float(by_hand(0).log_evidence):.2f}"
    )
    seconds = side_by_side(
        {"by hand": by_hand, "ppl, compiled run": ours, "ppl.infer, staging included": whole_call}, REPEATS
    )
    report(f"walk, N = {NUM_PARTICLES}, T = {NUM_STEPS}", seconds)


if __name__ == "__main__":
    main()
