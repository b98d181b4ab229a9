"""What exists on the bus: streams, buckets and durables, declared here, compared and applied by one command.

`python -m smeltkit.bus.topology` makes NATS equal to this page; services never create anything at start. Applying twice
changes nothing. A difference that NATS cannot change in place (e.g. the retention of a stream) is an error with the
remedy, never a deletion.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import nats.js.errors
from nats.js import api

from smeltkit import limits
from smeltkit.bus.client import Bus
from smeltkit.bus.subjects import (
    CATALOG_BUCKET,
    DEAD_STREAM,
    EVENTS_STREAM,
    GPUS_BUCKET,
    JOBS_BUCKET,
    JOBS_STREAM,
    LEASES_BUCKET,
    STAGES_BUCKET,
    TENANTS_BUCKET,
    doorbell_subject,
    worker_durable,
)
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.errors import BadConfig
from smeltkit.service import run_command

JOB_SERVICES: Final = ("importer", "trainer", "inference", "evaluator")
"""Services that do jobs: each has a durable on the work queue."""

COMMAND: Final = (sys.executable, "-m", "smeltkit.bus.topology")
"""Applies the platform's topology; settings come from SMELT_PLATFORM_*."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Everything that must exist, as values."""

    streams: tuple[api.StreamConfig, ...]
    durables: tuple[api.ConsumerConfig, ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that is not as declared: `field` is empty if it does not exist at all."""

    name: str
    field: str
    declared: str
    actual: str

    def __str__(self) -> str:
        if not self.field:
            return f"{self.name}: created"
        return f"{self.name}: {self.field} {self.actual} -> {self.declared}"


def declare(
    *, services: Sequence[str] = JOB_SERVICES, lease_ttl_s: float = limits.JOB_LEASE_TTL_S, replicas: int = 1
) -> Topology:
    """The topology of the platform. `replicas` is 3 in a NATS cluster."""
    streams = (
        _stream(JOBS_STREAM, ["smelt.job.>"], api.RetentionPolicy.WORK_QUEUE, limits.JOBS_MAX_AGE_S, replicas),
        _stream(EVENTS_STREAM, ["smelt.evt.>"], api.RetentionPolicy.LIMITS, limits.EVENTS_MAX_AGE_S, replicas),
        _stream(DEAD_STREAM, ["smelt.dlq.>"], api.RetentionPolicy.LIMITS, limits.JOBS_MAX_AGE_S, replicas),
        _bucket(JOBS_BUCKET, limits.JOBS_MAX_AGE_S, replicas),
        _bucket(LEASES_BUCKET, lease_ttl_s, replicas),
        _bucket(CATALOG_BUCKET, 0, replicas),
        _bucket(STAGES_BUCKET, 0, replicas),
        _bucket(GPUS_BUCKET, 0, replicas),
        _bucket(TENANTS_BUCKET, 0, replicas),
    )
    return Topology(streams=streams, durables=tuple(_durable(service) for service in services))


async def diff(bus: Bus, topology: Topology) -> list[Difference]:
    """How NATS differs from `topology`; empty if it is as declared. Only declared fields are compared."""
    found: list[Difference] = []
    for stream in topology.streams:
        actual_stream = await _stream_config(bus, str(stream.name))
        found += _compare(str(stream.name), stream, actual_stream)
    for durable in topology.durables:
        actual = await _durable_config(bus, str(durable.durable_name))
        found += _compare(f"{JOBS_STREAM}/{durable.durable_name}", durable, actual)
    return found


async def apply(bus: Bus, topology: Topology | None = None) -> list[str]:
    """Makes NATS equal to `topology` (default: the platform's); what was changed, one line each.

    BadConfig if NATS refuses a change; nothing is ever deleted to make it possible.
    """
    wanted = declare() if topology is None else topology
    differences = await diff(bus, wanted)
    named = {difference.name: difference for difference in differences}
    for stream in wanted.streams:
        if stream.name in named:
            await _put_stream(bus, stream, is_new=not named[stream.name].field)
    for durable in wanted.durables:
        if f"{JOBS_STREAM}/{durable.durable_name}" in named:
            await _put_durable(bus, durable)
    return [str(difference) for difference in differences]


def _stream(
    name: str, subjects: list[str], retention: api.RetentionPolicy, max_age_s: float, replicas: int
) -> api.StreamConfig:
    return api.StreamConfig(
        name=name,
        subjects=subjects,
        retention=retention,
        storage=api.StorageType.FILE,
        discard=api.DiscardPolicy.OLD,
        max_age=max_age_s,
        max_bytes=limits.STREAM_MAX_BYTES,
        max_msg_size=limits.KV_VALUE_MAX_BYTES,
        duplicate_window=limits.BUS_DUPLICATE_WINDOW_S,
        num_replicas=replicas,
    )


def _bucket(name: str, ttl_s: float, replicas: int) -> api.StreamConfig:
    """A key-value bucket: one value a key, refusing what does not fit, republished as doorbells once stored."""
    window_s = min(limits.BUS_DUPLICATE_WINDOW_S, ttl_s or limits.BUS_DUPLICATE_WINDOW_S)
    return api.StreamConfig(
        name=f"KV_{name}",
        subjects=[f"$KV.{name}.>"],
        retention=api.RetentionPolicy.LIMITS,
        storage=api.StorageType.FILE,
        discard=api.DiscardPolicy.NEW,
        max_msgs_per_subject=1,
        max_age=ttl_s,
        max_bytes=limits.STREAM_MAX_BYTES,
        max_msg_size=limits.KV_VALUE_MAX_BYTES,
        duplicate_window=window_s,
        allow_rollup_hdrs=True,
        deny_delete=True,
        allow_direct=True,
        republish=api.RePublish(src=f"$KV.{name}.>", dest=doorbell_subject(name, ">"), headers_only=True),
        num_replicas=replicas,
    )


def _durable(service: str) -> api.ConsumerConfig:
    return api.ConsumerConfig(
        durable_name=worker_durable(service),
        filter_subject=f"smelt.job.{service}.>",
        deliver_policy=api.DeliverPolicy.ALL,
        ack_policy=api.AckPolicy.EXPLICIT,
        ack_wait=limits.JOB_ACK_WAIT_S,
        max_deliver=-1,
    )


async def _stream_config(bus: Bus, name: str) -> api.StreamConfig | None:
    async def once() -> api.StreamConfig | None:
        try:
            return (await bus.jetstream.stream_info(name)).config
        except nats.js.errors.NotFoundError:
            return None

    return await bus.call(f"looking at {name}", once)


async def _durable_config(bus: Bus, name: str) -> api.ConsumerConfig | None:
    async def once() -> api.ConsumerConfig | None:
        try:
            info: api.ConsumerInfo = await bus.jetstream.consumer_info(JOBS_STREAM, name)
            return info.config
        except nats.js.errors.NotFoundError:
            return None

    return await bus.call(f"looking at {name}", once)


async def _put_stream(bus: Bus, stream: api.StreamConfig, *, is_new: bool) -> None:
    async def once() -> None:
        put = bus.jetstream.add_stream if is_new else bus.jetstream.update_stream
        try:
            await put(stream)
        except (nats.js.errors.BadRequestError, nats.js.errors.ServerError) as error:
            raise _refused(str(stream.name), error) from error

    await bus.call(f"putting {stream.name}", once)


async def _put_durable(bus: Bus, durable: api.ConsumerConfig) -> None:
    async def once() -> None:
        try:
            await bus.jetstream.add_consumer(JOBS_STREAM, durable)
        except (nats.js.errors.BadRequestError, nats.js.errors.ServerError) as error:
            raise _refused(str(durable.durable_name), error) from error

    await bus.call(f"putting {durable.durable_name}", once)


def _refused(name: str, error: nats.js.errors.APIError) -> BadConfig:
    told = (error.description or "").lower()
    remedy = "save its data, delete it by hand and apply again"
    if "replicas" in told or "no suitable peers" in told:
        remedy = "SMELT_PLATFORM_NATS_REPLICAS must be at most the number of its servers that run"
    return BadConfig(f"NATS refuses the declared {name}: {error.description}; {remedy}")


def _compare(name: str, declared: Any, actual: Any) -> Iterator[Difference]:
    if actual is None:
        yield Difference(name=name, field="", declared="", actual="")
        return
    plain = type(declared)()
    for field in fields(declared):
        wanted, found = getattr(declared, field.name), getattr(actual, field.name)
        is_declared = wanted != getattr(plain, field.name)
        if is_declared and (wanted or 0) != (found or 0):
            yield Difference(name=name, field=field.name, declared=str(wanted), actual=str(found))


async def _main() -> None:
    platform = from_environment(PlatformConfig, "SMELT_PLATFORM_")
    bus = await Bus.connect(platform, name="topology")
    try:
        for line in await apply(bus, declare(replicas=platform.nats_replicas)) or ["nothing to change"]:
            _log.info("%s", line)
    finally:
        await bus.close()


if __name__ == "__main__":
    run_command(_main)
