"""Loads a bundle folder in a process of its own and generates the probe: `python -m services.inference.probe_process`.

Reads one JSON object from standard input: `folder` (the bundle's files), `weights` (its GGUF file), `sizing` (fields of
Sizing) and `settings` (fields of InferenceConfig). Writes one: `results`, `load_s` and `engine_digest`, or `error` with
`reason` and `message`. Nothing of the service that asks is shared: what works here works after a restart.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from services.inference.config import InferenceConfig
from services.inference.language import Language
from services.inference.model import Model, open_engine
from services.inference.probe import TASKS, run_probe
from services.inference.sizing import Sizing
from smeltkit.errors import SmeltError


async def probe(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to `request`; see the module."""
    started = time.monotonic()
    settings = InferenceConfig(**{**request["settings"], "waiting_max": len(TASKS)})
    sizing = Sizing(**request["sizing"])
    language = Language(Path(request["folder"]))
    model = Model(language, open_engine(Path(request["weights"]), sizing, settings), settings)
    load_s = time.monotonic() - started
    try:
        results = [result.to_dict() for result in await run_probe(model)]
    finally:
        await model.runtime.close()
    return {"results": results, "load_s": load_s, "engine_digest": model.info.digest}


def main() -> None:
    """Answers the request on standard input."""
    try:
        answer = asyncio.run(probe(json.load(sys.stdin)))
    except SmeltError as error:
        answer = {"error": {"reason": error.reason(), "message": error.message}}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
