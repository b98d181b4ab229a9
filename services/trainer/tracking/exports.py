"""A training's numbers for other tools: event files of TensorBoard, runs of MLflow.

Both are written by libraries of their own, in a thread beside the training: a step only puts its numbers into a queue.
What a tool refuses, and what does not fit into the queue of one that is too slow, costs the training nothing; the
outcome tells how many steps reached it and what went wrong. Where they go to is said by whoever runs the trainer, never
by the training's file.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from services.trainer.settings.alerts import ALERT_METRICS
from services.trainer.settings.exports import ExportSettings
from services.trainer.settings.training import OBSERVING, TrainSettings
from smeltkit import limits
from smeltkit.errors import NotBuilt, SmeltError, UnsupportedOption

_log = logging.getLogger(__name__)
_NEEDS: Final = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
"""Tool to the module that its extra installs."""
_SETTING: Final = {"tensorboard": "TENSORBOARD_DIR", "mlflow": "MLFLOW_URI"}
_NAMES: Final = (*ALERT_METRICS, "memory_bytes", "tokens", "heldout")
"""What is exported of a step."""
_END: Final[dict[str, Any]] = {}

Destinations = Mapping[str, str]
"""Tool to where the trainer lets it write, a folder or an address; empty where it does not."""


class Sink(Protocol):
    """One tool. Its methods may raise anything: see `Exports`."""

    def write(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Takes steps in, in their order."""

    def close(self, is_finished: bool) -> None:
        """Makes sure that all of them are stored."""


class TensorBoard:
    """Event files in a folder, by the library of TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self._events = import_module("tensorboard.compat.proto.event_pb2")
        self._summaries = import_module("tensorboard.compat.proto.summary_pb2")
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter(str(folder))

    def write(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """A scalar for each number of a step."""
        for step in steps:
            values = [
                self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in _numbers(step).items()
            ]
            summary = self._summaries.Summary(value=values)
            self._writer.add_event(self._events.Event(wall_time=step["at_s"], step=step["step"], summary=summary))

    def close(self, is_finished: bool) -> None:
        """Ends the file."""
        self._writer.close()


class Mlflow:
    """A run of an experiment at an MLflow server, or in a folder or database of it; the same one for each attempt."""

    def __init__(self, uri: str, experiment: str, job_id: str, name: str, parameters: Mapping[str, Any]) -> None:
        self._entities = import_module("mlflow.entities")
        self._client = import_module("mlflow.tracking").MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(experiment)
        id = known.experiment_id if known else self._client.create_experiment(experiment)
        told = f"tags.smelt_job = '{job_id}' and tags.smelt_name = '{name}'"
        found = self._client.search_runs([id], filter_string=told, max_results=1)
        if found:
            self._run = found[0].info.run_id
            return
        tags = {"smelt_job": job_id, "smelt_name": name}
        self._run = self._client.create_run(id, run_name=name, tags=tags).info.run_id
        told_once = [self._entities.Param(key, str(value)) for key, value in parameters.items()]
        self._client.log_batch(self._run, params=told_once)

    def write(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """A metric for each number of a step."""
        metrics = [
            self._entities.Metric(name, value, round(step["at_s"] * 1000), step["step"])
            for step in steps
            for name, value in _numbers(step).items()
        ]
        for first in range(0, len(metrics), limits.EXPORT_BATCH_MAX):
            self._client.log_batch(self._run, metrics=metrics[first : first + limits.EXPORT_BATCH_MAX])

    def close(self, is_finished: bool) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run, "FINISHED" if is_finished else "KILLED")


class Exports:
    """Hands the steps of one training to its tools. `made` is tool to what makes its sink, in the thread."""

    def __init__(self, made: Mapping[str, Callable[[], Sink]]) -> None:
        self._threads = [_Export(name, make) for name, make in made.items()]

    def put(self, step: Mapping[str, Any]) -> None:
        """Takes a step in, without waiting for anybody."""
        line = {**step, "at_s": time.time()}
        for one in self._threads:
            one.put(line)

    def close(self, is_finished: bool) -> dict[str, dict[str, Any]]:
        """Ends all of them, within EXPORT_CLOSE_S; tool to how many steps it took, how many it missed, and why."""
        return {one.name: one.close(is_finished) for one in self._threads}


class _Export:
    """One tool in a thread of its own."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self.name, self._make = name, make
        self._steps: queue.Queue[Mapping[str, Any]] = queue.Queue(limits.EXPORT_QUEUE_MAX)
        self._put, self._written, self._error = 0, 0, ""
        self._is_finished = False
        self._thread = threading.Thread(target=self._run, name=f"export-{name}", daemon=True)
        self._thread.start()

    def put(self, step: Mapping[str, Any]) -> None:
        self._put += 1
        try:
            self._steps.put_nowait(step)
        except queue.Full:
            self._error = self._error or "too slow: its queue was full"

    def close(self, is_finished: bool) -> dict[str, Any]:
        self._is_finished = is_finished
        deadline_s = time.monotonic() + limits.EXPORT_CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline_s:
            with suppress(queue.Full):
                self._steps.put(_END, timeout=limits.EXPORT_POLL_S)
                break
        self._thread.join(max(deadline_s - time.monotonic(), 0))
        if self._thread.is_alive():
            self._error = self._error or f"it did not end within {limits.EXPORT_CLOSE_S:g} s"
        return {"steps": self._written, "missed": self._put - self._written, "error": self._error}

    def _run(self) -> None:
        try:
            sink = self._make()
            while self._take(sink):
                pass
            sink.close(self._is_finished)
        except Exception as error:  # a foreign library: whatever it raises must not end the training
            self._error = f"{type(error).__name__}: {error}"[:300]
            _log.warning("%s takes no more steps: %s", self.name, self._error)

    def _take(self, sink: Sink) -> bool:
        """Writes what waits; False once the end is among it."""
        steps = [self._steps.get()]
        while len(steps) < limits.EXPORT_BATCH_MAX and not self._steps.empty():
            steps.append(self._steps.get())
        wanted = [step for step in steps if step is not _END]
        if wanted:
            sink.write(wanted)
        self._written += len(wanted)
        return len(wanted) == len(steps)


def refusals(settings: ExportSettings, destinations: Destinations) -> list[SmeltError]:
    """Why a training cannot be exported as it asks."""
    found: list[SmeltError] = []
    for tool in asked(settings):
        if not destinations.get(tool):
            found.append(
                UnsupportedOption(
                    f"export.{tool}: this trainer does not say where to; set SMELT_TRAINER_{_SETTING[tool]} for it, or"
                    " remove the key"
                )
            )
        elif find_spec(_NEEDS[tool]) is None:
            found.append(
                NotBuilt(f"export.{tool} needs an extra that the trainer lacks: pip install 'smelt[{tool}]' there")
            )
    return found


def asked(settings: ExportSettings) -> list[str]:
    """The tools that a training asks for."""
    return [tool for tool in _NEEDS if getattr(settings, tool)]


def open_exports(settings: TrainSettings, told: Mapping[str, Any]) -> Exports:
    """The exports of a training; none where it asks for none. `told` holds its `job_id`, `name` and `destinations`.

    Event files lie below the job's id, in a folder for each name.
    """
    where: Destinations = told.get("destinations", {})
    job_id, name = told.get("job_id", ""), told.get("name", "")
    parameters = {key: value for key, value in asdict(settings).items() if key not in OBSERVING}
    known: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoard(Path(where["tensorboard"]) / job_id / name.replace("/", "_")),
        "mlflow": lambda: Mlflow(where["mlflow"], settings.export.mlflow, job_id, name, parameters),
    }
    return Exports({tool: known[tool] for tool in asked(settings.export)})


def _numbers(step: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(step[name]) for name in _NAMES if step.get(name) is not None}
