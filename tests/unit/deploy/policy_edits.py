"""Edits of rendered manifests that a tired engineer could make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Documents = list[Any]
Mistake = Callable[[Documents], Any]
FROM_SECRET = {"secretKeyRef": {"name": "rpc", "key": "token"}}
STRICT = {"whenUnsatisfiable": "DoNotSchedule"}


def get(documents: Documents, kind: str, name: str) -> Any:
    """The document to spoil; a generated name may be given without its hash."""
    found = [item for item in documents if item["kind"] == kind and item["metadata"]["name"].startswith(name)]
    return min(found, key=lambda item: len(item["metadata"]["name"]))


def pod(documents: Documents, name: str, kind: str = "Deployment") -> Any:
    return get(documents, kind, name)["spec"]["template"]["spec"]


def container(documents: Documents, name: str, kind: str = "Deployment") -> Any:
    return pod(documents, name, kind)["containers"][0]


def secrets_of(documents: Documents, name: str) -> Any:
    """Sources of the files of Secrets that a service finds."""
    (volume,) = [volume for volume in pod(documents, name)["volumes"] if volume["name"] == "secrets"]
    return volume["projected"]["sources"]


def settings(documents: Documents, name: str) -> Any:
    found = [
        item for item in documents if item["kind"] == "ConfigMap" and item["metadata"]["name"].startswith(name + "-")
    ]
    return found[0]["data"]


def ask_for_slices(resources: Any) -> None:
    for side in resources.values():
        side["nvidia.com/mig-3g.40gb"] = side.pop("nvidia.com/gpu")


def open_up(documents: Documents, name: str, **rules: Any) -> None:
    """One more rule, of `ingress` or `egress`, in a network policy."""
    for way, rule in rules.items():
        get(documents, "NetworkPolicy", name)["spec"][way].append(rule)


def range_of(cidr: str) -> Any:
    return {"to": [{"ipBlock": {"cidr": cidr}}], "ports": [{"port": 443}]}


def rename_who(documents: Documents, policy: str, name: str) -> None:
    """The first of those whom a network policy selects by name becomes `name`."""
    get(documents, "NetworkPolicy", policy)["spec"]["podSelector"]["matchExpressions"][0]["values"][0] = name


def range_in(space: str) -> Any:
    return {
        "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": space}}}],
        "ports": [{"port": 1}],
    }


def point(documents: Documents, kind: str, name: str, field: str, to: str) -> None:
    get(documents, kind, name)["spec"][field]["name"] = to


def match(documents: Documents, kind: str, name: str, to: str) -> None:
    get(documents, kind, name)["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"] = to


def queue_as(documents: Documents, name: str) -> None:
    get(documents, "Deployment", "trainer")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = name


def live_at(spec: Any, address: str) -> None:
    spec["livenessProbe"]["exec"]["command"][-1] = address


def on_the_host(spec: Any) -> None:
    (cache,) = [volume for volume in spec["volumes"] if volume["name"] == "cache"]
    cache.pop("emptyDir")
    cache["hostPath"] = {"path": "/var/lib/smelt"}


def bind_admin(documents: Documents) -> None:
    api, role = "rbac.authorization.k8s.io", {"kind": "ClusterRole", "name": "cluster-admin"}
    binding = {"apiVersion": f"{api}/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "all"}}
    documents.append({**binding, "roleRef": {"apiGroup": api, **role}})


def route(documents: Documents) -> Any:
    """The rule by which the edge takes calls in."""
    return get(documents, "HTTPRoute", "gateway")["spec"]["rules"][0]


def remove(documents: Documents, kind: str, name: str) -> None:
    documents.remove(get(documents, kind, name))


def spoil_conf(documents: Documents, old: str, new: str, file: str = "users.conf") -> None:
    data = settings(documents, "nats")
    assert old in data[file]
    data[file] = data[file].replace(old, new)


def add_secret(documents: Documents) -> None:
    metadata = {"name": "rpc", "namespace": "smelt"}
    documents.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"token": "abc"}})


def let_sandbox_out(documents: Documents) -> None:
    get(documents, "NetworkPolicy", "sandbox")["spec"]["egress"] = [{"ports": [{"port": 443}]}]


def nodes(documents: Documents) -> Any:
    """Pods of the Jobs that bring further machines to a training."""
    return get(documents, "CronJob", "training-nodes")["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def spread_of(documents: Documents, name: str) -> Any:
    """How the pods of a StatefulSet are spread."""
    return pod(documents, name, "StatefulSet")["topologySpreadConstraints"][0]


def keep_apart(documents: Documents, name: str) -> None:
    """No two pods of a StatefulSet on one node."""
    term = {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {"app.kubernetes.io/name": name}},
    }
    wanted = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    pod(documents, name, "StatefulSet")["affinity"] = {"podAntiAffinity": wanted}


def nightly(documents: Documents) -> Any:
    """Pods of the Jobs that take backups."""
    return get(documents, "CronJob", "backup")["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def reach(documents: Documents, name: str, cidr: str) -> None:
    """The first rule of a network policy lets its pods out to these addresses instead."""
    get(documents, "NetworkPolicy", name)["spec"]["egress"][0]["to"] = [{"ipBlock": {"cidr": cidr}}]


def bind(documents: Documents, name: str, account: str) -> None:
    """One more account that a role is bound to."""
    subject = {"kind": "ServiceAccount", "name": account, "namespace": "smelt"}
    get(documents, "RoleBinding", name)["subjects"].append(subject)


def recipe_pods(documents: Documents) -> Any:
    """What the Workflow of a recipe says of all its pods."""
    return get(documents, "Workflow", "sample")["spec"]


def spoil_task(documents: Documents, **fields: str) -> None:
    """Fields more in the container of a recipe's stages."""
    recipe_pods(documents)["templates"][1]["container"].update(fields)
