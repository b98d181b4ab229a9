"""The HTTP edge as background work of the gateway's process: uvicorn on the same event loop, under the same drain."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from smeltkit.errors import PortTaken

_LOG = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The service host owns the signals of the process."""
        yield


async def serve_http(app: ASGIApp, listen: str, stop: asyncio.Event, *, drain_grace_s: float) -> None:
    """Serves `app` on `listen` (host:port) until `stop`; requests under way get `drain_grace_s` to end. PortTaken."""
    host, _, port = listen.rpartition(":")
    try:
        listener = socket.create_server((host, int(port)), backlog=2048)
    except OSError as error:
        raise PortTaken(f"cannot listen on {listen}: in use or not ours; free it or choose another") from error
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=math.ceil(drain_grace_s), lifespan="on"
    )
    server = _Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    stopping = asyncio.ensure_future(stop.wait())
    _LOG.info("serving HTTP", extra={"address": f"{host}:{listener.getsockname()[1]}"})
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
    finally:
        stopping.cancel()
        listener.close()
