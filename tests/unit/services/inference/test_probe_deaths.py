"""What the death of a probe process means: only what another try can change is worth one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.inference import library
from smeltkit.errors import EngineUnavailable, OutOfMemory, ProbeFailed, SmeltError


@pytest.fixture
def dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in the place of the probe process's interpreter."""

    def write(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


@pytest.mark.parametrize(
    ("death", "error", "says"),
    [
        ("kill -SEGV $$", ProbeFailed, "SIGSEGV"),
        ("kill -ILL $$", ProbeFailed, "SIGILL"),
        ("echo bad file >&2; exit 3", ProbeFailed, "status 3 on this bundle's probe prompts; its log ends: bad file"),
        ("kill -KILL $$", EngineUnavailable, "SIGKILL"),
    ],
)
async def test_a_crash_is_the_bundles_and_a_kill_is_tried_again(
    dies: Callable[[str], None], death: str, error: type[SmeltError], says: str
) -> None:
    """R-124: deterministic ends are not tried again."""
    dies(death)
    with pytest.raises(error, match=says) as caught:
        await library._run_probe_process({})
    assert caught.value.retryable is (error is EngineUnavailable)


async def test_a_kill_for_want_of_memory_is_not_tried_again(
    dies: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-124: neither is a model that is too large."""
    kills = iter((3, 4))
    monkeypatch.setattr(library, "_memory_kills", lambda: next(kills))
    dies("kill -KILL $$")
    with pytest.raises(OutOfMemory) as caught:
        await library._run_probe_process({})
    assert not caught.value.retryable
