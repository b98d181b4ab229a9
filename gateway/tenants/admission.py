"""Calls of tenants that begin something: what they would store is reserved before, and plans say what is left.

Every `Start...` of a service is planned first, by the `Plan...` beside it where there is one, and the forecast of what
it stores is reserved under the id that its job will have. So of two gateways that get the last bytes at the same moment
one refuses. GPU seconds have no forecast that could be reserved: a training begins while any are left, see `metering`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from smelt.job.v1 import job_pb2

from gateway.tenants.accounts import Accounts
from gateway.tenants.keys import BYTES, GPU, ApiKeys, Tenant
from smeltkit import limits
from smeltkit.catalog import Catalog
from smeltkit.errors import BadApiKey, BadRequest, NameTaken, QuotaUsedUp, UnknownJob
from smeltkit.ids import derived_id
from smeltkit.jobs.ledger import JobLedger

_START, _PLAN = "Start", "Plan"
_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""Answers that say for certain that no job was started."""
_ON_GPUS = "smelt.trainer.v1.TrainerService"


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """A call that is passed on."""

    channel: grpc.aio.Channel
    method: str
    """/package.Service/Method."""
    metadata: grpc.aio.Metadata
    timeout_s: float | None


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Holds what tenants begin to their quotas."""

    keys: ApiKeys
    accounts: Accounts
    ledger: JobLedger
    catalog: Catalog

    @asynccontextmanager
    async def admitted(self, tenant: str, call: Outgoing, request: bytes) -> AsyncIterator[None]:
        """Lets the call be made inside the block; what was reserved is given back if it is refused. QuotaUsedUp.

        Where an answer is lost the job may have begun: the reservation stays until it is over, or the window is.
        """
        method = _method(call.method)
        holder = self.holder(tenant)
        if method is None or not method.name.startswith(_START):
            yield
            return
        started = _parse(method.input_type, request)
        job_id = derived_id("job", tenant, getattr(started, "request_id", ""))
        if await self._is_known(job_id):
            yield
            return
        await self._check_gpus(holder, method)
        for name in _names_in(started):
            await self.catalog.check_free(name)
        await self.accounts.reserve(holder, BYTES, {job_id: await self._forecast(call, method, started)})
        try:
            yield
        except grpc.aio.AioRpcError as error:
            if error.code() in _REFUSALS:
                await self.accounts.settle(holder, BYTES, {job_id: 0.0})
            raise

    async def told(self, tenant: str, method_name: str, request: bytes, reply: bytes) -> bytes:
        """The reply of a plan with what the tenant has left, and with a refusal of what would be refused."""
        method = _method(method_name)
        if method is None or not method.name.startswith(_PLAN):
            return reply
        message = _parse(method.output_type, reply)
        plan: job_pb2.Plan = message.plan
        holder = self.holder(tenant)
        used = await self.accounts.used(holder)
        for resource, quota in holder.quotas.items():
            value = f"{used[resource]:,.0f} of {quota.allowed:,} used in {quota.window_s} s"
            plan.items.append(job_pb2.PlanItem(name=f"quota of {resource}", value=value))
        try:
            for name in _names_in(_parse(method.input_type, request)):
                await self.catalog.check_free(name)
            await self._check_gpus(holder, method)
            await self.accounts.check(holder, BYTES, _stored_by(plan))
        except (QuotaUsedUp, NameTaken) as error:
            plan.refusals.append(job_pb2.Refusal(reason=error.reason(), message=error.message))
        return bytes(message.SerializeToString())

    async def reserve_upload(self, tenant: str, files: Mapping[str, int]) -> None:
        """Charges files that are about to be stored, sizes by digest, all or none; QuotaUsedUp if they do not fit."""
        await self.accounts.reserve(self.holder(tenant), BYTES, files)

    def holder(self, tenant: str) -> Tenant:
        """The tenant of that name; BadApiKey if it was taken out meanwhile."""
        found = self.keys.tenant(tenant)
        if found is None:
            raise BadApiKey(f"{tenant} is in the file of keys no more")
        return found

    async def _check_gpus(self, holder: Tenant, method: MethodDescriptor) -> None:
        if method.containing_service.full_name == _ON_GPUS:
            await self.accounts.check(holder, GPU)

    async def _is_known(self, job_id: str) -> bool:
        """Whether the call repeats one that was admitted."""
        try:
            await self.ledger.get(job_id)
        except UnknownJob:
            return False
        return True

    async def _forecast(self, call: Outgoing, method: MethodDescriptor, started: Message) -> float:
        """Bytes that the job would store, by its plan; 0 where there is none."""
        beside = method.containing_service.methods_by_name.get(method.name.replace(_START, _PLAN, 1))
        if beside is None:
            return 0.0
        asked = message_factory.GetMessageClass(beside.input_type)()
        for field, value in started.ListFields():
            if (same := beside.input_type.fields_by_name.get(field.name)) is not None:
                asked.MergeFrom(type(asked)(**{same.name: value}))
        ask: Any = call.channel.unary_unary(
            f"/{beside.containing_service.full_name}/{beside.name}",
            request_serializer=type(asked).SerializeToString,
            response_deserializer=message_factory.GetMessageClass(beside.output_type).FromString,
        )
        timeout_s = call.timeout_s if call.timeout_s is not None else limits.COMMAND_TIMEOUT_S
        return _stored_by((await ask(asked, timeout=timeout_s, metadata=call.metadata)).plan)


def _stored_by(plan: job_pb2.Plan) -> float:
    """Bytes that what is planned adds."""
    return 0.0 if plan.cached_digest else float(plan.write_bytes)


def _names_in(request: Any) -> set[str]:
    """Names that a job would give to what it makes."""
    specs = [getattr(request, "spec", None), *getattr(request, "together", ())]
    return {name for spec in specs if (name := getattr(spec, "name", ""))}


def _method(name: str) -> MethodDescriptor | None:
    """The method of that name; None for one that this release does not know."""
    try:
        return descriptor_pool.Default().FindMethodByName(name.lstrip("/").replace("/", "."))
    except KeyError:
        return None


def _parse(kind: Any, data: bytes) -> Any:
    try:
        return message_factory.GetMessageClass(kind).FromString(data)
    except DecodeError as error:
        raise BadRequest(f"the message is no {kind.full_name}: {error}") from error
