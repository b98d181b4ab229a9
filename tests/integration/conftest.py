"""Fixtures of integration tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from smeltkit.testing.jobs import JobRig, job_rig


@pytest.fixture
async def rig() -> AsyncIterator[JobRig]:
    """Jobs on a NATS server of the test's own, with short bounds."""
    async with job_rig() as made:
        yield made
