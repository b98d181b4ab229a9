"""A series of backups in one bucket, for a clock to run: `python -m smeltkit.backup_series`.

Each backup lies below a prefix that is named by the time at which it was begun (UTC), and is whole by itself. One that
was interrupted is gone on with by the next run; once it is whole, all but the newest `keep` whole ones are deleted.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from smeltkit import backup
from smeltkit.blobs.below import StoreBelow
from smeltkit.blobs.objects import ObjectStore
from smeltkit.blobs.s3 import S3Store
from smeltkit.bus.client import Bus
from smeltkit.config import BackupConfig, PlatformConfig, from_environment
from smeltkit.errors import BadConfig
from smeltkit.jobs.ledger import LedgerBus
from smeltkit.service import run_command

_NAME: Final = re.compile(r"\d{8}T\d{6}Z")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SeriesConfig:
    """Where the series lies: prefix `SMELT_BACKUPS_`."""

    bucket: str
    """Bucket of the backups, on the server that SMELT_BACKUP_* name; it must exist, and not be the platform's."""
    prefix: str = "smelt"
    """Beginning of the keys of the series in it."""
    keep: int = 7
    """Whole backups that are kept, 1 to 1000; each takes as many bytes as the platform's artifacts."""

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= 1000:
            raise BadConfig(f"keep={self.keep} must lie in 1..1000")
        if not self.prefix.strip("/"):
            raise BadConfig(f"prefix={self.prefix!r} must name a beginning of keys, e.g. smelt")


class Series:
    """The backups below `place`, a store that nothing else writes to."""

    def __init__(self, place: ObjectStore, clock: Callable[[], float] = time.time) -> None:
        self._place, self._clock = place, clock

    def names(self) -> list[str]:
        """Names of all, oldest first, also of those that are not whole."""
        found = {key.partition("/")[0] for key, _, _ in self._place._entries("")}
        return sorted(name for name in found if _NAME.fullmatch(name))

    def whole(self) -> list[str]:
        """Names of those that can be restored, oldest first."""
        return [name for name in self.names() if backup.is_whole(self.at(name))]

    def at(self, name: str) -> ObjectStore:
        """The store of one of them."""
        return StoreBelow(self._place, name)

    async def add(self, bus: LedgerBus, store: ObjectStore, *, keep: int) -> tuple[str, backup.Summary]:
        """Takes a backup, or ends one that was interrupted, and deletes what is beyond `keep`; its name."""
        names, whole = await asyncio.to_thread(self.names), await asyncio.to_thread(self.whole)
        is_interrupted = bool(names) and names[-1] not in whole
        name = names[-1] if is_interrupted else time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._clock()))
        done = await backup.back_up(bus, store, self.at(name), report=_log.info)
        kept = sorted({*whole, name})[-keep:]
        for old in sorted({*names, name} - set(kept)):
            await asyncio.to_thread(self._delete, old)
        return name, done

    def _delete(self, name: str) -> None:
        """What says that it is whole goes first: half of it must never look like a backup."""
        backup.unmark(self.at(name))
        for key, _, _ in list(self._place._entries(f"{name}/")):
            self._place._delete(key)
        _log.info("deleted the backup %s", name)


async def _main() -> None:
    platform = from_environment(PlatformConfig, "SMELT_PLATFORM_")
    server = from_environment(BackupConfig, "SMELT_BACKUP_")
    series = from_environment(SeriesConfig, "SMELT_BACKUPS_")
    target = server.on(platform)
    if (series.bucket, target.s3_endpoint) == (platform.s3_bucket, platform.s3_endpoint):
        raise BadConfig(f"SMELT_BACKUPS_BUCKET={series.bucket} is the platform's own bucket; name another")
    place = S3Store(replace(target, s3_bucket=series.bucket))
    bus = await Bus.connect(platform, name="backup")
    try:
        name, done = await Series(StoreBelow(place, series.prefix)).add(bus, S3Store(platform), keep=series.keep)
    finally:
        await bus.close()
    where = f"s3://{series.bucket}/{series.prefix.strip('/')}/{name}"
    _log.info("%s is whole: %d objects, %d bytes, %d missing", where, done.objects, done.size_bytes, len(done.missing))


if __name__ == "__main__":
    run_command(_main)
