"""What stubs and the gateway call in place of a channel: each call goes to the replica that is best for it.

A call that breaks before its first reply because its replica dies or drains is made once more, on whichever replica is
best then; one that has begun to answer is never repeated, and its error says what happened. What the operator wants
loaded, unloaded or listed concerns every replica, and goes to all that serve.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Generator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
from smelt.inference.v1 import inference_pb2 as pb

from smeltkit.routing.demand import Demand, demand_of
from smeltkit.routing.listing import merged
from smeltkit.routing.pool import Pool
from smeltkit.routing.replica import Replica
from smeltkit.rpc.channel import open_channel
from smeltkit.rpc.methods import MethodChannel
from smeltkit.rpc.status import has_reason
from smeltkit.rpc.tls import Identity
from smeltkit.secret import Secret

_Opened = tuple[Any, Any]
"""The first reply of a call, None if there is none, and the iterator of the others."""
_SERVICE = "/smelt.inference.v1.InferenceService"
_EVERYWHERE = (f"{_SERVICE}/Load", f"{_SERVICE}/Unload", f"{_SERVICE}/ListModels")
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


@asynccontextmanager
async def open_inference(
    addresses: str,
    *,
    token: Secret | str = "",
    identity: Identity | None = None,
    start_s: float = 0.0,
    is_for_operator: bool = False,
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to inference, wherever it runs: `addresses` and `start_s` as in `Pool`. BadConfig if malformed.

    With `is_for_operator` Load, Unload and ListModels go to every replica, and ListModels tells what is on any of them;
    for a worker one is enough, and others follow its load.
    """
    pool = Pool(
        addresses,
        lambda address: open_channel(address, token=token, identity=identity, peer="inference", is_retrying=False),
        start_s=start_s,
    )
    await pool.start()
    try:
        yield cast(grpc.aio.Channel, _Routed(pool, _EVERYWHERE if is_for_operator else ()))
    finally:
        await pool.close()


class _Routed(MethodChannel):
    """What stubs and `gateway.forwarding` take for a channel."""

    def __init__(self, pool: Pool, everywhere: Collection[str]) -> None:
        """`everywhere` names the methods that every replica is to hear."""
        self._pool, self._everywhere = pool, everywhere

    def _method(self, kind: str, method: str, codec: tuple[Any, ...], options: dict[str, Any]) -> _Method:
        call = RoutedCall
        if method in self._everywhere:
            call = ListOfAll if method.endswith("/ListModels") else CallOfAll
        return _Method(self._pool, kind, method, codec, options, call)


class _Method:
    """One method of inference, to be called. A call whose requests are a stream is made once."""

    def __init__(
        self,
        pool: Pool,
        kind: str,
        method: str,
        codec: tuple[Any, ...],
        options: dict[str, Any],
        call: type[RoutedCall],
    ) -> None:
        self._pool, self._kind, self._codec, self._options, self._call = pool, kind, codec, options, call
        self._method = method.encode()

    def __call__(self, request: Any, *, timeout: float | None = None, **options: Any) -> RoutedCall:
        method, is_repeatable = self._method.decode(), self._kind.startswith("unary")
        deadline_s = None if timeout is None else time.monotonic() + timeout

        def begin(channel: grpc.aio.Channel) -> Any:
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            return getattr(channel, self._kind)(method, *self._codec, **self._options)(
                request, timeout=left_s, **options
            )

        opened = _first_of_many if self._kind.endswith("stream") else _only_one
        demand = demand_of(method, request) if is_repeatable else Demand()
        return self._call(self._pool, demand, begin, opened, attempts=2 if is_repeatable else 1)


class RoutedCall:
    """A call under way: awaited for its one reply or iterated over, and cancelled in the end by whoever made it."""

    def __init__(
        self,
        pool: Pool,
        demand: Demand,
        begin: Callable[[grpc.aio.Channel], Any],
        opened: Callable[[Any], Awaitable[_Opened]],
        *,
        attempts: int,
    ) -> None:
        self._pool, self._demand, self._begin, self._opened, self._attempts = pool, demand, begin, opened, attempts
        self._call: Any = None
        self._replica: Replica | None = None
        self._first = asyncio.create_task(self._start())

    def __await__(self) -> Generator[Any, None, Any]:
        return self._reply().__await__()

    async def __aiter__(self) -> AsyncGenerator[Any, None]:
        try:
            first, others = await self._first
            if first is not None:
                yield first
                async for reply in others:
                    yield reply
        except grpc.aio.AioRpcError as error:
            self._recheck(error)
            raise
        finally:
            self.cancel()

    async def initial_metadata(self) -> Any:
        """That of the replica which answers, once its first reply is there."""
        try:
            await self._first
        except grpc.aio.AioRpcError as error:
            return error.initial_metadata()
        return await self._call.initial_metadata()

    async def trailing_metadata(self) -> Any:
        """That of the replica which answered."""
        return await self._call.trailing_metadata()

    def cancel(self) -> None:
        """Ends the call, if it has not ended."""
        self._first.cancel()
        if self._call is not None:
            self._call.cancel()
        self._leave()

    async def _reply(self) -> Any:
        try:
            return (await self._first)[0]
        finally:
            self.cancel()

    async def _start(self) -> _Opened:
        """What the replica that answers gives, up to its first reply."""
        excluded: list[Replica] = []
        while True:
            replica = await self._pool.pick(self._demand, excluded)
            self._replica = replica
            replica.take(self._demand)
            self._call = self._begin(replica.channel)
            try:
                return await self._opened(self._call)
            except grpc.aio.AioRpcError as error:
                self._recheck(error)
                self._leave()
                self._attempts -= 1
                if error.code() not in _BROKEN or not self._attempts:
                    raise
                if has_reason(error):
                    excluded.append(replica)
                    if not self._pool.has_others(excluded):
                        raise

    def _recheck(self, error: grpc.aio.AioRpcError) -> None:
        """An error that the replica did not give itself may be its end: it gets nothing new until it answers."""
        if self._replica is not None and error.code() in _BROKEN and not has_reason(error):
            self._replica.recheck()

    def _leave(self) -> None:
        if self._replica is not None:
            self._replica.give_back(self._demand)
            self._replica = None


class CallOfAll(RoutedCall):
    """A call to every replica that serves. It ends when all have; its reply is one of them, its error only that of all:
    a replica that has no room does not keep others from loading."""

    async def _start(self) -> _Opened:
        await self._pool.pick(self._demand)
        calls = [self._begin(replica.channel) for replica in self._pool.serving()]
        try:
            ends = await asyncio.gather(*map(self._opened, calls), return_exceptions=True)
            good = [number for number, end in enumerate(ends) if not isinstance(end, BaseException)]
            self._call = calls[good[0] if good else 0]
        finally:
            for call in calls:
                if call is not self._call:
                    call.cancel()
        end = ends[good[0] if good else 0]
        if isinstance(end, BaseException):
            raise end
        return self._merged(end, [cast(_Opened, ends[number]) for number in good[1:]])

    def _merged(self, end: _Opened, others: Sequence[_Opened]) -> _Opened:
        """The reply of them all; `others` answered well too."""
        return end


class ListOfAll(CallOfAll):
    """ListModels of every replica that serves, whose answers become one."""

    def _merged(self, end: _Opened, others: Sequence[_Opened]) -> _Opened:
        first, rest = end
        replies = [first, *(reply for reply, _ in others)]
        read = pb.ListModelsResponse.FromString
        models = merged([read(reply) if isinstance(reply, bytes) else reply for reply in replies])
        return models.SerializeToString() if isinstance(first, bytes) else models, rest


async def _first_of_many(call: Any) -> _Opened:
    replies = aiter(call)
    return await anext(replies, None), replies


async def _only_one(call: Any) -> _Opened:
    return await call, None
