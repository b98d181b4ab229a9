"""What a training asks of the GPUs of this machine before it begins, and what its end teaches about that.

A lease is what the training's components take, with room for what they leave out, until a run of the same kind was
measured: from then on it is that peak, which holds all that the driver counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from smelt.trainer.v1 import trainer_pb2

from services.trainer.costs.memory import CONTEXT_BYTES, components
from services.trainer.costs.paces import WITHOUT_EFFECT
from services.trainer.settings.training import TrainSettings
from services.trainer.together import OF_ADAPTERS, largest_and_adapters
from smeltkit import limits
from smeltkit.errors import BadRequest, GpuBusy, OutOfMemory, SmeltError, UnsupportedOption
from smeltkit.gpus.claims import Claim
from smeltkit.gpus.ledger import GpuLedger, Standing, Want
from smeltkit.ids import digest_bytes
from smeltkit.manifest import canonical_json
from smeltkit.ml.arch import ModelConfig

UNTOLD: Final = 1.1
"""What a training takes by what its components add up to, at most: the allocator keeps parts that do not fit."""
SPREAD: Final = 1.03
"""What one run may take by what another of the same kind took."""


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What a plan says of GPUs."""

    items: Mapping[str, str] = field(default_factory=dict)
    refusals: tuple[SmeltError, ...] = ()
    is_free: bool = True
    """Whether the training could begin now; if not, nothing is to be measured there either."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """By which a process sees the GPUs that it would get."""


async def admit(
    gpus: GpuLedger, config: ModelConfig, settings: Sequence[TrainSettings], terms: trainer_pb2.GpuTerms, title: str
) -> Admission:
    """What a training would lease, and what is in its way."""
    try:
        want = await want_of(gpus, config, settings, terms, title)
        try:
            lease = await gpus.check(want)
        except GpuBusy as busy:
            if not want.waits:
                raise
            return Admission(items={"GPU": f"waits: {busy.message}"}, is_free=False)
    except (OutOfMemory, BadRequest, GpuBusy) as refusal:
        return Admission(refusals=(refusal,), is_free=False)
    if lease.devices:
        how = "shared" if want.is_shared else "of its own"
        items = {"GPU": f"{want.count} {how}, {want.memory_bytes / limits.GIB:.2f} GiB of each"}
        return Admission(items=items, environment=lease.environment)
    if not terms.memory_bytes:
        return Admission()
    return Admission(
        refusals=(UnsupportedOption("--vram has no effect: the trainer's machine has no GPU; leave it out"),)
    )


def kind_of(config: ModelConfig, settings: Sequence[TrainSettings]) -> str:
    """The name of all trainings that take the same memory, 64 hex digits."""
    told = [{key: value for key, value in asdict(one).items() if key not in WITHOUT_EFFECT} for one in settings]
    return digest_bytes(canonical_json({"config": config.to_dict(), "settings": told})).removeprefix("sha256:")


async def want_of(
    gpus: GpuLedger, config: ModelConfig, settings: Sequence[TrainSettings], terms: trainer_pb2.GpuTerms, title: str
) -> Want:
    """What a training, or several on one base, asks for; OutOfMemory where that is more than it says it may take."""
    measured = await gpus.peak(kind_of(config, settings))
    needed = round(measured * SPREAD) if measured else round(_told_bytes(config, settings) * UNTOLD) + CONTEXT_BYTES
    if terms.memory_bytes < 0:
        raise BadRequest(f"gpu.memory_bytes={terms.memory_bytes} must be 0 or more")
    if 0 < terms.memory_bytes < needed:
        raise OutOfMemory(
            f"{title} may take {terms.memory_bytes / limits.GIB:.2f} GiB of a GPU and needs {needed / limits.GIB:.2f};"
            " raise --vram, lower pack_tokens or sequence_tokens, or set recompute or dtype bfloat16"
        )
    return Want(
        title=title,
        memory_bytes=terms.memory_bytes or needed,
        count=settings[0].processes // settings[0].nodes,
        is_shared=terms.memory_bytes > 0,
        waits=terms.waits,
    )


def _told_bytes(config: ModelConfig, settings: Sequence[TrainSettings]) -> int:
    needs = [components(config, one) for one in settings]
    adapters = [sum(need[key] for key in OF_ADAPTERS) for need in needs]
    return largest_and_adapters([sum(need.values()) for need in needs], adapters)


def to_gpus(standing: Standing) -> trainer_pb2.ListGpusResponse:
    """The GPUs of this machine and all leases as a message."""
    gpus = [
        trainer_pb2.Gpu(id=one.id, name=one.name, total_bytes=one.total_bytes, used_bytes=one.used_bytes)
        for one in standing.devices
    ]
    return trainer_pb2.ListGpusResponse(gpus=gpus, leases=[_to_lease(standing, claim) for claim in standing.claims])


def _to_lease(standing: Standing, claim: Claim) -> trainer_pb2.GpuLease:
    used = [standing.uses(device, claim) for device in standing.devices if device.id in claim.devices]
    lease = trainer_pb2.GpuLease(
        job_id=claim.job_id,
        title=claim.title,
        memory_bytes=claim.memory_bytes,
        count=claim.count,
        is_shared=claim.is_shared,
        gpus=claim.devices,
        used_bytes=max(used, default=0),
    )
    lease.since.FromNanoseconds(int(claim.since_s * 1e9))
    return lease
