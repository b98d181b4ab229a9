"""What jobs of tenants really took: read from the records of the jobs, and charged to the accounts as they change.

Every gateway does it, which does no harm: a charge has the id of its job or the digest of its file as key. GPU seconds
count from the moment a job holds GPUs, by the time its worker last told. When a job is over, the forecast of what it
stores gives way to the files of its result; one that the tenant had stored before in this window costs nothing more.
"""

from __future__ import annotations

import asyncio
import logging

from smelt.job.v1 import job_pb2

from gateway.tenants.accounts import Accounts
from gateway.tenants.keys import BYTES, GPU, ApiKeys, Tenant
from smeltkit.blobs.store import Store
from smeltkit.errors import NotFound, SmeltError
from smeltkit.jobs import model
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.tasks import pause

_log = logging.getLogger(__name__)


class Metering:
    """Charges what changed since it last looked."""

    def __init__(self, keys: ApiKeys, accounts: Accounts, ledger: JobLedger, store: Store) -> None:
        self._keys, self._accounts, self._ledger, self._store = keys, accounts, ledger, store
        self._revision = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Looks every `sweep_period_s` until `stop` is set; outages are waited out, and nothing is skipped by them."""
        while not stop.is_set():
            try:
                await self.look()
            except SmeltError as error:
                _log.warning("jobs of tenants are charged later: %s", error)
            await pause(stop, self._ledger.bounds.sweep_period_s)

    async def look(self) -> None:
        """Charges every job of a tenant whose record changed since the last look. BusUnavailable."""
        tenants = {tenant.name: tenant for tenant in self._keys.tenants() if tenant.quotas}
        if not tenants:
            return
        records, last = await self._ledger.records(self._revision)
        for record in records:
            if (tenant := tenants.get(record.job.tenant)) is not None:
                await self._charge(tenant, record.job)
        self._revision = last

    async def _charge(self, tenant: Tenant, job: job_pb2.Job) -> None:
        """A job that was over before the window began was charged to an earlier one."""
        changed_s = job.update_time.ToNanoseconds() / 1e9
        is_recent = {name: changed_s >= self._accounts.begins_s(quota) for name, quota in tenant.quotas.items()}
        if job.gpu_s and is_recent.get(GPU):
            await self._accounts.settle(tenant, GPU, {job.id: job.gpu_s})
        if job.state in model.FINAL and is_recent.get(BYTES):
            await self._accounts.settle(tenant, BYTES, {job.id: 0.0, **await self._files(job)})

    async def _files(self, job: job_pb2.Job) -> dict[str, float]:
        """Bytes of the files that the job made, by digest."""
        if not job.result_digest or job.is_cached:
            return {}
        try:
            manifest = await asyncio.to_thread(self._store.get_manifest, job.result_digest)
        except NotFound:
            return {}
        return {layer.digest: float(layer.size_bytes) for layer in manifest.layers}
