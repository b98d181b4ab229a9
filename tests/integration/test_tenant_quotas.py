"""Tenants at two real gateways on real NATS and S3: bytes and GPU seconds are bounded, also after a restart."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from smelt.artifact.v1 import artifact_pb2, artifact_pb2_grpc
from smelt.importer.v1 import importer_pb2, importer_pb2_grpc
from smelt.inference.v1 import inference_pb2, inference_pb2_grpc
from smelt.job.v1 import job_pb2, job_pb2_grpc
from smelt.tenant.v1 import tenant_pb2, tenant_pb2_grpc
from smelt.trainer.v1 import trainer_pb2, trainer_pb2_grpc

from gateway.tenants.keys import hash_key
from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import Bus, topology
from smeltkit.config import PlatformConfig, environment
from smeltkit.errors import CallerDenied, KeyDenied, NameTaken, QuotaUsedUp, UnknownJob
from smeltkit.ids import digest_bytes
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.plan import Plan, to_plan
from smeltkit.jobs.worker import JobContext, Worker
from smeltkit.manifest import BUNDLE_TYPE, Descriptor, Manifest
from smeltkit.rpc.channel import call, open_channel, stream
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.testing.nats import nats_server
from smeltkit.testing.s3 import S3Server, fresh_store

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "platform"
KEYS = f"""
alice {hash_key("sk-alice")} bytes=1000/90000000
bob {hash_key("sk-bob")} bytes=5000/90000000 gpu=1/90000000
carol {hash_key("sk-carol")} tokens=5/60
"""


class Importer(importer_pb2_grpc.ImporterServiceServicer, trainer_pb2_grpc.TrainerServiceServicer):
    """Imports what is said to have as many bytes as its name says, and trains until it is told to stop."""

    def __init__(self, ledger: JobLedger, store: S3Store) -> None:
        self._ledger, self._store = ledger, store
        self.may_end = asyncio.Event()

    async def PlanImport(
        self, request: importer_pb2.PlanImportRequest, context: Any
    ) -> importer_pb2.PlanImportResponse:
        return importer_pb2.PlanImportResponse(plan=to_plan(Plan(write_bytes=int(request.spec.name))))

    async def StartImport(self, request: Any, context: Any) -> importer_pb2.StartImportResponse:
        return importer_pb2.StartImportResponse(job=await self._start("importer", "import", request))

    async def PlanTrain(self, request: trainer_pb2.PlanTrainRequest, context: Any) -> trainer_pb2.PlanTrainResponse:
        return trainer_pb2.PlanTrainResponse(plan=to_plan(Plan()))

    async def StartTrain(self, request: Any, context: Any) -> trainer_pb2.StartTrainResponse:
        return trainer_pb2.StartTrainResponse(job=await self._start("trainer", "train", request))

    async def _start(self, service: str, kind: str, request: Any) -> job_pb2.Job:
        return await self._ledger.start(service=service, kind=kind, request=request.spec, request_id=request.request_id)

    async def do_import(self, context: JobContext) -> str:
        """Stores two files, one of which every import has."""
        data = [b"the same of all", context.job_id.encode()]
        layers = [
            Descriptor(media_type="text/plain", digest=self._store.put_bytes(part), size_bytes=len(part), path=f"{n}")
            for n, part in enumerate(data)
        ]
        return self._store.put_manifest(Manifest(artifact_type=BUNDLE_TYPE, config={}, layers=tuple(layers)))

    async def do_train(self, context: JobContext) -> str:
        """Holds four GPUs, and tells how far it is."""
        with context.holding_gpus(4):
            while not self.may_end.is_set():
                await context.progress("train", 0, 0)
                await asyncio.sleep(0.05)
        return ""


class Client:
    """Somebody with a key, at one gateway or at several."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.artifacts = artifact_pb2_grpc.ArtifactServiceStub(channel)
        self.jobs = job_pb2_grpc.JobServiceStub(channel)
        self.importer = importer_pb2_grpc.ImporterServiceStub(channel)
        self.trainer = trainer_pb2_grpc.TrainerServiceStub(channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.tenants = tenant_pb2_grpc.TenantServiceStub(channel)

    async def upload(self, name: str, size_bytes: int) -> Any:
        request = artifact_pb2.BeginUploadRequest(digest=digest_bytes(name.encode()), size_bytes=size_bytes)
        return await call(self.artifacts.BeginUpload, request, timeout_s=20)

    async def begin(self, request_id: str, size_bytes: int) -> job_pb2.Job:
        spec = importer_pb2.ImportSpec(name=str(size_bytes))
        request = importer_pb2.StartImportRequest(spec=spec, request_id=request_id)
        return (await call(self.importer.StartImport, request, timeout_s=20)).job

    async def plan(self, size_bytes: int) -> job_pb2.Plan:
        request = importer_pb2.PlanImportRequest(spec=importer_pb2.ImportSpec(name=str(size_bytes)))
        return (await call(self.importer.PlanImport, request, timeout_s=20)).plan

    async def train(self, request_id: str) -> job_pb2.Job:
        return (
            await call(self.trainer.StartTrain, trainer_pb2.StartTrainRequest(request_id=request_id), timeout_s=20)
        ).job

    async def job(self, id: str) -> job_pb2.Job:
        return (await call(self.jobs.GetJob, job_pb2.GetJobRequest(id=id), timeout_s=20)).job

    async def usage(self) -> dict[str, dict[str, float]]:
        reply = await call(self.tenants.ListUsage, tenant_pb2.ListUsageRequest(), timeout_s=20)
        return {one.tenant: {usage.resource: usage.used for usage in one.usages} for one in reply.tenants}


@pytest.fixture(scope="module")
def served(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PlatformConfig, Path]]:
    """A NATS of this file's own, since its workers take every job, and a file of keys."""
    folder = tmp_path_factory.mktemp("tenants")
    (folder / "keys").write_text(KEYS)
    with nats_server() as nats:
        yield replace(fresh_store(s3, folder).config, nats_url=nats.config.nats_url), folder


@asynccontextmanager
async def gateways(platform: PlatformConfig, folder: Path, importer: str, count: int) -> AsyncIterator[list[str]]:
    """Addresses of processes of the gateway, which are killed at the end."""
    names = {f"SMELT_PLATFORM_{key.upper()}": str(value) for key, value in asdict(platform).items()}
    services = ("importer", "trainer", "inference", "evaluator", "sandbox")
    names |= {f"SMELT_GATEWAY_{name.upper()}_ADDRESS": importer for name in services}
    names |= {"SMELT_RPC_TOKEN": TOKEN, "SMELT_HTTP_API_KEYS_FILE": str(folder / "keys")}
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway"), cwd=ROOT, env=environment(names), stdout=asyncio.subprocess.PIPE
        )
        for _ in range(count)
    ]
    try:
        yield await asyncio.gather(*map(_address, processes))
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _address(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    told: list[str] = []
    async with asyncio.timeout(60):
        while text := (await process.stdout.readline()).decode():
            told.append((line := json.loads(text))["message"])
            if told[-1] == "serving":
                return str(line["address"])
    raise AssertionError(f"the gateway ended: {told}")


async def used(bob: Client, resource: str, is_so: Callable[[float], bool]) -> None:
    """Returns once what bob used of a resource is so."""
    async with asyncio.timeout(60):
        while True:
            if is_so((await bob.usage())["bob"][resource]):
                return
            await asyncio.sleep(0.1)


async def test_quotas_of_bytes_and_gpu_seconds_hold_at_two_gateways_and_after_a_restart(
    served: tuple[PlatformConfig, Path],
) -> None:
    platform, folder = served
    async with AsyncExitStack() as stack:
        bus = await Bus.connect(platform, name="test")
        stack.push_async_callback(bus.close)
        await topology.apply(bus)
        ledger, store = JobLedger(bus), S3Store(platform)
        service, host = Importer(ledger, store), ServiceHost("importer", RpcConfig(token=TOKEN))
        add = importer_pb2_grpc.add_ImporterServiceServicer_to_server
        host.add("smelt.importer.v1.ImporterService", add, service)
        host.add("smelt.trainer.v1.TrainerService", trainer_pb2_grpc.add_TrainerServiceServicer_to_server, service)
        host.set_ready(True)
        await host.start()
        stack.push_async_callback(host.stop)
        stop = asyncio.Event()
        kinds = {"importer": {"import": service.do_import}, "trainer": {"train": service.do_train}}
        workers = [asyncio.create_task(Worker(bus, ledger, name, kind).run(stop)) for name, kind in kinds.items()]
        try:
            async with gateways(platform, folder, host.address, 2) as addresses:
                await at_two_gateways(addresses, service)
            async with gateways(platform, folder, host.address, 1) as (address,):
                await after_a_restart(address)
        finally:
            stop.set()
            service.may_end.set()
            await asyncio.gather(*workers)


async def at_two_gateways(addresses: Sequence[str], service: Importer) -> None:
    async with AsyncExitStack() as stack:

        async def client(address: str, token: str) -> Client:
            return Client(await stack.enter_async_context(open_channel(address, token=token, is_retrying=False)))

        alices = [await client(address, "sk-alice") for address in addresses]
        bobs = [await client(address, "sk-bob") for address in addresses]
        operator, carol = await client(addresses[0], TOKEN), await client(addresses[0], "sk-carol")
        await uploads_race(alices)
        job = await jobs_are_charged_once(bobs, operator)
        with pytest.raises(UnknownJob):
            await alices[0].job(job.id)
        with pytest.raises(KeyDenied, match="carol is for completions"):
            await carol.usage()
        with pytest.raises(CallerDenied, match="alice may not call .*Load with an API key"):
            await call(alices[0].inference.Load, inference_pb2.LoadRequest(), timeout_s=20)
        assert set(await alices[1].usage()) == {"alice"} and set(await operator.usage()) == {"alice", "bob", "carol"}
        await names_stay_with_who_gave_them(alices[0], bobs[1], operator, (await bobs[0].job(job.id)).result_digest)
        await gpus_are_used_up(bobs, service)


async def uploads_race(alices: Sequence[Client]) -> None:
    """Ten uploads of 300 bytes at once: three fit into 1,000, whoever asks where; repeating one costs nothing."""
    uploads = [alices[n % 2].upload(f"file {n}", 300) for n in range(10)]
    ends = await asyncio.gather(*uploads, return_exceptions=True)
    refused = [end for end in ends if isinstance(end, QuotaUsedUp)]
    assert len(refused) == 7 and len([end for end in ends if not isinstance(end, BaseException)]) == 3
    assert "alice used 900 of 1,000 bytes stored" in refused[0].message and "needs 300 more" in refused[0].message
    assert "have bytes= raised" in refused[0].message and (refused[0].retry_after_s or 0) > 0
    admitted = next(n for n, end in enumerate(ends) if not isinstance(end, BaseException))
    for alice in alices:
        await alice.upload(f"file {admitted}", 300)
        assert await alice.usage() == {"alice": {"bytes": 900}}
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await alices[0].artifacts.BeginUpload(
            artifact_pb2.BeginUploadRequest(digest=digest_bytes(b"one more"), size_bytes=101), timeout=20
        )
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    told = dict(raised.value.trailing_metadata() or ())["grpc-status-details-bin"]
    failure = error_details_pb2.QuotaFailure()
    assert any(detail.Unpack(failure) for detail in status_pb2.Status.FromString(bytes(told)).details)  # type: ignore[arg-type]
    assert failure.violations[0].subject == "tenant:alice"


async def jobs_are_charged_once(bobs: Sequence[Client], operator: Client) -> job_pb2.Job:
    """The plan shows what would be refused; a job's forecast gives way to the files that it made."""
    fits, too_large = await bobs[0].plan(4000), await bobs[0].plan(5001)
    assert [(item.name, item.value) for item in fits.items] == [
        ("quota of bytes", "0 of 5,000 used in 90000000 s"), ("quota of gpu", "0 of 1 used in 90000000 s"),
    ]  # fmt: skip
    assert not fits.refusals and [refusal.reason for refusal in too_large.refusals] == ["QUOTA_USED_UP"]
    with pytest.raises(QuotaUsedUp, match="bob used 0 of 5,000 bytes stored .* needs 5,001 more"):
        await bobs[1].begin("too large", 5001)
    first, again = await asyncio.gather(*(bob.begin("once", 4000) for bob in bobs))
    assert first.id == again.id and first.tenant == "bob"
    made = len(b"the same of all") + len(first.id)
    await used(bobs[1], "bytes", lambda amount: amount == made)
    assert (await operator.job(first.id)).tenant == "bob"
    listed = await call(bobs[0].jobs.ListJobs, job_pb2.ListJobsRequest(), timeout_s=20)
    assert [job.id for job in listed.jobs] == [first.id]
    return first


async def names_stay_with_who_gave_them(alice: Client, bob: Client, operator: Client, digest: str) -> None:
    """Plan, start and renaming are refused; the platform alone learns whose a name is."""
    naming = artifact_pb2.SetNameRequest(name="31", digest=digest)
    await call(alice.artifacts.SetName, naming, timeout_s=20)
    assert [refusal.reason for refusal in (await bob.plan(31)).refusals] == ["NAME_TAKEN"]
    for taking in (bob.begin("another's name", 31), call(bob.artifacts.SetName, naming, timeout_s=20)):
        with pytest.raises(NameTaken, match="31:latest was given by another tenant or by the platform"):
            await taking
    assert not (await alice.plan(31)).refusals
    for who, told in ((bob, ""), (operator, "alice")):
        names = (await call(who.artifacts.ListNames, artifact_pb2.ListNamesRequest(), timeout_s=20)).names
        assert [(name.name, name.tenant) for name in names] == [("31:latest", told)]


async def gpus_are_used_up(bobs: Sequence[Client], service: Importer) -> None:
    """Seconds count while a job holds GPUs, each GPU; the next training is refused, this one ends in peace."""
    job = await bobs[0].train("first")
    await used(bobs[1], "gpu", lambda amount: amount >= 1)
    with pytest.raises(QuotaUsedUp, match="bob used .* of 1 GPU seconds"):
        await bobs[1].train("second")
    service.may_end.set()
    async with stream(bobs[0].jobs.WatchJob, job_pb2.WatchJobRequest(id=job.id), timeout_s=60) as answers:
        ended = [answer.job async for answer in answers][-1]
    assert ended.state == job_pb2.JOB_STATE_SUCCEEDED and ended.gpu_s >= 1
    await used(bobs[1], "gpu", lambda amount: amount == ended.gpu_s)


async def after_a_restart(address: str) -> None:
    """What was used is still used; the command line shows it to whoever works the platform."""
    async with open_channel(address, token="sk-alice", is_retrying=False) as channel:
        with pytest.raises(QuotaUsedUp):
            await Client(channel).upload("another", 101)
    names = environment({"SMELT_GATEWAY": address, "SMELT_RPC_TOKEN": TOKEN})
    command = (sys.executable, "-m", "gateway.cli.main", "admin", "usage", "--json")
    shown = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=names, stdout=asyncio.subprocess.PIPE)
    out, _ = await shown.communicate()
    tenants = {
        one["tenant"]: {usage["resource"]: usage for usage in one["usages"]} for one in json.loads(out)["tenants"]
    }
    assert tenants["alice"]["bytes"]["used"] == 900 and tenants["alice"]["bytes"]["allowed"] == 1000
    assert tenants["bob"]["gpu"]["used"] >= 1 and tenants["bob"]["gpu"]["renew_time"] and "carol" in tenants
