"""GGUF files: equal to the reference package both ways, and every broken file a typed error that names it."""

from __future__ import annotations

import io
import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smeltkit.errors import BadGguf
from smeltkit.ml.gguf_io import GGML_TYPES, GgufFile, GgufTensor, shortest, type_size, write_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.int": 7,
    "a.long": 1 << 40,
    "a.float": 0.5,
    "a.text": "naïve \t\n",
    "a.texts": ["x", "", "zz"],
    "a.ints": [1, -2, 3],
    "a.floats": [0.25, -1.5],
}


def tensor(name: str, dtype: str, values: np.ndarray, shape: tuple[int, ...] | None = None) -> GgufTensor:
    """A tensor to be written in one block."""
    return GgufTensor(name=name, dtype=dtype, shape=shape or values.shape, blocks=lambda: [values])


def small_file(path: Path) -> bytes:
    """A valid file of two tensors; its bytes."""
    write_gguf(
        path,
        METADATA,
        [
            tensor("a.weight", "F32", np.arange(6, dtype=np.float32).reshape(2, 3)),
            tensor("b.weight", "Q8_0", np.arange(68, dtype=np.uint8), (2, 32)),
        ],
    )
    return path.read_bytes()


with tempfile.TemporaryDirectory() as _folder:
    SMALL = small_file(Path(_folder, "small.gguf"))


def test_types_are_those_of_the_gguf_package() -> None:
    """Ids, block sizes and block bytes, from an independent table."""
    for name, kind in GGML_TYPES.items():
        reference = gguf.GGMLQuantizationType[name]
        assert (kind.id, kind.block, kind.block_bytes) == (reference.value, *gguf.GGML_QUANT_SIZES[reference])


def test_reference_package_reads_what_is_written(tmp_path: Path) -> None:
    """Metadata with types, shapes reversed as the format wants, values."""
    small_file(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {key: reader.fields[key].contents() for key in METADATA} == METADATA
    found = {entry.name: entry for entry in reader.tensors}
    assert np.array_equal(found["a.weight"].data, np.arange(6, dtype=np.float32).reshape(2, 3))
    assert found["b.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0


def test_reads_what_the_reference_package_writes(tmp_path: Path) -> None:
    """Every scalar type, arrays, and three float types of tensors."""
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int64("i64", -(1 << 50))
    writer.add_float64("f64", 0.1)
    writer.add_array("list", ["a", "b"])
    writer.add_tensor("x", np.ones((2, 4), dtype=np.float32))
    writer.add_tensor("y", np.ones(3, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile.open(tmp_path / "b.gguf")
    assert (file.metadata["u8"], file.metadata["i64"], file.metadata["f64"]) == (200, -(1 << 50), 0.1)
    assert file.metadata["list"] == ["a", "b"]
    assert {name: (info.dtype, info.shape) for name, info in file.tensors.items()} == {
        "x": ("F32", (2, 4)),
        "y": ("F16", (3,)),
    }
    assert np.array_equal(file.read("x"), np.ones((2, 4)))


def test_own_files_come_back(tmp_path: Path) -> None:
    """Arrays as numpy arrays; quantized values as rows of blocks."""
    small_file(tmp_path / "a.gguf")
    file = GgufFile.open(tmp_path / "a.gguf")
    assert file.metadata["a.ints"].tolist() == [1, -2, 3]
    assert file.read("b.weight").shape == (2, 34)


def test_tensor_of_another_size_than_declared_is_our_error(tmp_path: Path) -> None:
    """A writer that would shift every later tensor."""
    with pytest.raises(BadGguf, match=r"a\.weight"):
        write_gguf(tmp_path / "a.gguf", {}, [tensor("a.weight", "F32", np.zeros(3, np.float32), (4,))])


def test_rows_must_be_whole_blocks() -> None:
    """Blocks never span rows."""
    assert type_size("Q4_K", (2, 512)) == 2 * 2 * 144
    with pytest.raises(BadGguf, match="256"):
        type_size("Q4_K", (512, 100))


def test_decimals_come_back_from_float32() -> None:
    """What was written as 1e-6 reads as 1e-6."""
    assert [shortest(struct.unpack("f", struct.pack("f", value))[0]) for value in (1e-6, 1.1, 10000.0)] == [
        1e-6,
        1.1,
        1e4,
    ]


def head(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    """The beginning of a file."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes, length: int | None = None) -> bytes:
    """A text with its length."""
    return struct.pack("<Q", len(value) if length is None else length) + value


def info(
    name: bytes = b"a", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    """A tensor's description."""
    count = len(dims) if rank is None else rank
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def padded(content: bytes, data: int = 16) -> bytes:
    """Content up to the alignment, and then data."""
    return content + bytes(-len(content) % 32 + data)


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "other magic": b"GGML" + head()[4:],
    "version 1": head(version=1),
    "version of the other byte order": head(version=0x03000000),
    "header cut": head()[:10],
    "too many tensors": head(tensors=1 << 60),
    "too many keys": head(keys=1 << 60),
    "keys missing": head(keys=1),
    "key of terabytes": head(keys=1) + text(b"k", 1 << 50),
    "key not UTF-8": head(keys=1) + text(b"\xff") + struct.pack("<II", 4, 1),
    "key twice": head(keys=2) + (text(b"k") + struct.pack("<II", 4, 1)) * 2,
    "unknown value type": head(keys=1) + text(b"k") + struct.pack("<II", 99, 1),
    "value cut": head(keys=1) + text(b"k") + struct.pack("<I", 10),
    "array of arrays": head(keys=1) + text(b"k") + struct.pack("<IIQIQ", 9, 9, 1, 4, 0),
    "array of billions": head(keys=1) + text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 40),
    "array longer than the file": head(keys=1) + text(b"k") + struct.pack("<IIQ", 9, 12, 1_000_000),
    "texts longer than the file": head(keys=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 1_000_000),
    "alignment zero": padded(head(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 0)),
    "alignment odd": padded(head(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 48)),
    "alignment a text": padded(head(keys=1) + text(b"general.alignment") + struct.pack("<I", 8) + text(b"x")),
    "tensor without name": padded(head(tensors=1) + info(name=b"")),
    "tensor name too long": padded(head(tensors=1) + info(name=b"n" * 64)),
    "no dimension": padded(head(tensors=1) + info(dims=())),
    "five dimensions": padded(head(tensors=1) + info(dims=(1, 1, 1, 1, 4))),
    "rank of billions": padded(head(tensors=1) + info(rank=1 << 31)),
    "dimension zero": padded(head(tensors=1) + info(dims=(0,))),
    "shape that overflows": padded(head(tensors=1) + info(dims=(1 << 39, 1 << 39))),
    "unknown tensor type": padded(head(tensors=1) + info(kind=77)),
    "row of half a block": padded(head(tensors=1) + info(dims=(16,), kind=8)),
    "tensor beyond the end": padded(head(tensors=1) + info(dims=(400,))),
    "offset not aligned": padded(head(tensors=1) + info(offset=4)),
    "offset of exabytes": padded(head(tensors=1) + info(offset=1 << 62)),
    "tensors overlap": padded(head(tensors=2) + info(b"a") + info(b"b"), 64),
    "tensor twice": padded(head(tensors=2) + info(b"a") + info(b"a", offset=32), 64),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_file_is_a_typed_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    """Before any tensor is read."""
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(BadGguf, match=r"broken\.gguf"):
        GgufFile.open(tmp_path / "broken.gguf")


def test_missing_file_is_named(tmp_path: Path) -> None:
    """Like any other fault of a file."""
    with pytest.raises(BadGguf, match="missing"):
        GgufFile.open(tmp_path / "none.gguf")


@given(st.binary(max_size=300))
def test_any_bytes_after_the_magic_give_a_file_or_a_typed_error(content: bytes) -> None:
    """Fuzz: never a crash, never an allocation from a declared length."""
    parse(head(version=3)[:8] + content)


@given(st.integers(0, 100_000), st.integers(0, 255), st.integers(0, 600))
def test_damaged_file_gives_a_file_or_a_typed_error(position: int, value: int, cut: int) -> None:
    """Fuzz: one byte changed, the end cut off."""
    content = bytearray(SMALL)
    content[position % len(content)] = value
    parse(bytes(content[: len(content) - cut]))


def parse(content: bytes) -> None:
    """Parses bytes as a file; only BadGguf may come out, and tensors lie inside the file."""
    try:
        file = GgufFile.parse(io.BytesIO(content), len(content), Path("fuzz.gguf"))
    except BadGguf:
        return
    assert all(info.offset + info.size_bytes <= len(content) for info in file.tensors.values())
