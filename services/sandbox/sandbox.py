"""The sandbox as a whole: probes the host, refuses too weak a level, keeps its slots, and notices a lost layer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from services.sandbox import doctor
from services.sandbox.client import SlotLost
from services.sandbox.code_file import NONE, shared_code
from services.sandbox.config import SandboxConfig
from services.sandbox.doctor import Isolation
from services.sandbox.layout import slot_specs
from services.sandbox.policy import Level
from services.sandbox.pool import Pool
from services.sandbox.profiles import find_profiles
from services.sandbox.supervisor.slot import SELF_TEST
from services.sandbox.verdict import Verdict
from smeltkit.errors import IsolationTooWeak, ServiceUnavailable

_LOG = logging.getLogger(__name__)


class Sandbox:
    """Probed isolation and running slots. Make it with `open_sandbox`."""

    def __init__(self, config: SandboxConfig, isolation: Isolation, level: Level, pool: Pool) -> None:
        self.config = config
        self.isolation = isolation
        self.level = level
        self.pool = pool
        self.profiles = find_profiles(config)

    async def close(self) -> None:
        """Ends every slot."""
        await self.pool.stop()

    async def watch(self, stopping: asyncio.Event, on_change: Callable[[bool], None]) -> None:
        """Probes again every period until `stopping`; `on_change` hears whether the level still holds."""
        while not stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), self.config.probe_period_s)
                return
            self.isolation = await asyncio.to_thread(_probe, self.config)
            holds = self.isolation.level is not None and self.isolation.level >= self.level
            if not holds:
                _LOG.error("isolation lost", extra={"missing": ",".join(self.isolation.missing)})
            on_change(holds)


async def open_sandbox(config: SandboxConfig) -> Sandbox:
    """A sandbox whose slots have each judged a candidate; IsolationTooWeak below the configured level,
    ServiceUnavailable if a slot does not come up."""
    isolation = await asyncio.to_thread(_probe, config)
    level = doctor.require(isolation, Level.named(config.level))
    pool = Pool(await asyncio.to_thread(slot_specs, config, isolation, level), config)
    try:
        await pool.start()
        records = await asyncio.gather(*(pool.run(SELF_TEST, can_wait=True) for _ in range(pool.slots)))
    except IsolationTooWeak as error:
        await pool.stop()
        raise IsolationTooWeak(f"no slot can be built at level {level}: {error}") from error
    except SlotLost as error:
        await pool.stop()
        raise ServiceUnavailable(f"the slots do not start: {error}; start the service again") from error
    failed = [record for record in records if record.verdict is not Verdict.PASSED]
    if failed:
        await pool.stop()
        raise IsolationTooWeak(f"the self-test gives {failed[0].verdict} at level {level}: {failed[0].detail}")
    _LOG.info(
        "sandbox ready",
        extra={
            "isolation": str(level),
            "missing": ",".join(isolation.missing),
            "slots": pool.slots,
            "huge_code": shared_code() != NONE,
        },
    )
    return Sandbox(config, isolation, level, pool)


def _probe(config: SandboxConfig) -> Isolation:
    return doctor.probe(config.uid_base, Level.named(config.ceiling))
