"""Safetensors: equal to the reference library both ways, and every broken file a typed error that names it."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from smeltkit import limits
from smeltkit.errors import BadFile, BadSafetensors, TensorMismatch, UnsafeFile
from smeltkit.ml.safetensors_io import SafetensorsFolder, parse_header, write_safetensors
from smeltkit.ml.weights import match_safetensors
from smeltkit.testing.tiny_models import write_tiny_model


def raw_file(header: Any, data: bytes = b"\0" * 16, *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with this header (JSON value or bytes)."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


def entry(**changes: Any) -> dict[str, Any]:
    """The entry of a tensor of four float32 values, changed."""
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    """Names, shapes and values of every float type; BF16 as its bits."""
    tensors = {
        "f32": torch.randn(3, 5),
        "f16": torch.randn(7).half(),
        "bf16": torch.randn(2, 2, 2).bfloat16(),
        "i64": torch.arange(4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    folder = SafetensorsFolder.open(tmp_path)
    assert {name: info.shape for name, info in folder.tensors.items()} == {
        k: tuple(v.shape) for k, v in tensors.items()
    }
    assert np.array_equal(folder.read("f32"), tensors["f32"].numpy())
    assert np.array_equal(folder.read("bf16"), tensors["bf16"].view(torch.uint16).numpy())


def test_reference_library_reads_what_is_written(tmp_path: Path) -> None:
    """And the size told is the file's."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    size = write_safetensors(tmp_path / "model.safetensors", [("a", "F32", values), ("b", "F16", values.astype("f2"))])
    assert size == (tmp_path / "model.safetensors").stat().st_size
    loaded = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert np.array_equal(loaded["a"], values) and loaded["b"].dtype == np.float16


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header beyond the file": raw_file({"a": entry()}, length=10**6),
    "header of terabytes": raw_file({"a": entry()}, length=2**62),
    "header no JSON": raw_file(b"not json at all"),
    "header a list": raw_file([1, 2]),
    "header not UTF-8": raw_file(b'{"\xff\xfe": 1}'),
    "header nested too deep": raw_file(b"[" * 100_000),
    "no tensors": raw_file({"__metadata__": {"format": "pt"}}),
    "key twice": raw_file(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{}}'),
    "entry a number": raw_file({"a": 7}),
    "entry without dtype": raw_file({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "unknown dtype": raw_file({"a": entry(dtype="F8_E4M3")}),
    "dtype a list": raw_file({"a": entry(dtype=["F32"])}),
    "negative shape": raw_file({"a": entry(shape=[-4])}),
    "fractional shape": raw_file({"a": entry(shape=[4.0])}),
    "shape of nine dimensions": raw_file({"a": entry(shape=[1] * 8 + [4])}),
    "shape that overflows": raw_file({"a": entry(shape=[2**61, 2**61])}),
    "three offsets": raw_file({"a": entry(data_offsets=[0, 8, 16])}),
    "offsets reversed": raw_file({"a": entry(data_offsets=[16, 0])}),
    "offsets before the start": raw_file({"a": entry(data_offsets=[-16, 0])}),
    "offsets beyond the end": raw_file({"a": entry(data_offsets=[16, 32])}),
    "gap between tensors": raw_file({"a": entry(), "b": entry(data_offsets=[20, 36])}, b"\0" * 36),
    "tensors overlap": raw_file({"a": entry(), "b": entry(data_offsets=[8, 24])}, b"\0" * 24),
    "truncated data": raw_file({"a": entry()}, b"\0" * 15),
    "bytes after the end": raw_file({"a": entry()}, b"\0" * 17),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_file_is_a_typed_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    """Before any tensor is read."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BadSafetensors, match=r"model\.safetensors"):
        SafetensorsFolder.open(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """Neither a file nor an index."""
    with pytest.raises(BadSafetensors, match="missing"):
        SafetensorsFolder.open(tmp_path)


@given(st.binary(max_size=400))
def test_any_bytes_give_tensors_or_a_typed_error(content: bytes) -> None:
    """Fuzz: never a crash, never an allocation from a declared length."""
    parse(content)


@given(st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 10_000))
def test_damaged_file_gives_tensors_or_a_typed_error(position: int, value: int, cut: int) -> None:
    """Fuzz: one byte changed, the end cut off."""
    content = bytearray(raw_file({"a": entry(), "b": entry(shape=[2, 2], data_offsets=[16, 32])}, b"\1" * 32))
    content[position % len(content)] = value
    parse(bytes(content[: len(content) - cut % 40]))


def parse(content: bytes) -> None:
    """Parses bytes as a file; only BadSafetensors may come out, and tensors lie inside the file."""
    try:
        infos = parse_header(io.BytesIO(content), len(content), Path("fuzz.safetensors"))
    except BadSafetensors:
        return
    assert all(8 <= info.offset <= info.offset + info.size_bytes <= len(content) for info in infos.values())


def test_shards_make_one_set(tmp_path: Path) -> None:
    """R-021: the set of tensors is exactly the index's, and values come from the right shard."""
    config = write_tiny_model(tmp_path / "one", "qwen3")
    write_tiny_model(tmp_path / "three", "qwen3", shards=3)
    one, three = SafetensorsFolder.open(tmp_path / "one"), SafetensorsFolder.open(tmp_path / "three")
    assert one.tensors.keys() == three.tensors.keys()
    assert len({info.file for info in match_safetensors(config, three).values()}) == 3
    assert all(np.array_equal(one.read(name), three.read(name)) for name in one.tensors)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Rewrites the weight map of a sharded folder."""
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    change(value["weight_map"])
    index.write_text(json.dumps(value))


def test_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    """R-021: all shards or none."""
    write_tiny_model(tmp_path, "llama", shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadSafetensors, match="model-00002-of-00002"):
        SafetensorsFolder.open(tmp_path)


def test_tensor_only_in_the_index_is_named(tmp_path: Path) -> None:
    """R-021."""
    write_tiny_model(tmp_path, "llama", shards=2)
    edit_index(tmp_path, lambda names: names.update({"ghost.weight": "model-00001-of-00002.safetensors"}))
    with pytest.raises(TensorMismatch, match=r"ghost\.weight"):
        SafetensorsFolder.open(tmp_path)


def test_tensor_only_in_a_shard_is_named(tmp_path: Path) -> None:
    """R-021: an unlisted tensor is a defect, not a bonus."""
    write_tiny_model(tmp_path, "llama", shards=2)
    edit_index(tmp_path, lambda names: names.pop("lm_head.weight"))
    with pytest.raises(TensorMismatch, match=r"lm_head\.weight"):
        SafetensorsFolder.open(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "", 7, None])
def test_index_cannot_reach_outside_its_folder(name: Any, tmp_path: Path) -> None:
    """No path escape."""
    write_tiny_model(tmp_path, "llama", shards=2)
    edit_index(tmp_path, lambda names: names.update({"lm_head.weight": name}))
    with pytest.raises(UnsafeFile, match="same folder"):
        SafetensorsFolder.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}', b"{" * 9999])
def test_broken_index_is_named(content: bytes, tmp_path: Path) -> None:
    """A typed error, whatever the JSON."""
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(BadFile, match=r"index\.json"):
        SafetensorsFolder.open(tmp_path)


def test_header_bound_is_that_of_the_format() -> None:
    """The reference library's own bound."""
    assert limits.SAFETENSORS_HEADER_MAX_BYTES == 100_000_000
