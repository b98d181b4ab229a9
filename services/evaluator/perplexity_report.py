"""The report of a perplexity: an artifact about a bundle whose two figures are computed again from its windows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from services.evaluator.perplexity import Perplexity, Window, perplexity_of
from services.evaluator.report import Report, Score, open_report
from services.evaluator.texts import Text, texts
from smeltkit.blobs.store import Store
from smeltkit.errors import ReportMismatch
from smeltkit.manifest import REPORT_TYPE, Descriptor, Manifest, canonical_json

KIND = "perplexity"
WINDOWS_FILE = "windows.jsonl"
_WINDOWS_TYPE = "application/x-ndjson"


def store_perplexity(
    store: Store,
    text: Text,
    windows: Sequence[Window],
    size_bytes: int,
    *,
    engine: Mapping[str, Any],
    provenance: Mapping[str, Any],
    times: Mapping[str, Any],
) -> str:
    """Stores windows and report; its digest. `provenance` names the bundle."""
    lines = b"".join(canonical_json(asdict(window)) + b"\n" for window in windows)
    layer = Descriptor(
        media_type=_WINDOWS_TYPE, digest=store.put_bytes(lines), size_bytes=len(lines), path=WINDOWS_FILE
    )
    found = perplexity_of(windows, size_bytes)
    config = {
        "kind": KIND,
        "suite": {"name": text.name, "version": text.version, "split": "all", "problems": len(windows)},
        "scores": [asdict(score) for score in _scores(text.name, found, len(windows))],
        "text": {
            "tokens": found.tokens,
            "bytes": size_bytes,
            "window_tokens": text.window_tokens,
            "stride_tokens": text.stride_tokens,
        },
        "verdicts": {},
        "completion_tokens": 0,
        "settings": {"effective": {"engine": dict(engine)}},
        "provenance": {**provenance, "records": layer.digest},
        "times": dict(times),
    }
    manifest = Manifest(artifact_type=REPORT_TYPE, config=config, layers=(layer,), subject=provenance["bundle"])
    return store.put_manifest(manifest)


def open_result(store: Store, digest: str) -> Report:
    """The stored report of either kind, verified against its records; see `open_report`."""
    manifest = store.get_manifest(digest)
    if manifest.artifact_type != REPORT_TYPE or manifest.config.get("kind") != KIND:
        return open_report(store, digest)
    layer = manifest.layer(WINDOWS_FILE)
    if layer is None:
        raise ReportMismatch(f"report {digest} has no windows, so its perplexity rests on nothing")
    config = manifest.config
    try:
        windows = [Window(**json.loads(line)) for line in store.get_bytes(layer.digest).splitlines()]
        suite, provenance = config["suite"], config["provenance"]
        scores = _scores(suite["name"], perplexity_of(windows, config["text"]["bytes"]), len(windows))
        if [asdict(score) for score in scores] != config["scores"] or provenance["bundle"] != manifest.subject:
            raise ReportMismatch(f"report {digest} says another perplexity than its windows give")
        known = texts().get(suite["name"])
        return Report(
            digest=digest,
            bundle=manifest.subject,
            suite=suite["name"],
            suite_digest=provenance["suite"],
            data_digest=provenance["data"],
            has_current_suite=known is not None and known.digest == provenance["suite"],
            scores=scores,
            config=config,
            samples=(),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReportMismatch(f"report {digest} is malformed: {error!r}") from error


def _scores(name: str, found: Perplexity, windows: int) -> tuple[Score, ...]:
    """The two figures as scores; no problem passes or fails."""
    return tuple(
        Score(
            suite=name,
            metric=metric,
            value=estimate.value,
            low=estimate.low,
            high=estimate.high,
            passed=0,
            problems=windows,
            samples=1,
            is_partial=False,
        )
        for metric, estimate in (("token_perplexity", found.token), ("byte_perplexity", found.byte))
    )
