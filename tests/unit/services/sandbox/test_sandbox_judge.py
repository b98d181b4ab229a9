"""Test programs in the judge against a candidate behind a channel: names, changes, handles, exceptions, ends.

Both sides run here in one process, each on its own thread, over a real socket pair.
"""

from __future__ import annotations

import os
import socket
import threading
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from services.sandbox.guest.calls import Guest
from services.sandbox.judge.outcome import Failed, Refused
from services.sandbox.judge.program import run_program
from services.sandbox.judge.remote import Remote
from services.sandbox.wire.frames import Channel, ChannelClosed

BOUNDS = {"frame_max_bytes": 1 << 20, "total_max_bytes": 1 << 24}


class Ended(BaseException):
    """Stands for the end of the judge process."""


def judged(code: str, tests: str, exports: str = "f", **fields: Any) -> tuple[str, str, int]:
    """Verdict, detail and calls of `tests` on `code`."""
    ours, theirs = socket.socketpair()
    guest = threading.Thread(target=_serve, args=(theirs, code, exports.split()), daemon=True)
    guest.start()
    said: list[tuple[str, str]] = []

    def end(verdict: str, detail: str) -> NoReturn:
        said.append((verdict, detail))
        raise Ended

    remote = Remote(Channel(ours.fileno(), **BOUNDS), end)
    job = {
        "form": "asserts",
        "tolerance": 0.0,
        "tests": tests,
        "preamble": "",
        "setup": "",
        "entry_point": "",
        "seed": "s",
    }
    try:
        run_program({**job, "exports": exports.split(), **fields}, remote)
        outcome = ("passed", "")
    except Failed as failure:
        outcome = failure.verdict, failure.detail
    finally:
        ours.close()
        guest.join(10)
    return (*(said[0] if said else outcome), remote.calls)


def _serve(end: socket.socket, code: str, names: list[str]) -> None:
    channel = Channel(end.fileno(), **BOUNDS)
    guest, module = Guest(channel), types.ModuleType("candidate")

    def load() -> object:
        exec(compile(code, "candidate.py", "exec"), module.__dict__)
        missing = [name for name in names if name not in module.__dict__]
        return [missing, [] if missing else [module.__dict__[name] for name in names]]

    try:
        guest.answer(0, load)
        while True:
            guest.serve(channel.receive())
    except ChannelClosed:
        end.close()


CASES = tomllib.loads(Path(__file__).with_name("crossings.toml").read_text())["case"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_candidate_gets_its_verdict(case: dict[str, str]) -> None:
    """R-082: honest values of every kind cross; the judge's word alone decides, and no test can swallow it."""
    assert judged(case["code"], case["tests"], case.get("exports", "f"))[0] == case["verdict"]


def test_test_binds_before_preamble_before_candidate() -> None:
    """A candidate that redefines the oracle changes nothing; one that redefines a builtin neither."""
    code = "def helper(x): return 99\ndef len(x): return 99\ndef f(x): return x"
    tests = "assert helper(f(1)) == 2 and len([1]) == 1"
    assert judged(code, tests, preamble="def helper(x): return x + 1")[0] == "passed"


def test_exported_builtin_name_is_the_candidates() -> None:
    assert judged("def sum(x): return -1", "assert sum([1]) == -1", "sum")[0] == "passed"


def test_setup_runs_after_the_candidate_is_loaded() -> None:
    code = "class Node:\n    def __init__(self, v): self.v = v\ndef f(n): return n.v"
    assert judged(code, "assert f(root) == 5", "Node f", setup="root = Node(5)")[0] == "passed"


def test_check_form_calls_check_with_the_entry_point() -> None:
    tests = "def check(candidate):\n    assert candidate(2) == 4"
    assert judged("def f(n): return n * 2", tests, form="check", entry_point="f")[0] == "passed"
    assert judged("def f(n): return n", tests, form="check", entry_point="f")[0] == "wrong"


def test_random_of_the_judge_is_seeded() -> None:
    """The same problem draws the same numbers in every run."""
    tests = "assert f(random.random()) == 1\nraise ValueError(str(random.random()))"
    assert judged("def f(x): return 1", tests)[1] == judged("def f(x): return 1", tests)[1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tests": "assert ("}, "tests does not compile"),
        ({"tests": "x = f()", "preamble": "1 / 0"}, "preamble fails"),
        ({"tests": "x = f()", "form": "check"}, "define no check"),
        ({"tests": "x = f()", "form": "unittest"}, "define no unittest"),
    ],
)
def test_unusable_tests_are_refused(fields: dict[str, str], words: str) -> None:
    with pytest.raises(Refused, match=words):
        judged("def f(): return 1", **fields)


@pytest.mark.parametrize(
    "reply",
    [
        [2, "ok", 1, []],
        [1, "ok", 1],
        [1, "stop"],
        [1, "unknown"],
        [1, "raise", "NoSuchError", [], ""],
        [1, "raise", "print", [], ""],
        [1, "raise", ["x"], [], ""],
        [1, "back", 0, [], []],
        [1, "back", "0", [], []],
        [1, "ok", ["cb", 3], []],
        [1, "ok", ["bi", "no such builtin"], []],
        [1, "ok", 1, [["t", 0, 1]]],
        {"verdict": "passed"},
        "passed",
        [],
        [True, "ok", 1, []],
    ],
    ids=str,
)
def test_reply_that_no_honest_candidate_sends_is_forbidden(reply: object) -> None:
    """R-082: malformed, unasked and late frames end the verdict."""
    assert _scripted(lambda channel: channel.send(reply)) == "forbidden"


def test_bytes_that_are_no_frame_are_forbidden() -> None:
    assert _scripted(lambda channel: os.write(channel.descriptor, b"\x00\x00\x00\x03abc")) == "forbidden"


def test_frame_above_its_bound_is_output_limit() -> None:
    assert _scripted(lambda channel: os.write(channel.descriptor, b"\x7f\xff\xff\xff")) == "output-limit"


def _scripted(answer: Callable[[Channel], object]) -> str:
    """The verdict when the first call is answered by `answer`."""
    ours, theirs = socket.socketpair()
    verdicts: list[str] = []

    def end(verdict: str, detail: str) -> NoReturn:
        verdicts.append(verdict)
        raise Ended

    with ours, theirs:
        guest, judge = Channel(theirs.fileno(), **BOUNDS), Channel(ours.fileno(), **BOUNDS)
        guest.send([0, "ok", ["l", 0, ["l", 1], ["l", 2, ["h", 0, "c", "function"]]], []])
        remote = Remote(judge, end)
        call = remote.load(["f"])["f"]
        answer(guest)
        with pytest.raises(Ended):
            call()
    return verdicts[0]


@pytest.mark.parametrize(
    ("code", "calls", "tolerance", "verdict"),
    [
        ("def f(a, b=1): return a + b", "((1,), 2)\n\n([1, 2], 3)\n((1,), {'b': 5}, 6)", 0.0, "passed"),
        ("def f(a): return [a]", "((1,), (1,))", 0.0, "wrong"),
        ("def f(a): return [a]", "((1,), (1,))", 1e-6, "wrong"),
        ("def f(a): return a / 3", "((1,), 0.333333)", 0.0, "wrong"),
        ("def f(a): return {'x': [a / 3, float('inf')]}", "((1,), {'x': [0.3333333, 1e999]})", 1e-6, "passed"),
        ("def f(a): return a / 3 + 1j", "((1,), 0.3333333 + 1j)", 1e-6, "passed"),
        ("def f(a): return [1, 2]", "((1,), [1, 2, 3])", 1e-6, "wrong"),
        ("def f(a): return 10 ** 400", "((1,), 1.0)", 1e-6, "wrong"),
        ("def f(a): a.append(1); return a", "(([],), [1])\n(([],), [1])", 0.0, "passed"),
        ("class E(float):\n    __eq__ = lambda s, o: True\ndef f(a): return E()", "((1,), 2.5)", 1e-6, "wrong"),
        ("f = len", "(([1],), 1)", 0.0, "wrong"),
        ("f = 5", "((), 5)", 0.0, "wrong"),
        ("def f(a): raise KeyError(a)", "((1,), 1)", 0.0, "exception"),
        ("def f(a): raise SystemExit", "((1,), 1)\n((2,), 2)", 0.0, "exception"),
    ],
)
def test_calls_as_data_are_compared_in_the_judge(code: str, calls: str, tolerance: float, verdict: str) -> None:
    """R-082: arguments and expected values are data; a tolerance applies to numbers at any depth."""
    found = judged(code, calls, form="calls", entry_point="f", tolerance=tolerance)
    assert found[0] == verdict, found[1]


def test_first_wrong_call_decides_whatever_later_ones_do() -> None:
    """Calls are sent ahead, but each has its own answer: an end in a later one cannot hide a wrong one before it."""
    code = "def f(n):\n    if n == 3: raise SystemExit\n    return object() if n == 2 else n"
    found = judged(code, "((1,), 1)\n((2,), 2)\n((3,), 3)", form="calls", entry_point="f")
    assert found == ("wrong", "call 2 gives an object instead of 2", 2)


def test_calls_are_sent_ahead_in_frames_of_bounded_size() -> None:
    """Arguments and answers far beyond a socket's buffer cross without a standstill."""
    line = "(('" + "x" * 50_000 + "',), '" + "x" * 100_000 + "')"
    found = judged("def f(text): return text * 2", "\n".join([line] * 40), form="calls", entry_point="f")
    assert (found[0], found[2]) == ("passed", 40)


def test_candidate_may_call_back_while_calls_are_ahead() -> None:
    """A function of the setup that was handed over earlier is called, and may itself ask the candidate."""
    code = "def keep(g):\n    global given\n    given = g\ndef twice(n): return 2 * n\ndef f(n): return given(n) + 1"
    setup = "keep(lambda n: twice(n))"
    fields = {"form": "calls", "entry_point": "f", "setup": setup}
    assert judged(code, "((1,), 3)\n((2,), 5)", "f keep twice", **fields)[0] == "passed"


@pytest.mark.parametrize(
    "replies",
    [[[2, "ok", 1, []], [1, "ok", 1, []]], [[1, "ok", 1, []], [1, "ok", 1, []]], [[1, "ok", 1, []], [3, "ok", 1, []]]],
    ids=str,
)
def test_answers_to_calls_sent_ahead_must_come_in_order(replies: list[object]) -> None:
    """R-082: an answer that is early, repeated or unasked ends the verdict."""
    ours, theirs = socket.socketpair()
    verdicts: list[str] = []

    def end(verdict: str, detail: str) -> NoReturn:
        verdicts.append(verdict)
        raise Ended

    with ours, theirs:
        for reply in replies:
            Channel(theirs.fileno(), **BOUNDS).send(reply)
        with pytest.raises(Ended):
            list(Remote(Channel(ours.fileno(), **BOUNDS), end).call_each(0, [b"", b""]))
    assert verdicts == ["forbidden"]


@pytest.mark.parametrize("line", ["f(1)", "(1,)", "(1, 2)", "((1,), 2, 3)", "__import__('os')"])
def test_line_that_is_no_call_is_refused(line: str) -> None:
    with pytest.raises(Refused, match="line 2"):
        judged("def f(a): return a", f"((1,), 1)\n{line}", form="calls", entry_point="f")


@pytest.mark.parametrize(
    "tests",
    [
        "try:\n    f()\nexcept Own:\n    pass",
        "import unittest\nunittest.TestCase().assertRaises(Own, f)",
        "import unittest\nwith unittest.TestCase().assertRaisesRegex(Own, 'no'): f()",
    ],
)
def test_an_exception_class_of_the_candidates_own_is_told_what_to_do(tests: str) -> None:
    """The class stays in the candidate's process: the test is not right or wrong about it, it asks the wrong way."""
    code = "class Own(ValueError): pass\ndef f(): raise Own('no')"
    verdict, detail, _ = judged(code, tests, "f Own")
    assert verdict == "wrong" and "name a builtin base of it" in detail and "`inside`" in detail
    assert judged(code, tests.replace("Own", "ValueError"), "f")[0] == "passed"
