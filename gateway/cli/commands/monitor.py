"""Commands about what runs now: gpus."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.documents import to_document
from gateway.cli.gpus_view import gpus_view
from gateway.cli.options import Json
from gateway.cli.runner import run

if TYPE_CHECKING:
    from gateway.cli.session import Session

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.command("gpus")
def gpus(as_json: Json = False) -> None:
    """Shows the GPUs of the trainer's machine, who holds them and who waits for them."""

    async def work(session: Session) -> None:
        reply = await session.call(session.trainer.ListGpus, trainer_pb2.ListGpusRequest())
        session.output.show(to_document(reply), *gpus_view(reply))
        if not reply.gpus:
            session.output.note("the trainer's machine has no GPU, or no nvidia-smi that tells of it")

    run("gpus", work, as_json=as_json)
