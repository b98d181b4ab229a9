"""Commands that look after a whole platform: backup, restore, certificates, topology."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from gateway.cli.documents import to_document
from gateway.cli.options import Json, Plan
from gateway.cli.output import Output, facts, human_bytes, table
from gateway.cli.runner import run, run_locally

if TYPE_CHECKING:
    from gateway.cli.session import Session
    from smeltkit.backup import Summary
    from smeltkit.blobs.objects import ObjectStore
    from smeltkit.config import PlatformConfig

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Back a platform up, restore it, make certificates, compare NATS, show usage.",
)
Place: TypeAlias = Annotated[str, typer.Argument(metavar="DIR|s3://BUCKET/PREFIX", help="Where the backup is.")]
_SHOWN = 20


@app.callback()
def admin() -> None:
    """Back a platform up, restore it, make certificates, compare NATS, show usage."""


@app.command("backup")
def backup(place: Place, plan: Plan = False, as_json: Json = False) -> None:
    """Copies jobs, names, stages and artifacts, also while the platform works, and reads every object back."""
    _run("back_up", place, "backup", plan, as_json)


@app.command("restore")
def restore(place: Place, plan: Plan = False, as_json: Json = False) -> None:
    """Fills an empty platform from a backup, reads every object back, and queues unfinished jobs again."""
    _run("restore", place, "restore", plan, as_json)


@app.command("certificates")
def certificates(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where they go; an authority there is used again.")],
    as_json: Json = False,
) -> None:
    """Makes a certificate for each service and for whoever works the platform, from an authority of its own."""

    def work(output: Output) -> None:
        from smeltkit.certificates import issue, make_authority
        from smeltkit.rpc.access import MAY_CALL, OPERATOR

        authority = make_authority(folder)
        made = {name: str(issue(authority, folder / name, name)) for name in MAY_CALL}
        output.show({"folders": made}, table(("certificate of", "folder"), made.items()))
        output.note(f"for `smelt up` and all that follows: export SMELT_RPC_TLS_DIR={(folder / OPERATOR).absolute()}")

    run_locally(work, as_json=as_json)


@app.command("usage")
def usage(as_json: Json = False) -> None:
    """Shows what each tenant used of its quotas in the present window, and when the next one begins."""

    async def work(session: Session) -> None:
        from smelt.tenant.v1 import tenant_pb2

        reply = await session.call(session.tenants.ListUsage, tenant_pb2.ListUsageRequest())
        found = [(one.tenant, usage) for one in reply.tenants for usage in one.usages]
        rows = (
            (name, one.resource, f"{one.used:,.0f}", f"{one.allowed:,.0f}", f"{one.renew_time.ToDatetime()} UTC")
            for name, one in found
        )
        view = table(("tenant", "resource", ">used", ">allowed", "renews"), rows)
        session.output.show({"tenants": [to_document(one) for one in reply.tenants]}, view)
        if not found:
            session.output.note("no tenant has a quota; they stand in the file that SMELT_HTTP_API_KEYS_FILE names")

    run("admin usage", work, as_json=as_json)


@app.command("topology")
def topology(
    apply: Annotated[bool, typer.Option("--apply", help="Make NATS equal to what is declared.")] = False,
    as_json: Json = False,
) -> None:
    """Shows how streams, buckets and durables in NATS differ from what this release declares."""

    def work(output: Output) -> None:
        from gateway.cli.servers import servers_here

        lines = asyncio.run(_compare(servers_here("admin topology"), is_applied=apply))
        output.show({"differences": lines, "is_applied": apply}, table(("difference",), ((line,) for line in lines)))
        if not lines:
            output.note("NATS is as declared")
        elif not apply:
            output.note("nothing was changed; with --apply it is done")

    run_locally(work, as_json=as_json)


async def _compare(platform: PlatformConfig, *, is_applied: bool) -> list[str]:
    from smeltkit.bus import topology as bus_topology
    from smeltkit.bus.client import Bus

    bus = await Bus.connect(platform, name="admin")
    try:
        declared = bus_topology.declare(replicas=platform.nats_replicas)
        if is_applied:
            return await bus_topology.apply(bus, declared)
        return [str(difference) for difference in await bus_topology.diff(bus, declared)]
    finally:
        await bus.close()


def _run(verb: str, place: str, command: str, is_planned: bool, as_json: bool) -> None:
    def work(output: Output) -> None:
        from gateway.cli.servers import servers_here

        platform = servers_here(f"admin {command}")
        store = _open_place(place, platform, is_made=verb == "back_up" and not is_planned)
        found = asyncio.run(_move(verb, platform, store, output, is_planned))
        output.show(_document(found, is_planned), *_views(found))
        if is_planned:
            output.note("nothing was changed; without --plan it is done")

    run_locally(work, as_json=as_json)


async def _move(verb: str, platform: PlatformConfig, place: ObjectStore, output: Output, is_planned: bool) -> Summary:
    from smeltkit import backup
    from smeltkit.blobs.s3 import S3Store
    from smeltkit.bus.client import Bus

    action = {"back_up": backup.back_up, "restore": backup.restore}[verb]
    bus = await Bus.connect(platform, name="admin")
    try:
        return await action(bus, S3Store(platform), place, report=output.note, is_planned=is_planned)
    finally:
        await bus.close()


def _open_place(place: str, platform: PlatformConfig, *, is_made: bool) -> ObjectStore:
    """The store that `place` names; an S3 one is on the server that SMELT_BACKUP_* name, or on the platform's own.

    A folder is made if it `is_made` here; a bucket must be there, for a misspelt one would keep a backup out of sight.
    """
    from dataclasses import replace

    from smeltkit.blobs.below import StoreBelow
    from smeltkit.blobs.local import LocalStore
    from smeltkit.blobs.s3 import S3Store
    from smeltkit.config import BackupConfig, from_environment
    from smeltkit.errors import BadRequest

    if not place.startswith("s3://"):
        try:
            if is_made:
                Path(place).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadRequest(f"{place}: {error.strerror}; name a folder that can be written") from error
        return LocalStore(Path(place))
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    if not bucket or not prefix.strip("/"):
        raise BadRequest(f"{place!r} must be s3://BUCKET/PREFIX, or a folder")
    server = from_environment(BackupConfig, "SMELT_BACKUP_").on(platform)
    return StoreBelow(S3Store(replace(server, s3_bucket=bucket)), prefix)


def _document(found: Summary, is_planned: bool) -> dict[str, Any]:
    return {
        "is_planned": is_planned,
        "entries": dict(found.entries),
        "unfinished_jobs": found.unfinished,
        "objects": found.objects,
        "size_bytes": found.size_bytes,
        "missing": list(found.missing),
    }


def _views(found: Summary) -> list[Any]:
    rows = [*found.entries.items(), ("objects", found.objects)]
    known = [
        ("size", human_bytes(found.size_bytes)),
        ("unfinished jobs", f"{found.unfinished}, queued again when restored"),
        ("led to, but not stored", ", ".join(found.missing[:_SHOWN])),
    ]
    return [table(("what", ">count"), rows), facts(known)]
