"""Spans and metrics in memory, for tests that look at telemetry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from smeltkit.telemetry import SpanRecord

START_EVALUATION: Final = "smelt.evaluator.v1.EvaluatorService/StartEvaluation"
_EVALUATE, _GENERATE = "smelt.job.evaluator.evaluate", "smelt.inference.v1.InferenceService/Generate"
_JUDGE = "smelt.sandbox.v1.SandboxService/JudgeBatch"

Edge = tuple[tuple[str, str], tuple[str, str]]
"""Parent and child, each as service and name of its span."""

EVALUATION_EDGES: Final[tuple[Edge, ...]] = (
    (("gateway", START_EVALUATION), ("evaluator", START_EVALUATION)),
    (("evaluator", START_EVALUATION), ("evaluator", _EVALUATE)),
    (("evaluator", _GENERATE), ("inference", _GENERATE)),
    (("evaluator", _JUDGE), ("sandbox", _JUDGE)),
    (("evaluator", _EVALUATE), ("evaluator", "publish evaluator.evaluation.finished")),
)
"""What the trace of every evaluation has, from the gateway on: the second and the last pair lead through NATS."""


def edges_of(spans: Sequence[SpanRecord]) -> set[Edge]:
    """Every parent and child of a trace."""
    known = {span.span_id: span for span in spans}
    pairs = [(known[span.parent_id], span) for span in spans if span.parent_id in known]
    return {((parent.service, parent.name), (child.service, child.name)) for parent, child in pairs}


class CapturedSpans:
    """The spans that ended since the block began."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def named(self, name: str) -> list[ReadableSpan]:
        """Ended spans of this name, oldest first."""
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def all(self) -> list[ReadableSpan]:
        """Every ended span, oldest first."""
        return list(self._exporter.get_finished_spans())


@contextmanager
def captured_spans() -> Iterator[CapturedSpans]:
    """Keeps the spans of this process while the block runs; one block at a time."""
    exporter = _span_exporter()
    exporter.clear()
    yield CapturedSpans(exporter)


def metric_points(name: str) -> list[dict[str, object]]:
    """Attributes of every series of a metric recorded in this process since the first call of this function."""
    return [dict(point.attributes or {}) for point in _points(name)]


def metric_values(name: str, attributes: Mapping[str, object]) -> list[float]:
    """Value of the series of a counter or level with just these attributes, if there is one; since the first call."""
    return [float(point.value) for point in _points(name) if dict(point.attributes or {}) == attributes]


def _points(name: str) -> list[Any]:
    data = _metric_reader().get_metrics_data()
    if data is None:
        return []
    return [
        point
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    ]


@cache
def _span_exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@cache
def _metric_reader() -> InMemoryMetricReader:
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider(metric_readers=[reader], shutdown_on_exit=False))
    return reader
