"""The importer and the inference service as real processes on real NATS and S3, for tests about whole imports."""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from smelt.artifact.v1 import artifact_pb2
from smelt.importer.v1 import importer_pb2, importer_pb2_grpc
from smelt.job.v1 import job_pb2

from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import Bus
from smeltkit.catalog import Catalog
from smeltkit.config import PlatformConfig
from smeltkit.jobs.ledger import JobLedger
from smeltkit.rpc.channel import call, open_channel
from smeltkit.testing.processes import ServiceProcess, service_process

CALL_TIMEOUT_S = 60.0


@contextmanager
def import_services(
    platform: PlatformConfig, folder: Path, extra: Mapping[str, str] | None = None
) -> Iterator[ServiceProcess]:
    """A running importer (yielded) and inference service on `platform`; `extra` settings go to the importer."""
    with _inference(platform, folder) as shared, _service("importer", shared, folder, extra or {}) as importer:
        yield importer


@contextmanager
def trainer_service(
    platform: PlatformConfig, folder: Path, extra: Mapping[str, str] | None = None
) -> Iterator[ServiceProcess]:
    """A running trainer (yielded), with `extra` settings, and the inference service that it asks for probes."""
    settings = {"SMELT_TRAINER_THREADS": "1", **(extra or {})}
    with _inference(platform, folder) as shared, _service("trainer", shared, folder, settings) as trainer:
        yield trainer


@contextmanager
def _inference(platform: PlatformConfig, folder: Path) -> Iterator[Mapping[str, str]]:
    """An inference service; settings by which others find the platform and it, with NAME for their own prefix."""
    shared = {
        "SMELT_PLATFORM_NATS_URL": platform.nats_url,
        "SMELT_PLATFORM_S3_ENDPOINT": platform.s3_endpoint,
        "SMELT_PLATFORM_S3_ACCESS_KEY": platform.s3_access_key,
        "SMELT_PLATFORM_S3_SECRET_KEY": platform.s3_secret_key,
        "SMELT_PLATFORM_S3_BUCKET": platform.s3_bucket,
    }
    engine = {**shared, "SMELT_INFERENCE_CACHE_DIR": str(folder / "inference"), "SMELT_INFERENCE_KV_BYTES": "67108864"}
    with service_process("inference", engine, folder) as inference:
        yield {**shared, "SMELT_NAME_INFERENCE_ADDRESS": inference.address}


@contextmanager
def _service(name: str, shared: Mapping[str, str], folder: Path, extra: Mapping[str, str]) -> Iterator[ServiceProcess]:
    prefix = f"SMELT_{name.upper()}_"
    settings = {key.replace("SMELT_NAME_", prefix): value for key, value in shared.items()}
    settings |= {f"{prefix}CACHE_DIR": str(folder / name), **extra}
    with service_process(name, settings, folder) as process:
        yield process


@dataclass(frozen=True, kw_only=True)
class ImportRig:
    """A caller's view of the importer."""

    stub: importer_pb2_grpc.ImporterServiceStub
    bus: Bus
    store: S3Store
    ledger: JobLedger
    catalog: Catalog

    def upload(self, folder: Path, origin: str = "upload") -> importer_pb2.UploadSource:
        """The files of a folder, stored as blobs and named as a source."""
        files = []
        for path in sorted(folder.iterdir()):
            digest, size_bytes = self.store.put_file(path)
            media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            files.append(
                artifact_pb2.Descriptor(media_type=media_type, digest=digest, size_bytes=size_bytes, path=path.name)
            )
        return importer_pb2.UploadSource(files=files, origin=origin)

    async def start_import(self, spec: importer_pb2.ImportSpec, request_id: str = "") -> job_pb2.Job:
        """A started import."""
        request = importer_pb2.StartImportRequest(spec=spec, request_id=request_id or uuid4().hex)
        response: importer_pb2.StartImportResponse = await call(
            self.stub.StartImport, request, timeout_s=CALL_TIMEOUT_S
        )
        return response.job

    async def start_quantize(self, bundle: str, scheme: str, name: str = "") -> job_pb2.Job:
        """A started quantization."""
        spec = importer_pb2.QuantizeSpec(bundle=bundle, scheme=scheme, name=name)
        request = importer_pb2.StartQuantizeRequest(spec=spec, request_id=uuid4().hex)
        response = await call(self.stub.StartQuantize, request, timeout_s=CALL_TIMEOUT_S)
        job: job_pb2.Job = response.job
        return job

    async def end(self, job: job_pb2.Job) -> job_pb2.Job:
        """The job once it is over."""
        return await self.leaves(job, job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_CANCELLING)

    async def leaves(self, job: job_pb2.Job, *states: job_pb2.JobState.ValueType) -> job_pb2.Job:
        """The job once it is in none of `states`."""
        async with aclosing(self.ledger.watch(job.id)) as seen:
            async for state in seen:
                if state.state not in states:
                    return state
        raise AssertionError(f"{job.id} stayed in {states}")

    async def import_folder(self, folder: Path, name: str = "") -> job_pb2.Job:
        """A finished import of a folder."""
        return await self.end(await self.start_import(importer_pb2.ImportSpec(upload=self.upload(folder), name=name)))

    async def quantize(self, bundle: str, scheme: str, name: str = "") -> job_pb2.Job:
        """A finished quantization."""
        return await self.end(await self.start_quantize(bundle, scheme, name))


@asynccontextmanager
async def import_rig(address: str, platform: PlatformConfig, folder: Path) -> AsyncIterator[ImportRig]:
    """A caller of the importer at `address`."""
    bus = await Bus.connect(platform, name="test")
    try:
        async with open_channel(address) as channel:
            yield ImportRig(
                stub=importer_pb2_grpc.ImporterServiceStub(channel),
                bus=bus,
                store=S3Store(platform, state_folder=folder),
                ledger=JobLedger(bus),
                catalog=Catalog(bus),
            )
    finally:
        await bus.close()


def succeeded(job: job_pb2.Job) -> str:
    """The result of a job that must have succeeded."""
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job
    return job.result_digest
