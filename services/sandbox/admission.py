"""What is accepted for judging: a request's fields become a checked job, or a typed refusal."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import sys
from typing import Final

from services.sandbox.job import Job
from services.sandbox.policy import CODE_MAX_BYTES, DETAIL_MAX_CHARS, STDIN_MAX_BYTES, TESTS_MAX_BYTES, Level
from services.sandbox.profiles import BARE, OWN_NAMES, Profile
from smeltkit.errors import BadCode, IsolationTooWeak, UnsupportedOption

JUDGED_FORMS: Final = ("check", "asserts", "unittest", "calls")
EXPORTS_MAX: Final = 256
SEED_MAX_CHARS: Final = 1024
_MOCK: Final = "unittest.mock"
_IMPORT_LINE: Final = re.compile(r"^[ \t]*(?:import|from)[ \t]+[^\n]*", re.MULTILINE)
_BARE: Final = Profile(name=BARE)
_CACHED_TESTS: Final = 64


def admit(job: Job, mode: str = "", profile: Profile = _BARE) -> Job:
    """`job` as it will be judged on `profile` in `mode` (empty: outside the candidate wherever its tests allow);
    BadCode, UnsupportedOption. How long a judged candidate is, is its own affair: that has a verdict."""
    for name in ("stdin", "expected_stdout"):
        _check_size(name, len(getattr(job, name)), STDIN_MAX_BYTES)
    for name in ("tests", "preamble", "setup"):
        _check_size(name, len(getattr(job, name).encode("utf-8", "surrogatepass")), TESTS_MAX_BYTES)
    _check_size("seed", len(job.seed), SEED_MAX_CHARS)
    if job.is_program:
        _admit_program(job, mode)
        chosen = job.mode
    else:
        _admit_tests(job)
        chosen = _mode(job, mode, profile)
    if (chosen, profile.name) == (job.mode, job.profile):
        return job
    return dataclasses.replace(job, mode=chosen, profile=profile.name)


def check_level(min_level: str, reached: Level) -> None:
    """IsolationTooWeak if a request asks for more than this service reached."""
    if min_level and Level.named(min_level) > reached:
        raise IsolationTooWeak(
            f"the request needs level {min_level}, this sandbox reaches {reached}; ask for {reached} or run "
            "the service where more is allowed",
            details={"required": min_level, "reached": str(reached)},
        )


def _admit_program(job: Job, mode: str) -> None:
    if job.form == "program":
        _check_size("code", len(job.code), CODE_MAX_BYTES)
    if mode not in ("", "stdio"):
        raise UnsupportedOption(f"mode {mode!r} has no meaning for the form stdio; leave it out or set stdio")
    if job.tests or job.preamble or job.setup or job.entry_point or job.exports or job.tolerance or job.seed:
        raise UnsupportedOption(
            "the form stdio compares output; tests, preamble, setup, entry point, exports, tolerance and seed have no"
            " effect with it; leave them out"
        )
    if job.form == "program" and job.expected_stdout:
        raise UnsupportedOption("expected_stdout has no effect when nothing is compared; choose how to compare")


def _mode(job: Job, mode: str, profile: Profile) -> str:
    """Where the tests run. Inside only if asked for, or if the tests patch the candidate's world or import packages."""
    if mode not in ("", "split", "inside") or (mode == "inside" and job.form != "unittest"):
        raise UnsupportedOption(f"mode {mode!r} is not available for the form {job.form}; leave it out or set split")
    used = (
        frozenset[str]() if job.form == "calls" else imported_modules("\n".join((job.preamble, job.setup, job.tests)))
    )
    packages = {name.partition(".")[0] for name in used} - sys.stdlib_module_names - OWN_NAMES
    if unknown := sorted(name for name in packages if not profile.has(name)):
        raise UnsupportedOption(
            f"the tests import {', '.join(unknown)}, which the profile {profile.name} has not; choose a profile with it"
        )
    if packages and (job.form != "unittest" or mode == "split"):
        raise UnsupportedOption(
            f"tests that import {', '.join(sorted(packages))} run in the candidate's process, which takes the form "
            "unittest and the mode inside"
        )
    return mode or ("inside" if job.form == "unittest" and (packages or _MOCK in used) else "split")


@functools.lru_cache(maxsize=_CACHED_TESTS)
def imported_modules(source: str) -> frozenset[str]:
    """Dotted names of the modules that `source` imports. It is parsed only if a line looks unusual: most tests import
    nothing, or the standard library alone."""
    lines = _IMPORT_LINE.findall(source)
    words = {word for line in lines for word in re.findall(r"[\w.]+", line)} - {"import", "from", "as"}
    if "mock" not in source and all(word.partition(".")[0] in sys.stdlib_module_names for word in words):
        return frozenset(words)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return frozenset(found)


def _admit_tests(job: Job) -> None:
    if job.form not in JUDGED_FORMS:
        raise BadCode(f"form {job.form!r} is unknown; choose one of {', '.join((*JUDGED_FORMS, 'stdio'))}")
    if not job.tests.strip():
        raise BadCode("tests are empty; without tests use Execute")
    if job.form in ("check", "calls") and not job.entry_point:
        raise BadCode(f"the form {job.form} needs an entry_point")
    if not 0 <= job.tolerance < 1:
        raise BadCode(f"tolerance={job.tolerance} is out of range; allowed are 0 (exact) to below 1")
    if job.tolerance and job.form != "calls":
        raise UnsupportedOption(f"tolerance has no effect with the form {job.form}; leave it out")
    if job.seed and job.form == "calls":
        raise UnsupportedOption("seed has no effect with the form calls, whose data draws nothing; leave it out")
    if job.stdin or job.expected_stdout:
        raise UnsupportedOption(f"stdin and expected_stdout have no effect with the form {job.form}")
    names = job.names
    if not 1 <= len(names) <= EXPORTS_MAX:
        raise BadCode(f"entry_point and exports must be 1 to {EXPORTS_MAX} names together; got {len(names)}")
    if wrong := next((name for name in names if not name.isidentifier()), None):
        raise BadCode(f"entry_point and exports are identifiers; {wrong[:DETAIL_MAX_CHARS]!r} is none")


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise BadCode(f"{name} has {size} bytes or characters; at most {limit} are accepted")
