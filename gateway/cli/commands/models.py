"""Commands about models: import, list, inspect, check, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from smelt.artifact.v1 import artifact_pb2
from smelt.importer.v1 import importer_pb2

from gateway.cli.documents import to_document
from gateway.cli.models_view import artifact_view, check_view, inspect_view, names_view, show_plan
from gateway.cli.options import Json, Name, Plan, Reference, Wait
from gateway.cli.runner import run
from gateway.cli.verbs import HUB, IMPORT, QUANTIZE, hub_spec, quantize_spec, upload_spec
from smeltkit.ids import check_name, new_id
from smeltkit.manifest import BUNDLE_TYPE

if TYPE_CHECKING:
    from smelt.job.v1 import job_pb2

    from gateway.cli.session import Session

app = typer.Typer(rich_markup_mode=None)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder, .gguf file or hf://ORG/NAME[@REVISION].")],
    name: Name,
    plan: Plan = False,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Imports a model; the result is a complete bundle that was loaded and probed."""
    path = Path(source)
    origin = path.absolute().name

    async def work(session: Session) -> None:
        from gateway.cli.uploads import stored_model

        check_name(name)
        if source.startswith(HUB):
            spec = hub_spec(source, name)
        else:
            spec = upload_spec(await stored_model(session, path), origin, name)
        if plan:
            show_plan(session.output, await IMPORT.plan(session, spec))
            return
        await _show_bundle(session, await IMPORT.start(session, spec), wait)

    run("import", work, as_json=as_json)


@app.command("models")
def models(as_json: Json = False) -> None:
    """Lists the models in the catalogue."""

    async def work(session: Session) -> None:
        request = artifact_pb2.ListNamesRequest(artifact_type=BUNDLE_TYPE)
        reply = await session.call(session.artifacts.ListNames, request)
        session.output.show({"models": [to_document(name) for name in reply.names]}, names_view(reply.names))
        if not reply.names:
            session.output.note("no models yet; `smelt import` adds one")

    run("models", work, as_json=as_json)


@app.command("inspect")
def inspect(
    reference: Reference,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
    as_json: Json = False,
) -> None:
    """Shows architecture, generation contract, lineage, files and tensors of a model."""

    async def work(session: Session) -> None:
        request = importer_pb2.InspectRequest(bundle=await session.whole(reference))
        reply = await session.call(session.importer.Inspect, request)
        session.output.show(to_document(reply), *inspect_view(reply, with_tensors=tensors))

    run("inspect", work, as_json=as_json)


@app.command("check")
def check(reference: Reference, wait: Wait = True, as_json: Json = False) -> None:
    """Checks a stored model: its structure, then what it generates in a clean process."""

    async def work(session: Session) -> None:
        request = importer_pb2.StartCheckRequest(bundle=await session.whole(reference), request_id=new_id("req"))
        begun = (await session.call(session.importer.StartCheck, request)).job
        if not (job := await session.finish_or_show(begun, wait=wait)):
            return
        report = await session.artifact(job.result_digest)
        session.output.show({"job": to_document(job), "report": to_document(report)}, *check_view(report))

    run("check", work, as_json=as_json)


@app.command("quantize")
def quantize(
    reference: Reference,
    scheme: Annotated[str, typer.Option("--scheme", help="F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M or Q4_0.")],
    name: Annotated[
        str, typer.Option("--name", help="Name for the result; by default REF's with the scheme as tag.")
    ] = "",
    plan: Plan = False,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Makes a smaller model; requested and stored types are compared tensor by tensor."""

    async def work(session: Session) -> None:
        bundle = await session.whole(reference)
        spec = quantize_spec(bundle, scheme, name)
        if plan:
            show_plan(session.output, await QUANTIZE.plan(session, spec))
            return
        await _show_bundle(session, await QUANTIZE.start(session, spec), wait)

    run("quantize", work, as_json=as_json)


async def _show_bundle(session: Session, begun: job_pb2.Job, wait: bool) -> None:
    if not (job := await session.finish_or_show(begun, wait=wait)):
        return
    artifact = await session.artifact(job.result_digest)
    if job.is_cached:
        session.output.note("cached: this result was stored already")
    session.output.show({"job": to_document(job), "artifact": to_document(artifact)}, artifact_view(artifact))
