"""Policies on settings: every variable is one that the process reads and accepts, and no secret is in clear."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from scripts.manifests.pods import limit_of
from scripts.manifests.render import ROOT
from scripts.manifests.tree import SERVICES, Tree, Workload, amount, policy
from scripts.settings_table import SECTIONS
from smeltkit import limits
from smeltkit.blobs.access import BACKUP
from smeltkit.blobs.access import SERVICES as USERS
from smeltkit.config import from_environment
from smeltkit.errors import SmeltError

_CLASSES: Mapping[str, type[Any]] = {prefix: config for _, prefix, config in SECTIONS}
_FOREIGN = re.compile(r"HOME|XDG_CACHE_HOME|OTEL_EXPORTER_OTLP_ENDPOINT|OTEL_METRIC_EXPORT_INTERVAL")
_HUB = re.compile(r"HF_(HOME|ENDPOINT|HUB_OFFLINE)")
_FILES: Mapping[str, tuple[str, ...]] = {
    "SMELT_RPC_TOKEN_FILE": ("",),
    "SMELT_PLATFORM_NATS_PASSWORD_FILE": ("",),
    "SMELT_PLATFORM_S3_KEYS_DIR": ("/access-key", "/secret-key"),
    "SMELT_BACKUP_S3_KEYS_DIR": ("/access-key", "/secret-key"),
    "SMELT_PLATFORM_NATS_CA_FILE": ("",),
    "SMELT_HTTP_API_KEYS_FILE": ("",),
    "SMELT_RPC_TLS_DIR": ("/tls.crt", "/tls.key", "/ca.crt"),
}
"""Settings that name files of Secrets, and what is appended to each to name them."""
SECRETS = {
    "rpc": {"token"},
    **{
        name: {"access-key", "secret-key"}
        for name in ("s3", *(f"s3-{user}" for user in (*USERS, BACKUP)), "backup-place")
    },
    "nats-passwords": {"gateway", "importer", "trainer", "inference", "evaluator", "topology", "routes", "backup"},
    "api-keys": {"api-keys"},
    "nats-routes-tls": {"tls.crt", "tls.key", "ca.crt"},
    "edge-tls": {"tls.crt", "tls.key", "ca.crt"},
    **{f"{service}-tls": {"tls.crt", "tls.key", "ca.crt"} for service in SERVICES},
}
"""Secrets that a cluster must hold, and their keys: docs/deploy.md and the component external-secrets name the same."""


@policy
def settings(tree: Tree) -> Iterator[str]:
    """The process would start: each of its settings is known, typed and in range, and none that it needs is missing."""
    for load in tree.workloads:
        for container in load.containers:
            environment = tree.environment_of(container, load.namespace)
            errors = environment_errors(" ".join(container.get("command", ())), environment)
            yield from (f"{load}: {line}" for line in errors)


@policy
def overlay_values(tree: Tree) -> Iterator[str]:
    """What an overlay says of a setting is what is rendered: a component's value for the same key wins over it."""
    for said in tree.declared:
        name = said.config_map
        found = [
            item["data"][said.key]
            for item in tree.of("ConfigMap")
            if re.fullmatch(rf"{re.escape(name)}(-[a-z0-9]{{10}})?", item["metadata"]["name"])
            and item["metadata"].get("namespace", "") == said.namespace
            and said.key in item.get("data", {})
        ]
        if found != [said.value]:
            yield (
                f"ConfigMap {name}: the overlay says {said.key}={said.value}, and {', '.join(found) or 'nothing'} is"
                f" rendered, for components come after an overlay's literals; take it out, or patch it: target {{kind:"
                f" ConfigMap, name: {name}}}, {{op: replace, path: /data/{said.key}, value: ...}}"
            )


def environment_errors(command: str, environment: Mapping[str, str]) -> Iterator[str]:
    """What a process of ours, started by `command`, would refuse or pass over in `environment`; nothing for others."""
    prefixes = _prefixes(command)
    if not prefixes:
        return
    for name in sorted(environment):
        if name.startswith("SMELT_") and not name.startswith(prefixes):
            yield f"nothing reads {name}; this process reads {', '.join(f'{prefix}*' for prefix in prefixes)}"
        is_foreign = _FOREIGN.fullmatch(name) or ("importer" in command and _HUB.fullmatch(name))
        if not name.startswith("SMELT_") and not is_foreign:
            yield f"{name} is no variable that this process reads"
    for prefix in prefixes:
        try:
            from_environment(_CLASSES[prefix], prefix, environment)
        except SmeltError as error:
            yield str(error)


@policy
def secrets_stay_outside(tree: Tree) -> Iterator[str]:
    """No Secret and no value of a secret setting is in the tree; calls between services need a token."""
    for document in tree.of("Secret"):
        if document.get("type") == "kubernetes.io/service-account-token" and not {"data", "stringData"} & set(document):
            continue  # filled by the cluster
        yield f"Secret {document['metadata']['name']}: secrets are made in the cluster, never kept beside manifests"
    names = {
        prefix + field.name.upper()
        for prefix, config in _CLASSES.items()
        for field in dataclasses.fields(config)
        if not field.repr
    }
    for config in tree.of("ConfigMap"):
        for name in sorted(names & set(config.get("data", {}))):
            yield f"ConfigMap {config['metadata']['name']}: {name} is given in clear; take it from a Secret"
    for load in tree.workloads:
        environment = tree.environment(load)
        for variable in load.main.get("env", ()):
            if variable["name"] in names and "value" in variable:
                yield f"{load}: {variable['name']} is given in clear; take it from a Secret"
        if load in tree.services and not {"SMELT_RPC_TOKEN", "SMELT_RPC_TOKEN_FILE"} & set(environment):
            yield f"{load}: neither SMELT_RPC_TOKEN_FILE nor SMELT_RPC_TOKEN is set; anybody could call it"
        if load in tree.services and environment.get("SMELT_RPC_REFLECTION") != "false":
            yield f"{load}: SMELT_RPC_REFLECTION must be false in a cluster"


@policy
def secrets_are_files(tree: Tree) -> Iterator[str]:
    """Secrets of our processes lie in mounted files, where they can be replaced; what names a file finds it there.

    The sandbox has its one in a variable: candidates may read the files that it can where the guest kernel is the wall.
    """
    for load in tree.workloads:
        environment, mounted = tree.environment(load), {str(path) for path in mounted_secrets(load)}
        for variable in load.main.get("env", ()):
            is_secret = variable["name"].startswith("SMELT_") and "secretKeyRef" in variable.get("valueFrom", {})
            if is_secret and load.name != "sandbox":
                yield f"{load}: {variable['name']} is a variable; mount its Secret and name the file"
        for name in sorted(set(environment) & set(_FILES)):
            wanted = {f"{environment[name]}{key}" for key in _FILES[name]}
            for path in sorted(wanted - mounted):
                yield f"{load}: {name}={environment[name]}, but no Secret is mounted as {path}"


@policy
def references(tree: Tree) -> Iterator[str]:
    """Every ConfigMap that is named is there, and every Secret is one that a cluster is told to hold."""
    for load in tree.workloads:
        for name in _config_maps(load):
            if tree.find("ConfigMap", name, load.namespace) is None:
                yield f"{load}: ConfigMap {name} is not in this tree"
        for name, key in _secret_keys(load):
            if key not in SECRETS.get(name, ()):
                yield f"{load}: Secret {name} with key {key} is none that a cluster is told to hold"


@policy
def external_secrets(tree: Tree) -> Iterator[str]:
    """Where secrets come from a store, all that workloads name come from there."""
    filled = {
        (item["metadata"]["namespace"], item["metadata"]["name"], data["secretKey"])
        for item in tree.of("ExternalSecret")
        for data in item["spec"]["data"]
    }
    for _, name, key in sorted(filled):
        if key not in SECRETS.get(name, ()):
            yield f"ExternalSecret {name}: fills {key}, which nobody reads; correct it, or remove it"
    for load in tree.workloads if filled else ():
        for name, key in _secret_keys(load):
            if (load.namespace, name, key) not in filled and not name.endswith("-tls"):
                yield f"{load}: no ExternalSecret fills {name}/{key} in {load.namespace}"


@policy
def memory_fits(tree: Tree) -> Iterator[str]:
    """What a process allows itself fits its limit: it sees the memory and the cores of the node, not its own."""
    for load in tree.services:
        environment = tree.environment(load)
        memory, cores = limit_of(load, "memory"), limit_of(load, "cpu")
        if load.name == "inference":
            allowed = int(environment.get("SMELT_INFERENCE_MEMORY_BYTES", 0))
            if not 0 < allowed <= memory - limits.GIB:
                yield f"{load}: SMELT_INFERENCE_MEMORY_BYTES is {allowed}; leave 1 GiB of the limit, {memory:.0f} bytes"
        if "threads" in _fields(load.name):
            threads = int(environment.get(f"SMELT_{load.name.upper()}_THREADS", 0))
            if threads != cores:
                yield f"{load}: SMELT_{load.name.upper()}_THREADS is {threads}; it must be the limit of cpu, {cores:g}"
        if load.name == "sandbox":
            slots = int(environment.get("SMELT_SANDBOX_SLOTS", 0))
            if not 0 < slots <= cores or slots * limits.GIB > memory:
                yield f"{load}: SMELT_SANDBOX_SLOTS is {slots}; each needs a core of {cores:g}, 1 GiB of {memory:.0f} B"


@policy
def cache_fits(tree: Tree) -> Iterator[str]:
    """A cache is smaller than the volume that holds it, and lies on one."""
    for load in tree.services:
        environment = tree.environment(load)
        own = f"SMELT_{load.name.upper()}_CACHE_"
        if f"{own}DIR" not in environment:
            continue
        mounts = {mount["mountPath"]: mount["name"] for mount in load.main["volumeMounts"]}
        name = mounts.get(environment[f"{own}DIR"])
        volume = next((item for item in load.pod["volumes"] if item["name"] == name), None)
        if volume is None:
            yield f"{load}: {own}DIR={environment[f'{own}DIR']} is no mounted volume"
            continue
        size = _size(tree, volume, load.namespace)
        if int(environment.get(f"{own}BYTES", 20 * limits.GIB)) > size:
            yield f"{load}: {own}BYTES exceeds the volume {name} of {size:.0f} bytes"


def _fields(service: str) -> set[str]:
    """Names of the settings that are this service's own."""
    return {field.name for field in dataclasses.fields(_CLASSES[f"SMELT_{service.upper()}_"])}


def _size(tree: Tree, volume: Mapping[str, Any], namespace: str) -> float:
    """Bytes of a volume; of a claim that is not in the tree, and of what has no size, none."""
    if "emptyDir" in volume:
        return amount(volume["emptyDir"]["sizeLimit"])
    if "persistentVolumeClaim" in volume:
        claim = tree.find("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], namespace)
    else:
        claim = volume.get("ephemeral", {}).get("volumeClaimTemplate")
    return amount(claim["spec"]["resources"]["requests"]["storage"]) if claim else 0.0


@cache
def _prefixes(command: str) -> tuple[str, ...]:
    """Prefixes of the settings that the process started by `command` reads, from its own source."""
    module = command.partition("python -m ")[2].partition(" ")[0]
    if not module:
        return ()
    path = ROOT / module.replace(".", "/")
    source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    read = re.findall(r'from_environment\(\s*\w+,\s*"(SMELT_\w+_)"', source)
    return tuple(read + (["SMELT_TELEMETRY_"] if "run_service(" in source else []))


def _config_maps(load: Workload) -> Iterator[str]:
    for container in load.containers:
        yield from (
            source["configMapRef"]["name"] for source in container.get("envFrom", ()) if "configMapRef" in source
        )
    yield from (volume["configMap"]["name"] for volume in load.pod.get("volumes", ()) if "configMap" in volume)


def _secret_keys(load: Workload) -> Iterator[tuple[str, str]]:
    for container in load.containers:
        for variable in container.get("env", ()):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield reference["name"], reference["key"]
    for volume in load.pod.get("volumes", ()):
        yield from ((name, key) for name, key, _ in secret_files(volume))


def mounted_secrets(load: Workload) -> dict[PurePosixPath, tuple[str, str]]:
    """Secret and key by the path at which the main container finds it."""
    volumes = {volume["name"]: volume for volume in load.pod.get("volumes", ())}
    return {
        PurePosixPath(mount["mountPath"], file): (name, key)
        for mount in load.main.get("volumeMounts", ())
        if mount["name"] in volumes  # others are claimed by the StatefulSet
        for name, key, file in secret_files(volumes[mount["name"]])
    }


def secret_files(volume: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Secret, key and file name of each file that a volume takes from Secrets."""
    sources = [source["secret"] for source in volume.get("projected", {}).get("sources", ()) if "secret" in source]
    for source in [*sources, *([volume["secret"]] if "secret" in volume else [])]:
        name = source.get("secretName") or source["name"]
        keys = [{"key": key, "path": key} for key in sorted(SECRETS.get(name, {"unknown"}))]
        yield from ((name, item["key"], item["path"]) for item in source.get("items", keys))
