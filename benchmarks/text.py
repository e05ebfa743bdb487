"""Text: tokens per second against torch, the cost of SMC over plain sampling, the first call, and memory.

python -m benchmarks.text speed       1, 8 and 32 particles against transformers' generate on torch (CPU, float32)
python -m benchmarks.text overhead    SMC with a trivial factor against plain sampling
python -m benchmarks.text first       first call of 32 particles, 32 tokens, in a fresh process
python -m benchmarks.text memory      32 particles after a prompt of 512 tokens
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import ppl
from benchmarks.timing import report, side_by_side
from ppl.inference import SMC, ImportanceSampling
from ppl.inference.population import lower
from ppl.models import LanguageModel

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from fetch_smollm2 import fetch  # noqa: E402

PROMPT, NEW_TOKENS = "Once upon a time", 32


def fixed_length(lm, tokens, length):
    """A program that writes exactly `length` tokens, as `generate` does when told to."""

    @ppl.model
    def program(trivial):
        def write(state, _):
            token = ppl.sample("token", lm.next_token(state))
            if trivial:
                ppl.factor("trivial", 0.0 * token)
            return lm.extend(state, token), token

        return ppl.scan(write, lm.prefill(tokens), length=length)[1]

    return program


def speed() -> None:
    from benchmarks.baselines import torch_generate

    lm = LanguageModel.load(fetch())
    loaded = torch_generate.load(fetch())
    program = fixed_length(lm, lm.encode(PROMPT), NEW_TOKENS)(False)
    for num in (1, 8, 32):
        times: dict[str, list[float]] = {"torch generate": [], "ppl": []}
        for repeat in range(8):
            torch = torch_generate.tokens_per_second(fetch(), PROMPT, num, NEW_TOKENS, 1, loaded=loaded)
            start = time.perf_counter()
            jax.block_until_ready(ppl.infer(program, ImportanceSampling(num), seed=repeat).value)
            seconds = time.perf_counter() - start
            if repeat:  # the first call compiles
                times["torch generate"].append(torch.median_seconds)
                times["ppl"].append(seconds)
        report(
            f"{num} particles, {NEW_TOKENS} tokens, prompt's prefill included",
            times,
            (num * NEW_TOKENS, "tokens/s"),
        )
        gain = statistics.median(a / b for a, b in zip(times["torch generate"], times["ppl"], strict=True))
        print(f"  ppl writes {gain:.2f} times the tokens of torch in the same time")


def overhead() -> None:
    lm = LanguageModel.load(fetch())
    program = fixed_length(lm, lm.encode(PROMPT), NEW_TOKENS)
    ways = {
        "plain sampling": lambda seed: ppl.infer(program(False), ImportanceSampling(32), seed=seed).value,
        "SMC with a trivial factor": lambda seed: ppl.infer(program(True), SMC(32), seed=seed).value,
        "SMC, resampling at every step": lambda seed: (
            ppl.infer(program(True), SMC(32, ess_threshold=1.0), seed=seed).value
        ),
    }
    report("32 particles, 32 tokens", side_by_side(ways, 7), (32 * NEW_TOKENS, "tokens/s"))


def first() -> None:
    print("first call of 32 particles, 32 tokens, compilation included, fresh processes")
    seconds = []
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-m", "benchmarks.text", "_first"], capture_output=True, text=True, check=True
        )
        seconds.append(float(out.stdout.split()[-1]))
    print(f"  median {statistics.median(seconds):.1f} s of {', '.join(f'{s:.1f}' for s in seconds)}")


def _first() -> None:
    lm = LanguageModel.load(fetch())
    start = time.perf_counter()
    jax.block_until_ready(ppl.infer(lm.complete(PROMPT, max_tokens=NEW_TOKENS), SMC(32), seed=0).value)
    print(time.perf_counter() - start)


def memory() -> None:
    lm = LanguageModel.load(fetch())
    tokens = (lm.encode("All work and no play makes Jack a dull boy. ") * 64)[:512]
    config = lm.config
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(lm.dtype).itemsize
    print(
        f"keys and values of one token: {token_bytes / 2**10:.0f} KiB; "
        f"of the 512-token prompt: {512 * token_bytes / 2**20:.1f} MiB"
    )
    for num in (1, 8, 32):
        compiled = lower(lm.complete(tokens, max_tokens=32), SMC(num)).compile()
        used = compiled.memory_analysis().temp_size_in_bytes
        own = num * 32 * token_bytes
        print(
            f"  {num:2d} particles: temporary memory {used / 2**20:7.1f} MiB; own caches {own / 2**20:6.1f} MiB; if "
            "the prompt were "
            f"stored for each particle that alone would be {num * 512 * token_bytes / 2**20:7.1f} MiB"
        )


if __name__ == "__main__":
    commands = {"speed": speed, "overhead": overhead, "first": first, "memory": memory, "_first": _first}
    for name in sys.argv[1:] or ["speed", "overhead", "first", "memory"]:
        commands[name]()
