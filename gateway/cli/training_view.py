"""What a training took, beside what its plan said, and what it changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from gateway.cli.output import human_bytes, human_time, table


def run_view(run: Mapping[str, Any]) -> RenderableType:
    """Forecast against outcome, a line each; what was not forecast is told as n/a.

    `run` holds `forecast`, `outcome`, `missed` and the counts of spikes.
    """
    shown = {"time_s": ("time of all steps", human_time), "memory_bytes": ("peak memory", human_bytes),
             "tokens": ("tokens", "{:,}".format)}  # fmt: skip
    rows = []
    for field, (name, human) in shown.items():
        took = run["outcome"][field]
        if not run["forecast"]:
            rows.append((name, "n/a", human(took), ""))
            continue
        said = run["forecast"][field]
        off = f"{(took - said) / said:+.1%}" + (" (missed)" if field in run["missed"] else "")
        rows.append((name, human(said), human(took), off))
    rows += [("alert", "", alert["message"], "") for alert in run.get("alerts") or ()]
    spikes = f"{run['clipped']} clipped, {run['skipped']} dropped, {run['rollbacks']} rollbacks"
    rows.append(("spikes", "", spikes, ""))
    return table(("", "forecast", "outcome", "off by"), rows)


def heldout_text(found: Mapping[str, Any]) -> str:
    """Held-out loss before and after, its change with the interval, and what that shows."""
    change = f"{found['change']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}] over {found['rows']} samples"
    judged = "better" if found["high"] < 0 else "worse" if found["low"] > 0 else "no difference shown"
    return f"{found['before']:.4f} -> {found['after']:.4f}, {change}: {judged}"
