"""Serving on the CPU: our service against llama-server, and our engine against llama_cpp.Llama, one request at a time.

    python -m benchmarks.serve_cpu [--part server|rows|all] [--model FOLDER] [--prompts FILE.jsonl.gz]

`server`: HumanEval prompts on ore-34m as Q8_0, at 1, 8 and 32 concurrent, both sides with the same slots, threads,
prompts and lengths: once with whole completions as replies, as an evaluation asks for them, and once streamed, as
people read them. Ours over gRPC through its whole service, theirs over HTTP. `rows`: 16 sequences at once on a random
model of Qwen2.5-1.5B's shape, against one after the other through the high-level class, with the bare library beside
it. Sides alternate within a run; a ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from smelt.inference.v1 import inference_pb2 as pb
from smelt.inference.v1 import inference_pb2_grpc

from benchmarks import results
from benchmarks.peers import engine_rows, llama_server
from scripts.install_llama import VERSION
from smeltkit.blobs.s3 import S3Store
from smeltkit.manifest import BUNDLE_TYPE, Descriptor, Manifest
from smeltkit.ml.bundle import GGUF_FILE, Bundle, files_of, media_type_of
from smeltkit.ml.lineage import Lineage
from smeltkit.ml.tokenizer import Tokenizer
from smeltkit.rpc.channel import open_channel, stream
from smeltkit.testing.processes import service_process
from smeltkit.testing.s3 import fresh_store, s3_server

SHARED = Path(__file__).resolve().parents[2] / "shared"
TARGETS = {1: 0.95, 8: 1.0, 32: 1.0}
REQUESTS = {1: 6, 8: 16, 32: 32}
PAIRS = {1: 15, 8: 5, 32: 5}
"""Pairs of runs by requests at once: short runs need more of them to tell anything on a shared machine."""
SLOTS, THREADS, CONTEXT_TOKENS, MAX_TOKENS, ROWS_PAIRS = 32, 2, 2048, 96, 3
TIMEOUT_S = 1200.0

Complete = Callable[[list[int], bool], Awaitable[int]]
"""Continues token ids, streamed or not; the number of tokens it gave."""


def main() -> int:
    """Exit status: 0 when every target of the parts that ran is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("server", "rows", "all"), default="all")
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "ore-34m-instruct")
    parser.add_argument("--prompts", type=Path, default=SHARED / "data" / "HumanEval.jsonl.gz")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="smelt-bench-") as folder:
        if arguments.part != "rows":
            rows += asyncio.run(_against_server(Path(folder), arguments.model, arguments.prompts))
        if arguments.part != "server":
            rows += engine_rows.measure(
                Path(folder), threads=THREADS, pairs=ROWS_PAIRS, keep=partial(_keep, "serve_cpu_rows")
            )
    return int(any(row["ratio"] < row["target"] for row in rows))


def _keep(name: str, rows: list[dict[str, Any]]) -> None:
    """Saves and shows what is measured so far: a run takes minutes, and may be ended before its last row."""
    results.save(name, rows, llama_cpp_python=VERSION, threads=THREADS)
    shown = [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows]
    print(results.table(shown), flush=True)


async def _against_server(folder: Path, model: Path, prompts: Path) -> list[dict[str, Any]]:
    """One row a concurrency: tokens per second of both sides and their ratio."""
    bundle = _quantized_bundle(model, folder / "bundle")
    tokenizer = Tokenizer.from_file(bundle / "tokenizer.json")
    queue = _fresh_prompts([tokenizer.encode(prompt) for prompt in _read_prompts(prompts)])
    rows = []
    async with _our_service(bundle, folder) as ours, _their_server(bundle) as theirs:
        for side in (ours, theirs):
            await _run(side, [next(queue)], 1, is_streamed=True)
        for concurrent, is_streamed in itertools.product(TARGETS, (False, True)):
            speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for pair in range(PAIRS[concurrent]):
                batch = list(itertools.islice(queue, REQUESTS[concurrent]))
                sides = [("ours", ours), ("theirs", theirs)]
                for name, side in sides if pair % 2 else reversed(sides):
                    speeds[name].append(await _run(side, batch, concurrent, is_streamed=is_streamed))
            row = {
                "concurrent": concurrent,
                "replies": "streamed" if is_streamed else "whole",
                "tokens_per_second": statistics.median(speeds["ours"]),
                "llama_server": statistics.median(speeds["theirs"]),
                "ratio": results.median_ratio(speeds["ours"], speeds["theirs"]),
                "target": TARGETS[concurrent],
                "pairs": PAIRS[concurrent],
            }
            rows.append({**row, "runs_ours": speeds["ours"], "runs_theirs": speeds["theirs"]})
            _keep("serve_cpu_server", rows)
    return rows


def _read_prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def _fresh_prompts(prompts: list[list[int]]) -> Iterator[list[int]]:
    """`prompts` over and over, each time with another first token, so that no cache of an earlier round helps."""
    for round_ in itertools.count(100):
        yield from ([round_, *prompt] for prompt in prompts)


async def _run(complete: Complete, prompts: list[list[int]], concurrent: int, *, is_streamed: bool) -> float:
    """Tokens per second, prompts included in the time, with `concurrent` requests under way until all are done."""
    left, started = list(prompts), time.perf_counter()

    async def worker() -> int:
        generated = 0
        while left:
            generated += await complete(left.pop(), is_streamed)
        return generated

    generated = sum(await asyncio.gather(*(worker() for _ in range(concurrent))))
    assert generated == len(prompts) * MAX_TOKENS, f"{generated} tokens instead of {len(prompts) * MAX_TOKENS}"
    return generated / (time.perf_counter() - started)


@asynccontextmanager
async def _their_server(bundle: Path) -> AsyncIterator[Complete]:
    running = llama_server.llama_server(bundle / GGUF_FILE, slots=SLOTS, context_tokens=CONTEXT_TOKENS, threads=THREADS)
    async with running as client:
        yield lambda ids, is_streamed: llama_server.complete(client, ids, MAX_TOKENS, is_streamed=is_streamed)


@asynccontextmanager
async def _our_service(bundle: Path, folder: Path) -> AsyncIterator[Complete]:
    """Our service as a process of its own, over a real S3 server."""
    with s3_server() as s3:
        store = fresh_store(s3, folder / "uploads")
        digest = _store_bundle(store, bundle)
        settings = {
            "SMELT_PLATFORM_NATS_URL": "",
            "SMELT_PLATFORM_S3_ENDPOINT": store.config.s3_endpoint,
            "SMELT_PLATFORM_S3_ACCESS_KEY": store.config.s3_access_key,
            "SMELT_PLATFORM_S3_SECRET_KEY": store.config.s3_secret_key,
            "SMELT_PLATFORM_S3_BUCKET": store.config.s3_bucket,
            "SMELT_INFERENCE_CACHE_DIR": str(folder / "cache"),
            "SMELT_INFERENCE_SLOTS": str(SLOTS),
            "SMELT_INFERENCE_THREADS": str(THREADS),
        }
        with service_process("inference", settings, folder) as process:
            async with open_channel(process.address) as channel:
                stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

                async def complete(ids: list[int], is_streamed: bool) -> int:
                    request = pb.GenerateRequest(
                        model=digest,
                        tokens=pb.TokenPrompt(ids=ids),
                        max_tokens=MAX_TOKENS,
                        ignore_stop=True,
                        final_only=not is_streamed,
                    )
                    async with stream(stub.Generate, request, timeout_s=TIMEOUT_S) as replies:
                        return sum([len(reply.ids) async for reply in replies])

                yield complete


def _quantized_bundle(model: Path, folder: Path) -> Path:
    """A complete bundle folder of `model` with its weights as Q8_0."""
    return engine_rows.quantized_folder(model, folder, "Q8_0")


def _store_bundle(store: S3Store, folder: Path) -> str:
    bundle = Bundle.from_folder(folder, lineage=Lineage(operation="import", code_revision="benchmark"))
    layers = [
        Descriptor(media_type=media_type_of(path.name), path=path.name, digest=digest, size_bytes=size_bytes)
        for path in files_of(folder)
        for digest, size_bytes in [store.put_file(path)]
    ]
    return store.put_manifest(Manifest(artifact_type=BUNDLE_TYPE, config=bundle.to_config(), layers=tuple(layers)))


if __name__ == "__main__":
    raise SystemExit(main())
