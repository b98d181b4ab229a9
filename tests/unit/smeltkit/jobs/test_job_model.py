"""The transition table and the changes of a record, pure."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from smelt.job.v1 import job_pb2

from smeltkit import limits
from smeltkit.errors import IllegalTransition, LeaseLost
from smeltkit.jobs import model
from smeltkit.jobs.model import TRANSITIONS, Verb

STATES = (model.QUEUED, model.RUNNING, model.CANCELLING, model.SUCCEEDED, model.FAILED, model.CANCELLED)
DIGEST = "sha256:" + "1" * 64


def record(cached_digest: str = "") -> job_pb2.JobRecord:
    return model.new_record(
        service="toy",
        kind="count",
        tenant="default",
        request=b"request",
        request_id="one",
        now_ns=1_000,
        cached_digest=cached_digest,
    )


def running(fence: int = 5) -> job_pb2.JobRecord:
    return model.claim(record(), fence=fence, now_ns=2_000)


def failure() -> job_pb2.Failure:
    return job_pb2.Failure(reason="BAD_REQUEST", message="no")


def test_every_state_but_the_final_ones_has_a_way_out() -> None:
    """R-120: no state is a dead end, so nothing can be "running" for ever by design."""
    for state in STATES:
        exits = {target for (source, _), target in TRANSITIONS.items() if source == state and target != state}
        assert bool(exits) != (state in model.FINAL)


@pytest.mark.parametrize(("state", "verb"), list(itertools.product(STATES, Verb)))
def test_what_is_not_in_the_table_is_refused(state: job_pb2.JobState.ValueType, verb: Verb) -> None:
    present = running()
    present.job.state = state
    changes = {
        Verb.CLAIM: lambda: model.claim(present, fence=9, now_ns=3_000),
        Verb.REPORT: lambda: model.report(present, job_pb2.Progress(phase="p"), fence=5, now_ns=3_000),
        Verb.SUCCEED: lambda: model.succeed(present, DIGEST, fence=5, now_ns=3_000),
        Verb.FAIL: lambda: model.fail(present, failure(), now_ns=3_000),
        Verb.REQUEUE: lambda: model.requeue(present, "why", now_ns=3_000),
        Verb.CANCEL: lambda: model.cancel(present, now_ns=3_000),
        Verb.STOP: lambda: model.stop(present, now_ns=3_000),
    }
    if (state, verb) in TRANSITIONS:
        assert changes[verb]().job.state == TRANSITIONS[state, verb]
    elif verb is Verb.CANCEL:
        assert changes[verb]() is present
    else:
        with pytest.raises((IllegalTransition, LeaseLost)):
            changes[verb]()


def test_a_change_leaves_its_argument_untouched() -> None:
    before = record()
    copy = before.SerializeToString()
    model.claim(before, fence=1, now_ns=2_000)
    assert before.SerializeToString() == copy


def test_the_same_request_id_gives_the_same_job_id() -> None:
    assert record().job.id == record().job.id


def test_another_tenant_gives_another_job_id() -> None:
    other = model.new_record(
        service="toy", kind="count", tenant="other", request=b"request", request_id="one", now_ns=1_000
    )
    assert other.job.id != record().job.id


def test_a_cached_result_is_success_at_once() -> None:
    job = record(DIGEST).job
    assert (job.state, job.result_digest, job.is_cached, job.attempt) == (model.SUCCEEDED, DIGEST, True, 0)


def test_a_claim_begins_a_fresh_attempt() -> None:
    told = model.report(running(), job_pb2.Progress(phase="load", done=3), fence=5, now_ns=3_000)
    again = model.claim(model.requeue(told, "worker lost", now_ns=4_000), fence=6, now_ns=5_000)
    assert (again.job.attempt, again.fence, again.job.progress.done) == (2, 6, 0)


def test_a_token_that_is_not_newer_claims_nothing() -> None:
    queued = model.requeue(running(fence=5), "worker lost", now_ns=3_000)
    assert list(queued.job.progress.alerts) == ["attempt 1 ended: worker lost"]
    with pytest.raises(LeaseLost):
        model.claim(queued, fence=5, now_ns=4_000)


@pytest.mark.parametrize("fence", [4, 6])
def test_another_token_changes_nothing(fence: int) -> None:
    """R-121: the holder of an old lease cannot write, in whatever state the job is."""
    for change in (
        lambda: model.report(running(), job_pb2.Progress(), fence=fence, now_ns=3_000),
        lambda: model.succeed(running(), DIGEST, fence=fence, now_ns=3_000),
        lambda: model.fail(running(), failure(), fence=fence, now_ns=3_000),
        lambda: model.requeue(running(), "why", fence=fence, now_ns=3_000),
        lambda: model.stop(running(), fence=fence, now_ns=3_000),
    ):
        with pytest.raises(LeaseLost):
            change()


def test_the_old_holder_is_refused_while_the_job_waits_for_the_next() -> None:
    queued = model.requeue(running(fence=5), "worker lost", now_ns=3_000)
    with pytest.raises(LeaseLost):
        model.succeed(queued, DIGEST, fence=5, now_ns=4_000)


def test_progress_never_goes_back_within_a_phase() -> None:
    told = model.report(running(), job_pb2.Progress(phase="load", done=7, total=9), fence=5, now_ns=3_000)
    again = model.report(told, job_pb2.Progress(phase="load", done=2, total=9), fence=5, now_ns=4_000)
    assert again.job.progress.done == 7


def test_another_phase_counts_from_its_own_start() -> None:
    told = model.report(running(), job_pb2.Progress(phase="load", done=7), fence=5, now_ns=3_000)
    assert model.report(told, job_pb2.Progress(phase="run", done=0), fence=5, now_ns=4_000).job.progress.done == 0


def test_time_in_a_record_never_runs_backwards() -> None:
    late = model.claim(record(), fence=5, now_ns=1_000_000)
    told = model.report(late, job_pb2.Progress(phase="p"), fence=5, now_ns=10)
    assert told.job.update_time.ToNanoseconds() > late.job.update_time.ToNanoseconds()


def test_an_attempt_that_is_handed_back_is_not_spent() -> None:
    back = model.requeue(running(), "worker shut down", now_ns=3_000, is_counted=False)
    assert not back.job.progress.alerts
    assert back.job.attempt == 0


def test_history_is_bounded_and_keeps_the_newest() -> None:
    present = record()
    for fence in range(1, limits.JOB_HISTORY_MAX + 4):
        present = model.requeue(model.claim(present, fence=fence, now_ns=0), f"why {fence}", now_ns=0)
    assert len(present.history) == limits.JOB_HISTORY_MAX
    assert present.history[-1].endswith(f"why {limits.JOB_HISTORY_MAX + 3}")


def test_only_used_up_work_is_dead() -> None:
    assert model.is_dead(model.fail(running(), failure(), now_ns=3_000, is_dead=True))
    assert not model.is_dead(model.fail(running(), failure(), now_ns=3_000))
    assert not model.is_dead(running())


class RecordMachine(RuleBasedStateMachine):
    """Any order of legal and illegal changes by old and new holders keeps the record's promises."""

    def __init__(self) -> None:
        super().__init__()
        self.present = record()
        self.fence = 0
        self.final: bytes = b""
        self.clock = 1_000

    def _try(self, change: object) -> None:
        self.clock += 1
        try:
            self.present = change()  # type: ignore[operator]
        except (IllegalTransition, LeaseLost):
            return

    @rule(step=st.integers(-1, 3))
    def claim(self, step: int) -> None:
        self._try(lambda: model.claim(self.present, fence=self.present.fence + step, now_ns=self.clock))

    @rule(age=st.integers(0, 2), done=st.integers(0, 9), phase=st.sampled_from(["a", "b"]))
    def report(self, age: int, done: int, phase: str) -> None:
        before = self.present
        progress = job_pb2.Progress(phase=phase, done=done)
        self._try(lambda: model.report(before, progress, fence=before.fence - age, now_ns=self.clock))
        if before.job.progress.phase == phase:
            assert self.present.job.progress.done >= before.job.progress.done

    @rule(age=st.integers(0, 2))
    def succeed(self, age: int) -> None:
        before = self.present
        self._try(lambda: model.succeed(before, DIGEST, fence=before.fence - age, now_ns=self.clock))
        if age:
            assert self.present is before

    @rule(by_sweeper=st.booleans(), is_dead=st.booleans())
    def fail(self, by_sweeper: bool, is_dead: bool) -> None:
        fence = None if by_sweeper else self.present.fence
        self._try(lambda: model.fail(self.present, failure(), now_ns=self.clock, fence=fence, is_dead=is_dead))

    @rule(by_sweeper=st.booleans(), is_counted=st.booleans())
    def requeue(self, by_sweeper: bool, is_counted: bool) -> None:
        fence = None if by_sweeper else self.present.fence
        self._try(lambda: model.requeue(self.present, "w", now_ns=self.clock, fence=fence, is_counted=is_counted))

    @rule()
    def cancel(self) -> None:
        self._try(lambda: model.cancel(self.present, now_ns=self.clock))

    @rule()
    def stop(self) -> None:
        self._try(lambda: model.stop(self.present, now_ns=self.clock))

    @precondition(lambda self: self.present.job.state in model.FINAL)
    @rule()
    def remember_the_end(self) -> None:
        self.final = self.final or self.present.SerializeToString(deterministic=True)

    @invariant()
    def what_is_over_stays_over(self) -> None:
        if self.final:
            assert self.present.SerializeToString(deterministic=True) == self.final

    @invariant()
    def tokens_and_times_only_grow(self) -> None:
        assert self.present.fence >= self.fence
        self.fence = self.present.fence
        assert self.present.job.attempt >= 0

    @invariant()
    def a_result_means_success_and_an_error_means_failure(self) -> None:
        job = self.present.job
        assert bool(job.result_digest) == (job.state == model.SUCCEEDED)
        assert job.HasField("error") == (job.state == model.FAILED)


TestRecordMachine = RecordMachine.TestCase


def test_restored_work_waits_for_a_worker_of_the_new_platform_whose_tokens_are_small() -> None:
    """R-120: nobody holds the old lease any more, and the new platform counts its tokens from 1."""
    revived = model.revive(running(fence=5_000), now_ns=3_000)
    assert (revived.job.state, revived.job.attempt, revived.fence) == (model.QUEUED, 0, 0)
    assert model.claim(revived, fence=1, now_ns=4_000).job.state == model.RUNNING
    leaving = model.revive(model.cancel(running(), now_ns=3_000), now_ns=4_000)
    assert leaving.job.state == model.CANCELLED
    ended = model.succeed(running(), DIGEST, fence=5, now_ns=3_000)
    assert model.revive(ended, now_ns=9_000).job == ended.job
