"""The reference implementation of a language model: transformers' Llama in torch, with the same weights.

transformers reads the .gguf file and dequantises it into a `LlamaForCausalLM` in float32: the same numbers
that the library computes with. What is timed is plain ancestral sampling,

    model.generate(do_sample=True, temperature=1, top_k=0, top_p=1, num_return_sequences=N, ...)

with a fixed number of new tokens, the prompt's forward pass included, N sequences in one batch. Tokens per
second are N times the number of new tokens, divided by the median time.

It needs torch (``pip install genppl[bench-text]``); nothing of the library is imported.
"""

import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

__all__ = ["Throughput", "load", "log_probabilities", "tokens_per_second"]


class Throughput(NamedTuple):
    """What a timing gives.

    Attributes:
        tokens_per_second: sampled tokens of all sequences, divided by the median time.
        median_seconds: of one call, prompt included.
        seconds: of every call, in the order they were made.
    """

    tokens_per_second: float
    median_seconds: float
    seconds: tuple[float, ...]


def load(gguf_path: str | Path, num_threads: int = 2) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a .gguf file, dequantised to float32.

    Args:
        gguf_path: the file.
        num_threads: of torch, for the whole process.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(gguf_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. `python scripts/fetch_smollm2.py` prints where the weights are."
        )
    torch.set_num_threads(num_threads)
    arguments = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **arguments)
    model = LlamaForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **arguments)
    return model.eval(), tokenizer


def tokens_per_second(
    gguf_path: str | Path,
    prompt: str,
    num_particles: int,
    new_tokens: int = 32,
    repeats: int = 5,
    *,
    loaded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase] | None = None,
) -> Throughput:
    """Time the sampling of `num_particles` continuations of a prompt.

    One call is made beforehand and not counted.

    Args:
        gguf_path: the weights.
        prompt: text that is continued.
        num_particles: sequences in the batch.
        new_tokens: tokens of each sequence; an end token does not end it earlier.
        repeats: timed calls.
        loaded: what `load` gave, to read the file once for several timings.

    Returns:
        A `Throughput`.
    """
    model, tokenizer = load(gguf_path) if loaded is None else loaded
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]

    def sample(seed: int) -> float:
        torch.manual_seed(seed)
        start = time.perf_counter()
        tokens = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=num_particles,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
        elapsed = time.perf_counter() - start
        if tokens.shape != (num_particles, length + new_tokens):
            raise RuntimeError(f"generate returned {tuple(tokens.shape)}, not {new_tokens} new tokens each.")
        return elapsed

    with torch.inference_mode():
        sample(0)
        seconds = tuple(sample(seed) for seed in range(1, repeats + 1))
    median = statistics.median(seconds)
    return Throughput(num_particles * new_tokens / median, median, seconds)


def log_probabilities(
    gguf_path: str | Path,
    token_ids: list[int],
    *,
    loaded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase] | None = None,
) -> torch.Tensor:
    """Compute the model's next-token log-probabilities after every prefix, to compare implementations.

    Args:
        gguf_path: the weights.
        token_ids: a sequence of n tokens.
        loaded: what `load` gave.

    Returns:
        Shape (n, vocabulary), float32, nats.
    """
    model, _ = load(gguf_path) if loaded is None else loaded
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([token_ids])).logits[0], dim=-1)
