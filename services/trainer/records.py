"""The record of a training: what it took beside its forecast, and every step, as an artifact about the bundle it made.

The bundle itself holds nothing that differs from run to run, so that equal trainings give equal digests; this does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smelt.event.v1 import event_pb2

from services.trainer.forecast import Cost, missed
from smeltkit.blobs.store import Store
from smeltkit.errors import UnknownArtifact
from smeltkit.manifest import RUN_TYPE, Descriptor, Manifest

METRICS_FILE = "metrics.jsonl"


def store_run(
    store: Store, folder: Path, job_id: str, bundle_digest: str, outcome: Mapping[str, Any]
) -> event_pb2.TrainingFinished:
    """Stores the record of the run in `folder`, whose training process said `outcome`; what was recorded."""
    path = folder / METRICS_FILE
    digest, size_bytes = store.put_file(path)
    layer = Descriptor(media_type="application/x-ndjson", digest=digest, size_bytes=size_bytes, path=METRICS_FILE)
    said, took = outcome["forecast"], outcome["cost"]
    config = {
        "job": job_id,
        "forecast": said,
        "cost": took,
        "spikes": outcome["spikes"],
        "missed": list(missed(Cost(**said), Cost(**took))) if said else [],
    }
    manifest = Manifest(artifact_type=RUN_TYPE, config=config, layers=(layer,), subject=bundle_digest)
    store.put_ref(_ref(bundle_digest), store.put_manifest(manifest))
    return _to_message(manifest)


def read_run(store: Store, bundle_digest: str) -> event_pb2.TrainingFinished:
    """The record of the newest training that made a bundle; UnknownArtifact if there is none."""
    digest = store.get_ref(_ref(bundle_digest))
    if digest is None:
        raise UnknownArtifact(f"no training of {bundle_digest} is recorded; it was made by other means, or elsewhere")
    return _to_message(store.get_manifest(digest))


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
    )


def _ref(bundle_digest: str) -> str:
    return f"runs/{bundle_digest.removeprefix('sha256:')}/newest"
