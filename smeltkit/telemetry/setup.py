"""Sets telemetry up for one process, from the environment alone.

Traces and metrics go out by OTLP over gRPC when `OTEL_EXPORTER_OTLP_ENDPOINT` (or its variant for the signal) is set
or `OTEL_<SIGNAL>_EXPORTER` is `otlp`; all else about them (headers, TLS, sampling, batching, resource) the SDK reads
itself. Call it after any child process was spawned and before the first channel is opened. The exporters are loaded
only where they are wanted: they cost a command line a third of its start.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from opentelemetry import metrics, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

from smeltkit import limits
from smeltkit.config import environment, from_environment
from smeltkit.crashes import CrashRecorder
from smeltkit.errors import BadConfig
from smeltkit.telemetry.files import FileSpanExporter
from smeltkit.telemetry.logs import configure_logs

PREFIX = "SMELT_TELEMETRY_"
_LEVELS = tuple(logging.getLevelNamesMapping())


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """Prefix `SMELT_TELEMETRY_`; everything about OTLP comes from `OTEL_*` instead."""

    trace_dir: str = ""
    """Folder for files of spans, one a process, and for reports of crashes; empty for none."""
    log_level: str = "INFO"
    """Least level that is logged: DEBUG, INFO, WARNING, ERROR or CRITICAL."""

    def __post_init__(self) -> None:
        if self.log_level not in _LEVELS:
            raise BadConfig(f"log_level={self.log_level!r} is no level; use one of {', '.join(_LEVELS)}")


def setup(service: str, *, log_stream: TextIO | None = None, **defaults: str) -> Callable[[], None]:
    """Configures logs (JSON on `log_stream`, by default standard output), spans and metrics of this process.

    `defaults` replace those of `TelemetryConfig`. Returns what flushes and closes everything, within TELEMETRY_FLUSH_S.
    Once a process; BadConfig on a bad setting.
    """
    environ = environment()
    unset = {key: value for key, value in defaults.items() if f"{PREFIX}{key.upper()}" not in environ}
    config = from_environment(TelemetryConfig, PREFIX, environ, **unset)
    configure_logs(service, log_stream or sys.stdout, config.log_level)
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return lambda: None
    resource = Resource.create({"service.name": environ.get("OTEL_SERVICE_NAME") or f"smelt-{service}"})
    shutdowns = [_set_up_traces(service, config, environ, resource), _set_up_metrics(environ, resource)]

    def shutdown() -> None:
        for close in shutdowns:
            close()

    return shutdown


def _set_up_traces(
    service: str, config: TelemetryConfig, environ: Mapping[str, str], resource: Resource
) -> Callable[[], None]:
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    if config.trace_dir:
        try:
            provider.add_span_processor(CrashRecorder(Path(config.trace_dir) / "crashes", service))
            provider.add_span_processor(SimpleSpanProcessor(FileSpanExporter(Path(config.trace_dir), service)))
        except OSError as error:
            raise BadConfig(
                f"traces cannot be written to {config.trace_dir} ({error.strerror}); set SMELT_HOME or"
                " SMELT_TELEMETRY_TRACE_DIR to a folder that can be written"
            ) from error
    if _wants_otlp("TRACES", environ):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

    def close() -> None:
        provider.force_flush(int(limits.TELEMETRY_FLUSH_S * 1000))
        provider.shutdown()

    return close


def _set_up_metrics(environ: Mapping[str, str], resource: Resource) -> Callable[[], None]:
    if not _wants_otlp("METRICS", environ):
        return lambda: None
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    provider = MeterProvider(resource=resource, metric_readers=[reader], shutdown_on_exit=False)
    metrics.set_meter_provider(provider)
    return lambda: provider.shutdown(timeout_millis=limits.TELEMETRY_FLUSH_S * 1000)


def _wants_otlp(signal: str, environ: Mapping[str, str]) -> bool:
    exporter = environ.get(f"OTEL_{signal}_EXPORTER", "").strip()
    endpoint = environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if exporter not in ("", "otlp", "none"):
        raise BadConfig(f"OTEL_{signal}_EXPORTER={exporter!r} is not supported; use otlp or none")
    protocol = environ.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL") or environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"
    )
    wanted = exporter == "otlp" or (exporter == "" and bool(endpoint))
    if wanted and protocol != "grpc":
        raise BadConfig(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol!r} is not supported; use grpc")
    return wanted
