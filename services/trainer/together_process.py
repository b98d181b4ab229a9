"""Several adapters trained on one base in memory, in one process: `... services.trainer.together_process FOLDER`.

    FOLDER/spec.json        the base, and under `runs` what each adapter is to be
    FOLDER/N/               checkpoints, metrics and bundle of the Nth, as a training of its own has them
    FOLDER/metrics.jsonl    the steps of all of them, in the order in which they were done
    FOLDER/outcome.json     last of all: under `runs` what each reached, or its error by its reason

A step belongs to one adapter: only its layers are on the base, the random state is its own, and so are optimizer,
schedule and data. What it computes is therefore what it would compute alone, to the bit where the device is
deterministic, and memory holds the base and the activations of one adapter's pack. The next step is that of whichever
has done the smallest share of its own: all come to their end together. An adapter that fails leaves the others running.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from services.trainer.adapters.attach import attach
from services.trainer.adapters.turns import Turns
from services.trainer.costs.forecast import forecast
from services.trainer.costs.paces import Paces
from services.trainer.costs.peak import PeakMemory
from services.trainer.parallel.launch import error_of, tell_preparing
from services.trainer.plan import Prepared, prepare
from services.trainer.run.device import device_name, matrix_flops, prepare_device
from services.trainer.run.heldout import HeldoutCourse
from services.trainer.run.loop import Run, StepReport
from services.trainer.settings.training import parse_settings
from services.trainer.tracking.journal import Journal, open_journal
from services.trainer.tracking.records import METRICS_FILE
from services.trainer.train_process import (
    begin_course,
    conclude,
    load_base,
    make_run,
    measured_after,
    taken,
    write_outcome,
)
from smeltkit.errors import JobCancelled, SmeltError
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_nf4 import quantize_linears
from smeltkit.ml.lineage import Lineage


class Lane:
    """One adapter's training on a base that others use in turn. Nothing of it is on the base between its turns."""

    def __init__(
        self, name: str, decoder: Decoder, prepared: Prepared, folder: Path, run_digest: str, peak: PeakMemory,
        course: HeldoutCourse | None,
    ) -> None:  # fmt: skip
        """Begins as a training of its own begins, or goes on from the newest checkpoint in `folder`."""
        self.name, self.prepared, self.folder = name, prepared, folder
        torch.manual_seed(prepared.settings.seed)
        attach(decoder, prepared.settings.adapter)
        self.run: Run = make_run(folder, run_digest, prepared, decoder, peak, course=course)
        self._course, self._steps = course, self.run.steps(prepared.end_step)
        self._why = self._why_stop() if self.run.step < prepared.end_step else ""
        self._turns = Turns(decoder)

    @property
    def end_step(self) -> int:
        """Step that it ends or pauses at, as far as is known."""
        return self.run.step if self._why else self.prepared.end_step

    @property
    def share(self) -> float:
        """How much of its steps is done."""
        return self.run.step / self.end_step

    def step(self) -> tuple[StepReport, dict[str, Any]] | None:
        """Does the next step, and what is measured after it; None once all are done and saved."""
        with self._turns.turn():
            if self._why:
                self.run.save()
                return None
            report = next(self._steps, None)
            if report is None:
                return None
            measured = measured_after(self.run, report, self._course, self.prepared.settings)
            if measured and report.step < self.prepared.end_step:
                self._why = self._why_stop()
            return report, measured

    def save(self) -> None:
        """Writes a checkpoint."""
        with self._turns.turn():
            self.run.save()

    def finish(self, base: Path) -> dict[str, Any]:
        """Measures what it reached and writes its bundle, see `train_process`."""
        run = self.run
        with self._turns.turn():
            told = conclude(
                self.folder, base, self.prepared, run.decoder, self._course,
                step=run.step, tokens=run.cost.tokens, why=self._why,
            )  # fmt: skip
            return {**taken(run), **told}

    def _why_stop(self) -> str:
        return self._course.why_stop(self.prepared.settings) if self._course is not None else ""


def main(folder: Path) -> int:
    """0 with an outcome, 1 with an error in outcome.json."""
    spec = json.loads((folder / "spec.json").read_text())
    return write_outcome(folder, lambda: train(folder, spec))


def train(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Trains every adapter of the spec; their outcomes or errors, in its order, under `runs`."""
    base = Path(spec["base"])
    bundle = Bundle.from_folder(base, lineage=Lineage.from_dict(spec["lineage"]), licence=spec["licence"])
    found = [_prepare(base, bundle, run) for run in spec["runs"]]
    tell_preparing(folder, "measures the pace of a step")
    paces = Paces(Path(spec["paces"]), spec["threads"])
    said = [(pace := paces.of(prepared)) and forecast(pace, prepared.tokens) for prepared in found]
    tell_preparing(folder, "loads the base, measures what is held out, tries the longest packs")
    device = prepare_device(spec["threads"], memory_bytes=spec.get("gpu_bytes", 0))
    rate = matrix_flops(device, getattr(torch, found[0].settings.dtype))
    peak = PeakMemory(device)
    decoder = load_base(base, found[0], device)
    courses = [begin_course(_own(folder, number), one, decoder) for number, one in enumerate(found)]
    if found[0].settings.method == "qlora":
        quantize_linears(decoder)
    lanes = [
        Lane(run["name"], decoder, prepared, _own(folder, number), run["run_digest"], peak, course)
        for number, (prepared, run, course) in enumerate(zip(found, spec["runs"], courses, strict=True))
    ]
    journals = {
        lane: open_journal(lane.folder, {**spec, **run}, lane.prepared, lane.run.step, rate)
        for lane, run in zip(lanes, spec["runs"], strict=True)
    }
    errors = run_lanes(folder, journals)
    facts = {"device": device_name(device), "matrix_flops": rate}
    outcomes = []
    for lane, forecasted in zip(lanes, said, strict=True):
        error = errors.get(lane)
        reached = error_of(error) if error else {**facts, **lane.finish(base), "exports": journals[lane].exported}
        outcomes.append({"forecast": forecasted and asdict(forecasted), **reached})
    return {"runs": outcomes}


def run_lanes(folder: Path, journals: Mapping[Lane, Journal]) -> dict[Lane, SmeltError]:
    """Takes the lanes to their ends, turn by turn; those that failed, with why. JobCancelled after SIGTERM."""
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
    errors: dict[Lane, SmeltError] = {}
    running = list(journals)
    with (folder / METRICS_FILE).open("w") as told:
        while running:
            lane = min(running, key=lambda lane: lane.share)
            try:
                done = lane.step()
            except SmeltError as error:
                errors[lane] = error
                running.remove(lane)
                journals[lane].close(is_finished=False)
                continue
            if done is None:
                running.remove(lane)
                journals[lane].close(is_finished=True)
                continue
            step, steps = sum(one.run.step for one in journals), sum(one.end_step for one in journals)
            line = {**journals[lane].write(*done), "step": step, "steps": steps, "name": lane.name}
            told.write(json.dumps(line) + "\n")
            told.flush()
            if stops:
                for one in running:
                    journals[one].close(is_finished=False)
                    if one.run.step:
                        one.save()
                raise JobCancelled(f"stopped after step {step} of all adapters, which is saved")
    return errors


def _prepare(base: Path, bundle: Bundle, run: dict[str, Any]) -> Prepared:
    heldout = Path(run["heldout"]) if run["heldout"] else None
    data = [Path(path) for path in run["data"]]
    prepared = prepare(base, bundle, data, heldout, parse_settings(json.dumps(run["settings"])))
    for refusal in prepared.refusals:
        raise refusal
    return prepared


def _own(folder: Path, number: int) -> Path:
    own = folder / str(number)
    own.mkdir(exist_ok=True)
    return own


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
