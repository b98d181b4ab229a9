"""Policies on names: whatever one document calls another is there, or declared to be outside; selectors select."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gateway.recipes.argo import EXECUTOR_ACCOUNT
from scripts.manifests.render import Document, catalogue
from scripts.manifests.tree import Tree, Workload, policy, selects

_NAME, _SPACE = "app.kubernetes.io/name", "kubernetes.io/metadata.name"
_GLOBAL = (
    "RuntimeClass",
    "ClusterQueue",
    "ResourceFlavor",
    "ClusterIssuer",
    "ClusterSecretStore",
    "GatewayClass",
    "StorageClass",
)

_TELLS = {"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}

Reference = tuple[str, str]
"""Kind and name."""


@policy
def resolved(tree: Tree) -> Iterator[str]:
    """Every document that another names is in the rendering, or is in components.yaml as what the cluster has."""
    for document in tree.documents:
        namespace = document["metadata"].get("namespace", "")
        for kind, name in _named(document):
            there = tree.find(kind, name, "" if kind in _GLOBAL else namespace)
            if there is None and f"{kind}/{name}" not in catalogue().outside:
                yield (
                    f"{document['kind']} {document['metadata']['name']}: names {kind} {name}, which is not there; "
                    "correct it, or add it to outside in components.yaml"
                )
    for load in tree.workloads:
        for kind, name in _named_by_pod(load):
            there = tree.find(kind, name, "" if kind in _GLOBAL else load.namespace)
            if there is None and f"{kind}/{name}" not in catalogue().outside:
                yield f"{load}: names {kind} {name}, which is not there, nor outside in components.yaml; correct it"
    for route in tree.of("HTTPRoute", "GRPCRoute"):
        for rule in route["spec"]["rules"]:
            for back in rule["backendRefs"]:
                service = tree.find("Service", back["name"], route["metadata"]["namespace"])
                ports = [port["port"] for port in service["spec"]["ports"]] if service else []
                if back["port"] not in ports:
                    what = f"{route['kind']} {route['metadata']['name']}"
                    yield f"{what}: no Service {back['name']} has a port {back['port']}; correct it"


@policy
def selectors(tree: Tree) -> Iterator[str]:
    """Each name in a selector is some workload's, in its namespace; a workload selects its own pods."""
    for item in tree.of("NetworkPolicy", "PodDisruptionBudget"):
        what, outside = f"{item['kind']} {item['metadata']['name']}", catalogue().outside
        spec, namespace = item["spec"], item["metadata"].get("namespace", "")
        chosen = [spec.get("podSelector") or spec.get("selector", {})]
        wanted = [(names, namespace) for names in chosen]
        for rule in (*spec.get("ingress", ()), *spec.get("egress", ())):
            for peer in (*rule.get("from", ()), *rule.get("to", ())):
                space = peer.get("namespaceSelector", {}).get("matchLabels", {}).get(_SPACE, namespace)
                wanted.append((peer.get("podSelector", {}), space))
        for selector, space in wanted:
            if tree.find("Namespace", space, "") is None and f"Namespace/{space}" not in outside:
                yield f"{what}: namespace {space} is not there, nor outside in components.yaml; correct it"
            for part in _parts(selector):
                if not tree.selected(part, space) and f"Namespace/{space}" not in outside:
                    yield f"{what}: {part} selects no pod of {space}; correct it, or remove it"
    for load in tree.workloads:
        selector = load.spec.get("selector")
        if selector is not None and not selects(selector, load.labels):
            yield f"{load}: its selector {selector} is not its pods' labels {dict(load.labels)}"


@policy
def rights(tree: Tree) -> Iterator[str]:
    """No process of ours asks the cluster's API for anything, so nothing binds a role to one.

    Argo's own container beside a task of a recipe tells how that went, under an account that none of our pods has.
    """
    for item in tree.of("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
        what = f"{item['kind']} {item['metadata']['name']}"
        if (item["kind"], item["metadata"]["name"]) not in (
            ("Role", EXECUTOR_ACCOUNT),
            ("RoleBinding", EXECUTOR_ACCOUNT),
        ):
            yield f"{what}: nothing here needs rights in the cluster; remove it"
        elif item["kind"] == "Role" and item["rules"] != [_TELLS]:
            yield f"{what}: may do more than tell how a task went; its one rule must be {_TELLS}"
        elif item["kind"] == "RoleBinding" and [one["name"] for one in item["subjects"]] != [EXECUTOR_ACCOUNT]:
            yield f"{what}: binds others than {EXECUTOR_ACCOUNT}; remove them"
    for load in tree.workloads:
        if load.pod.get("serviceAccountName") == EXECUTOR_ACCOUNT:
            yield f"{load}: runs as {EXECUTOR_ACCOUNT}, which has rights in the cluster; give it an account of its own"


def _parts(selector: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A selector with each of its names alone: a misspelt one beside good ones still selects nothing."""
    if selector.get("matchLabels"):
        yield {"matchLabels": selector["matchLabels"]}
    for test in selector.get("matchExpressions", ()):
        for value in test.get("values", ()) if test["operator"] == "In" and test["key"] == _NAME else ():
            yield {"matchLabels": {_NAME: value}}


def _named(document: Document) -> Iterator[Reference]:
    spec, kind = document.get("spec", {}), document["kind"]
    if kind == "Certificate":
        yield spec["issuerRef"]["kind"], spec["issuerRef"]["name"]
    if kind == "ExternalSecret":
        yield spec["secretStoreRef"]["kind"], spec["secretStoreRef"]["name"]
    if kind == "Gateway":
        yield "GatewayClass", spec["gatewayClassName"]
    if kind in ("HTTPRoute", "GRPCRoute"):
        yield from (("Gateway", parent["name"]) for parent in spec["parentRefs"])
    if kind == "LocalQueue":
        yield "ClusterQueue", spec["clusterQueue"]
    if kind == "ClusterQueue":
        yield from (
            ("ResourceFlavor", flavor["name"]) for group in spec["resourceGroups"] for flavor in group["flavors"]
        )
    if kind == "StatefulSet":
        yield "Service", spec["serviceName"]
    for labels in (
        document["metadata"].get("labels", {}),
        spec.get("jobTemplate", {}).get("metadata", {}).get("labels", {}),
    ):
        if queue := labels.get("kueue.x-k8s.io/queue-name"):
            yield "LocalQueue", queue
    claims = [document] if kind == "PersistentVolumeClaim" else spec.get("volumeClaimTemplates", ())
    yield from (
        ("StorageClass", item["spec"]["storageClassName"]) for item in claims if "storageClassName" in item["spec"]
    )


def _named_by_pod(load: Workload) -> Iterator[Reference]:
    if name := load.pod.get("runtimeClassName"):
        yield "RuntimeClass", name
    yield from (
        ("ResourceClaimTemplate", item["resourceClaimTemplateName"]) for item in load.pod.get("resourceClaims", ())
    )
    for volume in load.pod.get("volumes", ()):
        claim = volume.get("ephemeral", {}).get("volumeClaimTemplate", {"spec": {}})
        if "storageClassName" in claim["spec"]:
            yield "StorageClass", claim["spec"]["storageClassName"]
