"""GGUF files, read and written: version 3, little-endian, alignment 32 when written.

The parser trusts nothing: counts, lengths and offsets are checked against bounds and against the bytes that are left
before anything is allocated. Shapes are outermost first (GGUF stores them innermost first). Numeric arrays of the
metadata come as numpy arrays, arrays of text as lists.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from smeltkit import limits
from smeltkit.errors import BadGguf

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32


@dataclass(frozen=True)
class GgmlType:
    """A storage type: its id in the file, how many values a block holds and how many bytes it takes."""

    id: int
    block: int
    block_bytes: int


GGML_TYPES: Mapping[str, GgmlType] = MappingProxyType({
    "F32": GgmlType(0, 1, 4), "F16": GgmlType(1, 1, 2), "BF16": GgmlType(30, 1, 2), "Q4_0": GgmlType(2, 32, 18),
    "Q4_1": GgmlType(3, 32, 20), "Q5_0": GgmlType(6, 32, 22), "Q5_1": GgmlType(7, 32, 24), "Q8_0": GgmlType(8, 32, 34),
    "Q2_K": GgmlType(10, 256, 84), "Q3_K": GgmlType(11, 256, 110), "Q4_K": GgmlType(12, 256, 144),
    "Q5_K": GgmlType(13, 256, 176), "Q6_K": GgmlType(14, 256, 210), "IQ4_NL": GgmlType(20, 32, 18),
    "IQ4_XS": GgmlType(23, 256, 136),
})  # fmt: skip
"""Storage types that the pinned llama.cpp runs and this release reads."""

_TYPE_NAMES = {kind.id: name for name, kind in GGML_TYPES.items()}
_PLAIN: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one stored tensor lies: shape is outermost first, `offset` counts bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor to be written; `blocks()` yields its bytes in order and is called once, when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[npt.NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A GGUF file's metadata and where its tensors lie."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Reads metadata and tensor infos only; BadGguf names the file and what is wrong in it."""
        try:
            with path.open("rb") as file:
                return cls.parse(file, os.fstat(file.fileno()).st_size, path)
        except FileNotFoundError as error:
            raise BadGguf(f"{path.name} is missing") from error

    @classmethod
    def parse(cls, file: BinaryIO, size: int, path: Path) -> GgufFile:
        """The same from an open file of `size` bytes, which may lie elsewhere; `path` names it in errors."""
        return _Parser(file, size, path).parse()

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor's values: BF16 as uint16, quantized ones as rows of uint8 blocks."""
        info = self.tensors[name]
        dtype: np.dtype[Any] = _PLAIN.get(info.dtype, np.dtype("u1"))
        with self.path.open("rb") as file:
            file.seek(info.offset)
            values = np.fromfile(file, dtype=dtype, count=info.size_bytes // dtype.itemsize)
        if values.nbytes != info.size_bytes:
            raise BadGguf(f"{self.path.name} ends inside tensor {name!r}")
        return values.reshape(info.shape if info.dtype in _PLAIN else (*info.shape[:-1], -1))


def shortest(value: float) -> float:
    """The decimal that a float32 was most likely written as: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def type_size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this type and shape; BadGguf if a row (innermost dimension) is no whole number of blocks."""
    kind = GGML_TYPES[dtype]
    if not shape or shape[-1] % kind.block:
        raise BadGguf(
            f"a row of {shape[-1] if shape else 0} values is no whole number of {dtype} blocks of {kind.block}"
        )
    return prod(shape) // kind.block * kind.block_bytes


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[GgufTensor]) -> int:
    """Writes a GGUF file and returns its bytes; memory holds one block of one tensor at a time.

    Python values choose the type in the file: bool, int (uint32, or uint64 where needed), float (float32), str, and
    lists of str, int (int32) or float (float32). BadGguf if a tensor yields another number of bytes than its shape.
    """
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _text(key) + _value(value)
    offset = 0
    for tensor in tensors:
        dimensions = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        head += _text(tensor.name) + struct.pack("<I", len(tensor.shape)) + dimensions
        head += struct.pack("<IQ", GGML_TYPES[tensor.dtype].id, offset)
        offset += _padded(type_size(tensor.dtype, tensor.shape))
    with path.open("wb") as file:
        file.write(head + bytes(_padded(len(head)) - len(head)))
        for tensor in tensors:
            begin = file.tell()
            for block in tensor.blocks():
                np.ascontiguousarray(block).tofile(file)
            written = file.tell() - begin
            if written != type_size(tensor.dtype, tensor.shape):
                raise BadGguf(f"tensor {tensor.name!r} of {tensor.dtype} {list(tensor.shape)} gave {written} bytes")
            file.write(bytes(_padded(written) - written))
        return file.tell()


def _padded(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value < 1 << 32 else struct.pack("<IQ", 10, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if not isinstance(value, list) or not value:
        raise BadGguf(f"{type(value).__name__} cannot be GGUF metadata; use bool, int, float, str or a list of them")
    kind = _STRING if isinstance(value[0], str) else 5 if isinstance(value[0], int) else 6
    body = b"".join(map(_text, value)) if kind == _STRING else struct.pack(f"<{len(value)}{_SCALARS[kind]}", *value)
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + body


class _Parser:
    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file, self._path, self._size = file, path, size
        self._left = min(size, limits.GGUF_METADATA_MAX_BYTES)

    def parse(self) -> GgufFile:
        if self._take(4) != MAGIC:
            self._fail("does not begin with GGUF")
        version = self._number(4)
        if version not in (2, VERSION):
            self._fail(f"is of version {version}; versions 2 and 3 are read")
        tensor_count, key_count = self._number(10), self._number(10)
        if tensor_count > limits.TENSORS_MAX or key_count > limits.GGUF_KV_MAX:
            self._fail(
                f"declares {tensor_count} tensors and {key_count} keys; at most {limits.TENSORS_MAX} and"
                f" {limits.GGUF_KV_MAX} are allowed"
            )
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._text()
            if key in metadata:
                self._fail(f"has key {key!r} twice")
            metadata[key] = self._value(key)
        declared = [self._tensor() for _ in range(tensor_count)]
        return GgufFile(path=self._path, metadata=metadata, tensors=self._place(declared, metadata))

    def _value(self, key: str) -> Any:
        kind = self._number(4)
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(kind, key)
        kind, count = self._number(4), self._number(10)
        if count > limits.GGUF_ARRAY_MAX:
            self._fail(f"has {count} values in {key!r}; at most {limits.GGUF_ARRAY_MAX} are allowed")
        if kind == _STRING:
            return [self._text() for _ in range(count)]
        dtype = np.dtype("<" + self._scalar(kind, key))
        return np.frombuffer(self._take(count * dtype.itemsize), dtype=dtype)

    def _tensor(self) -> TensorInfo:
        name, rank = self._text(), self._number(4)
        if not 1 <= rank <= limits.TENSOR_DIMENSIONS_MAX or not 1 <= len(name.encode()) <= limits.GGUF_NAME_MAX_BYTES:
            self._fail(
                f"has a tensor {name[:80]!r} of {rank} dimensions; names have 1 to {limits.GGUF_NAME_MAX_BYTES} bytes"
                f" and shapes 1 to {limits.TENSOR_DIMENSIONS_MAX} dimensions"
            )
        shape = tuple(self._number(10) for _ in range(rank))[::-1]
        kind, offset = self._number(4), self._number(10)
        if kind not in _TYPE_NAMES:
            self._fail(f"stores tensor {name!r} in type {kind}; known are {', '.join(GGML_TYPES)}")
        if not all(0 < dim < 1 << 40 for dim in shape) or prod(shape) >= 1 << 50:
            self._fail(f"declares tensor {name!r} of absurd shape {list(shape)}")
        try:
            size_bytes = type_size(_TYPE_NAMES[kind], shape)
        except BadGguf as error:
            self._fail(f"stores tensor {name!r} wrongly: {error}")
        return TensorInfo(name=name, dtype=_TYPE_NAMES[kind], shape=shape, offset=offset, size_bytes=size_bytes)

    def _place(self, declared: list[TensorInfo], metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            self._fail(f"declares alignment {alignment!r}; it must be a power of two from 8 to 65536")
        start, end, placed = _padded(self._file.tell(), alignment), 0, {}
        for info in sorted(declared, key=lambda info: info.offset):
            if info.offset != end or info.name in placed:
                self._fail(f"places tensor {info.name!r} at {info.offset}, not at {end}, or holds it twice")
            end = _padded(info.offset + info.size_bytes, alignment)
            placed[info.name] = TensorInfo(
                name=info.name,
                dtype=info.dtype,
                shape=info.shape,
                offset=start + info.offset,
                size_bytes=info.size_bytes,
            )
        last = max((info.offset + info.size_bytes for info in placed.values()), default=start)
        if last > self._size:
            self._fail(f"is truncated: it has {self._size} bytes and its tensors end at {last}")
        return placed

    def _text(self) -> str:
        try:
            return self._take(self._number(10)).decode()
        except UnicodeDecodeError:
            self._fail("has a text that is no UTF-8")

    def _number(self, kind: int, key: str = "") -> Any:
        code = "<" + self._scalar(kind, key)
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _scalar(self, kind: int, key: str) -> str:
        if kind not in _SCALARS:
            self._fail(f"has a value of unknown type {kind} in {key!r}")
        return _SCALARS[kind]

    def _take(self, count: int) -> bytes:
        if count > self._left:
            self._fail(
                f"needs {count} bytes where {self._left} are left of the file or of the"
                f" {limits.GGUF_METADATA_MAX_BYTES} that metadata may have"
            )
        self._left -= count
        data = self._file.read(count)
        if len(data) != count:
            self._fail("shrank while it was read")
        return data

    def _fail(self, what: str) -> NoReturn:
        raise BadGguf(f"{self._path.name} {what}")
