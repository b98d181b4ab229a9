"""One replica of inference: its channel, whether it serves, and what it says it has to do."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smelt.inference.v1 import inference_pb2 as pb
from smelt.inference.v1 import inference_pb2_grpc

from smeltkit import limits
from smeltkit.errors import SmeltError
from smeltkit.routing.choice import Candidate
from smeltkit.routing.demand import Demand
from smeltkit.rpc.channel import call

_LOG = logging.getLogger(__name__)


class Replica(Candidate):
    """A replica that is watched from its making to `close`. It serves once its health says so and its load is known."""

    def __init__(self, address: str, channel: grpc.aio.Channel, on_change: Callable[[], None]) -> None:
        """`channel` belongs to the replica from now on; `on_change` is called when it begins or ends to serve."""
        super().__init__(address)
        self.channel = channel
        self.refusal = "has not answered yet"
        """Why it does not serve, while it does not."""
        self.is_known = False
        """Whether it was asked once, with whatever outcome."""
        self._on_change = on_change
        self._idle = asyncio.Event()
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._warmed: dict[str, float] = {}
        self._warming: set[asyncio.Task[None]] = set()
        self._watching = asyncio.create_task(self._watch())

    def give_back(self, demand: Demand) -> None:
        """See `Candidate.give_back`."""
        super().give_back(demand)
        if not self.requests:
            self._idle.set()

    def recheck(self) -> None:
        """Gives it no work until its health says anew that it serves: a call to it broke."""
        if not self.is_serving:
            return
        self._stop_serving("broke a call")
        self._watching.cancel()
        self._watching = asyncio.create_task(self._watch())

    def warm(self, model: str) -> None:
        """Has it load `model`, in the background; asked again at most every ROUTE_WARM_RETRY_S."""
        now = time.monotonic()
        if now < self._warmed.get(model, 0.0):
            return
        self._warmed[model] = now + limits.ROUTE_WARM_RETRY_S
        task = asyncio.create_task(self._load(model))
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)

    async def retire(self) -> None:
        """Closes it when the calls under way have ended, each by its own deadline; nothing new comes to it."""
        self._watching.cancel()
        self.is_serving = False
        while self.requests:
            self._idle.clear()
            await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """Ends the watch and closes the channel, and with it what is under way."""
        for task in (self._watching, *self._warming):
            task.cancel()
        await asyncio.gather(self._watching, *self._warming, return_exceptions=True)
        await self.channel.close()

    async def _watch(self) -> None:
        pause_s = limits.ROUTE_RECHECK_FIRST_S
        while True:
            try:
                await self._follow_health()
            except grpc.aio.AioRpcError as error:
                self._stop_serving(f"does not answer ({error.details()})")
            pause_s = limits.ROUTE_RECHECK_FIRST_S if self.is_serving else pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, limits.ROUTE_RECHECK_MAX_S)

    async def _follow_health(self) -> None:
        """Returns when it says that it does not serve: a stream kept open then would hold up its drain."""
        states = health_pb2_grpc.HealthStub(self.channel).Watch(health_pb2.HealthCheckRequest())
        reports: asyncio.Task[None] | None = None
        try:
            async for state in states:
                if state.status != health_pb2.HealthCheckResponse.SERVING:
                    break
                reports = reports or asyncio.create_task(self._follow_load())
            self._stop_serving("says that it is not ready, or drains")
        finally:
            states.cancel()
            if reports is not None:
                reports.cancel()

    async def _follow_load(self) -> None:
        while True:
            reports = self._stub.WatchLoad(pb.WatchLoadRequest())
            try:
                async for report in reports:
                    self.hear(report.tokens, frozenset(report.models))
                    self._serve()
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    self._serve()
                    return
            finally:
                reports.cancel()
            await asyncio.sleep(limits.ROUTE_RECHECK_FIRST_S)

    async def _load(self, model: str) -> None:
        try:
            await call(self._stub.Load, pb.LoadRequest(model=model), timeout_s=limits.EVALUATION_LOAD_TIMEOUT_S)
        except SmeltError as error:
            _LOG.warning("a replica cannot take its share", extra={"address": self.address, "cause": str(error)})

    def _serve(self) -> None:
        if not self.is_serving:
            self.is_serving = self.is_known = True
            self._on_change()

    def _stop_serving(self, refusal: str) -> None:
        is_news = self.is_serving or not self.is_known
        self.is_serving, self.is_known, self.refusal = False, True, refusal
        self.forget()
        if is_news:
            self._on_change()
