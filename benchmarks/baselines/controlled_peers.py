"""Controlled text by genlm-control and llamppl, on a checkpoint folder with the library's own weights.

Both rest on genlm-backend, which batches the particles' requests to transformers in torch. It caches log-probabilities
and the prompt's keys and values; the cache is emptied before every run and the prompt read again, as it is by the other
side. Automata and their caches are kept from run to run, which favours the peers.

A run returns the estimate of log Z and the number of tokens that the final particles hold, end tokens included. Both
libraries resample systematically where the effective sample size falls below half of the particles. genlm-control
appends an end token to what is not finished after `max_tokens - 1` tokens and weighs by its probability, so that its
target is the text given that it ends within `max_tokens`; the llamppl model here does the same.

It needs ``pip install genppl[bench-text-peers]``; nothing of the library is imported.
"""

import asyncio
import json
import os
import string
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from genlm.backend.llm import AsyncTransformer
from genlm.control import AWRS, BoolFSA, PromptedLLM, direct_token_sampler
from llamppl import CachedCausalLM, LMContext, Model, smc_standard
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

__all__ = ["Peers", "Run", "write_folder"]


class Run(NamedTuple):
    """What a run gives: the estimate of log Z in nats, the particles' tokens, and seconds."""

    log_evidence: float
    num_tokens: int
    seconds: float


def write_folder(folder: str | Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a dequantised model as a checkpoint in float32, which transformers refuses to do for a .gguf file's."""
    folder = Path(folder)
    settings = model.config.to_dict() | {"dtype": "float32", "architectures": ["LlamaForCausalLM"]}
    settings.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(settings, default=str))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {name: w.contiguous().clone() for name, w in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


class Peers:
    """Both libraries on one network."""

    def __init__(self, folder: str | Path, *, num_threads: int = 2, batch_size: int = 20):
        """Load the network.

        Args:
            folder: what `write_folder` wrote.
            num_threads: of torch, for the whole process.
            batch_size: how many requests genlm-backend gathers; 20 is its default.
        """
        warnings.filterwarnings("ignore", module="genlm")
        torch.set_num_threads(num_threads)
        self.lm = AsyncTransformer.from_name(str(folder), batch_size=batch_size)
        self._llamppl = CachedCausalLM(self.lm)

    def log_probabilities(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the log-probabilities `[V]` of the token after some."""
        return self.lm.next_token_logprobs_uncached(list(tokens)).numpy()

    def genlm(
        self, prompts: Sequence[Sequence[int]], pattern: str | None, *, by_rejection: bool = False
    ) -> Callable[[int, int, int], Run]:
        """Build a program of genlm-control.

        Args:
            prompts: tokens of one prompt, or of several whose completions' probabilities are multiplied.
            pattern: the regular expression that the completion matches; None for any.
            by_rejection: sample by AWRS instead of from the whole product.

        Returns:
            A function of seed, number of particles and `max_tokens`.
        """
        models = [PromptedLLM(self.lm, prompt_ids=list(prompt)) for prompt in prompts]
        product = models[0]
        for model in models[1:]:
            product = product * model
        if pattern is None:
            sampler = direct_token_sampler(product)
        else:
            automaton = BoolFSA.from_regex(pattern).coerce(models[0], f=b"".join)
            sampler = AWRS(product, automaton) if by_rejection else direct_token_sampler(product * automaton)

        def run(seed: int, num_particles: int, max_tokens: int) -> Run:
            start = self._begin(seed, prompts)
            found = asyncio.run(
                sampler.smc(num_particles, ess_threshold=0.5, max_tokens=max_tokens, resampling_method="systematic")
            )
            return Run(float(found.log_ml), sum(map(len, found.contexts)), time.perf_counter() - start)

        return run

    def llamppl_without(self, prompt: str, letters: str) -> Callable[[int, int, int], Run]:
        """Build the llamppl model of a text in printable ASCII without some letters.

        Args:
            prompt: the prompt, a text that the tokenizer cuts as the other sides' tokens are.
            letters: the characters that are forbidden.
        """
        allowed = set(string.printable.encode()) - set(letters.encode())
        special = set(self.lm.tokenizer.all_special_ids)
        end = self.lm.tokenizer.eos_token_id
        texts = {number: token.byte_string for number, token in enumerate(self.lm.byte_vocab) if number not in special}
        mask = {number for number, text in texts.items() if set(text) <= allowed} | {end}
        tokens = self.lm.tokenizer.encode(prompt)

        def run(seed: int, num_particles: int, max_tokens: int) -> Run:
            start = self._begin(seed, [tokens])
            model = _Masked(self._llamppl, prompt, mask, end, max_tokens)
            particles = asyncio.run(smc_standard(model, num_particles, 0.5, resampling_method="systematic"))
            weights = np.array([particle.weight for particle in particles])
            log_evidence = np.logaddexp.reduce(weights) - np.log(num_particles)
            count = sum(max_tokens - particle.left for particle in particles)
            return Run(float(log_evidence), count, time.perf_counter() - start)

        return run

    def _begin(self, seed: int, prompts: Sequence[Sequence[int]]) -> float:
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.lm.clear_cache()
        start = time.perf_counter()
        for prompt in prompts:
            self.lm.cache_kv(list(prompt))
        return start


class _Masked(Model):
    """A text whose tokens are of a set, ended by force within its budget."""

    def __init__(self, lm: CachedCausalLM, prompt: str, mask: set[int], end: int, max_tokens: int):
        super().__init__()
        self.context = LMContext(lm, prompt)
        self.mask, self.end, self.left = mask, end, max_tokens

    def immutable_properties(self) -> set[str]:
        return {"mask", "end"}

    async def step(self) -> None:
        mask = {self.end} if self.left == 1 else self.mask
        await self.observe(self.context.mask_dist(mask), True)
        token = await self.sample(self.context.next_token())
        self.left -= 1
        if token.token_id == self.end:
            self.finish()
