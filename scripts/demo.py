"""A first look: a language model writes freely and under a program, a model with a known answer, digits by diffusion.

Run by `make demo`; needs the weights that `scripts/fetch_smollm2.py` puts into the cache.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import ppl
from ppl.inference import SMC, ImportanceSampling, Langevin
from ppl.models import GaussianMixture, LanguageModel, VariancePreserving

sys.path.insert(0, str(Path(__file__).parent))
from fetch_smollm2 import fetch  # noqa: E402

PARTICLES = 32


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}\n{'=' * len(text)}")


def timed(label: str, run):
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    print(f"  [{label}: {time.perf_counter() - start:.1f} s]")
    return result


# A sentence without the letter e --------------------------------------------------------------------------------------


def sentence_without_e(lm: LanguageModel):
    """Build the model: it writes a sentence of plain words, none with an e, that ends in a full stop."""
    plain = np.array([word.isascii() and all(c.isalpha() or c in " ,.'" for c in word) for word in lm.vocabulary])
    stops = np.array([word.rstrip().endswith(".") for word in lm.vocabulary])
    no_e = np.array(["e" not in word.lower() for word in lm.vocabulary])
    words, full_stop = jnp.asarray(plain & no_e & ~stops), jnp.asarray(plain & no_e & stops)

    @ppl.model
    def program(prompt, min_tokens, max_tokens):
        def write(state, t):
            law = lm.next_token(state["text"])
            allowed = words | (full_stop & (t >= min_tokens))
            token = ppl.sample("token", law, proposal=law.restrict(allowed))
            text = lm.extend(state["text"], token)
            return {"text": text, "length": state["length"] + 1, "done": full_stop[token]}, token

        start = {"text": lm.prefill(prompt), "length": 0, "done": jnp.array(False)}
        state, tokens = ppl.scan(write, start, jnp.arange(max_tokens), until=lambda state: state["done"])
        ppl.factor("ends", jnp.where(state["done"], 0.0, -jnp.inf))
        return {"tokens": tokens, "length": state["length"]}

    return program


def show_texts(lm: LanguageModel, posterior, rows: int = 5) -> None:
    texts = lm.decode(posterior.value["tokens"], length=posterior.value["length"])
    weights: dict[str, float] = {}
    for text, weight in zip(texts, np.asarray(posterior.weights), strict=True):
        weights[text] = weights.get(text, 0.0) + float(weight)
    for text, weight in sorted(weights.items(), key=lambda item: -item[1])[:rows]:
        print(f"    {weight:6.3f}  {text.strip()!r}")


# A state-space model --------------------------------------------------------------------------------------------------


@ppl.model
def walk(observations, scale=1.0):
    drift = ppl.sample("drift", dist.Normal(0.0, scale))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + drift, 1.0))
        ppl.observe("y", dist.Normal(x, 0.5), y)
        return x, x

    _, path = ppl.scan(step, 0.0, observations)
    return {"drift": drift, "path": path}


def exact_walk(observations, scale: float = 1.0) -> tuple[float, float, float]:
    """Return log-evidence, posterior mean and sd of the drift: everything is jointly Gaussian."""
    y = np.asarray(observations, np.float64)
    t = np.arange(1, len(y) + 1)
    covariance = np.minimum.outer(t, t) + scale**2 * np.outer(t, t) + 0.25 * np.eye(len(y))
    solved = np.linalg.solve(covariance, np.stack([y, scale**2 * t], axis=1))
    log_evidence = -0.5 * (y @ solved[:, 0] + np.linalg.slogdet(2 * np.pi * covariance)[1])
    return log_evidence, scale**2 * t @ solved[:, 0], float(np.sqrt(scale**2 - scale**2 * t @ solved[:, 1]))


# Digits by diffusion --------------------------------------------------------------------------------------------------

PICTURE = Path("digits.png")
SHOWN = 14
SMOOTH = 0.15  # standard deviation around an image, whose ink goes from -1 to 1


def digits(*labels: int) -> np.ndarray:
    """Return the handwritten digits with these labels, `[n, 8, 8]`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images[np.isin(data.target, labels)] / 8 - 1


def sampler(images: np.ndarray):
    """Build the sampler of a density that is known: a kernel estimate, Gaussians around images."""
    return GaussianMixture(images, SMOOTH).diffuse(VariancePreserving()).reverse(num_steps=100)


def exact_product(some: np.ndarray, others: np.ndarray, scale: float) -> float:
    """Return the log of the integral of the product of two kernel estimates."""
    some, others = (images.reshape(len(images), -1) for images in (some, others))
    logs = -np.sum((some[:, None] - others) ** 2, axis=-1) / (4 * scale**2)
    size = some.shape[1]
    return float(np.log(np.mean(np.exp(logs - logs.max()))) + logs.max() - 0.5 * size * np.log(4 * np.pi * scale**2))


def draw_digits() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images = [digits(*labels) for labels in (range(10), (3,), (8,))]
    every, threes, eights = map(sampler, images)
    last = np.hypot(SMOOTH, np.exp(threes.levels.log_ratio[-1]))  # the noise that the last level leaves
    targets = {
        "all digits": (every, 0.0),
        "threes": (threes, 0.0),
        "threes * eights: what is both": (threes * eights, exact_product(*images[1:], last)),
        "guided past the threes: ppl.guide(all, threes, weight=2)": (ppl.guide(every, threes, weight=2.0), None),
        "all digits, tilted to little ink": (every.tilt(lambda x: -0.5 * jnp.sum(x)), None),
    }
    figure, rows = plt.subplots(len(targets), 1, figsize=(8, 1.15 * len(targets)), layout="constrained")
    algorithm = SMC(1024, rejuvenation=Langevin())  # 64 dimensions: without moves few ancestors are left
    for axes, (name, (target, exact)) in zip(rows, targets.items(), strict=True):
        posterior = timed("compiled and run", lambda target=target: ppl.infer(target, algorithm, seed=0))
        known = "" if exact is None else f", exact {exact:.2f}"
        print(f"    {name}: log-evidence {float(posterior.log_evidence):.2f}{known}")
        drawn = np.asarray(posterior.resample(0, SHOWN).value)
        axes.imshow(np.concatenate([np.pad(image, 1, constant_values=-1) for image in drawn], axis=1), cmap="gray")
        axes.set_title(name, loc="left", fontsize=9)
        axes.axis("off")
    figure.savefig(PICTURE, dpi=110)
    print(f"    pictures: {PICTURE.resolve()}")


def main() -> None:
    print(f"genppl {ppl.__version__} on {jax.devices()[0].device_kind or jax.default_backend()}, JAX {jax.__version__}")
    lm = timed("weights read", lambda: LanguageModel.load(fetch()))
    print(f"  {lm}")

    title("1. A completion, sampled freely: no factor, so every weight is equal and Z = 1")
    story = lm.complete("Once upon a time, in a small village by the sea,", max_tokens=32)
    posterior = timed("compiled and run", lambda: ppl.infer(story, ImportanceSampling(4), seed=1))
    for text in posterior.texts[:3]:
        print(f"    {text!r}")

    title("2. A sentence without the letter e: one program, two algorithms")
    program = sentence_without_e(lm)(
        lm.chat_prompt([{"role": "user", "content": "Write one sentence about a rainy day."}]), 8, 24
    )
    for algorithm in (ImportanceSampling(PARTICLES), SMC(PARTICLES)):
        posterior = timed("compiled and run", lambda algorithm=algorithm: ppl.infer(program, algorithm, seed=0))
        print(
            f"  {type(algorithm).__name__}({PARTICLES}): log-evidence {float(posterior.log_evidence):.2f}, "
            f"effective sample size {float(posterior.ess):.1f} of {PARTICLES}"
        )
        show_texts(lm, posterior)

    title("3. A random walk with unknown drift: the answer is known")
    observations = jnp.cumsum(0.4 + jnp.sin(jnp.arange(40.0)))
    posterior = timed("compiled and run", lambda: ppl.infer(walk(observations), SMC(4096), seed=0))
    log_evidence, mean, sd = exact_walk(observations)
    drift, weights = np.asarray(posterior.value["drift"]), np.asarray(posterior.weights)
    estimate = weights @ drift
    rows = [
        ["", "exact", "SMC(4096)"],
        ["log-evidence", f"{log_evidence:.3f}", f"{float(posterior.log_evidence):.3f}"],
        ["drift, mean", f"{mean:.3f}", f"{estimate:.3f}"],
        ["drift, sd", f"{sd:.3f}", f"{np.sqrt(weights @ (drift - estimate) ** 2):.3f}"],
    ]
    for row in rows:
        print(f"    {row[0]:14s}{row[1]:>10s}{row[2]:>12s}")

    title("4. Digits by diffusion: products, guidance and tilts of image models, weighted")
    draw_digits()


if __name__ == "__main__":
    main()
