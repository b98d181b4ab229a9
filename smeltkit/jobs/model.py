"""The record of a job and its legal changes: pure functions from record to record, no clock and no bus.

    queued ----claim----> running ----succeed--> succeeded
       ^                   | |  \\-----fail----> failed
       \\-----requeue------/  cancel
    queued --cancel--> cancelled     \\--> cancelling --stop--> cancelled
    queued --fail----> failed (no worker)

A change of running work names the fencing token of the attempt that makes it. Another token than the record's means
that the work was given to somebody else: LeaseLost, and nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from smelt.job.v1 import job_pb2

from smeltkit import limits
from smeltkit.errors import IllegalTransition, LeaseLost
from smeltkit.ids import derived_id, digest_bytes

QUEUED: Final = job_pb2.JOB_STATE_QUEUED
RUNNING: Final = job_pb2.JOB_STATE_RUNNING
CANCELLING: Final = job_pb2.JOB_STATE_CANCELLING
SUCCEEDED: Final = job_pb2.JOB_STATE_SUCCEEDED
FAILED: Final = job_pb2.JOB_STATE_FAILED
CANCELLED: Final = job_pb2.JOB_STATE_CANCELLED

FINAL: Final = frozenset({SUCCEEDED, FAILED, CANCELLED})
"""States that never change again."""

_ATTEMPTS: Final = "attempts"


class Verb(Enum):
    """What can happen to a job."""

    CLAIM = "claim"
    REPORT = "report"
    SUCCEED = "succeed"
    FAIL = "fail"
    REQUEUE = "requeue"
    CANCEL = "cancel"
    STOP = "stop"


TRANSITIONS: Final[Mapping[tuple[int, Verb], job_pb2.JobState.ValueType]] = MappingProxyType(
    {
        (QUEUED, Verb.CLAIM): RUNNING,
        (QUEUED, Verb.CANCEL): CANCELLED,
        (QUEUED, Verb.FAIL): FAILED,
        (RUNNING, Verb.REPORT): RUNNING,
        (RUNNING, Verb.SUCCEED): SUCCEEDED,
        (RUNNING, Verb.FAIL): FAILED,
        (RUNNING, Verb.REQUEUE): QUEUED,
        (RUNNING, Verb.CANCEL): CANCELLING,
        (CANCELLING, Verb.CANCEL): CANCELLING,
        (CANCELLING, Verb.STOP): CANCELLED,
    }
)
"""Every legal change; whatever is not here is IllegalTransition."""


def new_record(
    *,
    service: str,
    kind: str,
    tenant: str,
    request: bytes,
    request_id: str,
    now_ns: int,
    trace: tuple[str, str] = ("", ""),
    cached_digest: str = "",
) -> job_pb2.JobRecord:
    """A queued job, or a succeeded one if `cached_digest` names its result. `trace` is (trace id, traceparent).

    The id follows from tenant and request id: a repeated start meets the record of the first.
    """
    trace_id, traceparent = trace
    job = job_pb2.Job(
        id=derived_id("job", tenant, request_id),
        service=service,
        kind=kind,
        tenant=tenant,
        state=SUCCEEDED if cached_digest else QUEUED,
        create_time=_timestamp(now_ns),
        update_time=_timestamp(now_ns),
        request_digest=request_digest(service, kind, request),
        result_digest=cached_digest,
        is_cached=bool(cached_digest),
        trace_id=trace_id,
    )
    return job_pb2.JobRecord(job=job, request=request, request_id=request_id, traceparent=traceparent)


def request_digest(service: str, kind: str, request: bytes) -> str:
    """The digest that jobs of the same request have in common."""
    return digest_bytes(b"\0".join((service.encode(), kind.encode(), request)))


def claim(record: job_pb2.JobRecord, *, fence: int, now_ns: int) -> job_pb2.JobRecord:
    """The next attempt begins under the token `fence`."""
    moved = _moved(record, Verb.CLAIM, now_ns)
    if fence <= record.fence:
        raise LeaseLost(f"token {fence} of {record.job.id} is not newer than {record.fence}")
    moved.fence = fence
    moved.job.attempt += 1
    moved.job.ClearField("progress")
    return moved


def report(record: job_pb2.JobRecord, progress: job_pb2.Progress, *, fence: int, now_ns: int) -> job_pb2.JobRecord:
    """Progress; `done` never decreases within a phase of an attempt."""
    _check_fence(record, fence)
    moved = _moved(record, Verb.REPORT, now_ns)
    before = record.job.progress
    moved.job.progress.CopyFrom(progress)
    if before.phase == progress.phase:
        moved.job.progress.done = max(before.done, progress.done)
    return moved


def spend(record: job_pb2.JobRecord, changed: job_pb2.JobRecord, gpu_s: float) -> job_pb2.JobRecord:
    """`changed`, a change of `record`, with the GPU seconds of all attempts so far; they never decrease."""
    if changed is not record:
        changed.job.gpu_s = max(changed.job.gpu_s, round(gpu_s, 3))
    return changed


def succeed(record: job_pb2.JobRecord, result_digest: str, *, fence: int, now_ns: int) -> job_pb2.JobRecord:
    """Done, with its result."""
    _check_fence(record, fence)
    moved = _moved(record, Verb.SUCCEED, now_ns)
    moved.job.result_digest = result_digest
    return moved


def fail(
    record: job_pb2.JobRecord, failure: job_pb2.Failure, *, now_ns: int, fence: int | None = None, is_dead: bool = False
) -> job_pb2.JobRecord:
    """Failed for good. Without `fence` it is the sweeper that says so. `is_dead`: attempts or patience are used up."""
    if fence is not None:
        _check_fence(record, fence)
    moved = _moved(record, Verb.FAIL, now_ns)
    moved.job.error.CopyFrom(failure)
    if is_dead:
        moved.job.error.details[_ATTEMPTS] = str(record.job.attempt)
    return moved


def requeue(
    record: job_pb2.JobRecord, why: str, *, now_ns: int, fence: int | None = None, is_counted: bool = True
) -> job_pb2.JobRecord:
    """Back into the queue; `why` joins the history, and alerts who watches. Not counted, an attempt is unspent.

    The token stays: whoever holds it finds the job queued, so its late writes are refused, and the next one is newer.
    """
    if fence is not None:
        _check_fence(record, fence)
    moved = _moved(record, Verb.REQUEUE, now_ns)
    moved.history.append(f"attempt {record.job.attempt}: {why}")
    del moved.history[: -limits.JOB_HISTORY_MAX]
    if is_counted:
        moved.job.progress.alerts.append(f"attempt {record.job.attempt} ended: {why}")
        del moved.job.progress.alerts[: -limits.JOB_ALERTS_MAX]
    else:
        moved.job.attempt -= 1
    return moved


def cancel(record: job_pb2.JobRecord, *, now_ns: int) -> job_pb2.JobRecord:
    """Asked to stop: at once while queued, by the worker while running. A job that is over stays as it is."""
    if record.job.state in FINAL or record.job.state == CANCELLING:
        return record
    return _moved(record, Verb.CANCEL, now_ns)


def stop(record: job_pb2.JobRecord, *, now_ns: int, fence: int | None = None) -> job_pb2.JobRecord:
    """Stopped after a cancel. Without `fence` it is the sweeper that says so."""
    if fence is not None:
        _check_fence(record, fence)
    return _moved(record, Verb.STOP, now_ns)


def was_begun(record: job_pb2.JobRecord) -> bool:
    """Whether an attempt at the job has ended already, so that the next one may go on from what it left."""
    return bool(record.history)


def revive(record: job_pb2.JobRecord, *, now_ns: int) -> job_pb2.JobRecord:
    """The record on a platform restored from a backup: no attempt lives there, and tokens begin anew."""
    revived = job_pb2.JobRecord()
    if record.job.state == RUNNING:
        revived.CopyFrom(requeue(record, "the platform was restored from a backup", now_ns=now_ns, is_counted=False))
    elif record.job.state == CANCELLING:
        revived.CopyFrom(stop(record, now_ns=now_ns))
    else:
        revived.CopyFrom(record)
    revived.fence = 0
    return revived


def is_dead(record: job_pb2.JobRecord) -> bool:
    """Whether the job failed because its attempts or its time in the queue were used up: a dead letter is due."""
    return record.job.state == FAILED and _ATTEMPTS in record.job.error.details


def _moved(record: job_pb2.JobRecord, verb: Verb, now_ns: int) -> job_pb2.JobRecord:
    state = TRANSITIONS.get((record.job.state, verb))
    if state is None:
        name = job_pb2.JobState.Name(record.job.state).removeprefix("JOB_STATE_").lower()
        raise IllegalTransition(f"job {record.job.id} is {name}: it cannot {verb.value}", details={"state": name})
    moved = job_pb2.JobRecord()
    moved.CopyFrom(record)
    moved.job.state = state
    # Time never runs backwards in a record, even when the clocks of two machines differ.
    moved.job.update_time.CopyFrom(_timestamp(max(now_ns, record.job.update_time.ToNanoseconds() + 1)))
    return moved


def _check_fence(record: job_pb2.JobRecord, fence: int) -> None:
    if record.fence != fence or record.job.state == QUEUED:
        raise LeaseLost(f"job {record.job.id} was given to somebody else: token {fence}, now {record.fence}")


def _timestamp(ns: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(ns)
    return stamp
