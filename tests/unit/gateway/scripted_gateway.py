"""A gateway whose answers a test writes down, and the real command line in a process of its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from smelt.artifact.v1 import artifact_pb2
from smelt.evaluator.v1 import evaluator_pb2
from smelt.importer.v1 import importer_pb2
from smelt.inference.v1 import inference_pb2
from smelt.job.v1 import job_pb2
from smelt.sandbox.v1 import sandbox_pb2
from smelt.tenant.v1 import tenant_pb2
from smelt.trainer.v1 import trainer_pb2

from smeltkit.config import environment
from smeltkit.testing.rpc import serving

ROOT = Path(__file__).resolve().parents[3]
_PACKAGES = {
    "ArtifactService": artifact_pb2,
    "JobService": job_pb2,
    "ImporterService": importer_pb2,
    "InferenceService": inference_pb2,
    "EvaluatorService": evaluator_pb2,
    "SandboxService": sandbox_pb2,
    "TrainerService": trainer_pb2,
    "TenantService": tenant_pb2,
}
DIGEST = "sha256:" + "ab" * 32

Answer = Callable[[Any], Any]
"""From a request to the reply, to a list of replies for a stream, or to an error that it raises."""


@dataclass(frozen=True)
class Ended:
    """A command that ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Gateway:
    """A running gateway: its address, and the requests that it got, by method."""

    address: str
    requests: dict[str, list[Any]]

    async def start(self, *arguments: str, stdin: bool = False, **names: str) -> asyncio.subprocess.Process:
        """Starts `smelt ARGUMENTS` against this gateway."""
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway.cli.main",
            *arguments,
            cwd=ROOT,
            env=environment({"SMELT_GATEWAY": self.address, **names}),
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def smelt(self, *arguments: str, stdin: str | None = None, **names: str) -> Ended:
        """Runs `smelt ARGUMENTS` to its end."""
        process = await self.start(*arguments, stdin=stdin is not None, **names)
        out, err = await asyncio.wait_for(process.communicate(None if stdin is None else stdin.encode()), 60)
        return Ended(process.returncode or 0, out.decode(), err.decode())


@asynccontextmanager
async def gateway(answers: Mapping[str, Answer]) -> AsyncIterator[Gateway]:
    """Serves `answers`, whose keys are methods such as `JobService.GetJob`."""
    requests: dict[str, list[Any]] = {}
    handlers = dict(_handler(name, answer, requests) for name, answer in answers.items())
    async with serving(handlers, drain_grace_s=0.1) as host:
        yield Gateway(host.address, requests)


def job(state: str, **fields: Any) -> job_pb2.Job:
    """A job of this state, e.g. job("RUNNING")."""
    values = {"id": "job-1", "service": "importer", "kind": "import", "state": f"JOB_STATE_{state}", **fields}
    return job_pb2.Job(**values)


def watched(*jobs: job_pb2.Job) -> Answer:
    """An answer for WatchJob: these states one after the other."""
    return lambda request: [job_pb2.WatchJobResponse(job=state) for state in jobs]


def _handler(name: str, answer: Answer, requests: dict[str, list[Any]]) -> tuple[str, Any]:
    service, _, method_name = name.partition(".")
    method = _PACKAGES[service].DESCRIPTOR.services_by_name[service].methods_by_name[method_name]
    found = descriptor_pool.Default().FindMessageTypeByName(method.input_type.full_name)
    codec = {
        "request_deserializer": message_factory.GetMessageClass(found).FromString,
        "response_serializer": lambda reply: reply.SerializeToString(),
    }

    async def unary(request: Any, context: Any) -> Any:
        requests.setdefault(name, []).append(request)
        return answer(request)

    async def streaming(request: Any, context: Any) -> AsyncIterator[Any]:
        requests.setdefault(name, []).append(request)
        for reply in answer(request):
            if reply is None:
                await asyncio.Event().wait()
            yield reply

    build: Any = (
        grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    )
    return f"/{method.containing_service.full_name}/{method.name}", build(
        streaming if method.server_streaming else unary, **codec
    )


def raising(error: Exception) -> Answer:
    """An answer that fails."""

    def answer(request: Any) -> Any:
        raise error

    return answer
