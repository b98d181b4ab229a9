"""Where models come from: what a source holds, which of its files make a model, and how they get into a folder.

Only files of known names are taken. Weights are safetensors, or else one GGUF file; a source that has nothing but
pickle is refused, and code is never fetched at all.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from smeltkit.blobs.cache import NodeCache
from smeltkit.errors import BadRequest, BundleIncomplete, DigestMismatch, UnsafeFile
from smeltkit.manifest import Descriptor, Manifest
from smeltkit.ml.bundle import GGUF_FILE
from smeltkit.ml.safetensors_io import INDEX_FILE, SINGLE_FILE

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
    "README.md",
    "NOTICE",
)
"""Files taken beside the weights, where the source has them."""

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_LICENCES = re.compile(r"LICEN[SC]E(\.(md|txt))?", re.IGNORECASE)
_WEIGHT_SUFFIXES = (".safetensors", ".gguf")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

Progress = Callable[[int], None]
"""Called with bytes fetched so far; may raise to stop."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source."""

    path: str
    """Path in the source."""
    size_bytes: int
    """Size in bytes."""
    digest: str = ""
    """sha256 digest, if the source tells it."""
    git_hash: str = ""
    """git's sha1 of the content, where the source tells only that."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a source holds at one fixed version."""

    origin: str
    """For the lineage: hf://ORG/NAME@COMMIT or the caller's word; never a path of a machine."""
    files: Mapping[str, SourceFile]
    """Name in the bundle folder to the file that becomes it."""
    ignored: tuple[str, ...] = ()
    """Paths that are not taken."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What identifies the content beside `inputs`, e.g. repository and commit."""
    inputs: tuple[str, ...] = ()
    """Digests that identify the content."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files taken."""
        return sum(file.size_bytes for file in self.files.values())

    @property
    def side_files(self) -> tuple[str, ...]:
        """Names of the files that are no weights."""
        return tuple(name for name in self.files if name in SIDE_FILES)

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Names of the files that hold weights, and of their index."""
        return tuple(name for name in self.files if name not in SIDE_FILES)


class Source(Protocol):
    """A place to import from. Synchronous; call it in a thread."""

    def snapshot(self) -> Snapshot:
        """What is there, at one fixed version."""

    def fetch(self, snapshot: Snapshot, names: Iterable[str], folder: Path, progress: Progress) -> None:
        """Puts the files into `folder` under their names in the bundle, each verified."""


class UploadedFiles:
    """Files that the caller stored as blobs before."""

    def __init__(self, files: Sequence[Descriptor], origin: str, cache: NodeCache) -> None:
        self._files, self._origin, self._cache = files, origin or "upload", cache

    def snapshot(self) -> Snapshot:
        """The files named; sizes and digests are the caller's and are verified when they are fetched."""
        found = [SourceFile(path=f.path, size_bytes=f.size_bytes, digest=f.digest) for f in self._files]
        files, ignored = choose_files(found)
        named = {name: file.path for name, file in sorted(files.items())}
        return Snapshot(
            origin=self._origin,
            files=files,
            ignored=ignored,
            parameters={"files": named, "origin": self._origin},
            inputs=tuple(file.digest for _, file in sorted(files.items())),
        )

    def fetch(self, snapshot: Snapshot, names: Iterable[str], folder: Path, progress: Progress) -> None:
        """Links the files from the node's cache, which verified them."""
        wanted = {snapshot.files[name].path: name for name in names}
        layers = tuple(file for file in self._files if file.path in wanted)
        done = 0
        for layer in layers:
            with self._cache.materialize(Manifest(artifact_type="upload", layers=(layer,))) as view:
                if (view / layer.path).stat().st_size != layer.size_bytes:
                    raise DigestMismatch(f"{layer.path} has another size than the {layer.size_bytes} bytes declared")
                place(view / layer.path, folder / wanted[layer.path])
            done += layer.size_bytes
            progress(done)


def choose_files(found: Sequence[SourceFile]) -> tuple[dict[str, SourceFile], tuple[str, ...]]:
    """Which files make the model (name in the bundle to file), and the paths of the others.

    UnsafeFile if the only weights are pickle; BundleIncomplete if there are none; BadRequest if it is unclear which.
    """
    by_path = {file.path: file for file in found}
    chosen = {name: by_path[name] for name in SIDE_FILES if name in by_path}
    licence = next((path for path in sorted(by_path) if _LICENCES.fullmatch(path)), None)
    if licence and "LICENSE" not in chosen:
        chosen["LICENSE"] = by_path[licence]
    chosen |= _weights(by_path)
    taken = {file.path for file in chosen.values()}
    return chosen, tuple(path for path in by_path if path not in taken)


def place(source: Path, target: Path) -> None:
    """Puts `source` at `target`: weights as a hard link where possible, others as a copy that may be written to."""
    try:
        if source.suffix in _WEIGHT_SUFFIXES or target.suffix in _WEIGHT_SUFFIXES:
            os.link(source.resolve(), target)
            return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
    shutil.copyfile(source, target)


def _weights(by_path: Mapping[str, SourceFile]) -> dict[str, SourceFile]:
    shards = {path: file for path, file in by_path.items() if _SHARD.fullmatch(path)}
    if INDEX_FILE in by_path:
        return {INDEX_FILE: by_path[INDEX_FILE], **shards}
    if SINGLE_FILE in by_path:
        return {SINGLE_FILE: by_path[SINGLE_FILE]}
    if shards:
        raise BundleIncomplete(f"{INDEX_FILE} is missing; {len(shards)} shards without it may not be all")
    ggufs = sorted(path for path in by_path if path.endswith(".gguf"))
    if len(ggufs) == 1:
        return {GGUF_FILE: by_path[ggufs[0]]}
    if ggufs:
        raise BadRequest(f"the source holds {len(ggufs)} GGUF files: {', '.join(ggufs[:8])}; import the one you want")
    pickles = sorted(path for path in by_path if path.endswith(_PICKLES))
    if pickles:
        raise UnsafeFile(
            f"the weights are pickle ({', '.join(pickles[:4])}), which can run code; convert to safetensors"
        )
    raise BundleIncomplete(f"no weights: expected {SINGLE_FILE}, shards with {INDEX_FILE}, or one .gguf file")
