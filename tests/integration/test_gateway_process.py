"""The gateway as the process that is deployed: both edges answer, absent services are named, SIGTERM drains it."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smelt.evaluator.v1 import evaluator_pb2, evaluator_pb2_grpc
from smelt.job.v1 import job_pb2, job_pb2_grpc

from smeltkit.bus import Bus
from smeltkit.config import PlatformConfig, environment
from smeltkit.errors import ServiceUnavailable, UnknownJob
from smeltkit.rpc.channel import call, open_channel

SERVICES = ("importer", "trainer", "inference", "evaluator", "sandbox")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Running:
    """A gateway process and where it answers."""

    process: asyncio.subprocess.Process
    grpc: str
    http: str


async def _addresses(process: asyncio.subprocess.Process) -> dict[str, str]:
    """The addresses that the log tells, by message."""
    assert process.stdout is not None
    found: dict[str, str] = {}
    async with asyncio.timeout(60):
        while len(found) < 2:
            line: dict[str, Any] = json.loads(await process.stdout.readline())
            if line["message"].startswith("serving"):
                found[line["message"]] = line["address"]
    return found


@pytest.fixture
async def gateway(bus: Bus, platform: PlatformConfig) -> AsyncIterator[Running]:
    """A gateway whose services do not run."""
    names = {f"SMELT_PLATFORM_{key.upper()}": str(value) for key, value in asdict(platform).items()}
    names |= {f"SMELT_GATEWAY_{service.upper()}_ADDRESS": "127.0.0.1:1" for service in SERVICES}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway"), cwd=ROOT, env=environment(names), stdout=asyncio.subprocess.PIPE
    )
    try:
        found = await _addresses(process)
        yield Running(process, found["serving"], f"http://{found['serving HTTP']}")
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_both_edges_answer_and_sigterm_ends_the_process(gateway: Running) -> None:
    """One process, one loop: health by gRPC and by HTTP, jobs from the ledger, and an exit in order."""
    async with open_channel(gateway.grpc) as channel, httpx.AsyncClient(trust_env=False) as client:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        jobs = job_pb2_grpc.JobServiceStub(channel)
        listed = await call(jobs.ListJobs, job_pb2.ListJobsRequest(service=secrets.token_hex(8)), timeout_s=10)
        assert not listed.jobs
        with pytest.raises(UnknownJob):
            await call(jobs.GetJob, job_pb2.GetJobRequest(id="job-none"), timeout_s=10)
        assert (await client.get(f"{gateway.http}/healthz")).status_code == 200
        ready = await client.get(f"{gateway.http}/v2/health/ready")
    assert ready.status_code == 503
    assert ready.json()["checks"] == {"bus": True, "inference": False}
    gateway.process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(gateway.process.wait(), 40) == 0


async def test_absent_service_is_named_to_its_caller(gateway: Running) -> None:
    """The gateway runs without its services; a call says which one is missing."""
    async with open_channel(gateway.grpc, is_retrying=False) as channel:
        stub = evaluator_pb2_grpc.EvaluatorServiceStub(channel)
        with pytest.raises(ServiceUnavailable, match="evaluator"):
            await call(stub.ListSuites, evaluator_pb2.ListSuitesRequest(), timeout_s=10)
