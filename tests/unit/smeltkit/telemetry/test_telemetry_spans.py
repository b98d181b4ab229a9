"""Spans: propagation, failures without messages, and the files that a trace is read from."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import StatusCode, Tracer

from smeltkit import limits
from smeltkit.errors import UnknownModel
from smeltkit.telemetry import attached, current_trace_id, inject, names, read_spans, span
from smeltkit.telemetry.files import FileSpanExporter
from smeltkit.testing.spans import captured_spans


def test_remote_parent_is_continued() -> None:
    """What `inject` gave on one side is the parent on the other."""
    with captured_spans() as captured:
        with span("near"):
            carrier, trace_id = inject(), current_trace_id()
        with attached(carrier), span("far"):
            assert current_trace_id() == trace_id
        near, far = captured.named("near")[0], captured.named("far")[0]
    assert far.parent.span_id == near.context.span_id


def test_without_a_remote_parent_a_new_trace_begins() -> None:
    """A request without trace context does not join whatever was current."""
    with captured_spans(), span("before"):
        outer = current_trace_id()
        with attached({}), span("after"):
            assert current_trace_id() not in ("", outer)


def test_outside_of_a_span_there_is_no_trace() -> None:
    """Then nothing is injected either."""
    assert current_trace_id() == ""
    assert inject() == {}


@pytest.mark.parametrize(
    "error,cause", [(UnknownModel("secret"), "UNKNOWN_MODEL"), (ValueError("secret"), "ValueError")]
)
def test_failed_span_tells_the_reason_and_not_the_message(error: Exception, cause: str) -> None:
    """Messages may quote prompts or paths."""
    with captured_spans() as captured:
        with pytest.raises(type(error)), span("work"):
            raise error
        recorded = captured.named("work")[0]
    assert recorded.status.status_code is StatusCode.ERROR
    assert recorded.attributes == {names.ERROR_TYPE: cause}
    assert "secret" not in recorded.to_json()


def test_cancelled_span_is_not_failed() -> None:
    """Cancellation is not an error."""
    with captured_spans() as captured:
        with pytest.raises(asyncio.CancelledError), span("work"):
            raise asyncio.CancelledError
        assert captured.named("work")[0].status.status_code is StatusCode.UNSET


@pytest.fixture
def tracer(tmp_path: Path) -> Iterator[Tracer]:
    """A tracer that writes to files of the service "tested" in `tmp_path`."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(FileSpanExporter(tmp_path, "tested")))
    yield provider.get_tracer("test")
    provider.shutdown()


def test_spans_of_one_trace_are_read_back_by_start_time(tracer: Tracer, tmp_path: Path) -> None:
    """Parent and child come back with names, service, attributes and times; other traces do not."""
    with tracer.start_as_current_span("other"):
        pass
    with tracer.start_as_current_span("parent") as parent, tracer.start_as_current_span("child") as child:
        child.set_attribute("smelt.step", "convert")
    trace_id = f"{parent.get_span_context().trace_id:032x}"
    found = read_spans(tmp_path, trace_id)
    assert [(record.name, record.service) for record in found] == [("parent", "tested"), ("child", "tested")]
    assert found[1].parent_id == found[0].span_id and found[0].parent_id == ""
    assert found[1].attributes == {"smelt.step": "convert"}
    assert found[0].start_ns <= found[1].start_ns <= found[1].end_ns <= found[0].end_ns


def test_line_cut_off_by_a_crash_is_passed_over(tracer: Tracer, tmp_path: Path) -> None:
    """A killed process leaves half a line; the rest of the trace is still read."""
    with tracer.start_as_current_span("whole") as whole:
        pass
    trace_id = f"{whole.get_span_context().trace_id:032x}"
    (tmp_path / "killed-1.jsonl").write_text(json.dumps({"trace_id": trace_id})[:-1] + f'\n{{"x":"{trace_id}"}}\n[1')
    assert [record.name for record in read_spans(tmp_path, trace_id)] == ["whole"]


def test_files_stay_within_their_bound(tracer: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process keeps two files of bounded size however much it traces, and the newest spans are among them."""
    monkeypatch.setattr(limits, "TRACE_FILE_MAX_BYTES", 2000)
    for _ in range(50):
        with tracer.start_as_current_span("one of many") as last:
            pass
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2 and max(sizes) <= 2000
    assert read_spans(tmp_path, f"{last.get_span_context().trace_id:032x}")


def test_files_of_earlier_processes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of traces does not grow with every restart; files of other services are theirs."""
    (tmp_path / "other-1.jsonl").write_text("")
    monkeypatch.setattr(limits, "TRACE_FOLDER_MAX_BYTES", 35)
    for number in range(10):
        (tmp_path / f"tested-{number}.jsonl").write_text("ten bytes\n")
    FileSpanExporter(tmp_path, "tested").shutdown()
    assert len(list(tmp_path.iterdir())) == 5


def test_full_disk_loses_spans_and_not_the_work(
    tracer: Tracer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that takes no bytes is reported and the block goes on."""
    exporter = FileSpanExporter(tmp_path, "full")
    exporter.shutdown()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("test").start_as_current_span("work"):
        pass
    assert "spans lost" in caplog.text
