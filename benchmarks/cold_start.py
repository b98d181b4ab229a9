"""A replica of inference that starts when somebody asks: from the start of its process to the first token, over floors.

    python -m benchmarks.cold_start [--runs N] [--model FOLDER]

A model (the shipped one unless named) as Q8_0 in the whole service over a real S3 server.
Each run starts a process twice: with an empty cache of the node, then with the model in it. What the start takes stands
over the bare imports of its program, everything after it over reading the weights once from memory, both measured
beside it: so the rows tell what another machine will take. Of each the least of all runs counts, since others on the
machine only add. A model that no such engine ever ran is probed first; that happens once, before the runs.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smelt.inference.v1 import inference_pb2 as pb
from smelt.inference.v1 import inference_pb2_grpc

from benchmarks import results
from benchmarks.peers.engine_rows import quantized_folder
from services.inference.probe import READY_PROMPTS
from smeltkit import limits
from smeltkit.blobs.publish import store_bundle
from smeltkit.blobs.s3 import S3Store
from smeltkit.ml.bundle import GGUF_FILE, Bundle
from smeltkit.ml.lineage import Lineage
from smeltkit.rpc.channel import call, open_channel, stream
from smeltkit.testing.processes import ServiceProcess
from smeltkit.testing.s3 import fresh_store, s3_server

NAME = "cold_start"
SHIPPED = Path(__file__).resolve().parents[1] / "examples" / "models" / "ore-11m"
NEW_TOKENS, TIMEOUT_S = 33, 600.0
CASES = ("empty", "with the model")
"""What the node's cache holds when the process starts, in the order of a run."""


def main() -> int:
    """Exit status: always 0, since there is no bound to miss: a cluster adds its own minutes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smelt-cold-") as name, s3_server() as server:
        folder = Path(name)
        store = fresh_store(server, folder / "uploads")
        path = quantized_folder(told.model, folder / "bundle", "Q8_0")
        rows = _measured(told.model.name, path, store, folder / "node", told.runs)
    results.save(NAME, rows, runs=told.runs)
    shown = [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows]
    print(results.table(shown))
    return 0


def _measured(model: str, path: Path, store: S3Store, node: Path, runs: int) -> list[dict[str, Any]]:
    """A row a case; what the node keeps lies below `node`."""
    bundle = Bundle.from_folder(path, lineage=Lineage(operation="import", code_revision="benchmark"))
    digest, weights = store_bundle(store, path, bundle, lambda done: None).digest, path / GGUF_FILE
    node.mkdir()
    settings = {f"SMELT_PLATFORM_{key.upper()}": f"{value}" for key, value in asdict(store.config).items()}
    process = ServiceProcess("inference", {**settings, "SMELT_INFERENCE_CACHE_DIR": str(node / "cache")}, node / "log")
    times: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    try:
        process.start()
        checked = asyncio.run(_probed(process, digest))
        process.kill()
        for _ in range(runs):
            shutil.rmtree(node / "cache")
            for case in CASES:
                times[case].append({**_start(process, digest), "read": _read_s(weights), "imports": _imports_s()})
                process.kill()
    finally:
        process.kill()
    size_bytes = weights.stat().st_size
    return [_row(model, size_bytes, case, checked, found) for case, found in times.items()]


async def _probed(process: ServiceProcess, digest: str) -> int:
    """Tokens of the prompts that every load repeats; the probe of the model is recorded from now on."""
    async with open_channel(process.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        reply = await call(stub.Probe, pb.ProbeRequest(model=digest), timeout_s=TIMEOUT_S)
    return sum(len(result.ids) for result in reply.results[:READY_PROMPTS])


def _start(process: ServiceProcess, digest: str) -> dict[str, float]:
    """Seconds from the start of the process until it serves, from there to the first token, and for a token after."""
    began = time.perf_counter()
    process.start()
    serving = time.perf_counter()
    arrivals = asyncio.run(_arrivals(process, digest))
    token_s = (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)
    return {"serving": serving - began, "first_token": arrivals[0] - serving, "token": token_s}


async def _arrivals(process: ServiceProcess, digest: str) -> list[float]:
    """When each of NEW_TOKENS tokens came."""
    found: list[float] = []
    request = pb.GenerateRequest(model=digest, text="def add(a, b):\n", max_tokens=NEW_TOKENS, ignore_stop=True)
    async with open_channel(process.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        async with stream(stub.Generate, request, timeout_s=TIMEOUT_S) as replies:
            async for reply in replies:
                found += [time.perf_counter()] * len(reply.ids)
    return found


def _read_s(path: Path) -> float:
    """Seconds to read the file once, a block at a time."""
    buffer, began = bytearray(limits.MIB), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def _imports_s() -> float:
    """Seconds of an interpreter that imports all of the service and ends."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import services.inference.__main__"], check=True)
    return time.perf_counter() - began


def _row(model: str, size_bytes: int, case: str, checked: int, found: Sequence[dict[str, float]]) -> dict[str, Any]:
    least = {key: min(one[key] for one in found) for key in found[0]}
    return {
        "model": model,
        "bytes": size_bytes,
        "cache": case,
        "serving_over_imports": least["serving"] / least["imports"],
        "first_token_over_read": least["first_token"] / least["read"],
        "check_tokens": checked,
        "check_share": checked * least["token"] / least["first_token"],
        "token_over_read": least["token"] / least["read"],
        "seconds": [{key: round(value, 4) for key, value in one.items()} for one in found],
    }


if __name__ == "__main__":
    raise SystemExit(main())
