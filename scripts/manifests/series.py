"""Names of our metrics as Prometheus shows them: the registry's through the collector, the edge's as written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Final

from gateway.http.metrics import Metrics
from smeltkit.telemetry import names
from smeltkit.telemetry.names import COUNTER, HISTOGRAM, Metric

_NAME = re.compile(r"\b(?:smelt|gen_ai|rpc)_[a-z0-9_]+\b")
_UNITS = {"s": "_seconds"}
"""Units of the registry that become part of a name; one in braces only says what is counted."""


def base_name(metric: Metric) -> str:
    """Dots become `_`, a unit of seconds ends the name with `_seconds`, a counter with `_total`."""
    name = metric.name.replace(".", "_") + _UNITS.get(metric.unit, "")
    return f"{name}_total" if metric.instrument == COUNTER else name


def _level(metric: Metric) -> str:
    """Its sum over all pods; 0 before the first request, and no value where nothing comes through the collector."""
    return f"(sum({base_name(metric)}) or 0 * sum({ARRIVES}))"


ARRIVES: Final = f"{base_name(names.RPC_SERVER_DURATION)}_count"
"""Has a value while any service's metrics arrive, for probes of health are calls too: an idle platform has it."""

RECORDED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "smelt_inference_load": " + ".join(map(_level, (names.QUEUE_DEPTH, names.RUNNING, names.ROUTE_WAITING))),
        "smelt_inference_load_tokens": _level(names.TOKENS_IN_FLIGHT),
    }
)
"""Series that rules compute, with their expression. The load of inference is what its scalers follow: in requests, as
short ones fill slots and not memory, and in tokens, as few long ones do the reverse. Who waits where no replica runs is
counted by whom it asked."""


@cache
def all_series() -> frozenset[str]:
    """Every series that Prometheus may be asked for."""
    found: set[str] = set(RECORDED)
    for metric in names.metrics().values():
        found |= set(_parts(base_name(metric), metric.instrument == HISTOGRAM))
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", Metrics().render(), re.MULTILINE):
        found |= set(_parts(name, kind == "histogram"))
    return frozenset(found)


@cache
def all_labels() -> frozenset[str]:
    """Every attribute that a series may have as a label."""
    return frozenset(name.replace(".", "_") for name in names.attributes())


def unknown_series(value: object) -> list[str]:
    """Names in `value` (any JSON value) that look like ours and are no series and no label: misspelt, or gone."""
    return sorted(set(_NAME.findall(json.dumps(value))) - all_series() - all_labels())


def _parts(name: str, is_histogram: bool) -> Iterator[str]:
    yield from (f"{name}{part}" for part in ("_bucket", "_sum", "_count")) if is_histogram else (name,)
