"""A rendering as the policies see it: workloads with their pods, what selects them, what they start with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from scripts.manifests.render import Document, Rendering

SERVICES = ("importer", "trainer", "inference", "evaluator", "sandbox", "gateway")
SECRET_TEXT = "held-by-a-secret"
"""Stands for the value of a Secret: our manifests hold none."""
_EXPANDED = re.compile(r"\$\((\w+)\)")
_UNITS = {"": 1, "m": 0.001, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


Secret = Callable[[str, str], str]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A Deployment, StatefulSet, Job or Workflow, or the template of Jobs, with what all of them have in common."""

    document: Document

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.document["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """Its namespace; empty if none is said."""
        return str(self.document["metadata"].get("namespace", ""))

    @property
    def is_job(self) -> bool:
        """Whether it runs once and ends."""
        return bool(self.document["kind"] in ("Job", "CronJob", "Workflow"))

    @property
    def spec(self) -> Mapping[str, Any]:
        """What is wanted of it; of a template, of each Job."""
        found: Mapping[str, Any] = self.document["spec"]
        if self.document["kind"] == "Workflow":
            return _as_job(found)
        return found["jobTemplate"]["spec"] if self.document["kind"] == "CronJob" else found

    @property
    def labels(self) -> Mapping[str, str]:
        """Labels of its pods."""
        found: Mapping[str, str] = self.spec["template"]["metadata"].get("labels", {})
        return found

    @property
    def pod(self) -> Mapping[str, Any]:
        """The specification of its pods."""
        found: Mapping[str, Any] = self.spec["template"]["spec"]
        return found

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """Every container of a pod, those of its start included."""
        return [*self.pod.get("initContainers", ()), *self.pod["containers"]]

    @property
    def main(self) -> Mapping[str, Any]:
        """The container that does the work."""
        found: Mapping[str, Any] = self.pod["containers"][0]
        return found

    def __str__(self) -> str:
        return f"{self.document['kind']} {self.name}"


class Tree:
    """The documents of one rendering by what they are."""

    def __init__(self, rendering: Rendering) -> None:
        self.name = rendering.name
        self.is_pinned = rendering.is_pinned
        self.nodes = rendering.nodes
        self.declared = rendering.declared
        self.documents = rendering.documents

    def of(self, *kinds: str) -> Iterator[Document]:
        """Documents of these kinds."""
        return (document for document in self.documents if document["kind"] in kinds)

    @cached_property
    def workloads(self) -> list[Workload]:
        """Everything that makes pods."""
        return [
            Workload(document=document)
            for document in self.of("Deployment", "StatefulSet", "Job", "CronJob", "Workflow")
        ]

    @property
    def services(self) -> list[Workload]:
        """The five services and the gateway, as far as they are there."""
        return [load for load in self.workloads if load.name in SERVICES and load.document["kind"] == "Deployment"]

    def find(self, kind: str, name: str, namespace: str) -> Document | None:
        """One document, or None."""
        for document in self.of(kind):
            if document["metadata"]["name"] == name and document["metadata"].get("namespace", "") == namespace:
                return document
        return None

    def selected(self, selector: Mapping[str, Any], namespace: str) -> list[Workload]:
        """Workloads of `namespace` whose pods `selector` selects."""
        return [load for load in self.workloads if load.namespace == namespace and selects(selector, load.labels)]

    def environment(self, load: Workload, secret: Secret = lambda name, key: SECRET_TEXT) -> dict[str, str]:
        """What the main container starts with; `secret(name, key)` gives the values of Secrets."""
        return self.environment_of(load.main, load.namespace, secret)

    def environment_of(
        self, container: Mapping[str, Any], namespace: str, secret: Secret = lambda name, key: SECRET_TEXT
    ) -> dict[str, str]:
        """As `environment`, for any container."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            name = source.get("configMapRef", {}).get("name", "")
            config = self.find("ConfigMap", name, namespace)
            found |= (config or {}).get("data", {})
        for variable in container.get("env", ()):
            reference = variable.get("valueFrom", {}).get("secretKeyRef", {"name": "", "key": ""})
            value = variable["value"] if "value" in variable else secret(reference["name"], reference["key"])
            found[variable["name"]] = _EXPANDED.sub(lambda match: found.get(match[1], match[0]), value)
        return found


def _as_job(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a Workflow wants, in the form of a Job: every pod of it is that of the one template with a container."""
    [template] = [template for template in spec["templates"] if "container" in template]
    own = ("serviceAccountName", "automountServiceAccountToken", "securityContext", "volumes")
    pod = {key: spec[key] for key in own if key in spec}
    container = {"name": "main", **template["container"]}
    return {
        "backoffLimit": template["retryStrategy"]["limit"],
        "template": {"metadata": spec["podMetadata"], "spec": {**pod, "containers": [container]}},
    }


Policy = Callable[[Tree], Iterator[str]]
POLICIES: dict[str, Policy] = {}


def policy(function: Policy) -> Policy:
    """Registers a policy under its name: it yields one line for each thing that breaks it."""
    POLICIES[function.__name__.replace("_", "-")] = function
    return function


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector (matchLabels, matchExpressions with In, NotIn, Exists) selects `labels`."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for test in selector.get("matchExpressions", ()):
        is_met = {
            "In": labels.get(test["key"]) in test.get("values", ()),
            "NotIn": labels.get(test["key"]) not in test.get("values", ()),
            "Exists": test["key"] in labels,
        }
        if not is_met[test["operator"]]:
            return False
    return True


def amount(quantity: object) -> float:
    """A Kubernetes quantity as a number: cores, bytes or pieces."""
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(quantity))
    assert match and match[2] in _UNITS, quantity
    return float(match[1]) * _UNITS[match[2]]
