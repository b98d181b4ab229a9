"""TCP connections that can be cut: they forward what comes, and while cut keep silent, as a lost network does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager, suppress

_CHUNK_BYTES = 64 * 1024


class Links:
    """Forwarders from addresses to addresses (host:port), all cut and mended at once. Runs on a thread of its own."""

    def __init__(self, targets: Mapping[str, str]) -> None:
        self._targets = targets
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._pumps: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        """Listens on every address."""
        self._thread.start()
        self._do(self._listen())

    def cut(self) -> None:
        """Nothing passes any more; connections stay open, and new ones are taken and answered by nothing."""
        self._loop.call_soon_threadsafe(self._whole.clear)

    def mend(self) -> None:
        """Everything passes again, what was held back first."""
        self._loop.call_soon_threadsafe(self._whole.set)

    def close(self) -> None:
        """Ends all connections and the thread."""
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Awaitable[None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)  # type: ignore[arg-type]

    async def _listen(self) -> None:
        self._whole.set()
        for source, target in self._targets.items():
            host, _, port = source.rpartition(":")
            await asyncio.start_server(lambda r, w, target=target: self._serve(target, r, w), host, int(port))  # type: ignore[misc]

    async def _serve(self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._whole.wait()
        host, _, port = target.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        for pump in (self._pump(reader, far_writer), self._pump(far_reader, writer)):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _end(self) -> None:
        for task in self._pumps:
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)


@contextmanager
def links(targets: Mapping[str, str]) -> Iterator[Links]:
    """Working links, closed at the end."""
    found = Links(targets)
    found.start()
    try:
        yield found
    finally:
        found.close()
