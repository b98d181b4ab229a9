"""What a service that makes bundles works with beside its workshop: bundles on this node, workspaces, and a prober."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.store import Store
from smeltkit.bus.client import Bus
from smeltkit.catalog import Catalog
from smeltkit.config import PlatformConfig
from smeltkit.jobs.stages import StageCache
from smeltkit.jobs.workshop import Workshop
from smeltkit.probing import InferenceProber, Prober
from smeltkit.rpc.server import RpcConfig
from smeltkit.workspaces import Workspaces


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The base of a service's tools."""

    store: Store
    cache: NodeCache
    workspaces: Workspaces
    stages: StageCache
    catalog: Catalog
    bus: Bus
    prober: Prober


async def bench_of(
    workshop: Workshop, platform: PlatformConfig, rpc: RpcConfig, *, inference: str, folder: Path, cache_bytes: int
) -> Bench:
    """The bench in `workshop`, with `cache_bytes` of bundles and all work under way below `folder`, and probes by the
    service at `inference`. Workspaces that dead processes left are removed first."""
    workspaces = Workspaces(folder / "work")
    await asyncio.to_thread(workspaces.reap)
    token, identity = rpc.secret(), rpc.identity()
    return Bench(
        store=workshop.store,
        cache=NodeCache(folder / "bundles", workshop.store, cache_bytes),
        workspaces=workspaces,
        stages=workshop.stages,
        catalog=workshop.catalog,
        bus=workshop.bus,
        prober=InferenceProber(inference, token=token, identity=identity, start_s=platform.inference_start_s),
    )
