"""The bus on the real NATS: publishing, topology, queue, dead letters, leases, outages."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from uuid import uuid4

import pytest
from smelt.event.v1 import event_pb2

from smeltkit import limits, servers, telemetry
from smeltkit.bus import Bus, topology
from smeltkit.bus.deadletter import publish_dead, read_dead
from smeltkit.bus.envelope import Envelope
from smeltkit.bus.leases import acquire
from smeltkit.bus.subjects import DEAD_STREAM, EVENTS_STREAM, JOBS_STREAM, LEASES_BUCKET, STAGES_BUCKET, job_subject
from smeltkit.config import environment
from smeltkit.errors import BadConfig, BadRequest, BusUnavailable, DiskFull, LeaseLost
from smeltkit.testing.jobs import BOUNDS, SERVICE, JobRig
from smeltkit.testing.nats import NatsServer
from smeltkit.testing.spans import captured_spans
from smeltkit.testing.waiting import eventually

STORED = event_pb2.BundleStored(digest="sha256:" + "1" * 64, name="ore", job_id="job-1")


async def messages(bus: Bus, stream: str) -> int:
    """Messages that a stream holds."""
    info = await bus.call("counting", lambda: bus.jetstream.stream_info(stream))
    return int(info.state.messages)


# --- publishing -----------------------------------------------------------------------------------------------------


async def test_an_event_is_stored_with_body_and_envelope(rig: JobRig) -> None:
    await rig.bus.publish_event("importer.bundle.stored", STORED)
    message = await rig.bus.jetstream.get_msg(EVENTS_STREAM, subject="smelt.evt.importer.bundle.stored.default")
    assert Envelope.from_headers(message.headers).decode(event_pb2.BundleStored, message.data or b"") == STORED


async def test_an_event_of_a_job_said_twice_is_stored_once(rig: JobRig) -> None:
    """R-121: a repeated attempt repeats its facts without effect."""
    for _ in range(2):
        await rig.bus.publish_event("importer.bundle.stored", STORED)
    assert await messages(rig.bus, EVENTS_STREAM) == 1


async def test_an_event_belongs_to_the_trace_of_its_sender(rig: JobRig) -> None:
    with captured_spans() as captured, telemetry.span("sender") as sender:
        await rig.bus.publish_event("importer.bundle.stored", STORED)
    span = captured.named("publish importer.bundle.stored")[0]
    message = await rig.bus.jetstream.get_msg(EVENTS_STREAM, subject="smelt.evt.importer.bundle.stored.default")
    trace_id, span_id = Envelope.from_headers(message.headers).trace["traceparent"].split("-")[1:3]
    assert span.parent is not None and span.parent.span_id == sender.get_span_context().span_id
    assert (trace_id, span_id) == (f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}")


async def test_a_full_bucket_is_a_full_disk_at_once(rig: JobRig) -> None:
    """What is stored stays, the new value is refused with the remedy."""
    full = next(s for s in topology.declare().streams if s.name == f"KV_{STAGES_BUCKET}")
    await rig.bus.jetstream.update_stream(dataclasses.replace(full, max_bytes=4_096))
    bucket = rig.bus.bucket(STAGES_BUCKET)
    revision = await bucket.create("old", b"x" * 2_000)
    with pytest.raises(DiskFull, match="free disk space"):
        await bucket.create("new", b"x" * 4_000)
    entry = await bucket.get("old")
    assert entry is not None and entry.revision == revision
    assert await bucket.get("new") is None


async def test_an_event_too_large_is_refused(rig: JobRig) -> None:
    fat = event_pb2.FallbackUsed(cause="x" * limits.EVENT_MAX_BYTES)
    with pytest.raises(BadRequest, match="send a digest"):
        await rig.bus.publish_event("inference.fallback.used", fat)


async def test_a_publish_whose_answer_is_lost_is_repeated_and_stored_once(rig: JobRig) -> None:
    """R-121: the message id makes the retry harmless."""
    publish, losses = rig.bus.jetstream.publish, [True]

    async def lossy(*args: object, **kwargs: object) -> object:
        answer = await publish(*args, **kwargs)  # type: ignore[arg-type]
        if losses and losses.pop():
            raise TimeoutError
        return answer

    rig.bus.jetstream.publish = lossy  # type: ignore[assignment,method-assign]
    await rig.bus.publish_event("importer.bundle.stored", STORED)
    assert await messages(rig.bus, EVENTS_STREAM) == 1


async def test_a_swap_whose_answer_is_lost_is_known_as_our_own(rig: JobRig) -> None:
    """R-121: the repeated write conflicts with its first try, and that is no conflict."""
    bucket = rig.bus.bucket(STAGES_BUCKET)
    publish, losses = rig.bus.jetstream.publish, [True, True]

    async def lossy(*args: object, **kwargs: object) -> object:
        answer = await publish(*args, **kwargs)  # type: ignore[arg-type]
        if losses and losses.pop():
            raise TimeoutError
        return answer

    revision = await bucket.create("key", b"1")
    rig.bus.jetstream.publish = lossy  # type: ignore[assignment,method-assign]
    assert await bucket.update("key", b"2", revision) == revision + 1
    entry = await bucket.get("key")
    assert entry is not None and (entry.value, entry.revision) == (b"2", revision + 1)


async def test_a_publish_during_a_restart_waits_for_it(rig: JobRig) -> None:
    rig.server.kill()
    asyncio.get_running_loop().call_later(0.3, rig.server.start)
    await rig.bus.publish_event("importer.bundle.stored", STORED)
    assert await messages(rig.bus, EVENTS_STREAM) == 1


async def test_what_was_published_survives_a_kill(rig: JobRig) -> None:
    await rig.bus.publish_event("importer.bundle.stored", STORED)
    rig.server.kill()
    rig.server.start()
    await eventually(lambda: rig.bus.is_connected)
    assert await messages(rig.bus, EVENTS_STREAM) == 1


async def test_publishing_where_no_stream_listens_names_the_remedy(rig: JobRig) -> None:
    await rig.bus.jetstream.delete_stream(EVENTS_STREAM)
    with pytest.raises(BusUnavailable, match="smeltkit.bus.topology"):
        await rig.bus.publish_event("importer.bundle.stored", STORED)


async def test_a_bucket_that_does_not_exist_names_the_remedy(rig: JobRig) -> None:
    with pytest.raises(BusUnavailable, match="smeltkit.bus.topology"):
        await rig.bus.bucket("no_such_bucket").get("key")


async def test_wrong_credentials_are_unavailable_not_a_hang(rig: JobRig) -> None:
    wrong = dataclasses.replace(rig.server.config, nats_url=rig.server.url.replace("smelt-test:", "smelt-test:x"))
    with pytest.raises(BusUnavailable, match="refuses these credentials"):
        await Bus.connect(wrong, name="intruder")


class LoneNode(NatsServer):
    """A node of a cluster whose other two nodes never come."""

    def _command(self) -> list[str]:
        command = super()._command()
        (route,) = servers.free_ports(1)
        routes = ", ".join(f"nats://{servers.LOOPBACK}:{port}" for port in (route, 1, 2))
        with Path(command[-1]).open("a") as file:
            file.write(f"cluster {{ name: alone, listen: '{servers.LOOPBACK}:{route}', routes: [{routes}] }}\n")
        return [*command, "--name", "alone-0"]


async def test_a_cluster_without_quorum_names_the_nodes_that_must_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node itself takes connections and says nothing: neither reading nor publishing may look like a lost setup."""
    monkeypatch.setattr(limits, "BUS_ELECTION_TIMEOUT_S", 0.5)
    node = LoneNode(tmp_path)
    node.start()
    try:
        bus = await Bus.connect(dataclasses.replace(node.config, nats_replicas=3), name="patient")
        for attempt in (topology.apply(bus), bus.publish_event("importer.bundle.stored", STORED)):
            with pytest.raises(BusUnavailable, match="2 of 3 nodes of the NATS cluster must run"):
                await attempt
        await bus.close()
    finally:
        node.kill()


# --- topology -------------------------------------------------------------------------------------------------------


async def test_applying_the_topology_twice_changes_nothing(rig: JobRig) -> None:
    await rig.bus.jetstream.delete_stream(EVENTS_STREAM)
    wanted = topology.declare(services=[SERVICE], lease_ttl_s=BOUNDS.lease_ttl_s)
    assert await topology.apply(rig.bus, wanted) == ["SMELT_EVENTS: created"]
    assert await topology.apply(rig.bus, wanted) == []
    assert await topology.diff(rig.bus, wanted) == []


async def test_a_drift_is_named_and_repaired(rig: JobRig) -> None:
    wanted = topology.declare(services=[SERVICE], lease_ttl_s=BOUNDS.lease_ttl_s)
    drifted = next(stream for stream in wanted.streams if stream.name == EVENTS_STREAM)
    await rig.bus.jetstream.update_stream(dataclasses.replace(drifted, max_age=60.0, duplicate_window=30.0))
    differences = await topology.diff(rig.bus, wanted)
    assert [(entry.name, entry.field, entry.actual) for entry in differences] == [
        (EVENTS_STREAM, "max_age", "60.0"),
        (EVENTS_STREAM, "duplicate_window", "30.0"),
    ]
    await topology.apply(rig.bus, wanted)
    assert await topology.diff(rig.bus, wanted) == []


async def test_a_drifted_durable_is_repaired(rig: JobRig) -> None:
    wanted = topology.declare(services=[SERVICE], lease_ttl_s=BOUNDS.lease_ttl_s)
    await rig.bus.jetstream.add_consumer(JOBS_STREAM, dataclasses.replace(wanted.durables[0], ack_wait=77.0))
    assert await topology.apply(rig.bus, wanted) == ["SMELT_JOBS/toy-worker: ack_wait 77.0 -> 10.0"]
    assert await topology.diff(rig.bus, wanted) == []


async def test_a_change_that_nats_refuses_deletes_nothing(rig: JobRig) -> None:
    await rig.bus.publish_event("importer.bundle.stored", STORED)
    wanted = topology.declare(services=[SERVICE], lease_ttl_s=BOUNDS.lease_ttl_s)
    streams = tuple(
        dataclasses.replace(stream, storage="memory") if stream.name == EVENTS_STREAM else stream
        for stream in wanted.streams
    )
    with pytest.raises(BadConfig, match=EVENTS_STREAM):
        await topology.apply(rig.bus, dataclasses.replace(wanted, streams=streams))
    assert await messages(rig.bus, EVENTS_STREAM) == 1


async def test_the_command_applies_the_topology(rig: JobRig) -> None:
    await rig.bus.jetstream.delete_stream(EVENTS_STREAM)
    config = rig.server.config
    variables = {
        "SMELT_PLATFORM_NATS_URL": config.nats_url,
        "SMELT_PLATFORM_S3_ENDPOINT": "none",
        "SMELT_PLATFORM_S3_ACCESS_KEY": "none",
        "SMELT_PLATFORM_S3_SECRET_KEY": "none",
    }
    command = await asyncio.create_subprocess_exec(
        *topology.COMMAND, env=environment(variables), stderr=asyncio.subprocess.PIPE
    )
    _, log = await command.communicate()
    assert command.returncode == 0, log.decode()
    assert "SMELT_EVENTS: created" in log.decode()
    assert await messages(rig.bus, EVENTS_STREAM) == 0


# --- queue, dead letters, leases ------------------------------------------------------------------------------------


async def test_a_message_put_back_comes_again(rig: JobRig) -> None:
    await rig.bus.publish(job_subject(SERVICE, "count"), b"id", message_id="one")
    queue = rig.bus.queue(SERVICE)
    first = await queue.next()
    assert first is not None
    await first.put_back(0.2)
    again = await queue.next(5)
    assert again is not None and again.body == b"id"
    await again.ack()
    assert await rig.bus.is_queue_empty(SERVICE)


async def test_an_empty_queue_gives_nothing(rig: JobRig) -> None:
    assert await rig.bus.queue(SERVICE).next(0.1) is None


async def test_a_message_in_somebodys_hands_is_not_an_empty_queue(rig: JobRig) -> None:
    await rig.bus.publish(job_subject(SERVICE, "count"), b"id", message_id="one")
    assert await rig.bus.queue(SERVICE).next() is not None
    assert not await rig.bus.is_queue_empty(SERVICE)


async def test_a_queue_works_again_after_a_restart(rig: JobRig) -> None:
    queue = rig.bus.queue(SERVICE)
    assert await queue.next(0.1) is None
    rig.server.kill()
    rig.server.start()
    await eventually(lambda: rig.bus.is_connected)
    await rig.bus.publish(job_subject(SERVICE, "count"), b"id", message_id=uuid4().hex)
    delivery = await queue.next(5)
    assert delivery is not None and delivery.body == b"id"


async def test_dead_letters_are_read_newest_first_and_stay(rig: JobRig) -> None:
    for number in range(3):
        dead = event_pb2.JobDead(job_id=f"job-{number}", service=SERVICE, reason="WORKER_LOST")
        await publish_dead(rig.bus, dead, kind="count")
        await publish_dead(rig.bus, dead, kind="count")
    for _ in range(2):
        assert [letter.job_id for letter in await read_dead(rig.bus)] == ["job-2", "job-1", "job-0"]
    assert [letter.job_id for letter in await read_dead(rig.bus, limit=1)] == ["job-2"]
    assert await messages(rig.bus, DEAD_STREAM) == 3


async def test_a_lease_is_held_by_one(rig: JobRig) -> None:
    bucket = rig.bus.bucket(LEASES_BUCKET)
    leases = await asyncio.gather(*(acquire(bucket, "job", BOUNDS.lease_ttl_s) for _ in range(10)))
    assert sum(lease is not None for lease in leases) == 1


async def test_a_released_lease_is_free_and_the_next_token_is_greater(rig: JobRig) -> None:
    bucket = rig.bus.bucket(LEASES_BUCKET)
    first = await acquire(bucket, "job", BOUNDS.lease_ttl_s)
    assert first is not None
    await first.renew()
    await first.release()
    second = await acquire(bucket, "job", BOUNDS.lease_ttl_s)
    assert second is not None and second.fence > first.fence
    await first.release()
    assert await bucket.get("job") is not None, "the old holder released the new holder's lease"


async def test_a_lease_that_is_not_renewed_expires(rig: JobRig) -> None:
    """R-120: the lease of a dead holder does not stay."""
    bucket = rig.bus.bucket(LEASES_BUCKET)
    first = await acquire(bucket, "job", BOUNDS.lease_ttl_s)
    assert first is not None
    second = None
    while second is None:
        await asyncio.sleep(0.1)
        second = await acquire(bucket, "job", BOUNDS.lease_ttl_s)
    with pytest.raises(LeaseLost):
        await first.renew()
    assert first.remaining_s <= 0 < second.remaining_s


async def test_a_renewed_lease_lives_longer_than_its_first_life(rig: JobRig) -> None:
    bucket = rig.bus.bucket(LEASES_BUCKET)
    lease = await acquire(bucket, "job", BOUNDS.lease_ttl_s)
    assert lease is not None
    for _ in range(6):
        await asyncio.sleep(BOUNDS.lease_ttl_s / 3)
        await lease.renew()
    assert await acquire(bucket, "job", BOUNDS.lease_ttl_s) is None
