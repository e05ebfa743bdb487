"""Checkpoints: a folder or a hub repository in the Hugging Face layout, read without torch.

A folder holds `config.json`, weights in `model.safetensors` or in the shards that `model.safetensors.index.json` lists,
and the tokenizer's files. `build_decoder` turns named tensors into a `Decoder`; GGUF files go through it as well, with
other names. Every tensor that the network needs must be there in its shape, and every tensor that is there must be
needed or known to be redundant: what does not match is said by name. Code that a folder brings with it is never run.

A linear map's tensor is `[out, in]` in most files and `[in, out]` in GPT-2's; ours is `[in, out]`, with queries, keys
and values side by side, and gate and up.
"""

import dataclasses
import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (its import teaches NumPy the name bfloat16, which safetensors asks for)
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from ppl.models.language.config import DecoderConfig
from ppl.models.language.decoder import Block, Decoder
from ppl.models.language.settings import Settings

__all__ = [
    "NAMES_LLAMA",
    "REDUNDANT",
    "Tensors",
    "build_decoder",
    "check_vocabulary",
    "generation_end_tokens",
    "locate",
    "open_safetensors",
    "read_folder",
    "read_json",
    "read_tokenizer",
]

NAMES_LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm",
    "query": "model.layers.{}.self_attn.q_proj",
    "key": "model.layers.{}.self_attn.k_proj",
    "value": "model.layers.{}.self_attn.v_proj",
    "query_norm": "model.layers.{}.self_attn.q_norm",
    "key_norm": "model.layers.{}.self_attn.k_norm",
    "output": "model.layers.{}.self_attn.o_proj",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
}
_NAMES_GPT2 = {
    "embedding": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "final_norm": "transformer.ln_f",
    "head": "lm_head.weight",
    "attention_norm": "transformer.h.{}.ln_1",
    "qkv": "transformer.h.{}.attn.c_attn",
    "output": "transformer.h.{}.attn.c_proj",
    "mlp_norm": "transformer.h.{}.ln_2",
    "up": "transformer.h.{}.mlp.c_fc",
    "down": "transformer.h.{}.mlp.c_proj",
}
_NAMES_LLADA = {
    "embedding": "model.transformer.wte.weight",
    "final_norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out.weight",
    "attention_norm": "model.transformer.blocks.{}.attn_norm",
    "query": "model.transformer.blocks.{}.q_proj",
    "key": "model.transformer.blocks.{}.k_proj",
    "value": "model.transformer.blocks.{}.v_proj",
    "output": "model.transformer.blocks.{}.attn_out",
    "mlp_norm": "model.transformer.blocks.{}.ff_norm",
    "gate": "model.transformer.blocks.{}.ff_proj",
    "up": "model.transformer.blocks.{}.up_proj",
    "down": "model.transformer.blocks.{}.ff_out",
}
# Tables of cosines and masks that old files carry; both are computed here.
REDUNDANT = re.compile(r".*\.rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt", "*.jinja"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_FLOATS = ("F64", "F32", "F16", "BF16")  # other types in safetensors are quantised weights, or no weights
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


class Tensors:
    """The named tensors of a checkpoint, which remembers what has been taken."""

    def __init__(self, names: list[str], read: Callable[[str], np.ndarray], source: str):
        """Wrap a file.

        Args:
            names: all tensors of the file.
            read: reads one of them.
            source: what to call the file in messages.
        """
        self.names, self.source = set(names), source
        self._read, self._left = read, set(names)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Read a tensor.

        Args:
            name: its name in the file.
            shape: the shape that the configuration calls for.

        Returns:
            The array.

        Raises:
            ValueError: there is no such tensor, or its shape is another one.
        """
        if name not in self.names:
            raise ValueError(f"{self.source} has no tensor `{name}`, which its configuration calls for.")
        array = self.peek(name)
        if array.shape != shape:
            raise ValueError(
                f"tensor `{name}` in {self.source} has shape {array.shape}; its configuration calls for {shape}."
            )
        self._left.discard(name)
        return array

    def peek(self, name: str) -> np.ndarray:
        """Read a tensor that is there, without taking it."""
        return self._read(name)

    def finish(self, redundant: Callable[[str], bool]) -> None:
        """Check that nothing is left over.

        Args:
            redundant: tells which names may be left.

        Raises:
            ValueError: a tensor was neither taken nor redundant.
        """
        left = sorted(name for name in self._left if not redundant(name))
        if left:
            shown = ", ".join(f"`{name}`" for name in left[:4]) + (", ..." if len(left) > 4 else "")
            raise ValueError(
                f"{self.source} has {len(left)} tensors that a network of its configuration has no use for: {shown}."
            )


def locate(source: str | Path) -> Path:
    """Find a checkpoint on this machine, or fetch it from the hub.

    Args:
        source: a folder, a `.gguf` file, or the id of a hub repository such as "HuggingFaceTB/SmolLM2-135M".

    Returns:
        The path of the folder or file.

    Raises:
        FileNotFoundError: nothing of that name here, and no hub repository either, or the hub could not be reached.
    """
    if not isinstance(source, (str, Path)) or not str(source):
        raise TypeError(f"`source` must be a folder, a .gguf file or a hub id, got {source!r}.")
    path = Path(source).expanduser()
    if path.exists():
        return path
    accepted = "accepted are a folder, a .gguf file, and a hub id of the form owner/name"
    if path.suffix == ".gguf" or path.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise FileNotFoundError(f"`source` = {str(source)!r}: no such file or folder; {accepted}.")
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=_HUB_FILES))
    except Exception as error:  # the client raises its own, the operating system's and its HTTP library's errors
        raise FileNotFoundError(
            f"`source` = {str(source)!r}: no such file or folder here, and the Hugging Face hub gave no repository of "
            f"that name or could not be reached ({type(error).__name__}: {str(error).splitlines()[0]}); {accepted}."
        ) from error


def read_folder(folder: Path, dtype: Any, *, causal: bool = True) -> tuple[Decoder, DecoderConfig, Any]:
    """Read a checkpoint in the Hugging Face layout.

    Args:
        folder: holds `config.json`, safetensors and the tokenizer's files.
        dtype: of the weights on the device.
        causal: whether the caller needs a network that reads from left to right, or one that reads both ways.

    Returns:
        The network, its configuration, and the tokenizer.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the configuration is not supported or of the other kind, or the tensors do not fit it.
    """
    settings = read_json(folder, "config.json")
    config = DecoderConfig.from_hf(settings, str(folder / "config.json"))
    if config.causal != causal:
        reader = "LanguageModel" if config.causal else "MaskedDiffusion"
        raise ValueError(f"{folder} holds a {config.architecture} network; load it with ppl.models.{reader}.")
    tokenizer = read_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size, str(folder))
    names = {"gpt2": _NAMES_GPT2, "llada": _NAMES_LLADA}.get(config.architecture, NAMES_LLAMA)
    tensors = open_safetensors(folder, prefix="transformer." if config.architecture == "gpt2" else "")
    if config.tied_embeddings and {names["head"], names["embedding"]} <= tensors.names:
        # As in transformers: a head of its own counts, whatever the configuration says.
        if not np.array_equal(tensors.peek(names["head"]), tensors.peek(names["embedding"])):
            config = dataclasses.replace(config, tied_embeddings=False)
    decoder = build_decoder(
        config,
        tensors,
        names,
        dtype=dtype,
        kernels_in_out=config.architecture == "gpt2",
        redundant=lambda name: bool(REDUNDANT.fullmatch(name)) or (config.tied_embeddings and name == names["head"]),
    )
    return decoder, config, tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int, source: str) -> None:
    """Check that the network has a row for every token of text.

    Special tokens beyond the rows pass: some tokenizers have a padding token that their network never reads. A prompt
    that holds one is refused.

    Raises:
        ValueError: a token of text has no row.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    outside = [token for token in range(vocab_size, len(tokenizer)) if token not in special]
    if outside:
        raise ValueError(
            f"{source} has a tokenizer of {len(tokenizer)} tokens and a vocabulary (`vocab_size`) of {vocab_size}: the "
            f"network has no row for token {outside[0]}, {tokenizer.convert_ids_to_tokens(outside[0])!r}."
        )


def generation_end_tokens(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The end tokens that `generation_config.json` adds to the configuration's; empty without the file."""
    if not (folder / "generation_config.json").exists():
        return ()
    file = Settings(read_json(folder, "generation_config.json"), str(folder / "generation_config.json"))
    return file.tokens("eos_token_id", vocab_size)


def build_decoder(
    config: DecoderConfig,
    tensors: Tensors,
    names: Mapping[str, str],
    *,
    dtype: Any,
    kernels_in_out: bool = False,
    interleaved: bool = False,
    redundant: Callable[[str], bool] = lambda name: False,
) -> Decoder:
    """Make a network of a checkpoint's tensors.

    Args:
        config: the shape.
        tensors: the checkpoint.
        names: what the checkpoint calls each part, with `{}` for the layer.
        dtype: of the weights on the device.
        kernels_in_out: the linear maps are stored `[in, out]`.
        interleaved: queries and keys are stored for rotations of the pairs `(2 i, 2 i + 1)`.
        redundant: tells which tensors may be left over.

    Returns:
        The network, on the default device.

    Raises:
        ValueError: a tensor is missing, left over, or of a wrong shape; the message names it.
    """
    c = config
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating) or jnp.dtype(dtype).itemsize < 2:
        raise ValueError(f"`dtype` must be a type of floating point of at least 16 bits, got {jnp.dtype(dtype).name}.")

    def kernel(part: str, layer: int, width_in: int, width_out: int, bias: bool, heads: int = 0) -> list[np.ndarray]:
        name = names[part].format(layer)
        shape = (width_in, width_out) if kernels_in_out else (width_out, width_in)
        array = tensors.take(f"{name}.weight", shape)
        arrays = [array.T if kernels_in_out else array]
        if bias:
            arrays.append(tensors.take(f"{name}.bias", (width_out,)))
        return [_half_split(array, heads) if heads and interleaved else array for array in arrays]

    def linear(*parts: list[np.ndarray]) -> dict[str, Any]:
        # Rows are outputs: parts of one product are put below each other, then all is turned to [in, out].
        stacked = [np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for arrays in zip(*parts, strict=True)]
        return {"kernel": place(stacked[0].T)} | ({"bias": place(stacked[1])} if len(stacked) > 1 else {})

    def norm(name: str, width: int, kind: str = c.norm) -> dict[str, Any]:
        scale = {"scale": place(tensors.take(f"{name}.weight", (width,)))}
        return scale | ({"bias": place(tensors.take(f"{name}.bias", (width,)))} if kind == "layer" else {})

    def place(array: np.ndarray) -> jax.Array:
        return jnp.asarray(np.ascontiguousarray(array), dtype=dtype)

    def block(layer: int) -> dict[str, Any]:
        hidden, inner, own = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim
        shared = c.num_kv_heads * c.head_dim
        if "qkv" in names:
            qkv = [kernel("qkv", layer, hidden, own + 2 * shared, c.qkv_bias)]
        else:
            qkv = [
                kernel("query", layer, hidden, own, c.qkv_bias, c.num_heads),
                kernel("key", layer, hidden, shared, c.qkv_bias, c.num_kv_heads),
                kernel("value", layer, hidden, shared, c.qkv_bias),
            ]
        up = [kernel(part, layer, hidden, inner, c.mlp_bias) for part in (("gate", "up") if c.gated else ("up",))]
        weights = {
            "attention_norm": norm(names["attention_norm"].format(layer), hidden),
            "qkv": linear(*qkv),
            "output": linear(kernel("output", layer, own, hidden, c.output_bias)),
            "mlp_norm": norm(names["mlp_norm"].format(layer), hidden),
            "up": linear(*up),
            "down": linear(kernel("down", layer, inner, hidden, c.mlp_bias)),
        }
        if c.qk_norm:
            weights["query_norm"] = norm(names["query_norm"].format(layer), c.head_dim, "rms")
            weights["key_norm"] = norm(names["key_norm"].format(layer), c.head_dim, "rms")
        return weights

    weights = {
        "embedding": place(tensors.take(names["embedding"], (c.vocab_size, c.hidden_size)).T),
        "final_norm": norm(names["final_norm"], c.hidden_size),
        "blocks": {layer: block(layer) for layer in range(c.num_layers)},
    }
    if c.positions == "learned":
        weights["positions"] = place(tensors.take(names["positions"], (c.context_length, c.hidden_size)))
    if not c.tied_embeddings:
        weights["head"] = place(tensors.take(names["head"], (c.vocab_size, c.hidden_size)).T)
    tensors.finish(redundant)

    graph, state = nnx.split(_abstract(config, dtype))
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)


def _abstract(config: DecoderConfig, dtype: Any) -> Decoder:
    """The network without numbers. Its blocks are one block many times: to trace the drawing of each takes seconds."""
    shallow = dataclasses.replace(config, num_layers=1)
    network = nnx.eval_shape(lambda: Decoder(shallow, rngs=nnx.Rngs(0), dtype=dtype))
    block = nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0), dtype=dtype))
    network.config = config
    network.blocks = nnx.List([nnx.clone(block) for _ in range(config.num_layers)])
    return network


def _half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from pairs `(2 i, 2 i + 1)` to pairs `(i, i + D / 2)`."""
    rows = array.reshape(heads, -1, 2, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The content of a JSON file of a checkpoint's folder.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not valid JSON.
    """
    path = folder / name
    if not path.exists():
        gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
        hint = "" if gguf is None else f"; load its file {gguf.name} by itself"
        raise FileNotFoundError(
            f"{folder} has no {name}; a checkpoint folder holds config, safetensors and tokenizer{hint}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or too deep
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings by name (a JSON object), got {type(content).__name__}.")
    return content


def open_safetensors(folder: Path, prefix: str) -> Tensors:
    """The tensors of a folder, in one file or in shards; names that lack `prefix` get it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an adapter beside the weights, a file that is damaged or lies outside of the folder, a name that
            stands twice, or, once it is read, a tensor that is not of floating point.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} has an adapter (adapter_config.json), which changes the weights; merge it into them first "
            "(`merge_and_unload` of the package peft) and load the result."
        )
    index = "model.safetensors.index.json"
    chosen: dict[str, str] = {}
    # A whole file comes before shards, as in transformers.
    if not (folder / "model.safetensors").exists() and (folder / index).exists():
        chosen = _shards(folder, index)
    where: dict[str, tuple[Path, Any, str]] = {}
    for path in sorted(set(chosen.values())) or ["model.safetensors"]:
        if not (folder / path).exists():
            raise FileNotFoundError(f"{folder} has no {path}; weights are read from safetensors files alone.")
        _check_header(folder / path)
        try:
            file = safe_open(folder / path, framework="numpy")
            stored = list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{folder / path} is not a whole safetensors file: {error}.") from error
        for name in stored:
            if chosen.get(name, path) != path:
                continue  # the index takes this one from another shard
            known = name if name.startswith((prefix, "lm_head.")) else prefix + name
            if known in where:
                raise ValueError(f"tensor `{known}` stands in {where[known][0]} and in {folder / path}.")
            where[known] = folder / path, file, name

    def read(name: str) -> np.ndarray:
        path, file, own = where[name]
        kind = str(file.get_slice(own).get_dtype())
        if kind not in _FLOATS:
            raise ValueError(
                f"tensor `{name}` in {path} is of type {kind}; accepted are {', '.join(_FLOATS)}. Quantised weights "
                "are read from GGUF files alone: take the model's unquantised folder, or a .gguf file of it."
            )
        return file.get_tensor(own)

    return Tensors(list(where), read, str(folder))


def _shards(folder: Path, index: str) -> dict[str, str]:
    """Which file of the folder holds which tensor."""
    shards = read_json(folder, index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(path, str) for path in shards.values()):
        raise ValueError(f"`weight_map` in {folder / index} must name a file for every tensor.")
    for path in shards.values():
        parts = PurePosixPath(path.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or not parts.parts or ":" in parts.parts[0]:
            raise ValueError(f"{folder / index} names {path!r}, outside of its folder; accepted are files within it.")
        if not path.endswith(".safetensors"):
            raise ValueError(f"{folder / index} names {path!r}; weights are read from safetensors files alone.")
    return shards


def _check_header(path: Path) -> None:
    """Check what the library that reads the tensors leaves open: a header that fits, and names that stand once."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", start)[0] if len(start := file.read(8)) == 8 else size
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(
                f"{path} is not a whole safetensors file: it has {size} bytes, and its header would end after "
                f"{8 + length}."
            )
        header = file.read(length)
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for name, value in pairs:
            if name in read:
                twice.append(name)
            read[name] = value
        return read

    try:
        json.loads(header, object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: its header is no JSON ({error}).") from error
    if twice:
        raise ValueError(f"{path} is not a whole safetensors file: its header has `{min(twice)}` twice.")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint's folder, a `transformers` one. Code in the folder is never run.

    Raises:
        FileNotFoundError: none of the files that hold one is there.
        ValueError: a file that is damaged, or a tokenizer that needs code of the folder's own.
    """
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there.")
    from transformers import AutoTokenizer  # takes seconds to import, and GGUF files do not need it

    name = "tokenizer_config.json"
    custom = read_json(folder, name).get("auto_map") if (folder / name).exists() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        # What cannot work is said here, and not at the first prompt that meets it.
        tokenizer.decode(tokenizer("a")["input_ids"])
        model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        unknown = getattr(model, "unk_token", None)
        if unknown is not None and tokenizer.backend_tokenizer.token_to_id(unknown) is None:
            raise ValueError(f"its unknown token {unknown!r} is not in its vocabulary")
        return tokenizer
    except Exception as error:  # transformers and the tokenizers library raise what they trip over first
        if custom:
            raise ValueError(
                f"{folder / name} names code of its own (`auto_map` = {custom!r}), which is never run; accepted are "
                "tokenizers of transformers. If the folder has a tokenizer.json that is complete, take `auto_map` out "
                'and set "tokenizer_class": "PreTrainedTokenizerFast".'
            ) from error
        said = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(f"the tokenizer in {folder} cannot be read: {type(error).__name__}: {said}") from error
