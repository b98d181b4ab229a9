"""Commands about what runs now: monitor, gpus."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.documents import to_document
from gateway.cli.gpus_view import gpus_view
from gateway.cli.monitor_view import ALIVE, monitor_document, monitor_view
from gateway.cli.options import Json
from gateway.cli.runner import run
from smeltkit import limits
from smeltkit.errors import Unavailable

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


@app.command("monitor")
def monitor(
    once: Annotated[bool, typer.Option("--once", help="Show this moment and end.")] = False,
    period_s: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.2, max=3600, help="Time between two looks.")
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Shows what runs now and how it goes, until Ctrl-C; with --json one object a line for each look."""

    async def work(session: Session) -> None:
        output = session.output
        if once:
            moment = await _look(session)
            output.show(monitor_document(*moment), monitor_view(*moment))
            return
        is_live = output.out.is_terminal and not as_json
        with Live(console=output.out, auto_refresh=False) if is_live else nullcontext() as live:
            while True:
                moment = await _look(session)
                if live is not None:
                    live.update(monitor_view(*moment), refresh=True)
                elif as_json:
                    print(json.dumps(monitor_document(*moment), allow_nan=False), flush=True)
                else:
                    output.show(None, monitor_view(*moment))
                await asyncio.sleep(period_s)

    run("monitor", work, as_json=as_json)


async def _look(session: Session) -> tuple[list[job_pb2.Job], trainer_pb2.ListGpusResponse, str]:
    """Jobs that are not over, oldest first; GPUs, none where no trainer answers; the time."""
    found = await session.call(session.jobs.ListJobs, job_pb2.ListJobsRequest(limit=limits.JOB_LIST_MAX))
    try:
        gpus = await session.call(session.trainer.ListGpus, trainer_pb2.ListGpusRequest())
    except Unavailable:
        gpus = trainer_pb2.ListGpusResponse()
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return [job for job in reversed(found.jobs) if job.state in ALIVE], gpus, at
