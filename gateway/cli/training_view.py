"""What a training took, beside what its plan said."""

from __future__ import annotations

from rich.console import RenderableType
from smelt.event.v1 import event_pb2

from gateway.cli.output import human_bytes, human_time, table


def run_view(run: event_pb2.TrainingFinished) -> RenderableType:
    """Forecast against outcome, a line each; what was not forecast is told as n/a."""
    shown = {"time_s": ("time of all steps", human_time), "memory_bytes": ("peak memory", human_bytes),
             "tokens": ("tokens", "{:,}".format)}  # fmt: skip
    rows = []
    for field, (name, human) in shown.items():
        took = getattr(run.outcome, field)
        if not run.HasField("forecast"):
            rows.append((name, "n/a", human(took), ""))
            continue
        said = getattr(run.forecast, field)
        off = f"{(took - said) / said:+.1%}" + (" (missed)" if field in run.missed else "")
        rows.append((name, human(said), human(took), off))
    spikes = f"{run.clipped} clipped, {run.skipped} dropped, {run.rollbacks} rollbacks"
    rows.append(("spikes", "", spikes, ""))
    return table(("", "forecast", "outcome", "off by"), rows)
