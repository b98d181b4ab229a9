"""The command that cleans up the store of the platform on this machine."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli.options import Json
from gateway.cli.output import Output, facts, human_bytes, table
from gateway.cli.runner import run_locally

if TYPE_CHECKING:
    from smeltkit.blobs.garbage import Garbage
    from smeltkit.config import PlatformConfig

app = typer.Typer(rich_markup_mode=None)
_DAY_S = 24 * 3600.0
_SHOWN = 20


@app.command("gc")
def gc(
    apply: Annotated[bool, typer.Option("--apply", help="Delete; without it nothing is changed.")] = False,
    min_age_days: Annotated[float, typer.Option("--min-age-days", min=2, help="What was used since stays.")] = 7,
    as_json: Json = False,
) -> None:
    """Shows what in the store no name, job or kept artifact leads to; deletes it with --apply."""

    def work(output: Output) -> None:
        from gateway.cli.servers import servers_here

        garbage, uploads = asyncio.run(_clean_up(servers_here("gc"), min_age_days * _DAY_S, is_applied=apply))
        document = {
            "is_applied": apply,
            "objects": [{"key": item.key, "size_bytes": item.size_bytes} for item in garbage.objects],
            "size_bytes": garbage.size_bytes,
            "kept": garbage.kept,
            "uploads_given_up": uploads,
        }
        rows = ((item.key, human_bytes(item.size_bytes)) for item in garbage.objects[:_SHOWN])
        known = facts(
            [
                ("deleted" if apply else "would be deleted", f"{len(garbage.objects)} objects"),
                ("frees", human_bytes(garbage.size_bytes)),
                ("kept", f"{garbage.kept} blobs and manifests"),
                ("unfinished uploads", f"{uploads} given up" if apply else "kept"),
            ]
        )
        output.show(document, table(("object", ">size"), rows), known)
        if not apply:
            output.note("nothing was changed; `smelt gc --apply` deletes")

    run_locally(work, as_json=as_json)


async def _clean_up(platform: PlatformConfig, age_min_s: float, *, is_applied: bool) -> tuple[Garbage, int]:
    """What was found, or deleted where `is_applied`, and how many stale uploads were given up."""
    from dataclasses import replace

    from smeltkit.blobs.garbage import cut_off, delete_garbage, find_garbage
    from smeltkit.blobs.s3 import S3Store
    from smeltkit.bus.client import Bus
    from smeltkit.jobs.roots import gather_roots

    store, bus = S3Store(platform), await Bus.connect(platform, name="gc")
    try:
        roots = await gather_roots(bus)
    finally:
        await bus.close()
    cut_off_s = cut_off(time.time(), age_min_s, roots.begun_s)
    garbage = await asyncio.to_thread(find_garbage, store, roots.digests, cut_off_s)
    if not is_applied:
        return garbage, 0
    deleted = await asyncio.to_thread(delete_garbage, store, garbage)
    return replace(garbage, objects=tuple(deleted)), await asyncio.to_thread(store.abort_uploads)
