"""Commands of recipes: plan, run, show, and what takes one to a cluster: pin, argo, stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli.options import Json
from gateway.cli.output import Output
from gateway.cli.recipe_view import edges_view, outcomes_view, outlooks_view
from gateway.cli.runner import run, run_locally
from gateway.recipes.argo import Pods, workflow
from gateway.recipes.plan import outlooks, pinned
from gateway.recipes.run import Outcome, run_recipe, run_stage
from gateway.recipes.schema import Recipe
from smeltkit import limits
from smeltkit.errors import BadRequest
from smeltkit.hints import meant
from smeltkit.ids import check_digest

if TYPE_CHECKING:
    from gateway.cli.session import Session

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Plan, run and show recipes.")
File = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The recipe.")]


@app.command("plan")
def plan(file: File, as_json: Json = False) -> None:
    """Says of each stage what it would do, what of it is stored already, and what it would be refused for."""

    async def work(session: Session) -> None:
        found = await outlooks(session, await pinned(session, Recipe.read(file)))
        document = {"recipe": found.recipe.name, "stages": [one.document() for one in found.stages.values()]}
        session.output.show(document, *outlooks_view(found))
        for error in found.refusals:
            raise typer.Exit(error.exit_code)

    run("recipe plan", work, as_json=as_json)


@app.command("run")
def run_(file: File, as_json: Json = False) -> None:
    """Runs every stage that is not stored; those that need one which failed are not begun."""

    async def work(session: Session) -> None:
        recipe = await pinned(session, Recipe.read(file))
        for error in (await outlooks(session, recipe)).refusals:
            raise error
        _show(session.output, recipe, await run_recipe(session, recipe))

    run("recipe run", work, as_json=as_json)


@app.command("show")
def show(file: File, as_json: Json = False) -> None:
    """Shows what goes into each stage and what it made, by digest."""

    async def work(session: Session) -> None:
        found = await outlooks(session, await pinned(session, Recipe.read(file)), also_past=True)
        document = {"recipe": found.recipe.name, "stages": [one.document() for one in found.stages.values()]}
        session.output.show(document, edges_view(found))

    run("recipe show", work, as_json=as_json)


@app.command("pin")
def pin(file: File, as_json: Json = False) -> None:
    """Stores the files that a recipe names, and prints the recipe with their digests: it then needs none beside it."""

    async def work(session: Session) -> None:
        text = (await pinned(session, Recipe.read(file))).text()
        session.output.show({"text": text}, text.rstrip())

    run("recipe pin", work, as_json=as_json)


@app.command("stage")
def stage(
    file: File,
    name: Annotated[str, typer.Argument(metavar="STAGE", help="The stage to run.")],
    inputs: Annotated[
        str, typer.Option("--inputs", help="What other stages made: STAGE=DIGEST, several with commas between.")
    ] = "",
    result: Annotated[
        Path | None, typer.Option("--result", metavar="FILE", help="Where to write the digest of what it made.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Runs one stage, given what the stages that it needs made; a cluster calls this for each."""

    async def work(session: Session) -> None:
        recipe = Recipe.read(file)
        if name not in recipe.stages:
            raise BadRequest(f"{file.name} has no stage {name!r}; {meant(name, list(recipe.stages))}")
        found = await run_stage(session, recipe, name, _made(recipe, name, inputs))
        if result and found.state == "succeeded":
            result.write_text(found.digest)
        _show(session.output, recipe, [found])

    run("recipe stage", work, as_json=as_json)


@app.command("argo")
def argo(
    file: File,
    image: Annotated[str, typer.Option("--image", help="The gateway's image, as the cluster's own gateway has it.")],
    secret: Annotated[
        str, typer.Option("--secret", help="Secret whose `token` pods show: the platform's, or a tenant's key.")
    ] = "rpc",
    certificate: Annotated[
        str, typer.Option("--certificate", help="Secret with an operator's certificate, for the component service-tls.")
    ] = "",
    hours: Annotated[
        int, typer.Option("--hours", min=1, max=limits.WORKFLOW_HOURS_MAX, help="After so long it is ended.")
    ] = 24,
    as_json: Json = False,
) -> None:
    """Prints a pinned recipe as a Workflow for `kubectl create`; see the component argo-workflows."""

    def work(output: Output) -> None:
        import yaml

        pods = Pods(image=image, secret=secret, certificate=certificate)
        made = workflow(Recipe.read(file), pods, hours * 3600)
        output.show(made, yaml.safe_dump(made, sort_keys=False, width=120).rstrip())

    run_locally(work, as_json=as_json)


def _made(recipe: Recipe, name: str, text: str) -> dict[str, str]:
    """Stage to digest, of just the stages that this one takes something of."""
    wanted = {edge.stage for edge in recipe.stages[name].edges if edge.stage}
    found = {}
    for part in text.split(",") if text else []:
        key, _, digest = part.partition("=")
        if key not in wanted or key in found:
            raise BadRequest(f"--inputs {part!r}: {name} takes something once of each of {', '.join(sorted(wanted))}")
        found[key] = check_digest(digest)
    if missing := sorted(wanted - set(found)):
        raise BadRequest(f"--inputs lacks {', '.join(missing)}; add {missing[0]}=DIGEST, of what that stage made")
    return found


def _show(output: Output, recipe: Recipe, outcomes: list[Outcome]) -> None:
    """Shows outcomes, and ends with the code of the first failure."""
    output.show({"recipe": recipe.name, "stages": [one.document() for one in outcomes]}, outcomes_view(outcomes))
    for one in outcomes:
        if one.state == "failed" and one.error:
            raise typer.Exit(one.error.exit_code)
