"""Jobs to domain: import, quantize, check. A name is given to a bundle only after its probe passed.

Every step may run again: files are stored by digest, the manifest is the same for the same input, and a name is set
by compare-and-swap. An attempt that lost its lease stops before the next effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smelt.event.v1 import event_pb2
from smelt.importer.v1 import importer_pb2

from services.importer import check, spec
from services.importer.build import build_import, build_quantized
from services.importer.config import ImporterConfig
from smeltkit import probing
from smeltkit.errors import BadRequest
from smeltkit.jobs import threads
from smeltkit.jobs.bench import Bench
from smeltkit.jobs.threads import Reporter
from smeltkit.jobs.worker import Handler, JobContext
from smeltkit.manifest import BUNDLE_TYPE, Manifest
from smeltkit.telemetry import span


@dataclass(frozen=True, kw_only=True)
class Tools(Bench):
    """What the importer works with."""

    config: ImporterConfig


class Handlers:
    """The kinds of jobs of the importer."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def by_kind(self) -> Mapping[str, Handler]:
        """Kind of job to what does it."""
        return {"import": self.import_model, "quantize": self.quantize, "check": self.check}

    async def import_model(self, context: JobContext) -> str:
        """Makes a bundle of the source that an ImportSpec names; its digest."""
        request = importer_pb2.ImportSpec.FromString(context.request)
        source = spec.source_of(request, self._tools.cache)
        snapshot = await threads.run(context, source.snapshot)
        key = spec.import_key(self._tools.stages, snapshot)
        digest = await self._tools.stages.get(key)
        if digest is None:
            with self._tools.workspaces.folder() as folder:
                report = Reporter(context)
                made = await threads.run(context, build_import, self._tools.store, source, snapshot, folder, report)
            digest = made.digest
            await self._prove(context, key, digest)
        return await self._publish(context, digest, request.name, "import")

    async def quantize(self, context: JobContext) -> str:
        """Makes a GGUF bundle of the scheme that a QuantizeSpec names; its digest."""
        request = importer_pb2.QuantizeSpec.FromString(context.request)
        key = spec.quantize_key(self._tools.stages, request.bundle, request.scheme)
        digest = await self._tools.stages.get(key)
        if digest is None:
            manifest = await threads.run(context, self._tools.store.get_manifest, request.bundle)
            with self._tools.workspaces.folder() as folder:
                made = await threads.run(
                    context,
                    build_quantized,
                    self._tools.store,
                    self._tools.cache,
                    manifest,
                    request.scheme,
                    folder,
                    Reporter(context),
                    threads=self._tools.config.threads,
                )
            digest = made.digest
            await self._prove(context, key, digest)
        return await self._publish(context, digest, request.name, "quantize")

    async def check(self, context: JobContext) -> str:
        """Checks the bundle of a StartCheckRequest; the digest of the report."""
        bundle = importer_pb2.StartCheckRequest.FromString(context.request).bundle
        manifest = await threads.run(context, self._tools.store.get_manifest, bundle)
        report = Reporter(context).phase("verify", manifest.size_bytes)
        with self._tools.workspaces.folder() as folder:
            found = await threads.run(context, check.check_structure, self._tools.store, manifest, folder, report)
        record = await self._probe(context, bundle)
        await context.check_alive()
        return await threads.run(context, self._tools.store.put_manifest, check.to_report(bundle, found, record))

    async def _prove(self, context: JobContext, key: str, digest: str) -> None:
        await self._probe(context, digest)
        await context.check_alive()
        await self._tools.stages.put(key, digest)

    async def _probe(self, context: JobContext, digest: str) -> str:
        await context.progress("probe", 0, 1)
        with span("smelt.importer.probe"):
            return await probing.prove(self._tools.prober, self._tools.store, digest)

    async def _publish(self, context: JobContext, digest: str, name: str, operation: str) -> str:
        manifest = await threads.run(context, self._tools.store.get_manifest, digest)
        await context.check_alive()
        await announce(self._tools, manifest, name=name, operation=operation, job_id=context.job_id)
        return digest


async def announce(tools: Tools, manifest: Manifest, *, name: str, operation: str, job_id: str) -> None:
    """Gives a proven bundle its name, if it has one, and tells the world. Safe to repeat."""
    if manifest.artifact_type != BUNDLE_TYPE:
        raise BadRequest(f"{manifest.digest} is no bundle and cannot be named as one")
    if name:
        await tools.catalog.set(name, manifest.digest, BUNDLE_TYPE, manifest.size_bytes)
    stored = event_pb2.BundleStored(
        digest=manifest.digest, name=name, operation=operation, job_id=job_id, size_bytes=manifest.size_bytes
    )
    await tools.bus.publish_event("importer.bundle.stored", stored)
