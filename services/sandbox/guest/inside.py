"""Runs unittest cases in the candidate's own process, one at a time and only when the judge asks for it.

Every reference used here is taken before the candidate loads, and before each test it is checked that unittest and the
builtins are what they were. All of that raises the cost of a forged pass; nothing of it proves one. A candidate that
rewrites the interpreter's memory is not stopped.
"""

from __future__ import annotations

import builtins
import importlib
import random
import sys
import time
import types
from collections.abc import Callable
from typing import Final, NoReturn

from services.sandbox.guest.calls import TEXT_MAX_CHARS, describe_exception
from services.sandbox.wire.frames import Channel

CANDIDATE_FILE: Final = "candidate.py"
_REFUSED_EVENTS: Final = frozenset(
    (
        "gc.get_objects",
        "gc.get_referrers",
        "gc.get_referents",
        "sys._getframe",
        "sys._current_frames",
        "sys.settrace",
        "sys.setprofile",
        "sys.addaudithook",
        "ctypes.dlopen",
        "ctypes.string_at",
        "ctypes.addressof",
        "ctypes.cdata",
    )
)
"""What lets code walk from itself to the tests, or into the interpreter's memory; refused to the candidate's file."""
_BETWEEN: Final = "/ctypes/__init__.py"
"""Acts for whoever calls it."""
_THREADS_END_S: Final = 1.0

State = frozenset[tuple[str, int, int, int]]


class Inside:
    """Made before the candidate loads; `serve` after it. unittest is imported here and not before, because what a
    zygote has loaded is copied into every candidate."""

    def __init__(self, channel: Channel, module: types.ModuleType) -> None:
        self._send, self._receive = channel.send, channel.receive
        self._module = module
        self._tests = types.ModuleType("tests")
        case, suite, result = (importlib.import_module(f"unittest.{name}") for name in ("case", "suite", "result"))
        self._suite, self._result = suite.TestSuite, result.TestResult
        self._main_thread, self._current_thread = (
            getattr(importlib.import_module("threading"), name) for name in ("main_thread", "current_thread")
        )
        self._watched: list[type | types.ModuleType] = [case, suite, result, builtins]
        for source in (case, suite, result):
            self._watched += [value for value in vars(source).values() if isinstance(value, type)]
        self._usual = [_state(owner) for owner in self._watched]
        _refuse_walks(sys._getframe)

    def serve(self) -> NoReturn:
        """Carries out the judge's requests: `[number, "tests", nonce, ...]` loads them, `[number, "run", ...]` runs
        one."""
        nonce = ""
        while True:
            number, operation, *arguments = self._receive()
            if operation == "tests":
                nonce, *parts = arguments
                outcome, words = self._load(*parts)
            else:
                outcome, words = self._run(*arguments)
            self._send([number, nonce, outcome, words])

    def _load(self, preamble: str, setup: str, tests: str, seed: str, names: list[str]) -> tuple[str, str]:
        """Runs the tests' module with the candidate's `names` in it; what the preamble binds goes first."""
        namespace = self._tests.__dict__
        sys.modules["tests"] = self._tests
        random.seed(seed)
        try:
            exec(compile(preamble, "<preamble>", "exec", dont_inherit=True), namespace)
            provided = {name: self._module.__dict__[name] for name in names if name not in namespace}
            namespace.update(provided)
            exec(compile(setup, "<setup>", "exec", dont_inherit=True), namespace)
            exec(compile(tests, "<tests>", "exec", dont_inherit=True), namespace)
        except BaseException as error:
            return "error", describe_exception(error)
        return "ready", ""

    def _run(self, class_name: str, method: str) -> tuple[str, str]:
        """The outcome of one test, or `tampered`."""
        if reason := self._tampering():
            return "tampered", reason
        result = self._result()
        try:
            self._suite([self._tests.__dict__[class_name](method)]).run(result)
        except BaseException as error:
            return "error", describe_exception(error)
        for outcome, found in (("failed", result.failures), ("error", result.errors)):
            if found:
                return outcome, _exception_line(found[-1][1])[:TEXT_MAX_CHARS]
        is_clean = result.testsRun == 1 and not (
            result.skipped or result.expectedFailures or result.unexpectedSuccesses
        )
        return ("passed", "") if is_clean else ("missing", "the test was skipped, or failed as expected")

    def _tampering(self) -> str:
        """What is no longer as it was before the candidate loaded; empty if nothing."""
        if sys.gettrace() or sys.getprofile():
            return "a trace or profile function is set"
        until = time.monotonic() + _THREADS_END_S
        while len(sys._current_frames()) > 1:
            if time.monotonic() > until:
                return "an extra thread runs"
            time.sleep(0.01)
        if self._current_thread() is not self._main_thread():
            return "the tests left the main thread"
        for owner, usual in zip(self._watched, self._usual, strict=True):
            now = _state(owner)
            changed = usual - now or (isinstance(owner, type) and now - usual)
            if changed:
                return f"{owner.__name__}.{min(changed)[0]} was changed"
        return ""


def _exception_line(trace: str) -> str:
    """The line of a printed traceback that names the exception: the first after the last frame, whatever follows it."""
    lines = trace.rpartition("\n  File ")[2].splitlines()[1:]
    return next((line for line in lines if line[:1] not in ("", " ")), "")


def _state(owner: type | types.ModuleType) -> State:
    """Identity of every entry of `owner` and of the code and defaults of its functions. A module may gain names: some
    packages add builtins of their own; a class may not."""
    return frozenset(
        (name, id(value), id(getattr(value, "__code__", None)), id(getattr(value, "__defaults__", None)))
        for name, value in vars(owner).items()
        if name not in ("_", "__warningregistry__")
    )


def _refuse_walks(frame_of: Callable[[int], types.FrameType]) -> None:
    """Installs an audit hook that refuses what only a forger needs, when the candidate's own file asks for it."""
    is_inside_hook = False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal is_inside_hook
        if is_inside_hook or event not in _REFUSED_EVENTS:
            return
        is_inside_hook = True
        try:
            frame = frame_of(1)
            while frame.f_code.co_filename.endswith(_BETWEEN) and frame.f_back:
                frame = frame.f_back
        finally:
            is_inside_hook = False
        if frame.f_code.co_filename == CANDIDATE_FILE:
            raise PermissionError(f"{event} is refused where the tests run in the same process")

    sys.addaudithook(hook)
