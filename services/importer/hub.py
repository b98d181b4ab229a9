"""Models on a Hugging Face hub, through the hub's own library: commit pinned, files verified, errors in our terms.

Endpoint, token, cache and offline mode are the library's (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE). Offline, a
snapshot in its cache is used, and verified by the names under which the cache keeps its files: their hashes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, as the library chose
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from services.importer.sources import SIDE_FILES, Progress, Snapshot, SourceFile, choose_files, place
from smeltkit import limits
from smeltkit.errors import BadRequest, DigestMismatch, HubDenied, HubUnavailable, UnknownSource
from smeltkit.ids import digest_file

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_PATTERNS = [*SIDE_FILES, "LICEN*", "*.safetensors", "model.safetensors.index.json", "*.gguf"]
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


class HubRepository:
    """One repository at one revision. `endpoint` None leaves the choice to the library."""

    def __init__(self, repository: str, revision: str = "", *, endpoint: str | None = None) -> None:
        if not _REPOSITORY.fullmatch(repository) or ".." in repository:
            raise BadRequest(f"{repository!r} is no hub repository; write ORG/NAME")
        if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise BadRequest(f"{revision!r} is no revision; write a branch, a tag or a commit")
        disable_progress_bars()
        self._repository, self._revision, self._endpoint = repository, revision or "main", endpoint

    def snapshot(self) -> Snapshot:
        """Files and commit of the revision; HubDenied, UnknownSource, HubUnavailable."""
        with _hub_errors(self._repository, self._revision):
            try:
                commit, found = self._remote()
            except OfflineModeIsEnabled:
                commit, found = self._cached()
        files, ignored = choose_files(found)
        return Snapshot(
            origin=f"hf://{self._repository}@{commit}",
            files=files,
            ignored=ignored,
            parameters={"repository": self._repository, "commit": commit},
        )

    def fetch(self, snapshot: Snapshot, names: Iterable[str], folder: Path, progress: Progress) -> None:
        """Downloads at the pinned commit, resuming what an earlier attempt began; DigestMismatch names a wrong file."""
        commit, done = str(snapshot.parameters["commit"]), 0
        for name in names:
            file = snapshot.files[name]
            path = self._download(file.path, commit)
            if not is_intact(path, file) and not huggingface_hub.constants.HF_HUB_OFFLINE:
                path = self._download(file.path, commit, force=True)
            if not is_intact(path, file):
                raise DigestMismatch(
                    f"{file.path} from the hub is not what the hub says it is; report it, or use a mirror"
                )
            place(path, folder / name)
            done += file.size_bytes
            progress(done)
        if snapshot.side_files and self._revision != commit:
            self._download(snapshot.files[snapshot.side_files[0]].path, self._revision)  # offline, the name is found

    def _remote(self) -> tuple[str, list[SourceFile]]:
        api = HfApi(endpoint=self._endpoint)
        info = api.model_info(
            self._repository, revision=self._revision, files_metadata=True, timeout=limits.HUB_TIMEOUT_S
        )
        found = [
            SourceFile(
                path=file.rfilename,
                size_bytes=file.size or 0,
                digest=f"sha256:{file.lfs.sha256}" if file.lfs else "",
                git_hash="" if file.lfs else file.blob_id or "",
            )
            for file in info.siblings or []
        ]
        if not info.sha or not _SHA1.fullmatch(info.sha):
            raise HubUnavailable(f"the hub names no commit for {self._repository}@{self._revision}; try again")
        return info.sha, found

    def _cached(self) -> tuple[str, list[SourceFile]]:
        root = Path(
            huggingface_hub.snapshot_download(
                self._repository, revision=self._revision, allow_patterns=_PATTERNS, local_files_only=True
            )
        )
        found = []
        for path in sorted(root.iterdir()):
            blob = path.resolve().name
            found.append(
                SourceFile(
                    path=path.name,
                    size_bytes=path.stat().st_size,
                    digest=f"sha256:{blob}" if _SHA256.fullmatch(blob) else "",
                    git_hash=blob if _SHA1.fullmatch(blob) else "",
                )
            )
        return root.name, found

    def _download(self, path: str, revision: str, *, force: bool = False) -> Path:
        with _hub_errors(self._repository, revision):
            return Path(
                huggingface_hub.hf_hub_download(
                    self._repository, path, revision=revision, force_download=force, endpoint=self._endpoint
                )
            )


def is_intact(path: Path, file: SourceFile) -> bool:
    """Whether the content has the size and the hash that the source tells."""
    if file.size_bytes != path.stat().st_size:
        return False
    with path.open("rb") as content:
        if file.digest:
            return digest_file(content)[0] == file.digest
        if not file.git_hash:
            return True
        hasher = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
        while block := content.read(limits.MIB):
            hasher.update(block)
        return hasher.hexdigest() == file.git_hash


@contextmanager
def _hub_errors(repository: str, revision: str) -> Iterator[None]:
    where = f"{repository}@{revision}"
    try:
        yield
    except GatedRepoError as error:
        raise HubDenied(f"{where} is gated; accept its terms on the hub and set HF_TOKEN") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if _status(error) in (401, 403):
            raise HubDenied(f"the hub denies {where} or does not know it; check the name, or set HF_TOKEN") from error
        raise UnknownSource(f"the hub has no {where}; check name and revision") from error
    except LocalEntryNotFoundError as error:
        raise HubUnavailable(
            f"{where} is not in the hub cache and the hub cannot be reached; unset HF_HUB_OFFLINE or fetch it before"
        ) from error
    except EntryNotFoundError as error:
        raise UnknownSource(f"the hub lists a file of {where} that it does not have; try again or report it") from error
    except HfHubHTTPError as error:
        _raise_http(error, where)
    except HFValidationError as error:
        raise BadRequest(f"{where} is no hub repository: {error}") from error
    except HTTPError as error:
        raise HubUnavailable(
            f"the hub cannot be reached for {where} ({type(error).__name__}); check the network and HF_ENDPOINT, or set"
            " HF_HUB_OFFLINE=1 to use its cache"
        ) from error
    except OSError as error:
        raise HubUnavailable(f"the hub did not deliver {where} whole ({type(error).__name__}); try again") from error


def _raise_http(error: HfHubHTTPError, where: str) -> None:
    status = _status(error)
    if status in (401, 403):
        raise HubDenied(
            f"the hub denies access to {where} ({status}); set HF_TOKEN to a token that may read it"
        ) from error
    if status == 404:
        raise UnknownSource(f"the hub has no {where}; check name and revision") from error
    wait = error.response.headers.get("Retry-After", "") if error.response is not None else ""
    wait_s = float(wait) if wait.isdigit() else None
    hint = f"; it asks to wait {wait} s" if wait_s is not None else ""
    raise HubUnavailable(
        f"the hub answers {status} for {where}{hint}; try again later", retry_after_s=wait_s
    ) from error


def _status(error: HfHubHTTPError) -> int:
    return error.response.status_code if error.response is not None else 0
