"""Commands about settings: where each value comes from."""

from __future__ import annotations

from typing import Annotated

import typer

from gateway.cli.options import Json
from gateway.cli.output import Output, table
from gateway.cli.runner import run_locally
from smeltkit.errors import BadConfig

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Show where each setting comes from."
)


@app.callback()
def settings() -> None:
    """Show where each setting comes from."""


@app.command("explain")
def explain(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="A variable or a part of its name; all by default.")] = "",
    as_json: Json = False,
) -> None:
    """Shows each setting with its value, where that comes from, and what it does. Secrets are not shown."""

    def work(output: Output) -> None:
        from gateway.cli.settings import known_settings

        found = [setting for setting in known_settings() if key.upper() in setting.variable]
        if not found:
            raise BadConfig(f"no setting has {key!r} in its name; `smelt config explain` lists all")
        rows = ((setting.variable, setting.value, setting.source, setting.meaning) for setting in found)
        document = [
            {"variable": item.variable, "value": item.value, "source": item.source, "meaning": item.meaning}
            for item in found
        ]
        output.show({"settings": document}, table(("variable", "value", "from", "meaning"), rows))

    run_locally(work, as_json=as_json)
