"""Models for the language tests: the recorded tiny networks, and the real one where its weights are."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppl.models.language import LanguageModel

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "language"
TINY = ("llama2", "llama3", "llama_linear", "llama_tied", "qwen2", "qwen3", "gpt2")


def advance(lm, state, token):
    """Read a token inside a loop that was entered with `state.enter_loop(1, ...)`, as `ppl.scan` does it."""
    return lm.extend(state, token).end_iteration(state)[0]


def spread(state, particles):
    """The state of a population, all at the same place: what particles share is not repeated."""
    return jax.tree.map(
        lambda axis, leaf: leaf if axis is None else jnp.broadcast_to(leaf, (particles, *leaf.shape)),
        state.particle_axes(),
        state,
        is_leaf=lambda axis: axis is None,
    )


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; `scripts/fetch_smollm2.py` fetches it."""
    cache = os.environ.get("GENPPL_CACHE") or Path.home() / ".cache" / "genppl"
    path = Path(os.environ.get("GENPPL_SMOLLM2") or Path(cache) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not path.exists():
        pytest.fail(f"{path} is missing: run `python scripts/fetch_smollm2.py` or set GENPPL_SMOLLM2.")
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_path) -> LanguageModel:
    """The real network, read once."""
    return LanguageModel.load(smollm2_path, dtype=np.float32)


@pytest.fixture(scope="session")
def shallow(smollm2) -> LanguageModel:
    """The first two blocks of the real network, with its whole vocabulary: laws of programs hold for any network."""
    decoder = smollm2.decoder
    decoder.blocks = nnx.List(decoder.blocks[:2])
    decoder.config = dataclasses.replace(decoder.config, num_layers=2)
    return LanguageModel(decoder, smollm2.tokenizer, end_tokens=smollm2.end_tokens)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 128 tokens: three special ones and 125 bytes, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:125]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, byte_tokenizer):
    """A function from a fixture's name to a folder with network and tokenizer."""
    root = tmp_path_factory.mktemp("tiny")
    for name in TINY:
        shutil.copytree(FIXTURES / name, root / name)
        byte_tokenizer.save_pretrained(root / name)
    return lambda name: root / name


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """A function from a fixture's name to the loaded model, each read once."""
    loaded = {}

    def load(name: str) -> LanguageModel:
        if name not in loaded:
            loaded[name] = LanguageModel.load(tiny_folder(name), dtype=np.float32)
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def one_block(tiny) -> LanguageModel:
    """The first block of a tiny network: laws of programs hold for any network."""
    decoder = tiny("llama3").decoder
    decoder.blocks = nnx.List(decoder.blocks[:1])
    decoder.config = dataclasses.replace(decoder.config, num_layers=1)
    return LanguageModel(decoder, tiny("llama3").tokenizer, end_tokens=tiny("llama3").end_tokens)


@pytest.fixture(scope="session")
def expected():
    """A function from a fixture's name to the recorded tokens and logits."""
    return lambda name: np.load(FIXTURES / name / "expected.npz")
