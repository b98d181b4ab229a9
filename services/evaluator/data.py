"""The data of a suite: from the store, else from a folder, else from its published address. The digest decides.

What was found elsewhere is stored, so that a later run needs neither the folder nor the network.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from services.evaluator.suites import REPOSITORY, Suite
from services.evaluator.texts import Text
from smeltkit import limits
from smeltkit.blobs.store import Store
from smeltkit.errors import BadSuite, DataUnavailable, UnknownBlob
from smeltkit.ids import digest_bytes

_ROOT = Path(__file__).resolve().parents[2]


class DataSource:
    """Finds data of suites; everything here blocks, so call it through a thread."""

    def __init__(self, store: Store, folder: Path | None = None, *, can_download: bool = True) -> None:
        self._store, self._folder, self._can_download = store, folder, can_download

    def where(self, suite: Suite | Text) -> str:
        """Where the data would come from: "store", a path, or its address. UnknownBlob if from nowhere."""
        if self._store.size(suite.data.digest) is not None:
            return "store"
        if (path := self._path(suite)) is not None:
            return str(path)
        if self._can_download and not suite.data.url.startswith(REPOSITORY) and not suite.data.url.endswith(".zip"):
            return suite.data.url
        raise UnknownBlob(
            f"the data of suite {suite.name} is not stored; name the folder that holds {suite.data.file} with --data"
        )

    def read(self, suite: Suite | Text) -> bytes:
        """The bytes of the data, stored afterwards; BadSuite if what was found has another digest."""
        where = self.where(suite)
        if where == "store":
            return self._store.get_bytes(suite.data.digest, max_bytes=limits.SUITE_DATA_MAX_BYTES)
        data = _download(where) if where == suite.data.url else Path(where).read_bytes()
        if (digest := digest_bytes(data)) != suite.data.digest:
            raise BadSuite(
                f"{where}: has digest {digest}, suite {suite.name} declares {suite.data.digest}; "
                f"put {suite.data.file} there as it is published at {suite.data.url}"
            )
        self._store.put_bytes(data)
        return data

    def _path(self, suite: Suite | Text) -> Path | None:
        shipped = _ROOT / suite.data.url.removeprefix(REPOSITORY) if suite.data.url.startswith(REPOSITORY) else None
        folder = self._folder / suite.data.file if self._folder is not None else None
        return next((path for path in (folder, shipped) if path is not None and path.is_file()), None)


def check_digest(suite: Suite | Text, digest: str) -> None:
    """Raises BadSuite if a request names other data than the suite's; an empty digest means the suite's."""
    if digest and digest != suite.data.digest:
        raise BadSuite(f"{suite.data.file}: has digest {digest}, suite {suite.name} declares {suite.data.digest}")


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=limits.SUITE_DATA_TIMEOUT_S) as reply:
            data: bytes = reply.read(limits.SUITE_DATA_MAX_BYTES + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise DataUnavailable(
            f"{url} does not answer ({error}); name a folder that has the file with --data"
        ) from error
    if len(data) > limits.SUITE_DATA_MAX_BYTES:
        raise BadSuite(f"{url}: sends more than {limits.SUITE_DATA_MAX_BYTES} bytes")
    return data
