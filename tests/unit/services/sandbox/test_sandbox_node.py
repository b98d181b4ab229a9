"""The name of a CPU: equal where times can be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.sandbox.node import cpu_model

INTEL = "cpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon(R) 8481C\nstepping\t: 8\ncpu MHz\t\t: {mhz}\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(("text", "name"), [(INTEL.format(mhz=2000), "Xeon(R) 8481C 6/143/8"), (ARM, "0x41 0xd40")])
def test_a_cpu_is_named_by_its_model_and_not_by_its_moment(text: str, name: str, tmp_path: Path) -> None:
    """R-085: the present clock rate is no part of it."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(f"{text}\n{text}")
    second.write_text(text.replace("2000", "3100"))
    assert cpu_model(first) == cpu_model(second)
    assert cpu_model(first).endswith(name)


def test_this_machine_has_a_name() -> None:
    assert len(cpu_model().split()) >= 2
