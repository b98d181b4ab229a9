"""TenantService: what each tenant has used."""

from __future__ import annotations

from smelt.tenant.v1 import tenant_pb2, tenant_pb2_grpc

from gateway.tenants.accounts import Accounts
from gateway.tenants.keys import ApiKeys, Tenant
from smeltkit.rpc.context import TENANT, RpcContext


class TenantServicer(tenant_pb2_grpc.TenantServiceServicer):
    """Translates between calls and the accounts."""

    def __init__(self, keys: ApiKeys, accounts: Accounts) -> None:
        self._keys, self._accounts = keys, accounts

    async def ListUsage(
        self, request: tenant_pb2.ListUsageRequest, context: RpcContext
    ) -> tenant_pb2.ListUsageResponse:
        """Tenants by name; a tenant that asks finds itself alone."""
        shown = [tenant for tenant in self._keys.tenants() if TENANT.get() in ("", tenant.name)]
        return tenant_pb2.ListUsageResponse(tenants=[await self._usage(tenant) for tenant in shown])

    async def _usage(self, tenant: Tenant) -> tenant_pb2.TenantUsage:
        used = await self._accounts.used(tenant)
        usages = []
        for resource, quota in tenant.quotas.items():
            usage = tenant_pb2.Usage(resource=resource, used=used[resource], allowed=quota.allowed)
            usage.renew_time.FromSeconds(self._accounts.begins_s(quota) + quota.window_s)
            usages.append(usage)
        return tenant_pb2.TenantUsage(tenant=tenant.name, usages=usages)
