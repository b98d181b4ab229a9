"""Policies on many pods: how many there are, where they run, what they run, and what they say on the bus."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from scripts.manifests.series import unknown_series
from scripts.manifests.tree import SERVICES, Tree, Workload, policy, selects
from smeltkit.blobs.access import BACKUP
from smeltkit.bus import topology
from smeltkit.bus.facts import FACTS

_DIGEST = re.compile(r"[^:@\s]+(:\d+/[^:@\s]+)?@sha256:[0-9a-f]{64}")
_TAG = re.compile(r"[^:@\s]+(:\d+/[^:@\s]+)?:(?!latest$)[\w][\w.-]*")
_GPU = re.compile(r"nvidia\.com/(gpu|mig-.*)")
_HOST = "kubernetes.io/hostname"
_TAINT = {"key": "nvidia.com/gpu", "operator": "Equal", "value": "present", "effect": "NoSchedule"}


@policy
def disruption_budgets(tree: Tree) -> Iterator[str]:
    """Of every running workload at most one pod is taken at a time, and a single one can be moved."""
    for load in tree.workloads:
        budgets = [
            item["spec"]
            for item in tree.of("PodDisruptionBudget")
            if load in tree.selected(item["spec"]["selector"], item["metadata"].get("namespace", ""))
        ]
        if not load.is_job and [budget.get("maxUnavailable") for budget in budgets] != [1]:
            yield f"{load}: needs one disruption budget with maxUnavailable 1"


@policy
def spread(tree: Tree) -> Iterator[str]:
    """Copies of a workload are spread over nodes: one lost node is not a lost service."""
    for load in tree.workloads:
        keys = [
            item["topologyKey"]
            for item in load.pod.get("topologySpreadConstraints", ())
            if load in tree.selected(item["labelSelector"], load.namespace)
        ]
        if load.document["spec"].get("replicas", 1) > 1 and _HOST not in keys:
            yield f"{load}: {load.document['spec']['replicas']} copies are not spread over {_HOST}"
        strict = [item for item in load.pod.get("topologySpreadConstraints", ()) if item.get("minDomains", 1) >= 3]
        if (
            tree.is_pinned
            and load.name == "nats"
            and [item["whenUnsatisfiable"] for item in strict] != ["DoNotSchedule"]
        ):
            yield f"{load}: a node that takes two of its servers takes the quorum; minDomains 3, DoNotSchedule"


@policy
def nodes_suffice(tree: Tree) -> Iterator[str]:
    """Where it is said how many nodes there are, no pod waits for one more for ever."""
    for load in tree.workloads if tree.nodes else ():
        copies = load.document["spec"].get("replicas", 1)
        strict = [
            item
            for item in load.pod.get("topologySpreadConstraints", ())
            if item["topologyKey"] == _HOST and item["whenUnsatisfiable"] == "DoNotSchedule"
        ]
        for item in strict:
            # Fewer nodes than minDomains count as an empty one: no node may then hold more than maxSkew pods.
            if tree.nodes < item.get("minDomains", 1) and copies > tree.nodes * item["maxSkew"]:
                yield f"{load}: its spread wants {item['minDomains']} nodes, there {_are(tree.nodes)}; ScheduleAnyway"
        apart = load.pod.get("affinity", {}).get("podAntiAffinity", {})
        for term in apart.get("requiredDuringSchedulingIgnoredDuringExecution", ()):
            is_own = selects(term.get("labelSelector", {}), load.labels)
            if term["topologyKey"] == _HOST and is_own and copies > tree.nodes:
                yield f"{load}: {copies} copies want a node each, there {_are(tree.nodes)}; prefer it, or have fewer"


@policy
def one_owner_of_replicas(tree: Tree) -> Iterator[str]:
    """A scaled workload is there, has one scaler, and names no number of its own: two owners would fight."""
    scaled: dict[tuple[str, str], list[str]] = {}
    for document in tree.of("ScaledObject", "HorizontalPodAutoscaler", "Rollout"):
        spec = document["spec"]
        target = spec.get("scaleTargetRef") or spec.get("workloadRef")
        scaled.setdefault((target["name"], document["metadata"]["namespace"]), []).append(document["kind"])
    for (name, namespace), kinds in scaled.items():
        target = tree.find("Deployment", name, namespace)
        if target is None:
            yield f"{kinds[0]}: Deployment {name} does not exist in {namespace}"
        elif "replicas" in target["spec"]:
            yield f"Deployment {name}: replicas stands beside a {kinds[0]}; remove it"
        if len(kinds) > 1:
            yield f"Deployment {name}: scaled by {' and '.join(kinds)}; keep one"


@policy
def gpu_pods(tree: Tree) -> Iterator[str]:
    """Who has a GPU tolerates its nodes, is drawn to one pool, asks for what it may take, and rolls without a spare."""
    for load in tree.workloads:
        sides = [_gpus(load, side) for side in ("requests", "limits")]
        if not any(sides) and "resourceClaims" not in load.pod:
            continue
        if sides[0] != sides[1]:
            yield f"{load}: requests {sides[0]} and limits {sides[1]} of GPUs must be equal"
        if "/trainer-cuda" not in load.main["image"]:
            yield f"{load}: the image is {load.main['image']}, which computes on CPUs; leave GPUs to the trainer"
        pool, places = _pool(load), _node_values(load).get("smelt.dev/gpu-pool", [])
        if _TAINT not in load.pod.get("tolerations", ()):
            yield f"{load}: no toleration of the taint nvidia.com/gpu=present:NoSchedule, which its nodes have"
        if places != [pool]:
            yield f"{load}: required node affinity is to smelt.dev/gpu-pool in {places}; it must be {pool}"
        rollout = load.document["spec"].get("strategy", {}).get("rollingUpdate", {})
        if not load.is_job and rollout != {"maxSurge": 0, "maxUnavailable": 1}:
            yield f"{load}: a rollout must not need a spare GPU: maxSurge 0, maxUnavailable 1"


@policy
def proof(tree: Tree) -> Iterator[str]:
    """The trainer takes no work before its node's device was proved, and where it has GPUs that is done on one."""
    for load in tree.services:
        if load.name != "trainer":
            continue
        first = next(iter(load.pod.get("initContainers", ())), {})
        if list(first.get("command", ())) != ["python", "-m", "services.trainer.proof"]:
            yield f"{load}: its first container must be python -m services.trainer.proof"
            continue
        device = tree.environment_of(first, load.namespace).get("SMELT_PROOF_DEVICE")
        has_gpu = bool(_gpus(load, "limits")) or "resourceClaims" in load.pod
        if (device == "cuda") != has_gpu or first["resources"].get("claims") != load.main["resources"].get("claims"):
            yield f"{load}: the proof is made on {device}; it must be the device that trainings get"
        if has_gpu and _gpus_of(first, "limits") != _gpus(load, "limits"):
            yield f"{load}: the proof must be given the GPUs that trainings get"
        for image in {first["image"], load.main["image"]}:
            if ("/trainer-cuda" in image) != has_gpu:
                yield f"{load}: the image is {image}; with a GPU, and only so, it is trainer-cuda"


@policy
def training_nodes(tree: Tree) -> Iterator[str]:
    """Further machines of a training are as many as the trainer says, are like its own, and see its runs."""
    trainer = next((load for load in tree.services if load.name == "trainer"), None)
    nodes = next((load for load in tree.workloads if load.name == "training-nodes"), None)
    if trainer is None:
        return
    environment = tree.environment(trainer)
    wanted = int(environment.get("SMELT_TRAINER_NODES", 1)) - 1
    if nodes is None:
        if wanted:
            yield f"{trainer}: SMELT_TRAINER_NODES is {wanted + 1}, and nothing brings {wanted} more"
        return
    counts = {name: nodes.spec.get(name) for name in ("completions", "parallelism")}
    if set(counts.values()) != {wanted} or nodes.spec.get("completionMode") != "Indexed":
        yield f"{nodes}: must be Indexed, completions and parallelism one less than SMELT_TRAINER_NODES={wanted + 1}"
    if nodes.main["image"] != trainer.main["image"] or _gpus(nodes, "limits") != _gpus(trainer, "limits"):
        yield f"{nodes}: image and GPUs must be those of {trainer}"
    proofs = [[*load.pod.get("initContainers", ()), {}][0].get("command") for load in (nodes, trainer)]
    if proofs[0] != proofs[1]:
        yield f"{nodes}: its device must be proved first, as that of {trainer} is"
    places = [_claimed(trainer, environment["SMELT_TRAINER_CACHE_DIR"])]
    places += [_claimed(nodes, tree.environment(nodes)["SMELT_NODE_RUNS_DIR"].removesuffix("/runs"))]
    claim = tree.find("PersistentVolumeClaim", places[0], trainer.namespace)
    if places[0] != places[1] or claim is None or claim["spec"]["accessModes"] != ["ReadWriteMany"]:
        yield f"{nodes}: the cache of {trainer} must be one claim, ReadWriteMany, at one path in both"
    service = tree.find("Service", nodes.pod.get("subdomain", ""), nodes.namespace)
    if (
        service is None
        or service["spec"].get("clusterIP") != "None"
        or not selects({"matchLabels": service["spec"]["selector"]}, nodes.labels)
    ):
        yield f"{nodes}: its subdomain must be a headless Service that selects its pods; else they have no names"


@policy
def scale_from_zero(tree: Tree) -> Iterator[str]:
    """Callers wait for a replica exactly where none may run."""
    least = min(
        (
            item["spec"].get("minReplicaCount", 0)
            for item in tree.of("ScaledObject")
            if item["metadata"]["name"] == "inference"
        ),
        default=1,
    )
    for load in tree.services:
        start_s = float(tree.environment(load).get("SMELT_PLATFORM_INFERENCE_START_S", 0))
        if "SMELT_PLATFORM_NATS_URL" in tree.environment(load) and (start_s > 0) != (least == 0):
            yield f"{load}: SMELT_PLATFORM_INFERENCE_START_S is {start_s:g}, and inference keeps {least} pods at least"


@policy
def gpu_nodes_are_kept_free(tree: Tree) -> Iterator[str]:
    """Who has no GPU does not run on nodes that have some."""
    for load in tree.workloads:
        if _tolerates_gpus(load) and not _gpus(load, "limits") and "resourceClaims" not in load.pod:
            yield f"{load}: tolerates nvidia.com/gpu without asking for one"


@policy
def images(tree: Tree) -> Iterator[str]:
    """Where work counts an image is a digest; elsewhere it is a tag that stays."""
    for load in tree.workloads:
        for container in load.containers:
            image = container["image"]
            if tree.is_pinned and not _DIGEST.fullmatch(image):
                yield f"{load}: image {image} must be a digest here"
            elif not _DIGEST.fullmatch(image) and not _TAG.fullmatch(image):
                yield f"{load}: image {image} needs a tag other than latest, or a digest"


@policy
def all_services(tree: Tree) -> Iterator[str]:
    """The five services, the gateway and NATS are all there."""
    present = {load.name for load in tree.workloads}
    for name in (*SERVICES, "nats", "topology"):
        if name not in present:
            yield f"{name} is missing"


@policy
def nats_cluster(tree: Tree) -> Iterator[str]:
    """NATS has as many nodes as routes and addresses name, enough for the copies that streams ask for."""
    server = next((load for load in tree.workloads if load.name == "nats"), None)
    nodes = server.document["spec"]["replicas"] if server else 0
    config = nats_config(tree)
    routes = len(re.findall(r"\$ROUTE_\d", config.get("cluster.conf", "")))
    if nodes < 3 or nodes % 2 == 0 or routes != nodes:
        yield f"StatefulSet nats: {nodes} nodes and {routes} routes; an odd number from 3 on, a route to each"
    wanted = {f"nats-{index}.nats.smelt.svc:4222" for index in range(nodes)}
    for load in tree.workloads:
        environment = tree.environment(load)
        if "SMELT_PLATFORM_NATS_URL" not in environment:
            continue
        named = {address.removeprefix("nats://") for address in environment["SMELT_PLATFORM_NATS_URL"].split(",")}
        if named != wanted:
            yield f"{load}: SMELT_PLATFORM_NATS_URL must name {', '.join(sorted(wanted))}"
        if int(environment.get("SMELT_PLATFORM_NATS_REPLICAS", 1)) != min(nodes, 3):
            yield f"{load}: SMELT_PLATFORM_NATS_REPLICAS must be {min(nodes, 3)}"


@policy
def bus_users(tree: Tree) -> Iterator[str]:
    """Each process that meets NATS has a user of its own, with a password, and no user is left over."""
    users = set(re.findall(r"user: (\w+), password: \$NATS_PASSWORD_", nats_config(tree).get("users.conf", "")))
    named = {
        tree.environment(load)["SMELT_PLATFORM_NATS_USER"]
        for load in tree.workloads
        if "SMELT_PLATFORM_NATS_USER" in tree.environment(load)
    }
    # Who takes backups is let in everywhere, so that the component needs no servers of its own.
    if users - {BACKUP} != named - {BACKUP} or BACKUP not in users:
        yield f"ConfigMap nats: users.conf has {sorted(users)}, settings name {sorted(named)}"
    for load in tree.workloads:
        user = tree.environment(load).get("SMELT_PLATFORM_NATS_USER", load.name)
        if user != load.name:
            yield f"{load}: meets NATS as {user}; its user is {load.name}"


@policy
def bus_names(tree: Tree) -> Iterator[str]:
    """Permissions name streams, buckets, durables and facts of the topology only, and each of them is somebody's."""
    declared = topology.declare()
    streams = {str(stream.name) for stream in declared.streams}
    durables = {str(durable.durable_name) for durable in declared.durables}
    text = nats_config(tree).get("users.conf", "")
    named = set(re.findall(r"\b(KV_\w+|SMELT_[A-Z]+)\b(?!\$)", re.sub(r"NATS_PASSWORD_\w+", "", text)))
    for name in sorted(named - streams):
        yield f"ConfigMap nats: users.conf names {name}, which is no stream of the topology"
    buckets = {stream for stream in streams if stream.startswith("KV_")}
    for name in sorted(buckets - named):
        yield f"ConfigMap nats: no user may read {name}"
    for name in sorted(set(re.findall(r"SMELT_JOBS\.([\w-]+-worker)", text)) - durables):
        yield f"ConfigMap nats: users.conf names the durable {name}, which the topology does not declare"
    speakers = {fact.split(".")[0] for fact in FACTS}
    found = set(re.findall(r"smelt\.evt\.(\w+)\.>", text))
    if found != speakers:
        yield f"ConfigMap nats: {sorted(found)} may publish facts, but {sorted(speakers)} have some"


@policy
def series(tree: Tree) -> Iterator[str]:
    """Scalers, rules and dashboards ask for series that our processes send."""
    for document in tree.of("ScaledObject", "HorizontalPodAutoscaler", "PrometheusRule", "ConfigMap"):
        name = document["metadata"]["name"]
        if document["kind"] == "ConfigMap" and "dashboard" not in name:
            continue
        for unknown in unknown_series(document.get("spec") or document["data"]):
            yield f"{document['kind']} {name}: asks for {unknown}, which no process sends"


@policy
def monitors(tree: Tree) -> Iterator[str]:
    """Prometheus is told ports that the selected Services have, and that ask for no key: it has none."""
    for monitor in tree.of("ServiceMonitor"):
        chosen = [
            service
            for service in tree.of("Service")
            if service["metadata"].get("namespace") == monitor["metadata"]["namespace"]
            and selects(monitor["spec"]["selector"], service["metadata"].get("labels", {}))
        ]
        ports = {port["name"] for service in chosen for port in service["spec"]["ports"]}
        for endpoint in monitor["spec"]["endpoints"]:
            if any(port == endpoint["port"] for port in _ports_with_keys(tree)):
                yield f"ServiceMonitor {monitor['metadata']['name']}: port {endpoint['port']} wants a key; ask metrics"
            if endpoint["port"] not in ports:
                yield f"ServiceMonitor {monitor['metadata']['name']}: no selected Service has a port {endpoint['port']}"


def _ports_with_keys(tree: Tree) -> Iterator[str]:
    """Names of ports where a caller needs a key of the edge."""
    for load in tree.services:
        environment = tree.environment(load)
        edge = environment.get("SMELT_GATEWAY_HTTP_LISTEN", "").rpartition(":")[2]
        for port in load.main.get("ports", ()) if environment.get("SMELT_HTTP_API_KEYS_FILE") else ():
            if str(port["containerPort"]) == edge:
                yield port["name"]


def nats_config(tree: Tree) -> Mapping[str, str]:
    """Files of NATS by name; none if it is not there."""
    for document in tree.of("ConfigMap"):
        if "users.conf" in document.get("data", {}):
            found: Mapping[str, str] = document["data"]
            return found
    return {}


def _are(nodes: int) -> str:
    return "is one" if nodes == 1 else f"are {nodes}"


def _claimed(load: Workload, path: str) -> str:
    """The claim that is mounted at `path`; empty if none is."""
    names = {mount["name"] for mount in load.main.get("volumeMounts", ()) if mount["mountPath"] == path}
    claims = [volume.get("persistentVolumeClaim", {}) for volume in load.pod["volumes"] if volume["name"] in names]
    return str(claims[0].get("claimName", "")) if claims else ""


def _gpus(load: Workload, side: str) -> dict[str, Any]:
    return _gpus_of(load.main, side)


def _gpus_of(container: Mapping[str, Any], side: str) -> dict[str, Any]:
    return {name: value for name, value in container["resources"].get(side, {}).items() if _GPU.fullmatch(name)}


def _tolerates_gpus(load: Workload) -> bool:
    return any(item.get("key") in (None, "nvidia.com/gpu") for item in load.pod.get("tolerations", ()))


def _pool(load: Workload) -> str:
    """The component whose nodes have what `load` asks for: the value of their label smelt.dev/gpu-pool."""
    if "resourceClaims" in load.pod:
        return "gpu-dra"
    return "gpu-pool" if "nvidia.com/gpu" in _gpus(load, "limits") else "mig"


def _node_values(load: Workload) -> dict[str, list[str]]:
    """Values of labels, one of which a node must have."""
    required = (
        load.pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    )
    terms = [test for term in required.get("nodeSelectorTerms", ()) for test in term.get("matchExpressions", ())]
    return {test["key"]: test.get("values", []) for test in terms}
