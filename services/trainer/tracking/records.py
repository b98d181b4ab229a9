"""The record of a training as an artifact about the bundle it made: what went in, what it took beside its forecast, how
it went, and every step.

The bundle itself holds nothing that differs from run to run, so that equal trainings give equal digests; this does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from smelt.event.v1 import event_pb2

from services.trainer.costs.forecast import Cost, missed
from services.trainer.run.measured import HELDOUT_FILE, Measured, read_course
from services.trainer.run.noise import advice, noise_scale
from services.trainer.run.scaling import outlook
from services.trainer.tracking.events import to_alert
from smeltkit import limits
from smeltkit.blobs.store import Store
from smeltkit.errors import BadRequest, UnknownArtifact
from smeltkit.manifest import RUN_TYPE, Descriptor, Manifest
from smeltkit.ml.lineage import Lineage

METRICS_FILE = "metrics.jsonl"
_REFS: Final = "runs/"


def store_run(
    store: Store, folder: Path, job_id: str, name: str, bundle: Manifest, outcome: Mapping[str, Any]
) -> event_pb2.TrainingFinished:
    """Stores the record of the run in `folder` that made `bundle` and said `outcome`; what was recorded.

    `name` is the one that the bundle was made for, empty if none.
    """
    path = folder / METRICS_FILE
    layers = tuple(_layer(store, found) for found in (path, folder / HELDOUT_FILE) if found.is_file())
    said, took = outcome["forecast"], outcome["cost"]
    lineage = Lineage.from_dict(bundle.config["lineage"])
    config = {
        "job": job_id,
        "name": name,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "base": lineage.inputs[0],
        "data": list(lineage.inputs[1:]),
        "settings": lineage.parameters["settings"],
        "code_revision": lineage.code_revision,
        "device": outcome["device"],
        "forecast": said,
        "cost": took,
        "missed": list(missed(Cost(**said), Cost(**took))) if said else [],
        "packing": outcome["packing"],
        "spikes": outcome["spikes"],
        "heldout": outcome.get("heldout"),
        "alerts": [*_alerts(path), *outcome["alerts"]][-limits.TRAIN_ALERTS_MAX :],
        "exports": outcome["exports"],
        "stages": _stages(path, outcome),
        "stopped": outcome.get("stopped"),
        "best": outcome.get("best"),
        "together": outcome.get("together", 1),
        **_summary(path, outcome["matrix_flops"]),
    }
    config |= _prospects(read_course(folder / HELDOUT_FILE), config)
    manifest = Manifest(artifact_type=RUN_TYPE, config=config, layers=layers, subject=bundle.digest)
    store.put_ref(_ref(bundle.digest), store.put_manifest(manifest))
    return _to_message(manifest)


def read_run(store: Store, bundle_digest: str) -> event_pb2.TrainingFinished:
    """The record of the newest training that made a bundle; UnknownArtifact if there is none."""
    digest = store.get_ref(_ref(bundle_digest))
    if digest is None:
        raise UnknownArtifact(f"no training of {bundle_digest} is recorded; it was made by other means, or elsewhere")
    return _to_message(store.get_manifest(digest))


def list_runs(store: Store, limit: int) -> list[Manifest]:
    """Records of the trainings that made the bundles there are, newest first; at most `limit`, 0 for RUNS_LISTED."""
    if not 0 <= limit <= limits.RUNS_LISTED_MAX:
        raise BadRequest(f"limit={limit} must be 0 to {limits.RUNS_LISTED_MAX}")
    digests = (store.get_ref(name) for name in store.list_refs(_REFS))
    found = [store.get_manifest(digest) for digest in digests if digest is not None]
    found.sort(key=lambda run: (run.config.get("finished_at", ""), run.digest), reverse=True)
    return found[: limit or limits.RUNS_LISTED]


def _summary(path: Path, matrix_flops: float) -> dict[str, Any]:
    """What the steps say together: speed by all their seconds, MFU by each one's share of them; None without a step."""
    losses, took_s, used_s, tokens, learnt = [], 0.0, 0.0, 0, 0
    for step in _steps(path):
        step_s = (step["tokens"] - tokens) / step["tokens_per_second"]
        took_s, used_s, tokens = took_s + step_s, used_s + step_s * step["mfu"], step["tokens"]
        losses.append(step["loss"])
        learnt += step["counted"]
    return {
        "steps": len(losses),
        "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "tokens_per_second": tokens / took_s if losses else None,
        "mfu": used_s / took_s if losses else None,
        "matrix_flops": matrix_flops,
        "noise_scale": noise_scale(_steps(path)),
        "step_tokens": learnt / len(losses) if losses else None,
    }


def _prospects(course: Sequence[Measured], run: Mapping[str, Any]) -> dict[str, Any]:
    """The held-out course of a run, what follows from it for more tokens, and what to do otherwise next time."""
    expected = outlook(course, run["tokens_per_second"])
    scale, batch = run["noise_scale"], run["step_tokens"]
    told = [advice(scale, batch) if scale and batch else "", expected.advice if expected else ""]
    return {
        "course": [{"step": one.step, "tokens": one.tokens, "loss": one.loss} for one in course],
        "outlook": expected.to_dict() if expected else None,
        "advice": [text for text in told if text],
    }


def _layer(store: Store, path: Path) -> Descriptor:
    digest, size_bytes = store.put_file(path)
    return Descriptor(media_type="application/x-ndjson", digest=digest, size_bytes=size_bytes, path=path.name)


def _stages(path: Path, outcome: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was done of each stage that the run came to: data, steps, tokens, its first and last loss, and the held-out
    loss at its end; None without any."""
    found: list[dict[str, Any]] = []
    last = outcome["heldout"]["after"] if "heldout" in outcome else None
    seen = 0
    for step in _steps(path):
        if step["stage"] > len(found):
            if found:
                found[-1]["heldout_loss"] = step["entered"]["heldout_loss"]
            begun = {"data": outcome["stages"][len(found)], "steps": 0, "tokens": 0, "heldout_loss": last}
            found.append({**begun, "loss": {"first": step["loss"]}})
        found[-1]["steps"] += 1
        found[-1]["tokens"] += step["tokens"] - seen
        found[-1]["loss"]["last"] = step["loss"]
        seen = step["tokens"]
    return found


def _alerts(path: Path) -> list[dict[str, Any]]:
    return [alert for step in _steps(path) for alert in step.get("alerts", ())]


def _steps(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)


def _to_message(manifest: Manifest) -> event_pb2.TrainingFinished:
    config = manifest.config
    said, spikes = config["forecast"], config["spikes"]
    return event_pb2.TrainingFinished(
        job_id=config["job"],
        bundle_digest=manifest.subject,
        run_digest=manifest.digest,
        forecast=event_pb2.TrainingFinished.Cost(**said) if said else None,
        outcome=event_pb2.TrainingFinished.Cost(**config["cost"]),
        missed=config["missed"],
        clipped=spikes["clipped"],
        skipped=spikes["skipped"],
        rollbacks=spikes["rollbacks"],
        alerts=[to_alert(alert, config["job"]) for alert in config.get("alerts", ())],
    )


def _ref(bundle_digest: str) -> str:
    return f"{_REFS}{bundle_digest.removeprefix('sha256:')}/newest"
