"""What a followed job shows where no bar can be drawn."""

from __future__ import annotations

import pytest
from scripted_gateway import job
from smelt.job.v1 import job_pb2

from gateway.cli.follow import _JobView, open_bars
from gateway.cli.output import Output
from smeltkit import limits


def generating(done: int) -> job_pb2.Job:
    """A job that generates, so far."""
    progress = job_pb2.Progress(phase="generate", done=done, total=200, unit="samples")
    return job("RUNNING", progress=progress)


@pytest.mark.parametrize(("period_s", "counts"), [(0.0, ["0/200", "7/200", "90/200"]), (3600.0, ["0/200"])])
def test_long_phase_tells_its_count_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], period_s: float, counts: list[str]
) -> None:
    """Once a period, and once for each phase; a job that ended has no count left."""
    monkeypatch.setattr(limits, "PROGRESS_LINE_PERIOD_S", period_s)
    with open_bars(output := Output()) as bars:
        view = _JobView(output, bars, "job-1")
        for state in (job("QUEUED"), generating(0), generating(7), generating(7), generating(90), job("SUCCEEDED")):
            view.update(state)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("generate")[1].split()[0] for line in lines if "generate" in line] == counts
    assert lines[0].endswith("queued") and lines[-1].endswith("succeeded") and len(lines) == len(counts) + 2


def test_each_alert_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    """R-010: whoever watches sees it when it comes, and not again with every later state."""
    texts = ["step 3: loss 11 is above 10", "step 9: mfu 0.01 is below 0.1"]
    with open_bars(output := Output()) as bars:
        view = _JobView(output, bars, "job-1")
        for count in (0, 1, 1, 2):
            view.update(job("RUNNING", progress=job_pb2.Progress(phase="train", total=20, alerts=texts[:count])))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("alert: ")]
    assert [line.split("  ", 1)[1] for line in lines] == texts
