"""Results of deterministic stages, found again by what went into them.

The key is the digest of operation, parameters, input digests and code revision. A hit counts only while the result is
still stored: who asks says how to find out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from smeltkit.bus.kv import Bucket
from smeltkit.bus.subjects import STAGES_BUCKET
from smeltkit.errors import RevisionConflict
from smeltkit.ids import check_digest, digest_bytes
from smeltkit.jobs.ledger import LedgerBus
from smeltkit.manifest import canonical_json
from smeltkit.revision import code_revision

Exists = Callable[[str], Awaitable[bool]]
"""Whether the artifact of a digest is stored and complete."""


class StageCache:
    """Digests of results by stage key. `revision` is that of the code, found by itself unless given."""

    def __init__(self, bus: LedgerBus, exists: Exists, *, revision: str = "") -> None:
        self._bucket: Bucket = bus.bucket(STAGES_BUCKET)
        self._exists = exists
        self._revision = revision or code_revision()

    def key(self, operation: str, parameters: Mapping[str, Any], inputs: Sequence[str]) -> str:
        """The key of one stage: 64 hex digits. `parameters` are JSON values, `inputs` digests in their order."""
        content = {
            "operation": operation,
            "parameters": dict(parameters),
            "inputs": [check_digest(digest) for digest in inputs],
            "code": self._revision,
        }
        return digest_bytes(canonical_json(content)).removeprefix("sha256:")

    async def get(self, key: str) -> str | None:
        """The digest of the stage's result, or None if there is none, or if it is not stored any more."""
        entry = await self._bucket.get(key)
        if entry is None:
            return None
        digest = check_digest(entry.value.decode(errors="replace"))
        return digest if await self._exists(digest) else None

    async def put(self, key: str, digest: str) -> None:
        """Remembers the result of a stage; of two that finish at once, either may be kept."""
        value = check_digest(digest).encode()
        entry = await self._bucket.get(key)
        if entry is not None and entry.value == value:
            return
        try:
            if entry is None:
                await self._bucket.create(key, value)
            else:
                await self._bucket.update(key, value, entry.revision)
        except RevisionConflict:
            return
