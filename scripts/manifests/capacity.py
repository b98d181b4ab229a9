"""Policies on how much there is: copies and what they take, under quotas, by scalers, on claims."""

from __future__ import annotations

import re
from collections.abc import Iterator

from scripts.manifests.placement import nats_config
from scripts.manifests.render import Document
from scripts.manifests.tree import Tree, Workload, amount, policy

_SCALERS = {
    "ScaledObject": ("minReplicaCount", "maxReplicaCount"),
    "HorizontalPodAutoscaler": ("minReplicas", "maxReplicas"),
}


@policy
def scalers(tree: Tree) -> Iterator[str]:
    """A scaler's least is at most its most, and what it keeps without an answer lies between."""
    for document in tree.of(*_SCALERS):
        spec, (low, high) = document["spec"], _SCALERS[document["kind"]]
        least, most = spec.get(low, 0), spec[high]
        between = spec.get("fallback", {}).get("replicas", most)
        if not least <= between <= most or most < 1:
            yield (
                f"{document['kind']} {document['metadata']['name']}: {low} {least}, fallback {between} and {high} "
                f"{most} must not fall"
            )


@policy
def quotas(tree: Tree) -> Iterator[str]:
    """All pods that may be there at once, those of a rollout and of the largest scale included, fit their quota."""
    for quota in tree.of("ResourceQuota"):
        namespace = quota["metadata"]["namespace"]
        loads = [load for load in tree.workloads if load.namespace == namespace]
        for resource, hard in quota["spec"]["hard"].items():
            wanted = sum(most_copies(tree, load) * taken(load, resource) for load in loads)
            if wanted > amount(hard):
                yield (
                    f"ResourceQuota {quota['metadata']['name']}: {resource} is {hard}, and the pods of {namespace} may "
                    f"come to {wanted:g}; raise it, or lower replicas or the scaler's most"
                )


@policy
def claims(tree: Tree) -> Iterator[str]:
    """A claim for one pod has one, whose successor waits for it; checkpoints outlive their pod; NATS fits its claim."""
    for load in tree.workloads:
        for volume in load.pod.get("volumes", ()):
            if "persistentVolumeClaim" not in volume:
                continue
            name = volume["persistentVolumeClaim"]["claimName"]
            claim = tree.find("PersistentVolumeClaim", name, load.namespace)
            if claim is None:
                yield f"{load}: PersistentVolumeClaim {name} is not in this tree"
            elif claim["spec"]["accessModes"] != ["ReadWriteMany"] and most_copies(tree, load) > 1:
                yield f"{load}: {name} may be held by one pod; replicas 1 and maxSurge 0, or ReadWriteMany"
        cache = [volume for volume in load.pod.get("volumes", ()) if volume["name"] == "cache"]
        if tree.is_pinned and load.name == "trainer" and not any("persistentVolumeClaim" in item for item in cache):
            yield f"{load}: its checkpoints would end with their pod; add component trainer-cache"
    for size in re.findall(r"max_file: (\w+)", nats_config(tree).get("nats.conf", "")):
        for template in [
            item for load in tree.workloads if load.name == "nats" for item in load.spec["volumeClaimTemplates"]
        ]:
            held = template["spec"]["resources"]["requests"]["storage"]
            if amount(size) > 0.9 * amount(held):
                yield f"StatefulSet nats: max_file {size} must leave a tenth of the claim, {held}; lower it"


def most_copies(tree: Tree, load: Workload) -> int:
    """Pods of `load` that may exist at once: by its scaler, or its own number, and one that a rollout starts first."""
    spec = load.spec
    if load.is_job:
        return int(spec.get("parallelism", 1))
    most = [scaler["spec"][_SCALERS[scaler["kind"]][1]] for scaler in _scalers_of(tree, load)]
    surge = spec.get("strategy", {}).get("rollingUpdate", {}).get("maxSurge", 1)
    return int(max(most, default=spec.get("replicas", 1))) + (
        int(surge) if load.document["kind"] == "Deployment" else 0
    )


def _scalers_of(tree: Tree, load: Workload) -> Iterator[Document]:
    for document in tree.of(*_SCALERS):
        if (document["spec"]["scaleTargetRef"]["name"], document["metadata"]["namespace"]) == (
            load.name,
            load.namespace,
        ):
            yield document


def taken(load: Workload, resource: str) -> float:
    """What one pod takes of a resource of a quota: `pods`, or `limits.` or `requests.` and its name."""
    if resource == "pods":
        return 1.0
    side, _, name = resource.partition(".")

    def of(container: Document) -> float:
        return amount(container["resources"].get(side, {}).get(name, 0))

    return max(sum(map(of, load.pod["containers"])), max(map(of, load.pod.get("initContainers", ())), default=0.0))
