"""The registry that dashboards are built on equals the names in the code."""

from __future__ import annotations

from pathlib import Path

import yaml

from smeltkit.telemetry import names

REGISTRY = Path(__file__).resolve().parents[4] / "contracts" / "interface" / "telemetry.yaml"
IDS = {names.JOB_ID}


def test_registry_equals_the_constants() -> None:
    """Every attribute and metric is in telemetry.yaml with its unit, and nothing is left over."""
    registry = yaml.safe_load(REGISTRY.read_text())
    assert registry["attributes"] == names.attributes()
    assert registry["metrics"] == {
        name: {"instrument": metric.instrument, "unit": metric.unit, "meaning": metric.meaning}
        for name, metric in names.metrics().items()
    }


def test_our_own_names_begin_with_smelt() -> None:
    """What no convention defines stays in our name space."""
    conventions = ("rpc.", "error.", "server.", "messaging.", "http.", "gen_ai.")
    ours = [name for name in [*names.attributes(), *names.metrics()] if not name.startswith(conventions)]
    assert ours
    assert all(name.startswith("smelt.") for name in ours)
