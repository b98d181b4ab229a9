"""Logs as JSON lines with the trace and span they belong to."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TextIO

from smeltkit import limits
from smeltkit.telemetry.spans import current_span_id, current_trace_id

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, message, service, trace and span ids, and what `extra` gave."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage()[: limits.LOG_MESSAGE_MAX_CHARS],
            "trace_id": current_trace_id(),
            "span_id": current_span_id(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logs(service: str, stream: TextIO, level: str) -> None:
    """Sends every log record of the process from `level` on to `stream`, replacing what was configured before."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(service))
    logging.basicConfig(handlers=[handler], level=level, force=True)
