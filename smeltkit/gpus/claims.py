"""Who may take how much of which GPU, and whose turn it is: pure functions over the table of claims.

A claim waits, or holds devices. One that shares them said how much it takes of each, and may meet others that did so
too; any other gets devices of its own. Claims come to their turn in the order in which they asked: none is overtaken by
a later one that could use any of the same devices, so a large one does not starve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from smeltkit.gpus.devices import Device


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What one attempt at a job wants of the GPUs of its machine, or has of them."""

    holder: str
    """`<job id>.<fencing token of the attempt>`: the claim is worth as much as that token."""
    title: str
    """What it is for, to people."""
    memory_bytes: int
    """Bytes of each device."""
    count: int
    """Devices."""
    is_shared: bool
    """Whether others may use the same devices."""
    among: tuple[str, ...]
    """Devices of which it may get some."""
    devices: tuple[str, ...] = ()
    """Those that it holds; empty while it waits."""
    since_s: float = 0.0
    """When it asked or, once it holds devices, got them, in seconds of Unix time."""

    @property
    def job_id(self) -> str:
        """The job."""
        return self.holder.rpartition(".")[0]

    @property
    def fence(self) -> int:
        """Fencing token of the attempt."""
        return int(self.holder.rpartition(".")[2])

    def meets(self, other: Claim) -> bool:
        """Whether both may want the same device."""
        return not set(self.among).isdisjoint(other.among)


Uses = Callable[[Device, Claim], int]
"""Bytes that a claim's processes use of a device now."""


def left_bytes(device: Device, holding: Sequence[Claim], uses: Uses, *, reserve_bytes: int) -> int:
    """What can still be leased of a device: neither leased, nor used by others than who leased, nor kept back."""
    here = [claim for claim in holding if device.id in claim.devices]
    foreign_bytes = max(device.used_bytes - sum(uses(device, claim) for claim in here), 0)
    return device.total_bytes - reserve_bytes - foreign_bytes - sum(claim.memory_bytes for claim in here)


def place(claim: Claim, holding: Sequence[Claim], left: Mapping[str, int]) -> tuple[str, ...]:
    """Devices for a claim beside those that hold some already; empty if there are too few.

    One that shares goes where least is left, so that whole devices stay for others; any other where most is.
    """
    fitting = [id for id in claim.among if id in left and left[id] >= claim.memory_bytes]
    fitting = [id for id in fitting if all(claim.is_shared and one.is_shared for one in holding if id in one.devices)]
    fitting.sort(key=lambda id: (left[id] if claim.is_shared else -left[id], id))
    return tuple(fitting[: claim.count]) if len(fitting) >= claim.count else ()


def ahead_of(claim: Claim, table: Sequence[Claim]) -> list[Claim]:
    """The claims that wait for the same devices and asked before, oldest first."""
    ahead = []
    for other in table:
        if other.holder == claim.holder:
            break
        if not other.devices and other.meets(claim):
            ahead.append(other)
    return ahead
