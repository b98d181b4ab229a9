"""Policies on who reaches whom: nothing by default, and exactly the pairs that settings name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Network
from typing import Any

from scripts.manifests.tree import SERVICES, Tree, Workload, policy, selects

BOTH_WAYS = {"Ingress", "Egress"}
_LINK = IPv4Network("169.254.0.0/16")
_PRIVATE = [_LINK, *map(IPv4Network, ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16"))]
_NOWHERE = "192.0.2.0/24"
"""The range that the component external-s3 opens, kept for documentation: an overlay names the store's."""
_STORES = {"SMELT_PLATFORM_S3_": "s3-clients", "SMELT_BACKUP_S3_": "backup-place"}
"""Beginning of the settings of a store, and the policy that opens the way to it."""
_API_PORT = 6443
_ABROAD = {"importer", "evaluator"}
"""Who fetches published models and data of suites, from whichever address has them."""
_ADDRESS = re.compile(r"(?:\w+://+)?((?:[\w-]+\.)+svc):(\d+)")


@policy
def default_deny(tree: Tree) -> Iterator[str]:
    """In each namespace a policy selects every pod and lets nothing through."""
    for namespace in tree.of("Namespace"):
        name = namespace["metadata"]["name"]
        found = [
            item
            for item in _policies(tree, name)
            if not item["podSelector"] and set(item["policyTypes"]) == BOTH_WAYS and not item.get("ingress")
        ]
        if not any(not item.get("egress") for item in found):
            yield f"namespace {name}: no policy denies everything both ways"


@policy
def own_network_policy(tree: Tree) -> Iterator[str]:
    """Each workload has a policy of its own for both directions, so that its pairs stand in one place."""
    for load in tree.workloads:
        chosen = [item for item in _policies(tree, load.namespace) if _is_chosen(item, load)]
        named = [item for item in chosen if item["podSelector"]]
        if not any(set(item["policyTypes"]) == BOTH_WAYS for item in named) and not load.is_job:
            yield f"{load}: no network policy of its own for both ways"
        if load.is_job and not named:
            yield f"{load}: no network policy of its own"


@policy
def reachable(tree: Tree) -> Iterator[str]:
    """Every address in a service's settings is a Service with pods, and both ends' policies let the call through.

    A job shares the platform's settings and uses one of its addresses: one of them must be reachable.
    """
    for load in tree.workloads:
        blocked: dict[str, list[str]] = {}
        for name, value in sorted(tree.environment(load).items()):
            for host, port in _ADDRESS.findall(value):
                blocked.setdefault(name, []).extend(_blocked(tree, load, host, int(port)))
        if load.is_job and not all(blocked.values()):
            continue
        for name, lines in blocked.items():
            yield from (f"{load}: {name}: {line}" for line in sorted(set(lines)))


@policy
def names_resolve(tree: Tree) -> Iterator[str]:
    """Whoever names a host may ask the cluster's DNS, by UDP and TCP."""
    for load in tree.workloads:
        if not any(_ADDRESS.search(value) for value in tree.environment(load).values()):
            continue
        asked = {
            port.get("protocol", "TCP")
            for item in _policies(tree, load.namespace)
            if _is_chosen(item, load)
            for rule in item.get("egress", ())
            for port in rule.get("ports", ())
            if port["port"] == 53
        }
        if asked != {"UDP", "TCP"}:
            yield f"{load}: may ask no DNS by {' and '.join(sorted({'UDP', 'TCP'} - asked))}"


@policy
def sandbox_is_closed(tree: Tree) -> Iterator[str]:
    """Foreign code runs where nothing can be sent and nothing is worth taking: no egress, no platform settings."""
    for load in tree.services:
        if load.name != "sandbox":
            continue
        if load.namespace in {other.namespace for other in tree.workloads if other.name != "sandbox"}:
            yield f"{load}: shares the namespace {load.namespace} with other workloads"
        for item in _policies(tree, load.namespace):
            if item.get("egress"):
                yield f"{load}: a policy of its namespace lets something out"
        known = [name for name in tree.environment(load) if name.startswith(("SMELT_PLATFORM_", "OTEL_", "HF_"))]
        if known:
            yield f"{load}: must not be told {', '.join(sorted(known))}"
        is_filtered = load.pod["securityContext"]["seccompProfile"]["type"] == "Localhost"
        wall = (
            "guest-kernel"
            if load.pod.get("runtimeClassName") == "gvisor"
            else "rootless"
            if is_filtered
            else "confined"
        )
        if (level := tree.environment(load).get("SMELT_SANDBOX_LEVEL", wall)) != wall:
            yield f"{load}: SMELT_SANDBOX_LEVEL is {level}; its pod gives {wall}, and nothing else may be asked for"
        volumes = [
            volume["name"]
            for volume in load.pod.get("volumes", ())
            if "emptyDir" not in volume and volume.get("secret", {}).get("secretName") != "sandbox-tls"
        ]
        if volumes:
            yield f"{load}: volumes {', '.join(volumes)} must be emptyDir, or its own certificate"


@policy
def headless(tree: Tree) -> Iterator[str]:
    """Services of gRPC are headless, but for the edge; each selects pods and names a port that they have."""
    for service in tree.of("Service"):
        name, spec = service["metadata"]["name"], service["spec"]
        if name in SERVICES and name != "gateway" and spec.get("clusterIP") != "None":
            yield f"Service {name}: clusterIP must be None, or a connection stays with one pod"
        chosen = tree.selected({"matchLabels": spec.get("selector", {})}, service["metadata"].get("namespace", ""))
        if not chosen:
            yield f"Service {name}: selects no pod"
        for load in chosen:
            declared = {port["name"] for port in load.main.get("ports", ())}
            for port in spec.get("ports", ()):
                if port.get("targetPort") not in declared:
                    yield f"Service {name}: port {port.get('targetPort')} is not declared by {load}"


@policy
def narrow(tree: Tree) -> Iterator[str]:
    """Every rule says who and at which ports; wide ranges leave private addresses out, and few may use them."""
    for item in tree.of("NetworkPolicy"):
        spec, namespace = item["spec"], item["metadata"].get("namespace", "")
        what = f"NetworkPolicy {item['metadata']['name']}"
        chosen = {load.name for load in tree.selected(spec["podSelector"], namespace)}
        for way, end in (("ingress", "from"), ("egress", "to")):
            for rule in spec.get(way, ()):
                if not rule.get("ports"):
                    yield f"{what}: a rule of {way} opens every port; name ports"
                if not rule.get(end) and (way, chosen) != ("ingress", {"gateway"}):
                    yield f"{what}: a rule of {way} has no {end} and means anybody; name who"
                for block in [peer["ipBlock"] for peer in rule.get(end, ()) if "ipBlock" in peer]:
                    yield from (f"{what}: {line}" for line in _wide(block, rule.get("ports", ()), chosen))


@policy
def object_store(tree: Tree) -> Iterator[str]:
    """A store outside is met by TLS, and every client may reach its port at a range that the overlay names."""
    for load in tree.workloads:
        environment = tree.environment(load)
        for store, opener in _STORES.items():
            host, _, port = environment.get(f"{store}ENDPOINT", "").rpartition(":")
            if not host or host.endswith(".svc"):
                continue
            if environment.get(f"{store}SECURE", "true") != "true":
                yield f"{load}: {store}SECURE must be true: keys and weights would go to {host} in the clear"
            others = {name for name in _STORES.values() if name != opener}
            ranges = set(_ranges(tree, load, int(port), others))
            if not ranges or _NOWHERE in ranges:
                yield f"{load}: no policy lets it out to {host}:{port}; patch {opener} with the store's range and port"


@policy
def cluster_api(tree: Tree) -> Iterator[str]:
    """Argo's container in the pods of a Workflow reaches the cluster's API, at a range that the overlay names."""
    for load in tree.workloads:
        ranges = set(_ranges(tree, load, _API_PORT, set()))
        if load.document["kind"] == "Workflow" and (not ranges or _NOWHERE in ranges):
            yield f"{load}: no policy lets it out to the cluster's API; patch its policy with the API's range"


@policy
def edge(tree: Tree) -> Iterator[str]:
    """One door to the outside: by TLS where there are certificates, to /v1/ only, and with a key where work counts."""
    for document in tree.of("Gateway") if tree.is_pinned or any(tree.of("Certificate")) else ():
        for listener in document["spec"]["listeners"]:
            if listener["protocol"] not in ("HTTPS", "TLS"):
                name = document["metadata"]["name"]
                yield f"Gateway {name}: listener {listener['name']} is in the clear; component tls, after gateway-api"
    for document in tree.of("HTTPRoute"):
        for rule in document["spec"]["rules"]:
            for path in [match.get("path", {}).get("value", "/") for match in rule.get("matches", [{}])]:
                if not path.startswith("/v1/"):
                    name = document["metadata"]["name"]
                    yield f"HTTPRoute {name}: opens {path} of the gateway; metrics and health stay inside: /v1/ only"
    for service in tree.of("Service"):
        if (kind := service["spec"].get("type", "ClusterIP")) != "ClusterIP":
            yield f"Service {service['metadata']['name']}: {kind} is a door of its own; use gateway-api"
    for load in tree.services if tree.is_pinned else ():
        if load.name == "gateway" and not tree.environment(load).get("SMELT_HTTP_API_KEYS_FILE"):
            yield f"{load}: wants no key; add component tenancy, or set SMELT_HTTP_API_KEYS_FILE"


@policy
def namespaces(tree: Tree) -> Iterator[str]:
    """Every namespace is declared with the restricted standard, and everything that has a namespace says which."""
    declared = {item["metadata"]["name"]: item["metadata"].get("labels", {}) for item in tree.of("Namespace")}
    for name, labels in declared.items():
        if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"Namespace {name}: pod-security.kubernetes.io/enforce must be restricted"
    for document in tree.documents:
        if document["kind"] in ("Namespace", "RuntimeClass", "ClusterQueue", "ResourceFlavor"):
            continue
        if document["metadata"].get("namespace") not in declared:
            yield f"{document['kind']} {document['metadata']['name']}: its namespace is not declared here"


def _policies(tree: Tree, namespace: str) -> list[Mapping[str, Any]]:
    return [item["spec"] for item in tree.of("NetworkPolicy") if item["metadata"].get("namespace") == namespace]


def _ranges(tree: Tree, load: Workload, port: int, others: set[str]) -> Iterator[str]:
    """Ranges of addresses that policies beside `others` open to a workload at `port`."""
    for item in tree.of("NetworkPolicy"):
        is_there = item["metadata"].get("namespace") == load.namespace and item["metadata"]["name"] not in others
        for rule in item["spec"].get("egress", ()) if is_there and _is_chosen(item["spec"], load) else ():
            if port in [opened["port"] for opened in rule.get("ports", ())]:
                yield from (peer["ipBlock"]["cidr"] for peer in rule.get("to", ()) if "ipBlock" in peer)


def _is_chosen(spec: Mapping[str, Any], load: Workload) -> bool:
    return selects(spec["podSelector"], load.labels)


def _blocked(tree: Tree, caller: Workload, host: str, port: int) -> Iterator[str]:
    parts = host.split(".")
    service = tree.find("Service", parts[-3], parts[-2])
    if service is None:
        yield f"{host} is no Service of this tree"
        return
    ports = {item["port"]: item.get("targetPort") for item in service["spec"]["ports"]}
    if port not in ports:
        yield f"{host} has no port {port}; it has {sorted(ports)}"
        return
    for target in tree.selected({"matchLabels": service["spec"]["selector"]}, parts[-2]):
        numbers = {item["name"]: item["containerPort"] for item in target.main.get("ports", ())}
        number = numbers.get(str(ports[port]), port)
        if not _is_let(tree, caller, target, number, "egress", "to"):
            yield f"no policy lets {caller.name} out to {target.name}:{number}"
        if not _is_let(tree, target, caller, number, "ingress", "from"):
            yield f"no policy of {target.name} lets {caller.name} in at {number}"


def _wide(block: Mapping[str, Any], ports: Sequence[Mapping[str, Any]], chosen: set[str]) -> Iterator[str]:
    """What is too wide about a range of addresses that pods of the workloads `chosen` may reach at `ports`."""
    if ":" in block["cidr"]:
        yield f"{block['cidr']} is of IPv6, which these rules do not judge; name a range of IPv4"
        return
    cidr = IPv4Network(block["cidr"])
    excepted = [IPv4Network(part) for part in block.get("except", ())]
    for private in _PRIVATE:
        is_left_out = any(private.subnet_of(part) for part in excepted)
        if private.subnet_of(cidr) and private != cidr and not is_left_out:
            yield f"{cidr} holds the private {private}; except it, or name the range that is meant"
    if cidr.subnet_of(_LINK) and {port["port"] for port in ports} != {53}:
        yield f"{cidr} is where nodes tell their credentials; open port 53 alone there"
    if cidr.prefixlen == 0 and not chosen <= _ABROAD:
        yield f"{cidr} is anywhere; only {' and '.join(sorted(_ABROAD))} may, not {', '.join(sorted(chosen - _ABROAD))}"


def _is_let(tree: Tree, owner: Workload, other: Workload, port: int, way: str, end: str) -> bool:
    rules = [rule for spec in _policies(tree, owner.namespace) if _is_chosen(spec, owner) for rule in spec.get(way, ())]
    return any(
        port in [item["port"] for item in rule.get("ports", ())]
        and (end not in rule or any(_is_peer(peer, owner, other) for peer in rule[end]))
        for rule in rules
    )


def _is_peer(peer: Mapping[str, Any], owner: Workload, other: Workload) -> bool:
    if "ipBlock" in peer:
        return False
    home = {"kubernetes.io/metadata.name": other.namespace}
    is_there = owner.namespace == other.namespace
    if "namespaceSelector" in peer:
        is_there = selects(peer["namespaceSelector"], home)
    return is_there and selects(peer.get("podSelector", {}), other.labels)
