"""OpenTelemetry for every process: spans, metrics and JSON logs, set up once from the environment.

    shutdown = telemetry.setup("importer")        # first thing in main(); shutdown() last
    with telemetry.span("smelt.import.convert", **{names.BUNDLE_FORMAT: "gguf"}): ...
    telemetry.histogram(names.RPC_SERVER_DURATION).record(0.2, {names.RPC_METHOD: method})

`OTEL_*` variables alone decide about OTLP. SMELT_TELEMETRY_TRACE_DIR adds a bounded file of spans a process, which
`read_spans` turns into the tree of one trace, without any collector. Prompts, code and ids are never attributes.
"""

from __future__ import annotations

from smeltkit.telemetry import names
from smeltkit.telemetry.files import SpanRecord, read_spans
from smeltkit.telemetry.metrics import counter, gauge, histogram, latest
from smeltkit.telemetry.names import Metric
from smeltkit.telemetry.setup import setup
from smeltkit.telemetry.spans import attached, current_trace_id, event, inject, span

__all__ = [
    "Metric",
    "SpanRecord",
    "attached",
    "counter",
    "current_trace_id",
    "event",
    "gauge",
    "histogram",
    "inject",
    "latest",
    "names",
    "read_spans",
    "setup",
    "span",
]
