"""Files from the store: read through presigned URLs and proven by their digest before they get their name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from smelt.artifact.v1 import artifact_pb2

from gateway.cli.uploads import file_digest
from smeltkit import limits
from smeltkit.errors import DigestMismatch, StoreUnavailable

if TYPE_CHECKING:
    from gateway.cli.session import Session


async def download(session: Session, layer: artifact_pb2.Descriptor, path: Path) -> None:
    """Writes a file of an artifact to `path`, whole or not at all; DigestMismatch, StoreUnavailable."""
    asked = artifact_pb2.GetDownloadRequest(digest=layer.digest)
    url = (await session.call(session.artifacts.GetDownload, asked)).url
    await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    for attempt in range(1, limits.STORE_RETRIES_MAX + 1):
        try:
            await _fetch(url, fresh)
            break
        except httpx.HTTPError as error:
            if attempt == limits.STORE_RETRIES_MAX:
                raise StoreUnavailable(f"{layer.path} could not be read after {attempt} tries; try again") from error
            await asyncio.sleep(0.2 * 2**attempt)
    found, _ = await asyncio.to_thread(file_digest, fresh)
    if found != layer.digest:
        await asyncio.to_thread(fresh.unlink)
        raise DigestMismatch(f"{layer.path} was stored as {layer.digest}, but what came is {found}")
    await asyncio.to_thread(fresh.rename, path)


async def _fetch(url: str, path: Path) -> None:
    client = httpx.AsyncClient(trust_env=False, timeout=limits.STORE_READ_TIMEOUT_S)
    async with client, client.stream("GET", url) as answer:
        answer.raise_for_status()
        with path.open("wb") as file:
            async for block in answer.aiter_bytes(limits.MIB):
                await asyncio.to_thread(file.write, block)
