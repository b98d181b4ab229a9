"""Stands in for an OpenTelemetry collector: takes spans and metrics by OTLP over gRPC and keeps what they say."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb2
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb2
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from smeltkit.servers import LOOPBACK
from smeltkit.telemetry import SpanRecord

_PREFIX = "smelt-"


class Collector(TraceServiceServicer, MetricsServiceServicer):
    """Where `OTEL_EXPORTER_OTLP_ENDPOINT` may point; filled from threads of its server."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[SpanRecord] = []
        self.metrics: set[str] = set()

    def Export(self, request: object, context: object) -> object:
        """Both services call it that."""
        if isinstance(request, trace_pb2.ExportTraceServiceRequest):
            for found in request.resource_spans:
                service = _service(found.resource)
                self.spans += [_record(span, service) for scope in found.scope_spans for span in scope.spans]
            return trace_pb2.ExportTraceServiceResponse()
        assert isinstance(request, metrics_pb2.ExportMetricsServiceRequest)
        self.metrics |= {
            metric.name
            for found in request.resource_metrics
            for scope in found.scope_metrics
            for metric in scope.metrics
        }
        return metrics_pb2.ExportMetricsServiceResponse()


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector that answers while the block runs."""
    made, server = Collector(), grpc.server(futures.ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]
    add_MetricsServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]
    made.url = f"http://{LOOPBACK}:{server.add_insecure_port(f'{LOOPBACK}:0')}"
    server.start()
    try:
        yield made
    finally:
        server.stop(None)


def _service(resource: Resource) -> str:
    """The service's own name, as the files of spans have it."""
    names = [item.value.string_value for item in resource.attributes if item.key == "service.name"]
    return names[0].removeprefix(_PREFIX)


def _record(span: Span, service: str) -> SpanRecord:
    return SpanRecord(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        name=span.name,
        service=service,
        kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        status=Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
    )
