"""The file of a run's steps: written by the process that makes them, before anybody is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from services.trainer.costs.flops import model_flops
from services.trainer.costs.peak import memory_bytes
from services.trainer.plan import Prepared
from services.trainer.run.loop import StepReport
from services.trainer.stages import Transition
from services.trainer.tracking.alerts import Alerts
from services.trainer.tracking.exports import Exports, open_exports
from services.trainer.tracking.records import METRICS_FILE


class Journal:
    """A line for each step, with its MFU and its alerts; handed on to the exports."""

    def __init__(
        self, path: Path, step: int, prepared: Prepared, *, rate: float, memory_bytes: int, exports: Exports
    ) -> None:
        """Goes on after `step`; `rate` is that of a matrix product in FLOP/s, see `flops`, and a run may take
        `memory_bytes` at most."""
        self._prepared, self._rate, self._memory_bytes = prepared, rate, memory_bytes
        self._alerts, self._exports = Alerts(prepared.settings.alerts), exports
        for line in _kept_until(path, step):
            self._alerts.judge(line)
        self._file = path.open("a")
        self.exported: dict[str, dict[str, Any]] = {}
        """What became of each export, once it is closed; see `Exports.close`."""

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(is_finished=kind is None)

    def close(self, *, is_finished: bool) -> None:
        """Ends the file, and the exports."""
        self._file.close()
        self.exported = self._exports.close(is_finished)

    def write(self, report: StepReport, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes a step, with what was `measured` after it; what was written."""
        lengths = [self._prepared.order.lengths[number] for number in report.sample_ids]
        flops = model_flops(self._prepared.config, lengths, is_adapted=self._prepared.settings.is_adapted)
        line = {
            **asdict(report),
            "mfu": flops * report.tokens_per_second / sum(lengths) / self._rate,
            "memory_share": report.memory_bytes / self._memory_bytes,
            **(measured or {}),
        }
        if self._prepared.order.enters(report.step - 1):
            line["entered"] = asdict(
                Transition.of(self._prepared.stages, report.stage, report.step, report.heldout_loss)
            )
        if alerts := [alert.to_dict() for alert in self._alerts.judge(line)]:
            line["alerts"] = alerts
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._exports.put(line)
        return line


def open_journal(folder: Path, spec: Mapping[str, Any], prepared: Prepared, step: int, rate: float) -> Journal:
    """The journal of a run in `folder` that has done `step` steps, as its process was told by `spec`.

    `rate` is that of one device.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Journal(
        folder / METRICS_FILE,
        step,
        prepared,
        rate=rate * prepared.settings.processes,
        memory_bytes=memory_bytes(device, spec.get("gpu_bytes", 0)),
        exports=open_exports(prepared.settings, spec.get("exports", {})),
    )


def _kept_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines up to a step; those of later ones, which will be done again, are dropped from the file."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    kept = [(line, value) for line in lines if (value := json.loads(line))["step"] <= step]
    if len(kept) < len(lines):
        path.write_text("".join(line for line, _ in kept))
    return [value for _, value in kept]
