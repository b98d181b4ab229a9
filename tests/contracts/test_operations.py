"""The operations page says what the code does: every setting, with its default and meaning, and the files it names."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.stack.state import PORTS, SERVERS, SERVICES
from scripts import settings_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()


def test_tables_of_settings_are_those_of_the_configuration_classes() -> None:
    """Generated; `python -m scripts.settings_table` brings them up to date."""
    assert settings_table.render() in PAGE


def test_every_class_read_from_the_environment_is_on_the_page() -> None:
    """A new service cannot forget its table."""
    sources = (
        path.read_text() for package in ("smeltkit", "services", "gateway") for path in (ROOT / package).rglob("*.py")
    )
    read = {prefix for text in sources for prefix in re.findall(r'from_environment\(\s*\w+,\s*"(SMELT_\w+_)"', text)}
    assert "SMELT_IMPORTER_" in read
    assert read <= {prefix for _, prefix, _ in settings_table.SECTIONS}


def test_every_setting_has_a_meaning() -> None:
    """A row without its third column explains nothing."""
    rows = [line for line in settings_table.render().splitlines() if line.startswith("| `SMELT_")]
    assert not [row for row in rows if row.endswith("|  |")]


def test_numbers_on_the_page_are_those_of_the_stack() -> None:
    """Ports and processes."""
    assert len(PORTS) == 13 and "Thirteen free loopback ports" in PAGE
    assert len((*SERVERS, *SERVICES, "gateway")) == 8 and "eight processes in all" in PAGE
