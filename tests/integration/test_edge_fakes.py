"""The stand-in edge ends with its block, also when a test fails in it while a request hangs."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from edge_fakes import MODEL, Served, served_edge

from smeltkit.testing.waiting import eventually


async def test_a_failing_test_leaves_no_server_behind() -> None:
    served: list[Served] = []
    async with httpx.AsyncClient(timeout=None) as http:
        with pytest.raises(ZeroDivisionError):
            async with served_edge() as edge:
                served.append(edge)
                body = {"model": MODEL, "prompt": "prefill", "stream": True}
                asking = asyncio.create_task(http.post(f"{edge.url}/v1/completions", json=body))
                await eventually(lambda: edge.inference.running)
                raise ZeroDivisionError
        await asyncio.gather(asking, return_exceptions=True)
        with pytest.raises(httpx.ConnectError):
            await http.get(f"{served[0].url}/healthz")
    assert served[0].inference.running == 0
