"""Containers: whatever a GGUF or safetensors file says of itself, it is refused with a reason or read right."""

import json
import struct
import time

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppl.models.language import LanguageModel
from ppl.models.language.checkpoints import open_safetensors
from ppl.models.language.gguf_container import open_gguf

from .gguf_writer import copy_folder, write_gguf


def text(string):
    encoded = string if isinstance(string, bytes) else string.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def info(name, shape, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def container(path, keys=(), infos=(), data=b"", version=3, counts=None):
    """A GGUF file, byte by byte."""
    tensors, fields = counts or (len(infos), len(keys))
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(keys) + b"".join(infos)
    path.write_bytes(header + b"\0" * (-len(header) % 32) + data)
    return path


def test_a_container_is_read_as_the_gguf_package_reads_it(tiny_folder, tmp_path):
    path = write_gguf(tiny_folder("llama3"), tmp_path / "model.gguf", rope_factors=[1.0, 2.0, 3.0, 4.0])
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert ours.metadata == {
        name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")
    }
    assert ours.names == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.read(tensor.name), tensor.data)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1", "F16", "BF16"])
def test_stored_types_are_dequantised(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    array = np.linspace(-1, 1, 6 * 64, dtype=np.float32).reshape(2, 3, 64)
    stored = gguf.quants.quantize(array, kind)
    path = container(tmp_path / "t.gguf", infos=[info("t", array.shape[::-1], kind)], data=stored.tobytes())
    read = open_gguf(path).read("t")
    assert read.shape == array.shape
    np.testing.assert_array_equal(read, gguf.quants.dequantize(stored, kind))


HUGE = 2**63


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(counts=(0, HUGE)), "announces 9223372036854775808 keys"),
        (dict(counts=(HUGE, 0)), "announces 9223372036854775808 tensors"),
        (dict(keys=[struct.pack("<Q", HUGE) + b"\0" * 8]), "announces 9223372036854775808 bytes of the name of a key"),
        (dict(keys=[key("a", 8, struct.pack("<Q", 2**40))]), "announces 1099511627776 bytes of `a`"),
        (dict(keys=[key("a", 9, struct.pack("<IQ", 4, 2**61))]), "announces 2305843009213693952 entries of `a`"),
        (dict(keys=[key("a", 9, struct.pack("<IQ", 8, 2**61))]), "announces 2305843009213693952 strings of `a`"),
        (dict(keys=[key("a", 9, struct.pack("<IQ", 9, 1) + b"\0" * 64)]), "`a` is an array of the unknown type 9"),
        (dict(keys=[key("a", 13, b"\0" * 8)]), "`a` has the unknown type 13"),
        (dict(keys=[key("a", 4, b"\0" * 4)] * 2), "the key `a` stands twice"),
        (dict(keys=[key(b"\xff\xfe", 4, b"\0" * 4)]), "the name of a key is no UTF-8"),
        (dict(infos=[info("t", (8,)), info("t", (8,))], data=b"\0" * 64), "tensor `t` stands twice"),
        (dict(infos=[info("t", (8,)), info("u", (8,), offset=16)], data=b"\0" * 64), "`u` at byte .* overlaps `t`"),
        (dict(infos=[info("t", (8,), offset=8)], data=b"\0" * 64), "tensor `t` .* is not aligned to 32 bytes"),
        (dict(infos=[info("t", (8,), offset=2**40)], data=b"\0" * 64), "tensor `t` ends at byte 1099511627"),
        (dict(infos=[info("t", (2**40,))], data=b"\0" * 64), "tensor `t` ends at byte"),
        (dict(infos=[info("t", (2**62, 2**62))], data=b"\0" * 64), "tensor `t` ends at byte"),
        (dict(infos=[info("t", (0, 8))], data=b"\0" * 64), r"tensor `t` has the shape \(8, 0\)"),
        (dict(infos=[info("t", (2, 2, 2, 2, 2))], data=b"\0" * 128), "tensor `t` has 5 dimensions, not 1 to 4"),
        (dict(infos=[info("t", (8,), 8)], data=b"\0" * 64), r"the shape \(8,\), in rows of a multiple of 32"),
        (dict(keys=[key("general.alignment", 4, struct.pack("<I", 24))]), "`general.alignment` must be a power of two"),
        (dict(keys=[key("general.alignment", 4, struct.pack("<I", 0))]), "`general.alignment` must be a power of two"),
    ],
)  # fmt: skip
def test_gguf_files_that_mislead_are_refused_at_once(tmp_path, given, message):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=f"is not a whole GGUF file: .*{message}.*fetch it again"):
        open_gguf(container(tmp_path / "x.gguf", **given))
    assert time.monotonic() - begin < 1.0  # nothing is made of the size that they say


@pytest.mark.parametrize(
    ("version", "message"),
    [(1, "is of version 1; accepted are"), (4, "is of version 4"), (3 << 24, "is a big-endian file; accepted are")],
)
def test_gguf_of_another_version_or_byte_order_is_said(tmp_path, version, message):
    with pytest.raises(ValueError, match=message):
        open_gguf(container(tmp_path / "x.gguf", version=version))


@pytest.mark.parametrize(("number", "name"), [(24, "I8"), (9, "Q8_1"), (31, "number 31"), (99, "number 99")])
def test_tensor_types_that_cannot_be_read_name_tensor_type_and_way_out(tmp_path, number, name):
    path = container(tmp_path / "x.gguf", infos=[info("blk.0.attn_q.weight", (32,), number)], data=b"\0" * 64)
    with pytest.raises(
        ValueError, match=f"tensor `blk.0.attn_q.weight` .* is stored as type {name}; accepted are F32"
    ) as e:
        open_gguf(path)
    assert "fetch it again" not in str(e.value) and "llama-quantize" in str(e.value)


@pytest.fixture(scope="module")
def split(tiny_folder, tmp_path_factory):
    """A tiny model as one file and in three parts."""
    folder = tmp_path_factory.mktemp("split")
    whole = write_gguf(tiny_folder("llama2"), folder / "whole.gguf")
    return whole, write_parts(whole, folder, 3)


def write_parts(whole, folder, count, numbers=None, total=None, sizes=None):
    reader = gguf.GGUFReader(whole)
    paths = []
    for number in range(count):
        path = folder / f"model-{number + 1:05d}-of-{count:05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for name, field in reader.fields.items() if number == 0 else ():
            if not name.startswith("GGUF.") and name != "general.architecture":
                writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
        writer.add_uint16("split.no", (numbers or range(count))[number])
        writer.add_uint16("split.count", sizes or count)
        writer.add_int32("split.tensors.count", total or len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_split_gguf_is_read_whole_from_any_of_its_parts(split, expected):
    whole, parts = split
    tokens = expected("llama2")["tokens"]
    logits = LanguageModel.load(whole).forward(tokens)
    np.testing.assert_array_equal(LanguageModel.load(parts[0]).forward(tokens), logits)
    one, last = open_gguf(whole), open_gguf(parts[2])
    assert set(one.names) == set(last.names) and last.metadata["tokenizer.ggml.pre"] == "gpt-2"


def test_parts_that_are_missing_or_do_not_belong_together_are_named(split, tmp_path):
    whole, _ = split
    parts = write_parts(whole, tmp_path, 3)
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match="one of 3 parts, and .*model-00002-of-00003.gguf is missing: fetch it"):
        open_gguf(parts[0])
    lone = tmp_path / "renamed.gguf"
    lone.write_bytes(parts[0].read_bytes())
    with pytest.raises(ValueError, match=r"renamed.gguf is one of 3 parts .*NAME-00001-of-00003.gguf.*--merge"):
        open_gguf(lone)
    with pytest.raises(ValueError, match="should be part 2 of 3: `split.no` = 1 .*; it has 0 and 3"):
        open_gguf(write_parts(whole, tmp_path, 3, numbers=[0, 0, 2])[0])
    with pytest.raises(
        ValueError, match="have 21 tensors, and `split.tensors.count` is 99|`split.tensors.count` is 99"
    ):
        open_gguf(write_parts(whole, tmp_path, 2, total=99)[0])


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return copy_folder(tiny_folder("llama_tied"), tmp_path / "copy")


def write_header(path, header, data=b"\0" * 64):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": {"dtype"', "its header is no JSON"),
        (b"\xff\xff", "its header is no JSON"),
        (b"[" * 100_000, "its header is no JSON"),
        (
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}',
            "its header has `a` twice",
        ),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}}, "not a whole safetensors file"),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 64]}}, "not a whole safetensors file"),
        ({"a": {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]}}, "not a whole safetensors file"),
        ({"a": {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}}, "not a whole safetensors file"),
        ([1, 2], "not a whole safetensors file"),
    ],
)  # fmt: skip
def test_safetensors_that_mislead_are_refused(tmp_path, header, message):
    write_header(tmp_path / "model.safetensors", header)
    with pytest.raises(ValueError, match=message):
        open_safetensors(tmp_path, prefix="")


@pytest.mark.parametrize("start", [b"", b"\1\2", struct.pack("<Q", 2**63), struct.pack("<Q", 200) + b"{}"])
def test_safetensors_with_a_header_beyond_the_file_are_refused(tmp_path, start):
    (tmp_path / "model.safetensors").write_bytes(start)
    with pytest.raises(ValueError, match="is not a whole safetensors file: it has .* bytes, and its header would end"):
        open_safetensors(tmp_path, prefix="")


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"])
def test_weights_that_are_no_plain_floats_are_refused_by_name(folder, kind):
    weights = load_file(folder / "model.safetensors")
    header, data = {}, b""
    for name, array in weights.items():
        quantised = name.endswith("down_proj.weight")
        bytes_ = array.astype(np.uint8).tobytes() if quantised else array.tobytes()
        span = [len(data), len(data) + len(bytes_)]
        header[name] = dict(dtype=kind if quantised else "F32", shape=list(array.shape), data_offsets=span)
        data += bytes_
    write_header(folder / "model.safetensors", header, data)
    with pytest.raises(
        ValueError, match=rf"tensor `model.layers.0.mlp.down_proj.weight` .* is of type {kind}; accepted are"
    ):
        LanguageModel.load(folder)


@pytest.mark.parametrize(
    "path",
    ["../outside.safetensors", "/etc/outside.safetensors", "a/../../outside.safetensors", "..\\outside.safetensors",
     "C:\\outside.safetensors", ""],
)  # fmt: skip
def test_an_index_that_points_outside_of_its_folder_is_refused(folder, path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, path)}))
    with pytest.raises(ValueError, match="index.json names .*, outside of its folder; accepted are files within it"):
        LanguageModel.load(folder)


def test_shards_are_read_as_their_index_says(folder, expected):
    tokens = expected("llama_tied")["tokens"]
    weights = load_file(folder / "model.safetensors")
    logits = LanguageModel.load(folder).forward(tokens)
    (folder / "model.safetensors").unlink()
    (folder / "parts").mkdir()
    first = {name: array for name, array in weights.items() if "layers.0" in name}
    stale = {name: array + 1 for name, array in weights.items() if "layers.1" in name}
    save_file(first | stale, folder / "parts" / "a.safetensors")
    save_file({name: array for name, array in weights.items() if name not in first}, folder / "b.safetensors")
    index = folder / "model.safetensors.index.json"
    places = {name: "parts/a.safetensors" if name in first else "b.safetensors" for name in weights}
    index.write_text(json.dumps({"weight_map": places}))
    np.testing.assert_array_equal(LanguageModel.load(folder).forward(tokens), logits)
    for content, message in (
        ({}, "`weight_map` in .* must name a file for every tensor"),
        ({"weight_map": {"a": 3}}, "`weight_map` in .* must name a file for every tensor"),
        ({"weight_map": {"a": "model.bin"}}, "names 'model.bin'; weights are read from safetensors files alone"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            LanguageModel.load(folder)
    index.write_text(json.dumps({"weight_map": dict(list(places.items())[:-1]) | {"x": "b.safetensors"}}))
    LanguageModel.load(folder)  # what the index leaves out is taken where it stands once


def test_a_head_beside_tied_embeddings_counts_where_it_differs(folder, expected):
    tokens = expected("llama_tied")["tokens"]
    tied = LanguageModel.load(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": 2 * weights["model.embed_tokens.weight"]}, folder / "model.safetensors")
    own = LanguageModel.load(folder)
    assert tied.config.tied_embeddings and not own.config.tied_embeddings
    np.testing.assert_allclose(own.forward(tokens), 2 * tied.forward(tokens), rtol=1e-5)


def test_weights_are_cast_to_floats_alone(folder):
    with pytest.raises(ValueError, match="`dtype` must be a type of floating point of at least 16 bits, got int8"):
        LanguageModel.load(folder, dtype=np.int8)
    with pytest.raises(TypeError, match="`source` must be a folder, a .gguf file or a hub id, got 3"):
        LanguageModel.load(3)


def test_a_folder_that_holds_a_gguf_file_alone_says_so(folder):
    (folder / "config.json").unlink()
    (folder / "model.Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match="has no config.json; .*load its file model.Q4.gguf by itself"):
        LanguageModel.load(folder)
