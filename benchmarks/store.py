"""Artifact store against minio-py's fput_object and fget_object: one real S3 server, one file, alternating runs.

Ours must hash the file before it can be named, and verifies every byte it receives; theirs verifies nothing on a get. So
the floor is the speed of sha256 here, which is printed too: a processor without instructions for it (no sha_ni) spends
more on a get's check than on the get. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from minio import Minio

from benchmarks import results
from smeltkit import limits
from smeltkit.testing.s3 import fresh_store, s3_server

SIZES_MIB = (16, 256)
RUNS = 5
FLOORS = {"put": 0.7, "get": 0.4}


def main() -> int:
    """How many ratios lie below their floor."""
    rows = []
    with tempfile.TemporaryDirectory() as name, s3_server() as server:
        folder = Path(name)
        store = fresh_store(server, folder / "uploads")
        config = store.config
        client = Minio(
            config.s3_endpoint, access_key=config.s3_access_key, secret_key=config.s3_secret_key, secure=False
        )
        for size_mib in SIZES_MIB:
            put: dict[str, list[float]] = {"ours": [], "theirs": []}
            get: dict[str, list[float]] = {"ours": [], "theirs": []}
            for run in range(RUNS):
                source = folder / "source"
                source.write_bytes(os.urandom(size_mib * limits.MIB))
                digest, key = "", f"peer/{size_mib}-{run}"
                steps = {
                    "ours": (lambda: store.put_file(source), lambda: store.fetch(digest, folder / "ours")),
                    "theirs": (
                        lambda: client.fput_object(config.s3_bucket, key, str(source)),
                        lambda: client.fget_object(config.s3_bucket, key, str(folder / "theirs")),
                    ),
                }
                order = ("ours", "theirs") if run % 2 else ("theirs", "ours")
                for who in order:
                    put[who].append(_seconds(steps[who][0]))
                digest, _ = store.put_file(source)
                for who in order:
                    get[who].append(_seconds(steps[who][1]))
                assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes() == source.read_bytes()
            rows += [_row(verb, size_mib, times) for verb, times in (("put", put), ("get", get))]
    hash_mib_s = 256 / _seconds(lambda: hashlib.sha256(bytes(256 * limits.MIB)))
    print(results.table(rows))
    print(f"sha256: {hash_mib_s:.0f} MiB/s")
    results.save("store", rows, peer="minio-py 7.2.20", server="seaweedfs 4.48", floors=FLOORS, sha256_mib_s=hash_mib_s)
    missed = [row for row in rows if row["ratio"] < FLOORS[str(row["verb"])]]
    return len(missed)


def _row(verb: str, size_mib: int, times: dict[str, list[float]]) -> dict[str, object]:
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
