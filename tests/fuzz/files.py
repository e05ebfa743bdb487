"""Damaged model files: each is refused with a reason, or read right; none crashes, hangs or fills the memory.

A tiny GGUF file and a tiny folder with safetensors are built, changed at random, and loaded. Changes are of two sorts:
of bytes (flips, cuts, numbers replaced by extreme ones, pieces left out or repeated) and of what the bytes mean (a key
of the metadata, an entry of a tensor's description, an entry of a JSON file). A file that loads is compared with what
other readers make of it: the `gguf` package and `safetensors`.

    python -m tests.fuzz.files --seconds 600 --seed 1          many files
    python -m tests.fuzz.files --seed 1 --case 4711            one of them again

Every case depends on its seed and number alone.
"""

import argparse
import contextlib
import copy
import faulthandler
import json
import math
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from ppl.models.language import LanguageModel
from ppl.models.language.gguf_container import open_gguf
from tests.models.language.gguf_writer import write_gguf

__all__ = ["replay", "run"]

_FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "language" / "llama_tied"
_LIMIT = 30  # seconds for one file
_MEMORY = 512  # MiB that one file may add
_NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    33,
    127,
    128,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63,
    2**64 - 1,
]
_FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, math.inf, -math.inf, math.nan]
_STRINGS = ["", "a", "llama", "gpt2", "qwen3", "linear", "yarn", "none", "é", "\0", "x" * 300, "../x", "▁", "<s>"]
_SUSPECT = [
    "quantization_config", "rope_scaling", "rope_parameters", "sliding_window", "head_dim", "num_key_value_heads",
    "attention_bias", "final_logit_softcapping", "auto_map", "layer_types", "architectures", "my_note",
]  # fmt: skip
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def run(seconds: float, seed: int, max_cases: int | None = None) -> int:
    """Load changed files until the time or the number of cases is reached.

    Args:
        seconds: how long; the case that runs is finished.
        seed: of the cases.
        max_cases: how many; None for as many as there is time for.

    Returns:
        The number of cases.

    Raises:
        AssertionError: a file crashed the reader, took too long or too much, was refused without a reason, or was read
            wrongly. The message says how to run it again.
    """
    begin, number = time.monotonic(), 0
    with _originals() as originals:
        while time.monotonic() - begin < seconds and (max_cases is None or number < max_cases):
            _case(originals, seed, number)
            number += 1
    return number


def replay(seed: int, number: int) -> str:
    """Run one case; return what became of it."""
    with _originals() as originals:
        return _case(originals, seed, number)


@contextlib.contextmanager
def _originals() -> Iterator[Path]:
    """A folder with the files before they are changed, and with room for one that is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "original"
        shutil.copytree(_FIXTURE, folder)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:124]
        vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet, "he"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
        (folder / "generation_config.json").write_text('{"eos_token_id": [2]}')
        write_gguf(folder, Path(root) / "original.gguf", linear=2.0)
        LanguageModel.load(folder)  # what is imported and compiled once counts for no case
        (Path(root) / "pieces.gguf").write_bytes(_with_pieces((Path(root) / "original.gguf").read_bytes()))
        for name in ("original.gguf", "pieces.gguf"):
            LanguageModel.load(Path(root) / name)
        yield Path(root)


def _case(root: Path, seed: int, number: int) -> str:
    rng = random.Random(f"{seed}:{number}")
    again = f"python -m tests.fuzz.files --seed {seed} --case {number}"
    path = root / "changed"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    if rng.random() < 0.6:
        path = path / "model.gguf"
        content = (root / rng.choice(["original.gguf", "pieces.gguf"])).read_bytes()
        content, what = _change_meaning(rng, content) if rng.random() < 0.5 else _change_bytes(rng, content, 6000)
        path.write_bytes(content)
    else:
        shutil.copytree(root / "original", path, dirs_exist_ok=True)
        what = _change_folder(rng, path)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    faulthandler.dump_traceback_later(4 * _LIMIT, exit=True)  # where a library neither returns nor lets Python speak
    try:
        with _alarm():
            outcome = _load(path)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error} ({again})") from error
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise AssertionError(f"{what}: {type(error).__name__}: {error} ({again})") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.monotonic() - begin < _LIMIT, f"{what}: took {time.monotonic() - begin:.0f} s ({again})"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < _MEMORY, f"{what}: added {grown:.0f} MiB ({again})"
    return f"{what}: {outcome}"


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Break off what runs in Python for too long; signals reach the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise AssertionError(f"not done after {_LIMIT} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _load(path: Path) -> str:
    """Load a file or folder: refused in words, or read as others read it."""
    try:
        lm = LanguageModel.load(path, dtype=np.float32)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert "`" in message or path.name in message, f"a refusal that names nothing: {message!r}"
        assert type(error) in (ValueError, FileNotFoundError), f"a refusal of another's making: {error!r}"
        return f"refused: {message}"
    if path.suffix == ".gguf":
        _compare(path)
    else:
        read = load_file(path / "model.safetensors")
        table = read.get("model.embed_tokens.weight")
        np.testing.assert_array_equal(np.asarray(lm.decoder.embedding[...]).T, np.asarray(table, np.float32))
    tokens = lm.encode("he a", start=True)
    assert all(isinstance(token, int) for token in tokens)
    assert isinstance(lm.decode([token for token in tokens if token < lm.vocab_size]), str)
    assert all(0 <= token < lm.vocab_size for token in lm.end_tokens)
    return "read"


def _compare(path: Path) -> None:
    """Compare with the package `gguf`, where it reads the file too."""
    ours = open_gguf(path)
    try:
        theirs = gguf.GGUFReader(path)
    except Exception:  # it says less of why than ours would; what it cannot read cannot be compared
        return
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert repr(ours.metadata) == repr(fields), "the metadata differ from what the package gguf reads"  # NaN is itself
    for tensor in theirs.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.read(tensor.name), expected, err_msg=tensor.name)


# Changes of bytes.


def _change_bytes(rng: random.Random, content: bytes, header: int) -> tuple[bytes, str]:
    changed = bytearray(content)
    reach = min(header, len(changed)) if rng.random() < 0.8 else len(changed)
    kind = rng.choice(["flip", "flip", "number", "number", "cut", "leave out", "repeat", "insert"])
    place = rng.randrange(reach)
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = rng.randrange(reach)
            changed[place] ^= 1 << rng.randrange(8)
    elif kind == "number":
        value = struct.pack("<Q", rng.choice(_NUMBERS))[: rng.choice([1, 2, 4, 8])]
        changed[place : place + len(value)] = value
    elif kind == "cut":
        del changed[place:]
    elif kind == "leave out":
        del changed[place : place + rng.choice([1, 4, 8, 100])]
    elif kind == "repeat":
        changed[place:place] = changed[place : place + rng.choice([1, 8, 40, 400])]
    else:
        changed[place:place] = rng.randbytes(rng.choice([1, 4, 8, 32]))
    return bytes(changed), f"{kind} at byte {place}"


# Changes of a GGUF file's meaning.


def _change_meaning(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    fields, tensors, data = _parse(content)
    if rng.random() < 0.6:
        what = _change_field(rng, fields, rng.choice(fields))
    else:
        tensor, other, part = rng.choice(tensors), rng.choice(tensors), rng.randrange(4)
        if part == 0:
            tensor[0] = rng.choice([other[0], tensor[0] + "x", "", "rope_freqs.weight", "output.weight"])
        elif part == 1:
            many = [rng.choice(_NUMBERS)] * len(tensor[1])
            tensor[1] = rng.choice([[], tensor[1][::-1], [*tensor[1], 1], many, other[1]])
        elif part == 2:
            tensor[2] = rng.choice([0, 1, 2, 8, 12, 24, 30, 31, 39, 99, 2**31])
        else:
            tensor[3] = rng.choice([other[3], tensor[3] + 32, tensor[3] + 1, *_NUMBERS])
        what = f"tensor {tensor}"
    return _serialise(fields, tensors, data), what


def _parse(content: bytes) -> tuple[list[list[Any]], list[list[Any]], bytes]:
    """Fields as name, type, type of entries, value; tensors as name, shape, type, offset; and the data."""
    reader = gguf.GGUFReader(_kept(content))
    fields = [
        [name, int(field.types[0]), int(field.types[-1]), field.contents()]
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    ]
    start = reader.data_offset
    tensors = [
        [tensor.name, [int(n) for n in tensor.shape], int(tensor.tensor_type), tensor.data_offset - start]
        for tensor in reader.tensors
    ]
    return fields, tensors, content[start:]


def _serialise(fields: list[list[Any]], tensors: list[list[Any]], data: bytes) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(_field(*field) for field in fields)
    header += b"".join(
        _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        for name, shape, kind, offset in tensors
    )
    return header + b"\0" * (-len(header) % 32) + data


def _with_pieces(content: bytes) -> bytes:
    """The same network with a SentencePiece tokenizer."""
    fields, tensors, data = _parse(content)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(97, 211))]
    words = ["▁", *"hela", "he", "▁he", "ll", "<|im_end|>", "hell"]
    tokens, types = tokens + words, [2, 3, 3] + [6] * (len(tokens) - 3) + [3 if "|" in word else 1 for word in words]
    fields = [field for field in fields if not field[0].startswith("tokenizer.")]
    fields += [
        ["tokenizer.ggml.model", 8, 8, "llama"],
        ["tokenizer.ggml.tokens", 9, 8, tokens],
        ["tokenizer.ggml.token_type", 9, 5, types],
        ["tokenizer.ggml.scores", 9, 6, [-float(number) for number in range(len(tokens))]],
        ["tokenizer.ggml.bos_token_id", 4, 4, 1],
        ["tokenizer.ggml.add_space_prefix", 7, 7, True],
        ["tokenizer.chat_template", 8, 8, "{{ messages[0]['content'] }}"],
        ["llama.vocab_size", 4, 4, 128],
    ]
    return _serialise(fields, tensors, data)


def _kept(content: bytes) -> Path:
    file = tempfile.NamedTemporaryFile(suffix=".gguf", delete=False)  # the reader maps it
    try:
        file.write(content)
        file.close()
        return _Removed(file.name)
    except BaseException:
        file.close()
        raise


class _Removed(type(Path())):
    """A path whose file goes with it."""

    def __del__(self):
        self.unlink(missing_ok=True)


def _change_field(rng: random.Random, fields: list[list[Any]], field: list[Any]) -> str:
    name, kind, entry, value = field
    how = rng.choice(["leave out", "twice", "type", "value", "value", "value"])
    if how == "leave out":
        fields.remove(field)
    elif how == "twice":
        fields.append(copy.copy(field))
    elif how == "type":
        field[1:] = rng.choice(
            [[8, 8, rng.choice(_STRINGS)], [4, 4, 3], [6, 6, 0.5], [7, 7, True], [9, 4, [1, 2]], [9, 8, ["a"]]]
        )
    elif kind == 9:
        value = list(value)
        other = rng.choice(_STRINGS) if entry == 8 else _number(rng, entry)
        place = rng.randrange(len(value)) if value else 0
        if rng.random() < 0.5 and value:
            value[place] = other
        elif rng.random() < 0.5:
            value.insert(place, other)
        else:
            del value[place:]
        field[3] = value
    else:
        field[3] = rng.choice(_STRINGS) if kind == 8 else _number(rng, kind)
    return f"metadata {how}: {name} = {str(field[3])[:60]!r}"


def _number(rng: random.Random, kind: int) -> Any:
    form = _FORMS[kind]
    if form in "fd":
        return rng.choice(_FLOATS)
    if form == "?":
        return rng.random() < 0.5
    value, bits = rng.choice(_NUMBERS), 8 * struct.calcsize(f"<{form}")
    value %= 2**bits
    return value - 2**bits if form.islower() and value >= 2 ** (bits - 1) else value


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _field(name: str, kind: int, entry: int, value: Any) -> bytes:
    def one(of: int, what: Any) -> bytes:
        return _text(what) if of == 8 else struct.pack(f"<{_FORMS[of]}", what)

    begin = _text(name) + struct.pack("<I", kind)
    if kind != 9:
        return begin + one(kind, value)
    return begin + struct.pack("<IQ", entry if entry != 9 else 4, len(value)) + b"".join(one(entry, v) for v in value)


# Changes of a folder.


def _change_folder(rng: random.Random, folder: Path) -> str:
    name = rng.choice(
        ["model.safetensors", "model.safetensors", "config.json", "config.json", "tokenizer.json",
         "tokenizer_config.json", "generation_config.json"]
    )  # fmt: skip
    path = folder / name
    content = path.read_bytes()
    if rng.random() < 0.05:
        path.unlink()
        return f"{name}: left out"
    if name.endswith(".json") and rng.random() < 0.8:
        value = json.loads(content)
        what = _change_json(rng, value)
        path.write_text(json.dumps(value))
    elif name == "model.safetensors" and rng.random() < 0.6:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        what = _change_json(rng, header)
        encoded = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
    else:
        content, what = _change_bytes(rng, content, 3000)
        path.write_bytes(content)
    return f"{name}: {what}"


def _change_json(rng: random.Random, value: Any) -> str:
    """Change one entry of a JSON value in place."""
    way = ""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        way += f"/{key}"
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        how = rng.choice(["set", "set", "set", "leave out", "add"])
        other = rng.choice(
            [None, True, False, *_FLOATS, *_NUMBERS, *_STRINGS, [], {}, [1, 2], {"type": "yarn"}, [[]], "F8_E4M3", "I8"]
        )
        if how == "leave out":
            del value[key]
        elif how == "add" and isinstance(value, dict):
            value[rng.choice([*_SUSPECT, *map(str, keys)])] = other
        else:
            value[key] = other
        return f"{how} {way} = {other!r:.60}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=None)
    parser.add_argument("--case", type=int, default=None, help="one case again")
    options = parser.parse_args()
    if options.case is not None:
        print(replay(options.seed, options.case))
    else:
        print(f"{run(options.seconds, options.seed, options.cases)} files, each refused with a reason or read right")


if __name__ == "__main__":
    sys.exit(main())
