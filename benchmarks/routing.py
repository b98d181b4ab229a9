"""Requests spread over replicas of inference: how throughput grows with them, and what the routing costs.

    python -m benchmarks.routing

Replicas are processes of ours whose engine sleeps 50 ms a step for 8 requests at once, so that two cores can show three
of them. 64 clients ask one request after the other through `open_inference`, on 1, 2 and 3 replicas in turn. Throughput
is a ratio to one replica in the same round. Latency is measured while the 64 streams run: what passes between a call
and its leaving for a replica (`decision`), in time and in the processor time of reading its prompt and choosing; beside
it what an empty task waits for its turn on the same loop (`hop`), which is not the routing's doing. Small calls
(Tokenize) go through the routing and beside it in turn: `added` is the difference of the medians.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from smelt.inference.v1 import inference_pb2 as pb
from smelt.inference.v1 import inference_pb2_grpc

from benchmarks import results
from smeltkit.config import environment
from smeltkit.ids import digest_bytes
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.lineage import Lineage
from smeltkit.routing.channel import open_inference
from smeltkit.routing.demand import Demand, demand_of
from smeltkit.rpc.channel import call, open_channel, stream
from smeltkit.rpc.health import is_serving
from smeltkit.servers import free_ports
from smeltkit.testing.tiny_models import write_tiny_model
from smeltkit.testing.waiting import eventually

STREAMS, SLOTS, STEP_S, TOKENS = 64, 8, 0.05, 32
ROUNDS, WARM_S, MEASURE_S, PROBE_PAUSE_S = 3, 4.0, 6.0, 0.02
TARGET_RATIO, TARGET_ADDED_MS = 2.8, 5.0
MODEL = digest_bytes(b"sleeping")
_BEGAN: ContextVar[float] = ContextVar("began")


class Run:
    """What one run measures: tokens, and seconds of decisions and of small calls."""

    def __init__(self) -> None:
        self.tokens = 0
        self.tokens_per_second = 0.0
        self.decisions: list[float] = []
        self.cpu: list[float] = []
        self.hops: list[float] = []
        self.direct: list[float] = []
        self.routed: list[float] = []


def main() -> int:
    """Exit status: 0 when both targets are met."""
    with tempfile.TemporaryDirectory(prefix="smelt-bench-") as name:
        folder = Path(name) / "bundle"
        write_tiny_model(folder, "qwen3", is_chat=False)
        lineage = Lineage(operation="import", code_revision="benchmark")
        Bundle.from_folder(folder, lineage=lineage, licence="Apache-2.0").write_parts(folder)
        rows = asyncio.run(measure(folder))
    print(results.table(rows))
    last = rows[-1]
    is_met = last["ratio"] >= TARGET_RATIO and max(row["decision_ms_p99"] for row in rows) < TARGET_ADDED_MS
    facts = {"streams": STREAMS, "slots": SLOTS, "step_s": STEP_S, "tokens": TOKENS, "rounds": ROUNDS}
    targets = {"ratio": TARGET_RATIO, "decision_ms_p99": TARGET_ADDED_MS}
    print(results.save("routing", rows, settings=facts, targets=targets, is_met=is_met, load_average=os.getloadavg()))
    return 0 if is_met else 1


async def measure(folder: Path) -> list[dict[str, Any]]:
    """A row for each number of replicas."""
    runs: dict[int, list[Run]] = {count: [] for count in (1, 2, 3)}
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(replica(folder)) for _ in runs]
        for _ in range(ROUNDS):
            for count, found in runs.items():
                found.append(await one_run(addresses[:count]))
    return [_row(count, found, runs[1]) for count, found in runs.items()]


@asynccontextmanager
async def replica(folder: Path) -> AsyncIterator[str]:
    """The address of a sleeping replica, ready."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = (sys.executable, "-m", "benchmarks.peers.sleeping_replica", str(folder), str(SLOTS), str(STEP_S))
    log = folder.parent / f"replica-{address.rpartition(':')[2]}.log"
    settings = environment({"SMELT_RPC_LISTEN": address})
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, env=settings, stderr=output)
    try:
        while not await asyncio.to_thread(is_serving, address):
            if process.returncode is not None:
                raise RuntimeError(f"a replica ended:\n{log.read_text()}")
            await asyncio.sleep(0.1)
        yield address
    finally:
        process.kill()
        await process.wait()


async def one_run(addresses: Sequence[str]) -> Run:
    """Throughput and latency under STREAMS streams on the replicas at `addresses`."""
    run, is_over = Run(), asyncio.Event()
    async with open_inference(",".join(addresses)) as channel, open_channel(addresses[0]) as beside:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        known = channel._pool._replicas  # type: ignore[attr-defined]
        await eventually(lambda: all(found.is_serving for found in known.values()))
        for found in known.values():
            await call(found._stub.Load, pb.LoadRequest(model=MODEL), timeout_s=30)
            _note_departures(found.channel, run)
        await eventually(lambda: all(found.has(MODEL) for found in known.values()))
        _note_choices(channel._pool, run)  # type: ignore[attr-defined]
        clients = [asyncio.create_task(_ask(stub, number, run, is_over)) for number in range(STREAMS)]
        await asyncio.sleep(WARM_S)
        for values in (run.decisions, run.hops, run.cpu):
            values.clear()
        before, began = run.tokens, time.perf_counter()
        probing = asyncio.create_task(_probe(stub, inference_pb2_grpc.InferenceServiceStub(beside), run))
        await asyncio.sleep(MEASURE_S)
        run.tokens_per_second = (run.tokens - before) / (time.perf_counter() - began)
        probing.cancel()
        is_over.set()
        await asyncio.gather(*clients)
    return run


async def _ask(stub: Any, number: int, run: Run, is_over: asyncio.Event) -> None:
    while not is_over.is_set():
        request = pb.GenerateRequest(model=MODEL, text=_prompt(number), max_tokens=TOKENS, ignore_stop=True)
        run.hops.append(await _hop())
        _BEGAN.set(time.perf_counter())
        async with stream(stub.Generate, request, timeout_s=300) as replies:
            async for reply in replies:
                run.tokens += len(reply.ids)


async def _hop() -> float:
    async def nothing() -> None:
        pass

    began = time.perf_counter()
    await asyncio.create_task(nothing())
    return time.perf_counter() - began


async def _probe(routed: Any, direct: Any, run: Run) -> None:
    request = pb.TokenizeRequest(model=MODEL, text="a small call")
    while True:
        for stub, found in ((direct, run.direct), (routed, run.routed)):
            began = time.perf_counter()
            _BEGAN.set(began)
            await call(stub.Tokenize, request, timeout_s=30)
            found.append(time.perf_counter() - began)
            await asyncio.sleep(PROBE_PAUSE_S)


def _note_departures(channel: Any, run: Run) -> None:
    """Notes for each stream that leaves by `channel` how long ago it was asked for."""
    make = channel.unary_stream

    def noted(*arguments: Any, **options: Any) -> Any:
        run.decisions.append(time.perf_counter() - _BEGAN.get(time.perf_counter()))
        return make(*arguments, **options)

    channel.unary_stream = noted


def _note_choices(pool: Any, run: Run) -> None:
    """Notes the processor time of each choice, the reading of a prompt like that of the streams included."""
    pick, request = pool.pick, pb.GenerateRequest(model=MODEL, text=_prompt(0), max_tokens=TOKENS)

    async def noted(demand: Demand, *arguments: Any) -> Any:
        began = time.thread_time()
        demand_of("", request)
        chosen = await pick(demand, *arguments)
        run.cpu.append(time.thread_time() - began)
        return chosen

    pool.pick = noted


def _prompt(number: int) -> str:
    return f"client {number} asks for something that begins like nothing else " * 3


def _row(count: int, runs: Sequence[Run], alone: Sequence[Run]) -> dict[str, Any]:
    def ms(name: str, share: float) -> float:
        values = sorted(value for run in runs for value in getattr(run, name))
        return 1000 * values[int(share * (len(values) - 1))]

    return {
        "replicas": count,
        "tokens_per_second": statistics.median(run.tokens_per_second for run in runs),
        "ratio": results.median_ratio(*([run.tokens_per_second for run in side] for side in (runs, alone))),
        "decision_ms_p50": ms("decisions", 0.5),
        "decision_ms_p99": ms("decisions", 0.99),
        "hop_ms_p99": ms("hops", 0.99),
        "cpu_ms_p99": ms("cpu", 0.99),
        "added_ms_p50": ms("routed", 0.5) - ms("direct", 0.5),
    }


if __name__ == "__main__":
    sys.exit(main())
