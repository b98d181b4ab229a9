"""SIGKILL of any process in the middle of an evaluation: the job ends with the same score, or fails with a reason."""

from __future__ import annotations

import pytest

from gateway import stack
from tests.e2e.conftest import BASIC, Smelt

LIMIT = 24
# One completion at a time: what shares a batch changes the last bits of a logit, and a restart changes what shares it.
EVAL = ("eval", "--suite", "basic", "--data", str(BASIC), "--limit", str(LIMIT), "--concurrency", "1", "ore-11m:q8_0")


def start(smelt: Smelt, seed: int) -> str:
    """A fresh evaluation (its seed makes it another request), caught while it generates."""
    job = smelt(*EVAL, "--seed", str(seed), "--no-wait")
    smelt.wait_until(job["id"], lambda now: now.progress.phase == "generate" and now.progress.done > 2)
    return str(job["id"])


@pytest.fixture(scope="module")
def unbroken(smelt: Smelt) -> dict[str, int]:
    """Verdicts of the run that nobody disturbs."""
    report = smelt(*EVAL)
    assert report["provenance"]["provenance"]["is_batch_variant"] is False
    assert report["scores"][0]["passed"] >= LIMIT // 2, "the model card says 139 of 200"
    verdicts: dict[str, int] = report["verdicts"]
    return verdicts


@pytest.mark.parametrize("name", ["evaluator", "inference", "sandbox", "nats", "s3"])
def test_killed_process_that_comes_back_changes_no_score(smelt: Smelt, unbroken: dict[str, int], name: str) -> None:
    """R-120, R-121: after the restart the same job ends with the same verdicts, nothing twice, nothing lost."""
    job_id = start(smelt, seed=1 + ["evaluator", "inference", "sandbox", "nats", "s3"].index(name))
    smelt.kill(name)
    smelt("up")
    job = smelt("jobs", "watch", job_id)
    assert job["state"] == "succeeded", job["error"]
    report = smelt("report", job["result_digest"])
    assert report["verdicts"] == unbroken
    assert sum(report["verdicts"].values()) == LIMIT


def test_worker_that_never_comes_back_is_a_reason_not_a_running_job(smelt: Smelt) -> None:
    """R-120: without its only worker the job fails with NO_WORKER; it is never "running" for ever."""
    job_id = start(smelt, seed=99)
    smelt.kill("evaluator")
    done = smelt.run("jobs", "watch", job_id, "--json")
    smelt("up")
    assert done.returncode == 1
    assert smelt("jobs", "get", job_id)["error"]["reason"] == "NO_WORKER"


def test_platform_without_nats_answers_with_a_reason(smelt: Smelt) -> None:
    """A command learns that the bus is away, with the exit code for "try later"."""
    gateway = stack.status(smelt.home).gateway_grpc
    smelt.kill("nats")
    done = smelt.run("models", SMELT_GATEWAY=gateway)
    smelt("up")
    assert done.returncode == 5 and "BUS_UNAVAILABLE" in done.stderr
    assert stack.status(smelt.home).is_up
