"""The files of a checkpoint, below torch's distributed checkpoint (DCP), which says who writes and who reads what.

Each process appends the parts of tensors that it holds to a file of its own, as plain bytes, each with its digest. What
was written is read back and held against it before the checkpoint counts as written, and again by whoever reads that
part later, in as many processes as it may be.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from smeltkit.errors import BadConfig, DigestMismatch
from smeltkit.ids import digest_bytes

METADATA_FILE: Final = ".metadata"
"""Where each `Part` of each tensor is; written by DCP's first process."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process wrote of a tensor."""

    file: str
    offset: int
    size_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    digest: str


class PartsWriter(FileSystemWriter):
    """Writes into a folder; `commit` is called in the first process once all have written.

    What it raises, or any process in writing, all processes raise. DigestMismatch for what is not read as written,
    BadConfig for what is not to be seen by the first.
    """

    def __init__(self, folder: Path, commit: Callable[[], None]) -> None:
        super().__init__(folder)
        self._folder, self._commit = folder, commit

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See StorageWriter: a file for each process."""
        return [replace(plan, storage_data=f"part-{number}.bin") for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See StorageWriter."""
        path = self._folder / plan.storage_data
        parts: list[tuple[MetadataIndex, Part]] = []
        with path.open("wb") as file:
            for item in plan.items:
                value = planner.resolve_data(item)
                assert isinstance(value, Tensor)
                data, offset = _bytes_of(value), file.tell()
                _append(file, data)
                parts.append((item.index, Part(
                    file=path.name, offset=offset, size_bytes=len(data), shape=tuple(value.shape), dtype=value.dtype,
                    digest=digest_bytes(data),
                )))  # fmt: skip
            file.flush()
            os.fsync(file.fileno())
        for index, part in parts:
            _read(self._folder, part, index.fqn)
        found: Future[list[WriteResult]] = Future()
        found.set_result(
            [WriteResult(index=index, size_in_bytes=one.size_bytes, storage_data=one) for index, one in parts]
        )
        return found

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See StorageWriter."""
        super().finish(metadata, results)
        for name in sorted({result.storage_data.file for found in results for result in found}):
            if not (self._folder / name).is_file():
                raise BadConfig(
                    f"{self._folder / name}, which another process wrote, is not to be seen here; all machines of a"
                    " training need one and the same storage for its folder"
                )
        self._commit()


class PartsReader(FileSystemReader):
    """Reads from a folder; DigestMismatch names the tensor that is not what was written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See StorageReader: each part that is needed once, and of it what is needed."""
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        for index, items in wanted.items():
            part: Part = self.storage_data[index]
            stored = _read(self._folder, part, index.fqn)
            for item in items:
                piece, target = stored, planner.resolve_tensor(item).detach()
                for axis, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    piece = piece.narrow(axis, offset, length)
                target.copy_(piece)
                planner.commit_tensor(item, target)
        found: Future[None] = Future()
        found.set_result(None)
        return found


def _bytes_of(value: Tensor) -> memoryview:
    """The bytes of a tensor in memory of the host, without a copy where they lie together."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _append(file: BinaryIO, data: memoryview) -> None:
    file.write(data)


def _read(folder: Path, part: Part, name: str) -> Tensor:
    """A part that has its digest."""
    stored = torch.empty(part.shape, dtype=part.dtype)
    data: Any = _bytes_of(stored)
    with (folder / part.file).open("rb") as file:
        file.seek(part.offset)
        size_bytes = file.readinto(data)
    if size_bytes != part.size_bytes or digest_bytes(data) != part.digest:
        raise DigestMismatch(
            f"{folder.name}: {name} in {part.file} is not what was written; remove {folder.name} to go on from an older"
            " one"
        )
    return stored
