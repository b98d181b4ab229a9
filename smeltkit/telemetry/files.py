"""Spans as JSON lines on disk: one bounded file a process, so that a laptop can draw a trace without a collector."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import format_span_id, format_trace_id

from smeltkit import limits

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SpanRecord:
    """One finished span. Times are nanoseconds since 1970; `status` is OK, ERROR or UNSET."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    service: str
    kind: str
    start_ns: int
    end_ns: int
    status: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


class FileSpanExporter(SpanExporter):
    """Appends spans to `<folder>/<service>-<pid>.jsonl`.

    A full file becomes `.jsonl.1`, whose predecessor goes, so a process holds at most twice TRACE_FILE_MAX_BYTES; of
    earlier processes of the service the newest files stay, TRACE_FOLDER_MAX_BYTES of them. A full disk loses spans, not
    work.
    """

    def __init__(self, folder: Path, service: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_oldest(folder, service, limits.TRACE_FOLDER_MAX_BYTES)
        self._service = service
        self._path = folder / f"{service}-{os.getpid()}.jsonl"
        self._file = self._path.open("ab")
        self._lock = Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Writes `spans`, each as one line, and flushes."""
        lines = b"".join(_to_line(span, self._service) for span in spans)
        try:
            with self._lock:
                if self._file.tell() + len(lines) > limits.TRACE_FILE_MAX_BYTES:
                    self._rotate()
                self._file.write(lines)
                self._file.flush()
        except (OSError, ValueError) as error:
            _LOG.warning("spans lost", extra={"spans": len(spans), "cause": str(error)})
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Closes the file."""
        self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        self._path.replace(self._path.with_suffix(".jsonl.1"))
        self._file = self._path.open("ab")


def read_spans(trace_dir: Path, trace_id: str) -> list[SpanRecord]:
    """Spans of one trace from the files of all processes, by start time. A line cut off by a crash is passed over."""
    found = []
    for path in trace_dir.glob("*.jsonl*"):
        with path.open(encoding="utf-8", errors="replace") as file:
            found += [record for line in file if trace_id in line and (record := _from_line(line, trace_id))]
    return sorted(found, key=lambda record: record.start_ns)


def _to_line(span: ReadableSpan, service: str) -> bytes:
    own = span.get_span_context()
    assert own is not None
    record = SpanRecord(
        trace_id=format_trace_id(own.trace_id),
        span_id=format_span_id(own.span_id),
        parent_id=format_span_id(span.parent.span_id) if span.parent else "",
        name=span.name,
        service=service,
        kind=span.kind.name,
        start_ns=span.start_time or 0,
        end_ns=span.end_time or 0,
        status=span.status.status_code.name,
        attributes=dict(span.attributes or {}),
    )
    return json.dumps(asdict(record), separators=(",", ":"), default=list).encode() + b"\n"


def _from_line(line: str, trace_id: str) -> SpanRecord | None:
    try:
        record = SpanRecord(**json.loads(line))
    except (ValueError, TypeError):
        return None
    return record if record.trace_id == trace_id else None


def _remove_oldest(folder: Path, service: str, max_bytes: int) -> None:
    found = []
    for path in folder.glob(f"{service}-*.jsonl*"):
        with suppress(FileNotFoundError):  # another process may be at it, too
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    kept_bytes = 0
    for _, size_bytes, path in sorted(found, reverse=True):
        kept_bytes += size_bytes
        if kept_bytes > max_bytes:
            path.unlink(missing_ok=True)
