"""The platform of an overlay as on a cluster: every pod a process, three NATS servers, real settings, users and ports.

One file, since the cluster is one. `python -m benchmarks.chaos` plays all faults, many times.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import httpx
import pytest
import yaml
from rich.console import Console

from gateway.cli.trace_view import trace_tree
from gateway.tenants.keys import hash_key
from scripts import alerts
from scripts.cluster.caller import FINISHED, NAME, Caller, calling, faults_of
from scripts.cluster.chaos import FAULTS, play, scene_of
from scripts.cluster.cluster import COUNTS, Cluster, running_cluster
from smeltkit import telemetry
from smeltkit.bus.topology import declare
from smeltkit.jobs import model
from smeltkit.servers import free_ports, is_listening, wait_until
from smeltkit.telemetry.files import read_spans
from smeltkit.testing.collector import Collector, collector
from smeltkit.testing.spans import EVALUATION_EDGES, edges_of
from smeltkit.testing.waiting import eventually

KEY = "sk-cluster"
_LOOKS_MAX = 300
LIMIT = 24
SILENT = "sandbox"
"""The service that nothing may leave: its callers' spans show it."""


@pytest.fixture(scope="module")
def collected() -> Iterator[Collector]:
    """What leaves the cluster by OTLP."""
    with collector() as running:
        yield running


@pytest.fixture(scope="module")
def cluster(collected: Collector) -> Iterator[Cluster]:
    """The laptop's overlay with keys at its edge, a collector, and replicas of everything."""

    def extra(service: str, folder: Path) -> dict[str, str]:
        (folder / "keys").write_text(f"tester {hash_key(KEY)}\n")
        keys = {"SMELT_HTTP_API_KEYS_FILE": str(folder / "keys")} if service == "gateway" else {}
        sent = {"OTEL_EXPORTER_OTLP_ENDPOINT": collected.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        return keys | (sent if service != SILENT else {})

    with running_cluster(extra=extra) as running:
        yield running


@pytest.fixture
async def caller(cluster: Cluster) -> AsyncIterator[Caller]:
    """A client of the cluster."""
    async with calling(cluster) as made:
        yield made


async def test_an_evaluation_crosses_every_pod_in_one_trace(
    cluster: Cluster, caller: Caller, collected: Collector
) -> None:
    """From the gateway through NATS to an evaluator, all three replicas of inference and a sandbox, drawn as a tree.

    The same trace reaches a collector, but for the spans of the sandbox, which sends nothing.
    """
    await caller.load_everywhere(cluster)
    trace_id, before = secrets.token_hex(16), await caller.books()
    with telemetry.attached({"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}):
        id = await caller.start("traced", seed=1, limit=LIMIT)
    job = await caller.end(id, timeout_s=120)
    assert (job.state, job.attempt, job.trace_id) == (model.SUCCEEDED, 1, trace_id)
    assert faults_of(await caller.report(job.result_digest), LIMIT) == []
    books = await caller.settled(before.finished + 1)
    assert (books.finished, books.dead, books.open_jobs) == (before.finished + 1, before.dead, [])
    spans = read_spans(cluster.traces, trace_id)
    assert set(EVALUATION_EDGES) - edges_of(spans) == set()
    processes = processes_with(cluster.traces, trace_id)
    assert set(processes) == set(COUNTS) and processes["inference"] == COUNTS["inference"]
    console = Console(record=True, width=200)
    console.print(trace_tree(spans, depth=12))
    drawn = console.export_text()
    assert all(text in drawn for text in (trace_id, "StartEvaluation", "JudgeBatch", f"publish {FINISHED}"))
    known = {span.span_id for span in spans if span.service != SILENT}
    await eventually(lambda: known <= {span.span_id for span in collected.spans})
    sent = edges_of([span for span in collected.spans if span.trace_id == trace_id])
    assert sent == edges_of([span for span in spans if span.service != SILENT])


async def test_streams_and_buckets_have_three_copies(caller: Caller) -> None:
    for stream in declare(replicas=3).streams:
        info = await caller.streams.jetstream.stream_info(str(stream.name))
        assert info.config.num_replicas == 3
        assert {info.cluster.leader, *(peer.name for peer in info.cluster.replicas)} == {"nats-0", "nats-1", "nats-2"}


async def test_every_gateway_answers_at_both_edges(cluster: Cluster, caller: Caller) -> None:
    for number in range(COUNTS["gateway"]):
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=cluster.http(number), headers=headers, trust_env=False) as client:
            assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == [NAME]
            body = {"model": NAME, "prompt": "x", "max_tokens": 3}
            assert (await client.post("/v1/completions", json=body)).json()["usage"]["completion_tokens"] == 3


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")
async def test_a_real_prometheus_reads_every_gateway_without_a_key_and_computes_the_rules(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The server of Debian, with our rules; what it reads is what the edge counted."""
    targets = [cluster.listening("gateway", number, "SMELT_HTTP_METRICS_LISTEN") for number in range(COUNTS["gateway"])]
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"{cluster.http(0)}/metrics")).status_code == 401
    with prometheus(tmp_path, targets) as url:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:

            async def value(query: str) -> dict[str, str]:
                found = (await client.get("/api/v1/query", params={"query": query})).json()["data"]["result"]
                return {sample["metric"].get("instance", ""): sample["value"][1] for sample in found}

            all_up = {target: "1" for target in targets}
            for _ in range(_LOOKS_MAX):
                if await value("up") == all_up and await value('ALERTS{alertname="SmeltCollectorSilent"}'):
                    break
                await asyncio.sleep(0.1)
            assert await value("up") == all_up
            assert await value("smelt_inference_load") == {}
            assert await value('sum(smelt_http_requests_total{status="401"})') == {"": "1"}
            groups = (await client.get("/api/v1/rules")).json()["data"]["groups"]
            assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}


@pytest.mark.parametrize("name", ["kill inference", "kill NATS follower", "SIGTERM under streams"])
async def test_a_fault_loses_nothing_doubles_nothing_and_leaves_nothing_running(
    name: str, cluster: Cluster, caller: Caller
) -> None:
    """R-120, R-121: the score is the known one, each problem is there once, one fact a job, and no lease is left."""
    scene = await scene_of(cluster, caller, seed=crc32(name.encode()))
    assert (await play(scene, FAULTS[name], name.replace(" ", "-"))).wrong == []


@contextmanager
def prometheus(folder: Path, targets: list[str]) -> Iterator[str]:
    """The address of a running server that asks `targets` every 0.2 s and knows the rules of the platform."""
    jobs = [{"job_name": "gateway", "static_configs": [{"targets": targets}]}]
    periods = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
    rules = yaml.safe_load(alerts.PLAIN_RULES.read_text())
    for group in rules["groups"]:
        group["interval"] = periods["evaluation_interval"]
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    config = {"global": periods, "rule_files": ["rules.yaml"], "scrape_configs": jobs}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: is_listening(int(address.rpartition(":")[2])), "Prometheus")
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


def processes_with(folder: Path, trace_id: str) -> Counter[str]:
    """Processes of each service that left spans of the trace."""
    files = [path for path in folder.glob("*.jsonl*") if trace_id in path.read_text()]
    return Counter(name.rpartition("-")[0] for name in {path.name.partition(".")[0] for path in files})
