"""Judges tests that must run in the candidate's own process: asks for them one by one and trusts no single answer.

Names and places of tests, the nonce and which tests must fail are made here, after the candidate is loaded. What this
cannot show is in the verdict: its mode is `inside`.
"""

from __future__ import annotations

import random
from typing import Any, Final

from services.sandbox.judge.canaries import Planned, plan_tests
from services.sandbox.judge.outcome import Failed
from services.sandbox.judge.remote import Remote, candidate_detail

_NONCE_BITS: Final = 128
_FAILURES: Final = {"failed": "wrong", "error": "exception", "tampered": "forbidden", "missing": "forbidden"}


def run_inside(job: dict[str, Any], remote: Remote) -> None:
    """Returns when every test passed and no canary did; Failed or Refused otherwise."""
    chance = random.SystemRandom()
    plan, nonce = plan_tests(job["tests"], chance), f"{chance.getrandbits(_NONCE_BITS):032x}"
    names = list(dict.fromkeys([*([job["entry_point"]] if job["entry_point"] else []), *job["exports"]]))
    try:
        remote.load([])
    except Exception as error:
        raise Failed("exception", candidate_detail(error) or type(error).__name__) from None
    outcome, words = _ask(remote, nonce, "tests", nonce, job["preamble"], job["setup"], plan.source, job["seed"], names)
    if outcome != "ready":
        raise Failed("exception" if outcome == "error" else "forbidden", f"the tests did not load: {words}")
    passed_canaries = 0
    for test in plan.order:
        outcome, words = _ask(remote, nonce, "run", test.class_name, test.method)
        passed_canaries += _counts_as_forged(test, outcome, words)
    if passed_canaries:
        raise Failed("forbidden", f"{passed_canaries} tests that must fail passed")


def _counts_as_forged(test: Planned, outcome: str, words: str) -> bool:
    """Whether a canary passed; Failed if a real test did not, or if the process was tampered with."""
    if outcome == "passed":
        return test.is_canary
    verdict = _FAILURES.get(outcome, "forbidden")
    if verdict == "forbidden" or not test.is_canary:
        raise Failed(verdict, f"{test.class_name}.{test.original}: {words}")
    return False


def _ask(remote: Remote, nonce: str, *request: Any) -> tuple[str, str]:
    """Outcome and words of one request; a wrong nonce ends the verdict."""
    reply = remote.ask_inside(*request)
    if len(reply) != 4 or any(type(part) is not str for part in reply[1:]):
        raise Failed("forbidden", "malformed answer from the tests")
    if reply[1] != nonce:
        raise Failed("forbidden", "an answer without the nonce")
    return reply[2], reply[3]
