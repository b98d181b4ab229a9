"""Strict schemas: those of Kubernetes for three versions, and checked-in ones for custom resources.

Strict means that a field nobody knows is an error. The custom ones (`deploy/k8s/schemas`, one file a kind) hold
just the fields that our manifests use: a field that is missing there is looked up and added, not guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing import Registry, Resource

from scripts.manifests.render import TREE, Document
from smeltkit.errors import BadConfig

VERSIONS = ("1.34.0", "1.35.0", "1.36.0")
_BUILT_IN = re.compile(r"v1|(apps|autoscaling|batch|policy)/v\w+|[a-z.]+\.k8s\.io/v\w+")
_FOREIGN = ("gateway.networking.k8s.io/", "kueue.x-k8s.io/")
_judged: dict[int, tuple[Document, list[str]]] = {}


def judge(document: Document) -> list[str]:
    """What is wrong with the form of `document`, each line naming version and place; remembered an object."""
    if id(document) not in _judged:
        _judged[id(document)] = (document, list(_errors(document)))
    return _judged[id(document)][1]


def _errors(document: Document) -> Iterator[str]:
    api, kind = document["apiVersion"], document["kind"]
    is_built_in = bool(_BUILT_IN.fullmatch(api)) and not api.startswith(_FOREIGN)
    validators = (
        {f"Kubernetes {version}": _built_in(version, api, kind) for version in VERSIONS}
        if is_built_in
        else {"its checked-in schema": _custom(api, kind)}
    )
    for where, validator in validators.items():
        error = best_match(validator.iter_errors(document))
        if error is not None:
            place = ".".join(str(part) for part in error.absolute_path) or "the document"
            yield f"against {where}: {place}: {error.message[:300]}"


@cache
def _built_in(version: str, api: str, kind: str) -> Draft202012Validator:
    group, _, number = api.rpartition("/")
    suffix = f"{group.split('.')[0]}-{number}" if group else number
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    file = folder / f"{kind.lower()}-{suffix}.json"
    if not file.is_file():
        raise BadConfig(f"Kubernetes {version} has no {api} {kind}; use a version that all of {VERSIONS} serve")
    return Draft202012Validator(json.loads(file.read_text()), registry=_definitions(version))


@cache
def _definitions(version: str) -> Registry[Any]:
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    resource = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    registry: Registry[Any] = resource @ Registry()
    return registry


@cache
def _custom(api: str, kind: str) -> Draft202012Validator:
    group = api.partition("/")[0]
    path = TREE / "schemas" / f"{group}.{kind.lower()}.yaml"
    if not path.is_file():
        raise BadConfig(f"no schema for {api} {kind}; write {path.relative_to(TREE.parents[1])}")
    schema = yaml.safe_load(path.read_text())
    if schema["properties"]["apiVersion"]["const"] != api:
        raise BadConfig(f"{path.name} describes {schema['properties']['apiVersion']['const']}, not {api}")
    return Draft202012Validator(schema)
