"""Policies on single pods: bounds, probes, rights, identity, ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scripts.manifests.tree import Tree, Workload, amount, policy
from smeltkit import limits

_BOUNDED = ("cpu", "memory", "ephemeral-storage")
_HOST = ("hostNetwork", "hostPID", "hostIPC")


@policy
def bounds(tree: Tree) -> Iterator[str]:
    """Every container says what it needs and where it ends, of processor, memory and disk."""
    for load in tree.workloads:
        for container in load.containers:
            for side in ("requests", "limits"):
                missing = set(_BOUNDED) - set(container.get("resources", {}).get(side, ()))
                if missing:
                    yield f"{load}: container {container['name']} has no {side} of {', '.join(sorted(missing))}"


@policy
def probes(tree: Tree) -> Iterator[str]:
    """Whatever serves has three probes; liveness is slower than readiness, and the start has a minute at least."""
    for load in tree.workloads:
        if load.is_job:
            continue
        found = {name: load.main.get(f"{name}Probe", {}) for name in ("startup", "readiness", "liveness")}
        missing = [name for name, probe in found.items() if not probe]
        if missing:
            yield f"{load}: no {' and no '.join(missing)} probe"
            continue
        declared = {port[key] for port in load.main.get("ports", ()) for key in ("name", "containerPort")}
        for name, probe in found.items():
            asked = {probe[way]["port"] for way in ("httpGet", "tcpSocket", "grpc") if way in probe} - declared
            if asked:
                yield f"{load}: the {name} probe asks port {asked.pop()}, which the container does not declare"
        lasting = {name: _lasting_s(probe) for name, probe in found.items()}
        if lasting["startup"] < 60:
            yield f"{load}: the start has {lasting['startup']} s; give it 60 or more"
        if lasting["liveness"] < max(60, 2 * lasting["readiness"]):
            yield f"{load}: liveness kills after {lasting['liveness']} s; wait 60 s or more, longer than readiness"


@policy
def grpc_health(tree: Tree) -> Iterator[str]:
    """A service is up when its health service says so, asked at the port where it listens; by a command over TLS."""
    for load in tree.services:
        environment = tree.environment(load)
        port = int(environment.get("SMELT_RPC_LISTEN", ":0").rpartition(":")[2])
        has_tls = bool(environment.get("SMELT_RPC_TLS_DIR"))
        for name in ("startup", "readiness", "liveness"):
            probe = load.main.get(f"{name}Probe", {})
            if name == "liveness" and not {"grpc", "exec"} & set(probe):
                continue  # some live by another sign, of which `probes` knows the port
            *words, asked = probe.get("exec", {}).get("command", [None])
            if not has_tls:
                asked = probe.get("grpc", {}).get("port")
            elif words == ["python", "-m", "smeltkit.rpc.health"] and asked == f"127.0.0.1:{port}":
                asked = port
            if asked != port:
                yield f"{load}: the {name} probe must ask gRPC health at port {port}, not {asked}"
        if port not in [declared["containerPort"] for declared in load.main.get("ports", ())]:
            yield f"{load}: listens on port {port}, which the container does not declare"


@policy
def restricted_pod(tree: Tree) -> Iterator[str]:
    """No root, the runtime's system call filter, nothing of the host."""
    for load in tree.workloads:
        security = load.pod.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
            yield f"{load}: runAsNonRoot and a user other than 0 must be set"
        if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{load}: seccompProfile must be RuntimeDefault or Localhost"
        shared = [name for name in _HOST if load.pod.get(name)]
        shared += [f"volume {volume['name']}" for volume in load.pod.get("volumes", ()) if "hostPath" in volume]
        if shared:
            yield f"{load}: shares the host's {', '.join(shared)}"


@policy
def restricted_container(tree: Tree) -> Iterator[str]:
    """No way to more rights, no capability, a root file system that cannot be written."""
    for load in tree.workloads:
        for container in load.containers:
            security = container.get("securityContext", {})
            where = f"{load}: container {container['name']}"
            if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
                yield f"{where} may gain rights"
            if security.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{where} must drop ALL capabilities and add none"
            if security.get("readOnlyRootFilesystem") is not True:
                yield f"{where} must not write its root file system"


@policy
def writable_home(tree: Tree) -> Iterator[str]:
    """With a read-only root, /tmp and HOME of a service are volumes: libraries put caches there."""
    for load in tree.services:
        mounts = [mount["mountPath"] for mount in load.main.get("volumeMounts", ()) if not mount.get("readOnly")]
        for what, path in (("/tmp", "/tmp"), ("HOME", tree.environment(load).get("HOME", "/"))):
            if not any(path == mount or path.startswith(f"{mount}/") for mount in mounts):
                yield f"{load}: {what} ({path}) is on no writable volume"


@policy
def identity(tree: Tree) -> Iterator[str]:
    """Each workload has an account of its own name, and no token of it is mounted."""
    for load in tree.workloads:
        name = load.pod.get("serviceAccountName", "default")
        account = tree.find("ServiceAccount", name, load.namespace)
        if account is None or name == "default":
            yield f"{load}: service account {name!r} is not declared; every workload has its own"
        elif account.get("automountServiceAccountToken") is not False:
            yield f"{load}: service account {name} must not mount its token"
        if not load.is_job and name not in (load.name, "default"):
            yield f"{load}: runs as {name}; its own service account is {load.name}"
        if load.pod.get("automountServiceAccountToken") is not False:
            yield f"{load}: automountServiceAccountToken must be false"


@policy
def says_why(tree: Tree) -> Iterator[str]:
    """What ends a process of ours at its start stands in the pod's status, where `kubectl describe` shows it.

    Of a step of a Workflow Argo tells it.
    """
    for load in [load for load in tree.workloads if load.document["kind"] != "Workflow"]:
        for container in load.containers:
            is_ours = list(container.get("command", ()))[:2] == ["python", "-m"]
            if is_ours and container.get("terminationMessagePolicy") != "FallbackToLogsOnError":
                yield f"{load}: container {container['name']} needs terminationMessagePolicy: FallbackToLogsOnError"


@policy
def end_of_life(tree: Tree) -> Iterator[str]:
    """The kubelet waits as long as a drain may last: sleep, calls, their handlers, background work, flush."""
    flush_s = limits.BUS_CLOSE_TIMEOUT_S + limits.TELEMETRY_FLUSH_S
    for load in tree.services:
        sleep_s = load.main.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if sleep_s < 5:
            yield f"{load}: preStop must sleep 5 s or more, until no endpoint names the pod any more"
        drain_s = float(tree.environment(load).get("SMELT_RPC_DRAIN_GRACE_S", limits.DRAIN_GRACE_S))
        needed_s, given_s = sleep_s + 3 * drain_s + flush_s, load.pod.get("terminationGracePeriodSeconds", 30)
        if given_s < needed_s:
            yield f"{load}: terminationGracePeriodSeconds is {given_s}, a drain may last {needed_s:g}"


@policy
def disk_fits(tree: Tree) -> Iterator[str]:
    """Emptied volumes have a size, and together they fit what the pod may take of the node's disk."""
    for load in tree.workloads:
        sizes = [volume["emptyDir"].get("sizeLimit") for volume in load.pod.get("volumes", ()) if "emptyDir" in volume]
        if None in sizes:
            yield f"{load}: an emptyDir has no sizeLimit"
            continue
        given = sum(amount(_limit(container, "ephemeral-storage")) for container in load.containers)
        if sum(map(amount, sizes)) > given:
            yield f"{load}: volumes of {' + '.join(sizes)} exceed the limit of ephemeral-storage, {given:.0f} bytes"


@policy
def jobs_end(tree: Tree) -> Iterator[str]:
    """A job is tried a bounded number of times, anew at each synchronization, and not after those who wait for it."""
    for load in tree.workloads:
        if not load.is_job:
            continue
        notes = load.document["metadata"].get("annotations", {})
        if "backoffLimit" not in load.spec:
            yield f"{load}: backoffLimit must be set"
        if load.document["kind"] == "Workflow":
            continue  # made by hand, and anew each time
        if load.document["kind"] == "CronJob":
            spec = load.document["spec"]
            is_bounded = spec.get("concurrencyPolicy") == "Forbid" and "activeDeadlineSeconds" in load.spec
            if spec.get("suspend") is not True and not is_bounded:
                yield f"{load}: must be suspended, or bounded: concurrencyPolicy Forbid and activeDeadlineSeconds"
            continue
        if notes.get("argocd.argoproj.io/hook") != "Sync" or "kustomize.toolkit.fluxcd.io/force" not in notes:
            yield f"{load}: a job cannot be changed in place; annotate it as a hook of Argo CD and as forced for Flux"
        if int(notes.get("argocd.argoproj.io/sync-wave", 0)) > 0:
            yield f"{load}: a later wave waits for services that wait for this job; leave it in the first"


def _lasting_s(probe: Any) -> int:
    return int(probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3))


def _limit(container: Any, resource: str) -> object:
    return container.get("resources", {}).get("limits", {}).get(resource, 0)


def limit_of(load: Workload, resource: str) -> float:
    """What the main container may take of `resource`."""
    return amount(_limit(load.main, resource))
