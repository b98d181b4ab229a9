"""Subjects and envelopes, without any server."""

from __future__ import annotations

import pytest
from smelt.event.v1 import event_pb2

from smeltkit import telemetry
from smeltkit.bus.envelope import MESSAGE_ID, Envelope, fact_id, seal
from smeltkit.bus.subjects import dead_subject, event_subject, job_subject, worker_durable
from smeltkit.errors import BadRequest
from smeltkit.testing.spans import captured_spans

STORED = event_pb2.BundleStored(digest="sha256:" + "1" * 64, name="ore", job_id="job-1")
LOADED = event_pb2.ModelLoaded(digest="sha256:" + "1" * 64, engine="llama")


def test_subjects_follow_one_scheme() -> None:
    assert job_subject("importer", "quantize") == "smelt.job.importer.quantize.default"
    assert dead_subject("importer", "quantize", "acme") == "smelt.dlq.importer.quantize.acme"
    assert event_subject("importer.bundle.stored") == "smelt.evt.importer.bundle.stored.default"
    assert worker_durable("importer") == "importer-worker"


@pytest.mark.parametrize("part", ["", "*", ">", "a.b", "a b", "A", "-a", "a" * 65, "a\n", "\u00e4"])
def test_a_part_that_would_leave_its_subject_is_refused(part: str) -> None:
    for subject in (
        lambda: job_subject(part, "k"),
        lambda: job_subject("s", part),
        lambda: job_subject("s", "k", part),
    ):
        with pytest.raises(BadRequest):
            subject()
    with pytest.raises(BadRequest):
        event_subject(f"importer.bundle.{part}")


@pytest.mark.parametrize("fact", ["bundle.stored", "importer.bundle.stored.twice", ""])
def test_a_fact_has_three_parts(fact: str) -> None:
    with pytest.raises(BadRequest, match="verb in the past"):
        event_subject(fact)


def test_an_envelope_is_a_cloud_event_in_binary_mode() -> None:
    headers = seal(STORED, source="importer", id="one").to_headers()
    assert headers["ce-specversion"] == "1.0"
    assert headers["ce-type"] == "smelt.event.v1.BundleStored"
    assert headers["ce-source"] == "smelt/importer"
    assert headers["ce-datacontenttype"] == "application/protobuf"
    assert headers["ce-id"] == headers[MESSAGE_ID] == "one"


def test_an_envelope_comes_back_from_its_headers() -> None:
    envelope = seal(STORED, source="importer", id="one")
    assert Envelope.from_headers(envelope.to_headers()) == envelope
    assert envelope.decode(event_pb2.BundleStored, STORED.SerializeToString()) == STORED


def test_an_envelope_carries_the_trace_of_its_sender() -> None:
    with captured_spans(), telemetry.span("sender"):
        envelope = seal(STORED, source="importer", id="one")
        assert telemetry.current_trace_id() in envelope.trace["traceparent"]


@pytest.mark.parametrize("missing", ["ce-specversion", "ce-id", "ce-type", "ce-source", "ce-time"])
def test_headers_without_an_attribute_are_refused_by_its_name(missing: str) -> None:
    headers = seal(STORED, source="importer", id="one").to_headers()
    del headers[missing]
    with pytest.raises(BadRequest, match=missing):
        Envelope.from_headers(headers)
    with pytest.raises(BadRequest):
        Envelope.from_headers(None)


def test_a_body_of_another_type_is_refused() -> None:
    envelope = seal(STORED, source="importer", id="one")
    with pytest.raises(BadRequest, match="is a smelt.event.v1.BundleStored"):
        envelope.decode(event_pb2.ModelLoaded, b"")
    with pytest.raises(BadRequest, match="does not parse"):
        envelope.decode(event_pb2.BundleStored, b"\xff")


def test_a_fact_of_a_job_has_the_same_id_every_time_it_is_said() -> None:
    """R-121: an attempt that says it again says nothing new."""
    assert fact_id("s", STORED) == fact_id("s", STORED)
    assert fact_id("s", STORED) != fact_id("t", STORED)
    other = event_pb2.BundleStored(digest="sha256:" + "2" * 64, job_id="job-1")
    assert fact_id("s", STORED) != fact_id("s", other)


def test_a_fact_of_no_job_is_new_every_time() -> None:
    assert fact_id("s", LOADED) != fact_id("s", LOADED)
