"""Wire messages to jobs and records to wire messages."""

from __future__ import annotations

import functools
from typing import Any, Final

from smelt.sandbox.v1 import sandbox_pb2 as pb

from services.sandbox.admission import admit
from services.sandbox.doctor import Isolation
from services.sandbox.job import Job
from services.sandbox.policy import HEAD_MAX_BYTES, Limits
from services.sandbox.profiles import Profile, choose_profile
from services.sandbox.verdict import Attempt, Record
from smeltkit.errors import BadCode, SmeltError

_FORMS: Final = {
    pb.FORM_CHECK: "check",
    pb.FORM_ASSERTS: "asserts",
    pb.FORM_UNITTEST: "unittest",
    pb.FORM_STDIO: "stdio",
    pb.FORM_CALLS: "calls",
}
_MODES: Final = {
    pb.MODE_UNSPECIFIED: "",
    pb.MODE_SPLIT: "split",
    pb.MODE_INSIDE: "inside",
    pb.MODE_STDIO: "stdio",
}
_MODE_NUMBERS: Final = {name: number for number, name in _MODES.items()}
_CACHED_LIMITS: Final = 64
_LIMITS: Final = ("cpu_s", "wall_s", "memory_bytes", "pids", "output_bytes", "tmp_bytes")


def to_judge_job(candidate: pb.Candidate, judge_key: str, profiles: dict[str, Profile]) -> Job:
    """The checked job behind `candidate`; BadCode, UnsupportedOption. Jobs of one `judge_key` may share a judge."""
    if candidate.form not in _FORMS:
        raise BadCode(f"form is not set; choose one of {', '.join(_FORMS.values())}")
    job = Job(
        code=candidate.code,
        form=_form(candidate),
        tests=candidate.tests,
        preamble=candidate.preamble,
        setup=candidate.setup,
        entry_point=candidate.entry_point,
        exports=tuple(candidate.exports),
        stdin=candidate.stdin,
        expected_stdout=candidate.expected_stdout,
        is_exact=candidate.compare == pb.COMPARE_EXACT,
        tolerance=candidate.tolerance,
        seed=candidate.seed,
        limits=to_limits(candidate.limits),
        judge_key=judge_key,
    )
    return admit(job, _MODES.get(candidate.mode, "?"), choose_profile(profiles, candidate.profile))


def _form(candidate: pb.Candidate) -> str:
    """A program whose output nobody compares is one without tests."""
    if candidate.form == pb.FORM_STDIO and candidate.compare == pb.COMPARE_NONE:
        return "program"
    return _FORMS[candidate.form]


def to_program_job(request: pb.ExecuteRequest, profiles: dict[str, Profile]) -> Job:
    """The checked job of a program without tests; BadCode, UnsupportedOption."""
    job = Job(code=request.code, form="program", stdin=request.stdin, limits=to_limits(request.limits))
    return admit(job, profile=choose_profile(profiles, request.profile))


def to_limits(message: pb.Limits) -> Limits:
    """Bounds with defaults for what is unset; BadCode outside the ranges."""
    return _limits(tuple((field.name, value) for field, value in message.ListFields()))


@functools.lru_cache(maxsize=_CACHED_LIMITS)
def _limits(given: tuple[tuple[str, float], ...]) -> Limits:
    return Limits.from_request(dict(given))


@functools.lru_cache(maxsize=_CACHED_LIMITS)
def from_limits(limits: Limits) -> pb.Limits:
    """The bounds as a message, every field set."""
    return pb.Limits(**{name: getattr(limits, name) for name in _LIMITS})


def from_record(record: Record) -> pb.Record:
    """The record as a message; streams are decoded with replacement, heads only."""
    message = pb.Record(
        verdict=pb.Verdict.Value(f"VERDICT_{record.verdict.name}"),
        detail=record.detail,
        mode=_MODE_NUMBERS[record.mode],
        level=record.level,
        missing_layers=record.missing_layers,
        calls=record.calls or 0,
        is_uncounted=record.calls is None,
        cpu_s=record.cpu_s,
        wall_s=record.wall_s,
        judge_s=record.judge_s,
        peak_bytes=record.peak_bytes,
        stdout_head=_text(record.stdout),
        stderr_head=_text(record.stderr),
        output_bytes=record.output_bytes,
        signal=record.signal,
        limits=from_limits(record.limits),
        attempts=record.attempts,
        waited_share=record.waited_share,
        load=record.load,
        earlier=[_from_attempt(attempt) for attempt in record.earlier],
        judge_digest=record.judge_digest,
        profile_digest=record.profile_digest,
    )
    if record.exit_status is not None:
        message.exit_status = record.exit_status
    return message


def from_error(error: SmeltError) -> pb.Refusal:
    """What a failed call would have said, about one candidate of a batch."""
    return pb.Refusal(reason=error.reason(), message=error.message, details=error.details)


def from_batch_records(first: pb.BatchRecord, more: list[pb.BatchRecord]) -> pb.JudgeBatchResponse:
    """One answer of a batch."""
    refusal = first.refusal if first.HasField("refusal") else None
    record = None if refusal else first.record
    return pb.JudgeBatchResponse(id=first.id, record=record, refusal=refusal, more=more)


def _from_attempt(attempt: Attempt) -> pb.Attempt:
    return pb.Attempt(
        verdict=pb.Verdict.Value(f"VERDICT_{attempt.verdict.name}"),
        detail=attempt.detail,
        cpu_s=attempt.cpu_s,
        wall_s=attempt.wall_s,
        waited_share=attempt.waited_share,
    )


def to_layers(isolation: Isolation) -> list[pb.Layer]:
    """Every probed layer as a message."""
    return [
        pb.Layer(name=layer.name, is_present=layer.is_present, error=layer.error, remedy=layer.remedy)
        for layer in isolation.layers
    ]


def from_record_and_streams(record: Record) -> dict[str, Any]:
    """Fields of ExecuteResponse."""
    return {"record": from_record(record), "stdout": record.stdout, "stderr": record.stderr}


def _text(raw: bytes) -> str:
    return raw[:HEAD_MAX_BYTES].decode("utf-8", "replace")
