"""Instruments for the metrics of `names`: made once each, usable before and after `setup`."""

from __future__ import annotations

from functools import cache

from opentelemetry import metrics
from opentelemetry.metrics import Counter, Histogram, UpDownCounter
from opentelemetry.metrics import _Gauge as Gauge

from smeltkit.telemetry.names import COUNTER, GAUGE, HISTOGRAM, LATEST, Metric

_METER = metrics.get_meter("smelt")


@cache
def histogram(metric: Metric) -> Histogram:
    """The histogram of `metric`, with its bucket boundaries."""
    assert metric.instrument == HISTOGRAM, metric.name
    return _METER.create_histogram(
        metric.name,
        unit=metric.unit,
        description=metric.meaning,
        explicit_bucket_boundaries_advisory=list(metric.boundaries) or None,
    )


@cache
def counter(metric: Metric) -> Counter:
    """The monotonic counter of `metric`."""
    assert metric.instrument == COUNTER, metric.name
    return _METER.create_counter(metric.name, unit=metric.unit, description=metric.meaning)


@cache
def gauge(metric: Metric) -> UpDownCounter:
    """The level of `metric`, kept by adding and subtracting, so that several holders sum up."""
    assert metric.instrument == GAUGE, metric.name
    return _METER.create_up_down_counter(metric.name, unit=metric.unit, description=metric.meaning)


@cache
def latest(metric: Metric) -> Gauge:
    """The level of `metric` as this process last saw it."""
    assert metric.instrument == LATEST, metric.name
    return _METER.create_gauge(metric.name, unit=metric.unit, description=metric.meaning)
