"""Safetensors folders, read and written: one file or all shards of an index, every byte accounted for.

The parser trusts nothing: header size and depth are bounded, every tensor lies inside its file, ranges neither overlap
nor leave gaps, and the set of tensors equals the index exactly. BF16 has no numpy type: its values travel as uint16.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from smeltkit import limits
from smeltkit.errors import BadSafetensors, TensorMismatch, UnsafeFile

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip
"""Safetensors type name to the numpy type that carries it."""

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one stored tensor lies: shape is outermost first, `offset` counts bytes from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class SafetensorsFolder:
    """The tensors of a folder with `model.safetensors`, or with an index and all its shards."""

    folder: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> SafetensorsFolder:
        """Reads the headers only. BadSafetensors, TensorMismatch or UnsafeFile name the file that is wrong."""
        index = folder / INDEX_FILE
        if not index.exists():
            return cls(folder=folder, tensors=read_header(folder / SINGLE_FILE))
        weight_map = _read_index(index)
        tensors: dict[str, TensorInfo] = {}
        for shard in sorted(set(weight_map.values())):
            for name, info in read_header(folder / shard).items():
                if weight_map.get(name) != shard:
                    raise TensorMismatch(f"{shard} holds {name!r}, which {INDEX_FILE} does not place there")
                tensors[name] = info
        missing = sorted(set(weight_map) - set(tensors))
        if missing:
            raise TensorMismatch(f"{weight_map[missing[0]]} lacks tensors of {INDEX_FILE}: {_some(missing)}")
        return cls(folder=folder, tensors=tensors)

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor's values; BF16 comes as uint16. BadSafetensors if the file shrank since it was opened."""
        info = self.tensors[name]
        with info.file.open("rb") as file:
            file.seek(info.offset)
            values = np.fromfile(file, dtype=DTYPES[info.dtype], count=prod(info.shape))
        if values.nbytes != info.size_bytes:
            raise BadSafetensors(f"{info.file.name} ends inside tensor {name!r}")
        return values.reshape(info.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size_bytes for info in self.tensors.values())


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, in file order; BadSafetensors says what is wrong with it."""
    try:
        with path.open("rb") as file:
            return parse_header(file, os.fstat(file.fileno()).st_size, path)
    except FileNotFoundError as error:
        raise BadSafetensors(f"{path.name} is missing") from error


def parse_header(file: BinaryIO, size: int, path: Path) -> dict[str, TensorInfo]:
    """The same from an open file of `size` bytes, which may lie elsewhere; `path` names it in errors."""
    header, start = _read_header_json(file, size, path.name)
    header.pop("__metadata__", None)
    if not header or len(header) > limits.TENSORS_MAX:
        raise BadSafetensors(f"{path.name} declares {len(header)} tensors; 1 to {limits.TENSORS_MAX} are allowed")
    infos = sorted(
        (_tensor(name, entry, path, start) for name, entry in header.items()),
        key=lambda info: (info.offset, info.size_bytes),
    )
    end = start
    for info in infos:
        if info.offset != end:
            raise BadSafetensors(f"{path.name}: tensor {info.name!r} begins at byte {info.offset}, not {end}")
        end += info.size_bytes
    if end != size:
        raise BadSafetensors(
            f"{path.name} has {size} bytes, but its header describes {end}; the file is"
            f" {'truncated' if size < end else 'longer than it says'}"
        )
    return {info.name: info for info in infos}


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, str, npt.NDArray[Any]]], metadata: Mapping[str, str] | None = None
) -> int:
    """Writes (name, dtype, values) triples as one file, returns its size in bytes; BF16 values are uint16."""
    entries, arrays, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, [], 0
    for name, dtype, values in tensors:
        if name in entries or DTYPES.get(dtype) != values.dtype:
            raise TensorMismatch(f"tensor {name!r} occurs twice, or its values ({values.dtype}) are not {dtype}")
        entries[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}  # type: ignore[dict-item]
        arrays.append(values)
        end += values.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for values in arrays:
            np.ascontiguousarray(values).tofile(file)
    return 8 + len(header) + end


def _read_header_json(file: BinaryIO, size: int, name: str) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise BadSafetensors(f"{name} has {size} bytes; a safetensors file has at least 8")
    length = struct.unpack("<Q", prefix)[0]
    if length > min(limits.SAFETENSORS_HEADER_MAX_BYTES, size - 8):
        raise BadSafetensors(
            f"{name}: header of {length} bytes exceeds the file of {size} bytes or the bound of"
            f" {limits.SAFETENSORS_HEADER_MAX_BYTES}"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadSafetensors(f"{name}: header is no JSON object with unique keys: {error}") from error
    if not isinstance(header, dict):
        raise BadSafetensors(f"{name}: header is no JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _tensor(name: str, entry: Any, path: Path, start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise BadSafetensors(f"{path.name}: tensor {name!r} has no dtype, shape and two data_offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadSafetensors(f"{path.name}: tensor {name!r} has type {dtype!r}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > limits.TENSOR_DIMENSIONS_MAX or not all(map(_is_count, shape)):
        raise BadSafetensors(
            f"{path.name}: tensor {name!r} has shape {str(shape)[:80]}, not up to"
            f" {limits.TENSOR_DIMENSIONS_MAX} whole numbers"
        )
    if not _is_count(begin) or not _is_count(end) or end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise BadSafetensors(
            f"{path.name}: tensor {name!r} of {dtype} {shape} cannot occupy bytes {begin!r} to {end!r}"
        )
    return TensorInfo(
        name=name, dtype=dtype, shape=tuple(shape), file=path, offset=start + begin, size_bytes=end - begin
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > limits.JSON_FILE_MAX_BYTES:
        raise BadSafetensors(f"{path.name} is larger than {limits.JSON_FILE_MAX_BYTES} bytes")
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSafetensors(f"{path.name} has no weight_map: {error!r}") from error
    if not isinstance(weight_map, dict) or not 1 <= len(weight_map) <= limits.TENSORS_MAX:
        raise BadSafetensors(f"{path.name}: weight_map must map 1 to {limits.TENSORS_MAX} tensor names to files")
    for file in weight_map.values():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise UnsafeFile(f"{path.name} names {file!r}; a shard is a file NAME.safetensors in the same folder")
    return weight_map


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
