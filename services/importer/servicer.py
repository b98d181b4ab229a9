"""Calls to verbs and back: nothing is decided here."""

from __future__ import annotations

from smelt.importer.v1 import importer_pb2, importer_pb2_grpc

from services.importer.verbs import Importer
from smeltkit.artifacts import to_artifact
from smeltkit.jobs.plan import to_plan
from smeltkit.rpc.context import RpcContext


class ImporterServicer(importer_pb2_grpc.ImporterServiceServicer):
    """Serves the verbs of `importer`."""

    def __init__(self, importer: Importer) -> None:
        self._importer = importer

    async def PlanImport(
        self, request: importer_pb2.PlanImportRequest, context: RpcContext
    ) -> importer_pb2.PlanImportResponse:
        """What an import would do."""
        return importer_pb2.PlanImportResponse(plan=to_plan(await self._importer.plan_import(request.spec)))

    async def StartImport(
        self, request: importer_pb2.StartImportRequest, context: RpcContext
    ) -> importer_pb2.StartImportResponse:
        """Imports a model as a bundle."""
        job = await self._importer.start_import(request.spec, request.request_id)
        return importer_pb2.StartImportResponse(job=job)

    async def PlanQuantize(
        self, request: importer_pb2.PlanQuantizeRequest, context: RpcContext
    ) -> importer_pb2.PlanQuantizeResponse:
        """What a quantization would do."""
        return importer_pb2.PlanQuantizeResponse(plan=to_plan(await self._importer.plan_quantize(request.spec)))

    async def StartQuantize(
        self, request: importer_pb2.StartQuantizeRequest, context: RpcContext
    ) -> importer_pb2.StartQuantizeResponse:
        """Converts a bundle to GGUF and quantizes it."""
        job = await self._importer.start_quantize(request.spec, request.request_id)
        return importer_pb2.StartQuantizeResponse(job=job)

    async def StartCheck(
        self, request: importer_pb2.StartCheckRequest, context: RpcContext
    ) -> importer_pb2.StartCheckResponse:
        """Checks a stored bundle."""
        return importer_pb2.StartCheckResponse(job=await self._importer.start_check(request.bundle, request.request_id))

    async def Inspect(self, request: importer_pb2.InspectRequest, context: RpcContext) -> importer_pb2.InspectResponse:
        """One view of a bundle."""
        view = await self._importer.inspect(request.bundle)
        tensors = [
            importer_pb2.Tensor(name=t.name, dtype=t.dtype, shape=t.shape, size_bytes=t.size_bytes)
            for t in view.tensors
        ]
        return importer_pb2.InspectResponse(
            artifact=to_artifact(view.manifest),
            tensors=tensors,
            parameters=view.bundle.config.parameters,
            rendered_example=view.rendered_example,
        )
