"""The least that runs a HumanEval program apart from the caller: a forked process, one exec, a pipe for the result.

No jail, no limits but a timer. What an executor costs that protects nothing.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

_FORK = multiprocessing.get_context("fork")


def check_correctness(problem: dict[str, Any], completion: str, timeout_s: float) -> dict[str, Any]:
    """Whether the completion passes: the process's own word."""
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_run, args=(problem, completion, theirs))
    process.start()
    theirs.close()
    process.join(timeout_s)
    process.kill()
    process.join()
    return {"passed": bool(ours.poll() and ours.recv() == "passed")}


def _run(problem: dict[str, Any], completion: str, result: Any) -> None:
    program = f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"
    try:
        exec(program, {})
        result.send("passed")
    except BaseException as error:
        result.send(f"failed: {error}")
