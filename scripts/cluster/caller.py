"""What a client does on a cluster: starts evaluations by whichever gateway answers, follows them, reads their reports.

Beside that, as nobody in a cluster could, it looks at what NATS holds: `Books` are held against what was asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from smelt.evaluator.v1 import evaluator_pb2, evaluator_pb2_grpc
from smelt.inference.v1 import inference_pb2, inference_pb2_grpc
from smelt.job.v1 import job_pb2, job_pb2_grpc

from scripts.cluster.cluster import Cluster
from scripts.cluster.replica import is_solved
from smeltkit.blobs.publish import store_bundle
from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import Bus
from smeltkit.bus.subjects import DEAD_STREAM, EVENTS_STREAM, event_subject
from smeltkit.catalog import Catalog
from smeltkit.errors import SmeltError
from smeltkit.jobs import model
from smeltkit.jobs.ledger import JobLedger
from smeltkit.manifest import BUNDLE_TYPE
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.lineage import Lineage
from smeltkit.rpc.channel import call, open_channel
from smeltkit.testing.tiny_models import write_tiny_model

NAME: Final = "scripted"
SUITE: Final = "basic"
FINISHED: Final = "evaluator.evaluation.finished"
_POLL_S, _CALL_S, _SETTLE_S = 0.1, 60.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Books:
    """What NATS holds at one moment."""

    open_jobs: Sequence[str]
    """Jobs that are not over."""
    leased: Sequence[str]
    """Jobs somebody holds a lease of."""
    finished: int
    """Facts that told of a finished evaluation."""
    dead: int
    """Dead letters."""
    is_queue_empty: bool
    """Whether no evaluation waits or is in the hands of a worker."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """A client, and an eye on the books."""

    evaluator: Any
    jobs: Any
    inference: Any
    model: str
    """Digest of the stored bundle."""
    ledger: JobLedger
    bus: Bus
    streams: Bus
    """Connected as the user that may look at streams."""

    async def start(self, request_id: str, *, seed: int, limit: int) -> str:
        """The job of an evaluation of the first `limit` problems; asked again while no gateway can say."""
        spec = evaluator_pb2.EvaluationSpec(bundle=NAME, suite=SUITE, limit=limit, seed=seed)
        request = evaluator_pb2.StartEvaluationRequest(spec=spec, request_id=request_id)
        return str((await self._patiently(self.evaluator.StartEvaluation, request)).job.id)

    async def get(self, id: str) -> job_pb2.Job:
        """The job as it is."""
        job: job_pb2.Job = (await self._patiently(self.jobs.GetJob, job_pb2.GetJobRequest(id=id))).job
        return job

    async def end(self, id: str, *, timeout_s: float) -> job_pb2.Job:
        """The job once it is over; TimeoutError if it is not within `timeout_s`."""
        async with asyncio.timeout(timeout_s):
            while True:
                job = await self.get(id)
                if job.state in model.FINAL:
                    return job
                await asyncio.sleep(_POLL_S)

    async def report(self, digest: str) -> evaluator_pb2.GetReportResponse:
        """A stored report with its samples."""
        request = evaluator_pb2.GetReportRequest(digest=digest, with_samples=True)
        reply: evaluator_pb2.GetReportResponse = await self._patiently(self.evaluator.GetReport, request)
        return reply

    async def load_everywhere(self, cluster: Cluster) -> None:
        """The model is ready on every replica."""
        async with AsyncExitStack() as stack:
            for pod in cluster.pods["inference"]:
                channel = await stack.enter_async_context(open_channel(pod.address, token=cluster.token))
                request = inference_pb2.LoadRequest(model=self.model)
                await call(inference_pb2_grpc.InferenceServiceStub(channel).Load, request, timeout_s=_CALL_S)

    async def books(self) -> Books:
        """What NATS holds now."""
        records, _ = await self.ledger.records()
        leases = [entry.key for entry in await self.ledger.leases.entries()]
        facts = await self.streams.call("counting facts", lambda: self._info(EVENTS_STREAM, event_subject(FINISHED)))
        dead = await self.streams.call("counting dead letters", lambda: self._info(DEAD_STREAM, ">"))
        return Books(
            open_jobs=[record.job.id for record in records if record.job.state not in model.FINAL],
            leased=[key for key in leases if key.startswith("job-")],
            finished=facts,
            dead=dead,
            is_queue_empty=await self.ledger.is_queue_empty("evaluator"),
        )

    async def settled(self, finished: int, *, dead: int = 0) -> Books:
        """The books once they are closed as they should be, else as they are after a while."""
        deadline = time.monotonic() + _SETTLE_S
        wanted = Books(open_jobs=[], leased=[], finished=finished, dead=dead, is_queue_empty=True)
        while True:
            found = await self.books()
            if found == wanted or time.monotonic() > deadline:
                return found
            await asyncio.sleep(_POLL_S)

    async def _info(self, stream: str, subjects: str) -> int:
        found = await self.streams.jetstream.stream_info(stream, subjects_filter=subjects)
        return sum((found.state.subjects or {}).values())

    async def _patiently(self, method: Any, request: Any) -> Any:
        """The reply; an error that may pass is waited out, as a person or a script would."""
        deadline = time.monotonic() + _CALL_S
        while True:
            try:
                return await call(method, request, timeout_s=_CALL_S)
            except SmeltError as error:
                if not error.retryable or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def calling(cluster: Cluster) -> AsyncIterator[Caller]:
    """A client of the cluster, whose model is stored under NAME."""
    platform = cluster.platform("importer")
    async with AsyncExitStack() as stack:
        bus = await Bus.connect(platform, name="importer")
        stack.push_async_callback(bus.close)
        streams = await Bus.connect(cluster.platform("topology"), name="books")
        stack.push_async_callback(streams.close)
        digest = await asyncio.to_thread(_stored_model, S3Store(platform), cluster.folder / "model")
        await Catalog(bus).set(NAME, digest, BUNDLE_TYPE, 1)
        channel = await stack.enter_async_context(open_channel(cluster.gateways, token=cluster.token))
        yield Caller(
            evaluator=evaluator_pb2_grpc.EvaluatorServiceStub(channel),
            jobs=job_pb2_grpc.JobServiceStub(channel),
            inference=inference_pb2_grpc.InferenceServiceStub(channel),
            model=digest,
            ledger=JobLedger(bus),
            bus=bus,
            streams=streams,
        )


def expected_passes(limit: int) -> int:
    """Problems of the first `limit` that the script solves."""
    return sum(map(is_solved, range(limit)))


def faults_of(report: evaluator_pb2.GetReportResponse, limit: int) -> list[str]:
    """What is lost, doubled or scored otherwise in a report on the first `limit` problems."""
    counts = Counter(sample.problem for sample in report.samples)
    wanted = {f"Basic/{number}" for number in range(limit)}
    found = [f"{name} is lost" for name in sorted(wanted - set(counts))]
    found += [f"{name} is there {count} times" for name, count in counts.items() if count > 1 or name not in wanted]
    passed = report.report.scores[0].passed
    if passed != expected_passes(limit):
        found.append(f"{passed} of {limit} passed, {expected_passes(limit)} must")
    return found


def _stored_model(store: S3Store, folder: Path) -> str:
    if not folder.exists():
        write_tiny_model(folder, "qwen3", is_chat=False, max_position_embeddings=2048)
    bundle = Bundle.from_folder(folder, lineage=Lineage(operation="import", code_revision="test"), licence="Apache-2.0")
    return store_bundle(store, folder, bundle, lambda done: None).digest
