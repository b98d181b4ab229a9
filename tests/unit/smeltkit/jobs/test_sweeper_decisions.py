"""What a sweeper does with a record, as a pure function."""

from __future__ import annotations

import pytest
from smelt.job.v1 import job_pb2

from smeltkit import limits
from smeltkit.jobs import model
from smeltkit.jobs.bounds import JobBounds
from smeltkit.jobs.sweeper import Care, Surroundings, care_for

BOUNDS = JobBounds(no_worker_s=30, sweep_period_s=3, attempts_max=4)
LONG_AGO_S = 10_000.0


def in_state(state: job_pb2.JobState.ValueType, attempt: int = 1) -> job_pb2.JobRecord:
    return job_pb2.JobRecord(job=job_pb2.Job(id="job-1", state=state, attempt=attempt))


def around(
    *, has_lease: bool = False, without_worker_s: float = 0, is_queue_empty: bool = False, age_s: float = 0
) -> Surroundings:
    return Surroundings(
        has_lease=has_lease, without_worker_s=without_worker_s, is_queue_empty=is_queue_empty, age_s=age_s
    )


@pytest.mark.parametrize("state", [model.RUNNING, model.CANCELLING])
def test_work_with_a_living_lease_is_left_alone(state: job_pb2.JobState.ValueType) -> None:
    assert care_for(in_state(state), around(has_lease=True, age_s=LONG_AGO_S), BOUNDS) is Care.NOTHING


def test_running_without_a_lease_goes_back_to_the_queue() -> None:
    """R-120: whatever its events say, a job without a lease does not run."""
    assert care_for(in_state(model.RUNNING), around(), BOUNDS) is Care.REQUEUE


def test_the_last_attempt_without_a_lease_is_given_up() -> None:
    assert care_for(in_state(model.RUNNING, attempt=4), around(), BOUNDS) is Care.GIVE_UP


def test_cancelling_without_a_lease_is_stopped_and_never_restarted() -> None:
    """R-130: what was cancelled is not run again."""
    assert care_for(in_state(model.CANCELLING, attempt=1), around(), BOUNDS) is Care.STOP


def test_a_queued_job_waits_while_workers_live() -> None:
    assert care_for(in_state(model.QUEUED), around(age_s=500), BOUNDS) is Care.NOTHING


def test_a_queued_job_without_any_worker_is_ended() -> None:
    late = around(without_worker_s=30, age_s=30)
    assert care_for(in_state(model.QUEUED), late, BOUNDS) is Care.NO_WORKER


def test_a_job_that_came_after_the_last_worker_left_gets_its_whole_time() -> None:
    fresh = around(without_worker_s=LONG_AGO_S, age_s=29)
    assert care_for(in_state(model.QUEUED), fresh, BOUNDS) is Care.NOTHING


def test_a_queued_job_with_an_empty_queue_lost_its_message() -> None:
    assert care_for(in_state(model.QUEUED), around(is_queue_empty=True, age_s=3), BOUNDS) is Care.DISPATCH


def test_a_job_just_queued_is_given_time_for_its_message() -> None:
    assert care_for(in_state(model.QUEUED), around(is_queue_empty=True, age_s=1), BOUNDS) is Care.NOTHING


def test_in_a_queue_that_never_empties_a_message_is_replaced_in_the_end() -> None:
    assert care_for(in_state(model.QUEUED), around(age_s=limits.JOB_REDISPATCH_S), BOUNDS) is Care.DISPATCH


@pytest.mark.parametrize("state", sorted(model.FINAL))
def test_what_is_over_needs_nothing(state: job_pb2.JobState.ValueType) -> None:
    lost = around(without_worker_s=LONG_AGO_S, is_queue_empty=True, age_s=LONG_AGO_S)
    assert care_for(in_state(state), lost, BOUNDS) is Care.NOTHING
