"""What the platform still speaks of: digests in names and in records of jobs, for the clean-up of the store."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError
from smelt.job.v1 import job_pb2

from smeltkit.blobs.garbage import digests_in
from smeltkit.bus.subjects import CATALOG_BUCKET, JOBS_BUCKET
from smeltkit.jobs.ledger import LedgerBus
from smeltkit.jobs.model import FINAL


@dataclass(frozen=True, kw_only=True)
class Roots:
    """Where reachability begins."""

    digests: frozenset[str]
    """Every digest that a name or the record of a job mentions, also one that no longer parses."""
    begun_s: tuple[float, ...]
    """Unix time at which each job that is not over was started."""


async def gather_roots(bus: LedgerBus) -> Roots:
    """The roots as they are now; BusUnavailable, and then nothing may be cleaned up."""
    names = await bus.bucket(CATALOG_BUCKET).entries()
    records = await bus.bucket(JOBS_BUCKET).entries()
    digests: set[str] = set()
    for entry in (*names, *records):
        digests |= digests_in(entry.value)
    begun_s = []
    for entry in records:
        try:
            job = job_pb2.JobRecord.FromString(entry.value).job
        except DecodeError:
            continue
        if job.state not in FINAL:
            begun_s.append(job.create_time.ToNanoseconds() / 1e9)
    return Roots(digests=frozenset(digests), begun_s=tuple(begun_s))
