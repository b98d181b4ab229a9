"""Verdicts: what a candidate earned, decided from evidence that it cannot write.

`decide` takes the first line that applies, in the order of the documented table. Exit status and output are evidence of
failure only: nothing made in the candidate's process is ever by itself a pass.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import signal
from collections.abc import Iterator
from typing import Any, Final

from services.sandbox.policy import DETAIL_MAX_CHARS, Limits


class Verdict(enum.StrEnum):
    """What is decided about a candidate."""

    PASSED = "passed"
    WRONG = "wrong"
    EXCEPTION = "exception"
    SYNTAX = "syntax"
    TIMEOUT_CPU = "timeout-cpu"
    TIMEOUT_WALL = "timeout-wall"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output-limit"
    FORBIDDEN = "forbidden"
    NO_CODE = "no-code"
    INFRA = "infra"


class Stop(enum.StrEnum):
    """Why the supervisor ended a run."""

    OUTPUT = "output"
    CPU = "cpu"
    WALL = "wall"
    MEMORY = "memory"
    JUDGE_CPU = "judge-cpu"
    CANCELLED = "cancelled"


@dataclasses.dataclass(kw_only=True)
class Evidence:
    """All that a verdict rests on."""

    limits: Limits
    said: str = ""
    """What the judge, or the supervisor's comparison, found: a verdict, `lost` (the candidate ended), or nothing."""
    detail: str = ""
    """Its words."""
    stop: Stop | None = None
    status: int = 0
    """Wait status of the candidate's first process."""
    cpu_s: float = 0.0
    output_bytes: int = 0
    was_oom_killed: bool = False
    judge_died: bool = False
    calls: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A run whose verdict was not kept."""

    verdict: Verdict
    detail: str = ""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    waited_share: float = 0.0


@dataclasses.dataclass(kw_only=True)
class Record:
    """A verdict and what was measured; the fields of the wire contract's Record, plus both streams' heads as bytes."""

    verdict: Verdict
    detail: str = ""
    mode: str = "split"
    level: str = ""
    missing_layers: list[str] = dataclasses.field(default_factory=list)
    calls: int | None = None
    """Calls that crossed to the candidate; None where nobody counted them."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    judge_s: float = 0.0
    peak_bytes: int = 0
    stdout: bytes = b""
    stderr: bytes = b""
    output_bytes: int = 0
    exit_status: int | None = None
    signal: int = 0
    waited_share: float = 0.0
    """Share of the wall time that the candidate spent runnable but without a core; not taken of runs below 50 ms."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    load: float = 0.0
    """The machine's load average when the run began."""
    earlier: list[Attempt] = dataclasses.field(default_factory=list)
    """Runs before this one, in order."""
    judge_digest: str = ""
    profile_digest: str = ""
    refusal: str = ""
    """Why the tests themselves cannot be used; then there is no verdict."""

    @property
    def attempts(self) -> int:
        """Runs made for this verdict."""
        return len(self.earlier) + 1

    def after(self, before: Record) -> Record:
        """This record, with `before` and what came before that as its earlier runs."""
        last = Attempt(**{field.name: getattr(before, field.name) for field in dataclasses.fields(Attempt)})
        return dataclasses.replace(self, earlier=[*before.earlier, last, *self.earlier])


def decide(evidence: Evidence) -> tuple[Verdict, str]:
    """The verdict and one bounded line that says why."""
    for applies, verdict, words in _lines(evidence):
        if applies:
            return verdict, escaped(words)
    words = evidence.detail or ("the judge ended without a verdict" if evidence.judge_died else "no outcome")
    return Verdict.INFRA, escaped(words)


def _lines(evidence: Evidence) -> Iterator[tuple[bool, Verdict, str]]:
    """The documented table: whether a line applies, its verdict, and its words."""
    limits, said, detail = evidence.limits, evidence.said, evidence.detail
    signal_number = os.WTERMSIG(evidence.status) if os.WIFSIGNALED(evidence.status) else 0
    cpu_is_spent = evidence.stop is Stop.CPU or evidence.cpu_s >= limits.cpu_s
    is_over = evidence.output_bytes > limits.output_bytes
    yield evidence.stop is Stop.CANCELLED, Verdict.INFRA, "cancelled"
    yield said == Verdict.NO_CODE, Verdict.NO_CODE, detail
    yield said == Verdict.OUTPUT_LIMIT, Verdict.OUTPUT_LIMIT, detail
    yield is_over, Verdict.OUTPUT_LIMIT, f"more than {limits.output_bytes} bytes written"
    yield said == Verdict.PASSED, Verdict.PASSED, detail
    yield evidence.was_oom_killed, Verdict.MEMORY, f"more than {limits.memory_bytes} bytes of memory"
    yield evidence.stop is Stop.MEMORY, Verdict.MEMORY, f"more than {limits.memory_bytes} bytes of memory"
    yield said == Verdict.MEMORY, Verdict.MEMORY, detail or "MemoryError"
    yield signal_number == signal.SIGSYS, Verdict.FORBIDDEN, "forbidden system call"
    yield said == Verdict.FORBIDDEN, Verdict.FORBIDDEN, detail
    yield cpu_is_spent, Verdict.TIMEOUT_CPU, f"{limits.cpu_s:g} s of CPU used up"
    yield evidence.stop is Stop.JUDGE_CPU, Verdict.TIMEOUT_CPU, "CPU used up on the candidate's values"
    yield evidence.stop is Stop.WALL, Verdict.TIMEOUT_WALL, f"{limits.wall_s:g} s passed"
    yield said in _PLAIN, Verdict(said) if said in _PLAIN else Verdict.WRONG, detail
    yield said == "lost", Verdict.EXCEPTION, _ending(evidence.status)


_PLAIN: Final = frozenset((Verdict.SYNTAX, Verdict.EXCEPTION, Verdict.WRONG))


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"ended by signal {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with status {os.WEXITSTATUS(status)} while the tests ran"


def escaped(text: str) -> str:
    """`text` in one bounded line of printable characters."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return plain[:DETAIL_MAX_CHARS]


_STREAMS: Final = ("stdout", "stderr")


def to_wire(record: Record) -> dict[str, Any]:
    """What differs from an empty record, as JSON for the supervisor's socket; bytes as latin-1 text. Who asked knows
    the limits."""
    fields = {name: value for name, value in vars(record).items() if value}
    del fields["limits"]
    for name in _STREAMS:
        if name in fields:
            fields[name] = fields[name].decode("latin-1")
    if record.earlier:
        fields["earlier"] = [vars(attempt) for attempt in record.earlier]
    return {**fields, "exit_status": record.exit_status, "calls": record.calls}


def from_wire(fields: dict[str, Any], limits: Limits) -> Record:
    """The inverse of `to_wire`, of a run within `limits`."""
    found = dict(fields)
    found["verdict"], found["limits"] = Verdict(fields["verdict"]), limits
    found["earlier"] = [Attempt(**{**run, "verdict": Verdict(run["verdict"])}) for run in fields.get("earlier", ())]
    for name in _STREAMS:
        if name in fields:
            found[name] = fields[name].encode("latin-1")
    return Record(**found)
