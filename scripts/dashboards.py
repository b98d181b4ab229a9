"""The dashboard of the platform, one panel a metric: `python -m scripts.dashboards` makes it from the registry.

Histograms show their median, 95th and 99th percentile, counters their rate, gauges their sum; what is told apart is the
attribute of the metric that a person asks about first. The sandbox sends nothing, so its own metric has no panel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from scripts.manifests.render import ROOT, TREE
from scripts.manifests.series import base_name
from smeltkit.telemetry import names
from smeltkit.telemetry.names import COUNTER, GAUGE, LATEST, Metric

PATH = TREE / "components" / "monitoring" / "dashboard.json"
NOT_SENT: Final = frozenset({names.VERDICTS.name})
_TOLD_APART: Final[Mapping[str, str]] = {
    names.RPC_SERVER_DURATION.name: "service_name",
    names.RPC_CLIENT_DURATION.name: "rpc_method",
    names.GEN_AI_TOKENS.name: "gen_ai_token_type",
    names.JOB_AGE.name: "smelt_service",
    names.LEASES_LOST.name: "smelt_service",
    names.JOB_WAIT.name: "smelt_service",
    names.JOBS_DEAD.name: "smelt_service",
    names.DEPENDENCY_FAILURES.name: "error_type",
    names.FALLBACKS.name: "smelt_service",
}
_UNITS: Final[Mapping[str, str]] = {"s": "s"}
_EDGE: Final[Sequence[tuple[str, str, str, str]]] = (
    (
        "Requests at the edge",
        "reqps",
        "sum by (route, status) (rate(smelt_http_requests_total[5m]))",
        "{{route}} {{status}}",
    ),
    ("Requests being answered", "short", "sum(smelt_http_requests_in_flight)", "requests"),
    (
        "Duration at the edge, p95",
        "s",
        "histogram_quantile(0.95, sum by (le, route) (rate(smelt_http_request_duration_seconds_bucket[5m])))",
        "{{route}}",
    ),
    ("Tokens for clients of the edge", "short", "sum by (kind) (rate(smelt_http_tokens_total[5m]))", "{{kind}}"),
)
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    panels = [_panel(title, unit, "", [(query, legend)]) for title, unit, query, legend in _EDGE]
    panels += [_metric_panel(metric) for name, metric in sorted(names.metrics().items()) if name not in NOT_SENT]
    for index, panel in enumerate(panels):
        row, column = divmod(index, _COLUMNS)
        panel |= {"id": index + 1, "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}}
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"}
    return {
        "uid": "smelt",
        "title": "Smelt",
        "tags": ["smelt"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [source]},
        "panels": panels,
    }


def render() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=1) + "\n"


def main() -> int:
    """Writes, or compares."""
    if "--check" not in sys.argv:
        PATH.write_text(render())
    elif PATH.read_text() != render():
        print(f"{PATH.relative_to(ROOT)} is stale; run python -m scripts.dashboards")
        return 1
    return 0


def _metric_panel(metric: Metric) -> dict[str, Any]:
    series, label = base_name(metric), _TOLD_APART.get(metric.name, "")
    legend = f" {{{{{label}}}}}" if label else ""
    if metric.instrument == GAUGE:
        queries = [(f"sum({series})", "sum")]
    elif metric.instrument == LATEST:
        queries = [(f"max by ({label}) ({series})", legend.strip())]
    elif metric.instrument == COUNTER:
        by = f" by ({label})" if label else ""
        queries = [(f"sum{by} (rate({series}[5m]))", legend.strip() or "rate")]
    else:
        by = f"le, {label}" if label else "le"
        queries = [
            (f"histogram_quantile({share}, sum by ({by}) (rate({series}_bucket[5m])))", f"p{share * 100:g}{legend}")
            for share in (0.5, 0.95, 0.99)
        ]
    return _panel(metric.name, _UNITS.get(metric.unit, "short"), metric.meaning, queries)


def _panel(title: str, unit: str, meaning: str, queries: Sequence[tuple[str, str]]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "type": "timeseries",
        "title": title,
        "description": meaning,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": source, "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(queries)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
