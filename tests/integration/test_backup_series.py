"""Backups by the clock: on real servers, by a key that only reads; the newest are kept, an interrupted one is ended."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from smeltkit import backup
from smeltkit.backup_series import Series, SeriesConfig
from smeltkit.blobs.below import StoreBelow
from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import Bus
from smeltkit.config import environment
from smeltkit.errors import BadConfig, StoreDenied
from smeltkit.manifest import REPORT_TYPE, Descriptor, Manifest
from smeltkit.testing.s3 import S3Server, fresh_store


class Broken(S3Store):
    """A place whose disk is full by the time the state is to be written."""

    def _write(self, key: str, data: bytes) -> None:
        if key.endswith("refs/backup/state"):
            raise OSError("no space left")
        super()._write(key, data)


def put_report(store: S3Store, text: bytes) -> str:
    layer = Descriptor(media_type="text/plain", digest=store.put_bytes(text), size_bytes=len(text), path="report")
    return store.put_manifest(Manifest(artifact_type=REPORT_TYPE, config={}, layers=(layer,)))


async def test_the_newest_backups_are_kept_and_an_interrupted_one_is_gone_on_with(
    bus: Bus, store: S3Store, s3: S3Server, tmp_path: Path
) -> None:
    """Each can be restored by itself; what others keep beside the series is left alone."""
    now_s = 1_800_000_000.0

    def clock() -> float:
        return now_s

    target = fresh_store(s3, tmp_path / "place")
    target.put_bytes(b"somebody else's")
    series = Series(StoreBelow(target, "nightly"), clock)
    made = []
    for day in range(4):
        now_s += 86_400
        digest = put_report(store, b"day %d" % day)
        if day == 2:
            broken = Series(StoreBelow(Broken(target.config), "nightly"), clock)
            with pytest.raises(OSError, match="no space"):
                await broken.add(bus, store, keep=2)
            assert series.names()[-1] not in series.whole() and len(series.whole()) == 2
            now_s += 3600
        name, done = await series.add(bus, store, keep=2)
        assert digest not in done.missing and series.at(name).has_manifest(digest)
        made.append(name)
    assert made[2] == "20270118T080000Z", "the one that was interrupted"
    assert series.names() == series.whole() == made[2:]
    assert len(list(target.list_blobs())) == 1


def test_the_command_reads_with_its_own_key_and_names_what_is_wrong(
    bus: Bus, s3: S3Server, tmp_path: Path, nats_url: str
) -> None:
    """As the pod runs it: secrets in files, another server's bucket, one line that says what was done or why not."""
    store, place = S3Store(s3.config), fresh_store(s3, tmp_path / "place")
    put_report(store, b"report")
    reader = s3.config_of("backup")
    with pytest.raises(StoreDenied):
        S3Store(reader).put_bytes(b"something new")
    for folder, config in (("own", reader), ("there", place.config)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "access-key").write_text(config.s3_access_key)
        (tmp_path / folder / "secret-key").write_text(config.s3_secret_key)
    names = {
        "SMELT_PLATFORM_NATS_URL": nats_url,
        "SMELT_PLATFORM_S3_ENDPOINT": reader.s3_endpoint,
        "SMELT_PLATFORM_S3_BUCKET": reader.s3_bucket,
        "SMELT_PLATFORM_S3_KEYS_DIR": str(tmp_path / "own"),
        "SMELT_BACKUP_S3_ENDPOINT": place.config.s3_endpoint,
        "SMELT_BACKUP_S3_KEYS_DIR": str(tmp_path / "there"),
        "SMELT_BACKUPS_BUCKET": place.config.s3_bucket,
    }

    def run(**changed: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "smeltkit.backup_series"]
        return subprocess.run(command, env=environment(names | changed), capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0 and f"s3://{place.config.s3_bucket}/smelt/" in done.stderr, done.stderr
    (name,) = Series(StoreBelow(place, "smelt")).whole()
    assert backup.is_whole(StoreBelow(place, f"smelt/{name}"))
    refused = run(SMELT_BACKUPS_BUCKET=reader.s3_bucket)
    assert refused.returncode == 2 and "BAD_CONFIG: SMELT_BACKUPS_BUCKET=" in refused.stderr, refused.stderr


@pytest.mark.parametrize("values", [{"keep": 0}, {"keep": 1001}, {"prefix": "/"}])
def test_a_series_out_of_bounds_is_refused(values: dict[str, int | str]) -> None:
    with pytest.raises(BadConfig, match=next(iter(values))):
        replace(SeriesConfig(bucket="b"), **values)  # type: ignore[arg-type]
