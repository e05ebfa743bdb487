"""Controlled text against genlm-control and llamppl: tokens per second and log Z, on one machine in one process.

python -m benchmarks.controlled_text speed      regular expressions, a forbidden letter, a product of two prompts
python -m benchmarks.controlled_text evidence   log Z of all sides over 20 runs, and exactly where it can be summed
python -m benchmarks.controlled_text cost       what a constraint costs on top of free decoding, and its memory

All sides have the weights of SmolLM2-135M-Instruct in float32, the same prompts, systematic resampling below half of
the particles, and count the final particles' tokens up to the end token, that one included. Constrained programs end
within their budget on all sides (`require_end=True` here), so that the targets are the same. `BENCH_PARTICLES`
(8,32,128), `BENCH_REPEATS` (5) and `BENCH_PROGRAMS` (parts of their names, all) shorten a run.
"""

import os
import string
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ppl
from benchmarks.timing import machine, report, side_by_side
from ppl.inference import SMC, ImportanceSampling
from ppl.models import Choice, LanguageModel, Regex

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from fetch_smollm2 import fetch  # noqa: E402

MAX_TOKENS = 32
STAMP = r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}"  # 19 bytes and an end: always within the budget
CLOCK = r"[0-9]{2}:[0-9]{2}"
LETTERS = "[" + "".join(f"\\x{ord(c):02x}" for c in string.printable if c not in "eE") + "]*"
CITIES = (
    "Athens Beijing Berlin Bern Cairo Delhi Dublin Kyiv Lima Lisbon London Madrid Moscow Oslo Ottawa Paris Prague Rome "
    "Tokyo Vienna"
).split()
REPEAT = "Repeat this line:\n2024-01-31 12:45:10"
INVENT = "Make up a date and time, in the form 2024-01-31 12:45:10."
TIME = "What time is it? Answer in the form 12:45."
DOG, SEA = "Say one short sentence about a dog.", "Say one short sentence about the sea."
CAPITAL = "Name a capital city in Europe. Answer with one word."
VISIT = "Which capital city would you like to visit? Answer with one word."
STORY = "Tell a long story about a dog."

SLOW = 40.0  # seconds of a run above which it is timed twice only
WARM_UP = 2  # particles of the peers' first call, which compiles nothing but fills their automata's caches
RUNS = 20  # for log Z
REPEATS = int(os.environ.get("BENCH_REPEATS", 5))
CHOSEN = os.environ.get("BENCH_PROGRAMS", "").split(",")

Program = Callable[[int, int], tuple[float, int]]  # (seed, number of particles) -> log Z, tokens


def chosen(title: str) -> bool:
    return any(name in title for name in CHOSEN)


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def prompt(lm: LanguageModel, text: str) -> list[int]:
    return lm.chat_prompt(messages(text))


def ours(target, max_tokens: int) -> Program:
    """One side of a comparison: `SMC` on a target."""

    def run(seed: int, num: int) -> tuple[float, int]:
        posterior = ppl.infer(target, SMC(num), seed=seed)
        length = np.asarray(posterior.value["length"])
        return float(posterior.log_evidence), int(np.sum(np.minimum(length + 1, max_tokens)))

    return run


def theirs(program, max_tokens: int) -> Program:
    """One side of a comparison: a program of the peers. AWRS breaks off at times, on an assertion of its own."""

    def run(seed: int, num: int) -> tuple[float, int]:
        try:
            return program(seed, num, max_tokens)[:2]
        except AssertionError:
            return np.nan, 0

    return run


def load():
    """Load the model for both sides, and check that it is the same one."""
    from benchmarks.baselines import controlled_peers, torch_generate

    lm = LanguageModel.load(fetch())
    folder = Path(tempfile.mkdtemp(prefix="smollm2-"))
    controlled_peers.write_folder(folder, *torch_generate.load(fetch()))
    peers = controlled_peers.Peers(folder)
    tokens = prompt(lm, DOG)
    assert tokens == peers.lm.tokenizer.encode(chat_text(lm, DOG))
    difference = np.max(np.abs(jax.nn.log_softmax(lm.forward(tokens)[-1]) - peers.log_probabilities(tokens)))
    print(f"largest difference of a log-probability between the sides: {difference:.1e}")
    return lm, peers


def chat_text(lm: LanguageModel, text: str) -> str:
    return lm.tokenizer.apply_chat_template(messages(text), tokenize=False, add_generation_prompt=True)


def compare(title: str, sides: dict[str, Program], num: int, repeats: int, skip: set[str]) -> None:
    """Time programs in turns; the first calls are reported apart, and slow sides are repeated less."""
    sides = {name: run for name, run in sides.items() if name not in skip}
    print(f"\n{title}, N = {num}")
    first = {}
    for name, run in sides.items():
        start = time.perf_counter()
        run(0, num if name == "ppl" else WARM_UP)
        first[name] = time.perf_counter() - start
    rates: dict[str, list[float]] = {name: [] for name in sides}
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(1, repeats + 1):
        for name, run in sides.items():
            if repeat > 2 and spent[name][0] > SLOW:
                continue
            start = time.perf_counter()
            _, tokens = run(repeat, num)
            seconds = time.perf_counter() - start
            rates[name].append(tokens / seconds if tokens else np.nan)
            spent[name].append(seconds)
    mine = rates[next(iter(sides))]
    for name, rate in rates.items():
        ratio = np.nanmedian([a / b for a, b in zip(mine, rate, strict=False)])
        broken = int(np.sum(np.isnan(rate)))
        print(
            f"  {name:24s} {np.nanmedian(rate):7.1f} tokens/s, at best {np.nanmax(rate):7.1f}   "
            f"ppl writes {ratio:6.2f} times as many   median {np.median(spent[name]):6.2f} s of {len(rate)}   "
            f"first call {first[name]:5.1f} s" + (f"   {broken} broke off" if broken else ""),
            flush=True,
        )


def speed(lm: LanguageModel, peers) -> None:
    ends = {"max_tokens": MAX_TOKENS}

    def constrained(text: str, pattern: str):
        start = time.perf_counter()
        automaton = Regex(pattern).compile(lm.byte_vocabulary)
        seconds = time.perf_counter() - start
        print(f"  {pattern[:40]!r}: {automaton!r}, compiled in {seconds:.2f} s")
        return ours(lm.chat(messages(text), **ends).constrain(Regex(pattern), require_end=True), MAX_TOKENS)

    def regex_sides(text: str, pattern: str) -> dict[str, Program]:
        tokens = [prompt(lm, text)]
        return {
            "ppl": constrained(text, pattern),
            "genlm-control, AWRS": theirs(peers.genlm(tokens, pattern, by_rejection=True), MAX_TOKENS),
            "genlm-control, direct": theirs(peers.genlm(tokens, pattern), MAX_TOKENS),
        }

    letters = regex_sides(DOG, LETTERS)
    letters["llamppl"] = theirs(peers.llamppl_without(chat_text(lm, DOG), "eE"), MAX_TOKENS)
    pair = [prompt(lm, DOG), prompt(lm, SEA)]
    programs = {
        "a time, made up": regex_sides(INVENT, STAMP),
        "no letter e": letters,
        "two prompts": {
            "ppl": ours(lm.chat(messages(DOG), **ends) * lm.chat(messages(SEA), **ends), MAX_TOKENS),
            "genlm-control": theirs(peers.genlm(pair, None), MAX_TOKENS),
        },
        "a time, repeated": regex_sides(REPEAT, STAMP),
        "free": {
            "ppl": ours(lm.chat(messages(STORY), **ends), MAX_TOKENS),
            "genlm-control": theirs(peers.genlm([prompt(lm, STORY)], None), MAX_TOKENS),
        },
    }
    for num in map(int, os.environ.get("BENCH_PARTICLES", "8,32,128").split(",")):
        for title, sides in programs.items():
            if not chosen(title) or (num > 32 and title in ("free", "a time, repeated")):
                continue
            # Sampling from the whole product walks the vocabulary for every particle in Python, as llamppl's masks do.
            skip = {"genlm-control, direct", "llamppl"} if num > 32 else set()
            compare(title, sides, num, REPEATS if num <= 32 else 2, skip)


def evidence(lm: LanguageModel, peers, num: int = 32) -> None:
    """Compare the estimates of log Z over runs, and with the sum over all completions."""
    cities = "|".join(CITIES)
    chat = lambda text, budget: lm.chat(messages(text), max_tokens=budget)  # noqa: E731
    choose = {"constraint": Choice(CITIES), "require_end": True}
    both = chat(CAPITAL, MAX_TOKENS) * chat(VISIT, MAX_TOKENS)
    programs = {
        "one of 20 cities": (
            MAX_TOKENS,
            [prompt(lm, CAPITAL)],
            {
                "ppl": chat(CAPITAL, MAX_TOKENS).constrain(**choose),
                "genlm-control, AWRS": peers.genlm([prompt(lm, CAPITAL)], cities, by_rejection=True),
                "genlm-control, direct": peers.genlm([prompt(lm, CAPITAL)], cities),
            },
        ),
        "one of 20 cities, two prompts": (
            MAX_TOKENS,
            [prompt(lm, CAPITAL), prompt(lm, VISIT)],
            {
                "ppl": both.constrain(**choose),
                "genlm-control, direct": peers.genlm([prompt(lm, CAPITAL), prompt(lm, VISIT)], cities),
            },
        ),
        "a time": (
            MAX_TOKENS,
            None,
            {
                "ppl": chat(TIME, MAX_TOKENS).constrain(Regex(CLOCK), require_end=True),
                "genlm-control, AWRS": peers.genlm([prompt(lm, TIME)], CLOCK, by_rejection=True),
                "genlm-control, direct": peers.genlm([prompt(lm, TIME)], CLOCK),
            },
        ),
        "no letter e, 8 tokens": (
            8,
            None,
            {
                "ppl": chat(DOG, 8).constrain(Regex(LETTERS), require_end=True),
                "genlm-control, AWRS": peers.genlm([prompt(lm, DOG)], LETTERS, by_rejection=True),
                "llamppl": peers.llamppl_without(chat_text(lm, DOG), "eE"),
            },
        ),
    }
    for title, (budget, summed, sides) in programs.items():
        if not chosen(title):
            continue
        truth = None if summed is None else exact(lm, summed)
        shown = "" if truth is None else f"; exact {truth:.4f}"
        print(f"\nlog Z, {title}, N = {num}, {RUNS} runs{shown}")
        mine = None
        for name, program in sides.items():
            run = theirs(program, budget) if callable(program) else ours(program, budget)
            found = np.array([run(1000 + seed, num)[0] for seed in range(RUNS)])
            broken = int(np.sum(np.isnan(found)))
            found = found[~np.isnan(found)]
            mean, error = found.mean(), found.std(ddof=1) / np.sqrt(len(found))
            peak = found.max()  # E[Z] and not E[log Z] is what all sides estimate without bias
            scaled = np.exp(found - peak)
            unbiased = peak + np.log(scaled.mean())
            spread = scaled.std(ddof=1) / np.sqrt(len(found)) / scaled.mean()
            line = (
                f"  {name:24s} mean of log Z {mean:9.4f} +- {error:.4f}   log of mean Z {unbiased:9.4f} +- {spread:.4f}"
            )
            if truth is not None:
                line += (
                    f"   off exact by {(np.exp(unbiased - truth) - 1) / (spread * np.exp(unbiased - truth)):5.2f} s.e."
                )
            if mine is None:
                mine = mean, error
            else:
                line += f"   z against ppl {(mean - mine[0]) / np.hypot(error, mine[1]):5.2f}"
            print(line + (f"   {broken} broke off" if broken else ""), flush=True)


def exact(lm: LanguageModel, prompts: list[list[int]]) -> float:
    """Sum prod_i p_i(tokens, end token) over every sequence of tokens that writes a city, in float64."""
    texts = lm.byte_vocabulary.tokens
    number: dict[bytes, list[int]] = {}
    for token, text in enumerate(texts):
        if text:
            number.setdefault(text, []).append(token)

    def cut(text: bytes) -> list[list[int]]:
        if not text:
            return [[]]
        return [
            [token, *rest]
            for stop in range(1, len(text) + 1)
            for token in number.get(text[:stop], [])
            for rest in cut(text[stop:])
        ]

    ways = [way for city in CITIES for way in cut(city.encode()) if len(way) < MAX_TOKENS]
    end = lm.end_tokens[0]
    assert len(lm.end_tokens) == 1
    total = np.zeros(len(ways))
    longest = max(map(len, ways))
    followed = np.array([[*way, end] + [end] * (longest - len(way)) for way in ways])
    counted = np.arange(longest + 1) <= np.array([len(way) for way in ways])[:, None]

    def score(before, row):
        """Log-probabilities of the tokens of one row after a prompt."""
        tokens = jnp.concatenate([before, row])
        logits = lm.forward(tokens)[len(before) - 1 : -1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), row[:, None], axis=1)[:, 0]

    for one in prompts:
        batch = jax.jit(lambda rows, one=one: jax.lax.map(lambda r: score(jnp.array(one), r), rows, batch_size=8))
        total += np.sum(np.asarray(batch(jnp.asarray(followed)), np.float64), axis=1, where=counted)
    print(f"  {len(ways)} sequences of tokens write the {len(CITIES)} cities")
    return float(np.logaddexp.reduce(total))


def cost(lm: LanguageModel) -> None:
    """Time free and constrained decoding in turns: the same network, the same number of steps."""
    free = lm.chat(messages(STORY), max_tokens=MAX_TOKENS)
    for name, pattern in (("no letter e", LETTERS), ("words", r"(\w+[ ,.])*\w*")):
        if not chosen(name):
            continue
        bound = free.constrain(Regex(pattern))
        print(f"{name}: {Regex(pattern).compile(lm.byte_vocabulary)!r}")
        ways = {
            "free": lambda seed: ppl.infer(free, SMC(32), seed=seed).value,
            "constrained, never resampled": lambda seed, p=bound: ppl.infer(p, ImportanceSampling(32), seed=seed).value,
            "constrained, SMC": lambda seed, p=bound: ppl.infer(p, SMC(32), seed=seed).value,
        }
        steps = {key: float(np.mean(np.asarray(run(1)["length"]))) for key, run in ways.items()}
        report(f"{name}, 32 particles, 32 tokens", side_by_side(ways, REPEATS), (32 * MAX_TOKENS, "tokens/s"))
        print("  mean lengths: " + ", ".join(f"{key} {length:.1f}" for key, length in steps.items()))


def main(names: list[str]) -> None:
    from importlib.metadata import version

    print(machine())
    print(", ".join(f"{name} {version(name)}" for name in ("genlm-control", "genlm-backend", "llamppl", "torch")))
    if names == ["cost"]:
        return cost(LanguageModel.load(fetch()))
    lm, peers = load()
    for name in names:
        print(f"\n## {name}", flush=True)
        {"speed": lambda: speed(lm, peers), "evidence": lambda: evidence(lm, peers), "cost": lambda: cost(lm)}[name]()


if __name__ == "__main__":
    main(sys.argv[1:] or ["speed", "evidence", "cost"])
