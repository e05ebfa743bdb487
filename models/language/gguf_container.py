"""The container of GGUF files: a header of keys and values, a list of tensors, and their data.

    magic "GGUF" | version | tensor count | key count | keys and values | tensor infos | padding | data

(the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.)

A file may be cut, damaged, or made to mislead. So nothing is believed: every count, length and offset is compared with
what is left of the file before anything of that size is made, names stand once, and tensors lie inside of the file and
beside each other. What is read is therefore never larger than the file, whatever its numbers say.
"""

import dataclasses
import functools
import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

__all__ = ["GGUFFile", "TensorInfo", "open_gguf"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of the data, where the file does not say
_MOST_DIMENSIONS = 4
# Value types: 8 is a string, 9 an array, all others a number of this format.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: numbers of entries, the slowest axis first.
        kind: how it is stored.
        offset: its first byte in the file.
        size: number of bytes.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


class GGUFFile:
    """One GGUF file, or all parts of one that was split.

    Attributes:
        source: what to call it in messages.
        metadata: the keys and values, of the first part.
        names: the tensors' names.
    """

    def __init__(self, parts: list["_Part"]):
        """Join the parts of a file; `open_gguf` finds them."""
        self.source, self.metadata = str(parts[0].path), parts[0].metadata
        self._where: dict[str, tuple[_Part, TensorInfo]] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self._where:
                    raise ValueError(f"tensor `{name}` stands in {self._where[name][0].path} and in {part.path}.")
                self._where[name] = part, info
        self.names = list(self._where)

    def read(self, name: str) -> np.ndarray:
        """Read a tensor, dequantised to float32.

        Args:
            name: one of `names`.

        Returns:
            The array, of the shape in the file.
        """
        part, info = self._where[name]
        data = np.frombuffer(part.bytes, np.uint8, info.size, info.offset)
        if info.kind in _PLAIN:
            return data.view(_PLAIN[info.kind]).reshape(info.shape)
        block, size = GGML_QUANT_SIZES[info.kind]
        rows = data.reshape(*info.shape[:-1], info.shape[-1] // block * size)
        return gguf.quants.dequantize(rows, info.kind).reshape(info.shape)


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file; of one that was split, all parts, whichever of them is named.

    Args:
        path: the file. The parts of a split one are called `name-00001-of-00003.gguf`.

    Returns:
        Its header, and a way to its tensors.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: not a whole GGUF file, one of another version or byte order, a tensor of an unknown type, or parts
            that do not belong together.
    """
    first = _Part(path)
    count = first.metadata.get("split.count", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 100_000:
        raise ValueError(f"`split.count` in {path} must be a number of parts, got {count!r}.")
    if count < 2:
        return GGUFFile([first])
    name = _SPLIT_NAME.fullmatch(path.name)
    if not name or int(name[3]) != count:
        raise ValueError(
            f"{path} is one of {count} parts (`split.count`), which are found by their names: call them "
            f"NAME-00001-of-{count:05d}.gguf and so on, or join them with `llama-gguf-split --merge`."
        )
    parts = []
    for number in range(1, count + 1):
        part = path.with_name(f"{name[1]}-{number:05d}-of-{count:05d}.gguf")
        if not part.exists():
            raise FileNotFoundError(f"{path} is one of {count} parts, and {part} is missing: fetch it too.")
        parts.append(first if part == path else _Part(part))
        said = tuple(parts[-1].metadata.get(f"split.{key}") for key in ("no", "count"))
        if said != (number - 1, count):
            raise ValueError(
                f"{part} should be part {number} of {count}: `split.no` = {number - 1} and `split.count` = {count}; it "
                f"has {said[0]} and {said[1]}. Fetch the parts again, all of one file."
            )
    file = GGUFFile(parts)
    total = parts[0].metadata.get("split.tensors.count", len(file.names))
    if total != len(file.names):
        raise ValueError(
            f"the {count} parts of {path} have {len(file.names)} tensors; `split.tensors.count` is {total}."
        )
    return file


@functools.cache
def _readable() -> dict[int, GGMLQuantizationType]:
    """The types whose weights the package gguf turns into float32, by number."""
    found = {}
    for kind in GGMLQuantizationType:
        try:
            gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        found[int(kind)] = kind
    return found


class _Part:
    """One file, its header read and checked."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            start = file.read(4)
            if start != _MAGIC:
                raise ValueError(f"{path} is not a GGUF file: it starts with {start!r}, not b'GGUF'.")
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at, self._size = 4, len(self.bytes)
        version = self._number("I", "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "a big-endian file" if swapped in _VERSIONS else f"of version {version}"
            raise ValueError(
                f"{path} is {why}; accepted are little-endian GGUF files of version 2 or 3. Convert the model again "
                "with a present llama.cpp."
            )
        tensors, keys = self._number("Q", "the number of tensors"), self._number("Q", "the number of keys")
        self._fits(keys, 8 + 4 + 1, "keys")  # a name's length, a type, a value
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = self._text("the name of a key")
            if name in self.metadata:
                raise self._damaged(f"the key `{name}` stands twice")
            self.metadata[name] = self._value(name)
        self._fits(tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        self.tensors = self._tensors(tensors)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path} is not a whole GGUF file: {what} (byte {self._at} of {self._size}); fetch it again."
        )

    def _fits(self, count: int, size: int, what: str) -> None:
        left = self._size - self._at
        if count * size > left:
            raise self._damaged(f"it announces {count} {what}, for which the {left} bytes left are too few")

    def _number(self, form: str, what: str) -> Any:
        self._fits(1, struct.calcsize(form), what)
        (value,) = struct.unpack_from(f"<{form}", self.bytes, self._at)
        self._at += struct.calcsize(form)
        return value

    def _text(self, what: str) -> str:
        length = self._number("Q", f"the length of {what}")
        self._fits(length, 1, f"bytes of {what}")
        text = self.bytes[self._at : self._at + length]
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is no UTF-8: {text[:40]!r}") from error
        self._at += length
        return decoded

    def _value(self, name: str) -> Any:
        kind = self._number("I", f"the type of `{name}`")
        if kind == _STRING:
            return self._text(f"`{name}`")
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind], f"`{name}`")
        if kind != _ARRAY:
            raise self._damaged(f"`{name}` has the unknown type {kind}")
        kind, count = self._number("I", f"the type of `{name}`"), self._number("Q", f"the length of `{name}`")
        if kind == _STRING:
            self._fits(count, 8, f"strings of `{name}`")
            return [self._text(f"`{name}`") for _ in range(count)]
        if kind not in _NUMBERS:
            raise self._damaged(f"`{name}` is an array of the unknown type {kind}")
        form = f"<{count}{_NUMBERS[kind]}"
        self._fits(count, struct.calcsize(f"<{_NUMBERS[kind]}"), f"entries of `{name}`")
        values = list(struct.unpack_from(form, self.bytes, self._at))
        self._at += struct.calcsize(form)
        return values

    def _tensors(self, count: int) -> dict[str, TensorInfo]:
        said = []
        for _ in range(count):
            name = self._text("the name of a tensor")
            dimensions = self._number("I", f"the rank of `{name}`")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise self._damaged(f"tensor `{name}` has {dimensions} dimensions, not 1 to {_MOST_DIMENSIONS}")
            shape = tuple(self._number("Q", f"the shape of `{name}`") for _ in range(dimensions))[::-1]
            said.append((name, shape, self._number("I", f"the type of `{name}`"), self._number("Q", f"`{name}`")))
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if (
            isinstance(alignment, bool)
            or not isinstance(alignment, int)
            or alignment < 1
            or alignment & (alignment - 1)
        ):
            raise self._damaged(f"`general.alignment` must be a power of two, got {alignment!r}")
        start = -(-self._at // alignment) * alignment
        infos: dict[str, TensorInfo] = {}
        for name, shape, number, offset in said:
            if name in infos:
                raise self._damaged(f"tensor `{name}` stands twice")
            kind = self._kind(name, number)
            block, size = GGML_QUANT_SIZES[kind]
            entries = math.prod(shape)
            if entries < 1 or shape[-1] % block:
                raise self._damaged(f"tensor `{name}` has the shape {shape}, in rows of a multiple of {block}")
            infos[name] = TensorInfo(shape, kind, start + offset, entries // block * size)
        self._check_places(infos, alignment)
        return infos

    def _kind(self, name: str, number: int) -> GGMLQuantizationType:
        readable = _readable()
        if number in readable:
            return readable[number]
        names = {int(kind): kind.name for kind in GGMLQuantizationType}
        raise ValueError(
            f"tensor `{name}` in {self.path} is stored as type {names.get(number, f'number {number}')}; accepted are "
            f"{', '.join(kind.name for kind in readable.values())}. Take another quantisation of the model, or make "
            "one with `llama-quantize --allow-requantize`."
        )

    def _check_places(self, infos: Mapping[str, TensorInfo], alignment: int) -> None:
        end, before = 0, ""
        for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
            if info.offset + info.size > self._size:
                raise self._damaged(f"tensor `{name}` ends at byte {info.offset + info.size}")
            if info.offset % alignment or info.offset < end:
                what = f"overlaps `{before}`" if info.offset < end else f"is not aligned to {alignment} bytes"
                raise self._damaged(f"tensor `{name}` at byte {info.offset} {what}")
            end, before = info.offset + info.size, name
