"""Names on the bus: streams, buckets, and the one place that spells subjects.

smelt.job.<service>.<kind>.<tenant>                  work queue SMELT_JOBS; body: a job id
smelt.evt.<service>.<noun>.<verb-past>.<tenant>      facts, SMELT_EVENTS
smelt.dlq.<service>.<kind>.<tenant>                  work that used up its attempts, SMELT_DLQ
smelt.kv.<bucket>.<key>                              doorbells: a key of the bucket changed (not stored)
_INBOX.<user>.>                                      answers to one user of NATS, which no other may hear
"""

from __future__ import annotations

import re
from typing import Final

from smeltkit.errors import BadRequest

JOBS_STREAM: Final = "SMELT_JOBS"
EVENTS_STREAM: Final = "SMELT_EVENTS"
DEAD_STREAM: Final = "SMELT_DLQ"

JOBS_BUCKET: Final = "smelt_jobs"
LEASES_BUCKET: Final = "smelt_leases"
CATALOG_BUCKET: Final = "smelt_catalog"
STAGES_BUCKET: Final = "smelt_stages"
GPUS_BUCKET: Final = "smelt_gpus"
TENANTS_BUCKET: Final = "smelt_tenants"

DEFAULT_TENANT: Final = "default"

_TOKEN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def check_token(text: str, what: str) -> str:
    """`text` itself if it may be one part of a subject, else BadRequest that names `what`."""
    if not _TOKEN.fullmatch(text):
        raise BadRequest(f"{what} {text!r} must be 1 to 64 of a-z, 0-9, '_' and '-', and begin with a letter or digit")
    return text


def job_subject(service: str, kind: str, tenant: str = DEFAULT_TENANT) -> str:
    """Where the ids of jobs of this kind are queued."""
    return f"smelt.job.{_family(service, kind, tenant)}"


def dead_subject(service: str, kind: str, tenant: str = DEFAULT_TENANT) -> str:
    """Where jobs of this kind go that used up their attempts."""
    return f"smelt.dlq.{_family(service, kind, tenant)}"


def event_subject(fact: str, tenant: str = DEFAULT_TENANT) -> str:
    """Where a fact is published: `importer.bundle.stored` goes to `smelt.evt.importer.bundle.stored.default`."""
    parts = fact.split(".")
    if len(parts) != 3:
        raise BadRequest(f"event {fact!r} must be <service>.<noun>.<verb in the past>")
    checked = [*(check_token(part, "part of an event") for part in parts), check_token(tenant, "tenant")]
    return "smelt.evt." + ".".join(checked)


def doorbell_subject(bucket: str, key: str) -> str:
    """Where NATS announces, without storing it, that `key` of `bucket` changed."""
    return f"smelt.kv.{bucket}.{key}"


def inbox_of(user: str) -> str:
    """Under which answers come to this user of NATS; one inbox for all where there are no users."""
    return f"_INBOX.{user}" if user else "_INBOX"


def worker_durable(service: str) -> str:
    """The durable consumer through which the workers of a service share its queue."""
    return f"{check_token(service, 'service')}-worker"


def _family(service: str, kind: str, tenant: str) -> str:
    return f"{check_token(service, 'service')}.{check_token(kind, 'kind')}.{check_token(tenant, 'tenant')}"
