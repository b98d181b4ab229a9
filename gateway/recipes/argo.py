"""A recipe as a Workflow of Argo: a task a stage, each a pod that runs `smelt recipe stage` against the platform.

The Workflow holds the recipe and digests, no secret and no file: what lies on a machine is pinned first. A task gives
the digest of what its stage made to those that take it. A pod only asks and waits: the work is the platform's own, and
a pod that is lost and made anew follows the job that goes on.
"""

from __future__ import annotations

from typing import Any, Final

from gateway.recipes.kinds import Stage
from gateway.recipes.schema import Recipe
from smeltkit.errors import BadConfig, BadRequest, DeadlineExceeded, all_errors

ACCOUNT: Final = "recipe"
EXECUTOR_ACCOUNT: Final = "recipe-executor"
"""Under which Argo's own container tells how a task went; the stage's container has no token at all."""
_GATEWAY: Final = "gateway.smelt.svc:50051"
_LABELS: Final = {"app.kubernetes.io/name": "recipe", "app.kubernetes.io/part-of": "smelt"}
_RESULT: Final = "/tmp/result"
_FILE: Final = "/recipe/recipe.yaml"
_KEPT_S: Final = 7 * 24 * 3600
"""Seconds that a finished Workflow is kept."""
_TRIES: Final = 4
_SIGNALS: Final = 128
"""Exit codes from here on are of processes that a signal ended."""


def workflow(recipe: Recipe, image: str, deadline_s: int) -> dict[str, Any]:
    """The Workflow of a recipe with the gateway's `image`, ended after `deadline_s` seconds.

    BadRequest for a stage with a file that is not in the store, BadConfig for text that Argo would take for its own.
    """
    for stage in recipe.stages.values():
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
            "volumes": [
                {"name": "tmp", "emptyDir": {"sizeLimit": "128Mi"}},
                {
                    "name": "secrets",
                    "secret": {
                        "secretName": "rpc",
                        "defaultMode": 0o440,
                        "items": [{"key": "token", "path": "rpc-token"}],
                    },
                },
            ],
            "templates": [
                {"name": "stages", "dag": {"failFast": False, "tasks": tasks}},
                _template(text, image),
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


def _template(text: str, image: str) -> dict[str, Any]:
    """What the pod of every task is."""
    mounts = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "secrets", "mountPath": "/etc/smelt/secrets", "readOnly": True},
    ]
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
            f" || asInt(lastRetry.exitCode) >= {_SIGNALS}",
            "backoff": {"duration": "10s", "factor": 4, "maxDuration": "30m"},
        },
        "container": {
            "image": image,
            "command": ["python", "-m", "gateway.cli.main"],
            "args": ["recipe", "stage", _FILE, "{{inputs.parameters.stage}}",
                     "--inputs", "{{inputs.parameters.inputs}}", "--result", _RESULT],
            "env": [
                {"name": "HOME", "value": "/tmp"},
                {"name": "SMELT_GATEWAY", "value": _GATEWAY},
                {"name": "SMELT_RPC_TOKEN_FILE", "value": "/etc/smelt/secrets/rpc-token"},
            ],
            "resources": {
                "requests": {"cpu": "100m", "memory": "256Mi", "ephemeral-storage": "64Mi"},
                "limits": {"cpu": "1", "memory": "512Mi", "ephemeral-storage": "256Mi"},
            },
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": mounts,
        },
    }  # fmt: skip


def retried_codes() -> list[int]:
    """Exit codes of a command that may pass later."""
    return sorted(
        {error.exit_code for error in all_errors().values() if error.retryable} | {DeadlineExceeded.exit_code}
    )
