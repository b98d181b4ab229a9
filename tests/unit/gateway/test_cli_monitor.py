"""What runs now: jobs with their course and alerts, GPUs with their holders; what a training may take of them."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import pytest
from rich.console import RenderableType
from scripted_gateway import gateway, job
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.commands.train import _on_gpus
from gateway.cli.gpus_view import gpus_view
from gateway.cli.monitor_view import monitor_document, monitor_view
from gateway.cli.output import Output, parse_bytes
from smeltkit.errors import BadRequest, ServiceUnavailable

GPUS = trainer_pb2.ListGpusResponse(
    gpus=[
        trainer_pb2.Gpu(id="GPU-a", name="NVIDIA H200", total_bytes=140 << 30, used_bytes=50 << 30),
        trainer_pb2.Gpu(id="GPU-b", name="NVIDIA H200", total_bytes=140 << 30),
    ],
    leases=[
        trainer_pb2.GpuLease(
            job_id="job-1", title="ore:small", memory_bytes=40 << 30, count=1, is_shared=True, gpus=["GPU-a"],
            used_bytes=33 << 30,
        ),
        trainer_pb2.GpuLease(job_id="job-2", title="ore:large", memory_bytes=90 << 30, count=2),
    ],
)  # fmt: skip


def training(step: int, **fields: Any) -> job_pb2.Job:
    """A running training at a step."""
    progress = job_pb2.Progress(
        phase="train", done=step, total=90, unit="steps", course=[3.0, 2.0, 1.0],
        measured={"loss": 1.25, "tokens_per_second": 18_000.4, "memory_bytes": 3 << 30},
        alerts=["step 7: loss 11 is above 10"],
    )  # fmt: skip
    return job("RUNNING", service="trainer", kind="train", progress=progress, **fields)


def shown(capsys: pytest.CaptureFixture[str], *views: RenderableType) -> str:
    """What a person sees."""
    Output().show(None, *views)
    return capsys.readouterr().out


def test_the_page_shows_course_numbers_alerts_and_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """R-010: what is not measured is a dash, never a zero (R-122)."""
    page = shown(capsys, monitor_view([training(8), job("QUEUED", id="job-9")], GPUS, "2026-01-01T00:00:00Z"))
    lines = {line.split()[0]: line for line in page.splitlines() if line.strip()}
    assert "job-1  step 7: loss 11 is above 10" in page
    row = next(line for line in page.splitlines() if "8/90 steps" in line)
    for part in ("\u2588\u2585\u2581", "1.2500", "18,000", "3.0 GiB"):
        assert part in row
    assert lines["job-9"].split()[-4:] == ["-"] * 4


def test_gpus_show_who_holds_them_and_who_waits(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, *gpus_view(GPUS)).splitlines()
    assert page[1].split()[:2] == ["GPU-a", "NVIDIA"] and "job-1" in page[1] and "40.0 GiB" in page[1]
    assert page[2].split()[-5:] == ["-"] * 5
    assert page[-1].split()[:2] == ["job-2", "ore:large"] and "90.0 GiB" in page[-1]


def test_the_document_holds_everything_on_the_page() -> None:
    document = monitor_document([training(8)], GPUS, "2026-01-01T00:00:00Z")
    (found,) = document["jobs"]
    assert found["progress"]["measured"]["loss"] == 1.25 and found["progress"]["course"] == [3.0, 2.0, 1.0]
    assert found["progress"]["alerts"] == ["step 7: loss 11 is above 10"]
    assert [lease["gpus"] for lease in document["leases"]] == [["GPU-a"], []] and len(document["gpus"]) == 2


async def test_each_look_is_one_line_until_the_user_ends_it() -> None:
    """Finished jobs are left out; a trainer that does not answer costs its GPUs only."""
    looks = 0

    def jobs(request: Any) -> job_pb2.ListJobsResponse:
        nonlocal looks
        looks += 1
        return job_pb2.ListJobsResponse(jobs=[training(looks), job("SUCCEEDED", id="job-0")])

    def gpus(request: Any) -> trainer_pb2.ListGpusResponse:
        if looks == 1:
            raise ServiceUnavailable("the trainer does not answer")
        return GPUS

    async with gateway({"JobService.ListJobs": jobs, "TrainerService.ListGpus": gpus}) as running:
        process = await running.start("monitor", "--json", "--every", "0.2")
        assert process.stdout is not None
        lines = [json.loads(await asyncio.wait_for(process.stdout.readline(), 60)) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), 60)
    assert [[one["progress"]["done"] for one in line["jobs"]] for line in lines] == [[1], [2]]
    assert [len(line["gpus"]) for line in lines] == [0, 2]
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("40GiB", 40 << 30), ("1.5g", 3 << 29), ("512 M", 512 << 20), ("7", 7), ("2KB", 2048)]
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert parse_bytes(text, "--vram") == size_bytes


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "1X", "1 GiB each"])
def test_what_is_no_size_is_refused_by_its_option(text: str) -> None:
    with pytest.raises(BadRequest, match="--vram"):
        parse_bytes(text, "--vram")


def test_what_a_training_may_take_is_said_only_where_it_was_asked_for() -> None:
    """A request without it is the same as before there were leases."""
    (plain,) = _on_gpus([trainer_pb2.TrainSpec(name="x")], False, "")
    assert not plain.HasField("gpu")
    (told,) = _on_gpus([trainer_pb2.TrainSpec(name="x")], True, "4GiB")
    assert told.gpu == trainer_pb2.GpuTerms(waits=True, memory_bytes=4 << 30)
