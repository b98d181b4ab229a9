"""Shared fixtures: real servers on loopback, seeds, and one Hypothesis profile."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import Bus, topology
from smeltkit.config import PlatformConfig
from smeltkit.testing.nats import NatsServer, nats_server
from smeltkit.testing.s3 import S3Server, fresh_store, s3_server

settings.register_profile("smelt", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("smelt")

# A shell starts background commands with SIGINT ignored, and children inherit that: Ctrl-C could then not be tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
LONG = ("e2e", "integration", "unit/services/trainer", "deploy", "security")
"""Folders whose files take longest, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, so that at the end no process is left alone with it."""
    items.sort(key=lambda item: _place(item.path.relative_to(TESTS).as_posix()))


def _place(path: str) -> int:
    return next((place for place, folder in enumerate(LONG) if path.startswith(folder)), len(LONG))


class Schedule(LoadFileScheduling):
    """A file at a time, and the end-to-end tests as if they were one: they share a platform, one process starts it."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/e2e" if nodeid.startswith("tests/e2e/") else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Schedule:
    """Called where several processes test."""
    return Schedule(config, log)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One real S3 server a session."""
    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def second_s3() -> Iterator[S3Server]:
    """One S3 server of another make a session: what passes on both depends on neither."""
    with s3_server("rclone") as server:
        yield server


@pytest.fixture
def store(s3: S3Server, tmp_path: Path) -> S3Store:
    """A store on the session's server, in a bucket of its own."""
    return fresh_store(s3, tmp_path / "uploads")


@pytest.fixture(scope="session")
def nats() -> Iterator[NatsServer]:
    """One real NATS server a session; tests that kill it start their own with `nats_server()`."""
    with nats_server() as server:
        yield server


@pytest.fixture(scope="session")
def nats_url(nats: NatsServer) -> str:
    """Address of the session's NATS server, credentials included."""
    return nats.url


@pytest.fixture
async def bus(nats: NatsServer) -> AsyncIterator[Bus]:
    """A connection to the session's NATS server, with the platform's topology."""
    connected = await Bus.connect(nats.config, name="test")
    await topology.apply(connected)
    yield connected
    await connected.close()


@pytest.fixture
def platform(nats: NatsServer, s3: S3Server, store: S3Store) -> PlatformConfig:
    """Settings that reach the session's NATS, and a fresh bucket of its S3 server."""
    return replace(store.config, nats_url=nats.url)
