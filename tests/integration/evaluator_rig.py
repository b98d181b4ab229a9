"""The evaluator as a real process on real NATS and S3, and a caller of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from smelt.evaluator.v1 import evaluator_pb2, evaluator_pb2_grpc
from smelt.job.v1 import job_pb2

from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import Bus
from smeltkit.catalog import Catalog
from smeltkit.config import PlatformConfig
from smeltkit.jobs import model
from smeltkit.jobs.ledger import JobLedger
from smeltkit.manifest import BUNDLE_TYPE, Descriptor, Manifest
from smeltkit.rpc.channel import call, open_channel
from smeltkit.testing.processes import ServiceProcess, service_process

CALL_TIMEOUT_S = 60.0


def platform_settings(platform: PlatformConfig) -> dict[str, str]:
    """The platform as environment settings of a service."""
    return {
        "SMELT_PLATFORM_NATS_URL": platform.nats_url,
        "SMELT_PLATFORM_S3_ENDPOINT": platform.s3_endpoint,
        "SMELT_PLATFORM_S3_ACCESS_KEY": platform.s3_access_key,
        "SMELT_PLATFORM_S3_SECRET_KEY": platform.s3_secret_key,
        "SMELT_PLATFORM_S3_BUCKET": platform.s3_bucket,
    }


@contextmanager
def evaluator_process(
    platform: PlatformConfig, folder: Path, *, inference: str, sandbox: str, data_dir: Path | None = None
) -> Iterator[ServiceProcess]:
    """A running evaluator that calls these addresses. It downloads data only if it was to look for it in vain."""
    settings = {
        **platform_settings(platform),
        "SMELT_EVALUATOR_INFERENCE_ADDRESS": inference,
        "SMELT_EVALUATOR_SANDBOX_ADDRESS": sandbox,
        "SMELT_EVALUATOR_DOWNLOAD": str(data_dir is not None and not data_dir.is_dir()).lower(),
        "SMELT_EVALUATOR_DATA_DIR": str(data_dir or ""),
    }
    with service_process("evaluator", settings, folder) as process:
        yield process


@dataclass(frozen=True, kw_only=True)
class EvaluatorRig:
    """A caller's view of the evaluator."""

    stub: evaluator_pb2_grpc.EvaluatorServiceStub
    bus: Bus
    store: S3Store
    ledger: JobLedger
    catalog: Catalog

    async def put_bundle(self, *, has_template: bool = True) -> str:
        """A stored bundle that only a fake would serve; its digest."""
        paths = ("tokenizer.json", "contract.json", "config.json", *(["chat_template.jinja"] if has_template else []))
        data = uuid4().bytes
        blob = self.store.put_bytes(data)
        layers = tuple(Descriptor(media_type="x", digest=blob, size_bytes=len(data), path=path) for path in paths)
        config = {
            "scheme": "BF16",
            "contract": {"context_tokens": 2048, "thinking": None},
            "architecture": {"vocab_size": 8192},
        }
        manifest = Manifest(artifact_type=BUNDLE_TYPE, config=config, layers=layers)
        digest = self.store.put_manifest(manifest)
        await self.catalog.set("tested", digest, BUNDLE_TYPE, manifest.size_bytes)
        return digest

    async def ask(self, method: str, **fields: Any) -> Any:
        """The reply of one call: `ask("GetReport", digest=...)`."""
        request = getattr(evaluator_pb2, f"{method}Request")(**fields)
        return await call(getattr(self.stub, method), request, timeout_s=CALL_TIMEOUT_S)

    async def start(self, request_id: str = "", **spec: Any) -> job_pb2.Job:
        """A started evaluation."""
        asked = evaluator_pb2.EvaluationSpec(**{"bundle": "tested", "suite": "basic", **spec})
        job: job_pb2.Job = (await self.ask("StartEvaluation", spec=asked, request_id=request_id or uuid4().hex)).job
        return job

    async def end(self, job: job_pb2.Job) -> job_pb2.Job:
        """The job once it is over."""
        return await self.until(job, lambda seen: seen.state in model.FINAL)

    async def until(self, job: job_pb2.Job, condition: Any) -> job_pb2.Job:
        """The job as soon as it meets `condition`, or is over."""
        async with aclosing(self.ledger.watch(job.id)) as seen:
            async for state in seen:
                if condition(state) or state.state in model.FINAL:
                    return state
        raise AssertionError(f"{job.id} never came so far")

    async def report(self, job: job_pb2.Job, *, with_samples: bool = False) -> evaluator_pb2.GetReportResponse:
        """The report of a job that must succeed."""
        done = await self.end(job)
        assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done
        reply: evaluator_pb2.GetReportResponse = await self.ask(
            "GetReport", digest=done.result_digest, with_samples=with_samples
        )
        return reply


@asynccontextmanager
async def evaluator_rig(address: str, platform: PlatformConfig, folder: Path) -> AsyncIterator[EvaluatorRig]:
    """A caller of the evaluator at `address`."""
    bus = await Bus.connect(platform, name="test")
    try:
        async with open_channel(address) as channel:
            yield EvaluatorRig(
                stub=evaluator_pb2_grpc.EvaluatorServiceStub(channel),
                bus=bus,
                store=S3Store(platform, state_folder=folder),
                ledger=JobLedger(bus),
                catalog=Catalog(bus),
            )
    finally:
        await bus.close()
