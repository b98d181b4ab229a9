"""Leases of GPU memory: one table of claims in a bucket of NATS, changed only by compare-and-swap.

A claim lives as long as the attempt at a job that made it: its holder's name carries the fencing token of that attempt,
whose lease expires unless it is renewed. So nothing here has a clock of its own. Whoever next wants one of the same
devices finds that an attempt is over, ends what processes it left, and only when they are gone is their memory free.

A device on which a process without a lease computes is leased to nobody, unless whoever runs the platform asked for
that: it may be what serves an evaluation, which must not become slower or fail for want of memory. What is not guarded
against: a program without a lease that starts a moment later, or in a container that hides its processes from this one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Final

from smeltkit import limits
from smeltkit.bus.subjects import GPUS_BUCKET
from smeltkit.errors import (
    BusUnavailable,
    GpuBusy,
    OutOfMemory,
    RevisionConflict,
    SmeltError,
    TooManyRequests,
    UnknownJob,
)
from smeltkit.gpus import holders
from smeltkit.gpus.claims import Claim, ahead_of, left_bytes, place
from smeltkit.gpus.devices import Device, Devices
from smeltkit.jobs import model
from smeltkit.jobs.ledger import JobLedger, LedgerBus
from smeltkit.jobs.tasks import end_tasks
from smeltkit.jobs.worker import JobContext

_log = logging.getLogger(__name__)
_TABLE: Final = "claims"
_PEAK: Final = "peak."
WAITING: Final = "wait for GPU"
"""Phase of a job that waits for devices."""


@dataclass(frozen=True, kw_only=True)
class Want:
    """What a job asks for."""

    title: str
    memory_bytes: int
    """Bytes of each device."""
    count: int = 1
    is_shared: bool = False
    """Whether it takes just `memory_bytes` of devices that others may use as well."""
    waits: bool = False
    """Whether it waits while others are in the way."""


@dataclass(kw_only=True)
class Lease:
    """Devices held by a job; none where this machine has none."""

    holder: str = ""
    """Last argument of every process that works under it."""
    devices: tuple[str, ...] = ()
    memory_bytes: int = 0
    """Bytes of each device."""
    is_shared: bool = False
    peak_bytes: int = 0
    """Most that its processes were seen to use of one device."""

    @property
    def environment(self) -> dict[str, str]:
        """By which its processes see these devices and no others."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices)} if self.devices else {}

    @property
    def has_exceeded(self) -> bool:
        """Whether its processes took more than it may share; a device of its own is bound by its size alone."""
        return self.is_shared and self.peak_bytes > self.memory_bytes * (1 + limits.GPU_EXCESS_SHARE)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is known at a moment: devices of this machine, all claims, and who uses how much."""

    devices: tuple[Device, ...]
    claims: tuple[Claim, ...]
    """Those of other machines too, oldest first."""
    processes: Mapping[str, Sequence[int]]
    """Processes of every claim that holds devices, and of plans, as far as they are seen here."""

    @property
    def strangers(self) -> dict[str, list[int]]:
        """Device to the processes that compute there without a lease, as far as they are seen here."""
        known = {pid for pids in self.processes.values() for pid in pids}
        told = {one.id: [pid for pid in one.processes if pid not in known] for one in self.devices}
        return {id: here for id, pids in told.items() if (here := holders.present(pids))}

    def uses(self, device: Device, claim: Claim) -> int:
        """Bytes that a claim's processes use of a device; all that it leased where the driver tells of no process."""
        if not device.processes:
            return claim.memory_bytes
        return sum(device.processes.get(pid, 0) for pid in self.processes.get(claim.holder, ()))


class GpuLedger:
    """Leases the GPUs that `devices` tells of; `reserve_bytes` of each are leased to nobody.

    With `beside_strangers` those too on which a process without a lease computes.
    """

    def __init__(
        self,
        bus: LedgerBus,
        jobs: JobLedger,
        devices: Devices,
        *,
        reserve_bytes: int = 0,
        beside_strangers: bool = False,
    ) -> None:
        self._bucket, self._jobs = bus.bucket(GPUS_BUCKET), jobs
        self._devices, self._reserve_bytes, self._beside_strangers = devices, reserve_bytes, beside_strangers

    async def check(self, want: Want) -> Lease:
        """What a job that began now would get, which it does not take; empty without GPUs. OutOfMemory, GpuBusy."""
        devices = await asyncio.to_thread(self._devices.read)
        claim = self._claim("job-new.0", want, devices)
        if claim is None:
            return Lease()
        table, _ = await self._read()
        standing = await self._standing(devices, await self._living(table, claim))
        if not (found := self._place(claim, standing)):
            raise _busy(self._why(claim, standing))
        return Lease(devices=found, memory_bytes=claim.memory_bytes, is_shared=claim.is_shared)

    async def peak(self, kind: str) -> int:
        """Bytes of one device that the newest run of this kind was seen to use at its peak; 0 if none was."""
        entry = await self._bucket.get(f"{_PEAK}{kind}")
        return int(json.loads(entry.value)["peak_bytes"]) if entry else 0

    async def learn(self, kind: str, peak_bytes: int) -> None:
        """Keeps what a run of this kind used at its peak; of two at the same time one is kept."""
        key, value = f"{_PEAK}{kind}", json.dumps({"peak_bytes": peak_bytes}).encode()
        entry = await self._bucket.get(key)
        with suppress(RevisionConflict):
            await (self._bucket.update(key, value, entry.revision) if entry else self._bucket.create(key, value))

    async def standing(self) -> Standing:
        """The devices of this machine, and every claim of an attempt that goes on, or whose processes do."""
        devices = await asyncio.to_thread(self._devices.read)
        known = await self._standing(devices, (await self._read())[0])
        claims = [one for one in known.claims if known.processes.get(one.holder) or not await self._is_over(one)]
        return replace(known, claims=tuple(claims))

    @asynccontextmanager
    async def held(self, context: JobContext, want: Want) -> AsyncIterator[Lease]:
        """A lease for as long as the block lasts; an empty one on a machine without GPUs.

        OutOfMemory if no device is large enough, GpuBusy if they are in use and the job does not wait. Processes that
        use more than they share are ended, and nobody else's: OutOfMemory then takes the place of their error.
        """
        devices = await asyncio.to_thread(self._devices.read)
        claim = self._claim(f"{context.job_id}.{context.fence}", want, devices)
        if claim is None:
            yield Lease()
            return
        before: dict[str, int] = {}
        try:
            granted = await self._granted(context, claim, want.waits)
            before = await self._used(granted.devices)
            lease = Lease(
                holder=claim.holder, devices=granted.devices, memory_bytes=claim.memory_bytes, is_shared=claim.is_shared
            )
            watching = asyncio.create_task(self._watch(lease))
            try:
                with context.holding_gpus(len(granted.devices)):
                    yield lease
            except SmeltError as error:
                if lease.has_exceeded:
                    raise _exceeded(lease) from error
                raise
            finally:
                await end_tasks({watching}, grace_s=limits.GPU_FACTS_TIMEOUT_S)
        finally:
            await self._release(claim, before)

    async def _granted(self, context: JobContext, claim: Claim, waits: bool) -> Claim:
        async with self._bucket.watch(_TABLE) as bell:
            while True:
                try:
                    await context.check_alive()
                    granted, why = await self._try(claim, waits=waits)
                except BusUnavailable:
                    if not waits:
                        raise
                    await asyncio.sleep(limits.BUS_RETRY_PAUSE_S)
                    continue
                if granted is not None:
                    return granted
                if not waits:
                    raise _busy(why)
                await context.progress(WAITING, 0, 0, "", why)
                await bell.wait(limits.GPU_WAIT_POLL_S)

    async def _try(self, claim: Claim, *, waits: bool) -> tuple[Claim | None, str]:
        """The claim with its devices, or None and what is in its way; it is in the table then if it waits."""
        devices = await asyncio.to_thread(self._devices.read)
        for _ in range(limits.CAS_TRIES_MAX):
            table, revision = await self._read()
            living = await self._living(table, claim)
            standing = await self._standing(devices, living)
            found = self._place(claim, standing)
            granted = replace(claim, devices=found, since_s=time.time()) if found else claim
            wanted = _with(living, granted) if found or waits else living
            try:
                if wanted != table:
                    await self._write(wanted, revision)
            except RevisionConflict:
                continue
            return (granted, "") if found else (None, self._why(claim, standing))
        raise RevisionConflict(f"the table of GPUs changed {limits.CAS_TRIES_MAX} times while {claim.title} asked")

    async def _watch(self, lease: Lease) -> None:
        """Follows what the processes of a lease use; ends them, and nobody else's, once that is too much."""
        while not lease.has_exceeded:
            await asyncio.sleep(limits.GPU_SAMPLE_PERIOD_S)
            devices = await asyncio.to_thread(self._devices.read)
            pids = await asyncio.to_thread(holders.pids_of, lease.holder)
            used = [sum(one.processes.get(pid, 0) for pid in pids) for one in devices if one.id in lease.devices]
            lease.peak_bytes = max(lease.peak_bytes, *used, 0)
        _log.warning("%s", _exceeded(lease))
        holders.end(await asyncio.to_thread(holders.pids_of, lease.holder))

    async def _release(self, claim: Claim, before: Mapping[str, int]) -> None:
        """Takes the claim out once its processes are gone and devices of its own are back at the level `before`.

        Where processes stay, or NATS is away, others find it later. Memory that stays is told, and counts as in use.
        """
        deadline_s = time.monotonic() + limits.GPU_RELEASE_WAIT_S
        while (pids := await asyncio.to_thread(holders.pids_of, claim.holder)) or await self._has_left(claim, before):
            if time.monotonic() > deadline_s:
                what = f"processes {pids}" if pids else "memory of GPUs in use"
                _log.warning("%s left %s%s", claim.job_id, what, "; its lease stays" if pids else "")
                if pids:
                    return
                break
            await asyncio.sleep(limits.BUS_RETRY_PAUSE_S)
        try:
            await self._forget(claim)
        except BusUnavailable as error:
            _log.debug("the lease of %s stays until others find it: %s", claim.job_id, error)

    async def _forget(self, claim: Claim) -> None:
        """Takes the claim out of the table, whoever writes to it meanwhile. BusUnavailable."""
        for _ in range(limits.CAS_TRIES_MAX):
            table, revision = await self._read()
            kept = tuple(one for one in table if one.holder != claim.holder)
            if kept == table:
                return
            with suppress(RevisionConflict):
                return await self._write(kept, revision)

    async def _has_left(self, claim: Claim, before: Mapping[str, int]) -> bool:
        """Whether more is in use of devices that were a claim's own than before it held them."""
        if claim.is_shared or not before:
            return False
        used = await self._used(before)
        return any(used.get(id, 0) > was + limits.GPU_LEFT_BYTES for id, was in before.items())

    async def _used(self, ids: Collection[str]) -> dict[str, int]:
        """Bytes in use of these devices."""
        return {one.id: one.used_bytes for one in await asyncio.to_thread(self._devices.read) if one.id in ids}

    def _claim(self, holder: str, want: Want, devices: Sequence[Device]) -> Claim | None:
        """The claim of a job on devices of this machine, None if it has none; OutOfMemory if it can never hold them."""
        if not devices:
            return None
        # Of several partitions a process sees the first only.
        usable = [device for device in devices if want.count == 1 or not device.whole]
        room = sorted((device.total_bytes - self._reserve_bytes for device in usable), reverse=True)
        if len(room) < want.count or room[want.count - 1] < want.memory_bytes:
            has = ", ".join(map(_gib, room)) or "no whole GPU"
            raise OutOfMemory(
                f"{want.title} needs {_gib(want.memory_bytes)} of {want.count} GPUs; this machine has {has} to lease."
                " Lower pack_tokens or sequence_tokens, set recompute or dtype bfloat16, or lower processes"
            )
        return Claim(
            holder=holder,
            title=want.title,
            memory_bytes=want.memory_bytes,
            count=want.count,
            is_shared=want.is_shared,
            among=tuple(device.id for device in usable),
            since_s=time.time(),
        )

    def _place(self, claim: Claim, standing: Standing) -> tuple[str, ...]:
        if ahead_of(claim, standing.claims):
            return ()
        holding = [one for one in standing.claims if one.devices]
        left = self._left(standing)
        if not self._beside_strangers:
            left = {id: size for id, size in left.items() if id not in standing.strangers}
        return place(claim, holding, left)

    def _left(self, standing: Standing) -> dict[str, int]:
        holding = [one for one in standing.claims if one.devices]
        return {
            device.id: left_bytes(device, holding, standing.uses, reserve_bytes=self._reserve_bytes)
            for device in standing.devices
        }

    def _why(self, claim: Claim, standing: Standing) -> str:
        """Who is in the way of a claim."""
        told, left = [], self._left(standing)
        for device in standing.devices:
            here = [one for one in standing.claims if device.id in one.devices]
            who = [
                f"{one.job_id} ({one.title}) holds {_gib(one.memory_bytes) if one.is_shared else 'it'}"
                f" since {max(time.time() - one.since_s, 0) / 60:.0f} min"
                for one in here
            ]
            if (pids := standing.strangers.get(device.id)) and not self._beside_strangers:
                who.append(f"process {pids[0]} computes there without a lease")
            size = f"{_gib(max(left[device.id], 0))} of {_gib(device.total_bytes)} free"
            told.append(f"{device.id[:12]} ({device.name}): {', '.join((size, *who))}")
        ahead = ahead_of(claim, standing.claims)
        queue = [f"{len(ahead)} before it, first {ahead[0].job_id} ({ahead[0].title})"] if ahead else []
        amount = f"{_gib(claim.memory_bytes)} of {claim.count} GPU{'s' if claim.count > 1 else ''}"
        return "; ".join((f"{claim.title} needs {amount}", *queue, *told))

    async def _living(self, table: Sequence[Claim], claim: Claim) -> tuple[Claim, ...]:
        """The table without claims on this one's devices whose attempt is over and whose processes are gone."""
        return tuple([one for one in table if not one.meets(claim) or await self._is_alive(one)])

    async def _is_over(self, claim: Claim) -> bool:
        try:
            record = await self._jobs.read(claim.job_id)
        except UnknownJob:
            return True
        return record.fence != claim.fence or record.job.state not in (model.RUNNING, model.CANCELLING)

    async def _is_alive(self, claim: Claim) -> bool:
        if not await self._is_over(claim):
            return True
        pids = await asyncio.to_thread(holders.pids_of, claim.holder)
        if pids:
            _log.warning("%s is over and left processes %s: they are ended", claim.job_id, pids)
            holders.end(pids)
        return bool(pids)

    async def _standing(self, devices: tuple[Device, ...], claims: Sequence[Claim]) -> Standing:
        def processes() -> dict[str, Sequence[int]]:
            names = (holders.PLANS, *(one.holder for one in claims if one.devices))
            return {name: holders.pids_of(name) for name in names}

        return Standing(devices=devices, claims=tuple(claims), processes=await asyncio.to_thread(processes))

    async def _read(self) -> tuple[tuple[Claim, ...], int]:
        entry = await self._bucket.get(_TABLE)
        if entry is None:
            return (), 0
        rows = json.loads(entry.value)
        claims = (Claim(**{**row, "among": tuple(row["among"]), "devices": tuple(row["devices"])}) for row in rows)
        return tuple(claims), entry.revision

    async def _write(self, table: Sequence[Claim], revision: int) -> None:
        if len(table) > limits.GPU_CLAIMS_MAX:
            raise TooManyRequests(f"{len(table)} jobs hold GPUs or wait for them, at most {limits.GPU_CLAIMS_MAX}")
        value = json.dumps([asdict(claim) for claim in table]).encode()
        await (self._bucket.update(_TABLE, value, revision) if revision else self._bucket.create(_TABLE, value))


def _with(table: Sequence[Claim], claim: Claim) -> tuple[Claim, ...]:
    """The table with the claim in its place, at the end if it is new."""
    if all(one.holder != claim.holder for one in table):
        return (*table, claim)
    return tuple(claim if one.holder == claim.holder else one for one in table)


def _busy(why: str) -> GpuBusy:
    return GpuBusy(f"{why}; wait for it (--wait-gpu), or try later")


def _exceeded(lease: Lease) -> OutOfMemory:
    return OutOfMemory(
        f"{lease.holder.rpartition('.')[0]} used {_gib(lease.peak_bytes)} of a GPU and may share"
        f" {_gib(lease.memory_bytes)}; it was ended. Raise --vram, or lower pack_tokens or sequence_tokens"
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / limits.GIB:.1f} GiB"
