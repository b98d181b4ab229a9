"""The HTTP edge drains as the process does: requests under way get the same grace, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from gateway.http_server import serve_http
from smeltkit.servers import free_ports


class _Slow:
    """Answers when it is released."""

    def __init__(self) -> None:
        self.entered, self.released, self.stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def answer(self, request: Request) -> Response:
        self.entered.set()
        await self.released.wait()
        return PlainTextResponse("done")


@asynccontextmanager
async def _asked(drain_grace_s: float) -> AsyncIterator[tuple[_Slow, asyncio.Task[httpx.Response]]]:
    """A request under way at a server whose drain has begun."""
    slow, port = _Slow(), free_ports(1)[0]
    app = Router([Route("/", slow.answer)])
    serving = asyncio.create_task(serve_http(app, f"127.0.0.1:{port}", slow.stop, drain_grace_s=drain_grace_s))
    await asyncio.sleep(0)
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        asking = asyncio.create_task(client.get(f"http://127.0.0.1:{port}/"))
        await asyncio.wait_for(slow.entered.wait(), 10)
        slow.stop.set()
        yield slow, asking
        await asyncio.wait_for(serving, 10)


async def test_a_request_under_way_may_end_within_the_grace() -> None:
    async with _asked(30) as (slow, asking):
        slow.released.set()
        assert (await asking).text == "done"


async def test_without_grace_a_request_under_way_is_cut_at_once() -> None:
    async with _asked(0) as (_, asking):
        assert (await asyncio.wait_for(asking, 10)).status_code == 500
