"""What a service says that cannot start: a weak isolation is one thing, a machine that is too busy another."""

from __future__ import annotations

import asyncio
import os
import subprocess

import pytest

from services.sandbox import sandbox
from services.sandbox.client import SlotLost
from services.sandbox.config import SandboxConfig
from services.sandbox.jail.spec import JailSpec
from services.sandbox.pool import Pool
from services.sandbox.supervisor import zygote
from smeltkit.errors import IsolationTooWeak, ServiceUnavailable, SmeltError

SPEC = JailSpec(
    role="candidate",
    namespaces=True,
    own_uids=False,
    binds=(),
    hidden=(),
    landlock_abi=0,
    filter_hex="",
    tmp_bytes=0,
    tmp_inodes=0,
    preload=(),
)


def test_a_jail_that_takes_too_long_is_no_refusal_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def spawn_silent(spec: JailSpec, control: object, broom: object, code: int) -> int:
        started.append(subprocess.Popen(["sleep", "60"]))
        kept.append((control, broom))
        return started[0].pid

    kept: list[object] = []
    monkeypatch.setattr(zygote, "START_TIMEOUT_S", 0.1)
    monkeypatch.setattr(zygote, "_spawn", spawn_silent)
    with pytest.raises(zygote.ZygoteLost, match="not built within 0.1 s; is the machine overloaded"):
        zygote.Zygote(SPEC, uid_base=1, on_spawn=lambda pid: None)
    assert not os.path.exists(f"/proc/{started[0].pid}")


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (SlotLost("jail was not built within 20 s"), ServiceUnavailable),
        (IsolationTooWeak("refused by the kernel"), IsolationTooWeak),
    ],
)
def test_slots_that_do_not_come_up_are_told_apart_from_weak_isolation(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, error: type[SmeltError]
) -> None:
    async def fail(pool: Pool) -> None:
        raise failure

    monkeypatch.setattr(Pool, "start", fail)
    with pytest.raises(error, match=str(failure)):
        asyncio.run(sandbox.open_sandbox(SandboxConfig(level="confined", slots=1)))
