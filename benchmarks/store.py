"""Artifact store against minio-py's fput_object and fget_object: one real S3 server, one file, alternating runs.

Ours must hash a file before it can be named, and verifies every byte it receives; theirs verifies nothing on a get. So
the floor is the speed of sha256, which is printed too: a processor without instructions for it (no sha_ni) spends more
on the check of a get than on the get. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from minio import Minio

from benchmarks import results
from smeltkit import limits
from smeltkit.blobs.s3 import S3Store
from smeltkit.testing.s3 import fresh_store, s3_server

SIZES_MIB = (16, 256)
RUNS = 4
FLOORS = {"put": 0.55, "get": 0.15}
Times = dict[str, list[float]]


def main() -> int:
    """How many ratios lie below their floor."""
    with tempfile.TemporaryDirectory() as name, s3_server() as server:
        store = fresh_store(server, Path(name) / "uploads")
        rows = [row for size_mib in SIZES_MIB for row in _compare(store, Path(name), size_mib)]
    hash_mib_s = 256 / _seconds(lambda: hashlib.sha256(bytes(256 * limits.MIB)))
    print(results.table(rows))
    print(f"sha256: {hash_mib_s:.0f} MiB/s")
    results.save(
        "store",
        rows,
        peer="minio-py 7.2.20",
        server="seaweedfs 4.48",
        floors=FLOORS,
        sha256_mib_s=round(hash_mib_s),
        load=os.getloadavg()[0],
    )
    return sum(row["ratio"] < FLOORS[row["verb"]] for row in rows)


def _compare(store: S3Store, folder: Path, size_mib: int) -> list[dict[str, Any]]:
    """A row for put and one for get. Each run has fresh bytes, and the other one goes first."""
    config, source, ours, theirs = store.config, folder / "source", folder / "ours", folder / "theirs"
    client = Minio(config.s3_endpoint, access_key=config.s3_access_key, secret_key=config.s3_secret_key, secure=False)
    key = f"peer/{size_mib}"
    put: Times = {"ours": [], "theirs": []}
    get: Times = {"ours": [], "theirs": []}
    for run in range(RUNS):
        source.write_bytes(os.urandom(size_mib * limits.MIB))
        digest = f"sha256:{hashlib.sha256(source.read_bytes()).hexdigest()}"
        _time(put, run, lambda: store.put_file(source), lambda: client.fput_object(config.s3_bucket, key, str(source)))
        fetch = partial(store.fetch, digest, ours)
        _time(get, run, fetch, lambda: client.fget_object(config.s3_bucket, key, str(theirs)))
        assert ours.read_bytes() == theirs.read_bytes() == source.read_bytes()
    return [_row("put", size_mib, put), _row("get", size_mib, get)]


def _time(times: Times, run: int, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    order = [("ours", ours), ("theirs", theirs)]
    for who, action in order if run % 2 else reversed(order):
        times[who].append(_seconds(action))


def _row(verb: str, size_mib: int, times: Times) -> dict[str, Any]:
    return {
        "verb": verb,
        "MiB": size_mib,
        "ours MiB/s": size_mib / statistics.median(times["ours"]),
        "minio-py MiB/s": size_mib / statistics.median(times["theirs"]),
        "ratio": results.median_ratio(times["theirs"], times["ours"]),
    }


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
