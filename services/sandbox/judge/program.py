"""Runs a test program against a candidate: which names it sees, in which order, and what its end means.

A free name of the tests is resolved (1) by what the tests bind, (2) by the preamble, (3) by the names the candidate may
provide, (4) by the judge's own builtins and a fixed list of standard modules. A candidate that redefines `all`, `math`
or `check` changes nothing outside its own process.
"""

from __future__ import annotations

import functools
import importlib
import random
import sys
import types
from collections.abc import Callable
from typing import Any, Final

from services.sandbox.judge.calls_form import run_calls
from services.sandbox.judge.outcome import Failed, Refused
from services.sandbox.judge.remote import Remote, candidate_detail
from services.sandbox.judge.unittest_form import run_unittest

IMPLICIT_MODULES: Final = frozenset(
    (
        "bisect",
        "cmath",
        "collections",
        "copy",
        "datetime",
        "decimal",
        "fractions",
        "functools",
        "heapq",
        "itertools",
        "json",
        "math",
        "operator",
        "os",
        "random",
        "re",
        "statistics",
        "string",
        "sys",
        "time",
        "typing",
    )
)
_CACHED_PROGRAMS: Final = 16
_NO_EXCEPTION: Final = ("catching classes that do not inherit", "must be an exception type")
_OWN_EXCEPTION: Final = (
    "; an exception class of the candidate's own stays in its process: name a builtin base of it, or write the tests as"
    " `unittest` and ask for the mode `inside`"
)


def run_program(job: dict[str, Any], remote: Remote) -> None:
    """Returns when the tests ran to their end with at least one call; Failed or Refused otherwise."""
    sources = {**job, "tests": ""} if job["form"] == "calls" else job
    preamble, setup, tests = (_compiled(sources[part], part) for part in ("preamble", "setup", "tests"))
    names = list(dict.fromkeys([*([job["entry_point"]] if job["entry_point"] else []), *job["exports"]]))
    if job["form"] != "calls":  # data draws nothing
        random.seed(job["seed"])
    namespace: dict[str, Any] = {"__name__": "tests"}
    _guarded(lambda: exec(preamble, namespace), "preamble")
    try:
        provided = remote.load(names)
        namespace = {**_implicit_modules(preamble, setup, tests), **provided, **namespace}
        exec(setup, namespace)
        exec(tests, namespace)
        _FORMS[job["form"]](job, remote, namespace, provided.get(job["entry_point"]))
    except BaseException as error:
        raise _failure(error) from None
    if remote.calls == 0:
        raise Failed("wrong", f"the tests ended without one call to the candidate{_hint(job['form'], namespace)}")


def _hint(form: str, namespace: dict[str, Any]) -> str:
    """What may be behind tests that call nothing: that they are written in another form."""
    if form == "asserts" and callable(namespace.get("check")):
        return "; they define check: is their form `check`?"
    if form == "asserts" and any(
        isinstance(value, type) and hasattr(value, "assertEqual") for value in namespace.values()
    ):
        return "; they define test cases: is their form `unittest`?"
    return ""


def _run_check(job: dict[str, Any], remote: Remote, namespace: dict[str, Any], candidate: Any) -> None:
    check = namespace.get("check")
    if not callable(check):
        raise Refused("the tests define no check(candidate)")
    check(candidate)


_FORMS: Final[dict[str, Callable[[dict[str, Any], Remote, dict[str, Any], Any], None]]] = {
    "check": _run_check,
    "asserts": lambda job, remote, namespace, candidate: None,
    "unittest": lambda job, remote, namespace, candidate: run_unittest(namespace),
    "calls": lambda job, remote, namespace, candidate: run_calls(job["tests"], remote, candidate, job["tolerance"]),
}


def _failure(error: BaseException) -> Exception:
    """What an exception that ended the tests means: the candidate's own is `exception`, the test's is `wrong`."""
    if isinstance(error, (Failed, Refused)):
        return error
    detail = candidate_detail(error)
    if detail is not None:
        return Failed("exception", detail)
    text = error.args[0] if error.args and type(error.args[0]) is str else ""
    words = f"{type(error).__name__} in the tests, line {_line_of(error)}: {text}".rstrip(": ")
    names_own = isinstance(error, TypeError) and any(part in text for part in _NO_EXCEPTION)
    return Failed("wrong", words + _OWN_EXCEPTION if names_own else words)


def _line_of(error: BaseException) -> int:
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


@functools.lru_cache(maxsize=_CACHED_PROGRAMS)
def _compiled(source: str, name: str) -> types.CodeType:
    try:
        return compile(source, f"<{name}>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused(f"{name} does not compile: {type(error).__name__}: {error}") from error


def _guarded(work: Callable[[], None], name: str) -> None:
    try:
        work()
    except Exception as error:
        raise Refused(f"{name} fails: {type(error).__name__}: {error}") from error


def _implicit_modules(*programs: types.CodeType) -> dict[str, Any]:
    used = {name for program in programs for name in _names_in(program)}
    return {name: sys.modules.get(name) or importlib.import_module(name) for name in sorted(used & IMPLICIT_MODULES)}


def _names_in(code: types.CodeType) -> set[str]:
    nested = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*(_names_in(inner) for inner in nested))
