"""What a service that works on jobs stands on: the store, the bus, and what lies in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from smeltkit.blobs.s3 import S3Store
from smeltkit.bus.client import Bus
from smeltkit.catalog import Catalog
from smeltkit.config import PlatformConfig
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.stages import StageCache
from smeltkit.jobs.sweeper import Sweeper
from smeltkit.jobs.worker import Handler, Worker
from smeltkit.rpc.server import Background, ServiceHost


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Connected as the service `name`."""

    name: str
    store: S3Store
    bus: Bus
    catalog: Catalog
    ledger: JobLedger
    stages: StageCache

    async def run(
        self, host: ServiceHost, handlers: Mapping[str, Handler], *background: Background, slots: int
    ) -> None:
        """Serves what `host` has, works on `slots` jobs at once and sweeps, until SIGTERM."""
        worker = Worker(self.bus, self.ledger, self.name, handlers, slots=slots)
        host.set_ready(True)
        await host.run(worker.run, Sweeper(self.ledger).run, *background)


@asynccontextmanager
async def open_workshop(name: str, platform: PlatformConfig) -> AsyncIterator[Workshop]:
    """The workshop of service `name`. StoreDenied or BadCertificate if the store would refuse it; BusUnavailable."""
    store = S3Store(platform)
    await asyncio.to_thread(store.prove)
    bus = await Bus.connect(platform, name=name)

    async def exists(digest: str) -> bool:
        return await asyncio.to_thread(store.has_manifest, digest)

    try:
        yield Workshop(
            name=name,
            store=store,
            bus=bus,
            catalog=Catalog(bus),
            ledger=JobLedger(bus),
            stages=StageCache(bus, exists),
        )
    finally:
        await bus.close()
