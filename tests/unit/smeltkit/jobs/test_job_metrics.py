"""What a sweeper tells of the queues: for how long jobs wait there, and those that end for want of workers."""

from __future__ import annotations

from smelt.job.v1 import job_pb2

from smeltkit.errors import BusUnavailable, FileChanged
from smeltkit.jobs.bounds import JobBounds
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.sweeper import Sweeper
from smeltkit.telemetry import names
from smeltkit.telemetry.failures import counted
from smeltkit.testing.bus import MemoryBus
from smeltkit.testing.spans import metric_values

SERVICE = {names.SERVICE: "counted-toy"}


async def test_jobs_that_wait_are_told_and_those_that_nobody_serves_are_counted_once() -> None:
    bus, dead = MemoryBus(), names.JOBS_DEAD.name
    assert metric_values(dead, SERVICE) == []
    patient, hasty = (JobLedger(bus, JobBounds(no_worker_s=seconds)) for seconds in (600.0, 0.0))
    request = job_pb2.GetJobRequest(id="x")
    await patient.start(service=SERVICE[names.SERVICE], kind="toy", request=request, request_id="1")
    waits = Sweeper(patient)
    for _ in range(2):
        await waits.sweep()
    assert metric_values(names.JOB_WAIT.name, SERVICE)[-1] > 0 and metric_values(dead, SERVICE) == [0]
    for sweeper in (Sweeper(hasty), Sweeper(hasty), waits):
        await sweeper.sweep()
    assert metric_values(dead, SERVICE) == [1] and metric_values(names.JOB_WAIT.name, SERVICE) == [0]


def test_a_failure_of_the_bus_is_counted_by_its_reason_and_a_changed_file_is_none() -> None:
    failures = names.DEPENDENCY_FAILURES.name
    told = [BusUnavailable("away"), FileChanged("x"), ValueError("x")]
    before = sum(metric_values(failures, {names.ERROR_TYPE: "BUS_UNAVAILABLE"}))
    assert [counted(error) for error in told] == told
    assert sum(metric_values(failures, {names.ERROR_TYPE: "BUS_UNAVAILABLE"})) == before + 1
    assert not metric_values(failures, {names.ERROR_TYPE: "FILE_CHANGED"})
