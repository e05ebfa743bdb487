"""NUTS through a program against NumPyro alone: the same model, the same sampler, time per leapfrog step.

Two models: eight schools, non-centred (Rubin 1981), and a logistic regression of 1000 rows on 20 columns. Both sides
run one chain at one step size and an identity mass matrix, compiled beforehand, in turns in one process; leapfrog steps
are counted on both sides, and the ratio is that of neighbouring runs. NumPyro runs twice: with the data as arguments,
as ours are, and as constants of the compiled code, as its own `MCMC` has them.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer.hmc import hmc
from numpyro.infer.util import initialize_model

import ppl
from benchmarks.timing import machine, side_by_side
from ppl.inference import MCMC, NUTS

REPEATS = 30
FIRST, SECOND, OURS = "NumPyro, data as arguments", "NumPyro, data constant", "through a program"
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], np.float32)


def eight_schools(sample, effects, errors):
    """`sample(name, law, value=None)` draws or observes."""
    mean = sample("mean", dist.Normal(0.0, 5.0))
    spread = sample("spread", dist.HalfCauchy(5.0))
    relative = sample("relative", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
    sample("effects", dist.Normal(mean + spread * relative, errors).to_event(1), effects)


def logistic_regression(sample, columns, labels):
    """See `eight_schools`."""
    slopes = sample("slopes", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
    intercept = sample("intercept", dist.Normal(0.0, 1.0))
    sample("labels", dist.Bernoulli(logits=columns @ slopes + intercept).to_event(1), labels)


def rows():
    """Draw columns `[1000, 20]` and labels `[1000]`."""
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(1000, 20)).astype(np.float32)
    labels = rng.random(1000) < 1 / (1 + np.exp(-columns @ rng.normal(size=20)))
    return jnp.asarray(columns), jnp.asarray(labels.astype(np.int32))


def of_numpyro(name, law, value=None):
    return numpyro.sample(name, law, obs=value)


def of_ppl(name, law, value=None):
    return ppl.sample(name, law) if value is None else ppl.observe(name, law, value)


def main() -> None:
    cases = {
        "eight schools": (eight_schools, (jnp.asarray(EFFECTS), jnp.asarray(ERRORS)), 0.3, 2000),
        "logistic regression": (logistic_regression, rows(), 0.03, 200),
    }
    print(machine())
    for title, (model, data, step_size, num_samples) in cases.items():
        compare(title, model, data, step_size, num_samples)


def compare(title, model, data, step_size, num_samples) -> None:
    """Time both and print seconds per leapfrog step and their ratio."""
    program = ppl.model(lambda *data: model(of_ppl, *data))
    algorithm = MCMC(NUTS(step_size=step_size), num_samples)
    through_program = jax.jit(lambda key, data: algorithm(program(*data), key))

    def numpyro_model(*data):
        model(of_numpyro, *data)

    info = initialize_model(jax.random.key(0), numpyro_model, model_args=data, dynamic_args=True)
    init, sample = hmc(potential_fn_gen=info.potential_fn, algo="NUTS")

    def alone(key, data):
        options = {"step_size": step_size, "adapt_step_size": False, "adapt_mass_matrix": False}
        state = init(info.param_info, 0, rng_key=key, model_args=data, **options)

        def step(state, _):
            state = sample(state, model_args=data)
            return state, (info.postprocess_fn(*data)(state.z), state.num_steps, state.accept_prob)

        return jax.lax.scan(step, state, length=num_samples)[1]

    with_arguments, with_constants = jax.jit(alone), jax.jit(lambda key: alone(key, data))
    counts: dict[str, list[float]] = {}

    def counted(name, run, count):
        def once(seed):
            result = jax.block_until_ready(run(jax.random.key(seed)))
            counts.setdefault(name, []).append(count(result))
            return result

        return once

    def by_numpyro(result):
        return float(result[1].sum())

    ways = {
        FIRST: counted(FIRST, lambda key: with_arguments(key, data), by_numpyro),
        SECOND: counted(SECOND, with_constants, by_numpyro),
        OURS: counted(OURS, lambda k: through_program(k, data), lambda r: float(r.diagnostics["num_leapfrog"].sum())),
    }
    seconds = side_by_side(ways, REPEATS)
    each = {name: [t / n for t, n in zip(times, counts[name][1:], strict=True)] for name, times in seconds.items()}
    print(f"{title}, {num_samples} draws")
    for name, times in each.items():
        ratio = statistics.median(a / b for a, b in zip(times, each[FIRST], strict=True))
        steps = statistics.median(counts[name]) / num_samples
        micro = statistics.median(times) * 1e6
        print(f"  {name:26s} {steps:6.1f} leapfrog steps a draw   {micro:8.2f} us each   time ratio {ratio:6.3f}")


if __name__ == "__main__":
    main()
