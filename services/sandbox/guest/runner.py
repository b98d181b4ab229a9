"""The candidate's process: loads its code, then answers calls until it is killed; or runs it as a program.

Everything here shares the process with hostile code: nothing it says is believed beyond "an answer to a call".
"""

from __future__ import annotations

import builtins
import gc
import marshal
import os
import sys
import types
from typing import Any, Final, NoReturn

from services.sandbox.guest.calls import Guest, describe_exception
from services.sandbox.guest.inside import CANDIDATE_FILE, Inside
from services.sandbox.jail.seal import set_job_limits
from services.sandbox.jail.spec import CONTROL
from services.sandbox.wire.frames import Channel

JOB_MAX_BYTES: Final = 64 * 1024 * 1024
MARK_EMPTY, MARK_SYNTAX, MARK_LOADED, MARK_MEMORY = b"E", b"S", b"L", b"M"
"""What a program's process says on its channel: the first one comes before any foreign code runs."""
_SITE_NAMES: Final = ("exit", "quit")
"""Builtins that the interpreter's module `site` makes, which is not loaded here, and programs use."""
_NOTHING: Final = compile("", CANDIDATE_FILE, "exec")


def _leave(code: object = None) -> NoReturn:
    raise SystemExit(code)


for _name in _SITE_NAMES:
    setattr(builtins, _name, _leave)


def serve() -> NoReturn:
    """Waits for the job and runs it; ChannelClosed when the supervisor leaves.

    The job alone comes marshalled: our own bytes into a process that nobody trusts, decoded with few touched pages.
    """
    channel = Channel(CONTROL, frame_max_bytes=JOB_MAX_BYTES, total_max_bytes=1 << 62)
    job = marshal.loads(channel.receive_bytes())
    set_job_limits(**job["limits"])
    os.chdir("/tmp")
    if job["is_program"]:
        _run_program(job["code"])
    _answer_calls(channel, job["code"], job["names"], is_inside=job["is_inside"])


def _answer_calls(channel: Channel, source: bytes, names: list[str], *, is_inside: bool) -> NoReturn:
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    guest = Guest(channel)
    inside = Inside(channel, module) if is_inside else None
    try:
        code = compile(source, CANDIDATE_FILE, "exec", dont_inherit=True)
    except Exception as error:
        channel.send([0, "syntax", describe_exception(error)])
    else:
        if _is_empty(code):
            channel.send([0, "empty"])
        else:
            guest.answer(0, lambda: _load(code, module, names, is_inside=is_inside))
    gc.enable()
    if inside:
        inside.serve()
    while True:
        guest.serve(channel.receive())


def _load(code: types.CodeType, module: types.ModuleType, names: list[str], *, is_inside: bool) -> list[object]:
    """Runs the module; what it binds to `names`, or nothing of it if one is missing or all of it stays inside."""
    exec(code, module.__dict__)
    missing = [name for name in names if name not in module.__dict__]
    return [missing, [] if missing or is_inside else [module.__dict__[name] for name in names]]


def _is_empty(code: types.CodeType) -> bool:
    return code.co_code == _NOTHING.co_code and not code.co_names


def _run_program(source: bytes) -> NoReturn:
    """Runs the source as `__main__` with the interpreter's own rules for its exit status."""
    try:
        code = compile(source, "program.py", "exec", dont_inherit=True)
    except Exception as error:
        os.write(CONTROL, MARK_SYNTAX)
        os.write(2, describe_exception(error).encode("utf-8", "replace"))
        os._exit(1)
    os.write(CONTROL, MARK_EMPTY if _is_empty(code) else MARK_LOADED)
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]
    gc.enable()
    status = _status_of(code, main.__dict__)
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        status = status or 120
    os._exit(status)


def _status_of(code: types.CodeType, namespace: dict[str, Any]) -> int:
    try:
        exec(code, namespace)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return int(error.code or 0) & 0xFF
        os.write(2, str(error.code).encode("utf-8", "replace"))
        return 1
    except BaseException as error:
        if isinstance(error, MemoryError):
            os.write(CONTROL, MARK_MEMORY)
        sys.excepthook(type(error), error.with_traceback(error.__traceback__ and error.__traceback__.tb_next), None)
        return 1
    return 0
