"""GPUs, who holds them and who waits, as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.output import human_bytes, measured, table


def gpus_view(reply: trainer_pb2.ListGpusResponse) -> list[RenderableType]:
    """A line for each GPU and each lease of it, then those who wait in their order."""
    columns = ("gpu", "name", ">in use", ">of", "job", "for", ">may take", ">takes", "since")
    views: list[RenderableType] = [table(columns, _rows(reply))]
    waiting = [lease for lease in reply.leases if not lease.gpus]
    if waiting:
        rows = ((one.job_id, one.title, one.count, human_bytes(one.memory_bytes), _since(one)) for one in waiting)
        views += ["", table(("waits", "for", ">gpus", ">of each", "since"), rows)]
    return views


def _rows(reply: trainer_pb2.ListGpusResponse) -> Iterator[tuple[object, ...]]:
    for gpu in reply.gpus:
        shown: tuple[object, ...] = (gpu.id, gpu.name, human_bytes(gpu.used_bytes), human_bytes(gpu.total_bytes))
        for lease in (one for one in reply.leases if gpu.id in one.gpus):
            may = human_bytes(lease.memory_bytes) if lease.is_shared else "all"
            yield (*shown, lease.job_id, lease.title, may, human_bytes(lease.used_bytes), _since(lease))
            shown = ("", "", "", "")
        if shown[0]:
            yield (*shown, *(measured(None) for _ in range(5)))


def _since(lease: trainer_pb2.GpuLease) -> str:
    return lease.since.ToDatetime().strftime("%Y-%m-%dT%H:%M:%SZ")
