"""Files to the store: hashed, asked for, sent part by part to presigned URLs, and proven there by their digest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from rich.progress import Progress
from smelt.artifact.v1 import artifact_pb2

from gateway.cli.output import human_bytes
from smeltkit import limits
from smeltkit.errors import StoreUnavailable, UnknownSource, UnsafeFile
from smeltkit.ids import digest_file

if TYPE_CHECKING:
    from gateway.cli.session import Session

_MODEL_SUFFIXES = frozenset({".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt"})
_MODEL_NAMES = ("LICENSE", "LICENCE", "NOTICE", "README.md")
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack"})
_BLOCK_BYTES = limits.MIB


def model_files(source: Path) -> list[Path]:
    """What makes up the model at `source`: the .gguf file itself, or the model files of the folder, by name.

    Pictures, code, version control and sub-folders stay behind; the model card goes along for its licence.
    UnknownSource, or UnsafeFile where the only weights are pickles.
    """
    if source.is_file():
        if source.suffix != ".gguf":
            raise UnknownSource(f"{source.name} is no .gguf file; give the folder that holds the model")
        return [source]
    if not source.is_dir():
        raise UnknownSource(f"{source} does not exist; give a folder, a .gguf file or hf://ORG/NAME[@REVISION]")
    files = sorted(path for path in source.iterdir() if path.is_file() and not path.name.startswith("."))
    chosen = [path for path in files if path.suffix in _MODEL_SUFFIXES or path.name.startswith(_MODEL_NAMES)]
    if not any(path.suffix in (".safetensors", ".gguf") for path in chosen):
        if pickles := [path.name for path in files if path.suffix in _PICKLES]:
            raise UnsafeFile(f"{', '.join(pickles)}: pickles can run code and are refused; convert them to safetensors")
        raise UnknownSource(f"{source} holds no .safetensors and no .gguf file")
    return chosen


async def upload(session: Session, paths: list[Path]) -> list[artifact_pb2.Descriptor]:
    """Stores the files; a file that is stored already is not sent. Their descriptors, in order."""
    files = [await asyncio.to_thread(_described, path) for path in paths]
    total_bytes = sum(file.size_bytes for file in files)
    with Progress(console=session.output.err, transient=True, disable=not session.output.err.is_terminal) as progress:
        bar = progress.add_task(f"upload {human_bytes(total_bytes)}", total=total_bytes)
        async with httpx.AsyncClient(trust_env=False, timeout=limits.STORE_READ_TIMEOUT_S) as client:
            for number, (path, file) in enumerate(zip(paths, files, strict=True)):
                together = () if number else files
                await _upload_file(session, client, path, file, together, partial(progress.advance, bar))
    return files


async def stored_model(session: Session, source: Path) -> list[artifact_pb2.Descriptor]:
    """Stores the model at `source`; what `model_files` and `check_source` refuse is not sent."""
    from gateway.cli.source_check import check_source

    paths = model_files(source)
    await asyncio.to_thread(check_source, paths)
    return await upload(session, paths)


async def stored_file(session: Session, path: Path) -> str:
    """Stores one file; its digest. UnknownSource if it does not exist."""
    if not await asyncio.to_thread(path.is_file):
        raise UnknownSource(f"{path} does not exist")
    (stored,) = await upload(session, [path])
    return stored.digest


async def _upload_file(
    session: Session,
    client: httpx.AsyncClient,
    path: Path,
    file: artifact_pb2.Descriptor,
    together: Sequence[artifact_pb2.Descriptor],
    advance: Callable[[float], None],
) -> None:
    digest, size_bytes = file.digest, file.size_bytes
    begin = artifact_pb2.BeginUploadRequest(digest=digest, size_bytes=size_bytes, together=together)
    begun: artifact_pb2.BeginUploadResponse = await session.call(session.artifacts.BeginUpload, begin)
    advance(size_bytes - sum(part.size_bytes for part in begun.parts))
    if not begun.is_stored:
        slots = asyncio.Semaphore(limits.PARTS_PARALLEL_MAX)
        sent = await asyncio.gather(*(_send(client, path, part, slots, advance) for part in begun.parts))
        complete = artifact_pb2.CompleteUploadRequest(
            digest=digest,
            size_bytes=size_bytes,
            upload_id=begun.upload_id,
            parts=sorted([*begun.present, *sent], key=lambda part: part.number),
        )
        await session.call(session.artifacts.CompleteUpload, complete, timeout_s=limits.UPLOAD_VERIFY_TIMEOUT_S)


async def _send(
    client: httpx.AsyncClient,
    path: Path,
    part: artifact_pb2.UploadPart,
    slots: asyncio.Semaphore,
    advance: Callable[[float], None],
) -> artifact_pb2.UploadedPart:
    async with slots:
        for attempt in range(1, limits.STORE_RETRIES_MAX + 1):
            try:
                headers = {"content-length": str(part.size_bytes)}
                answer = await client.put(part.url, content=_blocks(path, part), headers=headers)
                answer.raise_for_status()
                advance(part.size_bytes)
                return artifact_pb2.UploadedPart(number=part.number, etag=answer.headers["etag"].strip('"'))
            except httpx.HTTPError as error:
                if attempt == limits.STORE_RETRIES_MAX:
                    raise StoreUnavailable(
                        f"part {part.number} of {path.name} was not taken after {attempt} tries; "
                        "the same command goes on where this one stopped"
                    ) from error
                await asyncio.sleep(0.2 * 2**attempt)
    raise AssertionError("the last try returns or raises")


async def _blocks(path: Path, part: artifact_pb2.UploadPart) -> AsyncIterator[bytes]:
    reader = _read(path, part.offset_bytes, part.size_bytes)
    while block := await asyncio.to_thread(next, reader, b""):
        yield block


def _read(path: Path, offset_bytes: int, size_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset_bytes)
        while size_bytes and (block := file.read(min(size_bytes, _BLOCK_BYTES))):
            size_bytes -= len(block)
            yield block


def _described(path: Path) -> artifact_pb2.Descriptor:
    digest, size_bytes = file_digest(path)
    return artifact_pb2.Descriptor(
        media_type="application/octet-stream", digest=digest, size_bytes=size_bytes, path=path.name
    )


def file_digest(path: Path) -> tuple[str, int]:
    """Digest and size in bytes of a file."""
    with path.open("rb") as file:
        return digest_file(file)
