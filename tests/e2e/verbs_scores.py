"""What is done with suites, scores and jobs."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import grpc
from smelt.artifact.v1 import artifact_pb2, artifact_pb2_grpc

from gateway import stack
from tests.e2e.conftest import BASIC, Smelt
from tests.e2e.verb_cases import SMALL, SUITE, case


def started(smelt: Smelt) -> str:
    """The id of a fresh evaluation that is under way."""
    seed = str(secrets.randbelow(1 << 30))
    return str(smelt("eval", *SUITE, "--seed", seed, "--concurrency", "1", SMALL, "--no-wait")["id"])


@case("eval")
def eval_(_: Smelt, reports: list[dict[str, Any]], *__: Any) -> None:
    assert [sum(report["verdicts"].values()) for report in reports] == [4, 4]
    assert len({report["digest"] for report in reports}) == 2


@case("judge")
def judge(smelt: Smelt, _: Any, folder: Path) -> None:
    """A right answer and a wrong one."""
    rows = [json.loads(line) for line in BASIC.read_text().splitlines()[:2]]
    texts = (rows[0]["canonical_solution"], "    return None\n")
    lines = (json.dumps({"task_id": row["task_id"], "completion": text}) for row, text in zip(rows, texts, strict=True))
    (folder / "completions.jsonl").write_text("\n".join(lines))
    judged = smelt("judge", *SUITE, "--completions", str(folder / "completions.jsonl"))
    assert (judged["passed"], judged["total"], judged["without_completion"]) == (1, 200, 198)
    assert [entry["passed"] for entry in judged["problems"][:2]] == [True, False]


@case("suites")
def suites(smelt: Smelt, *_: Any) -> None:
    assert {"basic": 200, "humaneval": 164}.items() <= {
        s["name"]: s["problems"] for s in smelt("suites")["suites"]
    }.items()


@case("references")
def references(smelt: Smelt, *_: Any) -> None:
    config = smelt("references", *SUITE)["record"]["config"]
    assert config["passed"] == config["total"] == 200


@case("report")
def report(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    """R-122: the numbers shown are those in the store."""
    shown = smelt("report", reports[0]["digest"], "--samples")
    with grpc.insecure_channel(stack.status(smelt.home).gateway_grpc) as channel:
        request = artifact_pb2.GetArtifactRequest(reference=reports[0]["digest"])
        reply = artifact_pb2_grpc.ArtifactServiceStub(channel).GetArtifact(request, timeout=10)
    stored = json.loads(reply.artifact.config_json)
    assert {name: stored["scores"][0][name] for name in shown["scores"][0]} == shown["scores"][0]
    assert (shown["verdicts"], shown["completion_tokens"]) == (stored["verdicts"], stored["completion_tokens"])
    assert sum(sample["completion_tokens"] for sample in shown["samples"]) == stored["completion_tokens"]


@case("results")
def results(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    listed = {entry["digest"]: entry["scores"] for entry in smelt("results")["results"]}
    assert [listed[report["digest"]] for report in reports] == [report["scores"] for report in reports]


@case("compare")
def compare(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    """By the digits that tables show."""
    baseline, candidate = (report["digest"].removeprefix("sha256:")[:12] for report in reports)
    found = smelt("compare", baseline, candidate)
    assert found["difference"] == reports[1]["scores"][0]["value"] - reports[0]["scores"][0]["value"]
    assert found["verdict"] == "no difference shown"


@case("gate")
def gate(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    """A partial score meets no gate."""
    done = smelt.run("gate", SMALL, "--clause", "basic pass@1 >= 0", "--report", reports[0]["digest"], "--json")
    (clause,) = json.loads(done.stdout)["clauses"]
    assert done.returncode == 1 and not clause["is_met"] and "partial" in clause["measured"]


@case("jobs ls")
def jobs_ls(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    listed = {job["id"]: job["create_time"] for job in smelt("jobs", "ls", "--service", "evaluator")["jobs"]}
    assert {report["job"] for report in reports} <= listed.keys()
    assert list(listed.values()) == sorted(listed.values(), reverse=True)


@case("jobs get")
def jobs_get(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    job = smelt("jobs", "get", reports[0]["job"])
    assert (job["state"], job["result_digest"]) == ("succeeded", reports[0]["digest"])


@case("jobs watch")
def jobs_watch(smelt: Smelt, *_: Any) -> None:
    begun = smelt("eval", *SUITE, "--limit", "2", "--seed", "203", SMALL, "--no-wait")
    watched = smelt("jobs", "watch", begun["id"])
    assert (watched["id"], watched["state"]) == (begun["id"], "succeeded") and watched["result_digest"]


@case("jobs cancel")
def jobs_cancel(smelt: Smelt, *_: Any) -> None:
    job_id = started(smelt)
    smelt("jobs", "cancel", job_id)
    assert smelt.run("jobs", "watch", job_id).returncode == 1
    assert smelt("jobs", "get", job_id)["state"] == "cancelled"


@case("jobs trace")
def jobs_trace(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    trace = smelt("jobs", "trace", reports[0]["job"])
    assert trace["trace_id"] == smelt("jobs", "get", reports[0]["job"])["trace_id"]
    assert {"cli", "gateway", "evaluator", "inference", "sandbox"} <= {span["service"] for span in trace["spans"]}


@case("jobs cost")
def jobs_cost(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    found = {cost["name"]: cost for cost in smelt("jobs", "cost", "--limit", "1000")["costs"]}
    cost = found[reports[0]["job"]]
    assert (cost["kind"], cost["state"], cost["gpu_s"]) == ("evaluator evaluate", "succeeded", 0.0)
    assert cost["tokens"] == reports[0]["completion_tokens"] and cost["time_s"] == reports[0]["total_s"]
