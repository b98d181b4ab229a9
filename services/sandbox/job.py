"""One thing to run: what the service hands to a supervisor, already checked."""

from __future__ import annotations

import dataclasses
import functools
import marshal
from typing import Final

from services.sandbox.policy import Limits

PROGRAM_FORMS: Final = ("program", "stdio")
"""Forms that run the code as a program, without a judge."""
_CACHED_LIMITS: Final = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A candidate and its tests, or a program and its input."""

    code: bytes
    """The program, unchanged."""
    form: str = "asserts"
    """`check`, `asserts`, `unittest`, `calls`, `stdio`, or `program` for an outcome without comparison."""
    mode: str = "split"
    """`inside` when the tests run in the candidate's own process; means nothing for programs."""
    profile: str = "bare"
    """Which interpreter: a name of the slot's candidate jails."""
    tests: str = ""
    preamble: str = ""
    """Trusted text that runs in the judge first."""
    setup: str = ""
    """Runs in the judge after the candidate is loaded."""
    entry_point: str = ""
    """The function given to `check`."""
    exports: tuple[str, ...] = ()
    """Names that the candidate may provide."""
    stdin: bytes = b""
    expected_stdout: bytes = b""
    is_exact: bool = False
    """Whether output is compared byte by byte instead of token by token."""
    tolerance: float = 0.0
    """Of floats in the form `calls`, absolute and relative."""
    seed: str = ""
    """Of `random` in the judge; a candidate starts with the same state in every run."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    judge_key: str = ""
    """Jobs of one key may share a judge process; empty for one of its own."""

    @property
    def is_program(self) -> bool:
        """Whether the code runs as `__main__` instead of answering calls."""
        return self.form in PROGRAM_FORMS

    @property
    def is_inside(self) -> bool:
        """Whether the tests run in the candidate's own process."""
        return self.mode == "inside" and not self.is_program

    @property
    def names(self) -> list[str]:
        """The names that the candidate must define."""
        entry = [self.entry_point] if self.entry_point else []
        return list(dict.fromkeys([*entry, *self.exports]))


def to_wire(job: Job) -> bytes:
    """The job marshalled: our own bytes, for a process of ours."""
    return marshal.dumps({**vars(job), "limits": tuple(vars(job.limits).items())})


def from_wire(body: bytes) -> Job:
    """The inverse of `to_wire`."""
    fields = marshal.loads(body)
    return Job(**{**fields, "limits": _limits(fields["limits"])})


@functools.lru_cache(maxsize=_CACHED_LIMITS)
def _limits(items: tuple[tuple[str, float], ...]) -> Limits:
    return Limits(**dict(items))  # type: ignore[arg-type]
