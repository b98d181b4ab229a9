"""The catalogue: human names that point at artifacts, in a bucket of NATS, changed by compare-and-swap."""

from __future__ import annotations

import builtins
import logging
import re
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from smelt.artifact.v1 import artifact_pb2

from smeltkit import limits
from smeltkit.bus import kv
from smeltkit.bus.subjects import CATALOG_BUCKET
from smeltkit.errors import BadRequest, CorruptRecord, NameTaken, RevisionConflict, UnknownModel
from smeltkit.ids import check_digest, check_name, is_digest
from smeltkit.jobs.ledger import LedgerBus
from smeltkit.rpc.context import TENANT

_log = logging.getLogger(__name__)
_KEPT = re.compile(r"[a-z0-9_/-]")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A name and the artifact it points at."""

    name: str
    """Name with tag, e.g. ore-11m:latest."""
    digest: str
    """Digest of the artifact."""
    artifact_type: str
    """Kind of the artifact."""
    size_bytes: int
    """Sum of the sizes of its files."""
    revision: int
    """Revision of the entry, for compare-and-swap."""
    tenant: str = ""
    """Tenant that gave the name last; empty for the platform."""


class Catalog:
    """Names and what they point at. Every call raises BusUnavailable while NATS is away."""

    def __init__(self, bus: LedgerBus) -> None:
        self._bucket = bus.bucket(CATALOG_BUCKET)

    async def resolve(self, reference: str) -> str:
        """The digest that `reference` means: a digest is itself, a name what it points at. UnknownModel, BadName."""
        if is_digest(reference):
            return reference
        entry = await self.get(reference)
        if entry is None:
            raise UnknownModel(f"nothing is called {reference!r}; `smelt models` lists names, `smelt import` adds one")
        return entry.digest

    async def get(self, name: str) -> Entry | None:
        """The entry of `name` (`:latest` if it has no tag), or None."""
        found = await self._bucket.get(_key(check_name(name)))
        return None if found is None else _parse(found)

    async def set(
        self, name: str, digest: str, artifact_type: str, size_bytes: int, expected_revision: int = 0
    ) -> Entry:
        """Points `name` at an artifact, for the tenant of the call or job at hand. `check_free`'s errors.

        RevisionConflict if the entry is not at `expected_revision` (0: at any).
        """
        if size_bytes < 0 or expected_revision < 0:
            raise BadRequest(f"size_bytes={size_bytes} and expected_revision={expected_revision} must not be negative")
        full = check_name(name)
        value = artifact_pb2.Name(
            name=full,
            digest=check_digest(digest),
            artifact_type=artifact_type,
            size_bytes=size_bytes,
            tenant=TENANT.get(),
        )
        revision = await self._write(_key(full), value.SerializeToString(), expected_revision)
        return _entry(value, revision)

    async def check_free(self, name: str) -> None:
        """NameTaken if the tenant of the call or job at hand may not give `name`; BadName."""
        _check_owner(await self._bucket.get(_key(check_name(name))))

    async def list(self, artifact_type: str = "") -> builtins.list[Entry]:
        """Entries by name: all, or those of one type. Corrupt ones are left out (and logged)."""
        entries = []
        for found in await self._bucket.entries():
            try:
                entries.append(_parse(found))
            except CorruptRecord as error:
                _log.error("%s", error)
        chosen = [entry for entry in entries if artifact_type in ("", entry.artifact_type)]
        return sorted(chosen, key=lambda entry: entry.name)

    async def _write(self, key: str, value: bytes, expected_revision: int) -> int:
        for _ in range(limits.CAS_TRIES_MAX):
            _check_owner(present := await self._bucket.get(key))
            if expected_revision:
                return await self._bucket.update(key, value, expected_revision)
            try:
                if present is None:
                    return await self._bucket.create(key, value)
                return await self._bucket.update(key, value, present.revision)
            except RevisionConflict:
                continue
        raise RevisionConflict(f"the entry changed {limits.CAS_TRIES_MAX} times while it was to be set; try again")


def _key(name: str) -> str:
    """A name as a key: one subject token, reversible, e.g. `ore-11m:latest` is `ore-11m=3alatest`."""
    return "".join(char if _KEPT.match(char) else f"={ord(char):02x}" for char in name)


def _check_owner(present: kv.Entry | None) -> None:
    """NameTaken if there is an entry that the tenant at hand did not give. The platform may move all."""
    tenant = TENANT.get()
    if tenant and present is not None and (entry := _parse(present)).tenant != tenant:
        raise NameTaken(
            f"the name {entry.name} was given by another tenant or by the platform, and an API key moves only names"
            " that it gave itself; choose another name (`smelt models` lists those that exist)",
            details={"field": "name"},
        )


def _parse(found: kv.Entry) -> Entry:
    try:
        name = artifact_pb2.Name.FromString(found.value)
    except DecodeError as error:
        raise CorruptRecord(f"the catalogue's entry {found.key} does not parse; delete its key") from error
    return _entry(name, found.revision)


def _entry(name: artifact_pb2.Name, revision: int) -> Entry:
    return Entry(
        name=name.name,
        digest=name.digest,
        artifact_type=name.artifact_type,
        size_bytes=name.size_bytes,
        revision=revision,
        tenant=name.tenant,
    )
