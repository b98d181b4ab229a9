"""A recipe as a Workflow of Argo: a task a stage, each a pod that runs `smelt recipe stage` against the platform.

The Workflow holds the recipe and digests, no secret and no file: what lies on a machine is pinned first. A task gives
the digest of what its stage made to those that take it. A pod only asks and waits: the work is the platform's own, and
a pod that is lost and made anew follows the job that goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from gateway.recipes.kinds import Stage
from gateway.recipes.schema import Recipe
from smeltkit.errors import BadConfig, BadRequest, DeadlineExceeded, all_errors

ACCOUNT: Final = "recipe"
EXECUTOR_ACCOUNT: Final = "recipe-executor"
"""Under which Argo's own container tells how a task went; the stage's container has no token at all."""
_GATEWAY: Final = "gateway.smelt.svc:50051"
_LABELS: Final = {"app.kubernetes.io/name": "recipe", "app.kubernetes.io/part-of": "smelt"}
_TLS: Final = "/etc/smelt/tls"
_RESULT: Final = "/tmp/result"
_FILE: Final = "/recipe/recipe.yaml"
_KEPT_S: Final = 7 * 24 * 3600
"""Seconds that a finished Workflow is kept."""
_TRIES: Final = 4
_SIGNALS: Final = 128
"""Exit codes from here on are of processes that a signal ended. Of a lost pod Argo gives -1."""
_ALONE: Final = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""What the restricted standard demands of each container."""
_ARGO: Final = {
    "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "256Mi"}},
    "securityContext": _ALONE,
}
"""What Argo's own containers are, whatever its controller makes of them: a quota of limits demands these of all."""


@dataclass(frozen=True, kw_only=True)
class Pods:
    """What the pods of a Workflow are, and as whom they ask."""

    image: str
    """The gateway's image."""
    secret: str = "rpc"
    """Secret whose `token` they show: the platform's, or a tenant's key."""
    certificate: str = ""
    """Secret with a certificate that names the operator, for a platform that asks for one; or empty."""

    def volumes(self) -> list[dict[str, Any]]:
        """Where files are written, and what is shown to the gateway."""
        token = {"secretName": self.secret, "defaultMode": 0o440, "items": [{"key": "token", "path": "rpc-token"}]}
        shown = {"secretName": self.certificate, "defaultMode": 0o440}
        return [
            {"name": "tmp", "emptyDir": {"sizeLimit": "128Mi"}},
            {"name": "secrets", "secret": token},
            *([{"name": "tls", "secret": shown}] if self.certificate else []),
        ]

    def mounts(self) -> list[dict[str, Any]]:
        """Where they lie in the container."""
        found: list[dict[str, Any]] = [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "secrets", "mountPath": "/etc/smelt/secrets", "readOnly": True},
        ]
        return [*found, *([{"name": "tls", "mountPath": _TLS, "readOnly": True}] if self.certificate else [])]

    def environment(self) -> list[dict[str, str]]:
        """What the command reads of it."""
        found = {"HOME": "/tmp", "SMELT_GATEWAY": _GATEWAY, "SMELT_RPC_TOKEN_FILE": "/etc/smelt/secrets/rpc-token"}
        if self.certificate:
            found["SMELT_RPC_TLS_DIR"] = _TLS
        return [{"name": name, "value": value} for name, value in found.items()]


def workflow(recipe: Recipe, pods: Pods, deadline_s: int) -> dict[str, Any]:
    """The Workflow of a recipe, ended after `deadline_s` seconds.

    BadRequest for a stage with a file that is not in the store, or that writes one; BadConfig for text that Argo would
    take for its own.
    """
    for stage in recipe.stages.values():
        if stage.kind.is_local:
            raise BadRequest(
                f"stage {stage.name} writes a file to one machine; take it out, and run"
                f" `smelt train {stage.kind.verb}` there"
            )
        if missing := stage.kind.missing(stage, recipe.files):
            file = recipe.file.name
            raise BadRequest(
                f"stage {stage.name} reads {', '.join(missing)}, which no pod can see; store what the recipe names with"
                f" `smelt recipe pin {file} > pinned.yaml`, and take pinned.yaml"
            )
    text = recipe.text()
    if "{{" in text:
        raise BadConfig("the recipe holds {{, which Argo would replace; write it otherwise")
    tasks = [_task(stage) for stage in recipe.stages.values()]
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"generateName": f"{recipe.name}-", "namespace": "smelt", "labels": dict(_LABELS)},
        "spec": {
            "entrypoint": "stages",
            "activeDeadlineSeconds": deadline_s,
            "ttlStrategy": {"secondsAfterCompletion": _KEPT_S},
            "podGC": {"strategy": "OnPodSuccess"},
            "serviceAccountName": ACCOUNT,
            "automountServiceAccountToken": False,
            "executor": {"serviceAccountName": EXECUTOR_ACCOUNT},
            "podMetadata": {"labels": dict(_LABELS)},
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "runAsGroup": 10001,
                "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "volumes": pods.volumes(),
            "podSpecPatch": json.dumps(
                {"initContainers": [{"name": "init", **_ARGO}], "containers": [{"name": "wait", **_ARGO}]}
            ),
            "templates": [
                {"name": "stages", "dag": {"failFast": False, "tasks": tasks}},
                _template(text, pods),
            ],
        },
    }


def _task(stage: Stage) -> dict[str, Any]:
    """One task, after those that its stage needs, with what they made."""
    makers = dict.fromkeys(edge.stage for edge in stage.edges if edge.stage)
    inputs = ",".join(f"{name}={{{{tasks.{name}.outputs.parameters.result}}}}" for name in makers)
    return {
        "name": stage.name,
        "template": "stage",
        **({"dependencies": list(stage.needs)} if stage.needs else {}),
        "arguments": {"parameters": [{"name": "stage", "value": stage.name}, {"name": "inputs", "value": inputs}]},
    }


def _template(text: str, pods: Pods) -> dict[str, Any]:
    """What the pod of every task is."""
    return {
        "name": "stage",
        "inputs": {
            "parameters": [{"name": "stage"}, {"name": "inputs"}],
            "artifacts": [{"name": "recipe", "path": _FILE, "raw": {"data": text}}],
        },
        "outputs": {"parameters": [{"name": "result", "valueFrom": {"path": _RESULT}}]},
        "retryStrategy": {
            "limit": _TRIES,
            "retryPolicy": "Always",
            "expression": f"lastRetry.status == 'Error' || asInt(lastRetry.exitCode) in {retried_codes()}"
            f" || asInt(lastRetry.exitCode) < 0 || asInt(lastRetry.exitCode) >= {_SIGNALS}",
            "backoff": {"duration": "10s", "factor": 4},
        },
        "container": {
            "image": pods.image,
            "command": ["python", "-m", "gateway.cli.main"],
            "args": ["recipe", "stage", _FILE, "{{inputs.parameters.stage}}",
                     "--inputs", "{{inputs.parameters.inputs}}", "--result", _RESULT],
            "env": pods.environment(),
            "resources": {
                "requests": {"cpu": "100m", "memory": "256Mi", "ephemeral-storage": "64Mi"},
                "limits": {"cpu": "1", "memory": "512Mi", "ephemeral-storage": "256Mi"},
            },
            "securityContext": {**_ALONE, "readOnlyRootFilesystem": True},
            "volumeMounts": pods.mounts(),
        },
    }  # fmt: skip


def retried_codes() -> list[int]:
    """Exit codes of a command that may pass later."""
    return sorted(
        {error.exit_code for error in all_errors().values() if error.retryable} | {DeadlineExceeded.exit_code}
    )
