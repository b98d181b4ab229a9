"""What consumers of the bus rely on: events.yaml, the code and the services say the same."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import symbol_database
from smelt.event.v1 import event_pb2

from smeltkit.bus import topology
from smeltkit.bus.facts import FACTS, check_fact
from smeltkit.bus.subjects import DEAD_STREAM, EVENTS_STREAM, doorbell_subject, event_subject
from smeltkit.errors import BadRequest

ROOT = Path(__file__).resolve().parents[2]
CONTRACT: dict[str, Any] = yaml.safe_load((ROOT / "contracts" / "interface" / "events.yaml").read_text())
STREAMS = {str(stream.name): stream for stream in topology.declare().streams}


def test_the_contract_lists_exactly_the_declared_facts() -> None:
    assert {fact: row["message"] for fact, row in CONTRACT["facts"].items()} == {
        fact: message.DESCRIPTOR.full_name for fact, message in FACTS.items()
    }


@pytest.mark.parametrize("fact", sorted(FACTS))
def test_a_fact_is_where_the_contract_says(fact: str) -> None:
    row = CONTRACT["facts"][fact]
    assert row["subject"].replace("<tenant>", "default") == event_subject(fact)
    assert row["producer"] == fact.split(".")[0]
    assert row["stream"] == EVENTS_STREAM


def test_the_contract_lists_exactly_the_declared_streams_and_buckets() -> None:
    buckets = {f"KV_{name}" for name in CONTRACT["buckets"]}
    assert set(STREAMS) == set(CONTRACT["streams"]) | buckets
    for name, row in CONTRACT["streams"].items():
        assert row["subjects"] == STREAMS[name].subjects
        assert row["retention"] == STREAMS[name].retention
    for name, row in CONTRACT["buckets"].items():
        assert row["doorbell"].replace("<key>", "key") == doorbell_subject(name, "key")


def test_every_event_message_is_said_somewhere() -> None:
    said = {row["message"] for row in CONTRACT["facts"].values()} | {CONTRACT["streams"][DEAD_STREAM]["body"]}
    assert said == {message.full_name for message in event_pb2.DESCRIPTOR.message_types_by_name.values()}


def test_every_message_named_in_the_contract_exists() -> None:
    import smelt.artifact.v1.artifact_pb2
    import smelt.job.v1.job_pb2  # noqa: F401

    for row in CONTRACT["buckets"].values():
        if row["value"].startswith("smelt."):
            symbol_database.Default().pool.FindMessageTypeByName(row["value"])


def _facts_said() -> set[tuple[str, str]]:
    """(service, literal) of every call in a service whose first argument looks like a fact."""
    services = [path.name for path in (ROOT / "services").iterdir() if path.is_dir()]
    looks_like = re.compile(rf"({'|'.join(services)})\.[a-z]+\.[a-z]+")
    said: set[tuple[str, str]] = set()
    for service in services:
        for path in (ROOT / "services" / service).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                    value = node.args[0].value
                    if isinstance(value, str) and looks_like.fullmatch(value):
                        said.add((service, value))
    return said


def test_every_fact_in_the_services_is_declared_and_said_by_its_producer() -> None:
    said = _facts_said()
    assert said
    assert {fact for _, fact in said} <= set(FACTS)
    assert all(fact.startswith(f"{service}.") for service, fact in said)


def test_an_undeclared_fact_is_refused_by_name() -> None:
    with pytest.raises(BadRequest, match="known: evaluator"):
        check_fact("importer.bundle.lost", event_pb2.BundleStored())


def test_a_fact_with_another_message_is_refused() -> None:
    with pytest.raises(BadRequest, match="carries a smelt.event.v1.BundleStored"):
        check_fact("importer.bundle.stored", event_pb2.ModelLoaded())
