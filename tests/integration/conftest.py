"""Fixtures of integration tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from edge_fakes import Served, served_edge

from smeltkit.bus import Bus, topology
from smeltkit.config import PlatformConfig
from smeltkit.testing.hub import Hub, model_hub
from smeltkit.testing.importing import ImportRig, import_rig, import_services
from smeltkit.testing.jobs import JobRig, job_rig
from smeltkit.testing.nats import NatsServer
from smeltkit.testing.processes import ServiceProcess
from smeltkit.testing.s3 import S3Server, fresh_store


@pytest.fixture
async def rig() -> AsyncIterator[JobRig]:
    """Jobs on a NATS server of the test's own, with short bounds."""
    async with job_rig() as made:
        yield made


@pytest.fixture(scope="session")
def import_platform(nats: NatsServer, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> PlatformConfig:
    """NATS with its topology, and a bucket for the importer and the inference service."""
    config = fresh_store(s3, tmp_path_factory.mktemp("uploads")).config

    async def prepare() -> None:
        bus = await Bus.connect(nats.config, name="prepare")
        await topology.apply(bus)
        await bus.close()

    asyncio.run(prepare())
    return replace(config, nats_url=nats.config.nats_url)


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """A model hub, empty at first."""
    with model_hub() as running:
        yield running


@pytest.fixture(scope="session")
def importer(
    import_platform: PlatformConfig, hub: Hub, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """One importer, with its inference service and `hub` as its model hub, for all tests."""
    folder = tmp_path_factory.mktemp("services")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hub-cache")}
    with import_services(import_platform, folder, settings) as process:
        yield process


@pytest.fixture
async def importing(
    importer: ServiceProcess, import_platform: PlatformConfig, tmp_path: Path
) -> AsyncIterator[ImportRig]:
    """A caller of the importer."""
    async with import_rig(importer.address, import_platform, tmp_path / "state") as made:
        yield made


@pytest.fixture
async def edge() -> AsyncIterator[Served]:
    """An edge with default settings."""
    async with served_edge() as served:
        yield served


@pytest.fixture
async def client(edge: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client; it must not repeat requests here."""
    async with openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(edge: Served) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client."""
    async with httpx.AsyncClient(base_url=edge.url) as client:
        yield client
