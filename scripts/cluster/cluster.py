"""The whole platform of an overlay on this machine: three NATS servers, S3, replicas of every service, two gateways."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from scripts.cluster.declared import Overlay
from scripts.cluster.link import Links, links
from scripts.cluster.nats import CLIENT_PORT, NODES, NatsNode, nats_nodes
from scripts.cluster.places import Places
from smeltkit.blobs.access import SERVICES
from smeltkit.blobs.bucket import ACCESS_KEY, SECRET_KEY
from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import Bus, topology
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.errors import BusUnavailable
from smeltkit.ids import new_id
from smeltkit.testing.processes import ServiceProcess
from smeltkit.testing.s3 import S3Server

COUNTS: Final[Mapping[str, int]] = MappingProxyType({"sandbox": 2, "inference": 3, "evaluator": 2, "gateway": 2})
"""Pods of each service."""
LINKED: Final = "evaluator"
"""The service whose way to NATS can be cut, a pod at a time."""
_REPLICA: Final = Path(__file__).resolve().parent / "replica.py"
_SCRIPTED: Final = ("-c", f"import runpy; runpy.run_path({str(_REPLICA)!r}, run_name='__main__')")
"""Runs instead of the module of inference: everything but the engine is the same."""
_TOPOLOGY_TRIES: Final = 10

Extra = Callable[[str, Path], Mapping[str, str]]
"""Further settings of a pod, by its service and its folder."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running cluster. Every process of it may be killed and started again."""

    overlay: Overlay
    places: Places
    nodes: Sequence[NatsNode]
    s3: S3Server
    pods: Mapping[str, list[ServiceProcess]]
    links: Sequence[Links]
    """Ways of the linked service to NATS, one a pod."""
    folder: Path
    extra: Extra

    def pod(self, service: str, index: int, root: Path | None = None) -> ServiceProcess:
        """A pod, not started, as this release declares it, or as the one in the checkout `root` does."""
        overlay = self.overlay if root is None else self.overlay.of_release(root)
        own = self.folder / f"{service}-{index}-{new_id('pod')}"
        settings = _settings(overlay, self.places, service, index, own)
        if service == LINKED:
            url = settings["SMELT_PLATFORM_NATS_URL"]
            for node in range(NODES):
                url = url.replace(f"{self.places.ip('nats', node)}:", f"{self.places.link(index, node)}:")
            settings["SMELT_PLATFORM_NATS_URL"] = url
        arguments = _SCRIPTED if service == "inference" else ("-m", overlay.module(service))
        listen = settings.pop("SMELT_RPC_LISTEN")
        settings |= self.extra(service, own)
        return ServiceProcess(service, settings, own / "log", address=listen, arguments=arguments, root=root)

    @property
    def traces(self) -> Path:
        """Folder of all spans."""
        return self.folder / "traces"

    @property
    def token(self) -> str:
        """What every call must carry."""
        return self.overlay.secret("rpc", "token")

    @property
    def gateways(self) -> str:
        """Target of gRPC that means whichever gateway answers."""
        return "ipv4:" + ",".join(pod.address for pod in self.pods["gateway"])

    def listening(self, service: str, index: int, variable: str) -> str:
        """Address (host:port) at which a pod listens by the setting `variable`."""
        port = self.overlay.environment(service)[variable].rpartition(":")[2]
        return f"{self.places.ip(service, index)}:{port}"

    def http(self, gateway: int) -> str:
        """Address of the HTTP edge of one gateway."""
        return f"http://{self.listening('gateway', gateway, 'SMELT_GATEWAY_HTTP_LISTEN')}"

    def platform(self, workload: str) -> PlatformConfig:
        """How a workload meets NATS and S3: its own user, by the settings of its pods."""
        own = self.folder / f"{workload}-{new_id('settings')}"
        return from_environment(
            PlatformConfig, "SMELT_PLATFORM_", _settings(self.overlay, self.places, workload, 0, own)
        )


@contextmanager
def running_cluster(
    *,
    overlay: str = "laptop",
    counts: Mapping[str, int] = COUNTS,
    extra: Extra = lambda service, folder: {},
    s3_folder: Path | None = None,
    root: Path | None = None,
) -> Iterator[Cluster]:
    """A healthy cluster in a fresh folder.

    `s3_folder` is where the object store keeps its files, `root` the checkout of the release whose services run.
    """
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="smelt-cluster-", ignore_cleanup_errors=True))
        )
        store_folder = s3_folder or folder / "s3"
        store_folder.mkdir(exist_ok=True)
        s3 = S3Server(store_folder, bucket="smelt")
        stack.callback(s3.kill)
        declared, places = Overlay(overlay, _store_keys(s3)), Places(counts, s3.config.s3_endpoint)
        with ThreadPoolExecutor() as pool:
            starting = pool.submit(s3.start)
            nodes = stack.enter_context(nats_nodes(declared, places, folder))
            starting.result()
        ways = [stack.enter_context(links(_ways(places, index))) for index in range(counts[LINKED])]
        cluster = Cluster(
            overlay=declared, places=places, nodes=nodes, s3=s3, pods={}, links=ways, folder=folder, extra=extra
        )
        pods = {
            service: [cluster.pod(service, index, root) for index in range(count)] for service, count in counts.items()
        }
        cluster = replace(cluster, pods=pods)
        stack.callback(lambda: [pod.kill() for group in pods.values() for pod in group])
        S3Store(s3.config).ensure_bucket()
        asyncio.run(_apply_topology(cluster))
        every = [pod for group in pods.values() for pod in group]
        for pod in every:
            pod.launch()
        for pod in every:
            pod.wait_healthy()
        yield cluster


def _store_keys(s3: S3Server) -> dict[tuple[str, str], str]:
    """The Secrets of the object store: of whoever may do all, and of each service."""
    configs = {"s3": s3.config, **{f"s3-{user}": s3.config_of(user) for user in SERVICES}}
    found: dict[tuple[str, str], str] = {}
    for name, config in configs.items():
        found |= {(name, ACCESS_KEY): config.s3_access_key, (name, SECRET_KEY): config.s3_secret_key}
    return found


def _ways(places: Places, pod: int) -> dict[str, str]:
    """Where a linked pod finds each server, and where that server is."""
    return {
        f"{places.link(pod, index)}:{CLIENT_PORT}": f"{places.ip('nats', index)}:{CLIENT_PORT}"
        for index in range(NODES)
    }


def _settings(overlay: Overlay, places: Places, workload: str, index: int, own: Path) -> dict[str, str]:
    """Settings of a pod as the overlay declares them; `own` is its folder, made here.

    What is set here is all that a machine without containers changes.
    """
    own.mkdir()
    settings = places.translated(overlay.environment(workload), workload, index)
    settings |= {"HOME": str(own), "XDG_CACHE_HOME": str(own), "SMELT_TELEMETRY_TRACE_DIR": str(own.parent / "traces")}
    for path, files in overlay.mounts(workload).items():
        mount = own / path.strip("/").replace("/", "-")
        mount.mkdir()
        for file, text in files.items():
            (mount / file).write_text(text)
        settings = {name: value.replace(path, str(mount)) for name, value in settings.items()}
    settings |= {name: str(own / "cache") for name in settings if name.endswith("_CACHE_DIR")}
    return settings | ({"SMELT_SANDBOX_UID_BASE": str(places.uids(index))} if workload == "sandbox" else {})


async def _apply_topology(cluster: Cluster) -> None:
    """What the Job `topology` does, with its user; like a Job it is tried again while the servers elect a leader."""
    platform = cluster.platform("topology")
    for tries_left in reversed(range(_TOPOLOGY_TRIES)):
        try:
            bus = await Bus.connect(platform, name="topology")
            try:
                await topology.apply(bus, topology.declare(replicas=platform.nats_replicas))
                return
            finally:
                await bus.close()
        except BusUnavailable:
            if not tries_left:
                raise
