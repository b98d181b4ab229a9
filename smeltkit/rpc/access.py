"""Who may call what once processes have certificates: whatever is not in the table is refused.

Callers and services go by the names in their certificates. `operator` is whoever works the platform from outside, by
the command line; it reaches the gateway alone. Health and reflection are open to everybody with a certificate of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from smeltkit.errors import CallerDenied

OPERATOR: Final = "operator"
EVERY: Final = frozenset({"*"})

MAY_CALL: Final[Mapping[str, Mapping[str, frozenset[str]]]] = MappingProxyType(
    {
        OPERATOR: {"gateway": EVERY},
        "gateway": {service: EVERY for service in ("importer", "trainer", "inference", "evaluator", "sandbox")},
        "importer": {"inference": frozenset({"Probe", "WatchLoad", "Load"})},
        "trainer": {"inference": frozenset({"Probe", "WatchLoad", "Load"})},
        "evaluator": {
            "inference": frozenset({"Load", "ListModels", "Generate", "Tokenize", "Score", "WatchLoad"}),
            "sandbox": frozenset({"Describe", "JudgeBatch"}),
        },
        "inference": {},
        "sandbox": {},
    }
)
"""By caller, then by service: the last parts of the names of the methods."""


TENANTS_MAY_CALL: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "smelt.artifact.v1.ArtifactService": EVERY,
        "smelt.job.v1.JobService": EVERY,
        "smelt.tenant.v1.TenantService": EVERY,
        "smelt.importer.v1.ImporterService": EVERY,
        "smelt.trainer.v1.TrainerService": EVERY,
        "smelt.evaluator.v1.EvaluatorService": EVERY,
        "smelt.inference.v1.InferenceService": frozenset({"ListModels"}),
    }
)
"""What the holder of an API key may call at the gateway, by service. Completions, which are counted, are made at the
HTTP edge; programs run for whoever works the platform alone."""


def check_tenant(tenant: str, method: str) -> None:
    """CallerDenied unless a tenant may call `method` (/package.Service/Method)."""
    service, _, name = method.lstrip("/").rpartition("/")
    allowed = TENANTS_MAY_CALL.get(service, frozenset())
    if allowed != EVERY and name not in allowed:
        raise CallerDenied(
            f"{tenant} may not call {method} with an API key; completions are at the HTTP edge,"
            " the rest needs the platform's own token"
        )


def may_call(caller: str, service: str, method: str) -> bool:
    """Whether `caller` may call `method` (/package.Service/Method) of `service`."""
    allowed = MAY_CALL.get(caller, {}).get(service, frozenset())
    return allowed == EVERY or method.rpartition("/")[2] in allowed


def check_access(callers: Iterable[str], service: str, method: str) -> None:
    """CallerDenied unless one of the names that the caller's certificate gives may call `method` of `service`."""
    names = list(callers)
    if not any(may_call(name, service, method) for name in names):
        who = ", ".join(names) or "a caller without a name"
        raise CallerDenied(f"{who} may not call {method} of {service}; see smeltkit/rpc/access.py for who may")
