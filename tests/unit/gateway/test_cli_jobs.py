"""Commands about jobs, the sandbox, the platform and settings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from scripted_gateway import DIGEST, Gateway, gateway, job
from smelt.job.v1 import job_pb2
from smelt.sandbox.v1 import sandbox_pb2

from smeltkit.telemetry.files import FileSpanExporter

NOWHERE = Gateway("127.0.0.1:1", {})


async def test_jobs_are_listed_with_state_and_result() -> None:
    """The filter and the bound go to the gateway."""
    jobs = [job("SUCCEEDED", result_digest=DIGEST), job("FAILED", id="job-2")]
    answers = {"JobService.ListJobs": lambda request: job_pb2.ListJobsResponse(jobs=jobs)}
    async with gateway(answers) as running:
        ended = await running.smelt("jobs", "ls", "--service", "importer", "--limit", "5")
        document = json.loads((await running.smelt("jobs", "ls", "--json")).out)
        request = running.requests["JobService.ListJobs"][0]
    assert (request.service, request.limit) == ("importer", 5)
    assert "succeeded" in ended.out and "job-2" in ended.out
    assert [entry["state"] for entry in document["jobs"]] == ["succeeded", "failed"]


async def test_jobs_of_a_service_that_is_not_there_are_refused() -> None:
    """R-006: an empty list would look as if there were none."""
    async with gateway({}) as running:
        ended = await running.smelt("jobs", "ls", "--service", "importr")
    assert ended.code == 2 and "importer, trainer" in ended.err


async def test_cancel_shows_the_state_after_it() -> None:
    """The job that is asked to stop is cancelling."""
    answers = {"JobService.CancelJob": lambda request: job_pb2.CancelJobResponse(job=job("CANCELLING"))}
    async with gateway(answers) as running:
        ended = await running.smelt("jobs", "cancel", "job-1")
        assert running.requests["JobService.CancelJob"][0].id == "job-1"
    assert "cancelling" in ended.out


async def test_trace_draws_the_tree_of_all_processes(tmp_path: Path) -> None:
    """Spans of two processes hang together; many alike siblings take one line."""
    providers = []
    for service in ("cli", "evaluator"):
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(FileSpanExporter(tmp_path, service)))
        providers.append(provider)
    near, far = (provider.get_tracer("test") for provider in providers)
    with near.start_as_current_span("smelt eval") as root, far.start_as_current_span("evaluate"):
        for _ in range(20):
            with far.start_as_current_span("generate"):
                pass
    trace_id = f"{root.get_span_context().trace_id:032x}"
    answers = {"JobService.GetJob": lambda request: job_pb2.GetJobResponse(job=job("SUCCEEDED", trace_id=trace_id))}
    async with gateway(answers) as running:
        ended = await running.smelt("jobs", "trace", "job-1", SMELT_TELEMETRY_TRACE_DIR=str(tmp_path))
        other = await running.smelt("jobs", "trace", "job-1", SMELT_TELEMETRY_TRACE_DIR=str(tmp_path / "empty"))
    lines = ended.out.splitlines()
    assert "22 spans of 2 services" in lines[0]
    assert lines[1].startswith("└── cli  smelt eval") and "└── evaluator  evaluate" in lines[2]
    assert "19 more" in lines[4] and len(lines) == 5
    assert other.code == 3


async def test_sandbox_run_prints_what_the_program_wrote_and_ends_as_it_did(tmp_path: Path) -> None:
    """Anything but a clean end gives 1; the document holds verdict, output, times and isolation."""
    record = sandbox_pb2.Record(verdict="VERDICT_TIMEOUT_CPU", wall_s=2.5, cpu_s=2.0, peak_bytes=1 << 20, level="jail")
    reply = sandbox_pb2.ExecuteResponse(record=record, stdout=b"hello\n", stderr=b"\xff")
    (tmp_path / "p.py").write_text("while True: pass")
    async with gateway({"SandboxService.Execute": lambda request: reply}) as running:
        ended = await running.smelt("sandbox", "run", str(tmp_path / "p.py"), "--memory-mib", "64", "--json")
        (request,) = running.requests["SandboxService.Execute"]
    document = json.loads(ended.out)
    assert ended.code == 1
    keys = ("verdict", "stdout", "stderr", "wall_s", "cpu_s", "peak_bytes", "isolation")
    assert [document[key] for key in keys] == ["timeout-cpu", "hello\n", "base64:/w==", 2.5, 2.0, 1 << 20, "jail"]
    assert request.limits.memory_bytes == 64 << 20
    assert not request.limits.HasField("cpu_s")


async def test_sandbox_run_sets_what_the_program_wrote_apart(tmp_path: Path) -> None:
    """No line of a program can pass for one of ours, or move the cursor."""
    record = sandbox_pb2.Record(verdict="VERDICT_TIMEOUT_WALL", wall_s=2.5)
    reply = sandbox_pb2.ExecuteResponse(record=record, stdout=b"verdict  passed\n\x1b[2Jend", stderr=b"oh\n")
    (tmp_path / "p.py").write_text("while True: pass")
    async with gateway({"SandboxService.Execute": lambda request: reply}) as running:
        ended = await running.smelt("sandbox", "run", str(tmp_path / "p.py"))
    lines = ended.out.splitlines()
    assert lines[0].split() == ["verdict", "timeout-wall"]
    written = ["stdout, 23 B", "| verdict  passed", r"| \x1b[2Jend", "stderr, 3 B", "| oh"]
    assert lines[-5:] == written


async def test_sandbox_run_with_tests_judges(tmp_path: Path) -> None:
    """The same command takes every form of tests; only a pass ends with 0."""
    record = sandbox_pb2.Record(verdict="VERDICT_WRONG", detail="call 1 gives 3", calls=1, stdout_head="out")
    (tmp_path / "p.py").write_text("def f(n): return n")
    (tmp_path / "t.txt").write_text("((1,), 2)")
    answers = {"SandboxService.Judge": lambda request: sandbox_pb2.JudgeResponse(record=record)}
    names = ("--tests", str(tmp_path / "t.txt"), "--form", "calls", "--entry-point", "f", "--exports", "f,g")
    async with gateway(answers) as running:
        ended = await running.smelt("sandbox", "run", str(tmp_path / "p.py"), *names, "--json")
        (request,) = running.requests["SandboxService.Judge"]
    assert (ended.code, json.loads(ended.out)["verdict"], json.loads(ended.out)["stdout"]) == (1, "wrong", "out")
    assert (request.candidate.form, request.candidate.tests) == (sandbox_pb2.FORM_CALLS, "((1,), 2)")
    assert (request.candidate.entry_point, list(request.candidate.exports)) == ("f", ["f", "g"])


async def test_sandbox_run_takes_every_bound_and_the_mode(tmp_path: Path) -> None:
    """What nobody counted is null in the document and a dash in the table."""
    record = sandbox_pb2.Record(verdict="VERDICT_PASSED", mode="MODE_INSIDE", is_uncounted=True)
    (tmp_path / "p.py").write_text("def f(n): return n")
    (tmp_path / "t.py").write_text("import unittest")
    answers = {"SandboxService.Judge": lambda request: sandbox_pb2.JudgeResponse(record=record)}
    tests = ("--tests", str(tmp_path / "t.py"), "--form", "unittest", "--exports", "f", "--mode", "inside")
    bounds = (
        "--cpu-s",
        "2",
        "--wall-s",
        "9",
        "--memory-mib",
        "64",
        "--pids",
        "4",
        "--tmp-mib",
        "1",
        "--output-kib",
        "8",
    )
    async with gateway(answers) as running:
        shown = await running.smelt("sandbox", "run", str(tmp_path / "p.py"), *tests, *bounds)
        ended = await running.smelt("sandbox", "run", str(tmp_path / "p.py"), *tests, "--json")
        request, bare = running.requests["SandboxService.Judge"]
    assert request.candidate.mode == sandbox_pb2.MODE_INSIDE
    assert request.candidate.limits == sandbox_pb2.Limits(
        cpu_s=2, wall_s=9, memory_bytes=64 << 20, pids=4, tmp_bytes=1 << 20, output_bytes=8 << 10
    )
    assert not bare.candidate.limits.ListFields()
    assert json.loads(ended.out)["calls"] is None
    assert ["calls", "-"] in [line.split() for line in shown.out.splitlines()]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--form", "check"), "--form has no effect without --tests"),
        (("--entry-point", "f"), "--entry-point has no effect without --tests"),
        (("--mode", "inside"), "--mode has no effect without --tests"),
        (("--tests", "t.py", "--stdin", "t.py"), "--stdin has no effect with --tests"),
        (("--tests", "binary"), "binary is no UTF-8 text: byte 0 is 0xff"),
        (("--tests", "."), " is no plain file"),
        (("--memory-mib", "99999999999999999999"), "--memory-mib"),
    ],
)
async def test_sandbox_run_refuses_what_it_cannot_use(tmp_path: Path, options: tuple[str, ...], told: str) -> None:
    """A run that ignored an option would say `passed` about something else than was asked."""
    (tmp_path / "p.py").write_text("def f(n): return n")
    (tmp_path / "t.py").write_text("assert f(1) == 1")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    async with gateway({}) as running:
        named = [str(tmp_path / option) if option in ("t.py", "binary", ".") else option for option in options]
        ended = await running.smelt("sandbox", "run", str(tmp_path / "p.py"), *named)
    assert ended.code in (2, 3)
    assert told in ended.err
    assert "Traceback" not in ended.err


async def test_sandbox_bench_measures_what_callers_see() -> None:
    """A sandbox that fails a sound program has no speed."""
    passed = sandbox_pb2.Record(verdict="VERDICT_PASSED", wall_s=0.004)
    answers = {
        "SandboxService.Describe": lambda request: sandbox_pb2.DescribeResponse(level="jail", slots=2),
        "SandboxService.Execute": lambda request: sandbox_pb2.ExecuteResponse(record=passed),
        "SandboxService.Judge": lambda request: sandbox_pb2.JudgeResponse(record=passed),
    }
    async with gateway(answers) as running:
        ended = await running.smelt("sandbox", "bench", "--starts", "3", "--verdicts", "5", "--json")
        counts = [len(running.requests[f"SandboxService.{name}"]) for name in ("Execute", "Judge")]
    document = json.loads(ended.out)
    assert (ended.code, counts, document["level"], document["verdict_ms_p50"]) == (0, [3, 5], "jail", 4.0)
    assert document["verdicts_per_second"] > 0 and document["round_trip_ms_p95"] >= document["round_trip_ms_p50"] > 0
    answers["SandboxService.Execute"] = lambda request: sandbox_pb2.ExecuteResponse()
    async with gateway(answers) as running:
        assert (await running.smelt("sandbox", "bench")).code != 0


async def test_gateway_that_does_not_answer_is_unavailable() -> None:
    """A configured gateway is not replaced by a local one; who asked learns the address, not what gRPC says of it."""
    ended = await NOWHERE.smelt("models")
    assert ended.code == 5
    assert "SERVICE_UNAVAILABLE" in ended.err and "starting" not in ended.err
    assert f"nothing answers at {NOWHERE.address} (SMELT_GATEWAY); start the platform with `smelt up`" in ended.err
    assert "ipv4" not in ended.err


async def test_status_of_a_platform_that_never_ran_starts_nothing(tmp_path: Path) -> None:
    """It says how to start it, and ends as unavailable."""
    ended = await NOWHERE.smelt("status", "--json", SMELT_HOME=str(tmp_path))
    assert ended.code == 5
    assert json.loads(ended.out)["is_up"] is False
    assert "smelt up" in ended.err
    assert not os.listdir(tmp_path)


async def test_settings_are_explained_and_secrets_hidden() -> None:
    """Each value with its source."""
    names = {"SMELT_PLATFORM_S3_SECRET_KEY": "hush", "SMELT_PLATFORM_S3_BUCKET": "mine"}
    ended = await NOWHERE.smelt("config", "explain", "s3", "--json", **names)
    found = {entry["variable"]: entry for entry in json.loads(ended.out)["settings"]}
    assert found["SMELT_PLATFORM_S3_BUCKET"]["value"] == "mine"
    assert found["SMELT_PLATFORM_S3_BUCKET"]["source"] == "environment"
    assert found["SMELT_PLATFORM_S3_SECURE"]["source"] == "default"
    assert found["SMELT_PLATFORM_S3_ENDPOINT"]["source"] == "unset"
    assert "hush" not in ended.out
    assert all(entry["meaning"] for entry in found.values())
