"""A command's way to the gateway: one channel, typed stubs, jobs followed to their end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from smelt.artifact.v1 import artifact_pb2, artifact_pb2_grpc
from smelt.evaluator.v1 import evaluator_pb2_grpc
from smelt.importer.v1 import importer_pb2_grpc
from smelt.inference.v1 import inference_pb2_grpc
from smelt.job.v1 import job_pb2, job_pb2_grpc
from smelt.sandbox.v1 import sandbox_pb2_grpc
from smelt.tenant.v1 import tenant_pb2_grpc
from smelt.trainer.v1 import trainer_pb2_grpc

from gateway.cli import follow
from gateway.cli.documents import to_document
from gateway.cli.output import Output
from gateway.cli.platform import configured_gateway
from smeltkit import limits
from smeltkit.config import from_environment
from smeltkit.errors import ServiceUnavailable
from smeltkit.ids import digest_digits
from smeltkit.rpc import channel as rpc
from smeltkit.rpc.server import RpcConfig
from smeltkit.rpc.status import is_unreachable


class Session:
    """Stubs of every service and the output of one command."""

    def __init__(self, channel: grpc.aio.Channel, output: Output, address: str = "") -> None:
        self.output = output
        self._address = address
        self.artifacts = artifact_pb2_grpc.ArtifactServiceStub(channel)
        self.jobs = job_pb2_grpc.JobServiceStub(channel)
        self.importer = importer_pb2_grpc.ImporterServiceStub(channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.evaluator = evaluator_pb2_grpc.EvaluatorServiceStub(channel)
        self.trainer = trainer_pb2_grpc.TrainerServiceStub(channel)
        self.tenants = tenant_pb2_grpc.TenantServiceStub(channel)
        self.sandbox = sandbox_pb2_grpc.SandboxServiceStub(channel)

    async def call(self, method: Any, request: Message, *, timeout_s: float = limits.COMMAND_TIMEOUT_S) -> Any:
        """The reply of a unary call; raises the SmeltError that it carries."""
        try:
            return await rpc.call(method, request, timeout_s=timeout_s)
        except ServiceUnavailable as error:
            self._explain(error)
            raise

    @asynccontextmanager
    async def stream(self, method: Any, request: Any, *, timeout_s: float) -> AsyncIterator[AsyncIterator[Any]]:
        """The replies of a streaming call, cancelled when the block is left."""
        try:
            async with rpc.stream(method, request, timeout_s=timeout_s) as replies:
                yield replies
        except ServiceUnavailable as error:
            self._explain(error)
            raise

    async def artifact(self, reference: str) -> artifact_pb2.Artifact:
        """The artifact of a name, a digest or its first digits; UnknownModel, UnknownArtifact, AmbiguousReference."""
        request = artifact_pb2.GetArtifactRequest(reference=reference)
        reply: artifact_pb2.GetArtifactResponse = await self.call(self.artifacts.GetArtifact, request)
        return reply.artifact

    async def whole(self, reference: str) -> str:
        """`reference`, or the whole digest that it is the beginning of: services know names and whole digests."""
        return (await self.artifact(reference)).digest if digest_digits(reference) else reference

    async def finish(self, job: job_pb2.Job) -> job_pb2.Job:
        """Follows the job to its end, showing progress; JobFailed or JobCancelled if it gives no result."""
        return await follow.finish(self, job)

    async def finish_or_show(self, job: job_pb2.Job, *, wait: bool) -> job_pb2.Job | None:
        """The job at its end, see `finish`; where nobody wants to wait, it is shown as it is, and None."""
        if wait:
            return await self.finish(job)
        self.output.show(to_document(job), job.id)
        return None

    def _explain(self, error: ServiceUnavailable) -> None:
        """Raises the error anew if no gateway answers, as a person knows it; what a service behind it says stays."""
        if not is_unreachable(error):
            return
        if configured_gateway():
            where, remedy = (
                f"{self._address} (SMELT_GATEWAY)",
                "there, or unset SMELT_GATEWAY to use this machine's own",
            )
        else:
            where, remedy = f"{self._address} any more", "again"
        raise ServiceUnavailable(f"nothing answers at {where}; start the platform with `smelt up` {remedy}") from error


@asynccontextmanager
async def open_session(address: str, output: Output) -> AsyncIterator[Session]:
    """A session at the gateway at `address`, with the token and the certificate that SMELT_RPC_* name."""
    config = from_environment(RpcConfig, "SMELT_RPC_")
    async with rpc.open_channel(address, token=config.secret(), identity=config.identity(), peer="gateway") as channel:
        yield Session(channel, output, address)
