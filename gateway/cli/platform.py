"""Where the gateway is: configured by SMELT_GATEWAY, else the platform of this machine, started if it does not run."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smelt.job.v1 import job_pb2, job_pb2_grpc

from gateway.cli.output import Output
from smeltkit import limits
from smeltkit.config import environment, from_environment, smelt_home
from smeltkit.errors import SmeltError
from smeltkit.jobs.model import FINAL
from smeltkit.rpc.channel import open_channel
from smeltkit.rpc.server import RpcConfig

if TYPE_CHECKING:
    from gateway.stack import StackStatus


def configured_gateway() -> str:
    """The address in SMELT_GATEWAY; empty if there is none, which means the platform of this machine."""
    return environment().get("SMELT_GATEWAY", "")


def gateway_address(output: Output) -> str:
    """host:port of the gateway to use. Blocks, and must not be called on an event loop.

    Only the gateway itself is asked: a service that is busy must not be taken for dead and replaced.
    """
    if address := configured_gateway():
        return address
    if (address := _local_gateway()) and asyncio.run(_answers(address)):
        return address
    output.note(f"the platform does not run; starting it below {smelt_home()} (`smelt down` stops it)")
    return started(output).gateway_grpc


def started(output: Output) -> StackStatus:
    """Starts or heals the platform of this machine, saying what it does."""
    from gateway.stack import start

    if not environment().get("SMELT_HTTP_API_KEYS_FILE"):
        output.note("the HTTP edge will ask for no API key: it listens on this machine only")
    elif not from_environment(RpcConfig, "SMELT_RPC_").is_guarded:
        output.note(
            "there are API keys, but who on this machine calls the gRPC edge without one has all rights; to ask for"
            " one there too, set SMELT_RPC_TOKEN"
        )
    return start(smelt_home(), report=output.note)


def unfinished_jobs() -> int:
    """How many jobs of the platform of this machine are not over; 0 where it does not say so in a moment. Blocks."""
    address = _local_gateway()
    return asyncio.run(_unfinished(address)) if address else 0


def _local_gateway() -> str:
    """The address that the platform of this machine wrote down when it started; empty if it never did."""
    try:
        return str(json.loads((smelt_home() / "stack.json").read_bytes())["gateway_grpc"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


async def _unfinished(address: str) -> int:
    request = job_pb2.ListJobsRequest(limit=limits.JOB_LIST_MAX)
    try:
        rpc = from_environment(RpcConfig, "SMELT_RPC_")
        token, identity = rpc.secret(), rpc.identity()
        async with open_channel(address, token=token, identity=identity, peer="gateway", is_retrying=False) as channel:
            listing = job_pb2_grpc.JobServiceStub(channel).ListJobs
            reply = await listing(request, timeout=limits.GATEWAY_PROBE_TIMEOUT_S)
    except (grpc.aio.AioRpcError, SmeltError):
        return 0
    return sum(job.state not in FINAL for job in reply.jobs)


async def _answers(address: str) -> bool:
    identity = from_environment(RpcConfig, "SMELT_RPC_").identity()
    async with open_channel(address, identity=identity, peer="gateway", is_retrying=False) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            reply = await check(health_pb2.HealthCheckRequest(), timeout=limits.GATEWAY_PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
