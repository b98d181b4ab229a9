"""What the importer does when it is called: plan, start a job, look. Starting refuses at once what the plan refuses."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from smelt.importer.v1 import importer_pb2
from smelt.job.v1 import job_pb2

from services.importer import inspect, plan, spec
from services.importer.worker import Tools, announce
from smeltkit.errors import BadRequest
from smeltkit.ids import check_name
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.plan import Plan
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.quantization import scheme_of


class Importer:
    """The verbs of the service, as plain calls."""

    def __init__(self, tools: Tools, ledger: JobLedger) -> None:
        self._tools, self._ledger = tools, ledger

    async def plan_import(self, request: importer_pb2.ImportSpec) -> Plan:
        """The plan of an import."""
        return (await self._plan_import(request))[0]

    async def start_import(self, request: importer_pb2.ImportSpec, request_id: str) -> job_pb2.Job:
        """A job that imports, with the hub's commit pinned; it has succeeded at once if the result is stored."""
        if request.name:
            check_name(request.name)
        found, pinned = await self._plan_import(request)
        return await self._start("import", pinned, found, pinned.name, request_id)

    async def plan_quantize(self, request: importer_pb2.QuantizeSpec) -> Plan:
        """The plan of a quantization."""
        return (await self._plan_quantize(request))[0]

    async def start_quantize(self, request: importer_pb2.QuantizeSpec, request_id: str) -> job_pb2.Job:
        """A job that quantizes the bundle which the name means now."""
        if request.name:
            check_name(request.name)
        found, pinned = await self._plan_quantize(request)
        return await self._start("quantize", pinned, found, pinned.name, request_id)

    async def start_check(self, bundle: str, request_id: str) -> job_pb2.Job:
        """A job that checks the bundle which the name means now."""
        digest = await self._tools.catalog.resolve(bundle)
        Bundle.from_manifest(await asyncio.to_thread(self._tools.store.get_manifest, digest))
        request = importer_pb2.StartCheckRequest(bundle=digest)
        return await self._ledger.start(service="importer", kind="check", request=request, request_id=request_id)

    async def inspect(self, bundle: str) -> inspect.BundleView:
        """The view of a bundle."""
        digest = await self._tools.catalog.resolve(bundle)
        return await asyncio.to_thread(inspect.view_of, self._tools.store, digest)

    async def _plan_import(self, request: importer_pb2.ImportSpec) -> tuple[Plan, importer_pb2.ImportSpec]:
        source = spec.source_of(request, self._tools.cache)
        snapshot = await asyncio.to_thread(source.snapshot)
        spec.import_lineage(snapshot)
        pinned = importer_pb2.ImportSpec()
        pinned.CopyFrom(request)
        if pinned.WhichOneof("source") == "hub":
            pinned.hub.revision = str(snapshot.parameters["commit"])
        cached = await self._tools.stages.get(spec.import_key(self._tools.stages, snapshot))
        with self._tools.workspaces.folder() as folder:
            found = await asyncio.to_thread(plan.plan_import, source, snapshot, folder)
        return replace(found, cached_digest=cached or ""), pinned

    async def _plan_quantize(self, request: importer_pb2.QuantizeSpec) -> tuple[Plan, importer_pb2.QuantizeSpec]:
        if not request.bundle or not request.scheme:
            raise BadRequest("a quantization needs a bundle and a scheme, e.g. ore-11m and Q4_K_M")
        scheme_of(request.scheme)  # before the bundle is looked for, which a pipeline may have yet to make
        digest = await self._tools.catalog.resolve(request.bundle)
        manifest = await asyncio.to_thread(self._tools.store.get_manifest, digest)
        found = plan.plan_quantize(manifest, request.scheme)
        cached = await self._tools.stages.get(spec.quantize_key(self._tools.stages, digest, request.scheme))
        pinned = importer_pb2.QuantizeSpec(bundle=digest, scheme=request.scheme, name=request.name)
        return replace(found, cached_digest=cached or ""), pinned

    async def _start(
        self,
        kind: str,
        request: importer_pb2.ImportSpec | importer_pb2.QuantizeSpec,
        found: Plan,
        name: str,
        request_id: str,
    ) -> job_pb2.Job:
        found.check()
        job = await self._ledger.start(
            service="importer", kind=kind, request=request, request_id=request_id, cached_digest=found.cached_digest
        )
        if job.is_cached:
            manifest = await asyncio.to_thread(self._tools.store.get_manifest, job.result_digest)
            await announce(self._tools, manifest, name=name, operation=kind, job_id=job.id)
        return job
