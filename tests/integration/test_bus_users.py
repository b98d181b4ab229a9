"""The NATS configuration of a cluster on three real servers: each service does its work there, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import nats
import pytest
from smelt.event.v1 import event_pb2

from smeltkit import backup, servers
from smeltkit.bus import Bus, topology
from smeltkit.bus.facts import FACTS
from smeltkit.bus.subjects import CATALOG_BUCKET, GPUS_BUCKET, JOBS_BUCKET, LEASES_BUCKET, STAGES_BUCKET, TENANTS_BUCKET
from smeltkit.config import PlatformConfig
from smeltkit.errors import BusUnavailable

BASE = Path(__file__).resolve().parents[2] / "deploy" / "k8s" / "base" / "nats"
USERS = ("gateway", "importer", "trainer", "evaluator", "inference", "topology", "backup")
WORKERS = ("importer", "trainer", "evaluator")
BUCKETS = (JOBS_BUCKET, LEASES_BUCKET, CATALOG_BUCKET, STAGES_BUCKET, GPUS_BUCKET, TENANTS_BUCKET)
HELD = {
    "gateway": (*BUCKETS[:3], TENANTS_BUCKET),
    "importer": BUCKETS[:4],
    "trainer": BUCKETS[:5],
    "evaluator": BUCKETS[:4],
    "inference": (),
    "topology": (),
    "backup": (),
}


@dataclass(frozen=True)
class Cluster:
    """Three servers; `processes` may be killed one by one."""

    urls: list[str]
    processes: list[subprocess.Popen[bytes]]

    def config(self, user: str) -> PlatformConfig:
        """Settings with which `user` meets all of them."""
        return PlatformConfig(
            nats_url=",".join(self.urls),
            nats_user=user,
            nats_password=f"password-of-{user}",
            nats_replicas=3,
            s3_endpoint="nowhere:1",
            s3_access_key="-",
            s3_secret_key="-",
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The files of the manifests, with ports and folders of this machine put in."""
    ports = servers.free_ports(9)
    environment = {f"NATS_PASSWORD_{user.upper()}": f"password-of-{user}" for user in (*USERS, "routes")}
    environment |= {f"ROUTE_{i}": f"nats://routes:password-of-routes@127.0.0.1:{ports[3 + i]}" for i in range(3)}
    processes = []
    for index in range(3):
        folder = tmp_path_factory.mktemp(f"nats-{index}")
        for name in ("nats.conf", "cluster.conf", "users.conf"):
            text = (BASE / name).read_text()
            text = re.sub(r"^port: 4222$", f"host: 127.0.0.1\nport: {ports[index]}", text, flags=re.MULTILINE)
            text = text.replace("port: 6222", f"host: 127.0.0.1\n  port: {ports[3 + index]}")
            text = re.sub(r"^monitor_port: 8222$", f"http: 127.0.0.1:{ports[6 + index]}", text, flags=re.MULTILINE)
            text = text.replace("/run/nats", str(folder)).replace("store_dir: /data", f"store_dir: {folder}/data")
            (folder / name).write_text(text)
        command = [servers.find_executable("nats-server"), "--config", folder / "nats.conf", "--name", f"nats-{index}"]
        log = (folder / "log").open("wb")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    for port in ports[:3]:
        servers.wait_until(lambda port=port: servers.is_listening(port), "NATS")  # type: ignore[misc]
    yield Cluster([f"nats://127.0.0.1:{port}" for port in ports[:3]], processes)
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module", autouse=True)
def applied(cluster: Cluster) -> None:
    """The topology, by the command and the user that the cluster's job has."""
    platform = cluster.config("topology")
    environment = {
        "SMELT_PLATFORM_NATS_URL": platform.nats_url,
        "SMELT_PLATFORM_NATS_USER": platform.nats_user,
        "SMELT_PLATFORM_NATS_PASSWORD": platform.nats_password,
        "SMELT_PLATFORM_NATS_REPLICAS": "3",
        "SMELT_PLATFORM_S3_ENDPOINT": "nowhere:1",
        "SMELT_PLATFORM_S3_ACCESS_KEY": "-",
        "SMELT_PLATFORM_S3_SECRET_KEY": "-",
    }
    for _ in range(20):
        done = subprocess.run(topology.COMMAND, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    pytest.fail(done.stderr)


@pytest.fixture(params=[user for user in USERS if HELD[user]])
async def holder(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncIterator[tuple[str, Bus]]:
    """Each user that holds buckets, connected."""
    bus = await Bus.connect(cluster.config(request.param), name=request.param)
    yield request.param, bus
    await bus.close()


async def test_a_holder_reads_writes_lists_and_watches_its_buckets(holder: tuple[str, Bus]) -> None:
    user, bus = holder
    for name in HELD[user]:
        bucket = bus.bucket(name)
        async with bucket.watch(user) as doorbell:
            revision = await bucket.create(user, b"one")
            assert await doorbell.wait(5)
        revision = await bucket.update(user, b"two", revision)
        entry = await bucket.get(user)
        assert entry is not None and entry.value == b"two"
        assert user in [found.key for found in await bucket.entries()]
        await bucket.delete(user, revision)


@pytest.mark.parametrize("user", WORKERS)
async def test_a_worker_takes_its_own_work(cluster: Cluster, user: str) -> None:
    bus = await Bus.connect(cluster.config(user), name=user)
    await bus.publish(f"smelt.job.{user}.kind.default", b"id", message_id=f"work of {user}")
    queue = bus.queue(user)
    delivery = await queue.next(5)
    assert delivery is not None and delivery.body == b"id"
    await delivery.ack()
    assert await bus.is_queue_empty(user)
    await queue.close()
    await bus.close()


async def test_who_takes_backups_reads_what_they_hold(cluster: Cluster) -> None:
    owner = await Bus.connect(cluster.config("importer"), name="importer")
    reader = await Bus.connect(cluster.config("backup"), name="backup")
    for name in backup.BUCKETS:
        await owner.bucket(name).create("kept", b"one")
        assert "kept" in [found.key for found in await reader.bucket(name).entries()]
    await owner.close()
    await reader.close()


async def test_facts_are_published_by_their_service(cluster: Cluster) -> None:
    bus = await Bus.connect(cluster.config("inference"), name="inference")
    await bus.publish_event("inference.model.unloaded", event_pb2.ModelUnloaded(digest="sha256:0", cause="idle"))
    await bus.close()


@pytest.mark.parametrize("user", USERS)
async def test_every_other_subject_is_refused(cluster: Cluster, user: str) -> None:
    """Each cell of the matrix is tried: buckets, facts, queues, acknowledgements and the server's own calls."""
    published, heard = _forbidden(user)
    missed = {subject.lower() for subject in (*published, *heard)}
    is_over = asyncio.Event()

    async def on_error(error: Exception) -> None:
        missed.difference_update(re.findall(r'"([^"]+)"', str(error).lower()))
        if not missed:
            is_over.set()

    config = cluster.config(user)
    client = await nats.connect(
        config.nats_url.split(","), user=user, password=config.nats_password, error_cb=on_error, allow_reconnect=False
    )
    for subject in published:
        await client.publish(subject, b"{}")
    for subject in heard:
        await client.subscribe(subject)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            await is_over.wait()
    await client.close()
    assert not missed


@pytest.mark.parametrize("user", ["", "importer", "sandbox", "smelt"])
async def test_who_is_no_user_or_has_another_password_is_not_let_in(cluster: Cluster, user: str) -> None:
    credentials = {"user": user, "password": "password-of-sandbox"} if user else {}
    with pytest.raises(nats.errors.Error, match="(?i)authorization|no servers"):
        await nats.connect(cluster.urls[0], **credentials, allow_reconnect=False, max_reconnect_attempts=0)


async def test_with_one_server_dead_the_work_goes_on(cluster: Cluster) -> None:
    """Runs last. An election may outlast one call, which then says BusUnavailable; nothing stored is lost."""
    bus = await Bus.connect(cluster.config("importer"), name="importer")
    bucket = bus.bucket(CATALOG_BUCKET)
    revision = await bucket.create("survivor", b"before")
    cluster.processes[0].kill()
    entry = None
    async with asyncio.timeout(60):
        while entry is None or entry.value != b"after":
            with contextlib.suppress(BusUnavailable):
                entry = await bucket.get("survivor")
                if entry is not None and entry.value == b"before":
                    await bucket.update("survivor", b"after", revision)
    await bus.close()


def _forbidden(user: str) -> tuple[list[str], list[str]]:
    """Subjects that `user` must not publish, and those that it must not hear."""
    others = [bucket for bucket in BUCKETS if bucket not in HELD[user]]
    read = backup.BUCKETS if user == "backup" else ()
    published = [f"$KV.{bucket}.x" for bucket in others]
    published += [f"$JS.API.STREAM.MSG.GET.KV_{bucket}" for bucket in others if bucket not in read]
    published += [f"smelt.evt.{fact}.default" for fact in FACTS if not fact.startswith(f"{user}.") or user == "gateway"]
    for service in topology.JOB_SERVICES:
        if service != user or user not in WORKERS:
            published += [
                f"$JS.API.CONSUMER.MSG.NEXT.SMELT_JOBS.{service}-worker",
                f"$JS.ACK.SMELT_JOBS.{service}-worker.1",
            ]
    if not HELD[user]:
        published += ["smelt.job.importer.kind.default", "smelt.dlq.importer.kind.default"]
    if user != "topology":
        published += [
            "$JS.API.STREAM.CREATE.x",
            "$JS.API.STREAM.UPDATE.KV_smelt_jobs",
            "$JS.API.CONSUMER.DURABLE.CREATE.SMELT_JOBS.x",
        ]
    published += [
        "$JS.API.STREAM.DELETE.SMELT_JOBS",
        "$JS.API.STREAM.PURGE.KV_smelt_jobs",
        "$SYS.REQ.SERVER.PING",
        "any.other",
    ]
    heard = [f"smelt.kv.{bucket}.x" for bucket in others] + [">", "smelt.job.>", "$JS.ACK.>", "_INBOX.>"]
    return published, heard + [f"_INBOX.{other}.>" for other in USERS if other != user]
