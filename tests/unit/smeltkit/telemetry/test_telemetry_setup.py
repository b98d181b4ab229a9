"""Set-up of one process from its environment; each test in a process of its own, since it is done once a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from smeltkit.config import environment
from smeltkit.testing.collector import collector

WORK = """
import logging
from smeltkit import telemetry
from smeltkit.telemetry import names
shutdown = telemetry.setup("tested")
with telemetry.span("work"):
    logging.getLogger("test").info("hello %s", "you", extra={"count": 3})
    telemetry.counter(names.FALLBACKS).add(1)
    trace_id = telemetry.current_trace_id()
shutdown()
print(trace_id)
"""


def _run(**names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", WORK], env=environment(names), capture_output=True, text=True, timeout=60
    )


def test_log_lines_are_json_with_the_trace_they_belong_to() -> None:
    """Message, extra fields, service, trace and span ids stand on one line of standard output."""
    lines = _run().stdout.splitlines()
    line = json.loads(lines[0])
    assert (line["message"], line["count"], line["service"], line["level"]) == ("hello you", 3, "tested", "INFO")
    assert line["trace_id"] == lines[1] and len(line["span_id"]) == 16


def test_trace_folder_receives_the_spans(tmp_path: Path) -> None:
    """One variable is enough to keep traces on a laptop."""
    trace_id = _run(SMELT_TELEMETRY_TRACE_DIR=str(tmp_path)).stdout.splitlines()[-1]
    (path,) = tmp_path.glob("*.jsonl")
    assert json.loads(path.read_text())["trace_id"] == trace_id


def test_otlp_endpoint_alone_sends_spans_and_metrics() -> None:
    """A collector gets both before the process ends."""
    with collector() as running:
        done = _run(OTEL_EXPORTER_OTLP_ENDPOINT=running.url)
    assert done.returncode == 0, done.stderr
    (span,) = running.spans
    assert (span.service, span.name, span.trace_id) == ("tested", "work", done.stdout.splitlines()[-1])
    assert "smelt.fallbacks" in running.metrics


def test_disabled_sdk_traces_nothing(tmp_path: Path) -> None:
    """OTEL_SDK_DISABLED wins over everything."""
    done = _run(OTEL_SDK_DISABLED="true", SMELT_TELEMETRY_TRACE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name,value",
    [
        ("OTEL_TRACES_EXPORTER", "jaeger"),
        ("SMELT_TELEMETRY_TRACEDIR", "x"),
    ],
)
def test_setting_without_effect_is_refused(name: str, value: str) -> None:
    """An exporter that is not there, an unknown level and a misspelt variable stop the process. R-006"""
    done = _run(**{name: value})
    assert done.returncode != 0
    assert "BadConfig" in done.stderr and name in done.stderr


def test_unknown_log_level_is_refused() -> None:
    """The message names the levels there are."""
    assert "WARNING" in _run(SMELT_TELEMETRY_LOG_LEVEL="LOUD").stderr


def test_protocol_that_is_not_built_in_is_refused() -> None:
    """OTLP over HTTP is named instead of silently replaced by gRPC."""
    done = _run(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf")
    assert "http/protobuf" in done.stderr
