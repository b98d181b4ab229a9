"""Runs of trainings as documents and tables: what went in, how the loss went, what it took, how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from rich.console import RenderableType
from smelt.artifact.v1 import artifact_pb2

from gateway.cli.output import facts, human_bytes, human_time, measured, short_digest, table
from gateway.cli.training_view import heldout_text, run_view

LEVELS: Final = "".join(chr(code) for code in range(0x2581, 0x2589))
"""Eight blocks, from low to high."""
WIDTH: Final = 60
_OUTCOMES: Final = ("loss", "heldout", "tokens_per_second", "mfu", "noise_scale")
_INPUTS: Final = ("base", "data", "code_revision", "device")


def run_document(run: artifact_pb2.Artifact) -> dict[str, Any]:
    """The record of a run for machines; keys that an older record lacks are left out."""
    config: dict[str, Any] = json.loads(run.config_json)
    config["outcome"] = config.pop("cost")
    return {"digest": run.digest, "bundle": run.subject, **config}


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """A series as at most `width` blocks, each the mean of its part; empty for no values."""
    count = min(width, len(values))
    edges = [len(values) * number // max(count, 1) for number in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(LEVELS[round((mean - low) * scale)] for mean in means)


def runs_view(runs: Iterable[Mapping[str, Any]]) -> RenderableType:
    """A line a run."""
    rows = (
        (
            measured(run.get("name")),
            run.get("settings", {}).get("method", "-"),
            measured(run.get("steps")),
            _loss(run),
            _heldout(run),
            human_time(run["outcome"]["time_s"]),
            _speed(run),
            _mfu(run),
            human_bytes(run["outcome"]["memory_bytes"]),
            run.get("finished_at", "-"),
            short_digest(run["digest"]),
        )
        for run in runs
    )
    columns = ("name", "method", ">steps", ">loss", ">held-out loss", ">time", ">tokens/s", ">MFU", ">memory")
    return table((*columns, "finished", "run"), rows)


def run_views(run: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """Everything about a run: what went in, the course of its loss, what it took."""
    losses = [step["loss"] for step in curve]
    heldout = run.get("heldout")
    known = facts(
        [
            ("run", run["digest"]),
            ("bundle", run["bundle"]),
            ("name", run.get("name", "")),
            ("base", run.get("base", "")),
            ("data", ", ".join(_training_data(run))),
            ("held-out data", ", ".join(_heldout_data(run))),
            ("device", run.get("device", "")),
            ("code", run.get("code_revision", "")),
            ("finished", run.get("finished_at", "")),
            ("loss", f"{sparkline(losses)} {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else ""),
            ("held-out loss", heldout_text(heldout) if heldout else ""),
            ("tokens/s", _speed(run)),
            ("MFU", _mfu(run)),
            ("packing", ", ".join(f"{share:.1%}" for share in run.get("packing", ()))),
            ("held out, on the way", _course(run)),
            ("gradient noise scale", _noise(run)),
            *(("advice", text) for text in run.get("advice", ())),
            ("stopped early", _stopped(run)),
            ("weights of", _best(run)),
            *((f"exported to {tool}", _exported(found)) for tool, found in run.get("exports", {}).items()),
        ]
    )
    settings = facts((key, value) for key, value in flat(run.get("settings", {})).items())
    taken = {**run, **run["spikes"]}
    stages = run.get("stages", [])
    return [known, "", *([_stages(stages), ""] if len(stages) > 1 else []), run_view(taken), "", "settings", settings]


def _stages(stages: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A line a stage of a run."""
    rows = (
        (
            number,
            _text(stage["data"]),
            stage["steps"],
            f"{stage['tokens']:,}",
            f"{stage['loss']['first']:.4f} -> {stage['loss']['last']:.4f}",
            measured(None if stage["heldout_loss"] is None else f"{stage['heldout_loss']:.4f}"),
        )
        for number, stage in enumerate(stages, start=1)
    )
    return table((">stage", "data", ">steps", ">tokens", ">loss", ">held-out loss at its end"), rows)


def diff_document(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Where two runs differ: settings and other inputs as [first, second], outcomes of both in any case."""
    settings = [flat(run.get("settings", {})) for run in (one, other)]
    keys = sorted(settings[0].keys() | settings[1].keys())
    pairs = {key: [found.get(key) for found in settings] for key in keys}
    return {
        "runs": [one["digest"], other["digest"]],
        "settings": {key: pair for key, pair in pairs.items() if pair[0] != pair[1]},
        "inputs": {key: [one.get(key), other.get(key)] for key in _INPUTS if one.get(key) != other.get(key)},
        "outcomes": {
            **{key: [one.get(key), other.get(key)] for key in _OUTCOMES},
            **{key: [one["outcome"][key], other["outcome"][key]] for key in one["outcome"]},
        },
        "is_same_training_data": _training_data(one) == _training_data(other) != [],
        "is_same_heldout_data": _heldout_data(one) == _heldout_data(other) != [],
    }


def diff_views(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[RenderableType]:
    """The differences as tables, and what must not be compared."""
    found = diff_document(one, other)
    names = [run.get("name") or short_digest(run["digest"]) for run in (one, other)]
    inputs = {**found["settings"], **found["inputs"]}
    rows = [(key, *map(_text, pair)) for key, pair in inputs.items()]
    views: list[RenderableType] = [table(("differs", *names), rows)] if rows else ["nothing that went in differs"]
    views += ["", table(("", *names), ((title, tell(one), tell(other)) for title, tell in _COMPARED.items()))]
    if not found["is_same_training_data"]:
        views.append("the training data differ: losses of training cannot be compared")
    if not found["is_same_heldout_data"]:
        views.append("no held-out data in common: held-out losses cannot be compared")
    return views


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def _training_data(run: Mapping[str, Any]) -> list[str]:
    """Digests of the data that were trained on, in their order."""
    count = sum(len(stage["data"]) for stage in run.get("stages", []))
    return list(run.get("data", []))[: count or 1]


def _heldout_data(run: Mapping[str, Any]) -> list[str]:
    """Digest of the data that only measured, if there were any."""
    return list(run.get("data", []))[len(_training_data(run)) :]


def _loss(run: Mapping[str, Any]) -> str:
    loss = run.get("loss")
    return f"{loss['first']:.4f} -> {loss['last']:.4f}" if loss else "-"


def _heldout(run: Mapping[str, Any]) -> str:
    found = run.get("heldout")
    if not found:
        return "-"
    return f"{found['after']:.4f} ({found['change']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}])"


def _speed(run: Mapping[str, Any]) -> str:
    speed = run.get("tokens_per_second")
    return f"{speed:,.0f}" if speed else "-"


def _mfu(run: Mapping[str, Any]) -> str:
    """A share above one tells of the measured rate, not of the run; a record tells it as it was stored."""
    value = run.get("mfu")
    if value is None:
        return "-"
    return f"{value:.1%}" if value <= 1 else f"{value:.1%}, of a rate that was measured on a busy machine"


def _noise(run: Mapping[str, Any]) -> str:
    value = run.get("noise_scale")
    return f"{value:,.0f} learnt tokens" if value else "-"


def _course(run: Mapping[str, Any]) -> str:
    """The held-out losses of a run, or that there are too few to say what more tokens would bring."""
    points = [point["loss"] for point in run.get("course", ())]
    if not points:
        return ""
    law = run.get("outlook")
    told = f"{sparkline(points)} {len(points)} measurements"
    if law is None:
        return f"{told}: too few to say what more tokens would bring, which needs 3 after the first; set heldout_steps"
    return (
        f"{told}; floor {law['floor']:.4f} [{law['floor_low']:.4f}, {law['floor_high']:.4f}], exponent"
        f" {law['exponent']:.2f} [{law['exponent_low']:.2f}, {law['exponent_high']:.2f}]"
    )


def _stopped(run: Mapping[str, Any]) -> str:
    found = run.get("stopped")
    return f"after step {found['step']}: {found['why']}" if found else ""


def _best(run: Mapping[str, Any]) -> str:
    found = run.get("best")
    return f"step {found['step']} of {found['of']} done, where the held-out loss was lowest" if found else ""


_COMPARED: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "loss, first and last": _loss,
    "held-out loss": _heldout,
    "time": lambda run: human_time(run["outcome"]["time_s"]),
    "peak memory": lambda run: human_bytes(run["outcome"]["memory_bytes"]),
    "tokens": lambda run: f"{run['outcome']['tokens']:,}",
    "tokens/s": _speed,
    "MFU": _mfu,
    "gradient noise scale": _noise,
}
"""What two runs are compared by, and how it is told of each."""


def _exported(found: Mapping[str, Any]) -> str:
    missed = f", {found['missed']} missed: {found['error']}" if found["missed"] or found["error"] else ""
    return f"{found['steps']} steps{missed}"


def _text(value: Any) -> str:
    shown = short_digest(value) if isinstance(value, str) and value.startswith("sha256:") else value
    return ", ".join(map(_text, shown)) if isinstance(shown, list) else "-" if shown is None else str(shown)
