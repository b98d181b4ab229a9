"""A training as one tar file that needs no platform: the model, how it was made, every step, and sums to check it by.

    model/...        the bundle's files; `smelt import` takes the folder
    bundle.json      the bundle's record: lineage, contract, licence, files by digest
    run.json         the run's record: settings, forecast, outcome, held-out loss
    metrics.jsonl    every step
    SHA256SUMS       of all of these, for sha256sum --check

Equal artifacts give equal archives, byte for byte. It is not signed: whoever needs that signs the file.
"""

from __future__ import annotations

import asyncio
import json
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from smelt.artifact.v1 import artifact_pb2

from gateway.cli.documents import to_document
from gateway.cli.downloads import download
from gateway.cli.uploads import file_digest
from smeltkit.errors import BadRequest

if TYPE_CHECKING:
    from gateway.cli.session import Session

_SUMS: Final = "SHA256SUMS"


async def write_archive(
    session: Session, bundle: artifact_pb2.Artifact, run: artifact_pb2.Artifact, target: Path
) -> dict[str, Any]:
    """Writes the archive of a bundle and its run to `target`, which must not exist; what is in it."""
    await asyncio.to_thread(_check_target, target)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        layers = {f"model/{layer.path}": layer for layer in bundle.layers} | {layer.path: layer for layer in run.layers}
        for path, layer in layers.items():
            await download(session, layer, folder / path)
        records = {"bundle.json": to_document(bundle), "run.json": to_document(run)}
        digests = await asyncio.to_thread(_assemble, folder, list(layers), records, target)
    facts = await asyncio.to_thread(file_digest, target)
    return {
        "path": str(target), "digest": facts[0], "size_bytes": facts[1],
        "bundle": bundle.digest, "run": run.digest, "files": digests,
    }  # fmt: skip


def _check_target(target: Path) -> None:
    if target.exists():
        raise BadRequest(f"{target} exists already; name another file, or remove it")
    if not target.parent.is_dir():
        raise BadRequest(f"{target.parent} is no folder; make it first")


def _assemble(folder: Path, paths: list[str], records: Mapping[str, Any], target: Path) -> dict[str, str]:
    """Writes `records` and the sums beside the files of `folder` and packs all of them; digest of each."""
    for path, record in records.items():
        (folder / path).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    digests = {path: file_digest(folder / path)[0] for path in sorted([*paths, *records])}
    sums = "".join(f"{digest.removeprefix('sha256:')}  {path}\n" for path, digest in digests.items())
    (folder / _SUMS).write_text(sums)
    fresh = folder / ".archive.tar"
    _pack(fresh, folder, [*digests, _SUMS])
    fresh.rename(target)
    return digests


def _pack(target: Path, folder: Path, paths: list[str]) -> None:
    """Files in their order, with nothing in their headers that differs from machine to machine."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in paths:
            info = tarfile.TarInfo(path)
            info.size, info.mode = (folder / path).stat().st_size, 0o644
            with (folder / path).open("rb") as file:
                archive.addfile(info, file)
