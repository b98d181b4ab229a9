"""Policies on certificates: somebody shows each, under the names that callers ask for, and renewal comes in time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

from scripts.manifests.render import Document
from scripts.manifests.settings import secret_files
from scripts.manifests.tree import Tree, Workload, policy

_HOST = re.compile(r"[\w-]+(?:\.[\w-]+)+(?=:)")
_RESTART_H = 2160
"""Hours between renewal and end of a certificate that is read at a start only: NATS rereads it when it is told to, and
nobody tells it. A rollout, of which a quarter of a year sees one, does."""


@policy
def certificates(tree: Tree) -> Iterator[str]:
    """Each is shown by somebody, names what its holder is called by, and is renewed before it ends."""
    made = {(item["metadata"]["namespace"], item["spec"]["secretName"]) for item in tree.of("Certificate")}
    for load in tree.workloads:
        for name in sorted(_mounted(load)):
            if name.endswith("-tls") and (load.namespace, name) not in made:
                yield f"{load}: Secret {name} is made by no Certificate; name one's secretName"
    for item in tree.of("Certificate"):
        spec, what = item["spec"], f"Certificate {item['metadata']['name']}"
        holders = [
            load for load in tree.selected({}, item["metadata"]["namespace"]) if spec["secretName"] in _mounted(load)
        ]
        if not holders and not any(spec["secretName"] in _shown(other) for other in tree.of("Gateway", "Issuer")):
            yield f"{what}: nobody uses its Secret {spec['secretName']}; mount it, or remove it"
        asked = _asked(tree, spec["secretName"], holders)
        for host in sorted(asked):
            if not any(fnmatchcase(host, name) for name in spec.get("dnsNames", ())):
                yield f"{what}: dnsNames {spec.get('dnsNames')} lack {host}, by which its holder is called"
        if spec.get("isCA"):
            continue
        duration, before = _hours(spec["duration"]), _hours(spec["renewBefore"])
        if before >= duration:
            yield f"{what}: renewBefore {spec['renewBefore']} must be less than duration {spec['duration']}"
        if any(load.name == "nats" for load in holders) and before < _RESTART_H:
            yield f"{what}: NATS reads it at its start; renewBefore must leave {_RESTART_H}h for a rollout"


@policy
def nats_by_tls(tree: Tree) -> Iterator[str]:
    """Where NATS shows a certificate, whoever meets it checks that, and speaks TLS from the first byte."""
    shown = {name for load in tree.workloads if load.name == "nats" for name in _mounted(load) if name.endswith("-tls")}
    for load in tree.workloads if shown else ():
        has_password = "nats-passwords" in _mounted(load)
        if has_password and "SMELT_PLATFORM_NATS_CA_FILE" not in tree.environment(load):
            yield (
                f"{load}: SMELT_PLATFORM_NATS_CA_FILE is not set, and NATS shows a certificate; list tls after the"
                " component that brings it"
            )


def _asked(tree: Tree, secret: str, holders: list[Workload]) -> set[str]:
    """Names under which callers expect who shows the certificate in `secret`."""
    environments = {load.name: tree.environment(load) for load in tree.workloads}
    if any(load.name == "nats" for load in holders):
        return {
            host for found in environments.values() for host in _HOST.findall(found.get("SMELT_PLATFORM_NATS_URL", ""))
        }
    if any(secret in _shown(gateway) for gateway in tree.of("Gateway")):
        return {host for route in tree.of("HTTPRoute", "GRPCRoute") for host in route["spec"]["hostnames"]}
    return {load.name for load in holders if "SMELT_RPC_TLS_DIR" in environments[load.name]}


def _mounted(load: Workload) -> set[str]:
    return {name for volume in load.pod.get("volumes", ()) for name, _, _ in secret_files(volume)}


def _shown(document: Document) -> set[str]:
    """Secrets whose certificates a Gateway shows or an Issuer signs with."""
    spec = document["spec"]
    refs = [
        ref["name"]
        for listener in spec.get("listeners", ())
        for ref in listener.get("tls", {}).get("certificateRefs", ())
    ]
    return {*refs, *([spec["ca"]["secretName"]] if "ca" in spec else [])}


def _hours(duration: str) -> float:
    return float(duration.removesuffix("h"))
