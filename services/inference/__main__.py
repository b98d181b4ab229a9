"""Runs the inference service: `python -m services.inference`."""

from __future__ import annotations

import asyncio
from functools import partial

from smelt.inference.v1 import inference_pb2_grpc

from services.inference.config import InferenceConfig
from services.inference.events import ModelEvents
from services.inference.fallbacks import Fallbacks, cpu_flags, of_build, of_kernels
from services.inference.library import Library
from services.inference.llama import system_info, use_row_kernels
from services.inference.load import Load
from services.inference.models import Models
from services.inference.servicer import InferenceServicer
from smeltkit.blobs.s3 import S3Store
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.service import run_service


async def serve() -> None:
    """Serves until SIGTERM.

    Ready once llama.cpp is loaded, so it runs on this CPU, and with it all models that this replica is there for.
    """
    settings = from_environment(InferenceConfig, "SMELT_INFERENCE_")
    platform = from_environment(PlatformConfig, "SMELT_PLATFORM_")
    host = ServiceHost("inference", from_environment(RpcConfig, "SMELT_RPC_"))
    events = ModelEvents()
    fallbacks = Fallbacks(events.fell_back, is_strict=settings.strict)
    store = S3Store(platform)
    await asyncio.to_thread(store.prove)
    library = Library(store, settings, fallbacks)
    models = Models(
        library,
        events,
        budget_bytes=settings.memory_budget_bytes,
        idle_unload_s=settings.idle_unload_s,
        kept=settings.models,
    )
    load = Load(models.ready)
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    host.add("smelt.inference.v1.InferenceService", add, InferenceServicer(models, library, load))
    host.on_drain(load.close)
    fallbacks.report(of_build(cpu_flags(), await asyncio.to_thread(system_info)))
    is_wanted = not settings.is_upstream
    fallbacks.report(of_kernels(cpu_flags(), is_wanted=is_wanted, is_used=use_row_kernels(is_wanted)))

    async def get_ready(stop: asyncio.Event) -> None:
        await models.load_kept(stop)
        host.set_ready(not stop.is_set())

    await host.run(get_ready, models.sweep, partial(events.publish, platform))


if __name__ == "__main__":
    run_service("inference", serve)
